"""Views, plans and moves: what a host policy sees and answers, the same in a host and in the simulator.

How a host uses it. After every arrival, completion and yield, and when `review_s` has gone by without any, it
builds a `HostView`, asks `policy.plan(view, model)` and carries out `moves(view, plan)`: it asks the
requests in `Moves.yields` to leave after the step they are in, and starts those in `Moves.starts` at once.
What the plan wants on workers that are still held comes up again in the plan made when they are free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from distriray.routing.latency import Besides, LatencyModel, Times

Workers = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RequestView:
    """An unfinished request as its host knows it. Times are seconds on the host's clock.

    Attributes:
        height, width: of the image, in pixels.
        batch: images denoised together.
        steps_done: of `steps_total`, at the last step boundary that was reported (an estimate will do).
        deadline_s: absolute time by which it should be finished, or None.
        priority: larger is more important; each unit doubles its share.
        gang_size: the size its owner fixed, or None where the policy chooses.
        max_gang: the largest gang its image can be cut into (it has at least that many rows of the latent).
        workers: those it holds now, all healthy, rank 0 first, even if it is about to yield; None while it
            waits.
        prepared: its prompt is encoded; always so once it has done a step.
        pinned: it holds workers and cannot yield any more (it decodes).
        guided: its steps are of two branches, with guidance and without,
        unguided_steps: but for so many of the last.
        fresh: its steps are all synchronous, and none short.
        adapters: the names of those that it is drawn with.
        warmup_steps: its first steps, which are synchronous; None is as many as the profile says.
        besides: what makes its steps unlike the host's others, on the average.
    """

    id: str
    height: int
    width: int
    batch: int
    steps_total: int
    steps_done: int
    arrival_s: float
    deadline_s: float | None = None
    priority: int = 0
    gang_size: int | None = None
    max_gang: int | None = None
    workers: Workers | None = None
    prepared: bool = False
    pinned: bool = False
    guided: bool = True
    unguided_steps: int = 0
    fresh: bool = False
    warmup_steps: int | None = None
    adapters: tuple[str, ...] = ()
    besides: Besides = ()

    @property
    def shape(self) -> tuple[int, int, int, bool, bool, Besides]:
        """All that its times depend on besides the gang, in the order of `LatencyModel.times`."""
        return self.height, self.width, self.batch, self.guided, self.fresh, self.besides

    def left_s(self, times: Times) -> float:
        """Seconds to its end in a gang of these times, which are of its shape."""
        return times.run_s(
            self.steps_done, self.steps_total, self.prepared, self.unguided_steps, self.warmup_steps
        )

    def allows(self, size: int) -> bool:
        """True if this request may run on a gang of `size`."""
        if self.gang_size is not None:
            return size == self.gang_size
        return self.max_gang is None or size <= self.max_gang


@dataclass(frozen=True, slots=True)
class HostView:
    """A host at one moment.

    Attributes:
        now_s: the host's clock.
        workers: ids of the healthy workers, out of 0 … n-1 (a gang is aligned by these ids).
        gang_sizes: what the pool allows, ascending, each dividing the next.
        requests: every unfinished request, waiting or running, in order of arrival.
        regroups: as its policy's.
    """

    now_s: float
    workers: Workers
    gang_sizes: tuple[int, ...]
    requests: tuple[RequestView, ...]
    regroups: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """The assignments to aim for; a request without one should wait.

    `assignments` maps a request's id to aligned workers, rank 0 first; no worker appears twice.
    """

    assignments: Mapping[str, Workers]


@dataclass(frozen=True, slots=True)
class Moves:
    """The requests to ask to yield at their next step boundary, and those to start now on free workers."""

    yields: tuple[str, ...]
    starts: Mapping[str, Workers]


class HostPolicy(Protocol):
    """Decides which of a host's requests run, and on which workers."""

    @property
    def review_s(self) -> float | None:
        """Ask again so many seconds after the last time, if nothing has happened by then; None: never."""
        ...

    @property
    def regroups(self) -> bool:
        """Whether what runs may have to leave for others; if not, predictions leave it its gang."""
        ...

    def plan(self, view: HostView, model: LatencyModel) -> Plan:
        """The assignment to aim for, as a pure function of its arguments."""
        ...


def moves(view: HostView, plan: Plan) -> Moves:
    """The steps from what runs in `view` towards `plan` that can be taken at once."""
    held = {w for r in view.requests if r.workers for w in r.workers}
    yields: list[str] = []
    starts: dict[str, Workers] = {}
    for request in view.requests:
        target = plan.assignments.get(request.id)
        if request.workers is None:
            if target is not None and held.isdisjoint(target):
                starts[request.id] = target
        elif target != request.workers and not request.pinned:
            yields.append(request.id)
    return Moves(tuple(yields), starts)
