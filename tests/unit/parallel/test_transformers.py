"""Diffusion transformers in gangs: what one device gives, counted steps, and what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache, wraps
from itertools import product
from typing import Any

import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, FluxTransformer2DModel
from diffusers.hooks import apply_first_block_cache
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import Attention, PAGJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, LockstepCommunicator, connect, run_in_lockstep
from distriray.config import Mix
from distriray.errors import GangMismatch, InvalidRequest, UnsupportedModel
from distriray.parallel import engine_of, network_of
from distriray.parallel.partition import TokenPartition
from tests.models import TEXT_WIDTH, tiny_flux_transformer, tiny_qwen_image_transformer
from tests.parameters import pairwise
from tests.unit.parallel.transformers import (
    STEPS,
    TRANSFORMERS,
    Shape,
    Transformer,
    draw,
    drawn,
    error,
    flux3,
    noise,
    step,
    watched,
)

WIDE, SQUARE, PADDED = Shape(), Shape(4, 4, 8, 1), Shape(masked=True)
TALL = Shape(8, 3, 7, 1)
MASKED = (
    "chroma",
    "ernie-image",
    "hunyuan-image",
    "hunyuan-image-distilled",
    "krea2",
    "pixart",
    "qwen-image",
    "qwen-image-2.1",
    "qwen-image-edit",
    "z-image",
)
HALF = (
    "hidden_states",
    "encoder_hidden_states",
    "encoder_hidden_states_2",
    "text_bth",
    "pooled_projections",
    "image_cond_hidden_states",
)
RANKS = [2, 3, 4]
DEALT_TO = [2, 3, 4, 5]
"""Ranks that twelve heads are dealt to, the last of them unevenly."""
LONG = 6
"""Steps where a gang is exact to the end."""


@pytest.fixture(autouse=True)
def native_backend() -> Iterator[None]:
    """`set_attention_backend` changes the whole process's."""
    with attention_backend("native"):
        yield


@cache
def alone(name: str, shape: Shape = WIDE, steps: int = STEPS) -> list[torch.Tensor]:
    return draw(TRANSFORMERS[name].make(), TRANSFORMERS[name], shape, steps)


def gang(
    ranks: int, name: str, shape: Shape = WIDE, heads: int = 2, steps: int = STEPS, **config: Any
) -> Any:
    """Latents and figures of rank 0, after checking that all ranks have the same."""
    config = {"cfg_parallel": False, **config}
    everyone = run_in_lockstep(
        ranks, lambda communicator: drawn(communicator, name, shape, heads, steps, **config)
    )
    for latents, _ in everyone[1:]:
        assert all(map(torch.equal, latents, everyone[0][0]))
    return everyone[0]


def off(latents: list[torch.Tensor], name: str, shape: Shape = WIDE) -> float:
    return max(map(error, latents, alone(name, shape)))


@pytest.mark.parametrize(
    ("name", "shape", "ranks"),
    [*pairwise(list(TRANSFORMERS), [WIDE, SQUARE], RANKS), *pairwise(MASKED, [PADDED], RANKS)],
)
def test_sync_mode_equals_one_device(name: str, shape: Shape, ranks: int) -> None:
    latents, statistics = gang(ranks, name, shape, exchange="sync", steps=LONG)
    assert max(map(error, latents, alone(name, shape, LONG))) < 1e-5
    assert statistics.synchronous


@cache
def alone_with_twelve_heads(name: str, shape: Shape) -> list[torch.Tensor]:
    transformer = TRANSFORMERS[name]
    return draw(transformer.make(**transformer.twelve_heads), transformer, shape, LONG)


def sequences(name: str) -> set[str]:
    """What a family's calls here have tokens of, and attend to within."""
    return {"joint", "image", "text", *(["references"] if name == "flux3-references" else [])}


@pytest.mark.parametrize(
    ("name", "shape", "ranks"),
    [*pairwise(list(TRANSFORMERS), [WIDE, TALL], DEALT_TO), *pairwise(MASKED, [PADDED], DEALT_TO)],
)
def test_heads_dealt_to_the_ranks_equal_one_device_and_send_their_share(
    name: str, shape: Shape, ranks: int
) -> None:
    expected = alone_with_twelve_heads(name, shape)
    config = {"exchange": "sync", "heads": 12}
    latents, ulysses = gang(ranks, name, shape, steps=LONG, attention="ulysses", **config)
    assert max(map(error, latents, expected)) < 1e-5
    # All synchronous steps send as much, and what they draw is shown above.
    _, gathered = gang(ranks, name, shape, steps=1, attention="gather", **config)
    network: Any = network_of(TRANSFORMERS[name].make())
    dealt = sum(plan.sequence in sequences(name) for _, _, plan in network._attentions())
    assert (ulysses.waits, gathered.waits) == (2 * dealt + 1, dealt + 1)
    # Ranks of uneven shares swap a little more or less of what they own.
    assert ulysses.bytes_sent == pytest.approx(2 / ranks * gathered.bytes_sent, rel=0.25)


