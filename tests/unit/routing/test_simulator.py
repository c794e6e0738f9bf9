"""The simulator against arithmetic, and the policies against each other in it."""

import multiprocessing
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distriray.routing.host_clock import busy_workers
from distriray.routing.latency import LatencyModel
from distriray.routing.policies.baselines import FixedSize, Leases
from distriray.routing.policies.earliest_deadline import EarliestDeadlineFirst
from distriray.routing.policies.elastic import Elastic, ElasticConfig
from distriray.routing.policy import Plan
from distriray.routing.profile import Entry, Profile
from distriray.routing.quantiles import Quantiles
from distriray.routing.simulation.__main__ import main
from distriray.routing.simulation.fleet import SimulatedFleet
from distriray.routing.simulation.host import _with
from distriray.routing.simulation.simulator import simulate
from distriray.routing.simulation.workload import (
    SKEWED_KINDS,
    TRIAL_KINDS,
    Arrival,
    Workload,
    read_trace,
    trial_profile,
)
from tests.unit.routing.test_policies import request

MODEL = LatencyModel(trial_profile())
EXACT = LatencyModel(
    Profile(
        model="m",
        device="d",
        version="1",
        regroup_s=0.5,
        entries=tuple(
            Entry(
                gang=gang,
                height=64,
                width=64,
                step_s=1.0 / gang,
                sync_step_s=2.0 / gang,
                prepare_s=3.0,
                decode_s=4.0,
            )
            for gang in (1, 2)
        ),
    )
)


PAIR = SimulatedFleet(workers=2, gang_sizes=(2,))


class Scripted:
    """Both workers for the first request until another comes, then one each to the end."""

    review_s = None
    regroups = True

    def plan(self, view, model):
        names = [r.id for r in view.requests]
        if len(names) == 1:
            return Plan({names[0]: view.requests[0].workers or (0, 1)})
        return Plan({names[0]: (0,), names[1]: (1,)})


def arrival(at, **more):
    return Arrival(at_s=at, height=64, width=64, steps=10, **more)


def test_one_request_takes_prepare_a_synchronous_step_the_others_and_decode():
    report = simulate([arrival(1.0)], FixedSize(2), EXACT, PAIR)
    assert report.latency.mean == pytest.approx(3.0 + 1.0 + 9 * 0.5 + 4.0)
    assert report.worker_seconds == pytest.approx(2 * report.latency.mean)


def test_a_regrouping_waits_for_the_step_and_costs_the_move_and_a_synchronous_step():
    report = simulate(
        [arrival(0.0), arrival(4.7)], Scripted(), EXACT, SimulatedFleet(workers=2, gang_sizes=(1, 2))
    )
    # 3 prepare, steps end at 4 (synchronous), 4.5, 5: it yields at 5 with 3 done. The other has 4.7 … 5 to
    # wait. On one worker: 0.5 move, 2 synchronous, 6 more, 4 decode: done at 17.5. The other has 3 + 2 + 9
    # + 4 to go: done at 23.
    assert report.latency.total == pytest.approx(17.5 + (23.0 - 4.7), abs=0.01)
    assert report.regroupings == 1
    assert report.worker_seconds == pytest.approx(2 * 5.0 + 12.5 + 18.0)


def test_workers_that_share_cores_slow_each_other_down():
    shared = LatencyModel(EXACT.profile.model_copy(update={"contention": ((1, 0.5), (2, 1.0))}))
    report = simulate(
        [arrival(0.0), arrival(4.0)], FixedSize(1), shared, SimulatedFleet(workers=2, gang_sizes=(1,))
    )
    # an image is 3 + 2 + 9 + 4 = 18 at full house. The first has 8 behind it at 4, twice as fast as that,
    # and is done at 14; the other has 10 behind it then, and the last 8 take 4.
    assert report.latency.total == pytest.approx(14.0 + 14.0)
    assert report.span_s == pytest.approx(18.0)


