"""Latency of a request on a gang: a measured profile, corrected by what is observed since."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from distriray.routing.profile import Entry, Profile

Points = Sequence[tuple[float, float]]
Besides = tuple[tuple[str, float], ...]
"""What a step computes beside the network as it is, such as ControlNets: names, and the share of a step that
each is guessed to add."""
Case = tuple[int, int, int, int, bool, Besides]  # gang, height, width, batch, guided

MEASURED_ERROR = 0.05  # relative, of a case that the profile holds and nobody has observed since
ERROR_PER_DOUBLING = 0.15  # relative, for each factor of two away from the nearest measured case
GUESSED_ERROR = 0.5  # of the share of a step that is guessed for what nobody has observed
MIN_OBSERVATIONS = 3  # the smallest number whose median one outlier cannot move
SHARED_WEIGHT = 3  # how many own observations outweigh what the other cases say
MAX_OBSERVED = 64  # cases that a model keeps observations of; clients choose the shapes, so there is no end
MAX_PREDICTED = 1024  # cases whose times are kept so that they need not be predicted again
WINDOW = 15
"""Observations of one case that count. Their median is the correction, so that fewer than half of them may be
outliers, and a lasting change is believed after half of them."""


@dataclass(frozen=True, slots=True)
class Times:
    """Times of one case, in seconds; `error` is relative (0.1: about 10 %) and holds for all of them.

    `regroup_s` is what going on in this gang costs a request that was in another: the move, and its first
    step being synchronous. `unguided` is the share of a step's time that one without guidance takes: 1 where
    there is no guidance.
    """

    step_s: float
    sync_step_s: float
    prepare_s: float
    decode_s: float
    regroup_s: float
    warmup_steps: int
    error: float
    unguided: float = 1.0

    def run_s(
        self, steps_done: int, steps_total: int, prepared: bool = False, unguided_steps: int = 0
    ) -> float:
        """From `steps_done` to the decoded image in this gang, in seconds.

        Includes what comes before the first step unless that is `prepared`. The last `unguided_steps` are
        without guidance.
        """
        left = steps_total - steps_done
        seconds = left * self.step_s + self.decode_s
        seconds -= min(unguided_steps, left) * self.step_s * (1.0 - self.unguided)
        if steps_done < self.warmup_steps:
            slow = min(self.warmup_steps - steps_done, left)
            seconds += slow * (self.sync_step_s - self.step_s)
        return seconds if steps_done or prepared else seconds + self.prepare_s


class LatencyModel:
    """Seconds for every (gang size, height, width, batch, guidance, what else is computed), measured or not.

    Between measured cases times are interpolated on logarithmic scales of the pixels, the batch and the
    gang; beyond them the last slope goes on, but no gang is taken to speed up more than it has members, and
    a batch costs at most its size. The batch of a step is the network's: with guidance twice the images.
    `observe` corrects every later answer.

    However many cases there are, what is remembered of them is bounded: the `MAX_OBSERVED` that were observed
    last count as observed, and the others by what all have in common.

    Args:
        profile: the measurements to start from.

    Attributes:
        observations: how many there were; two copies that have the same number know the same.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.observations = 0
        self._observed: dict[Case, deque[float]] = {}
        self._plain: deque[float] = deque(maxlen=WINDOW)  # ratios to the profile, of all cases together
        self._others: deque[float] = deque(maxlen=WINDOW)  # of those that compute something besides
        self._times: dict[tuple[Case, bool], Times] = {}

    @property
    def knows(self) -> bool:
        """Whether anything was measured or observed: nobody is refused by a guess."""
        return not self.profile.guessed or len(self._shared) >= MIN_OBSERVATIONS

    @property
    def _shared(self) -> deque[float]:
        """What counts for cases that were not observed.

        Steps with something besides, whose share is guessed, are better than a guess of all, and worse than
        measurements.
        """
        alone = not self.profile.guessed or len(self._plain) >= MIN_OBSERVATIONS
        return self._plain if alone else self._others

    def times(
        self,
        gang: int,
        height: int,
        width: int,
        batch: int,
        guided: bool = True,
        fresh: bool = False,
        besides: Besides = (),
    ) -> Times:
        """All that is known of one case, whose steps are all synchronous if `fresh`."""
        case = (gang, height, width, batch, guided, besides)
        known = self._times.get((case, fresh))
        if known is None:
            if len(self._times) >= MAX_PREDICTED:
                self._times.clear()
            known = self._predict(*case)
            if fresh:
                regroup_s = min(known.regroup_s, self.profile.regroup_s)
                known = replace(known, step_s=known.sync_step_s, regroup_s=regroup_s)
            self._times[case, fresh] = known
        return known

    def step_s(self, gang: int, height: int, width: int, batch: int, guided: bool = True) -> float:
        """One displaced step, in seconds."""
        return self.times(gang, height, width, batch, guided).step_s

    def pace(self, busy: int) -> float:
        """Step time while only `busy` workers are at work, relative to a fully busy host."""
        points = [(math.log(count), math.log(ratio)) for count, ratio in sorted(self.profile.contention)]
        if not points or busy < 1:
            return 1.0
        return math.exp(_on_line(points, math.log(busy), min_slope=0.0, max_slope=0.0, lone_slope=0.0))

    def observe(
        self,
        gang: int,
        height: int,
        width: int,
        batch: int,
        step_s: float,
        guided: bool = True,
        besides: Besides = (),
    ) -> None:
        """Learn from one segment: its mean seconds per displaced step, at `pace` 1; must be positive.

        Where something else was computed too, it teaches of other cases only a model whose profile is
        guessed, until that has observed some without.
        """
        key = (gang, height, width, batch, guided, besides)
        ratio = math.log(step_s / self._step_from_profile(lambda e: e.step_s, *key))
        own = self._observed.pop(key, deque(maxlen=WINDOW))
        own.append(ratio)
        self._observed[key] = own  # last in order: the first one is forgotten first
        if len(self._observed) > MAX_OBSERVED:
            del self._observed[next(iter(self._observed))]
        (self._others if besides else self._plain).append(ratio)
        self.observations += 1
        self._times.clear()

    def __getstate__(self) -> dict[str, Any]:
        """The knowledge, without what follows from it."""
        return {**self.__dict__, "_times": {}}

    def _predict(
        self, gang: int, height: int, width: int, batch: int, guided: bool, besides: Besides
    ) -> Times:
        key = (gang, height, width, batch, guided, besides)
        correction, error = self._correction(key)
        step = self._step_from_profile(lambda e: e.step_s, *key) * correction
        unguided = 1.0
        if guided:
            alone = (gang, height, width, batch, False, besides)
            unguided_s = self._step_from_profile(lambda e: e.step_s, *alone) * self._correction(alone)[0]
            unguided = min(1.0, unguided_s / step)
        sync = self._step_from_profile(lambda e: e.sync_step_s or e.step_s, *key) * correction
        images = [(e, e.batch) for e in self.profile.entries]
        around, _ = self._correction((gang, height, width, batch, guided, ()))
        prepare, decode = (
            _from_profile(images, field, gang, height, width, batch) * around
            for field in (lambda e: e.prepare_s, lambda e: e.decode_s)
        )
        regroup = self.profile.regroup_s + max(0.0, sync - step)
        return Times(
            step_s=step,
            sync_step_s=sync,
            prepare_s=prepare,
            decode_s=decode,
            regroup_s=regroup,
            warmup_steps=self.profile.warmup_steps,
            error=error,
            unguided=unguided,
        )

    def _correction(self, key: Case) -> tuple[float, float]:
        """The factor that observations put on the profile, and the relative error that remains."""
        own = self._observed.get(key, ())
        shared = statistics.median(self._shared) if len(self._shared) >= MIN_OBSERVATIONS else 0.0
        if len(own) < MIN_OBSERVATIONS:
            error = MEASURED_ERROR + ERROR_PER_DOUBLING * self._distance(*key[:5])
            return math.exp(shared), error + GUESSED_ERROR * _added(key[5])
        middle = statistics.median(own)
        spread = 1.4826 * statistics.median(abs(ratio - middle) for ratio in own)  # a robust deviation
        share = len(own) / (len(own) + SHARED_WEIGHT)
        return math.exp(share * middle + (1 - share) * shared), max(spread, MEASURED_ERROR / 2)

    def _distance(self, gang: int, height: int, width: int, batch: int, guided: bool) -> float:
        """Doublings between a case and the nearest one in the profile."""
        return min(
            abs(math.log2(gang / e.gang))
            + abs(math.log2(height * width / (e.height * e.width)))
            + abs(math.log2(_evaluated(batch, guided) / _evaluated(e.batch, e.guided)))
            for e in self.profile.entries
        )

    def _step_from_profile(
        self,
        field: Callable[[Entry], float],
        gang: int,
        height: int,
        width: int,
        batch: int,
        guided: bool,
        besides: Besides,
    ) -> float:
        """One field of a step, interpolated over what the network evaluates at once."""
        likest = sorted(self.profile.entries, key=lambda e: e.guided != guided)
        evaluated = [(e, _evaluated(e.batch, e.guided)) for e in likest]
        plain = _from_profile(evaluated, field, gang, height, width, _evaluated(batch, guided))
        return plain * (1.0 + _added(besides))


