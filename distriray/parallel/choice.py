"""Choice of a mix by measurement: the freshest whose waits a gang's link keeps short."""

from __future__ import annotations

from collections.abc import Hashable
from statistics import median
from typing import NamedTuple

from distriray.collective.all_gather import numbers_of_all
from distriray.collective.base import Communicator
from distriray.config import ExchangeMode
from distriray.parallel.stopwatch import Stopwatch

CANDIDATES: tuple[ExchangeMode, ...] = ("sync", "displaced_attention", "displaced")
"""The freshest first."""

MEASURED_STEPS = 8
"""Synchronous steps of a first image that are looked at, at most."""


class TimedStep(NamedTuple):
    """The stopwatches of a synchronous step.

    Attributes:
        whole: of the step.
        rows: of waiting for statistics and halos.
        keys_values: of waiting for keys and values.
    """

    whole: Stopwatch
    rows: Stopwatch
    keys_values: Stopwatch


class Choices:
    """What one rank has measured of a gang, and chosen: once for every shape."""

    def __init__(self) -> None:
        self._timed: dict[Hashable, list[TimedStep]] = {}
        self._chosen: dict[Hashable, int] = {}

    def note(self, shape: Hashable, step: TimedStep) -> None:
        """Remember a synchronous step of a shape, unless the choice is made."""
        timed = self._timed.setdefault(shape, [])
        if shape not in self._chosen and len(timed) <= MEASURED_STEPS:
            timed.append(step)

    def place(self, shape: Hashable, max_wait: float) -> int:
        """The place of this rank's choice in `CANDIDATES`; -1 if too little was measured.

        On a GPU this waits for the steps that were timed.

        Args:
            max_wait: largest share of a step that may be waiting.
        """
        timed = self._timed.pop(shape, [])[1:]  # the first prepares layers and makes buffers
        if timed and shape not in self._chosen:
            self._chosen[shape] = _freshest(timed, max_wait)
        return self._chosen.get(shape, -1)


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
    shares = (rows + keys_values) / whole, rows / (whole - keys_values), 0.0
    return next(place for place, share in enumerate(shares) if share <= max_wait)
