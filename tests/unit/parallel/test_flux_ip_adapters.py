"""IP-Adapters that diffusers' own pipelines of FLUX.1 have, in gangs."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxKontextPipeline, FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from PIL import Image

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.errors import GangMismatch, InvalidRequest, UnsupportedModel
from distriray.parallel import engine_of
from tests.models import (
    IMAGE_WIDTH,
    TEXT_WIDTH,
    tiny_chroma_transformer,
    tiny_flux,
    tiny_flux_ip_adapter,
    tiny_flux_transformer,
    tiny_image_encoder,
    tiny_prompted_flux_transformer,
)
from tests.parameters import pairwise
from tests.unit.parallel.transformers import TRANSFORMERS, Shape, draw, error, noise, step

SCALES: dict[int, Any] = {1: 0.7, 2: [0.7, -0.4]}
"""By the number of IP-Adapters."""
BELOW = Image.linear_gradient("L").resize((48, 64)).convert("RGB")
INSIDE = {"image": BELOW, "mask_image": Image.radial_gradient("L").resize((48, 64)), "strength": 1.0}
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (FluxPipeline, {}),
    "two images": (FluxPipeline, {"num_images_per_prompt": 2}),
    "guided": (FluxPipeline, {"negative_prompt": "fog", "true_cfg_scale": 3.0}),
    "img2img": (FluxImg2ImgPipeline, {"image": BELOW, "strength": 1.0}),
    "inpainting": (FluxInpaintPipeline, INSIDE),
    "kontext": (FluxKontextPipeline, {"image": BELOW, "max_area": 64 * 48, "_auto_resize": False}),
}
SYNC = ParallelConfig(exchange="sync")


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (40, 36, 3))
    return Image.fromarray(noise.astype(np.uint8))


def load(pipeline: Any, adapters: int) -> None:
    weights = [tiny_flux_ip_adapter(pipeline.transformer, seed) for seed in range(adapters)]
    names = [""] * adapters
    pipeline.load_ip_adapter(weights, weight_name=names, subfolder=names)
    pipeline.set_ip_adapter_scale(SCALES[adapters])


def call(pipeline: Any, adapters: int, given: dict[str, Any]) -> torch.Tensor:
    if adapters:
        given = {**given, "ip_adapter_image": [picture(seed) for seed in range(adapters)]}
    if adapters == 2 and type(pipeline) is not FluxPipeline:  # whose others make one negative picture for all
        given["negative_ip_adapter_image"] = [Image.new("RGB", (48, 64))] * adapters
    latents: torch.Tensor = pipeline(
        prompt="a lake at dusk",
        height=64,
        width=48,
        num_inference_steps=3,
        max_sequence_length=12,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **given,
    ).images
    return latents


def drawn(communicator: Communicator | None, name: str, adapters: int) -> tuple[torch.Tensor, int]:
    """The latents, and what this rank has sent in the last step."""
    kind, given = CALLS[name]
    pipeline = kind.from_pipe(tiny_flux())
    pipeline.register_modules(image_encoder=tiny_image_encoder())
    pipeline.set_progress_bar_config(disable=True)
    if adapters:
        load(pipeline, adapters)
    if communicator is not None:
        parallelize(pipeline, communicator, SYNC)
    latents, engine = call(pipeline, adapters, given), engine_of(pipeline)
    return latents, 0 if engine is None else engine.statistics.bytes_sent


@cache
def alone(name: str, adapters: int) -> torch.Tensor:
    return drawn(None, name, adapters)[0]


@pytest.mark.parametrize(("name", "adapters", "ranks"), pairwise(list(CALLS), [1, 2], [1, 2, 3]))
def test_sync_mode_equals_diffusers_own_pipeline(name: str, adapters: int, ranks: int) -> None:
    expected = alone(name, adapters)
    for latents, _ in run_in_lockstep(ranks, lambda communicator: drawn(communicator, name, adapters)):
        assert error(latents, expected) < 1e-5
    assert error(alone(name, 0), expected) > 1e-2


def test_nothing_more_is_sent() -> None:
    with_two, without = (run_in_lockstep(2, lambda c, n=n: drawn(c, "plain", n)[1]) for n in (2, 0))
    assert with_two == without and all(with_two)


def test_buffers_are_those_without_and_known_before() -> None:
    def rank(communicator: Communicator, name: str) -> tuple[int, int]:
        transformer, config = TRANSFORMERS[name], ParallelConfig(exchange="displaced", cfg_parallel=False)
        network = parallelize(transformer.make(), communicator, config)
        engine, inputs = engine_of(network), transformer.inputs(Shape())
        assert engine is not None
        timestep = torch.ones(len(inputs["hidden_states"]))
        calls = [engine.network.read(**inputs, timestep=timestep)]
        estimate = engine.buffer_bytes_of(calls, 2, config)
        draw(network, transformer, Shape())
        return estimate, engine.buffer_bytes

    with_two, without = (
        run_in_lockstep(2, partial(rank, name=name)) for name in ("flux-image-prompts", "flux")
    )
    assert with_two == without
    estimates, taken = zip(*with_two, strict=True)
    assert max(taken) <= min(estimates)


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_that_is_loaded_later_is_drawn_with_and_without_it_again(ranks: int) -> None:
    def rank(communicator: Communicator) -> list[torch.Tensor]:
        pipeline = parallelize(tiny_flux(), communicator, SYNC)
        pipeline.register_modules(image_encoder=tiny_image_encoder())
        latents = [call(pipeline, 0, {})]
        load(pipeline, 1)
        latents.append(call(pipeline, 1, {}))
        pipeline.set_ip_adapter_scale([0.2, 1.1])  # of each block
        latents.append(call(pipeline, 1, {}))
        pipeline.unload_ip_adapter()
        return [*latents, call(pipeline, 0, {})]

    for before, with_one, otherwise, after in run_in_lockstep(ranks, rank):
        assert error(before, alone("plain", 0)) < 1e-5 and torch.equal(after, before)
        assert error(with_one, alone("plain", 1)) < 1e-5 < error(otherwise, with_one)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_each_branch_of_guidance_has_image_prompts_of_its_own(ranks: int) -> None:
    transformer, shape = TRANSFORMERS["flux-image-prompts"], Shape(batch=1)
    shared = {**transformer.inputs(shape), "timestep": torch.ones(1)}
    branches = {
        name: {
            "encoder_hidden_states": noise(seed, 1, shape.text, TEXT_WIDTH),
            "joint_attention_kwargs": {
                "ip_adapter_image_embeds": [
                    noise(seed + pictures, 1, pictures, IMAGE_WIDTH) for pictures in (1, 2)
                ]
            },
        }
        for seed, name in enumerate(("cond", "uncond"))
    }
    expected = [
        transformer.make()(**{**shared, **given}, return_dict=False)[0] for given in branches.values()
    ]

    def rank(communicator: Communicator) -> list[torch.Tensor]:
        network = parallelize(transformer.make(), communicator, SYNC)
        given: list[torch.Tensor] = network(branches=branches, **shared)
        return given

    for predicted in run_in_lockstep(ranks, rank):
        assert all(error(ours, theirs) < 1e-5 for ours, theirs in zip(predicted, expected, strict=True))


def change_scale(network: Any, inputs: dict[str, Any]) -> None:
    network.transformer_blocks[1].attn.processor.scale = [0.7, 0.4]


def change_weights(network: Any, inputs: dict[str, Any]) -> None:
    network.transformer_blocks[1].attn.processor.to_k_ip[0].weight.data += 1


def change_projection(network: Any, inputs: dict[str, Any]) -> None:
    network.encoder_hid_proj.image_projection_layers[0].image_embeds.bias.data += 1


def change_picture(network: Any, inputs: dict[str, Any]) -> None:
    inputs["joint_attention_kwargs"]["ip_adapter_image_embeds"][1] += 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_scale, "attention processors, or their scales"),
        (change_weights, "weights"),
        (change_projection, "weights"),
        (change_picture, "image prompts"),
    ],
)
def test_ranks_with_other_ones_are_told_so(change: Any, said: str) -> None:
    transformer = TRANSFORMERS["flux-image-prompts"]

    def rank(communicator: Communicator) -> None:
        network, inputs = transformer.make(), transformer.inputs(Shape())
        if communicator.rank:
            change(network, inputs)
        step(parallelize(network, communicator, SYNC), transformer, inputs, 1.0)

    with pytest.raises(GangMismatch, match=said):
        run_in_lockstep(2, rank)


def test_what_does_not_go_together_is_refused_by_name() -> None:
    with_some, without = TRANSFORMERS["flux-image-prompts"], TRANSFORMERS["flux"]
    plain, prompted = (
        parallelize(make(), connect("local"))
        for make in (tiny_flux_transformer, tiny_prompted_flux_transformer)
    )
    with pytest.raises(UnsupportedModel, match="ip_adapter_image_embeds without an IP-Adapter"):
        step(plain, with_some, with_some.inputs(Shape()), 1.0)
    with pytest.raises(UnsupportedModel, match="an IP-Adapter without ip_adapter_image_embeds"):
        step(prompted, without, without.inputs(Shape()), 1.0)
    embeds = with_some.inputs(Shape(batch=1))["joint_attention_kwargs"]
    with pytest.raises(InvalidRequest, match="of 1 images, where there are 2; give each its own"):
        step(prompted, without, {**without.inputs(Shape()), "joint_attention_kwargs": embeds}, 1.0)
    masked = {"joint_attention_kwargs": {**embeds, "ip_adapter_masks": []}}
    with pytest.raises(UnsupportedModel, match="kwargs ip_adapter_masks; with patches only"):
        step(prompted, without, {**without.inputs(Shape(batch=1)), **masked}, 1.0)


def test_those_of_other_families_are_refused_by_name() -> None:
    network = tiny_chroma_transformer()
    processor = FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=TEXT_WIDTH)
    network.transformer_blocks[0].attn.set_processor(processor)
    with pytest.raises(
        UnsupportedModel, match="uses FluxIPAdapterAttnProcessor; known is FluxAttnProcessor:"
    ):
        parallelize(network, connect("local"))
