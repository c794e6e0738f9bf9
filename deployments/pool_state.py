"""A router's picture of a pool: the hosts' reports, and what it has sent to them since."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import chain
from math import inf

from deployments.host_report import HostKnowledge, HostReport, shifted
from distriray.adapters import Catalogue, Lora
from distriray.gang.config import HostConfig
from distriray.gang.messages import WorkerFacts
from distriray.names import check_names
from distriray.routing.latency import LatencyModel
from distriray.routing.policy import RequestView
from distriray.routing.router import HostState, Route, route

REMEMBERED = 256  # requests sent to one host between two of its reports


def wait_s(states: Sequence[HostState], now_s: float) -> float | None:
    """Predicted seconds until a gang fits for a request that comes now; None without a host that has any."""
    waits = [
        state.backlog_s
        + next(
            (step.start_s for step in state.capacity_beside_all if step.capacity.largest),
            state.capacity_beside_all[-1].start_s,
        )
        - now_s
        for state in states
        if state.gang_sizes
    ]
    return max(0.0, min(waits)) if waits else None


class PoolState:
    """The hosts of one pool as one router sees them. Times are on the router's clock, in seconds.

    Attributes:
        members: the names of all hosts, as Serve has told this router.
        hosts: by name, those of them that have reported.
        silent: hosts that left the last question unanswered.
        others: hosts of the same name with another model, which serve while the pool is described anew.
        facts: of the pool's workers, also while it has no host; None before the first report.
        config: the hosts' configuration as they report it; without hosts, the one they start with.
    """

    def __init__(self, config: HostConfig) -> None:
        self.config = self._initial = config
        self.members: tuple[str, ...] = ()
        self.hosts: dict[str, HostState] = {}
        self.silent: set[str] = set()
        self.others: set[str] = set()
        self._first: frozenset[str] | None = None
        self.facts: WorkerFacts | None = None
        self._listed = Catalogue(config.model.name, config.loras).names
        self._latency: LatencyModel | None = None
        self._known: dict[str, tuple[str, HostKnowledge]] = {}
        self._sent: dict[str, deque[tuple[float, RequestView]]] = {}
        self._asked_s: dict[str, float] = {}

    def meet(self, members: tuple[str, ...]) -> None:
        """Forget the hosts that Serve does not name any more."""
        if self._first is None:
            self._first = frozenset(members)
        if members is self.members:
            return
        self.members, there = members, set(members)
        for table in (self.hosts, self._known, self._sent, self._asked_s):
            for host in table.keys() - there:
                del table[host]
        self.silent &= there
        self.others &= there
        if not members:
            self.config = self._initial

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that some host has, and of those that every host will have."""
        told = (knowledge.adapters for _, knowledge in self._known.values())
        return tuple(sorted({*self._listed, *chain.from_iterable(told)}))

    def check_adapters(self, loras: Sequence[Lora]) -> None:
        """Raise AdapterNotFound for a name that no host has; while none was seen, its folder may have any."""
        if self._known or self.config.lora_dir is None:
            check_names("loras", loras, self.adapters)

    def holders(self, adapters: Collection[str]) -> list[str]:
        """The hosts that hold all of these adapters."""
        return [host for host, state in self.hosts.items() if state.holds(adapters) == len(adapters)]

    def edition(self, host: str) -> str | None:
        """The last known edition of a host, so that it reports only what is new."""
        return self._known[host][0] if host in self._known else None

    def replaced_by(self, host: str) -> bool:
        """Whether a host has another model because the pool was described anew since this router began.

        Those that it found when it began, and that have another, are of before.
        """
        return host in self.others and host not in (self._first or ())

    def asked_s(self, host: str) -> float:
        """When a host was last asked for a report, or given up; minus infinity if never."""
        return self._asked_s.get(host, -inf)

    def asked(self, host: str, now_s: float) -> None:
        """A host is asked for a report now."""
        self._asked_s[host] = now_s

    def knows(self, host: str, since_s: float) -> bool:
        """Whether a host has answered a question that was put since then."""
        return host in self.hosts and self.hosts[host].published_s >= since_s

    def learn(self, report: HostReport, asked_s: float) -> None:
        """Take over what a host says of itself; the question was put at `asked_s`.

        What was sent to it after that may not be in its report, so it is added again.
        """
        state = shifted(report.state, asked_s)
        host = state.host
        self.silent.discard(host)
        self._asked_s[host] = max(asked_s, self.asked_s(host))
        if report.knowledge is not None and report.knowledge.config.model.name != self._initial.model.name:
            self.others.add(host)
            return
        if report.knowledge is not None:
            self._known[host] = (report.edition, report.knowledge)
        elif host not in self._known:
            return  # it will be asked again, for all that it knows
        knowledge = self._known[host][1]
        self.hosts[host] = state
        self.facts, self.config = knowledge.facts, knowledge.config
        if self.guesses or knowledge.latency.knows:  # a host that has just started takes no knowledge away
            self._latency = knowledge.latency
        for sent_s, view in self._sent.pop(host, ()):
            if sent_s > asked_s:
                chosen = route([self.hosts[host]], view, sent_s, knowledge.latency, random.Random(0))
                self.send(chosen, view, sent_s)

    def route(
        self,
        hosts: Iterable[str],
        view: RequestView,
        now_s: float,
        draw: random.Random,
        error_margin: float,
    ) -> Route:
        """The best of these hosts for a request, of which those that nothing is known of are none."""
        states = [self.hosts[host] for host in hosts if host in self.hosts]
        if self._latency is None:
            return Route(None, now_s, False)
        return route(states, view, now_s, self._latency, draw, error_margin)

    def send(self, chosen: Route, view: RequestView, now_s: float) -> None:
        """The request goes where `chosen` says: count on it until the host's next report."""
        if chosen.host is not None and chosen.state is not None:
            self.hosts[chosen.host] = chosen.state
            self._sent.setdefault(chosen.host, deque(maxlen=REMEMBERED)).append((now_s, view))

    def refused(self, host: str) -> None:
        """The host's queue is full: it gets nothing until its next report."""
        if host in self.hosts:
            state = self.hosts[host]
            self.hosts[host] = replace(state, waiting=max(state.waiting, state.max_waiting))

    def lost(self, host: str, now_s: float) -> None:
        """The host died, or does not take requests: it gets nothing unless it reports again."""
        self.hosts.pop(host, None)
        self._asked_s[host] = now_s

    @property
    def guesses(self) -> bool:
        """Whether predictions are guesses, by which nobody is refused."""
        return self._latency is None or not self._latency.knows


def choose(
    routes: Sequence[Route], members: Sequence[int], now_s: float, draw: random.Random, error_margin: float
) -> int | None:
    """The pool, by index, where a request would be done first.

    `routes` are the best of each pool, and `members` how many hosts it has: pools that are as good within the
    error of the prediction are drawn from by that. A route without a host says when a queue may have a place;
    None means that there is no pool.
    """
    open_ = [index for index, route in enumerate(routes) if route.host is not None]
    if not open_:
        return min(range(len(routes)), key=lambda index: routes[index].finish_s, default=None)
    best = min((routes[index] for index in open_), key=lambda route: (not route.meets, route.finish_s))
    slack = error_margin * best.error * (best.finish_s - now_s)
    near = [
        index
        for index in open_
        if routes[index].meets == best.meets and routes[index].finish_s - best.finish_s <= slack
    ]
    return draw.choices(near, weights=[members[index] for index in near])[0]
