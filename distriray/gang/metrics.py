"""Metrics of a host: one table of them, and the verbs that record them.

Ray exports them to Prometheus under these names behind `ray_`. Without a cluster to export to they are
counted nowhere, and nothing fails; nor does it where the exporter does, but for a line of the log.
"""

from __future__ import annotations

import logging
from collections import Counter as Tally
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

from ray.util import metrics as ray_metrics

from distriray.config import Mix
from distriray.errors import GenerationCancelled, InvalidRequest
from distriray.results import GenerationResult
from distriray.routing.quantiles import Quantiles
from distriray.status import AdapterStatus, PredictionStatus

if TYPE_CHECKING:
    from distriray.gang.job import Job
    from distriray.gang.messages import RankResult

log = logging.getLogger("ray.serve.distriray")

SECONDS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0)
STEP_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0)
RATIOS = (0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
TAGS = ("model", "host")
"""Tags of every metric: the model's name, and which of several hosts it is."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric: what it counts, its own tags beside `TAGS`, and a histogram's boundaries."""

    kind: Literal["counter", "gauge", "histogram"]
    text: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


class Name(StrEnum):
    """Every metric of a host, by name."""

    REQUESTS = "distriray_requests_total"
    DEADLINES = "distriray_deadlines_total"
    IMAGES = "distriray_images_total"
    REQUEST_SECONDS = "distriray_request_seconds"
    PHASE_SECONDS = "distriray_phase_seconds"
    STEPS = "distriray_steps_total"
    STEP_SECONDS = "distriray_step_seconds"
    PREDICTED_SECONDS = "distriray_predicted_seconds"
    PREDICTION_RATIO = "distriray_prediction_ratio"
    WORKER_SECONDS = "distriray_worker_seconds_total"
    SENT_BYTES = "distriray_sent_bytes_total"
    ADAPTERS = "distriray_adapters_total"
    REGROUPINGS = "distriray_regroupings_total"
    BROKEN_GANGS = "distriray_broken_gangs_total"
    REPAIRS = "distriray_repairs_total"
    WAITING = "distriray_waiting_requests"
    RUNNING = "distriray_running_requests"
    WORKERS = "distriray_workers"
    BACKLOG_SECONDS = "distriray_backlog_seconds"


METRICS: Mapping[Name, Spec] = {
    Name.REQUESTS: Spec(
        "counter", "requests by how they ended: finished, cancelled, failed, refused, invalid", ("outcome",)
    ),
    Name.DEADLINES: Spec("counter", "finished requests that had a deadline: met, missed", ("outcome",)),
    Name.IMAGES: Spec("counter", "images made"),
    Name.REQUEST_SECONDS: Spec("histogram", "from acceptance to the images", (), SECONDS),
    Name.PHASE_SECONDS: Spec(
        "histogram", "of a request: queued, adapters, prepare, denoise, decode, waiting", ("phase",), SECONDS
    ),
    Name.STEPS: Spec("counter", "steps that gangs made, by how they shared them", ("gang_size", "exchange")),
    Name.STEP_SECONDS: Spec(
        "histogram", "mean step of a segment: fresh or stale", ("gang_size", "kind"), STEP_SECONDS
    ),
    Name.PREDICTED_SECONDS: Spec("histogram", "to the images, as predicted at acceptance", (), SECONDS),
    Name.PREDICTION_RATIO: Spec("histogram", "actual seconds over those predicted at acceptance", (), RATIOS),
    Name.WORKER_SECONDS: Spec("counter", "seconds that workers spent in gangs", ("gang_size",)),
    Name.SENT_BYTES: Spec("counter", "bytes that ranks sent to each other", ("gang_size",)),
    Name.ADAPTERS: Spec("counter", "adapters that workers found held, loaded, evicted", ("outcome",)),
    Name.REGROUPINGS: Spec("counter", "times that a request went on in another gang"),
    Name.BROKEN_GANGS: Spec("counter", "gangs that broke under a request"),
    Name.REPAIRS: Spec("counter", "workers that died and were replaced"),
    Name.WAITING: Spec("gauge", "requests that hold no workers"),
    Name.RUNNING: Spec("gauge", "requests that hold workers"),
    Name.WORKERS: Spec("gauge", "workers by state: busy, free, down", ("state",)),
    Name.BACKLOG_SECONDS: Spec("gauge", "predicted time until all that was accepted is finished"),
}


class HostMetrics:
    """Records what happens on one host. All methods belong to its event loop.

    Args:
        model: the model's name.
        host: names the host among others of the model.
    """

    def __init__(self, model: str, host: str) -> None:
        tags = {"model": model, "host": host}
        self._metrics = {name: _make(name, spec).set_default_tags(tags) for name, spec in METRICS.items()}
        self._repairs = 0
        self.begin()

    def begin(self) -> None:
        """Forget, for the host's status, what there was: nobody asked for the requests of a profile."""
        self._ratios = Quantiles()
        self.outcomes: Tally[str] = Tally()
        self.steps: Tally[str] = Tally()
        self.regroupings = 0

    def refused(self) -> None:
        """A request was turned away."""
        self._ended("refused")

    def ended(self, job: Job, end: GenerationResult | BaseException) -> None:
        """An accepted request is over."""
        if not isinstance(end, GenerationResult):
            self._ended(next((name for kind, name in _UNFINISHED.items() if isinstance(end, kind)), "failed"))
            return
        self._ended("finished")
        timings, total_s = end.timings, end.timings.total_s
        self._count(Name.IMAGES, len(end.images))
        self._observe(Name.REQUEST_SECONDS, total_s)
        for phase in ("queued", "adapters", "prepare", "denoise", "decode", "waiting"):
            self._observe(Name.PHASE_SECONDS, getattr(timings, f"{phase}_s"), phase=phase)
        if job.request.deadline_s is not None:
            in_time = total_s <= job.request.deadline_s
            self._count(Name.DEADLINES, outcome="met" if in_time else "missed")
        if isfinite(job.predicted_s):  # else no worker was healthy when it came
            self._observe(Name.PREDICTED_SECONDS, job.predicted_s)
            self._observe(Name.PREDICTION_RATIO, total_s / job.predicted_s)
            self._ratios.add(total_s / job.predicted_s)

    def segment(self, job: Job, outcomes: Collection[RankResult]) -> None:
        """A gang came back; `job` has its segment already."""
        segment = job.segments[-1]
        size = str(len(segment.workers))
        self._count(Name.WORKER_SECONDS, len(segment.workers) * segment.seconds, gang_size=size)
        self._count(Name.SENT_BYTES, sum(outcome.bytes_sent for outcome in outcomes), gang_size=size)
        exchange = "mix" if isinstance(segment.exchange, Mix) else segment.exchange
        if segment.steps:
            self.steps[exchange] += segment.steps
        self._count(Name.STEPS, segment.steps, gang_size=size, exchange=exchange)
        for kind, step_s in (("fresh", segment.fresh_step_s), ("stale", segment.stale_step_s)):
            if step_s is not None:
                self._observe(Name.STEP_SECONDS, step_s, gang_size=size, kind=kind)
        if len(job.segments) > 1:
            self.regroupings += 1
            self._count(Name.REGROUPINGS)

    def adapters(self, before: AdapterStatus, now: AdapterStatus) -> None:
        """A worker came back with other counts of adapters."""
        self._count(Name.ADAPTERS, now.hits - before.hits, outcome="held")
        self._count(Name.ADAPTERS, now.loads - before.loads, outcome="loaded")
        self._count(Name.ADAPTERS, now.evictions - before.evictions, outcome="evicted")

    def gang_broke(self) -> None:
        """A gang broke under a request."""
        self._count(Name.BROKEN_GANGS)

    def level(
        self, *, waiting: int, running: int, free: int, busy: int, down: int, repairs: int, backlog_s: float
    ) -> None:
        """Record the status now; `repairs` counts all there have been."""
        self._set(Name.WAITING, waiting)
        self._set(Name.RUNNING, running)
        for state, workers in (("free", free), ("busy", busy), ("down", down)):
            self._set(Name.WORKERS, workers, state=state)
        self._count(Name.REPAIRS, repairs - self._repairs)
        self._repairs = repairs
        self._set(Name.BACKLOG_SECONDS, backlog_s)

    def closed(self) -> None:
        """The host is over: a program that goes on shows nothing of it as running, or as free."""
        self.level(waiting=0, running=0, free=0, busy=0, down=0, repairs=self._repairs, backlog_s=0.0)

    def predictions(self) -> PredictionStatus:
        """Record how good predictions have been."""
        ratios = self._ratios
        if not ratios.count:
            return PredictionStatus(count=0)
        p10, p50, p90 = (ratios.at(share) for share in (0.1, 0.5, 0.9))
        return PredictionStatus(count=ratios.count, ratio_p10=p10, ratio_p50=p50, ratio_p90=p90)

    def _ended(self, outcome: str) -> None:
        self.outcomes[outcome] += 1
        self._count(Name.REQUESTS, outcome=outcome)

    def _count(self, name: Name, amount: float = 1.0, **tags: str) -> None:
        if amount > 0:  # Ray refuses to add nothing
            _told(name, self._metrics[name].inc, amount, tags)

    def _observe(self, name: Name, value: float, **tags: str) -> None:
        _told(name, self._metrics[name].observe, value, tags)

    def _set(self, name: Name, value: float, **tags: str) -> None:
        _told(name, self._metrics[name].set, value, tags)


class Refusals:
    """Requests that a router turned away before a host had them: they count among those of hosts.

    Attributes:
        total: how many there were.
    """

    def __init__(self) -> None:
        self.total = 0
        self._requests = _make(Name.REQUESTS, METRICS[Name.REQUESTS])

    def add(self, model: str) -> None:
        """One was turned away."""
        self.total += 1
        tags = {"model": model, "host": "router", "outcome": "refused"}
        _told(Name.REQUESTS, self._requests.inc, 1.0, tags)


_UNFINISHED = {GenerationCancelled: "cancelled", InvalidRequest: "invalid"}
"""Outcomes that are no fault of the host: what only a worker finds wrong in a request is its client's."""


def _told(
    name: Name, tell: Callable[[float, dict[str, str]], None], value: float, tags: dict[str, str]
) -> None:
    """Tell whoever exports a metric. Requests end, and hosts close, whatever comes of it."""
    try:
        tell(value, tags)
    except Exception as error:
        log.warning("%s was not counted: %r", name, error)


def _make(name: Name, spec: Spec) -> Any:
    tags = (*TAGS, *spec.tags)
    if spec.kind == "histogram":
        return ray_metrics.Histogram(name.value, spec.text, list(spec.boundaries), tags)
    kinds = {"counter": ray_metrics.Counter, "gauge": ray_metrics.Gauge}
    return kinds[spec.kind](name.value, spec.text, tags)
