"""`exchange="auto"`: the freshest mix whose waits a gang's link keeps short, chosen once for all ranks."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, LockstepCommunicator, Work, run_in_lockstep
from distriray.collective.subgroup import Subgroup
from distriray.config import MIXES
from distriray.parallel import Engine, engine_of
from distriray.parallel.choice import (
    LEAST_STEPS,
    MAX_SHAPES,
    MEASURED_STEPS,
    Choices,
    TimedStep,
    agreed,
)
from distriray.parallel.stopwatch import Stopwatch
from tests.models import tiny_sdxl_unet
from tests.parameters import sweep
from tests.unit.parallel.transformers import TRANSFORMERS, Shape, draw, watched

INPUTS = {
    "encoder_hidden_states": torch.ones((1, 7, 32)),
    "added_cond_kwargs": {"text_embeds": torch.ones((1, 16)), "time_ids": torch.ones((1, 6))},
}
SAMPLE = torch.randn((1, 4, 16, 12), generator=torch.Generator().manual_seed(0))


class Clock(Stopwatch):
    """A stopwatch that shows what it is told."""

    def __init__(self, shows: float) -> None:
        super().__init__()
        self._shows = shows

    @property
    def seconds(self) -> float:
        return self._shows


def timed(whole: float, rows: float, keys_values: float) -> TimedStep:
    return TimedStep(Clock(whole), Clock(rows), Clock(keys_values))


@pytest.mark.parametrize(
    ("rows", "keys_values", "place"),
    [
        (0.05, 0.05, 0),  # a tenth of the step
        (0.05, 0.06, 1),  # without keys and values 0.05 of 0.94
        (0.06, 0.40, 1),  # 0.06 of 0.6
        (0.07, 0.40, 2),  # 0.07 of 0.6
        (0.30, 0.00, 2),
    ],
)
def test_the_freshest_mix_within_the_bound_is_chosen(rows: float, keys_values: float, place: int) -> None:
    choices = Choices()
    for _ in range(1 + LEAST_STEPS):
        choices.note("shape", timed(1.0, rows, keys_values))
    assert choices.place("shape", max_wait=0.1) == place


def test_waits_whose_medians_are_more_than_the_steps_choose_what_waits_least() -> None:
    choices = Choices()
    for step in ((9, 9, 9), (11, 10, 0), (21, 10, 10), (11, 0, 10), (11, 10, 0), (11, 10, 10)):
        choices.note("shape", timed(*step))
    assert choices.place("shape", 0.1) == 2


def choice(stale: Mapping[int, float], rows: float = 0.05, keys_values: float = 0.25) -> int:
    """The place, by synchronous steps of a second and by the seconds of steps with stale values."""
    choices = Choices()
    for _ in range(1 + LEAST_STEPS):
        choices.note("shape", timed(1.0, rows, keys_values))
        for place, whole in stale.items():
            choices.note("shape", timed(whole, 0.0, 0.0), place)
    return choices.place("shape", max_wait=0.1)


@pytest.mark.parametrize(
    ("stale", "place"),
    [
        ({}, 1),  # expected to take 0.75
        ({1: 0.76}, 1),
        ({1: 1.0}, 2),  # as keys and values are waited for all the same, and nobody has tried the next
        ({1: 1.0, 2: 0.76}, 2),
        ({1: 1.0, 2: 0.88}, 2),  # above the bound, and the fastest by more than that
        ({1: 1.0, 2: 0.99}, 0),  # nothing is gained
        ({1: 0.9, 2: 0.88}, 1),  # hardly slower, and fresher
        ({2: 3.0}, 1),
    ],
)
def test_what_was_expected_of_stale_values_is_believed_until_they_were_tried(
    stale: dict[int, float], place: int
) -> None:
    assert choice(stale) == place


def test_the_first_step_does_not_count_and_the_choice_is_kept() -> None:
    choices = Choices()
    choices.note("shape", timed(1.0, 0.9, 0.0))
    for _ in range(LEAST_STEPS):
        assert choices.place("shape", 0.1) == -1, "too few steps besides the first were seen"
        choices.note("shape", timed(1.0, 0.0, 0.0))
    for _ in range(2 * MEASURED_STEPS):
        choices.note("shape", timed(1.0, 0.0, 0.0))
    assert choices.place("other", 0.1) == -1
    assert choices.place("shape", 0.1) == 0
    for _ in range(3):
        choices.note("shape", timed(1.0, 0.9, 0.0))
    assert choices.place("shape", 0.1) == 0


def test_another_bound_is_kept_by_what_was_measured_for_the_first_one() -> None:
    choices = Choices()
    for _ in range(1 + LEAST_STEPS):
        choices.note("shape", timed(1.0, 0.06, 0.1))
    assert choices.place("shape", max_wait=0.1) == 1
    for _ in range(2):
        choices.note("shape", timed(1.0, 0.9, 0.0))
        assert choices.place("shape", max_wait=0.2) == 0, "whoever may wait longer has one device's picture"
        assert choices.place("shape", max_wait=0.01) == 2
        assert choices.place("shape", max_wait=0.1) == 1


def test_shapes_without_end_are_not_remembered_for_ever() -> None:
    choices = Choices()
    for shape in ("old", "used"):
        for _ in range(1 + LEAST_STEPS):
            choices.note(shape, timed(1.0, 0.0, 0.0))
        assert choices.place(shape, 0.1) == 0
    for shape in range(MAX_SHAPES - 1):
        choices.place(shape, 0.1)
        choices.place("used", 0.1)
    assert choices.place("used", 0.1) == 0
    assert choices.place("old", 0.1) == -1


def test_marks_of_a_device_are_kept_until_the_next_image_of_any_shape() -> None:
    choices, clock = Choices(), Clock(0.0)
    kept = weakref.ref(clock)
    for shape in ("once", "often"):
        for _ in range(1 + LEAST_STEPS):
            choices.note(shape, TimedStep(Clock(1.0), clock, clock))
    del clock
    assert kept() is not None
    assert choices.place("often", 0.1) == 0
    assert kept() is None
    assert choices.place("once", 0.1) == 0


@pytest.mark.parametrize(
    ("places", "exchange"),
    [([0, 0, 0], "sync"), ([0, 2, 1], "displaced"), ([0, 1, 0], "displaced_attention"), ([2, -1, 2], "sync")],
)
def test_ranks_agree_on_the_mix_that_waits_least(places: list[int], exchange: str) -> None:
    mixes = run_in_lockstep(3, lambda gang: MIXES[agreed(gang, places[gang.rank], lambda _: True)])
    assert mixes == 3 * [MIXES[exchange]]


class Hours(threading.local):
    """The clock of each rank, which goes on while it computes and waits for messages, and never by itself."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def compute(self, *_: Any) -> None:
        """A hook before a layer that takes a second."""
        self.now += 1.0