@pytest.mark.parametrize("ranks", [3, 4])
def test_queries_go_where_the_keys_go_that_they_share(ranks: int) -> None:
    heads, transformer = {"num_attention_heads": 12, "num_key_value_heads": 4}, TRANSFORMERS["krea2"]

    def rank(communicator: Communicator) -> list[torch.Tensor]:
        config = ParallelConfig(exchange="sync", attention="ulysses", cfg_parallel=False)
        network = parallelize(transformer.make(**heads), communicator, config)
        return draw(network, transformer, WIDE, LONG)

    expected = draw(transformer.make(**heads), transformer, WIDE, LONG)
    for latents in run_in_lockstep(ranks, rank):
        assert max(map(error, latents, expected)) < 1e-5


@pytest.mark.parametrize("name", ["sd3", "pixart", "z-image"])
def test_the_halves_of_a_gang_deal_their_heads(name: str) -> None:
    shape = Shape(masked=name != "sd3")
    config = {"exchange": "sync", "attention": "ulysses", "cfg_parallel": True, "steps": LONG}
    latents, _ = gang(4, name, shape, heads=12, **config)
    assert max(map(error, latents, alone_with_twelve_heads(name, shape))) < 1e-5


@pytest.mark.parametrize(
    ("ranks", "heads", "dealt"),
    [(2, 12, False), (3, 12, True), (4, 12, True), (5, 12, True), (8, 12, False), (3, 2, False)],
)
def test_auto_deals_heads_where_that_sends_less_and_no_rank_gets_much_more_than_its_share(
    ranks: int, heads: int, dealt: bool
) -> None:
    sent = {
        attention: gang(ranks, "flux", TALL, heads, 1, exchange="sync", attention=attention)[1].waits
        for attention in ("auto", "gather")
    }
    assert (sent["auto"] > sent["gather"]) == dealt


def test_fewer_heads_than_ranks_are_refused_by_all_of_them() -> None:
    with pytest.raises(InvalidRequest, match="2 heads to 3 ranks"):
        gang(3, "flux", exchange="sync", attention="ulysses")


@pytest.mark.parametrize("exchange", ["displaced", "compressed"])
def test_what_lasts_of_keys_and_values_is_gathered(exchange: Any) -> None:
    dealt, gathered = (
        gang(4, "flux", heads=12, exchange=exchange, attention=attention, warmup_steps=1)[0]
        for attention in ("ulysses", "gather")
    )
    assert all(map(torch.equal, dealt, gathered))


@pytest.mark.parametrize("name", MASKED)
def test_padded_text_is_not_attended_to(name: str) -> None:
    assert error(alone(name, PADDED)[-1][1:], alone(name)[-1][1:]) > 1e-3


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_text_of_fewer_tokens_than_ranks_is_dealt_too(name: str) -> None:
    shape = Shape(text=2, masked=True)
    assert off(gang(3, name, shape, exchange="sync")[0], name, shape) < 1e-5


def test_a_rank_without_text_takes_part_in_the_texts_own_layers_however_they_exchange() -> None:
    shape = Shape(text=2)
    dealt, _ = gang(3, "flux3", shape, heads=12, steps=LONG, exchange="sync", attention="ulysses")
    assert max(map(error, dealt, alone_with_twelve_heads("flux3", shape))) < 1e-5
    assert off(gang(3, "flux3", shape, exchange="compressed")[0], "flux3", shape) < 0.05


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_halves_of_a_gang_compute_halves_of_the_batch(name: str, ranks: int) -> None:
    shape = Shape(text=2, batch=2, masked=True)  # as many tokens as images
    latents, statistics = gang(ranks, name, shape, exchange="sync", cfg_parallel=True)
    assert off(latents, name, shape) < 1e-5
    assert (statistics.waits == 1) == (ranks == 2)


@pytest.mark.parametrize("name", ["qwen-image", "qwen-image-edit"])
def test_halves_have_the_positions_of_the_first_images_shapes_too(name: str) -> None:
    """As one device has them, which goes by the first whatever the others are."""
    transformer, inputs = TRANSFORMERS[name], TRANSFORMERS[name].inputs(Shape(rows=6, columns=4))
    first, edited = [(1, 6, 4)], [(1, 3, 4)] if name == "qwen-image-edit" else []
    last = [*edited, *first] if edited else [(1, 4, 6)]
    inputs["img_shapes"] = [[*first, *edited], last]
    config = ParallelConfig(exchange="sync", cfg_parallel=True)

    def rank(communicator: Communicator) -> torch.Tensor:
        return step(parallelize(transformer.make(), communicator, config), transformer, inputs, 0.5)

    with torch.no_grad():
        expected = step(transformer.make(), transformer, inputs, 0.5)
        for output in run_in_lockstep(2, rank):
            assert error(output, expected) < 1e-5


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_displaced_runs_are_near_and_compressed_ones_nearer(name: str) -> None:
    (displaced, of_displaced), (compressed, of_compressed), (separate, _) = (
        gang(3, name, exchange=exchange, warmup_steps=1) for exchange in ("displaced", "compressed", "none")
    )
    assert not of_displaced.synchronous
    assert error(displaced[0], alone(name)[0]) < 1e-5
    assert 3 * off(compressed, name) < off(displaced, name) < off(separate, name) < 0.5
    assert of_compressed.bytes_sent < 0.35 * of_displaced.bytes_sent