def _added(besides: Besides) -> float:
    """The share of a step that is guessed to be added to it."""
    return sum(share for _, share in besides)


def _evaluated(batch: int, guided: bool) -> int:
    """Images times branches: what the network evaluates in a step."""
    return batch * (2 if guided else 1)


def _from_profile(
    entries: Sequence[tuple[Entry, int]],
    field: Callable[[Entry], float],
    gang: int,
    height: int,
    width: int,
    batch: int,
) -> float:
    """One field of one case, interpolated over pixels, then batch, then gang; each entry has its batch.

    Of entries that are alike in these the first one counts.
    """
    by_gang: dict[int, dict[int, dict[int, float]]] = {}
    for e, size in entries:
        if (e.gang, e.height, e.width, size) == (gang, height, width, batch):
            return field(e)
        by_gang.setdefault(e.gang, {}).setdefault(size, {}).setdefault(e.height * e.width, field(e))
    # beyond what is measured, a larger picture or batch is never faster, a batch costs at most its size,
    # and a larger gang is never slower and speeds up by at most its size
    pixels = math.log(height * width)
    gang_points = []
    for size, by_batch in by_gang.items():
        batch_points = [
            (math.log(count), _on_line(_logs(by_pixels), pixels, min_slope=0.0, max_slope=math.inf))
            for count, by_pixels in by_batch.items()
        ]
        value = _on_line(sorted(batch_points), math.log(batch), min_slope=0.0, max_slope=1.0)
        gang_points.append((math.log(size), value))
    gang_points.sort()
    # with a single gang size measured, larger ones are taken to gain nothing and smaller ones to lose all
    lone_slope = 0.0 if math.log(gang) > gang_points[-1][0] else -1.0
    return math.exp(
        _on_line(gang_points, math.log(gang), min_slope=-1.0, max_slope=0.0, lone_slope=lone_slope)
    )


def _logs(values: dict[int, float]) -> list[tuple[float, float]]:
    """As points on logarithmic scales, ascending; nothing is faster than a microsecond."""
    return sorted((math.log(x), math.log(max(y, 1e-6))) for x, y in values.items())


def _on_line(
    points: Points, x: float, *, min_slope: float, max_slope: float, lone_slope: float = 1.0
) -> float:
    """The value at `x` of the line through `points`.

    Beyond its ends the last slope goes on, kept within `min_slope` and `max_slope`; a point alone has
    `lone_slope`.
    """
    if len(points) == 1:
        return points[0][1] + lone_slope * (x - points[0][0])
    (x0, y0), (x1, y1) = next((pair for pair in pairwise(points) if x <= pair[1][0]), points[-2:])
    slope = (y1 - y0) / (x1 - x0)
    if x0 <= x <= x1:
        return y0 + slope * (x - x0)
    near_x, near_y = (x0, y0) if x < x0 else (x1, y1)
    return near_y + min(max(slope, min_slope), max_slope) * (x - near_x)