class Slow(Subgroup):
    """A gang whose messages take `byte_s` seconds a byte."""

    def __init__(self, parent: Communicator, ranks: Sequence[int], hours: Hours, byte_s: float) -> None:
        super().__init__(parent, ranks)
        self._hours, self._byte_s = hours, byte_s

    def subgroup(self, ranks: Sequence[int]) -> Slow:
        return Slow(self._parent, ranks, self._hours, self._byte_s)

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> Work:
        taken_s = self._byte_s * sum(tensor.nbytes for tensor in sends.values())
        return _Late(super().exchange(sends, receives), self._hours, self._hours.now + taken_s)


class InOrder(Slow):
    """A gang whose messages take turns on one link, as those of a stream do."""

    free_at = 0.0

    def subgroup(self, ranks: Sequence[int]) -> InOrder:
        return InOrder(self._parent, ranks, self._hours, self._byte_s)

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> Work:
        taken_s = self._byte_s * sum(tensor.nbytes for tensor in sends.values())
        self.free_at = max(self.free_at, self._hours.now) + taken_s
        return _Late(Subgroup.exchange(self, sends, receives), self._hours, self.free_at)


class _Late:
    def __init__(self, work: Work, hours: Hours, at: float) -> None:
        self._work, self._hours, self._at = work, hours, at

    def wait(self) -> None:
        self._hours.now = max(self._hours.now, self._at)
        self._work.wait()


def in_gang(gang: Communicator, config: ParallelConfig, hours: Hours) -> tuple[Engine, Any]:
    """A tiny U-Net that takes its time to compute, and its engine."""
    unet = tiny_sdxl_unet()
    unet.conv_in.register_forward_pre_hook(hours.compute)
    parallelize(unet, gang, config, local=[hours.compute])
    engine = engine_of(unet)
    assert engine is not None
    return engine, unet


def images(engine: Engine, unet: Any, count: int, steps: int = 6) -> list[tuple[Any, torch.Tensor]]:
    """How each image was shared, and the output of its last step."""
    made = []
    for _ in range(count):
        with engine.image():
            outputs = [unet(SAMPLE * (1 + 0.1 * step), 900 - step, **INPUTS).sample for step in range(steps)]
        made.append((engine.exchange, outputs[-1]))
    return made


