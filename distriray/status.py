"""Status that a host publishes about itself."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True)


class AdapterStatus(_Report):
    """The adapters that a worker holds, the last one used at the end: `names`, and their `memory` in bytes.

    Since it started, requests found `hits` held, had `loads` loaded, and `evictions` made room for others.
    """

    names: tuple[str, ...] = ()
    memory: int = 0
    hits: int = 0
    loads: int = 0
    evictions: int = 0


class WorkerStatus(_Report):
    """One worker; `memory` in bytes, `request` is what it works on."""

    index: int
    healthy: bool
    pid: int
    device: str
    load_s: float
    memory: int
    request: str | None
    adapters: AdapterStatus = AdapterStatus()


class RequestStatus(_Report):
    """One unfinished request; `workers` is its gang, or None while it waits."""

    id: str
    step: int
    num_steps: int
    waited_s: float
    workers: tuple[int, ...] | None


class RepairStatus(_Report):
    """A worker that died and was replaced in `seconds`."""

    worker: int
    cause: str
    seconds: float


class PredictionStatus(_Report):
    """Of `count` finished requests: actual seconds over those predicted at acceptance, as quantiles.

    None while none is finished; 1 is exact, 2 took twice as long as predicted.
    """

    count: int
    ratio_p10: float | None = None
    ratio_p50: float | None = None
    ratio_p90: float | None = None


class HostStatus(_Report):
    """One host at one moment. `backlog_s` is the predicted time until all it has accepted is finished, in
    seconds; `free_workers` are healthy and in no gang; `repairs` are the last ones. `outcomes` counts the
    requests that ended as finished, cancelled, failed, refused or invalid, since the host started, `steps`
    those that gangs made, by how they shared them (`mix` is one without a name), and `regroupings` how often
    a request changed its gang."""

    model: str
    device: str
    healthy: bool
    gang_sizes: tuple[int, ...]
    default_size: tuple[int, int]
    workers: list[WorkerStatus]
    free_workers: int
    running: list[RequestStatus]
    waiting: list[RequestStatus]
    max_queue: int
    backlog_s: float
    repairs: list[RepairStatus]
    outcomes: dict[str, int]
    steps: dict[str, int]
    regroupings: int
    predictions: PredictionStatus


SegmentEndStatus = Literal["finished", "yielded", "cancelled", "broken", "failed"]
"""How a segment ended: with the picture, for others, by its owner, with its gang, or refused."""


class SegmentStatus(_Report):
    """A segment that runs or ended lately; `serial` numbers a host's. Times are seconds since the epoch on
    the host's clock. While it runs, `end` and what comes with it are None.

    `exchange` is how the steps were shared (`mix` is one without a name), `step_s` the mean seconds of a
    step, a stale one where there were any, `waited` the share of the last step in which a rank waited for its
    peers, as a mean over the ranks; None of a lone worker.
    """

    serial: int
    request: str
    workers: tuple[int, ...]
    first_step: int
    began_at: float
    last_step: int | None = None
    ended_at: float | None = None
    end: SegmentEndStatus | None = None
    exchange: str | None = None
    step_s: float | None = None
    waited: float | None = None


class OutageStatus(_Report):
    """A time in which a worker could not be lent, `died` with its process or else for its gangs to be formed
    anew; `back_at` is None while it lasts. Times as in SegmentStatus."""

    worker: int
    out_at: float
    back_at: float | None = None
    died: bool


class HostNews(_Report):
    """Changes on a host since an edition, and its status now, at `now` on its clock.

    `running` has the step and the number of steps of each request that a gang works on; `segments` and
    `outages` are those that changed. A host that has forgotten some leaves them out.
    """

    edition: int
    now: float
    device: str
    workers: int
    waiting: int
    max_queue: int
    backlog_s: float
    running: dict[str, tuple[int, int]]
    outcomes: dict[str, int]
    segments: list[SegmentStatus]
    outages: list[OutageStatus]
