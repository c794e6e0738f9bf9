"""Short steps compute a network's first block, and take from the last whole step what the others added."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import nn

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.config import WHOLE_AT_FIRST
from distriray.errors import UnsupportedModel
from distriray.parallel import engine_of
from tests.models import tiny_sdxl_unet
from tests.unit.parallel.recorded import RecordedGraphs
from tests.unit.parallel.test_branches import FAMILIES, arguments
from tests.unit.parallel.test_branches import drawn as drawn_by_branches
from tests.unit.parallel.test_room import told_and_held
from tests.unit.parallel.transformers import TRANSFORMERS, Shape, error, step

WAYS = [
    (2, {"exchange": "sync", "attention": "gather"}),
    (3, {"exchange": "sync", "attention": "ulysses"}),
    (4, {"exchange": "sync", "attention": "gather"}),
    (3, {"exchange": "displaced", "warmup_steps": 1}),
    (2, {"exchange": "compressed", "warmup_steps": 1}),
]
IN_TURN = [(name, *way) for name, way in zip(TRANSFORMERS, cycle(WAYS), strict=False)]
"""Each family in one way."""
EVERY_SECOND = ParallelConfig(cache_interval=2, cfg_parallel=False)
STEPS = 8
WHOLE = [True, True, True, False, True, False, True, False]
"""Which steps of every second are whole."""


@pytest.fixture(autouse=True)
def native_backend() -> Iterator[None]:
    """`set_attention_backend` changes the whole process's."""
    with attention_backend("native"):
        yield


def made(name: str, attention: str | None = None) -> Any:
    return TRANSFORMERS[name].make(**(TRANSFORMERS[name].twelve_heads if attention == "ulysses" else {}))


def predict(network: Any, name: str, sigma: float, shift: float = 0.0) -> torch.Tensor:
    """What a network predicts of its inputs, which `shift` changes."""
    inputs = TRANSFORMERS[name].inputs(Shape())
    return step(
        network, TRANSFORMERS[name], {**inputs, "hidden_states": inputs["hidden_states"] + shift}, sigma
    )


def drawn(network: Any, name: str) -> list[torch.Tensor]:
    """What is predicted in the steps of an image, whose inputs change."""
    engine = engine_of(network)
    assert engine is not None
    with engine.image():
        return [predict(network, name, 1.0 - 0.03 * number, 0.03 * number) for number in range(STEPS)]


def blocks_of(network: Any) -> list[nn.Module]:
    """All blocks of the lists that a network has."""
    lists = (each for each in network.modules() if isinstance(each, nn.ModuleList))
    return [
        block
        for each in lists
        for block in each
        if "Block" in type(block).__name__ or "Layer" in type(block).__name__
    ]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_short_step_of_what_the_whole_one_had_predicts_the_same(name: str) -> None:
    network = parallelize(made(name), connect("local"), EVERY_SECOND)
    engine = engine_of(network)
    assert engine is not None
    with engine.image():
        *_, whole, short = (predict(network, name, 0.5) for _ in range(4))
    assert error(short, whole) < 1e-5


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_whole_and_short_steps_are_in_turn(name: str) -> None:
    network, called = made(name), Counter[nn.Module]()

    def count(block: nn.Module, *_: Any) -> None:
        called[block] += 1

    blocks = blocks_of(network)
    for block in blocks:
        block.register_forward_hook(count)
    network = parallelize(network, connect("local"), EVERY_SECOND, local=[count])
    counts, engine = [], engine_of(network)
    assert engine is not None
    with engine.image():
        for number in range(STEPS):
            called.clear()
            predict(network, name, 1.0 - 0.03 * number, 0.03 * number)
            counts.append(sum(called[block] for block in blocks))
    whole, few = counts[0], min(counts)
    assert 0 < few < whole
    assert [{whole: True, few: False}[count] for count in counts] == WHOLE


