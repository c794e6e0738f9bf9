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
"""What makes a step unlike the host's others: what it computes beside the network as it is, such as
ControlNets, and another way to share it. Names, and the share of a step that each is guessed to add."""
Case = tuple[int, int, int, int, bool, Besides]  # gang, height, width, batch, guided

MEASURED_ERROR = 0.05  # relative, of a case that the profile holds and nobody has observed since
ERROR_PER_DOUBLING = 0.15  # relative, for each factor of two away from the nearest measured case
GUESSED_ERROR = 0.5  # of the share of a step that is guessed for what nobody has observed
MIN_OBSERVATIONS = 3  # the smallest number whose median one outlier cannot move
SHARED_WEIGHT = 3  # how many own observations of steps outweigh what the other cases say
MAX_OBSERVED = 64  # cases that a model keeps observations of; clients choose the shapes, so there is no end
SHORTEST_S = 1e-9  # that any time is taken for: ratios to nothing would be infinite
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
        self,
        steps_done: int,
        steps_total: int,
        prepared: bool = False,
        unguided_steps: int = 0,
        warmup_steps: int | None = None,
    ) -> float:
        """From `steps_done` to the decoded image in this gang, in seconds.

        Includes what comes before the first step unless that is `prepared`. The last `unguided_steps` are
        without guidance, and the first `warmup_steps` synchronous; None is the profile's.
        """
        warmup_steps = self.warmup_steps if warmup_steps is None else warmup_steps
        left = steps_total - steps_done
        seconds = left * self.step_s + self.decode_s
        seconds -= min(unguided_steps, left) * self.step_s * (1.0 - self.unguided)
        if steps_done < warmup_steps:
            slow = min(warmup_steps - steps_done, left)
            seconds += slow * (self.sync_step_s - self.step_s)
        return seconds if steps_done or prepared else seconds + self.prepare_s


