"""What a gang honours of a pipeline's features, what it refuses, and how it ends."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    ControlNetModel,
    DiTTransformer2DModel,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.errors import GangMismatch, GenerationCancelled, InvalidRequest, UnsupportedModel
from distriray.parallel import engine_of
from tests.cases import Case, alone, call
from tests.models import IMAGE_WIDTH, randomize, tiny_ip_adapter, tiny_sd15, tiny_sdxl
from tests.parameters import sweep

SYNC = ParallelConfig(exchange="sync", cfg_parallel=False)
DISPLACED = ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=False)
CASE = Case(scheduler="euler", steps=3, height=96, width=64)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def single(feature: Any) -> Any:
    return feature(connect("local"))


# LoRA


def _lora(communicator: Communicator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """Before, with and again without a LoRA on attention and convolutions, loaded after `parallelize`."""
    from peft import LoraConfig

    pipeline = tiny_sdxl()
    names = list(pipeline.unet.state_dict())
    parallelize(pipeline, communicator, SYNC)
    same_names = names == list(pipeline.unet.state_dict())
    before = call(pipeline, CASE)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in"]
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    adapters = [p for name, p in pipeline.unet.named_parameters() if "lora" in name]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapters:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    with_lora = call(pipeline, CASE)
    pipeline.unet.disable_adapters()
    return before, with_lora, call(pipeline, CASE), same_names


def test_lora_loaded_later_works_as_on_one_device() -> None:
    before, with_lora, disabled, same_names = run_in_lockstep(2, _lora)[0]
    _, expected, _, _ = single(_lora)
    assert same_names
    assert close(with_lora, expected) and not close(before, expected)
    assert close(disabled, before)


def _lora_displaced(known: bool, communicator: Communicator) -> torch.Tensor:
    """The same shape with other layers, in a mode that keeps buffers between images."""
    from peft import LoraConfig

    pipeline = parallelize(tiny_sdxl(), communicator, DISPLACED)
    engine = engine_of(pipeline)
    if not known:
        engine.network.adapters_that_exchange = lambda: None  # type: ignore[method-assign, union-attr]
    call(pipeline, CASE)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of what multiplies the zeros that make it change nothing
        pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["conv1"]))
    with_lora = call(pipeline, CASE)
    pipeline.unet.disable_adapters()
    assert torch.allclose(call(pipeline, CASE), with_lora, atol=1e-4)
    return with_lora


@pytest.mark.parametrize("known", [True, False])
def test_layers_may_come_and_go_between_images(known: bool) -> None:
    assert run_in_lockstep(2, functools.partial(_lora_displaced, known))[0].isfinite().all()


# Other inputs of the U-Net


def _variants(communicator: Communicator) -> dict[str, torch.Tensor]:
    base = parallelize(tiny_sdxl(), communicator, SYNC)
    picture = Image.linear_gradient("L").resize((64, 96)).convert("RGB")
    mask = Image.new("L", (64, 96), 0)
    mask.paste(255, (0, 0, 32, 96))
    common: dict[str, Any] = {"output_type": "latent", "num_inference_steps": 4, "guidance_scale": 5.0}

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    results = {
        "image to image": AutoPipelineForImage2Image.from_pipe(base)(
            "x", image=picture, strength=0.8, generator=generator(), **common
        ).images,
        "inpainting": AutoPipelineForInpainting.from_pipe(base)(
            "x",
            image=picture,
            mask_image=mask,
            height=96,
            width=64,
            strength=0.9,
            generator=generator(),
            **common,
        ).images,
        "guidance rescale": call(base, Case(**{**vars(CASE), "extra": {"guidance_rescale": 0.7}})),
    }
    controlnet = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    randomize(controlnet, 5)
    controlled = StableDiffusionXLControlNetPipeline(
        **{k: v for k, v in base.components.items() if k not in ("image_encoder", "feature_extractor")},
        controlnet=controlnet.eval(),
        add_watermarker=False,
    )
    controlled.set_progress_bar_config(disable=True)
    results["control net"] = controlled(
        "x", image=Image.new("RGB", (64, 96), "red"), height=96, width=64, generator=generator(), **common
    ).images
    return results


def test_pipelines_around_the_same_unet_equal_one_device() -> None:
    together, expected = run_in_lockstep(3, _variants)[0], single(_variants)
    for name, latents in expected.items():
        assert close(together[name], latents), name


def _image_prompts(communicator: Communicator, config: ParallelConfig, plus: bool) -> list[torch.Tensor]:
    """Latents without, with and again without an IP-Adapter, loaded after `parallelize`.

    "Plus" has attention of its own, of 16 queries: as many as a rank has pixels at the lowest level.
    """
    pipeline = parallelize(tiny_sdxl(), communicator, config)
    case = Case(**{**vars(CASE), "height": 128})
    latents = [call(pipeline, case)]
    weights = tiny_ip_adapter(pipeline.unet, 4, "plus" if plus else "plain")
    pipeline.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
    shape = (2, 1, 5, IMAGE_WIDTH) if plus else (2, 1, IMAGE_WIDTH)  # unconditional and conditional
    image = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    latents.append(call(pipeline, Case(**{**vars(case), "extra": {"ip_adapter_image_embeds": [image]}})))
    pipeline.unload_ip_adapter()
    return [*latents, call(pipeline, case)]


@pytest.mark.parametrize("plus", sweep([True, False]))
def test_an_ip_adapter_loaded_later_works_as_on_one_device(plus: bool) -> None:
    expected = single(lambda communicator: _image_prompts(communicator, SYNC, plus))
    assert not close(expected[1], expected[0]) and close(expected[2], expected[0])
    halves = ParallelConfig(exchange="sync", cfg_parallel=True)
    for config in (SYNC, halves):
        rank = functools.partial(_image_prompts, config=config, plus=plus)
        for together, alone_ in zip(run_in_lockstep(2, rank)[0], expected, strict=True):
            assert close(together, alone_), config


def _padless_downsampling(communicator: Communicator) -> torch.Tensor:
    pipeline = parallelize(tiny_sd15(downsample_padding=0), communicator, SYNC)
    return call(pipeline, Case("sd15", height=192, width=64, steps=3, scheduler="euler"))


def test_downsampling_that_pads_by_hand_equals_one_device() -> None:
    assert close(run_in_lockstep(3, _padless_downsampling)[0], single(_padless_downsampling))


def _direct(communicator: Communicator, **inputs: Any) -> torch.Tensor:
    unet = parallelize(tiny_sdxl(class_embed_type="timestep").unet, communicator, SYNC)
    generator = torch.Generator().manual_seed(0)
    text = torch.randn((2, 9, 32), generator=generator)
    keep = torch.ones((2, 9))
    keep[0, 4:] = 0
    inputs = {"class_labels": torch.tensor([1.0, 2.0]), "encoder_attention_mask": keep, **inputs}
    return unet(
        torch.randn((2, 4, 12, 8), generator=generator),
        torch.tensor([500, 500]),
        text,
        added_cond_kwargs={"text_embeds": torch.ones((2, 16)), "time_ids": torch.ones((2, 6))},
        **inputs,
    ).sample


def test_text_masks_and_class_labels_equal_one_device() -> None:
    assert close(run_in_lockstep(2, _direct)[0], single(_direct))


@pytest.mark.parametrize(
    ("inputs", "name"),
    [
        ({"attention_mask": torch.ones((2, 96))}, "attention_mask"),
        ({"cross_attention_kwargs": {"gligen": {}}}, "gligen"),
        ({"cross_attention_kwargs": {"ip_adapter_masks": []}}, "ip_adapter_masks"),
    ],
)
def test_inputs_that_patches_cannot_honour_are_refused_by_name(inputs: dict[str, Any], name: str) -> None:
    with pytest.raises(UnsupportedModel, match=name):
        _direct(connect("local"), **inputs)


def test_other_networks_are_refused_with_what_is_supported() -> None:
    transformer = DiTTransformer2DModel(
        num_layers=1, num_attention_heads=1, attention_head_dim=8, norm_num_groups=1
    )
    with pytest.raises(UnsupportedModel, match=r"DiTTransformer2DModel.*1\.x, 2\.x and XL"):
        parallelize(transformer, connect("local"))


def test_freeu_and_sliced_attention_are_refused_by_name() -> None:
    pipeline = parallelize(tiny_sdxl(), connect("local"))
    pipeline.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(UnsupportedModel, match="FreeU"):
        call(pipeline, CASE)
    pipeline = tiny_sdxl()
    pipeline.enable_attention_slicing(1)
    parallelize(pipeline, connect("local"))
    with pytest.raises(UnsupportedModel, match="SlicedAttnProcessor"):
        call(pipeline, CASE)


@pytest.mark.parametrize("wanting", ["sample", "class_labels"])
def test_a_gradient_is_refused_where_one_is_wanted(wanting: str) -> None:
    """As guidance by what a picture will be asks for it: in part it is that of the latents themselves."""
    unet = parallelize(tiny_sdxl(class_embed_type="timestep").unet, connect("local"), SYNC)
    inputs = {"sample": torch.ones((2, 4, 12, 8)), "class_labels": torch.ones(2)}
    inputs[wanting].requires_grad_()
    text, added = torch.ones((2, 9, 32)), {"text_embeds": torch.ones((2, 16)), "time_ids": torch.ones((2, 6))}

    def step() -> torch.Tensor:
        return unet(timestep=500, encoder_hidden_states=text, added_cond_kwargs=added, **inputs).sample

    with pytest.raises(UnsupportedModel, match=r"a gradient of what a UNet2DConditionModel in a gang"):
        step()
    with torch.no_grad():
        assert not step().requires_grad
    inputs[wanting] = inputs[wanting].detach()
    assert not step().requires_grad


# Errors and flags


def _raises(communicator: Communicator, config: dict[str, Any], case: Case) -> str:
    pipeline = parallelize(tiny_sdxl(), communicator, ParallelConfig(**config))
    try:
        call(pipeline, case)
    except (InvalidRequest, GangMismatch) as error:
        after = call(pipeline, CASE)  # the gang is as good as before
        assert close(after, alone(CASE))
        return str(error)
    return ""


def test_a_height_too_small_names_the_smallest() -> None:
    sync = {"exchange": "sync", "cfg_parallel": False}
    case = Case(height=64, width=64, steps=2, scheduler="euler")
    message = run_in_lockstep(3, functools.partial(_raises, config=sync, case=case))[0]
    assert "8 rows is too small for 3 patches" in message and "smallest that works has 9 rows" in message


def test_forced_guidance_halves_without_guidance_say_so() -> None:
    case = Case(**{**vars(CASE), "guidance": 1.0})
    halves = {"exchange": "sync", "cfg_parallel": True}
    message = run_in_lockstep(2, functools.partial(_raises, config=halves, case=case))[0]
    assert "a batch of 1" in message


def _different_seeds(communicator: Communicator) -> str:
    pipeline = parallelize(tiny_sdxl(), communicator, SYNC)
    generator = torch.Generator().manual_seed(communicator.rank)
    try:
        pipeline("x", height=96, width=64, num_inference_steps=2, generator=generator, output_type="latent")
    except GangMismatch as error:
        return str(error)
    return ""


def test_ranks_that_differ_are_told_what_differs() -> None:
    for message in run_in_lockstep(2, _different_seeds):
        assert "sum of the latents" in message and "equally seeded generator" in message


@pytest.mark.parametrize("config", ["sync", {"exchange": "sync"}, diffusers.ParallelConfig()])
def test_a_configuration_of_another_class_is_refused_before_anything_is_changed(config: Any) -> None:
    pipeline = tiny_sdxl()
    kind = f"{type(config).__module__}.{type(config).__qualname__}"
    with pytest.raises(TypeError, match=rf"config is a {kind}, not a distriray\.ParallelConfig"):
        parallelize(pipeline, connect("local"), config)
    assert engine_of(pipeline) is None


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_copy_of_what_is_in_a_gang_is_refused_with_what_to_do(
    part: str, copied: Callable[[Any], Any]
) -> None:
    pipeline = parallelize(tiny_sdxl(), connect("local"), SYNC)
    call(pipeline, CASE)
    with pytest.raises(TypeError, match=r"joined a gang cannot be deep-copied .* before parallelize"):
        copied(getattr(pipeline, part))


def _precise(communicator: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and picture of a pipeline in float64, whose group norms are float32 in a gang."""
    pipeline = parallelize(tiny_sdxl().to(torch.float64), communicator, SYNC)
    latents = call(pipeline, CASE)
    return latents, pipeline.vae.decode(latents, return_dict=False)[0]


