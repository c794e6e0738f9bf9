"""Choice of a mix by measurement: the freshest whose waits a gang's link keeps short."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from distriray.collective.all_gather import numbers_of_all
from distriray.collective.base import Communicator
from distriray.config import ExchangeMode
from distriray.parallel.stopwatch import Stopwatch

CANDIDATES: tuple[ExchangeMode, ...] = ("sync", "displaced_attention", "displaced")
"""The freshest first."""

MEASURED_STEPS = 8
"""Synchronous steps of the first images that are looked at, at most."""

LEAST_STEPS = 3
"""Those from which a choice is made, at least: the smallest number whose median one outlier cannot move."""

MAX_SHAPES = 1024
"""Shapes whose choice is remembered, those used last: whoever asks for pictures chooses the shapes."""


class TimedStep(NamedTuple):
    """The stopwatches of a synchronous step.

    Attributes:
        whole: of the step.
        rows: of swapping statistics and halos.
        keys_values: of swapping keys and values.
    """

    whole: Stopwatch
    rows: Stopwatch
    keys_values: Stopwatch


@dataclass
class _Known:
    """Of a shape: the steps that were timed, and the place of what they led to."""

    timed: list[TimedStep] = field(default_factory=list)
    place: int | None = None


class Choices:
    """Measurements of one rank of a gang, and the choices made from them: once for every shape."""

    def __init__(self) -> None:
        self._shapes: OrderedDict[Hashable, _Known] = OrderedDict()

    def note(self, shape: Hashable, step: TimedStep) -> None:
        """Remember a synchronous step of a shape, unless the choice is made."""
        known = self._of(shape)
        if known.place is None and len(known.timed) <= MEASURED_STEPS:
            known.timed.append(step)

    def place(self, shape: Hashable, max_wait: float) -> int:
        """The place of this rank's choice in `CANDIDATES`; -1 if too little was measured.

        On a GPU this waits for the steps that were timed.

        Args:
            max_wait: largest share of a step that messages may cost.
        """
        known = self._of(shape)
        timed = known.timed[1:]  # the first prepares layers and makes buffers
        if known.place is None and len(timed) >= LEAST_STEPS:
            known.place, known.timed = _freshest(timed, max_wait), []
        return -1 if known.place is None else known.place

    def _of(self, shape: Hashable) -> _Known:
        known = self._shapes.setdefault(shape, _Known())
        self._shapes.move_to_end(shape)
        if len(self._shapes) > MAX_SHAPES:
            self._shapes.popitem(last=False)
        return known


def expected_step_s(whole: float, rows: float, keys_values: float) -> tuple[float, ...]:
    """Seconds of a step in each of `CANDIDATES` if stale values cost nothing, by those of a synchronous one.

    Args:
        whole: of the synchronous step.
        rows, keys_values: of it, of swapping statistics and halos, and keys and values.
    """
    return whole, whole - keys_values, whole - keys_values - rows


def agreed(communicator: Communicator, place: int) -> ExchangeMode:
    """The candidate for an image: the one that waits least of all ranks' choices, `sync` until each has one.

    All ranks call it.

    Raises:
        GangBroken: a peer died or hung.
    """
    places = numbers_of_all(communicator, place)
    return CANDIDATES[max(places) if min(places) >= 0 else 0]


def _freshest(timed: list[TimedStep], max_wait: float) -> int:
    seconds = [[watch.seconds for watch in watches] for watches in zip(*timed, strict=True)]
    whole, rows, keys_values = map(median, seconds)
    costs = rows + keys_values, rows, 0.0
    steps = expected_step_s(whole, rows, keys_values)
    return next(
        place for place, (cost, step) in enumerate(zip(costs, steps, strict=True)) if cost <= max_wait * step
    )
