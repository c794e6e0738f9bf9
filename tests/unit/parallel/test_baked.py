"""What changes in a network counts in captured steps, in the middle of an image too."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from torch import nn

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.parallel import compile_blocks, engine_of, network_graphs
from distriray.parallel.baked import Baked
from distriray.parallel.engine import Engine
from tests.models import tiny_sdxl_unet
from tests.unit.parallel.recorded import RecordedGraphs

Change = Callable[[UNet2DConditionModel, int], None]
"""What is done to a network before one of its steps."""

STEPS = 5


def noise(
    unet: UNet2DConditionModel,
    step: int,
    *,
    images: int = 1,
    seed: int = 0,
    tokens: int = 9,
    text: torch.Tensor | None = None,
    **besides: Any,
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * seed + step)
    if text is None:
        text = torch.randn((images, tokens, 32), generator=torch.Generator().manual_seed(seed))
    added = {"text_embeds": torch.ones((images, 16)), "time_ids": torch.ones((images, 6))}
    sample = torch.randn((images, 4, 16, 8), generator=generator)
    return unet(sample, 900 - step, text, added_cond_kwargs=added, **besides).sample.clone()


def drawn(change: Change, graphs: bool) -> tuple[torch.Tensor, int]:
    """The noise of two images, and how many steps of the second one were replayed."""
    unet = tiny_sdxl_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    parameters = [p for name, p in unet.named_parameters() if "lora" in name]
    for index, parameter in enumerate(parameters):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    parallelize(unet, connect("local"), ParallelConfig(), local=[double, counting(unet), Counting])
    maker, engine = RecordedGraphs(), engine_of(unet)
    assert engine is not None
    engine.capture_with(maker if graphs else None)
    with engine.image():
        steps = [noise(unet, step) for step in range(STEPS)]
    before = sum(graph.replays for graph in maker.made)
    assert not graphs or before > 0
    with engine.image():
        for step in range(STEPS):
            change(unet, step)
            steps.append(noise(unet, step))
    return torch.stack(steps), sum(graph.replays for graph in maker.made) - before


def change_scale(unet: UNet2DConditionModel, step: int) -> None:
    if step == 3:
        unet.set_adapters(["default"], [0.2])


def train(unet: UNet2DConditionModel, step: int) -> None:
    """A layer that is another while it is trained."""
    if step == 0:
        unet.mid_block.resnets[0].dropout.p = 1.0
    unet.train(step > 2)


def replace_weights(unet: UNet2DConditionModel, step: int) -> None:
    if step == 3:
        unet.conv_out.weight = nn.Parameter(2 * unet.conv_out.weight)


def double(layer: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


def hook(unet: UNet2DConditionModel, step: int) -> None:
    if step == 3:
        unet.mid_block.register_forward_hook(double)


def counting(block: nn.Module) -> Callable[..., torch.Tensor]:
    calls = []

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return type(block).forward(block, *args, **kwargs) * len(calls)

    return forward


def hook_that_counts(unet: UNet2DConditionModel, step: int) -> None:
    if step == 0:
        unet.mid_block.forward = counting(unet.mid_block)


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(forward, backend="eager")


def compile_the_blocks(unet: UNet2DConditionModel, step: int) -> None:
    if step == 0:
        compile_blocks(unet, backend="eager")


def store_weights_in_half_precision(unet: UNet2DConditionModel, step: int) -> None:
    if step == 0:
        unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


class Counting(AttnProcessor2_0):
    """A processor that does something else in every step, by a state that is no number."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = iter(range(1000))

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().__call__(*args, **kwargs) * next(self.calls)


def count_by_a_processor(unet: UNet2DConditionModel, step: int) -> None:
    if step == 0:
        unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor = Counting()


