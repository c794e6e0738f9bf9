"""The router: the best host, evenly among equals, and an honest no."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distriray.routing.latency import LatencyModel
from distriray.routing.policy import HostView
from distriray.routing.router import PUBLISHED_REQUESTS, backlog_s, predicted_s, publish, route
from distriray.routing.simulation.workload import trial_profile
from tests.unit.routing.test_policies import SIZES, request

MODEL = LatencyModel(trial_profile())


def state(name, *requests, now=0.0, workers=8, **more):
    return publish(name, HostView(now, tuple(range(workers)), SIZES, requests), MODEL, **more)


def busy(name, deadline=18.1, **more):
    queue = (request(f"{name} {i}", 2048, deadline=deadline, workers=(i,)) for i in range(8))
    return state(name, *queue, **more)


def test_the_host_where_it_is_done_first():
    for seed in range(20):
        chosen = route([busy("a"), state("b"), busy("c")], request(), 0.0, MODEL, random.Random(seed))
        assert chosen.host == "b"
    assert chosen.finish_s == pytest.approx(3.5 / 2.73, rel=0.02)


def test_routers_that_see_the_same_state_spread_evenly():
    states = [state(str(i)) for i in range(4)]
    hosts = Counter(route(states, request(), 0.0, MODEL, random.Random(seed)).host for seed in range(2000))
    assert len(hosts) == 4 and max(hosts.values()) < 1.2 * min(hosts.values())


def test_the_same_seed_chooses_the_same_host():
    states = [state(str(i)) for i in range(4)]
    chosen = [route(states, request(), 0.0, MODEL, random.Random(7)).host for _ in range(5)]
    assert len(set(chosen)) == 1


def test_one_router_fills_hosts_evenly_between_two_publications():
    states, draw = {str(i): state(str(i)) for i in range(4)}, random.Random(0)
    for i in range(8):
        chosen = route(list(states.values()), request(str(i), 2048, deadline=9.0), 0.0, MODEL, draw)
        states[chosen.host] = chosen.state
    assert {s.waiting for s in states.values()} <= {1, 2, 3}


def test_what_no_host_can_meet_comes_with_the_time_that_could():
    chosen = route([busy("a"), busy("b")], request(deadline=1.0), 0.0, MODEL, random.Random(0))
    assert not chosen.meets
    assert chosen.finish_s == pytest.approx(18.0 + 3.5 / 2.73, rel=0.1)


def test_a_deadline_goes_before_what_has_none_and_may_be_met_on_a_full_host():
    idle_work = state("a", *(request(str(i), 2048) for i in range(50)))
    assert not route([idle_work], request(), 0.0, MODEL, random.Random(0)).finish_s < 20
    late = state("b", *(request(str(i), 2048, arrival=-9.0, deadline=-1.0) for i in range(50)))
    assert route([late], request(deadline=2.0), 0.0, MODEL, random.Random(0)).meets


def test_a_prediction_is_as_sure_as_the_gang_that_it_is_of():
    """A pool that lends one size is measured in that size alone, and a lone worker is far from it."""
    model = LatencyModel(MODEL.profile.model_copy(update={"entries": MODEL.profile.entries[-1:]}))
    alone, eight = (model.times(gang, 2048, 2048, 1) for gang in (1, 8))
    assert (alone.error, eight.error) == pytest.approx((0.5, 0.05))
    takes_s = eight.run_s(0, 50)

    def published(name, *requests):
        return publish(name, HostView(0.0, tuple(range(8)), (8,), requests), model)

    def chosen(states, deadline=None, seed=0):
        return route(states, request("new", 2048, deadline=deadline), 0.0, model, random.Random(seed))

    free, later = published("a"), published("b", request("r", 2048, done=30, workers=tuple(range(8))))
    assert chosen([free]).error == pytest.approx(0.05)
    assert not chosen([free], 0.9 * takes_s).meets and chosen([free], 0.96 * takes_s).meets
    assert {chosen([free, later], seed=seed).host for seed in range(20)} == {"a"}


@pytest.mark.parametrize("guessed", [False, True])
def test_what_will_be_late_goes_behind_all_that_is_late_already(guessed):
    """By a hair it is not refused for itself, by a guess nothing is; a host gives it no more for that."""
    model = LatencyModel(MODEL.profile.model_copy(update={"guessed": guessed}))
    alone_s = model.times(8, 1024, 1024, 1).run_s(0, 50)

    def late(name, **more):
        return request(name, deadline=0.97 * alone_s, **more)

    def published(name, *requests):
        return publish(name, HostView(0.0, tuple(range(8)), SIZES, requests), model)

    def chosen(*states, seed=0):
        return route(states, late("new"), 0.0, model, random.Random(seed))

    queue = (late(str(i), workers=tuple(range(8)) if i == 0 else None) for i in range(20))
    free, busy = published("free"), published("busy", *queue)
    assert chosen(free).meets
    assert {chosen(busy, free, seed=seed).host for seed in range(20)} == {"free"}
    behind = chosen(busy)
    assert behind.meets == guessed and behind.finish_s > 5 * alone_s
    assert behind.possible_s == pytest.approx(alone_s)
    view = HostView(0.0, tuple(range(8)), SIZES, tuple(late(str(i)) for i in range(20)))
    assert predicted_s(view, late("new"), model) > 5 * alone_s


def test_deadlines_behind_those_that_are_told_one_by_one_count_before_a_deadline_too():
    takes_s, count = 1.2, PUBLISHED_REQUESTS + 16
    queue = tuple(request(str(i), 512, deadline=takes_s * (i + 1.5)) for i in range(count))
    published = publish("a", HostView(0.0, (0,), (1,), queue), MODEL)
    ends_s = takes_s * (count + 1)
    for deadline_s, meets in ((0.9 * ends_s, False), (1.01 * ends_s, True)):
        new = request("new", 512, deadline=deadline_s)
        chosen = route([published], new, 0.0, MODEL, random.Random(0))
        assert (chosen.meets, chosen.possible_s) == (meets, pytest.approx(ends_s, rel=0.02))


def test_full_queues_say_when_to_come_back():
    full = busy("a", max_waiting=0)
    chosen = route([full], request(), 0.0, MODEL, random.Random(0))
    assert chosen.host is None and 0 < chosen.finish_s < 60


def test_a_host_without_a_gang_for_it_is_passed_over():
    small = state("small", workers=2)
    chosen = route([small, busy("large")], request(gang_size=4), 0.0, MODEL, random.Random(0))
    assert chosen.host == "large"
    assert route([small], request(gang_size=4), 0.0, MODEL, random.Random(0)).host is None


def test_old_state_is_trusted_less():
    states = [state("a"), replace(busy("b"), published_s=0.0)]
    hosts = {route(states, request(), 60.0, MODEL, random.Random(seed)).host for seed in range(40)}
    assert hosts == {"a", "b"}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([512, 1024, 2048]), st.none() | st.floats(-5, 30)), max_size=40),
    st.sets(st.integers(0, 7), max_size=6),
    st.none() | st.floats(0.5, 20.0),
)
def test_any_state_gives_a_route_with_a_finite_time(queue, broken, deadline):
    healthy = tuple(sorted(set(range(8)) - broken))
    requests = tuple(request(str(i), side, deadline=due) for i, (side, due) in enumerate(queue))
    published = publish("a", HostView(0.0, healthy, SIZES, requests), MODEL)
    chosen = route([published], request(deadline=deadline), 0.3, MODEL, random.Random(0))
    assert chosen.host == "a"
    assert 0.3 < chosen.finish_s < 2000
    steps = [*chosen.state.capacity_beside_deadlines, *chosen.state.capacity_beside_all]
    assert all(left >= 0 for _, capacity in steps for left in capacity.free.values())


def test_a_deadline_waits_for_what_runs_where_nobody_has_to_leave():
    held = (
        request("late", 2048, deadline=-1.0, workers=(0, 1, 2, 3)),
        request("none", 1024, workers=(4, 5)),
        request("due", 2048, deadline=60.0, workers=(6, 7)),
    )
    elastic = HostView(0.0, tuple(range(8)), SIZES, held)
    new = request(gang_size=4, deadline=3.0)
    ends_s = {}
    for view in (elastic, replace(elastic, regroups=False)):
        chosen = route([publish("a", view, MODEL)], new, 0.0, MODEL, random.Random(0))
        ends_s[view.regroups] = chosen.finish_s
        assert chosen.meets == view.regroups
    assert ends_s[True] == pytest.approx(3.5 / 2.62, rel=0.05)
    assert ends_s[False] == pytest.approx(18.0 / 3.6 + 3.5 / 2.62, rel=0.05), "behind the gang of 4"
    assert predicted_s(replace(elastic, regroups=False), new, MODEL) == pytest.approx(ends_s[False])


def test_what_a_host_predicts_for_a_new_request_counts_what_it_has():
    idle = HostView(0.0, tuple(range(8)), SIZES, ())
    full = replace(idle, requests=tuple(request(str(i), 2048, workers=(i,)) for i in range(8)))
    assert predicted_s(idle, request(), MODEL) == pytest.approx(3.5 / 2.73, rel=0.02)
    assert predicted_s(full, request(), MODEL) == pytest.approx(18.0 + 3.5 / 2.73, rel=0.02)
    assert predicted_s(replace(idle, workers=()), request(), MODEL) == float("inf")


def test_the_backlog_is_the_work_over_the_workers():
    view = HostView(0.0, tuple(range(8)), SIZES, tuple(request(str(i), 2048) for i in range(4)))
    assert backlog_s(view, MODEL) == pytest.approx(4 * 18.0 / 8, rel=0.02)
    assert backlog_s(replace(view, requests=()), MODEL) == 0.0


def test_of_equals_those_that_hold_the_adapters_go_first_and_none_waits_for_them():
    states = [state("a"), replace(state("b"), adapters=frozenset({"ink"})), state("c")]
    for seed in range(20):
        chosen = route(states, request(adapters=("ink", "neon")), 0.0, MODEL, random.Random(seed))
        assert chosen.host == "b" and chosen.state.adapters == {"ink", "neon"}
    spread = Counter(route(states, request(), 0.0, MODEL, random.Random(seed)).host for seed in range(60))
    assert len(spread) == 3
    late = [replace(busy("b"), adapters=frozenset({"ink"})), state("c")]
    assert route(late, request(adapters=("ink",)), 0.0, MODEL, random.Random(0)).host == "c"


def test_what_has_no_deadline_takes_no_room_from_what_has_one():
    empty, draw = state("a"), random.Random(0)
    slow = route([empty], request("slow", 2048), 0.0, MODEL, draw).state
    assert slow.capacity_beside_deadlines == empty.capacity_beside_deadlines
    assert slow.capacity_beside_all != empty.capacity_beside_all
    due = route([slow], request("due", 2048, deadline=1e3), 0.0, MODEL, draw).state
    assert due.capacity_beside_deadlines != slow.capacity_beside_deadlines
    assert due.capacity_beside_all != slow.capacity_beside_all
