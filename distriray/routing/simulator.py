"""What a policy would do: a stream of requests through simulated hosts.

Deterministic for a seed. Memory grows with what is waiting, not with what has been.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .latency import LatencyModel
from .policy import HostPolicy, RequestView
from .report import Report
from .router import HostState, publish, route
from .simulated_host import Clock, SimulatedHost
from .workload import Arrival


@dataclass(frozen=True, slots=True)
class Fleet:
    """What is simulated: `hosts` times `workers`, lent as `gang_sizes`.

    Attributes:
        routers: requests come to each of them in turn; none knows what the others sent.
        publish_s: how often hosts tell the routers their state.
        max_waiting: a host's bound on its queue.
        refuse: whether a request is refused whose deadline no host can meet.
        noise: relative spread (lognormal) of a segment's speed about the truth.
    """

    hosts: int = 1
    workers: int = 8
    gang_sizes: tuple[int, ...] = (1, 2, 4, 8)
    routers: int = 1
    publish_s: float = 0.2
    max_waiting: int = 100_000
    refuse: bool = False
    noise: float = 0.0


class _Frontend:
    """The routers, the hosts behind them and the state between."""

    def __init__(
        self, clock: Clock, hosts: list[SimulatedHost], fleet: Fleet, model: LatencyModel, seed: int
    ):
        self.clock, self.hosts, self.fleet, self.model = clock, hosts, fleet, model
        self.draws = [random.Random(f"{seed} {i}") for i in range(fleet.routers)]
        self.states: list[list[HostState]] = [[] for _ in range(fleet.routers)]
        self.open = True
        if len(hosts) > 1 or fleet.refuse:
            self._publish()

    def send(self, request: RequestView, report: Report) -> None:
        """Give a request to a host, or refuse it."""
        if len(self.hosts) == 1 and not self.fleet.refuse:
            self.hosts[0].submit(request)
            return
        router = report.arrived % self.fleet.routers
        states = self.states[router]
        chosen = route(states, request, self.clock.now_s, self.model, self.draws[router])
        if chosen.state is None or (self.fleet.refuse and not chosen.meets):
            report.refused += 1
            return
        index = int(chosen.state.host)
        states[index] = chosen.state
        self.hosts[index].submit(request)

    def _publish(self) -> None:
        fresh = [
            publish(str(i), host.view(), self.model, self.fleet.max_waiting)
            for i, host in enumerate(self.hosts)
        ]
        self.states = [list(fresh) for _ in self.states]
        if self.open or any(host.live for host in self.hosts):
            self.clock.at(self.clock.now_s + self.fleet.publish_s, self._publish)


def simulate(
    arrivals: Iterable[Arrival],
    policy: HostPolicy,
    truth: LatencyModel,
    fleet: Fleet | None = None,
    seed: int = 0,
    model: LatencyModel | None = None,
) -> Report:
    """Run `arrivals`, in order of time, through a fleet until the last is done.

    Args:
        policy: of every host.
        truth: how long things take.
        model: what hosts and routers believe, and correct by what they see; None: the truth.
    """
    fleet = fleet or Fleet()
    clock, draw = Clock(), random.Random(seed)
    report = Report(fleet.hosts * fleet.workers)
    believed = model or truth
    hosts = [
        SimulatedHost(
            clock, policy, fleet.workers, fleet.gang_sizes, believed, truth, report, draw, fleet.noise
        )
        for _ in range(fleet.hosts)
    ]
    frontend = _Frontend(clock, hosts, fleet, believed, seed)
    _await_next(clock, iter(arrivals), frontend, report)
    clock.run()
    return report


def _await_next(clock: Clock, stream: Iterator[Arrival], frontend: _Frontend, report: Report) -> None:
    """Only one request to come is ever held, however long the stream."""
    arrival = next(stream, None)
    if arrival is None:
        frontend.open = False
        return

    def arrive() -> None:
        report.arrived += 1
        report.with_deadline += arrival.deadline_s is not None
        frontend.send(_request(arrival, str(report.arrived)), report)
        _await_next(clock, stream, frontend, report)

    clock.at(arrival.at_s, arrive)


def _request(arrival: Arrival, name: str) -> RequestView:
    """An arrival as its host sees it."""
    return RequestView(
        id=name,
        height=arrival.height,
        width=arrival.width,
        batch=arrival.batch,
        steps_total=arrival.steps,
        steps_done=0,
        arrival_s=arrival.at_s,
        deadline_s=None if arrival.deadline_s is None else arrival.at_s + arrival.deadline_s,
        priority=arrival.priority,
        gang_size=arrival.gang_size,
        max_gang=arrival.max_gang,
    )
