"""What a host publishes about itself."""

from __future__ import annotations

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
    seconds; `free_workers` are healthy and in no gang. `outcomes` counts the requests that ended as finished,
    cancelled, failed or refused, since the host started, `steps` those that gangs made, by how they shared
    them (`mix` is one without a name), and `regroupings` how often a request changed its gang."""

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
