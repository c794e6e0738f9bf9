"""The result of a segment, from those of its ranks."""

from __future__ import annotations

from dataclasses import dataclass

from distriray.errors import DistrirayError, GangMismatch
from distriray.gang.messages import RankResult, SegmentEnd, WorkerId
from distriray.status import SegmentEndStatus

IN_ORDER = frozenset({SegmentEnd.DONE, SegmentEnd.YIELDED, SegmentEnd.CANCELLED})
"""Ends of ranks that did what they were asked for."""


@dataclass(frozen=True, slots=True)
class SegmentResult:
    """Result of a segment, from all ranks of its gang.

    Attributes:
        ranks: results of the processes that can be relied on, lowest rank first.
        lost: the processes that died, hung or failed.
        failures: what the failed ones reported.
        mute: the process that was to send the request's state and has not: what it holds is of no use.
        unsent: why that, or the request's pictures where nobody was to send a state, have not come.
    """

    ranks: dict[WorkerId, RankResult]
    lost: tuple[WorkerId, ...] = ()
    failures: tuple[str, ...] = ()
    mute: WorkerId | None = None
    unsent: str = ""

    @property
    def held(self) -> dict[WorkerId, int]:
        """The step at which each process holds the request's state."""
        return {
            worker: rank.step
            for worker, rank in self.ranks.items()
            if rank.end is not SegmentEnd.REFUSED and worker != self.mute
        }

    @property
    def worked(self) -> list[RankResult]:
        """Results of the ranks that took part in the steps."""
        took_part = IN_ORDER | {SegmentEnd.BROKEN}
        return [rank for rank in self.ranks.values() if rank.end in took_part]

    @property
    def finished(self) -> RankResult | None:
        """The result that carries the images."""
        return next((rank for rank in self.ranks.values() if rank.images is not None), None)

    @property
    def error(self) -> DistrirayError | None:
        """Why the request was refused: what a rank refused it for, rather than that ranks differ in it."""
        errors = [rank.error for rank in self.ranks.values() if rank.error is not None]
        return min(errors, key=lambda error: isinstance(error, GangMismatch), default=None)

    @property
    def interrupted(self) -> bool:
        """Whether the gang ended neither by its own work nor because it was told to stop."""
        return bool(self.lost) or not self.ranks or any(r.end not in IN_ORDER for r in self.ranks.values())

    @property
    def end(self) -> SegmentEndStatus:
        """The same in one word."""
        if self.finished is not None:
            return "finished"
        if self.error is not None:
            return "failed"
        if self.interrupted:
            return "broken"
        cancelled = any(rank.end is SegmentEnd.CANCELLED for rank in self.ranks.values())
        return "cancelled" if cancelled else "yielded"

    @property
    def torn(self) -> bool:
        """Whether the gang's communicator is unusable."""
        return any(rank.broken for rank in self.ranks.values())

    @property
    def causes(self) -> list[str]:
        """Why the gang was interrupted, for the request's owner."""
        causes = {rank.cause for rank in self.ranks.values() if rank.cause} | set(self.failures)
        if self.mute is not None:
            causes.add(f"worker {self.mute.index} did not send the request's state: {self.unsent}")
        elif self.unsent:
            causes.add(f"the request's pictures did not come: {self.unsent}")
        return sorted(causes) or [f"lost workers {[worker.index for worker in self.lost]}"]