@pytest.mark.parametrize(
    ("byte_s", "expected"), sweep([(3e-6, "displaced_attention"), (0.0, "sync"), (1e-4, "displaced")])
)
def test_later_images_are_what_the_first_one_showed(
    byte_s: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = Hours()
    monkeypatch.setattr("distriray.parallel.stopwatch.time", hours)

    def rank(communicator: LockstepCommunicator) -> list[Any]:
        gang = Slow(communicator, range(2), hours, byte_s)
        config = ParallelConfig(exchange="auto", max_wait=0.1, cfg_parallel=False)
        engine, unet = in_gang(gang, config, hours)
        first, second, third = images(engine, unet, 3)
        assert (first[0], second[0], third[0]) == ("sync", expected, expected)
        assert torch.equal(second[1], third[1])
        engine.join(gang, config)  # as for the next request
        assert engine.exchange == "sync", "which may be done but for its decoding"
        assert images(engine, unet, 1)[0][0] == expected
        pinned = config.model_copy(update={"exchange": expected})
        engine.join(gang, pinned)
        ((name, output),) = images(engine, unet, 1)
        assert name == expected and torch.equal(output, second[1]), "the mix that was named makes it again"
        other = Slow(communicator, range(2), hours, byte_s)
        engine.join(other, config)
        assert images(engine, unet, 1)[0][0] == "sync", "another gang is measured by itself"
        return [engine.exchange]

    run_in_lockstep(2, rank)


@pytest.mark.parametrize(("kind", "later"), [(Slow, "displaced_attention"), (InOrder, "displaced")])
def test_where_fresh_values_wait_behind_stale_ones_that_is_found_by_trial(
    kind: type[Slow], later: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = Hours()
    monkeypatch.setattr("distriray.parallel.stopwatch.time", hours)

    def rank(communicator: LockstepCommunicator) -> list[Any]:
        gang = kind(communicator, range(2), hours, 3e-6)
        config = ParallelConfig(exchange="auto", max_wait=0.1, cfg_parallel=False)
        engine, unet = in_gang(gang, config, hours)
        return [name for name, _ in images(engine, unet, 6, steps=8)]

    for names in run_in_lockstep(2, rank):
        assert names[:2] == ["sync", "displaced_attention"] and names[-1] == later


def test_an_image_whose_guidance_ends_is_of_one_choice_that_makes_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hours = Hours()
    monkeypatch.setattr("distriray.parallel.stopwatch.time", hours)
    guided = pytree.tree_map(lambda value: torch.cat([value] * 2), INPUTS)

    def drawn(engine: Engine, unet: Any) -> tuple[Any, torch.Tensor]:
        """An image of which the second half is without guidance."""
        with engine.image():
            for step in range(4):
                unet(torch.cat([SAMPLE] * 2) * (1 + 0.1 * step), 900 - step, **guided)
            outputs = [unet(SAMPLE * (1 + 0.1 * step), 900 - step, **INPUTS).sample for step in range(4, 8)]
        return engine.exchange, torch.cat(outputs)

    def rank(communicator: LockstepCommunicator) -> list[Any]:
        gang = Slow(communicator, range(3), hours, byte_s=1e-4)
        config = ParallelConfig(exchange="auto", max_wait=0.1)
        engine, unet = in_gang(gang, config, hours)
        assert images(engine, unet, 2)[1][0] == "displaced", "without guidance this link is known"
        exact, displaced = drawn(engine, unet), drawn(engine, unet)
        assert (exact[0], displaced[0]) == ("sync", "displaced")
        for name, output in (exact, displaced):
            engine.join(gang, config.model_copy(update={"exchange": name}))
            assert torch.equal(drawn(engine, unet)[1], output), f"{name} makes it again"
        return [name for name, _ in (exact, displaced)]

    run_in_lockstep(3, rank)


def test_a_family_whose_displaced_pictures_nobody_has_measured_keeps_to_fresh_values() -> None:
    def rank(communicator: LockstepCommunicator) -> str:
        config = ParallelConfig(max_wait=0.0, cfg_parallel=False)  # no message is as short as that
        assert config.exchange == "auto"
        transformer = TRANSFORMERS["flux"]
        network = parallelize(transformer.make(), communicator, config)
        synchronous, engine = watched(network), engine_of(network)
        assert engine is not None
        for _ in range(3):
            with engine.image():
                draw(network, transformer, Shape())
            assert engine.exchange == "sync"
        assert synchronous and not engine._chooser._choices._shapes, (
            "nobody would ask how long its steps took"
        )
        return "fresh" if all(synchronous) else "stale"

    assert run_in_lockstep(2, rank) == ["fresh", "fresh"]


def test_without_patches_there_is_nothing_to_choose() -> None:
    def rank(communicator: LockstepCommunicator) -> Any:
        unet = parallelize(tiny_sdxl_unet(), communicator, ParallelConfig(exchange="auto"))
        engine = engine_of(unet)
        assert engine is not None
        return images(engine, unet, 2)[-1][0]

    assert run_in_lockstep(1, rank) == ["sync"]