@pytest.mark.parametrize(("exchange", "warmup"), [("displaced", 1), ("displaced_attention", 2)])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_steps_behind_the_warmup_are_displaced(name: str, exchange: Any, warmup: int) -> None:
    def rank(communicator: LockstepCommunicator) -> list[bool]:
        config = ParallelConfig(exchange=exchange, warmup_steps=warmup, cfg_parallel=False)
        network = parallelize(TRANSFORMERS[name].make(), communicator, config)
        synchronous = watched(network)
        draw(network, TRANSFORMERS[name], WIDE)
        draw(network, TRANSFORMERS[name], SQUARE)
        draw(network, TRANSFORMERS[name], WIDE)
        return synchronous

    image = [True] * warmup + [False] * (STEPS - warmup)
    assert run_in_lockstep(2, rank) == [image * 3] * 2


def test_only_what_a_mix_says_of_keys_and_values_matters() -> None:
    for spatial in (Mix(statistics="stale", halos="stale"), Mix(statistics="local", halos_width="int8")):
        assert off(gang(2, "flux", exchange=spatial, warmup_steps=1)[0], "flux") < 1e-5
    prediction = {"keys_values": 0.0}
    one, other = (
        gang(2, "flux", exchange=exchange, warmup_steps=1, prediction=prediction)[0]
        for exchange in ("displaced", "displaced_attention")
    )
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_step_sends_keys_and_values_of_every_layer_and_waits_once_for_each(name: str) -> None:
    _, statistics = gang(2, name, SQUARE, exchange="sync")
    network: Any = network_of(TRANSFORMERS[name].make())
    attending = [plan.sequence for _, _, plan in network._attentions()]
    padded, module = name == "z-image", network.module  # Z-Image's tokens are padded to 32
    sizes = {"z-image": (32, 32), "qwen-image-2.1": (64, 8), "qwen-image-edit": (16 + 8, 8)}
    image, text = sizes.get(name, (16, 8))
    references = 24 if name == "flux3-references" else 0
    own = {
        "joint": (image + text + references) // 2,
        "image": image // 2,
        "text": text // 2,
        "references": references // 2,
        None: 0,
    }
    if padded:
        width, final = module.dim, module.all_final_layer["2-1"].linear
    elif name == "krea2":  # whose keys have half of the heads
        width, final = module.config.num_attention_heads * 16 // 2, module.final_layer.linear
    elif name.startswith("hunyuan-image"):
        width, final = module.config.num_attention_heads * 16, module.proj_out
    elif name == "ernie-image":
        width, final = module.hidden_size, module.final_linear
    else:
        width, final = module.inner_dim, module.proj_out
    keys_values = sum(own[sequence] * 2 * width * 4 for sequence in attending)
    exchanging = sum(own[sequence] > 0 for sequence in attending)
    predicted = final.out_features * image // 2 * 4
    assert statistics.bytes_sent == keys_values + predicted + 48
    assert statistics.waits == exchanging + 1


def guided(network: Any, named: bool = True, steps: int = STEPS) -> list[torch.Tensor]:
    """The latents of an image, by guidance with a call for each of two branches."""
    transformer, latents = TRANSFORMERS["flux"], []
    inputs = {"cond": transformer.inputs(WIDE), "uncond": transformer.inputs(WIDE)}
    inputs["uncond"]["encoder_hidden_states"] = noise(9, *inputs["cond"]["encoder_hidden_states"].shape)
    for index in range(steps):
        said = {}
        for branch, given in inputs.items():
            if named:
                with network.cache_context(branch):
                    said[branch] = step(network, transformer, given, 1 - index / steps)
            else:
                said[branch] = step(network, transformer, given, 1 - index / steps)
        moved = said["uncond"] + 2.0 * (said["cond"] - said["uncond"])
        for given in inputs.values():
            given["hidden_states"] = given["hidden_states"] - moved / steps
        latents.append(inputs["cond"]["hidden_states"])
    return latents


def test_each_branch_that_cache_context_names_has_steps_of_its_own() -> None:
    expected = guided(tiny_flux_transformer())

    def rank(communicator: LockstepCommunicator, named: bool, **config: Any) -> Any:
        config = {"exchange": "displaced", "warmup_steps": 1, "cfg_parallel": False, **config}
        network = parallelize(tiny_flux_transformer(), communicator, ParallelConfig(**config))
        synchronous, engine = watched(network), engine_of(network)
        assert engine is not None
        with engine.image() if named else nullcontext():
            return guided(network, named), synchronous

    for exact, _ in run_in_lockstep(3, lambda c: rank(c, True, exchange="sync")):
        assert max(map(error, exact, expected)) < 1e-5
    for near, synchronous in run_in_lockstep(2, lambda c: rank(c, True)):
        assert synchronous == [True] * 2 + [False] * 2 * (STEPS - 1)
        assert 1e-4 < error(near[-1], expected[-1]) < 0.3
    for exact, synchronous in run_in_lockstep(2, lambda c: rank(c, False)):
        assert all(synchronous)  # the text changes from call to call, so that each begins an image
        assert max(map(error, exact, expected)) < 1e-5


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_gang_of_one_gives_diffusers_own_bits(name: str) -> None:
    network = TRANSFORMERS[name].make()
    before = inspect.signature(network.forward)
    parallelize(network, connect("local"))
    assert inspect.signature(network.forward) == before
    assert all(map(torch.equal, draw(network, TRANSFORMERS[name], WIDE), alone(name)))