def test_all_of_a_gang_are_busy_until_it_has_decoded():
    contention = tuple((busy, busy / 4) for busy in (1, 2, 3, 4))
    shared = LatencyModel(EXACT.profile.model_copy(update={"contention": contention}))
    arrivals = [arrival(0.0, gang_size=2), arrival(0.0, gang_size=1)]
    report = simulate(arrivals, EarliestDeadlineFirst(), shared, SimulatedFleet(workers=4, gang_sizes=(1, 2)))
    # three workers: the gang's 8.5 of steps and 4 of decoding at full house take 9.375. The lone worker has
    # 18 at full house: 12.5 by then, and the last 5.5 take 1.375 alone.
    assert report.latency.total == pytest.approx(9.375 + 10.75)


def test_one_of_a_gang_is_busy_when_it_decodes_alone():
    contention = tuple((busy, busy / 4) for busy in (1, 2, 3, 4))
    shared = LatencyModel(EXACT.profile.model_copy(update={"contention": contention}))
    arrivals = [arrival(0.0, gang_size=2), arrival(0.0, gang_size=1)]
    fleet = SimulatedFleet(workers=4, gang_sizes=(1, 2), decodes_together=False)
    report = simulate(arrivals, EarliestDeadlineFirst(), shared, fleet)
    # three workers until the gang's 8.5 of steps are done, at 6.375; then two, so that its 4 of decoding take
    # 2: done at 8.375. The lone worker has 18, of which 8.5 and 4 are done by then; the last 5.5 take 1.375.
    assert report.latency.total == pytest.approx(8.375 + 9.75)
    assert report.worker_seconds == pytest.approx(2 * 8.375 + 9.75)  # held, busy or not


@pytest.mark.parametrize(
    ("gang", "decoding", "together", "busy"),
    [(4, False, True, 4), (4, False, False, 4), (4, True, True, 4), (4, True, False, 1), (1, True, False, 1)],
)
def test_a_gang_is_busy_but_for_those_who_leave_decoding_to_one(gang, decoding, together, busy):
    assert busy_workers(gang, decoding, together) == busy


def test_a_deadline_met_to_the_second_counts():
    met = [
        simulate(
            [arrival(0.0, deadline_s=d)], FixedSize(2), EXACT, SimulatedFleet(workers=2, gang_sizes=(2,))
        ).met
        for d in (12.49, 12.5)
    ]
    assert met == [0, 1]


def test_the_same_seed_gives_the_same_report():
    rows = [
        simulate(
            Workload(TRIAL_KINDS, 0.7).arrivals(80, 3), Elastic(), MODEL, SimulatedFleet(noise=0.1), seed=5
        ).row()
        for _ in range(2)
    ]
    assert rows[0] == rows[1]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rate=st.floats(0.2, 3.0),
    burst=st.sampled_from([1, 7, 20]),
    workers=st.sampled_from([1, 2, 4, 8]),
    noise=st.sampled_from([0.0, 0.3]),
)
def test_every_request_ends(seed, rate, burst, workers, noise):
    workload = Workload(TRIAL_KINDS, rate, 1.5, burst, steps=10)
    for policy in (Elastic(), EarliestDeadlineFirst(), Leases()):
        fleet = SimulatedFleet(workers=workers, gang_sizes=(1, 2, 4, 8)[: workers.bit_length()], noise=noise)
        report = simulate(workload.arrivals(40, seed), policy, MODEL, fleet, seed)
        assert report.latency.count == report.arrived == 40
        assert report.worker_seconds <= report.span_s * workers + 1e-6


def test_nobody_starves_under_endless_load_of_higher_priority():
    def stream():
        yield Arrival(at_s=0.0, height=512, width=512, priority=-9)
        for i in range(150):  # twice what the host can do, and always more important
            yield Arrival(at_s=0.1 + 0.5 * i, height=2048, width=2048, deadline_s=4.0, priority=9)

    ends = {}

    class Watched(Elastic):
        def plan(self, view, model):
            ends.update({r.id: view.now_s for r in view.requests})
            return super().plan(view, model)

    simulate(stream(), Watched(ElasticConfig(patience_s=30.0, starved_every_s=60.0)), MODEL)
    assert 60.0 < ends["1"] < 60.0 + 3.0