@pytest.mark.parametrize(("name", "ranks"), zip(TRANSFORMERS, cycle([2, 3, 4])))
@pytest.mark.parametrize("attention", ["gather", "ulysses"])
def test_a_gang_that_waits_for_fresh_values_equals_one_device(name: str, ranks: int, attention: str) -> None:
    expected = drawn(parallelize(made(name, attention), connect("local"), EVERY_SECOND), name)

    def rank(communicator: Communicator) -> list[torch.Tensor]:
        config = EVERY_SECOND.model_copy(update={"exchange": "sync", "attention": attention})
        return drawn(parallelize(made(name, attention), communicator, config), name)

    everyone = run_in_lockstep(ranks, rank)
    assert all(max(map(error, predicted, expected)) < 1e-5 for predicted in everyone)


@pytest.mark.parametrize(("name", "ranks"), zip(FAMILIES, cycle([2, 4])))
def test_halves_of_a_gang_each_take_what_their_own_branch_had(name: str, ranks: int) -> None:
    transformer, by_halves = TRANSFORMERS[name], {"exchange": "sync", "cfg_parallel": "auto"}
    lone = parallelize(made(name), connect("local"), EVERY_SECOND)
    expected = drawn_by_branches(lone, transformer, apart=False, steps=STEPS)

    def rank(communicator: Communicator) -> list[torch.Tensor]:
        network = parallelize(made(name), communicator, EVERY_SECOND.model_copy(update=by_halves))
        return drawn_by_branches(network, transformer, apart=False, steps=STEPS)

    for latents in run_in_lockstep(ranks, rank):
        assert max(map(error, latents, expected)) < 1e-5


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_where_guidance_ends_is_whole_and_so_is_the_first_of_a_picture_that_is_drawn_on(
    ranks: int,
) -> None:
    transformer = TRANSFORMERS["sd3"]
    both = transformer.inputs(Shape())
    one = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in both.items()}

    def rank(communicator: Communicator) -> list[bool]:
        config = EVERY_SECOND.model_copy(update={"exchange": "sync", "cfg_parallel": "auto"})
        network, short = parallelize(transformer.make(), communicator, config), []
        engine = engine_of(network)
        assert engine is not None
        with engine.image(at_step=20) as image:
            for number in range(8):
                step(network, transformer, both if number < 4 else one, 1.0 - 0.03 * number)
                short.append(image.branches[None].reuse.short)
        return short

    everyone = run_in_lockstep(ranks, rank)
    assert everyone == [[False, True] * 4] * ranks


@pytest.mark.parametrize(("name", "ranks", "way"), IN_TURN)
def test_captured_steps_predict_the_same_bit_for_bit(name: str, ranks: int, way: dict[str, Any]) -> None:
    def rank(communicator: Communicator) -> tuple[list[torch.Tensor], list[torch.Tensor], int, str | None]:
        network = parallelize(
            made(name, way.get("attention")), communicator, EVERY_SECOND.model_copy(update=way)
        )
        engine, maker = engine_of(network), RecordedGraphs()
        assert engine is not None
        engine.capture_with(maker)
        captured = [each for _ in range(3) for each in drawn(network, name)][-STEPS:]
        obstacle, replays = engine.graphs.obstacle, sum(graph.replays for graph in maker.made)
        engine.capture_with(None)
        return captured, drawn(network, name), replays, obstacle

    for captured, launched, replays, obstacle in run_in_lockstep(ranks, rank):
        if name == "qwen-image-2.1":
            assert obstacle is not None, "it reads where images are"
            continue
        assert obstacle is None
        assert all(map(torch.equal, captured, launched))
        assert replays


