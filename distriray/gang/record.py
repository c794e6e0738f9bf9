"""Record of a host's recent past: the segments of its gangs, and when its workers were out."""

from __future__ import annotations

import time
from collections import deque
from typing import TypeVar

from distriray.config import Mix
from distriray.gang.segment_result import SegmentResult
from distriray.results import Segment
from distriray.status import OutageStatus, SegmentStatus

KEPT = 256
"""Segments, and outages, that are remembered once they are over."""

T = TypeVar("T", SegmentStatus, OutageStatus)


class Record:
    """A host's memory, bounded by its workers and `KEPT`, for whoever looks at times and asks what is new.

    Attributes:
        edition: how many changes there were.
    """

    def __init__(self) -> None:
        self.edition = 0
        self._running: dict[int, tuple[int, SegmentStatus]] = {}
        self._out: dict[int, tuple[int, OutageStatus]] = {}
        self._ended: deque[tuple[int, SegmentStatus]] = deque(maxlen=KEPT)
        self._back: deque[tuple[int, OutageStatus]] = deque(maxlen=KEPT)

    def began(self, serial: int, request: str, workers: tuple[int, ...], step: int) -> None:
        """A gang was sent off."""
        segment = SegmentStatus(
            serial=serial, request=request, workers=workers, first_step=step, began_at=time.time()
        )
        self._running[serial] = self._numbered(segment)

    def ended(self, serial: int, result: SegmentResult | None, segment: Segment | None) -> None:
        """Note a segment's end, with `result` unless the host failed; `segment` is what it did, if any."""
        _, running = self._running.pop(serial)
        changes: dict[str, object] = {
            "end": "failed" if result is None else result.end,
            "ended_at": time.time(),
            "last_step": running.first_step,
        }
        if result is not None and segment is not None:
            waited = [rank.waited for rank in result.worked if rank.waited is not None]
            changes |= {
                "last_step": segment.last_step,
                "exchange": "mix" if isinstance(segment.exchange, Mix) else segment.exchange,
                "step_s": segment.fresh_step_s if segment.stale_step_s is None else segment.stale_step_s,
                "waited": sum(waited) / len(waited) if waited else None,
            }
        self._ended.append(self._numbered(running.model_copy(update=changes)))

    def out(self, worker: int, died: bool) -> None:
        """A worker can be lent no more: it died, or has to be linked anew."""
        outage = OutageStatus(worker=worker, out_at=time.time(), died=died)
        if worker in self._out:
            _, former = self._out[worker]
            outage = former.model_copy(update={"died": former.died or died})
        self._out[worker] = self._numbered(outage)

    def back(self, worker: int) -> None:
        """There is a worker in this place again."""
        if worker in self._out:
            _, outage = self._out.pop(worker)
            self._back.append(self._numbered(outage.model_copy(update={"back_at": time.time()})))

    def segments(self, since: int) -> list[SegmentStatus]:
        """Segments that changed since an edition."""
        return [*_since(self._ended, since), *(s for number, s in self._running.values() if number > since)]

    def outages(self, since: int) -> list[OutageStatus]:
        """Outages that changed since an edition."""
        return [*_since(self._back, since), *(o for number, o in self._out.values() if number > since)]

    def _numbered(self, status: T) -> tuple[int, T]:
        self.edition += 1
        return self.edition, status


def _since(past: deque[tuple[int, T]], edition: int) -> list[T]:
    """The newest of `past`, oldest first; what is old is not looked at."""
    found: list[T] = []
    for number, status in reversed(past):
        if number <= edition:
            break
        found.append(status)
    return found[::-1]
