"""A stream of requests through simulated hosts, as a policy would serve it.

Deterministic for a seed. Memory grows with what is waiting, not with what has been.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from distriray.routing.latency import LatencyModel
from distriray.routing.policy import HostPolicy, RequestView
from distriray.routing.router import MORE_CHOICES, HostState, Route, publish, route
from distriray.routing.simulation.event_queue import EventQueue
from distriray.routing.simulation.fleet import SimulatedFleet
from distriray.routing.simulation.host import SimulatedHost
from distriray.routing.simulation.report import TraceReport
from distriray.routing.simulation.workload import Arrival


class _Routers:
    """The routers, the hosts behind them and what each router was told of them."""

    def __init__(
        self,
        events: EventQueue,
        hosts: list[SimulatedHost],
        fleet: SimulatedFleet,
        model: LatencyModel,
        seed: int,
    ) -> None:
        self.events, self.hosts, self.fleet, self.model = events, hosts, fleet, model
        self.draws = [random.Random(f"{seed} {i}") for i in range(fleet.routers)]
        self.states: list[dict[int, HostState]] = [{} for _ in range(fleet.routers)]

    def send(self, request: RequestView, report: TraceReport) -> None:
        """Give a request to a host, or refuse it, as what no host has a gang for."""
        if not any(map(request.allows, self.fleet.gang_sizes)):
            report.refused += 1
            return
        if len(self.hosts) == 1 and not self.fleet.refuse:
            self.hosts[0].submit(request)
            return
        router = report.arrived % self.fleet.routers
        chosen = self._choose(router, request, self.fleet.choices, self.fleet.refresh_s)
        if not self._takes(chosen):  # refused is on news only
            chosen = self._choose(router, request, MORE_CHOICES * self.fleet.choices, 0.0)
        if chosen.state is None or not self._takes(chosen):
            report.refused += 1
            return
        index = int(chosen.state.host)
        self.states[router][index] = chosen.state
        self.hosts[index].submit(request)

    def _takes(self, chosen: Route) -> bool:
        return chosen.host is not None and (chosen.meets or not self.fleet.refuse)

    def _choose(self, router: int, request: RequestView, choices: int, refresh_s: float) -> Route:
        """The best of a few hosts, of which nothing older than `refresh_s` is known."""
        now, draw, states = self.events.now_s, self.draws[router], self.states[router]
        drawn = draw.sample(range(len(self.hosts)), min(choices, len(self.hosts)))
        for i in drawn:
            if i not in states or now - states[i].published_s >= refresh_s:
                states[i] = publish(str(i), self.hosts[i].view(), self.model, self.fleet.max_waiting)
        return route([states[i] for i in drawn], request, now, self.model, draw)


def simulate(
    arrivals: Iterable[Arrival],
    policy: HostPolicy,
    truth: LatencyModel,
    fleet: SimulatedFleet | None = None,
    seed: int = 0,
) -> TraceReport:
    """Run `arrivals`, in order of time, through a fleet until the last is done.

    Args:
        policy: of every host.
        truth: how long things take, which hosts and routers know.
    """
    fleet = fleet or SimulatedFleet()
    events, draw = EventQueue(), random.Random(seed)
    report = TraceReport(workers=fleet.hosts * fleet.workers)
    hosts = [SimulatedHost(events, policy, fleet, truth, truth, report, draw) for _ in range(fleet.hosts)]
    routers = _Routers(events, hosts, fleet, truth, seed)
    _await_next(events, iter(arrivals), routers, report)
    events.run()
    return report


def _await_next(
    events: EventQueue, stream: Iterator[Arrival], routers: _Routers, report: TraceReport
) -> None:
    """Schedule the next arrival; only one is ever held, however long the stream."""
    arrival = next(stream, None)
    if arrival is None:
        return

    def arrive() -> None:
        report.arrived += 1
        report.with_deadline += arrival.deadline_s is not None
        routers.send(_request(arrival, str(report.arrived)), report)
        _await_next(events, stream, routers, report)

    events.at(arrival.at_s, arrive)


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