@pytest.mark.parametrize("change", [change_scale, train, replace_weights, compile_the_blocks])
def test_what_changes_in_the_middle_of_an_image_is_captured_again(change: Change) -> None:
    found, replayed = drawn(change, graphs=True)
    assert torch.equal(found, drawn(change, graphs=False)[0])
    assert replayed > 0


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        (hook, "layer mid_block has a hook"),
        (hook_that_counts, "layer mid_block has a hook"),
        (store_weights_in_half_precision, "layer conv_in has a hook"),
        (count_by_a_processor, "attn2 uses a Counting, which is not known"),
    ],
)
def test_code_that_a_graph_would_pass_by_is_run_and_named(
    change: Change, obstacle: str, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = drawn(change, graphs=False)[0]
    caplog.clear()
    found, replayed = drawn(change, graphs=True)
    assert torch.equal(found, wanted)
    assert (replayed > 0) == (change is hook)  # before it was there
    (warning,) = caplog.messages
    assert "not as CUDA graphs" in warning and obstacle in warning


@pytest.mark.parametrize(
    "replacement",
    [
        lambda block, other: compiled(counting(block)),
        lambda block, other: compiled(other.forward),
        lambda block, other: functools.wraps(compiled(block.forward))(counting(block)),
        lambda block, other: functools.partial(compiled(block.forward), scale=2.0),
    ],
)
def test_what_stands_around_or_within_a_compiled_forward_is_named(replacement: Callable[..., Any]) -> None:
    unet = tiny_sdxl_unet()
    block, other = unet.mid_block.resnets
    block.forward = compiled(compiled(block.forward))
    assert Baked(unet, unet.forward).obstacle is None
    del block.forward
    block.forward = replacement(block, other)
    obstacle = Baked(unet, unet.forward).obstacle
    assert obstacle is not None and "mid_block.resnets.0 has a hook, or something stands" in obstacle


def test_what_autocast_has_cast_is_in_no_graph() -> None:
    def images(graphs: bool) -> torch.Tensor:
        unet = parallelize(tiny_sdxl_unet(), connect("local"), ParallelConfig())
        engine = engine_of(unet)
        assert engine is not None
        engine.capture_with(RecordedGraphs() if graphs else None)
        steps = []
        for image in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=image % 2 == 0), engine.image():
                steps += [noise(unet, step).float() for step in range(3)]
        return torch.stack(steps)

    assert torch.equal(images(graphs=True), images(graphs=False))


def test_a_comparison_sees_what_is_set_and_what_is_exchanged() -> None:
    unet = tiny_sdxl_unet()
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    changes: list[Callable[[], Any]] = [
        lambda: setattr(attention, "scale", 2.0),
        lambda: setattr(attention, "something", None),
        lambda: delattr(attention, "something"),
        lambda: setattr(attention, "processor", type(attention.processor)()),
        lambda: setattr(attention.processor, "lengths", [1]),
        lambda: attention.processor.lengths.append(2),
        lambda: setattr(unet.mid_block.resnets[0], "norm1", unet.mid_block.resnets[0].norm2),
        lambda: setattr(attention, "forward", compiled(attention.forward)),
        lambda: setattr(attention, "forward", compiled(attention.forward)),
        lambda: delattr(attention, "forward"),
        lambda: attention.compile(backend="eager"),
        lambda: attention.compile(backend="eager"),
        lambda: setattr(attention.to_q, "forward", compiled(attention.to_q.forward)),
        lambda: setattr(attention.to_q, "forward", compiled(attention.to_q.forward)),
        lambda: delattr(attention.to_q, "forward"),
        lambda: unet.to(torch.float64),
        lambda: unet.train(),
    ]
    for index, change in enumerate(changes):
        baked = Baked(unet, unet.forward)
        assert baked.holds()
        change()
        assert not baked.holds(), index


def with_adapters(
    communicator: Communicator | None = None, one: str = "to_q", other: str = "to_q"
) -> tuple[UNet2DConditionModel, RecordedGraphs, Engine]:
    """A network with two adapters, each on layers of a name, whose steps are captured."""
    unet = tiny_sdxl_unet()
    for name, target in {"one": one, "other": other}.items():
        unet.add_adapter(LoraConfig(r=2, target_modules=[target], init_lora_weights=False), name)
    for index, (name, parameter) in enumerate(unet.named_parameters()):
        if "lora" in name:
            generator = torch.Generator().manual_seed(index)
            parameter.data = torch.randn(parameter.shape, generator=generator)
    config = ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=False)
    parallelize(unet, communicator or connect("local"), config)
    maker, engine = RecordedGraphs(), engine_of(unet)
    assert engine is not None
    engine.capture_with(maker)
    return unet, maker, engine