@pytest.mark.parametrize("interval", [1, 2, 3, 4])
def test_one_of_so_many_steps_is_whole_behind_the_first_three(interval: int) -> None:
    network = parallelize(made("sd3"), connect("local"), ParallelConfig(cache_interval=interval))
    engine, whole = engine_of(network), []
    assert engine is not None
    with engine.image() as image:
        for number in range(12):
            predict(network, "sd3", 1.0 - 0.03 * number, 0.03 * number)
            whole.append(not image.branches[None].reuse.short)
    assert whole == [True] * 3 + [(number + 1) % interval == 0 for number in range(9)]


def test_a_step_with_another_text_or_in_another_gang_is_whole() -> None:
    transformer = TRANSFORMERS["sd3"]
    network, inputs = (
        parallelize(transformer.make(), connect("local"), EVERY_SECOND),
        transformer.inputs(Shape()),
    )
    engine, short = engine_of(network), []
    assert engine is not None
    with engine.image() as image:
        for number in range(10):
            if number == 5:
                inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"] + 1.0
            if number == 8:
                parallelize(network, connect("local"), EVERY_SECOND)
            step(network, transformer, inputs, 1.0 - 0.03 * number)
            short.append(image.branches[None].reuse.short)
    assert short == [False, False, False, True, False, False, True, False, False, True]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_step_where_one_of_two_calls_ends_is_whole_in_every_gang(ranks: int) -> None:
    """Also where all ranks make both, so that the picture is the one of halves."""
    transformer = TRANSFORMERS["qwen-image"]

    def rank(communicator: Communicator) -> list[bool]:
        config = EVERY_SECOND.model_copy(update={"exchange": "sync", "cfg_parallel": "auto"})
        network, short = parallelize(transformer.make(), communicator, config), []
        engine = engine_of(network)
        assert engine is not None
        with engine.image() as image:
            for number in range(9):
                given = arguments(transformer, None, 1.0 - 0.03 * number)
                if number > 4:
                    del given["uncond"]
                network(branches=given)
                short.append(image.branches["cond"].reuse.short)
        return short

    everyone = run_in_lockstep(ranks, rank)
    assert everyone == [[False, False, False, True, False, False, True, False, True]] * ranks


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen-image-edit"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_of_another_size_is_whole(name: str, ranks: int) -> None:
    def rank(communicator: Communicator) -> list[bool]:
        config = EVERY_SECOND.model_copy(update={"exchange": "sync"})
        network, short = parallelize(made(name), communicator, config), []
        engine = engine_of(network)
        assert engine is not None
        with engine.image() as image:
            for number in range(8):
                inputs = TRANSFORMERS[name].inputs(Shape(rows=4 if number < 5 else 6))
                step(network, TRANSFORMERS[name], inputs, 1.0 - 0.03 * number)
                short.append(image.branches[None].reuse.short)
        return short

    everyone = run_in_lockstep(ranks, rank)
    assert everyone == [[False, False, False, True, False, False, True, False]] * ranks


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_whole_steps_of_images_in_turn_attend_to_their_own_text(name: str, graphs: bool) -> None:
    """Of text whose keys and values layers keep, a short step computes those of the first block alone."""

    def drawn_in_order(order: str) -> dict[str, list[torch.Tensor]]:
        network = parallelize(made(name), connect("local"), EVERY_SECOND)
        engine, inputs = engine_of(network), TRANSFORMERS[name].inputs(Shape())
        assert engine is not None
        if graphs:
            engine.capture_with(RecordedGraphs())
        texts = {"a": inputs["encoder_hidden_states"], "b": inputs["encoder_hidden_states"] + 1.0}
        images, found = {each: engine.image() for each in texts}, {each: [] for each in texts}
        for each in order:
            with images[each]:
                given = {**inputs, "encoder_hidden_states": texts[each]}
                sigma = 1.0 - 0.03 * len(found[each])
                found[each].append(step(network, TRANSFORMERS[name], given, sigma))
        return found

    one_by_one, in_turn = (drawn_in_order(order) for order in ("a" * 8 + "b" * 8, "aaabaabbbabbbaab"))
    for each, expected in one_by_one.items():
        assert max(map(error, in_turn[each], expected)) < 1e-6