def test_a_gang_may_change_its_size_between_images() -> None:
    def rank(communicator: LockstepCommunicator) -> list[torch.Tensor]:
        network = TRANSFORMERS["sd3"].make()
        for gang in (communicator, connect("local"), communicator):
            parallelize(network, gang, ParallelConfig(exchange="sync", cfg_parallel=False))
            latents = draw(network, TRANSFORMERS["sd3"], WIDE)
            assert off(latents, "sd3") < 1e-5
        return latents

    run_in_lockstep(3, rank)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_half_precision_differs_by_its_rounding(name: str) -> None:
    transformer = TRANSFORMERS[name]
    inputs = {
        key: given.bfloat16() if key in HALF else given for key, given in transformer.inputs(PADDED).items()
    }

    def predicted(communicator: Any) -> torch.Tensor:
        config = ParallelConfig(exchange="sync", cfg_parallel=False)
        network = parallelize(transformer.make().bfloat16(), communicator, config)
        return step(network, transformer, inputs, 1.0)

    expected = predicted(connect("local"))
    for ours in run_in_lockstep(3, predicted):
        assert ours.dtype == torch.bfloat16
        assert error(ours.float(), expected.float()) < 2e-2


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_buffers_serve_in_inference_mode_and_outside_it(name: str) -> None:
    def rank(communicator: LockstepCommunicator) -> None:
        config = ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=False)
        network = parallelize(TRANSFORMERS[name].make(), communicator, config)
        with torch.inference_mode():
            within = draw(network, TRANSFORMERS[name], PADDED)
        assert all(map(torch.equal, within, draw(network, TRANSFORMERS[name], PADDED)))

    run_in_lockstep(2, rank)


def test_weights_that_are_cast_layer_by_layer_are_taken() -> None:
    def cast() -> Any:
        network = tiny_flux_transformer()
        network.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        return network

    expected = draw(cast(), TRANSFORMERS["flux"], WIDE, 2)
    assert error(expected[-1], draw(tiny_flux_transformer(), TRANSFORMERS["flux"], WIDE, 2)[-1]) > 1e-4

    def rank(communicator: LockstepCommunicator) -> list[torch.Tensor]:
        config = ParallelConfig(exchange="sync", cfg_parallel=False)
        return draw(parallelize(cast(), communicator, config), TRANSFORMERS["flux"], WIDE, 2)

    for latents in run_in_lockstep(2, rank):
        assert max(map(error, latents, expected)) < 1e-5


def test_the_scale_of_an_adapter_is_taken() -> None:
    inputs = {**TRANSFORMERS["flux"].inputs(WIDE), "joint_attention_kwargs": {"scale": 0.4}}
    expected, ordinary = tiny_flux_transformer(), tiny_flux_transformer()
    adapt(expected)
    adapt(ordinary)
    predicted = step(expected, TRANSFORMERS["flux"], inputs, 1.0)
    unscaled = {**inputs, "joint_attention_kwargs": None}
    assert error(predicted, step(ordinary, TRANSFORMERS["flux"], unscaled, 1.0)) > 1e-3

    def rank(communicator: LockstepCommunicator) -> torch.Tensor:
        network = tiny_flux_transformer()
        adapt(network)
        config = ParallelConfig(exchange="sync", cfg_parallel=False)
        return step(parallelize(network, communicator, config), TRANSFORMERS["flux"], inputs, 1.0)

    for ours in run_in_lockstep(2, rank):
        assert error(ours, predicted) < 1e-5


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_adapters_of_linear_layers_are_taken(name: str) -> None:
    def adapted() -> Any:
        network = TRANSFORMERS[name].make()
        adapt(network)
        return network

    def rank(communicator: Communicator, before: bool) -> list[torch.Tensor]:
        network = adapted() if before else TRANSFORMERS[name].make()
        parallelize(network, communicator, ParallelConfig(exchange="sync", cfg_parallel=False))
        if not before:
            draw(network, TRANSFORMERS[name], WIDE, 1)
            adapt(network)
        return draw(network, TRANSFORMERS[name], WIDE, 2)

    expected = draw(adapted(), TRANSFORMERS[name], WIDE, 2)
    assert error(expected[-1], draw(TRANSFORMERS[name].make(), TRANSFORMERS[name], WIDE, 2)[-1]) > 1e-3
    for before in (True, False):
        for latents in run_in_lockstep(2, lambda c, before=before: rank(c, before)):
            assert max(map(error, latents, expected)) < 1e-5


def adapt(network: Any) -> None:
    """Add a LoRA whose weights follow from their place."""
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_k"]), network)
    for index, (name, weight) in enumerate(network.named_parameters()):
        if "lora_" in name:
            weight.requires_grad_(False).copy_(0.3 * noise(index, *weight.shape))


def test_ranks_with_other_conditions_are_told_so() -> None:
    def rank(communicator: Communicator) -> None:
        network = parallelize(tiny_flux_transformer(), communicator)
        inputs = TRANSFORMERS["flux"].inputs(WIDE)
        inputs["guidance"] = inputs["guidance"] + communicator.rank
        step(network, TRANSFORMERS["flux"], inputs, 1.0)

    with pytest.raises(GangMismatch, match="embedded guidance scale"):
        run_in_lockstep(2, rank)