def test_a_pipeline_in_float64_is_drawn_as_by_one_device() -> None:
    for ours, theirs in zip(run_in_lockstep(2, _precise)[0], single(_precise), strict=True):
        assert ours.dtype is torch.float64 and close(ours, theirs)


def _quick(communicator: Communicator) -> list[torch.Tensor]:
    """Five images of one step and one prompt each, by a pipeline around a U-Net that is in a gang already."""
    first = tiny_sdxl()
    second = type(first)(**{**first.components, "scheduler": copy.deepcopy(first.scheduler)})
    parallelize(first, communicator, DISPLACED)
    parallelize(second, communicator, DISPLACED)
    case = Case(**{**vars(CASE), "steps": 1, "images": 1})
    images = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        size = {"height": case.height, "width": case.width, "num_inference_steps": 1}
        images.append(second("x", **size, generator=generator, output_type="latent").images)
    return images


def test_each_image_of_one_step_begins_anew_whichever_pipeline_makes_it() -> None:
    for ours, theirs in zip(run_in_lockstep(2, _quick)[0], single(_quick), strict=True):
        assert close(ours, theirs)


def _hooked(communicator: Communicator, before: bool) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """A gang is joined again after a hook took the networks' forward, or after one that was there left.

    The latents, a picture, and whether both networks exchanged.
    """
    pipeline = tiny_sdxl()
    networks = (pipeline.unet, pipeline.vae.decoder)
    if before:
        for network in networks:
            network.forward = functools.partial(network.forward)
    parallelize(pipeline, communicator, SYNC)
    call(pipeline, CASE)
    for network in networks:
        plain = types.MethodType(type(network).forward, network)
        network.forward = plain if before else functools.partial(network.forward)
    parallelize(pipeline, communicator, SYNC)
    latents = call(pipeline, CASE)
    sent = [engine_of(pipeline).statistics.bytes_sent, communicator.bytes_sent]
    picture = pipeline.vae.decode(latents, return_dict=False)[0]
    return latents, picture, sent[0] > 0 and communicator.bytes_sent > sent[1] + 1000


