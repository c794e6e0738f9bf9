"""What a host publishes about itself."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True)


class WorkerStatus(_Report):
    """One worker; `memory` in bytes, `request` is what it works on."""

    index: int
    healthy: bool
    pid: int
    device: str
    load_s: float
    memory: int
    request: str | None


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


class HostStatus(_Report):
    """One host at one moment. `work_s` is the predicted time until all it has accepted is finished, in
    seconds; `free_workers` are healthy and in no gang."""

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
    work_s: float
    repairs: list[RepairStatus]