class _Observed:
    """What was observed of one of a profile's times, as logarithms of ratios to it, and what follows.

    It is kept by case, the last part of which is what was computed besides.

    Args:
        guessed: whether nothing of the profile was measured.
        shared_weight: how many of a case's own observations outweigh what the other cases say.
    """

    def __init__(self, guessed: bool, shared_weight: int = 0) -> None:
        self._guessed, self._shared_weight = guessed, shared_weight
        self._own: dict[tuple[Any, ...], deque[float]] = {}
        self._plain: deque[float] = deque(maxlen=WINDOW)  # of all cases together
        self._others: deque[float] = deque(maxlen=WINDOW)  # of those that compute something besides

    def add(self, case: tuple[Any, ...], seconds: float, profile_s: float) -> None:
        """Seconds were observed, of which the profile says `profile_s`."""
        ratio = math.log(max(seconds, SHORTEST_S) / profile_s)
        own = self._own.pop(case, deque(maxlen=WINDOW))
        own.append(ratio)
        self._own[case] = own  # last in order: the first one is forgotten first
        if len(self._own) > MAX_OBSERVED:
            del self._own[next(iter(self._own))]
        (self._others if case[-1] else self._plain).append(ratio)

    @property
    def shared(self) -> float | None:
        """The logarithm of the factor for cases that were not observed; None before enough were.

        Of a guess, what was observed beside something else, whose share is guessed, is better than nothing,
        and worse than what was observed alone.
        """
        alone = not self._guessed or len(self._plain) >= MIN_OBSERVATIONS
        ratios = self._plain if alone else self._others
        return statistics.median(ratios) if len(ratios) >= MIN_OBSERVATIONS else None

    def factor(self, case: tuple[Any, ...], otherwise: float = 1.0) -> float:
        """What the profile is multiplied by for one case: `otherwise` while nothing is known of any."""
        shared = math.log(otherwise) if self.shared is None else self.shared
        own = self._own.get(case, ())
        if len(own) < MIN_OBSERVATIONS:
            return math.exp(shared)
        share = len(own) / (len(own) + self._shared_weight)
        return math.exp(share * statistics.median(own) + (1 - share) * shared)

    def spread(self, case: tuple[Any, ...]) -> float | None:
        """The relative spread of a case's own observations; None of too few."""
        own = self._own.get(case, ())
        if len(own) < MIN_OBSERVATIONS:
            return None
        middle = statistics.median(own)
        return 1.4826 * statistics.median(abs(ratio - middle) for ratio in own)  # a robust deviation


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
        self._steps = _Observed(profile.guessed, SHARED_WEIGHT)
        self._prepares, self._decodes = _Observed(profile.guessed), _Observed(profile.guessed)
        self._times: dict[tuple[Case, bool], Times] = {}

    @property
    def knows(self) -> bool:
        """Whether anything was measured or observed: nobody is refused by a guess."""
        return not self.profile.guessed or self._steps.shared is not None

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
        step_s: float | None = None,
        guided: bool = True,
        besides: Besides = (),
        prepare_s: float | None = None,
        decode_s: float | None = None,
    ) -> None:
        """Learn from one segment, at `pace` 1; what it does not tell is None.

        Where something else was computed too, it teaches of other cases only a model whose profile is
        guessed, until that has observed some without.

        Args:
            step_s: its mean seconds per displaced step.
            prepare_s: seconds before its first step.
            decode_s: seconds behind its last one.
        """
        step, images = (gang, height, width, batch, guided, besides), (gang, height, width, batch)
        if step_s is not None:
            self._steps.add(step, step_s, self._step_from_profile(lambda e: e.step_s, *step))
        if prepare_s is not None:
            profile_s = self._of_images(lambda e: e.prepare_s, *images)
            self._prepares.add((*images, besides), prepare_s, profile_s)
        if decode_s is not None:
            profile_s = self._of_images(lambda e: e.decode_s, *images)
            self._decodes.add((*images, besides), decode_s, profile_s)
        self.observations += 1
        self._times.clear()

    def __getstate__(self) -> dict[str, Any]:
        """The knowledge, without what follows from it."""
        return {**self.__dict__, "_times": {}}

    def _predict(
        self, gang: int, height: int, width: int, batch: int, guided: bool, besides: Besides
    ) -> Times:
        case, images = (gang, height, width, batch, guided, besides), (gang, height, width, batch)
        factor = self._steps.factor(case)
        step = self._step_from_profile(lambda e: e.step_s, *case) * factor
        unguided = 1.0
        if guided:
            alone = (gang, height, width, batch, False, besides)
            unguided_s = self._step_from_profile(lambda e: e.step_s, *alone) * self._steps.factor(alone)
            unguided = min(1.0, unguided_s / step)
        sync = self._step_from_profile(lambda e: e.sync_step_s or e.step_s, *case) * factor
        around = self._steps.factor((gang, height, width, batch, guided, ()))
        prepare = self._of_images(lambda e: e.prepare_s, *images)
        prepare *= self._prepares.factor((*images, besides), around)
        decode = self._of_images(lambda e: e.decode_s, *images)
        decode *= self._decodes.factor((*images, besides), around)
        regroup = self.profile.regroup_s + max(0.0, sync - step)
        return Times(
            step_s=step,
            sync_step_s=sync,
            prepare_s=prepare,
            decode_s=decode,
            regroup_s=regroup,
            warmup_steps=self.profile.warmup_steps,
            error=self._error(case),
            unguided=unguided,
        )

    def _error(self, case: Case) -> float:
        """The relative error that remains of a step."""
        spread = self._steps.spread(case)
        if spread is not None:
            return max(spread, MEASURED_ERROR / 2)
        distance = ERROR_PER_DOUBLING * self._distance(*case[:5])
        return MEASURED_ERROR + distance + GUESSED_ERROR * _added(case[5])

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

    def _of_images(
        self, field: Callable[[Entry], float], gang: int, height: int, width: int, batch: int
    ) -> float:
        """One field of what is done once an image, before its steps or behind them; one of 0 is unknown."""
        images = [(e, e.batch) for e in self.profile.entries if field(e)]
        if not images:
            return SHORTEST_S
        return max(SHORTEST_S, _from_profile(images, field, gang, height, width, batch))


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
    """As points on logarithmic scales, ascending."""
    return sorted((math.log(x), math.log(y)) for x, y in values.items())


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