@pytest.mark.parametrize(
    ("tokens", "other", "error", "said"),
    [
        (22, 1, GangMismatch, "mask of the text's and the image's tokens"),
        (7, 0, InvalidRequest, "attention_mask of 7 tokens, where text and image have 22"),
    ],
)
def test_a_mask_of_chroma_is_of_text_and_image_and_the_same_on_all_ranks(
    tokens: int, other: int, error: type[Exception], said: str
) -> None:
    def rank(communicator: Communicator) -> None:
        network = parallelize(TRANSFORMERS["chroma"].make(), communicator, ParallelConfig(exchange="sync"))
        mask = torch.ones(2, tokens)
        mask[:, 3] = 1 - other * communicator.rank
        inputs = {**TRANSFORMERS["chroma"].inputs(WIDE), "attention_mask": mask}
        step(network, TRANSFORMERS["chroma"], inputs, 1.0)

    with pytest.raises(error, match=said):
        run_in_lockstep(3, rank)


def call_flux(change: Callable[[Any], None] = lambda network: None, **arguments: Any) -> None:
    """One step of a FLUX.1 that was changed after it was parallelized."""
    network = parallelize(tiny_flux_transformer(), connect("local"))
    change(network)
    inputs = TRANSFORMERS["flux"].inputs(WIDE)
    step(network, TRANSFORMERS["flux"], {**inputs, **arguments}, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"joint_attention_kwargs": {"ip_adapter_image_embeds": []}}, "kwargs ip_adapter_image_embeds"),
        ({"joint_attention_kwargs": {"attention_mask": None}}, "kwargs attention_mask; with patches only"),
    ],
)
def test_inputs_that_are_not_cut_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        call_flux(**arguments)


def test_residuals_of_controlnets_are_refused_where_there_are_none() -> None:
    network = parallelize(TRANSFORMERS["chroma"].make(), connect("local"))
    inputs = TRANSFORMERS["chroma"].inputs(WIDE)
    for argument in (
        {"controlnet_block_samples": [torch.ones(2, 15, 32)]},
        {"controlnet_blocks_repeat": True},
    ):
        with pytest.raises(UnsupportedModel, match=f"{next(iter(argument))}, which is not cut"):
            step(network, TRANSFORMERS["chroma"], {**inputs, **argument}, 1.0)


def test_residuals_of_another_picture_are_refused() -> None:
    network = parallelize(TRANSFORMERS["z-image"].make(), connect("local"))
    call = {"x": [noise(1, 4, 1, 8, 8)] * 2, "t": torch.ones(2), "cap_feats": [noise(2, 5, TEXT_WIDTH)] * 2}
    with pytest.raises(InvalidRequest, match="of 65 tokens, where image and text have 64"):
        network(**call, controlnet_block_samples={0: torch.zeros(2, 65, 32)})
    with pytest.raises(InvalidRequest, match="controlnet_block_samples of 14 tokens, where there are"):
        call_flux(controlnet_block_samples=[torch.ones(2, 14, 32)])


def test_skipped_layers_are_refused() -> None:
    network = parallelize(TRANSFORMERS["sd3"].make(), connect("local"))
    inputs = {**TRANSFORMERS["sd3"].inputs(WIDE), "skip_layers": [1]}
    with pytest.raises(UnsupportedModel, match="skip_layers"):
        step(network, TRANSFORMERS["sd3"], inputs, 1.0)


def ip_adapter(network: Any) -> None:
    processor = FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=TEXT_WIDTH)
    network.single_transformer_blocks[0].attn.set_processor(processor)


def spread(network: Any) -> None:
    network._parallel_config = object()


def spread_attention(network: Any) -> None:
    network.transformer_blocks[0].attn.processor._parallel_config = object()


class Lens(nn.Linear):
    pass


def lens(network: Any) -> None:
    network.transformer_blocks[1].ff.net[2] = Lens(128, 32)


def peephole(network: Any) -> None:
    network.transformer_blocks[1].register_forward_hook(lambda *_: None)


def convolution(network: Any) -> None:
    network.transformer_blocks[1].window = nn.Conv2d(1, 1, 3)


def another_attention(network: Any) -> None:
    network.transformer_blocks[1].attn2 = Attention(32)


