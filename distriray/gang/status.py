"""A host's report of itself."""

from __future__ import annotations

import time

from distriray.gang.dispatcher import Dispatcher
from distriray.status import AdapterStatus, HostNews, HostStatus, RepairStatus, WorkerStatus


def status_of(dispatcher: Dispatcher, device: str) -> HostStatus:
    """Queue, gangs, workers, repairs, and how long what was accepted will take."""
    now, group = time.monotonic(), dispatcher.group
    metrics, jobs = dispatcher.metrics, dispatcher.jobs.values()
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
                healthy=index in group.healthy,
                pid=facts.pid,
                device=facts.device,
                load_s=facts.load_s,
                memory=member.memory if (member := group.member(index)) else 0,
                request=working.get(index),
                adapters=member.adapters if member else AdapterStatus(),
            )
            for index, facts in sorted(group.facts.items())
        ],
        free_workers=len(dispatcher.free),
        running=[job.status(now) for job in jobs if job.workers],
        waiting=[job.status(now) for job in jobs if not job.workers],
        max_queue=dispatcher.config.max_queue,
        backlog_s=dispatcher.backlog_s(),
        repairs=[RepairStatus(worker=r.worker, cause=r.cause, seconds=r.seconds) for r in group.repairs],
        outcomes=dict(metrics.outcomes),
        steps=dict(metrics.steps),
        regroupings=metrics.regroupings,
        predictions=metrics.predictions(),
    )


def news_of(dispatcher: Dispatcher, device: str, since: int) -> HostNews:
    """Changes since an edition, and the status now."""
    jobs, record = dispatcher.jobs.values(), dispatcher.record
    return HostNews(
        edition=record.edition,
        now=time.time(),
        device=device,
        workers=dispatcher.config.workers,
        waiting=dispatcher.waiting,
        max_queue=dispatcher.config.max_queue,
        backlog_s=dispatcher.backlog_s(),
        running={job.request.id: (job.step, job.num_steps) for job in jobs if job.workers},
        outcomes=dict(dispatcher.metrics.outcomes),
        segments=record.segments(since),
        outages=record.outages(since),
    )
