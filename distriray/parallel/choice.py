"""Choice of a mix by measurement: the freshest whose waits a gang's link keeps short."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple
from weakref import WeakKeyDictionary

from distriray.collective.all_gather import numbers_of_all
from distriray.collective.base import Communicator
from distriray.config import MIXES, ExchangeMode, Mix, ParallelConfig
from distriray.parallel.networks.base import Call
from distriray.parallel.share import Share
from distriray.parallel.stopwatch import Stopwatch

CANDIDATES: tuple[ExchangeMode, ...] = ("sync", "displaced_attention", "displaced")
"""The freshest first."""

MEASURED_STEPS = 8
"""Steps of the first images in a candidate that are looked at, at most."""

LEAST_STEPS = 3
"""Those from which a choice is made, at least: the smallest number whose median one outlier cannot move."""

MAX_SHAPES = 1024
"""Shapes whose choice is remembered, those used last: whoever asks for pictures chooses the shapes."""


class TimedStep(NamedTuple):
    """The stopwatches of a step.

    Attributes:
        whole: of the step.
        rows: of swapping fresh statistics and halos.
        keys_values: of swapping fresh keys and values.
    """

    whole: Stopwatch
    rows: Stopwatch
    keys_values: Stopwatch


@dataclass
class _Timed:
    """Steps of a shape in one candidate: how many were timed, seconds of those read, whether all are."""

    steps: int = 0
    seconds: list[tuple[float, ...]] = field(default_factory=list)
    complete: bool = False


class Choices:
    """Measurements of one rank of a gang, and the choices made from them: once for every shape and bound."""

    def __init__(self) -> None:
        self._shapes: OrderedDict[Hashable, dict[int, _Timed]] = OrderedDict()
        self._unread: list[tuple[_Timed, TimedStep]] = []  # a step has hundreds of marks of a GPU

    def note(self, shape: Hashable, step: TimedStep, place: int = 0) -> None:
        """Remember a step of a shape, synchronous or displaced in a candidate, unless enough are known."""
        timed = self._of(shape).setdefault(place, _Timed())
        if not timed.complete and timed.steps <= MEASURED_STEPS:
            timed.steps += 1
            self._unread.append((timed, step))

    def place(self, shape: Hashable, max_wait: float) -> int:
        """The place of this rank's choice in `CANDIDATES`; -1 if too little was measured.

        On a GPU this waits for all steps that were timed.

        Args:
            max_wait: largest share of a step that messages may cost.
        """
        for timed, step in self._unread:
            timed.seconds.append(tuple(watch.seconds for watch in step))
        self._unread.clear()
        measured: dict[int, tuple[float, ...]] = {}
        for place, timed in self._of(shape).items():
            seconds = timed.seconds[1:]  # the first prepares layers and makes buffers
            timed.complete = timed.complete or len(seconds) >= LEAST_STEPS
            if timed.complete:
                measured[place] = tuple(map(median, zip(*seconds, strict=True)))
        return _freshest(measured, max_wait) if 0 in measured else -1

    def _of(self, shape: Hashable) -> dict[int, _Timed]:
        known = self._shapes.setdefault(shape, {})
        self._shapes.move_to_end(shape)
        if len(self._shapes) > MAX_SHAPES:
            self._shapes.popitem(last=False)
        return known


class Chooser:
    """Chooser of the mix of each image that a network's gang begins, the same on all ranks.

    Args:
        measures: whether it is measured where a gang's configuration says `auto`; without it that is `sync`.

    Attributes:
        exchange: of the image that this gang began last, what `auto` came to for one; `sync` before it has
            begun any, and where there is nothing to exchange.
    """

    def __init__(self, measures: bool) -> None:
        self.exchange: ExchangeMode | Mix = "sync"
        self._measures = measures
        self._communicator: Communicator
        self._config: ParallelConfig
        self._choices_of: WeakKeyDictionary[Communicator, Choices] = WeakKeyDictionary()

    def join(self, communicator: Communicator, config: ParallelConfig) -> None:
        """Choose for this gang; what was measured in others is kept as long as they live."""
        self._communicator, self._config = communicator, config
        self.exchange = "sync"

    def mix(
        self, call: Call, share: Share, has_room: Callable[[Mix], bool], before: Mix | None = None
    ) -> Mix | None:
        """The mix of an image that begins with a call; None where nothing is exchanged. All ranks call it.

        Args:
            has_room: whether this rank's device holds the buffers of a mix.
            before: of its steps so far, where the gang is only laid out anew: one image is of one choice, so
                that whoever asks for that by its name has it again.

        Raises:
            GangBroken: a peer died or hung.
        """
        exchange, mix = self._config.exchange, self._config.mix
        if not share.exchanges:
            exchange, mix = "none" if share.partition.world_size > 1 else "sync", None
        elif exchange == "auto":
            exchange = "sync"
            if self._measures:
                place = _place(before)
                if place is None:
                    place = self._choices.place(self._shape(call, share), self._config.max_wait)
                exchange = agreed(self._communicator, place, has_room)
            mix = MIXES[exchange]
        self.exchange = exchange
        return mix

    def note(self, call: Call, share: Share, step: TimedStep, stale: Mix | None) -> None:
        """Remember how long a call's step took, if choices depend on it.

        Args:
            stale: the mix of a displaced one, None of a synchronous one.
        """
        place = 0 if stale is None else _place(stale)
        if self._measures and self._config.exchange == "auto" and place is not None:
            self._choices.note(self._shape(call, share), step, place)

    @property
    def _choices(self) -> Choices:
        return self._choices_of.setdefault(self._communicator, Choices())

    def _shape(self, call: Call, share: Share) -> Hashable:
        """The facts that decide how much a rank computes and sends."""
        batch = share.batch, share.predictions
        how = share.layout, share.partition, self._config.attention
        return *how, batch, call.sample.dtype, call.besides


def expected_step_s(whole: float, rows: float, keys_values: float) -> tuple[float, ...]:
    """Seconds of a step in each of `CANDIDATES` if stale values cost nothing, by those of a synchronous one.

    Args:
        whole: of the synchronous step.
        rows, keys_values: of it, of swapping statistics and halos, and keys and values.
    """
    return whole, whole - keys_values, whole - keys_values - rows


def _place(mix: Mix | None) -> int | None:
    """In `CANDIDATES`; None of what is none of them."""
    return next((place for place, name in enumerate(CANDIDATES) if MIXES[name] == mix), None)


def agreed(communicator: Communicator, place: int, has_room: Callable[[Mix], bool]) -> ExchangeMode:
    """The candidate for an image: the one that waits least of all ranks' choices.

    It is `sync` until each has one, and where a rank has no room for more. All ranks call it.

    Raises:
        GangBroken: a peer died or hung.
    """
    places = numbers_of_all(communicator, place)
    exchange = CANDIDATES[max(places) if min(places) >= 0 else 0]
    if exchange == "sync" or min(numbers_of_all(communicator, int(has_room(MIXES[exchange])))):
        return exchange
    return "sync"


def _freshest(measured: Mapping[int, tuple[float, ...]], max_wait: float) -> int:
    """The first candidate in whose steps messages cost little; if in none, the first that is hardly slower
    than the fastest.

    Stale values are expected to cost nothing until steps with them were measured: where a link carries one
    message after the other, fresh values may wait behind them.

    Args:
        measured: seconds of a step, of it of swapping rows, and keys and values, by the candidate's place.
    """
    whole, rows, keys_values = measured[0]
    costs = [rows + keys_values, rows, 0.0]
    # Medians one by one: those of the waits may be more together than that of the whole.
    steps = [max(0.0, step) for step in expected_step_s(whole, rows, keys_values)]
    for place in measured.keys() - {0}:
        costs[place] = measured[place][0] - (whole - rows - keys_values)
        steps[place] = measured[place][0]
    for place, (cost, step) in enumerate(zip(costs, steps, strict=True)):
        if cost <= max_wait * step:
            return place
    return next(place for place, step in enumerate(steps) if step <= (1.0 + max_wait) * min(steps))
