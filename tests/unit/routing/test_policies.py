"""What every host policy keeps to, and what the elastic one is for."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distriray.gang.config import HostConfig
from distriray.routing.buddy import aligned_blocks
from distriray.routing.latency import LatencyModel
from distriray.routing.policies import POLICIES, make_policy
from distriray.routing.policies.baselines import FixedSize, Leases, SizePerShape
from distriray.routing.policies.earliest_deadline import EarliestDeadlineFirst
from distriray.routing.policies.elastic import Elastic, ElasticConfig
from distriray.routing.policy import HostView, Plan, RequestView, moves
from distriray.routing.simulation.workload import TRIAL_KINDS, trial_profile

MODEL = LatencyModel(trial_profile())
SIDES = (512, 1024, 1536, 2048)
PER_SHAPE = {(side, side, 1): gang for side, gang in zip(SIDES, (2, 4, 8, 8), strict=True)}
EVERY_POLICY = [
    *(make() for make in POLICIES.values()),
    Leases(),
    Leases(late_last=True),
    FixedSize(2),
    SizePerShape(PER_SHAPE, backfill=True),
]
SERVED = tuple(type(make()) for make in POLICIES.values())
SIZES = (1, 2, 4, 8)


def request(name="new", side=1024, done=0, arrival=0.0, deadline=None, **more):
    return RequestView(
        id=name,
        height=side,
        width=side,
        batch=1,
        steps_total=50,
        steps_done=done,
        arrival_s=arrival,
        deadline_s=deadline,
        **more,
    )


def host(*requests, now=0.0, workers=8, sizes=SIZES):
    return HostView(now, tuple(range(workers)), sizes, tuple(requests))


def widths(plan):
    return {name: len(workers) for name, workers in plan.assignments.items()}


def carried_out(view, plan):
    """The view once everything that `plan` says has happened, at the same moment."""
    return replace(
        view, requests=tuple(replace(r, workers=plan.assignments.get(r.id)) for r in view.requests)
    )


@st.composite
def views(draw, dead=True, fixed=True):
    now = 100.0
    requests = []
    for i in range(draw(st.integers(0, 14))):
        slack = draw(st.none() | st.floats(-50.0, 30.0))
        requests.append(
            request(
                str(i),
                draw(st.sampled_from(SIDES)),
                draw(st.integers(0, 49)),
                draw(st.floats(0.0, now)),
                None if slack is None else now + slack,
                priority=draw(st.integers(-1, 2)),
                gang_size=draw(st.sampled_from([None, None, None, *SIZES])) if fixed else None,
                max_gang=draw(st.sampled_from([None, None, 1, 2, 4])) if fixed else None,
            )
        )
    broken = draw(st.sets(st.integers(0, 7), max_size=3)) if dead else set()
    view = HostView(now, tuple(sorted(set(range(8)) - broken)), SIZES, tuple(requests))
    running = (
        Elastic().plan(view, MODEL) if draw(st.booleans()) else EarliestDeadlineFirst().plan(view, MODEL)
    )
    keep = draw(st.sets(st.sampled_from([r.id for r in requests]))) if requests else set()
    held = {name: workers for name, workers in running.assignments.items() if name in keep}
    pinned = draw(st.sets(st.sampled_from(sorted(held)), max_size=2)) if held else set()
    return replace(
        view,
        requests=tuple(replace(r, workers=held.get(r.id), pinned=r.id in pinned) for r in requests),
    )


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=lambda p: type(p).__name__)
@settings(max_examples=60, deadline=None)
@given(view=views())
def test_no_worker_twice_and_gangs_aligned_healthy_and_allowed(policy, view):
    plan = policy.plan(view, MODEL)
    used = [w for workers in plan.assignments.values() for w in workers]
    assert len(used) == len(set(used)) and set(used) <= set(view.workers)
    by_id = {r.id: r for r in view.requests}
    for name, workers in plan.assignments.items():
        assert workers in aligned_blocks(8, SIZES)
        if isinstance(policy, SERVED):
            assert by_id[name].allows(len(workers)) or by_id[name].workers == workers
    for r in view.requests:
        if r.pinned:
            assert plan.assignments[r.id] == r.workers


@settings(max_examples=200, deadline=None)
@given(view=views())
def test_no_regrouping_when_nothing_changed(view):
    free = LatencyModel(trial_profile(regroup_s=0.0))  # else a change that is over and paid for makes room
    view = replace(view, requests=tuple(replace(r, pinned=False) for r in view.requests))
    settled = carried_out(view, Elastic().plan(view, free))
    second = Elastic().plan(settled, free)
    for r in settled.requests:
        if r.workers is not None:
            assert second.assignments.get(r.id) == r.workers


@settings(max_examples=100, deadline=None)
@given(view=views())
def test_gangs_do_not_go_back_and_forth(view):
    settled = view
    for _ in range(3):
        settled = carried_out(settled, Elastic().plan(settled, MODEL))
    again = Elastic().plan(settled, MODEL).assignments
    assert again == {r.id: r.workers for r in settled.requests if r.workers is not None}


@settings(max_examples=150, deadline=None)
@given(view=views(), share=st.floats(0.05, 0.9))
def test_no_regrouping_while_steps_go_by_and_nobody_comes_or_ends(view, share):
    policy = Elastic(ElasticConfig(patience_s=1e9))
    view = replace(view, requests=tuple(replace(r, deadline_s=None, pinned=False) for r in view.requests))
    settled = carried_out(view, policy.plan(view, MODEL))
    running = [r for r in settled.requests if r.workers]
    ends = [MODEL.times(len(r.workers), r.height, r.width, 1).run_s(r.steps_done, 50) for r in running]
    later = share * min(ends, default=1.0)
    requests = []
    for r in settled.requests:
        step_s = MODEL.step_s(len(r.workers or (0,)), r.height, r.width, 1)
        requests.append(
            replace(r, steps_done=r.steps_done + int(later / step_s) if r.workers else r.steps_done)
        )
    settled = replace(settled, now_s=view.now_s + later, requests=tuple(requests))
    plan = policy.plan(settled, MODEL)
    assert {r.id: r.workers for r in running} == {r.id: plan.assignments.get(r.id) for r in running}


def test_a_deadline_that_only_a_broken_block_would_meet_does_not_make_gangs_change_twice():
    waits = [request(str(i), 512) for i in range(2, 7)]
    late = request("b", 512, deadline=100.0, workers=(6, 7))
    due = request("due", 1024, done=14, deadline=101.5)  # needs two workers: 6 and 7 are the only pair
    view = replace(
        host(request("a", 512, workers=(3,)), late, due, *waits, now=100.0), workers=(1, 3, 5, 6, 7)
    )
    plan = Elastic().plan(view, MODEL)
    assert plan.assignments["due"] == (6, 7)
    assert Elastic().plan(carried_out(view, plan), MODEL).assignments == plan.assignments


def test_requests_that_cannot_run_now_hide_nobody_who_could():
    small = [request(str(i), 512) for i in range(4)]
    fours = [request(f"four {i}", 512, gang_size=4) for i in range(3)]  # no more fit beside the small ones
    view = replace(host(*small, *fours, request("a"), request("b"), now=100.0), workers=tuple(range(1, 8)))
    plan = Elastic().plan(view, MODEL)
    assert {"a", "b"} <= plan.assignments.keys()
    assert Elastic().plan(carried_out(view, plan), MODEL).assignments == plan.assignments


def test_two_gangs_do_not_swap_for_a_block_that_a_dead_worker_broke():
    gangs = {"a": (6, 7), "b": (1,), "c": (4, 5)}
    running = [request(name, 512, done=20, workers=workers) for name, workers in gangs.items()]
    view = replace(host(*running), workers=(1, 3, 4, 5, 6, 7))  # as many as three gangs of 2 have
    assert Elastic().plan(view, MODEL).assignments == gangs


@settings(max_examples=200, deadline=None)
@given(view=views(dead=False, fixed=False))
def test_somebody_runs_on_every_host_with_requests(view):
    plan = Elastic().plan(view, MODEL)
    assert bool(plan.assignments) == bool(view.requests)
    if len(view.requests) >= 8 and not any(r.pinned for r in view.requests):
        assert sum(widths(plan).values()) == 8


@given(view=views())
def test_moves_never_start_on_workers_that_somebody_holds(view):
    plan = Elastic().plan(view, MODEL)
    todo = moves(view, plan)
    held = {w for r in view.requests if r.workers for w in r.workers}
    for workers in todo.starts.values():
        assert held.isdisjoint(workers)
    pinned = {r.id for r in view.requests if r.pinned}
    assert pinned.isdisjoint(todo.yields)


def test_the_smallest_gang_that_meets_the_deadline_when_others_wait():
    waiting = [request(str(i), 2048) for i in range(8)]
    plan = Elastic().plan(host(request("due", 1024, deadline=2.1), *waiting), MODEL)
    assert widths(plan)["due"] == 2


def test_idle_workers_grow_only_the_gangs_that_gain():
    assert widths(Elastic().plan(host(request("large", 2048)), MODEL)) == {"large": 8}
    assert widths(Elastic().plan(host(request("small", 512)), MODEL)) == {"small": 2}


def test_growth_must_repay_the_regrouping():
    slow = LatencyModel(trial_profile(regroup_s=5.0))
    running = request("a", 2048, done=40, workers=(0, 1), prepared=True)
    assert widths(Elastic().plan(host(running), slow)) == {"a": 2}
    assert widths(Elastic().plan(host(running), MODEL)) == {"a": 8}


def test_what_cannot_be_met_gives_way_to_what_can():
    late = request("late", 2048, done=5, deadline=-1.0, arrival=-5.0, workers=tuple(range(8)))
    due = request("due", 1536, deadline=2.1)
    assert widths(Elastic().plan(host(late, due), MODEL)) == {"due": 8}


def test_a_deadline_that_needs_a_second_gang_later_is_met_by_growing():
    first = request("first", 1024, deadline=1.9)
    second = request("second", 1536, deadline=2.6)
    assert widths(Elastic().plan(host(first, second), MODEL)) == {"first": 4, "second": 4}


def test_a_fixed_gang_size_is_kept():
    plan = Elastic().plan(host(request("a", 2048, gang_size=2), request("b", 512, gang_size=4)), MODEL)
    assert widths(plan) == {"a": 2, "b": 4}


def test_running_gangs_are_left_alone_when_an_arrival_fits_beside_them():
    running = request("a", 2048, done=10, deadline=8.0, workers=(4, 5, 6, 7), prepared=True)
    plan = Elastic().plan(host(running, request("b", 1024, deadline=1.7)), MODEL)
    assert plan.assignments["a"] == (4, 5, 6, 7) and plan.assignments["b"] == (0, 1, 2, 3)


@pytest.mark.parametrize(("waited", "first"), [(10.0, "high"), (12.0, "low")])
def test_two_steps_of_priority_weigh_as_much_as_four_times_the_response_ratio(waited, first):
    low = [request(f"low {i}", arrival=0.0) for i in range(8)]
    high = [request(f"high {i}", arrival=waited, priority=2) for i in range(8)]
    plan = Elastic().plan(host(*low, *high, now=waited), MODEL)
    assert len(plan.assignments) == 8
    assert all(name.startswith(first) for name in plan.assignments)


@pytest.mark.parametrize(("now", "runs"), [(122.0, True), (135.0, False), (62.0, False)])
def test_the_oldest_request_passed_over_too_long_has_its_turn(now, runs):
    """A turn is the first eighth of every minute, for those passed over for a minute."""
    old = request("old", 2048, arrival=10.0, priority=-5)
    rush = [
        request(f"r{i}", k.height, arrival=now, deadline=now + 1.5 * (k.deadline_s or 0.0))
        for i, k in enumerate(TRIAL_KINDS * 3)
    ]
    plan = Elastic(ElasticConfig(patience_s=60.0, starved_every_s=60.0, starved_share=0.125)).plan(
        host(old, *rush, now=now), MODEL
    )
    assert ("old" in plan.assignments) == runs


def test_dead_workers_leave_smaller_gangs():
    view = HostView(0.0, (1, 2, 3, 4, 6, 7), SIZES, (request("a", 2048), request("b", 2048)))
    plan = Elastic().plan(view, MODEL)
    assert widths(plan) == {"a": 2, "b": 2}


def test_earliest_deadline_first_takes_the_largest_free_gang():
    view = host(request("b", deadline=9.0), request("a", deadline=5.0, max_gang=4), request("c"))
    assert widths(EarliestDeadlineFirst().plan(view, MODEL)) == {"a": 4, "b": 4}


def test_earliest_deadline_first_keeps_the_block_that_is_free_soonest_for_the_first_that_finds_none():
    soon, late = request("soon", done=25, workers=(0,)), request("late", done=10, workers=(4,))
    large = request("large", gang_size=4, deadline=50.0)
    small = [request(str(i), gang_size=1, arrival=1.0) for i in range(6)]
    plan = EarliestDeadlineFirst().plan(host(soon, late, large, *small, sizes=(1, 2, 4)), MODEL)
    assert plan.assignments.keys() == {"soon", "late", "0", "1", "2"}  # those beside `soon` are kept


def test_earliest_deadline_first_lets_others_use_a_kept_block_until_it_is_free():
    running = request("running", done=25, workers=(0,))  # for another 1.75 s
    large = request("large", gang_size=4, deadline=50.0)
    short, long = request("short", 512, gang_size=1, arrival=1.0), request("long", gang_size=1, arrival=1.0)
    plan = EarliestDeadlineFirst().plan(host(running, large, long, short, workers=4, sizes=(1, 2, 4)), MODEL)
    assert plan.assignments == {"running": (0,), "short": (1,)}  # 1.2 s; `long` takes 3.5


def test_earliest_deadline_first_keeps_nothing_for_a_gang_that_no_healthy_workers_can_form():
    large = request("large", gang_size=4)
    small = [request(str(i), gang_size=1, arrival=1.0) for i in range(3)]
    view = replace(host(large, *small, sizes=(1, 2, 4)), workers=(0, 1, 3))
    assert EarliestDeadlineFirst().plan(view, MODEL).assignments.keys() == {"0", "1", "2"}


def test_earliest_deadline_first_counts_a_request_without_a_deadline_as_due_a_minute_after_its_arrival():
    old, due = request("old", arrival=0.0), request("due", arrival=50.0, deadline=61.0)
    assert EarliestDeadlineFirst().plan(host(due, old, now=50.0), MODEL).assignments.keys() == {"old"}
    soon = request("due", arrival=50.0, deadline=59.0)
    assert EarliestDeadlineFirst().plan(host(soon, old, now=50.0), MODEL).assignments.keys() == {"due"}


def test_fixed_size_does_not_overtake():
    running = request("r", workers=(0, 1, 2, 3))
    view = host(running, request("a", arrival=1.0), request("b", arrival=2.0))
    assert widths(FixedSize(4).plan(view, MODEL)) == {"r": 4, "a": 4}


def test_an_empty_plan_for_an_empty_host():
    assert Elastic().plan(host(), MODEL) == Plan({})


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_of_the_table_can_be_configured_and_is_documented(name):
    assert type(make_policy(HostConfig(policy=name).policy)) is type(POLICIES[name]())
    docs = Path(__file__).parents[3] / "docs"
    page = (docs / "configuration.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| `policy`"))
    assert f"`{name}`" in row.split("|")[3]
    assert f"\n| `{name}` |" in (docs / "routing.md").read_text(), "what bounds the wait"


def test_a_policy_that_is_not_in_the_table_is_refused_with_those_that_are():
    for choose in (make_policy, lambda name: HostConfig(policy=name)):
        with pytest.raises(ValueError, match="no policy 'fifo'.*earliest_deadline, elastic"):
            choose("fifo")