def test_steps_with_what_a_controlnet_adds_are_whole_and_so_is_the_one_after_them() -> None:
    network, inputs = (
        parallelize(made("flux"), connect("local"), EVERY_SECOND),
        TRANSFORMERS["flux"].inputs(Shape()),
    )
    residuals = {"controlnet_block_samples": [torch.ones(2, 15, 32)]}
    engine, short = engine_of(network), []
    assert engine is not None
    with engine.image() as image:
        for number in range(8):
            step(
                network, TRANSFORMERS["flux"], inputs | (residuals if number < 5 else {}), 1.0 - 0.03 * number
            )
            short.append(image.branches[None].reuse.short)
    assert short == [False] * 6 + [True, False]


@pytest.mark.parametrize("interval", [0, 101, 1.5])
def test_turns_are_of_1_to_100_steps(interval: float) -> None:
    """A host that measures itself draws whole ones."""
    with pytest.raises(ValueError, match="cache_interval"):
        ParallelConfig(cache_interval=interval)


def test_u_nets_refuse_short_steps() -> None:
    with pytest.raises(UnsupportedModel, match="take fewer steps"):
        parallelize(tiny_sdxl_unet(), connect("local"), EVERY_SECOND)


def test_short_steps_wait_for_fresh_values_and_whole_ones_take_those_of_the_last_whole_one() -> None:
    def rank(communicator: Communicator) -> list[tuple[int, bool]]:
        config = EVERY_SECOND.model_copy(update={"exchange": "displaced", "warmup_steps": 1})
        network, figures = parallelize(made("sd3"), communicator, config), []
        engine = engine_of(network)
        assert engine is not None
        with engine.image():
            for number in range(STEPS):
                predict(network, "sd3", 1.0 - 0.03 * number, 0.03 * number)
                figures.append((engine.statistics.waits, engine.statistics.synchronous))
        return figures

    figures = run_in_lockstep(2, rank)[0]
    assert [waits for waits, _ in figures] == [5, 5, 5, 3, 5, 3, 5, 3], (
        "one for the output, and one a layer or bucket"
    )
    assert [synchronous for _, synchronous in figures] == [True] + [False] * (STEPS - 1)


@pytest.mark.parametrize("way", [{"exchange": "sync"}, {"exchange": "displaced"}])
@pytest.mark.parametrize("interval", [2, 3])
def test_steps_in_turn_begin_behind_the_first_three_however_many_are_synchronous(
    interval: int, way: dict[str, Any]
) -> None:
    """So what hosts measure of three steps and some turns is the mean of whole turns."""

    def rank(communicator: Communicator) -> list[bool]:
        config = EVERY_SECOND.model_copy(update={"cache_interval": interval, **way})
        network, whole = parallelize(made("sd3"), communicator, config), []
        engine = engine_of(network)
        assert engine is not None
        with engine.image() as image:
            for number in range(WHOLE_AT_FIRST + 2 * interval):
                predict(network, "sd3", 1.0 - 0.03 * number)
                if not engine.statistics.synchronous:
                    whole.append(not image.branches[None].reuse.short)
        return whole

    assert run_in_lockstep(2, rank) == [([False] * (interval - 1) + [True]) * 2] * 2


@pytest.mark.parametrize(("name", "ranks", "way"), IN_TURN)
def test_buffers_of_short_steps_are_estimated_too(name: str, ranks: int, way: dict[str, Any]) -> None:
    config = EVERY_SECOND.model_copy(update=way)

    def rank(communicator: Communicator) -> tuple[int, int]:
        network = made(name, way.get("attention"))
        return told_and_held(communicator, network, lambda network: drawn(network, name), config)

    everyone = run_in_lockstep(ranks, rank)
    assert {told for told, _ in everyone} == {max(held for _, held in everyone)}