def bypass(network: Any) -> None:
    network.single_transformer_blocks[0].attn = nn.Identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda network: network.fuse_qkv_projections(), "transformer_blocks.0.attn has fused projections"),
        (ip_adapter, "single_transformer_blocks.0.attn uses FluxIPAdapterAttnProcessor"),
        (lambda network: network.enable_cache(FirstBlockCacheConfig()), "FirstBlockCacheConfig: a cache"),
        (lambda network: apply_first_block_cache(network, FirstBlockCacheConfig()), "FBCHeadBlockHook"),
        (
            lambda network: network.set_attention_backend("flex"),
            "attention backend flex; those .*_native_math",
        ),
        (spread, "spread over devices by diffusers' enable_parallelism"),
        (spread_attention, "attention is spread over devices"),
        (lens, "transformer_blocks.1.ff.net.2 is a Lens"),
        (peephole, "layer transformer_blocks.1 has the forward hook"),
        (convolution, "transformer_blocks.1.window is a Conv2d"),
        (another_attention, "transformer_blocks.1.attn2 is attention that"),
        (bypass, "single_transformer_blocks.0.attn is a Identity, which has no processor"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_not_known_to_look_at_one_token_is_refused(
    change: Callable[[Any], None], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        call_flux(change)


def test_a_hook_on_what_sees_all_tokens_is_refused_as_it_may_see_half_of_the_batch() -> None:
    """A layer whose class is of the family alone, as every rank computes it of all tokens."""

    def louder(layer: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.cat((output[:1], 2 * output[1:]))

    def rank(communicator: Communicator, local: list[Any]) -> torch.Tensor:
        network = TRANSFORMERS["sd3"].make()
        network.pos_embed.register_forward_hook(louder)
        parallelize(network, communicator, ParallelConfig(exchange="sync"), local=local)
        return step(network, TRANSFORMERS["sd3"], TRANSFORMERS["sd3"].inputs(WIDE), 1.0)

    with pytest.raises(UnsupportedModel, match=r"layer pos_embed has the forward hook .*louder"):
        rank(connect("local"), [])
    (both,) = {len(found) for found in run_in_lockstep(2, lambda each: rank(each, [louder]))}
    assert both == WIDE.batch


def test_a_class_of_processors_whose_call_was_replaced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = parallelize(tiny_flux_transformer(), connect("local"))
    monkeypatch.setattr(FluxAttnProcessor, "__call__", lambda *args, **others: 0)
    with pytest.raises(UnsupportedModel, match=r"FluxAttnProcessor.__call__ was replaced by .*lambda"):
        step(network, TRANSFORMERS["flux"], TRANSFORMERS["flux"].inputs(WIDE), 1.0)
    with pytest.raises(UnsupportedModel, match=r"FluxAttnProcessor.__call__ was replaced by .*lambda"):
        parallelize(tiny_flux_transformer(), connect("local"))


@pytest.mark.parametrize("before", [True, False])
def test_a_forward_of_the_networks_class_is_refused_whenever_it_was_replaced(
    before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny_flux_transformer()
    if not before:
        parallelize(network, connect("local"))
    forward = FluxTransformer2DModel.forward

    @wraps(forward)  # as methods that skip some steps have its parameters
    def half(*args: Any, **others: Any) -> Any:
        return (forward(*args, **others)[0] / 2,)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", half)
    inputs = TRANSFORMERS["flux"].inputs(WIDE)
    with pytest.raises(UnsupportedModel, match=r"FluxTransformer2DModel.forward of .* was replaced by"):
        step(parallelize(network, connect("local")), TRANSFORMERS["flux"], inputs, 1.0)


def test_what_was_changed_in_the_middle_of_an_image_is_refused() -> None:
    network = parallelize(tiny_flux_transformer(), connect("local"))
    inputs = TRANSFORMERS["flux"].inputs(WIDE)
    step(network, TRANSFORMERS["flux"], inputs, 1.0)
    network.set_attention_backend("flex")
    with pytest.raises(UnsupportedModel, match="attention backend flex"):
        step(network, TRANSFORMERS["flux"], inputs, 0.9)


def test_backends_are_torchs_own_whoever_names_them() -> None:
    call_flux(lambda network: network.set_attention_backend("_native_math"))
    with attention_backend("_native_math"):
        call_flux()
    with attention_backend("flex"), pytest.raises(UnsupportedModel, match="attention backend flex"):
        call_flux()


def test_a_backend_stays_when_attention_is_cut() -> None:
    network = tiny_flux_transformer()
    network.set_attention_backend("_native_math")
    step(parallelize(network, connect("local")), TRANSFORMERS["flux"], TRANSFORMERS["flux"].inputs(WIDE), 1.0)
    assert network.transformer_blocks[0].attn.processor._attention_backend == "_native_math"


def test_attention_that_is_passed_by_is_found() -> None:
    def skip(hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **others: Any) -> Any:
        return encoder_hidden_states, hidden_states

    def rank(communicator: Communicator) -> None:
        network = tiny_flux_transformer()
        network.transformer_blocks[1].forward = skip
        config = ParallelConfig(exchange="sync", cfg_parallel=False)
        parallelize(network, communicator, config, local=[skip])
        step(network, TRANSFORMERS["flux"], TRANSFORMERS["flux"].inputs(WIDE), 1.0)

    with pytest.raises(UnsupportedModel, match="transformer_blocks.1.attn was called 0 times in a step"):
        run_in_lockstep(2, rank)


@pytest.mark.parametrize("arguments", [{"kv_cache_mode": "extract"}, {"num_ref_tokens": 2}])
def test_kept_keys_and_values_of_reference_pictures_are_refused(arguments: dict[str, Any]) -> None:
    network = parallelize(TRANSFORMERS["flux2"].make(), connect("local"))
    with pytest.raises(UnsupportedModel, match=next(iter(arguments))):
        step(network, TRANSFORMERS["flux2"], {**TRANSFORMERS["flux2"].inputs(WIDE), **arguments}, 1.0)


def test_attention_that_does_more_than_a_familys_is_refused() -> None:
    network = TRANSFORMERS["pixart"].make()
    network.transformer_blocks[2].attn1.residual_connection = True
    with pytest.raises(UnsupportedModel, match="transformer_blocks.2.attn1 is not the attention of"):
        parallelize(network, connect("local"))


@pytest.mark.parametrize("option", ["use_layer3d_rope", "use_additional_t_cond"])
def test_qwen_image_of_layers_is_refused(option: str) -> None:
    network = tiny_qwen_image_transformer(**{option: True})
    with pytest.raises(UnsupportedModel, match=option):
        parallelize(network, connect("local"))


def test_processors_of_guidance_by_perturbed_attention_are_refused() -> None:
    network = TRANSFORMERS["sd3"].make()
    network.transformer_blocks[0].attn.processor = PAGJointAttnProcessor2_0()
    with pytest.raises(UnsupportedModel, match="transformer_blocks.0.attn uses PAGJointAttnProcessor2_0"):
        parallelize(network, connect("local"))


def test_a_cache_that_is_enabled_before_is_refused_at_once() -> None:
    network = tiny_flux_transformer()
    network.enable_cache(FasterCacheConfig(current_timestep_callback=lambda: 0))
    with pytest.raises(UnsupportedModel, match="FasterCacheConfig: a cache decides"):
        parallelize(network, connect("local"))


def test_tokens_are_dealt_evenly_over_image_and_text() -> None:
    partition = TokenPartition.of(16, 8, 3)
    assert partition.counts(0) == (6, 5, 5)
    assert [partition.tokens("text", rank) for rank in range(3)] == [(0, 2), (2, 5), (5, 8)]
    assert partition.of_sequence("joint") == (8, 8, 8)
    assert TokenPartition.of(5, 1, 4).of_sequence("joint") == (2, 2, 1, 1)
    assert TokenPartition.of(15, 6, 4).of_sequence("text") == (2, 1, 1, 2)
    with pytest.raises(InvalidRequest, match="an image of 3 tokens is too small for 4 patches"):
        TokenPartition.of(3, 9, 4)


def test_references_are_dealt_so_that_ranks_have_as_many_tokens_of_pictures() -> None:
    partition = TokenPartition(height=16, width=1, levels=0, world_size=3, text=8, references=16)
    assert partition.of_sequence("image") == (6, 5, 5)
    assert partition.of_sequence("references") == (5, 6, 5)
    assert [partition.tokens("references", rank) for rank in range(3)] == [(0, 5), (5, 11), (11, 16)]
    assert partition.of_sequence("text") == (3, 2, 3)
    assert partition.of_sequence("joint") == (14, 13, 13)
    for height, references, ranks in product(range(8, 16), range(16), range(1, 9)):
        few = TokenPartition(height, 1, 0, ranks, references=references).of_sequence("references")
        assert sum(few) == references and min(few) >= 0


@pytest.mark.parametrize("exchange", ["sync", "displaced"])
def test_images_with_references_and_without_are_drawn_in_turn(exchange: Any) -> None:
    transformer = TRANSFORMERS["flux3-references"]
    alone = Transformer(transformer.make, flux3, {}, predict=transformer.predict)
    kinds = [transformer, alone, transformer, alone]

    def rank(communicator: Communicator, kinds: list[Transformer]) -> list[torch.Tensor]:
        config = ParallelConfig(exchange=exchange, warmup_steps=1, cfg_parallel=False)
        network = parallelize(transformer.make(), communicator, config)
        return [draw(network, kind, WIDE)[-1] for kind in kinds]

    first, second = (run_in_lockstep(2, lambda c, kind=kind: rank(c, [kind])) for kind in kinds[:2])
    assert error(first[0][0], second[0][0]) > 1e-3
    for found in run_in_lockstep(2, lambda c: rank(c, kinds)):
        assert all(map(torch.equal, found, [first[0][0], second[0][0]] * 2))


def fewer_references(inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: inputs[key].narrow(-2, 0, 9) for key in inputs if key.startswith("image_cond")}


def twice(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda inputs: {name: 2 * inputs[name]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (twice("image_cond_hidden_states"), "sum of the reference images"),
        (twice("image_cond_ids"), "positions of the reference images' tokens"),
        (twice("target_timestep"), "timesteps that the step goes to"),
        (fewer_references, "tokens of reference images 21 and 9"),
    ],
)
def test_ranks_of_flux3_with_other_conditions_are_told_so(
    change: Callable[[dict[str, Any]], dict[str, Any]], said: str
) -> None:
    transformer = TRANSFORMERS["flux3-references"]

    def rank(communicator: Communicator) -> None:
        network = parallelize(transformer.make(), communicator)
        inputs = {**transformer.inputs(WIDE), "target_timestep": torch.full((2,), 0.75)}
        other = change(inputs) if communicator.rank else {}
        network(timestep=torch.ones(2), **{**inputs, **other})

    with pytest.raises(GangMismatch, match=said):
        run_in_lockstep(2, rank)


def test_positions_of_references_that_are_not_there_are_refused() -> None:
    network = parallelize(TRANSFORMERS["flux3"].make(), connect("local"))
    inputs = {**TRANSFORMERS["flux3"].inputs(WIDE), "image_cond_ids": torch.zeros(3, 4)}
    with pytest.raises(InvalidRequest, match="image_cond_ids of 3 tokens, where there are 0"):
        step(network, TRANSFORMERS["flux3"], inputs, 1.0)


@pytest.mark.parametrize("name", [name for name, each in TRANSFORMERS.items()])
def test_plans_are_those_of_diffusers_where_it_has_one(name: str) -> None:
    network: Any = network_of(TRANSFORMERS[name].make())
    theirs = getattr(network.module, "_cp_plan", None)
    if theirs is None:
        assert name not in ("flux", "flux2", "qwen-image")
        return
    gathers = {module: plan.gather_dim for module, plan in theirs.items() if not isinstance(plan, dict)}
    assert gathers == {network.plan.gather: 1}
    cuts = {
        (module, key): cut.split_dim
        for module, plan in theirs.items()
        if isinstance(plan, dict)
        for key, cut in plan.items()
    }
    dimensions = {
        key: cut.expected_dims
        for plan in theirs.values()
        if isinstance(plan, dict)
        for key, cut in plan.items()
    }
    ours = {
        (module, key): dimension % dimensions[key]
        for module, plan in network.plan.cuts.items()
        for key, (_, dimension) in plan.items()
    }
    assert ours == cuts


@pytest.mark.parametrize("ranks", [2, 3])
def test_halves_of_a_batch_whose_texts_differ_in_length_make_one_devices_numbers(ranks: int) -> None:
    masked = Shape(4, 3, 5, batch=2, masked=True)  # one text of 5 tokens, one of 45
    latents, _ = gang(2 * ranks, "z-image", masked, exchange="sync", cfg_parallel=True)
    assert off(latents, "z-image", masked) < 1e-5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"x": [[noise(1, 4, 1, 8, 8)]] * 2}, "several pictures"),
        ({"x": [noise(1, 4, 1, 8, 8), noise(1, 4, 1, 8, 16)]}, "give equal ones"),
        ({"x": [noise(1, 4, 2, 8, 8)] * 2}, "give equal ones"),
        ({"patch_size": 4}, "patch_size"),
    ],
)
def test_calls_of_z_image_that_are_not_cut_are_refused(fields: dict[str, Any], said: str) -> None:
    network = parallelize(TRANSFORMERS["z-image"].make(), connect("local"))
    call = {"x": [noise(1, 4, 1, 8, 8)] * 2, "t": torch.ones(2), "cap_feats": [noise(2, 5, TEXT_WIDTH)] * 2}
    with pytest.raises(UnsupportedModel, match=said):
        network(**{**call, **fields})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"siglip_feat_dim": 8}, "siglip_feat_dim"),
        ({"all_patch_size": (4,), "all_f_patch_size": (1,)}, "patches of 2"),
        ({"n_refiner_layers": 0}, "without layers"),
    ],
)
def test_z_images_of_other_shapes_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        parallelize(TRANSFORMERS["z-image"].make(**config), connect("local"))