@pytest.mark.parametrize("before", sweep([False, True]))
def test_a_gang_is_joined_past_hooks_on_the_networks(before: bool) -> None:
    hooked = functools.partial(_hooked, before=before)
    latents, picture, exchanged = run_in_lockstep(2, hooked)[0]
    expected = single(hooked)
    assert exchanged and close(latents, expected[0]) and close(picture, expected[1])


def _offloaded(communicator: Communicator) -> tuple[list[torch.Tensor], list[int]]:
    """Latents of two images of a pipeline that offloads its models, and the bytes sent for each."""
    pipeline = tiny_sdxl()
    pipeline.enable_model_cpu_offload(device="cpu")
    parallelize(pipeline, communicator, SYNC)
    latents, sent = [], [communicator.bytes_sent]
    for _ in range(2):
        latents.append(call(pipeline, CASE))
        sent.append(communicator.bytes_sent)
    return latents, [after - before for before, after in itertools.pairwise(sent)]


def test_a_pipeline_that_offloads_its_models_draws_every_image_in_patches() -> None:
    latents, sent = run_in_lockstep(2, _offloaded)[0]
    expected = alone(CASE)
    assert all(close(image, expected) for image in latents)
    assert sent[0] == sent[1] > 0


def _flags(communicator: Communicator) -> tuple[list[bool], int, bool]:
    """The last rank asks to yield in step 1 and, in another image, to cancel in step 2."""
    pipeline = parallelize(tiny_sdxl(), communicator, DISPLACED)
    engine = engine_of(pipeline)
    asks = communicator.rank == communicator.world_size - 1
    seen: list[bool] = []

    def yield_at_one(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(engine.yielding)
        if step == 0 and asks:
            engine.ask_yield()
        return values

    def cancel_at_two(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        if step == 1 and asks:
            engine.ask_cancel()
        return values

    call(pipeline, Case(**{**vars(CASE), "extra": {"callback_on_step_end": yield_at_one}}))
    steps: list[int] = []
    cancelled = False
    try:
        call(pipeline, Case(**{**vars(CASE), "steps": 6, "extra": {"callback_on_step_end": cancel_at_two}}))
    except GenerationCancelled:
        cancelled = True
    return seen, len(steps), cancelled


def test_one_rank_asks_and_all_leave_after_the_same_step() -> None:
    for ranks in (1, 3):
        for outcome in run_in_lockstep(ranks, _flags):
            assert outcome == ([False, True, True], 2, True)


def test_a_second_thread_is_refused_while_a_call_is_under_way_and_leaves_that_alone() -> None:
    pipeline = parallelize(tiny_sdxl(), connect("local"), SYNC)
    engine = engine_of(pipeline)
    assert engine is not None
    expected, compute = call(pipeline, CASE), engine.network.compute
    refused: list[BaseException | None] = []

    def another_thread_calls(*args: Any) -> Any:
        with ThreadPoolExecutor(1) as thread:
            refused.append(thread.submit(pipeline.unet, *[None] * 3).exception())
        return compute(*args)

    engine.network.compute = another_thread_calls  # type: ignore[method-assign]
    assert torch.equal(call(pipeline, CASE), expected)
    engine.network.compute = compute  # type: ignore[method-assign]
    assert len(refused) == CASE.steps
    assert all("two threads call one UNet2DConditionModel at a time" in str(error) for error in refused)
    assert torch.equal(call(pipeline, CASE), expected)