@pytest.mark.parametrize("kinds", [TRIAL_KINDS, SKEWED_KINDS])
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_elastic_beats_the_best_fixed_size_by_25_points_and_leases_by_15(kinds, scale):
    workload = Workload(kinds, 0.6, scale)

    def met(policy):
        return simulate(workload.arrivals(250, 1), policy, MODEL).row()["deadlines met %"]

    ours = met(Elastic())
    assert ours >= max(met(FixedSize(size)) for size in (1, 2, 4, 8)) + 25
    assert ours >= met(Leases()) + 15


def test_at_low_load_an_image_costs_no_more_than_with_the_best_fixed_size():
    workload = Workload(TRIAL_KINDS, 0.1, 1.0)
    rows = {size: simulate(workload.arrivals(150, 1), FixedSize(size), MODEL).row() for size in (1, 2, 4, 8)}
    best = max(rows.values(), key=lambda row: row["deadlines met %"])
    ours = simulate(workload.arrivals(150, 1), Elastic(), MODEL).row()
    assert ours["GPU-s/image"] <= best["GPU-s/image"]
    assert ours["deadlines met %"] >= best["deadlines met %"]


def _peak(count, policy):
    simulate(Workload(TRIAL_KINDS, 0.2).arrivals(50, 1), policy, MODEL)  # imports, caches
    tracemalloc.start()
    simulate(Workload(TRIAL_KINDS, 0.2).arrivals(count, 1), policy, MODEL)
    return tracemalloc.get_traced_memory()[1]


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(FixedSize(4), id="fixed"),
        pytest.param(Elastic(), id="elastic", marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow_with_what_has_been(policy):
    """In a process of its own: another thread's allocations would count too."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as process:
        assert process.apply(_peak, (4000, policy)) < 1.5 * process.apply(_peak, (500, policy))


@given(st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=200), st.sampled_from([0.5, 0.95, 0.99]))
def test_quantiles_are_right_to_one_percent(values, share):
    quantiles = Quantiles()
    for value in values:
        quantiles.add(value)
    exact = sorted(values)[max(0, -(-round(share * 1000) * len(values) // 1000) - 1)]
    assert quantiles.at(share) == pytest.approx(exact, rel=0.011)


def test_several_hosts_share_the_load_through_routers_with_old_state():
    workload = Workload(TRIAL_KINDS, 2.0, 1.5)
    fleet = SimulatedFleet(hosts=4, routers=3, refresh_s=0.5)
    report = simulate(workload.arrivals(300, 1), Elastic(), MODEL, fleet)
    assert report.latency.count == 300
    assert report.row()["deadlines met %"] > 75


def test_refusing_keeps_latencies_short():
    workload = Workload(TRIAL_KINDS, 1.5, 1.2)
    report = simulate(workload.arrivals(200, 1), Elastic(), MODEL, SimulatedFleet(refuse=True))
    assert report.refused > 20
    assert report.latency.count == 200 - report.refused
    assert report.latency.at(0.99) < 20


@pytest.mark.parametrize("hosts", [1, 2])
def test_what_no_gang_fits_is_refused_and_not_waited_for(hosts):
    arrivals = [arrival(0.0, gang_size=3), arrival(1.0, max_gang=1), arrival(2.0)]
    fleet = SimulatedFleet(hosts=hosts, workers=4, gang_sizes=(2, 4))
    report = simulate(arrivals, Elastic(), EXACT, fleet)
    assert (report.arrived, report.refused, report.latency.count) == (3, 2, 1)


def test_what_runs_is_in_all_else_as_it_came():
    view = request(
        fresh=True,
        warmup_steps=7,
        adapters=("ink",),
        besides=(("lora ink", 0.3),),
        unguided_steps=3,
        priority=2,
    )
    seen = replace(view, steps_done=4, workers=(0, 1), prepared=True, pinned=True)
    assert _with(view, 4, (0, 1), True) == seen


def test_deadlines_that_are_missed_by_a_hair_are_not_taken_without_end():
    arrivals = [arrival(1.0 * i, deadline_s=0.97 * 18.0) for i in range(40)]  # each takes one worker 18 s
    fleet = SimulatedFleet(workers=1, gang_sizes=(1,), refuse=True)
    report = simulate(arrivals, Elastic(), EXACT, fleet)
    assert report.refused > 35 and report.latency.at(1.0) < 1.1 * 18.0


@pytest.mark.parametrize("policy", [Elastic(), EarliestDeadlineFirst()], ids=["elastic", "earliest_deadline"])
def test_a_deadline_behind_a_long_run_is_met_where_that_makes_way_and_else_refused(policy):
    arrivals = [Arrival(at_s=0.0, height=64, width=64, steps=100), arrival(1.0, deadline_s=60.0)]
    report = simulate(arrivals, policy, EXACT, SimulatedFleet(workers=1, gang_sizes=(1,), refuse=True))
    assert (report.met, report.refused) == ((1, 0) if policy.regroups else (0, 1))


def test_a_trace_file_is_read_line_by_line(tmp_path, capsys):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(arrival(float(i), deadline_s=60.0).model_dump_json() + "\n" for i in range(3)))
    assert [a.at_s for a in read_trace(path)] == [0.0, 1.0, 2.0]
    profile = tmp_path / "profile.json"
    EXACT.profile.save(profile)
    arguments = f"--trace {path} --profile {profile} --workers 2 --gang-sizes 1 2 --policies elastic"
    assert main(arguments.split()) == 0
    assert "| elastic | 100.0 |" in capsys.readouterr().out


def test_the_command_prints_a_table_and_writes_a_plot(tmp_path, capsys):
    picture = tmp_path / "p.png"
    arguments = f"--workloads uniform --rates 0.2 --scales 1 --requests 10 --seeds 2 --plot {picture}"
    assert main(arguments.split()) == 0
    assert "| uniform | 0.2 | 1.0 | elastic |" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_names_the_policies_that_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["--policies", "elastic", "fifo"])
    assert "no policies ['fifo']; use some of ['fixed 1'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--workers 0", "argument --workers: 0 is too few; use 1 or more"),
        ("--requests 0", "argument --requests: 0 is too few; use 1 or more"),
        ("--seeds 0", "argument --seeds: 0 is too few; use 1 or more"),
        ("--rates 0", "argument --rates: '0' is no positive number"),
        ("--scales nan", "argument --scales: 'nan' is no positive number"),
        ("--sync 0", "argument --sync: '0' is no positive number"),
        ("--regroup-s -1", "argument --regroup-s: '-1' is no number of 0 or more"),
        ("--json bad/x.json", "argument --json: bad/x.json: no folder bad can be made"),
        ("--plot .", "argument --plot: .: it cannot be written"),
        ("--workers 3 --gang-sizes 2 4", "--gang-sizes 4 exceeds the 3 workers"),
        ("--profile none.json", "No such file or directory: 'none.json'"),
        ("--profile bad", "Invalid JSON"),
        ("--trace none.jsonl", "No such file or directory: 'none.jsonl'"),
        ("--trace bad", "Expecting value"),
        ("--trace tall.jsonl", "height\n  Input should be greater than or equal to 1"),
        ("--trace empty.jsonl", "--trace empty.jsonl has no request"),
        ("--trace back.jsonl", "line 2: at_s 1 is before 2; sort by at_s"),
        ("--gang-sizes 3 4", "gang sizes [3, 4] do not nest"),
    ],
)
def test_the_command_refuses_what_it_cannot_simulate(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").write_text("nothing")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "back.jsonl").write_text(
        "".join(f'{{"at_s": {at_s}, "height": 64, "width": 64}}\n' for at_s in (2.0, 1.0))
    )
    (tmp_path / "tall.jsonl").write_text('{"at_s": 0.0, "height": 0, "width": 64}')
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    assert end.value.code == 2
    assert says in capsys.readouterr().err


def test_a_few_hosts_that_are_asked_do_as_well_as_all_hosts():
    def met(choices):
        fleet = SimulatedFleet(hosts=24, workers=2, gang_sizes=(1, 2), routers=3, choices=choices)
        arrivals = Workload(TRIAL_KINDS, 0.15 * 24, 4.0).arrivals(400, 1)
        return simulate(arrivals, Elastic(), MODEL, fleet).row()["deadlines met %"]

    assert met(8) > met(24) - 1.0 > 75