@pytest.mark.parametrize(
    "config", [{"hidden_size": TEXT_WIDTH, "num_attention_heads": 1}, {"patch_size": 2}], ids=str
)
@pytest.mark.parametrize("cfg_parallel", [False, True])
def test_ernie_images_without_a_projection_of_text_or_of_larger_patches_equal_one_device(
    config: dict[str, int], cfg_parallel: bool
) -> None:
    transformer, shape = TRANSFORMERS["ernie-image"], Shape(6, 4, masked=True)
    expected = draw(transformer.make(**config), transformer, shape)

    def rank(communicator: Communicator) -> list[torch.Tensor]:
        how = ParallelConfig(exchange="sync", cfg_parallel=cfg_parallel)
        return draw(parallelize(transformer.make(**config), communicator, how), transformer, shape)

    for latents in run_in_lockstep(4, rank):
        assert max(map(error, latents, expected)) < 1e-5


def test_ernie_image_predicts_in_the_form_that_it_is_asked_for() -> None:
    inputs = {**TRANSFORMERS["ernie-image"].inputs(WIDE), "timestep": torch.full((2,), 500.0)}
    network = parallelize(TRANSFORMERS["ernie-image"].make(), connect("local"))
    ordinary = TRANSFORMERS["ernie-image"].make()
    named, (first,) = network(**inputs), network(**inputs, return_dict=False)
    assert torch.equal(named.sample, first)
    assert type(named) is type(ordinary(**inputs)) and torch.equal(first, ordinary(**inputs).sample)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text_lens": torch.tensor([7])}, r"text_lens of shape \(1,\), where there are 2 images"),
        ({"text_bth": noise(2, 1, 7, TEXT_WIDTH)}, "text_bth of 1 texts"),
        ({"hidden_states": noise(1, 2, 16, 5, 4)}, r"latents of \(5, 4\), which are no multiples"),
    ],
)
def test_calls_of_ernie_image_whose_parts_do_not_fit_are_refused(fields: dict[str, Any], said: str) -> None:
    transformer = TRANSFORMERS["ernie-image"]
    network = parallelize(transformer.make(patch_size=2), connect("local"))
    with pytest.raises(InvalidRequest, match=said):
        step(network, transformer, {**transformer.inputs(Shape(6, 4)), **fields}, 0.5)


def test_ranks_of_ernie_image_with_texts_of_other_lengths_are_told_so() -> None:
    transformer = TRANSFORMERS["ernie-image"]

    def rank(communicator: Communicator) -> None:
        inputs = transformer.inputs(WIDE)
        inputs["text_lens"] = inputs["text_lens"] - communicator.rank
        step(parallelize(transformer.make(), communicator), transformer, inputs, 0.5)

    with pytest.raises(GangMismatch, match="tokens of each text"):
        run_in_lockstep(2, rank)