def image(unet: UNet2DConditionModel, engine: Engine, adapter: str, scale: float = 1.0) -> torch.Tensor:
    unet.set_adapters([adapter], [scale])
    with engine.image():
        return torch.stack([noise(unet, step) for step in range(4)])


@pytest.mark.parametrize(
    ("ranks", "layers"), [(1, ("to_q", "to_q")), (2, ("to_q", "conv2")), (2, ("conv1", "conv2"))]
)
def test_adapters_in_turn_are_captured_once(ranks: int, layers: tuple[str, str]) -> None:
    settings = [("one", 1.0), ("other", 1.0), ("one", 0.5)]

    def rank(communicator: Communicator) -> None:
        unet, maker, engine = with_adapters(communicator, *layers)
        found, made = [], []
        for _ in range(4):
            found.append([image(unet, engine, *setting) for setting in settings])
            made.append(len(maker.made))
        assert 0 < made[2] == made[3] and all(graph.replays for graph in maker.made)
        engine.capture_with(None)
        expected = [image(unet, engine, *setting) for setting in settings]
        assert not any(torch.equal(expected[0], other) for other in expected[1:])
        assert all(map(torch.equal, found[3], expected)) and all(map(torch.equal, found[0], expected))

    run_in_lockstep(ranks, rank)


def test_settings_that_were_used_long_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_graphs, "MOST_SETTINGS", 2)
    unet, maker, engine = with_adapters()
    assert engine.graphs.alone is not None

    def captured(*setting: Any) -> int:
        """How many graphs three images with this setting made."""
        before = len(maker.made)
        for _ in range(3):
            image(unet, engine, *setting)
        return len(maker.made) - before

    each = captured("one")
    assert captured("other") == each > 0
    assert captured("one") == 0
    assert captured("one", 0.5) == each
    assert captured("one") == 0
    assert captured("other") == each and len(engine.graphs.alone) == 2 * each


def test_graphs_of_layers_that_stand_no_more_are_dropped() -> None:
    unet, _, engine = with_adapters()
    assert engine.graphs.alone is not None
    image(unet, engine, "one")
    image(unet, engine, "other")
    assert len(engine.graphs.alone) > 0
    layers = [weakref.ref(layer) for name, layer in unet.named_modules() if name.endswith("lora_A.other")]
    unet.delete_adapters("other")
    unet.set_adapters(["one"])
    noise(unet, 0)
    gc.collect()
    assert layers and len(engine.graphs.alone) == 0 and not any(layer() for layer in layers)


def test_a_setting_that_comes_back_with_something_more_is_another() -> None:
    def steps(graphs: bool) -> list[torch.Tensor]:
        unet, _, engine = with_adapters()
        if not graphs:
            engine.capture_with(None)
        image(unet, engine, "one")
        attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
        first, second = attention.processor, copy.copy(attention.processor)
        found = []
        for processor in (first, second):
            attention.processor = processor
            found += [image(unet, engine, "one") for _ in range(3)]
        own, first.attend = first.attend, lambda *args: 2 * own(*args)
        attention.processor = first
        return [*found, image(unet, engine, "one")]

    with_graphs, without = steps(True), steps(False)
    assert not torch.equal(without[0], without[-1])
    assert all(map(torch.equal, with_graphs, without))


def test_memory_is_given_back_with_graphs() -> None:
    unet, maker, engine = with_adapters()
    image(unet, engine, "one")
    graph = weakref.ref(maker.made.pop())
    maker.made.clear()
    parallelize(unet, connect("local"), ParallelConfig())
    assert graph() is not None, "another gang of one can do the same steps"
    engine.give_back()
    gc.collect()
    assert graph() is None
