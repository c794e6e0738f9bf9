"""A host's report of itself."""

from __future__ import annotations

import time

from .dispatcher import Dispatcher
from .status import HostStatus, RepairStatus, WorkerStatus


def status_of(dispatcher: Dispatcher, device: str) -> HostStatus:
    """Queue, gangs, workers, repairs, and how long what was accepted will take."""
    now, crew, metrics, jobs = time.monotonic(), dispatcher.crew, dispatcher.metrics, dispatcher.jobs.values()
    working = {worker: job.request.id for job in jobs for worker in job.workers or ()}
    return HostStatus(
        model=dispatcher.config.model.name,
        device=device,
        healthy=dispatcher.healthy,
        gang_sizes=dispatcher.config.sizes,
        default_size=dispatcher.facts.default_size,
        workers=[
            WorkerStatus(
                index=index,
                healthy=index in crew.healthy,
                pid=facts.pid,
                device=facts.device,
                load_s=facts.load_s,
                memory=member.memory if (member := crew.member(index)) else 0,
                request=working.get(index),
            )
            for index, facts in sorted(crew.facts.items())
        ],
        free_workers=len(dispatcher.free),
        running=[job.status(now) for job in jobs if job.workers],
        waiting=[job.status(now) for job in jobs if not job.workers],
        max_queue=dispatcher.config.max_queue,
        work_s=dispatcher.work_s(),
        repairs=[RepairStatus(worker=r.worker, cause=r.cause, seconds=r.seconds) for r in crew.repairs],
        outcomes=dict(metrics.outcomes),
        regroupings=metrics.regroupings,
        predictions=metrics.predictions(),
    )
