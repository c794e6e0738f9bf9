"""No policy that a host can be configured with lets a request wait without bound."""

import random

import pytest

from distriray.routing.latency import LatencyModel
from distriray.routing.policies import POLICIES
from distriray.routing.simulation.event_queue import EventQueue
from distriray.routing.simulation.fleet import SimulatedFleet
from distriray.routing.simulation.host import SimulatedHost
from distriray.routing.simulation.report import TraceReport
from distriray.routing.simulation.workload import trial_profile
from tests.unit.routing.test_policies import SIDES, request

PROFILE = trial_profile()
WRONG = PROFILE.model_copy(
    update={
        "entries": tuple(
            e.model_copy(update={"step_s": e.step_s * {1: 3.0, 2: 0.4, 4: 2.0, 8: 0.3}[e.gang]})
            for e in PROFILE.entries
        )
    }
)
HOUR_S = 3600.0
STARVED = "it waits for as long as others ask; such a policy is a baseline (docs/routing.md)"


def ask(side, deadline_s=None, **more):
    """A request as a function of its name and arrival; `deadline_s` counts from the arrival."""

    def at(name, now):
        due = None if deadline_s is None else now + deadline_s
        return request(name, side, arrival=now, deadline=due, **more)

    return at


def seconds_until_done(policy, workers, victim, clients, limit_s=HOUR_S, believed=PROFILE):
    """How long `victim` takes beside clients that ask again as soon as they are served; None: the limit.

    Each client is a request, and when it asks for the first time. The host believes `believed` of its speed.
    """
    events = EventQueue()
    fleet = SimulatedFleet(workers=workers, gang_sizes=tuple(s for s in (1, 2, 4, 8) if s <= workers))
    report = TraceReport(workers=workers)
    truth = LatencyModel(PROFILE)
    host = SimulatedHost(events, policy, fleet, LatencyModel(believed), truth, report, random.Random(0))
    came, done = 10.0, []

    def watch():
        if "victim" not in host.live:
            done.append(events.now_s - came)
        elif events.now_s < came + limit_s:
            events.at(events.now_s + 0.1, watch)

    def arrive():
        host.submit(victim("victim", came))
        watch()

    def go_on(index, again, count):
        if done or events.now_s > came + limit_s:
            return
        if f"{index} {count - 1}" not in host.live:
            host.submit(again(f"{index} {count}", events.now_s))
            count += 1
        events.at(events.now_s + 0.1, lambda: go_on(index, again, count))

    events.at(came, arrive)
    for index, (again, first_s) in enumerate(clients):
        events.at(first_s, lambda index=index, again=again: go_on(index, again, 0))
    events.run()
    return done[0] if done else None


@pytest.mark.parametrize("name", POLICIES)
def test_a_large_gang_is_not_starved_by_two_clients_that_keep_asking_for_gangs_of_one(name):
    clients = [(ask(1024, gang_size=1), 0.0), (ask(1024, gang_size=1), 1.7)]
    took = seconds_until_done(POLICIES[name](), 4, ask(1024, gang_size=4), clients)
    assert took is not None and took < 120.0, STARVED


@pytest.mark.parametrize("name", POLICIES)
def test_a_request_without_a_deadline_is_not_starved_by_those_that_have_one(name):
    clients = [(ask(1024, 10.0, gang_size=1), 0.1 * i) for i in range(8)]  # more than there are workers
    took = seconds_until_done(POLICIES[name](), 4, ask(512), clients)
    assert took is not None and took < 120.0, STARVED


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("name", POLICIES)
def test_no_request_that_its_host_can_serve_is_starved(name, seed):
    draw = random.Random(f"starve {seed}")
    workers = draw.choice([2, 4, 8])
    sizes = [None, *(s for s in (1, 2, 4, 8) if s <= workers)]

    def any_request(size, priority):
        deadline_s = draw.choice([None, draw.uniform(1.0, 30.0)])
        return ask(draw.choice(SIDES), deadline_s, gang_size=size, priority=priority)

    victim = any_request(draw.choice(sizes), priority=draw.randrange(-3, 1))
    sort = draw.choice([[1], [1, 2], sizes])  # the fewer workers they ask for, the more gangs there are
    clients = [
        (any_request(draw.choice([s for s in sort if s is None or s <= workers]), draw.randrange(3)), 0.3 * i)
        for i in range(draw.randrange(1, 2 * workers))
    ]
    believed = draw.choice([PROFILE, WRONG])
    took = seconds_until_done(POLICIES[name](), workers, victim, clients, 600.0, believed)
    assert took is not None, STARVED
