"""What a router believes of hosts, and what several routers do that believe the same."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.host_report import HostKnowledge, HostReport, shifted
from deployments.pool import report_of
from deployments.pool_state import PoolState, choose, wait_s
from distriray.adapters import Catalogue
from distriray.gang.config import HostConfig
from distriray.gang.messages import WorkerFacts
from distriray.routing.latency import MAX_OBSERVED, LatencyModel
from distriray.routing.policy import HostView, RequestView
from distriray.routing.profile import Entry, Profile
from distriray.routing.router import Route, publish
from distriray.steps import StepCount

FACTS = WorkerFacts(
    pid=1, device="cpu", device_name="cpu", model="m",
    default_size=(512, 512), size_unit=8, row_unit=32, cuts_vae=True, load_s=0.0, memory=0,
    own_steps=StepCount(), guides=True,
)  # fmt: skip


def model(step_s: float = 1.0) -> LatencyModel:
    entry = Entry(gang=1, height=512, width=512, step_s=step_s)
    return LatencyModel(Profile(model="m", device="cpu", version="0", entries=(entry,)))


def ask(name: str, now_s: float, deadline_s: float | None = None, steps: int = 10) -> RequestView:
    return RequestView(name, 512, 512, 1, steps, 0, now_s, deadline_s)


def report(
    host: str,
    *running: RequestView,
    max_queue: int = 8,
    step_s: float = 1.0,
    sizes: tuple[int, ...] = (1,),
) -> HostReport:
    """A host with workers for its largest gang, as it reports itself, with requests in its queue."""
    view = HostView(100.0, tuple(range(sizes[-1])), sizes, running)
    state = publish(host, view, model(step_s), max_queue)
    return HostReport(shifted(state, -100.0), "1", HostKnowledge(model(step_s), FACTS, HostConfig()))


def host_of(view: HostView, latency: LatencyModel, config: HostConfig, repair_s: float | None = None) -> Any:
    """A host in that state, as far as its reports need one."""
    return SimpleNamespace(
        view=lambda: view,
        repair_s=lambda: repair_s,
        latency=latency,
        facts=FACTS,
        config=config,
        catalogue=SimpleNamespace(names=("ink",), edition=1),
        adapters=frozenset({"ink"}),
    )


def pool(*reports: HostReport, asked_s: float = 0.0) -> PoolState:
    state = PoolState(HostConfig())
    tell(state, *reports, asked_s=asked_s)
    return state


def tell(state: PoolState, *reports: HostReport, asked_s: float) -> None:
    state.meet(tuple(report.state.host for report in reports))
    for report in reports:
        state.learn(report, asked_s)


def pick(state: PoolState, view: RequestView, now_s: float, seed: int = 0) -> Route:
    """The best of all hosts."""
    return state.route(state.members, view, now_s, random.Random(seed), 1.0)


def choose_any(pools: list[PoolState], views: list[RequestView], seed: int = 0) -> tuple[int, Route] | None:
    draw = random.Random(seed)
    routes = [pool.route(pool.members, view, 0.0, draw, 1.0) for pool, view in zip(pools, views, strict=True)]
    best = choose(routes, [len(pool.members) for pool in pools], 0.0, draw, 1.0)
    return None if best is None else (best, routes[best])


def test_a_report_is_read_on_the_routers_own_clock() -> None:
    state = pool(report("a", ask("r", 100.0)), asked_s=5000.0)
    route = pick(state, ask("new", 5000.0), 5000.0)
    assert route.host == "a" and route.finish_s == pytest.approx(5020.0)


def test_a_host_that_has_just_started_and_guesses_takes_no_knowledge_away() -> None:
    told = report("new", step_s=100.0)
    assert told.knowledge is not None
    guess = LatencyModel(told.knowledge.latency.profile.model_copy(update={"guessed": True}))
    guesses = replace(told, knowledge=replace(told.knowledge, latency=guess))
    state = pool(guesses)
    assert state.guesses
    tell(state, report("old"), guesses, asked_s=0.0)
    assert not state.guesses
    assert pick(state, ask("n", 0.0), 0.0).finish_s == pytest.approx(10.0)


def test_a_request_goes_where_it_is_done_first() -> None:
    state = pool(report("busy", ask("r", 100.0)), report("free"))
    assert {pick(state, ask("n", 0.0), 0.0, i).host for i in range(20)} == {"free"}


def test_what_was_just_sent_counts_before_the_host_reports_it() -> None:
    state = pool(report("a"), report("b"))
    for name in ("one", "two"):
        view = ask(name, 0.0)
        state.send(pick(state, view, 0.0), view, 0.0)
    assert {host.waiting for host in state.hosts.values()} == {1}


def test_what_was_sent_after_the_question_is_added_to_the_answer() -> None:
    state, view = pool(report("a")), ask("late", 2.0)
    state.send(pick(state, view, 2.0), view, 2.0)
    tell(state, report("a"), asked_s=1.0)
    assert state.hosts["a"].waiting == 1
    tell(state, report("a"), asked_s=3.0)
    assert state.hosts["a"].waiting == 0


def test_routers_that_see_the_same_state_spread_evenly() -> None:
    hosts = [report(name) for name in "abcd"]
    counts: Counter[str | None] = Counter()
    for seed in range(400):  # each a router of its own
        counts[pick(pool(*hosts), ask("n", 0.0), 0.0, seed).host] += 1
    assert all(70 <= count <= 130 for count in counts.values()) and len(counts) == 4


def test_the_faster_pool_is_chosen_and_equal_ones_share_by_their_hosts() -> None:
    slow, fast = pool(report("s", step_s=2.0)), pool(report("f"))
    chosen = choose_any([slow, fast], [ask("n", 0.0)] * 2)
    assert chosen is not None and chosen[0] == 1
    one, three = pool(report("a")), pool(report("b"), report("c"), report("d"))
    counts = Counter(
        picked[0] for seed in range(400) if (picked := choose_any([one, three], [ask("n", 0.0)] * 2, seed))
    )
    assert 70 <= counts[0] <= 130


def test_a_pool_that_meets_the_deadline_goes_before_one_that_does_not() -> None:
    full_of_work = pool(report("a", *(ask(f"r{i}", 100.0, 110.0 + 10 * i) for i in range(3))))
    free = pool(report("b", step_s=2.0))
    view = ask("n", 0.0, deadline_s=25.0)
    chosen = choose_any([full_of_work, free], [view, view])
    assert chosen is not None and (chosen[0], chosen[1].meets) == (1, True)


def test_a_deadline_that_no_host_meets_is_known_with_the_time_that_could_be() -> None:
    view = ask("n", 0.0, deadline_s=5.0)
    chosen = choose_any([pool(report("a"))], [view])
    assert chosen is not None and not chosen[1].meets and chosen[1].finish_s == pytest.approx(10.0)


def test_full_queues_take_nothing_and_say_when() -> None:
    waiting = [ask(f"r{i}", 100.0) for i in range(2)]
    chosen = choose_any([pool(report("a", *waiting, max_queue=2))], [ask("n", 0.0)])
    assert chosen is not None and chosen[1].host is None and 0 < chosen[1].finish_s <= 20.0


def test_a_host_that_refused_or_died_gets_nothing_until_it_reports() -> None:
    state, view = pool(report("a"), report("b")), ask("n", 0.0)
    state.refused("a")
    state.lost("b", 0.0)
    assert pick(state, view, 0.0).host is None
    tell(state, report("a"), report("b"), asked_s=1.0)
    assert pick(state, view, 1.0).host is not None


def test_no_host_means_no_choice_and_no_wait() -> None:
    assert choose_any([], []) is None
    assert wait_s([], 0.0) is None


def test_the_wait_is_until_a_worker_is_free() -> None:
    busy = pool(report("a", ask("r", 100.0)))
    assert wait_s(list(busy.hosts.values()), 0.0) == pytest.approx(10.0)
    assert wait_s(list(pool(report("a")).hosts.values()), 0.0) == 0.0


def test_what_a_router_knows_already_is_not_sent_again() -> None:
    first = report("a", step_s=2.0)
    state = pool(first, report("b"))
    assert [state.edition(host) for host in "abc"] == ["1", "1", None]
    tell(state, replace(first, knowledge=None), asked_s=1.0)
    route = pick(state, ask("n", 1.0), 1.0)
    assert route.host == "a" and route.finish_s == pytest.approx(21.0) and state.facts == FACTS
    assert state.edition("b") is None, "of hosts that are gone nothing is kept"


def test_a_host_that_leaves_out_what_the_router_never_had_is_asked_for_all() -> None:
    state = pool(replace(report("a"), knowledge=None))
    assert not state.hosts and state.edition("a") is None


def test_a_host_reports_what_it_learned_once() -> None:
    latency, config = model(), HostConfig()
    view = HostView(100.0, (0,), (1,), ())
    host = host_of(view, latency, config)
    first = report_of("a", host, 1, None)
    assert first.knowledge is not None and first.knowledge.latency is latency
    again = report_of("a", host, 1, first.edition)
    assert again.knowledge is None and again.state.host == "a"
    latency.observe(1, 512, 512, 1, 1.0)
    assert report_of("a", host, 1, first.edition).knowledge is not None
    assert report_of("a", host, 2, again.edition).knowledge is not None, "configured anew"


def test_an_adapter_that_came_into_the_folder_is_in_the_next_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distriray.adapters.LOOK_S", 0.0)
    host = host_of(HostView(100.0, (0,), (1,), ()), model(), HostConfig())
    host.catalogue = Catalogue("m", folder=tmp_path)
    first = report_of("a", host, 1, None)
    (tmp_path / "late.safetensors").touch()
    told = report_of("a", host, 1, first.edition)
    assert told.knowledge is not None and told.knowledge.adapters == ("late",)
    assert report_of("a", host, 1, told.edition).knowledge is None


def test_a_report_is_as_long_after_thousands_of_shapes_as_after_a_few() -> None:
    def size(shapes: int) -> int:
        latency = model()
        for i in range(shapes):
            case = (1, 64 + 8 * (i % 71), 64 + 8 * (i // 71), 1 + i % 8)
            latency.observe(*case, 1.0)
            latency.times(*case)
        return len(pickle.dumps(report_of("a", host_of(view, latency, HostConfig()), 1, None)))

    view = HostView(100.0, (0,), (1,), ())
    assert size(5000) < 1.1 * size(MAX_OBSERVED)


def repairing(*healthy: int, workers: int = 1, repair_s: float | None = 30.0) -> PoolState:
    """A pool of one host whose other workers are being replaced."""
    config = HostConfig(workers=workers)
    view = HostView(100.0, healthy, config.sizes, ())
    return pool(report_of("a", host_of(view, model(), config, repair_s), 1, None))


def test_a_host_that_is_being_repaired_gets_requests_and_is_counted_on_from_then_on() -> None:
    route = pick(repairing(), ask("n", 0.0), 0.0)
    assert route.host == "a" and route.finish_s == pytest.approx(40.0) and route.meets
    beyond_repair = repairing(repair_s=None)
    assert pick(beyond_repair, ask("n", 0.0), 0.0).host is None
    late = pick(repairing(), ask("n", 0.0, deadline_s=20.0), 0.0)
    assert not late.meets and late.finish_s == pytest.approx(40.0)


def test_a_gang_that_needs_the_worker_under_repair_waits_for_it_and_others_do_not() -> None:
    state = repairing(0, workers=2)
    one, two = (replace(ask("n", 0.0), gang_size=size) for size in (1, 2))
    assert pick(state, one, 0.0).finish_s == pytest.approx(10.0)
    assert pick(state, two, 0.0).finish_s == pytest.approx(40.0)
    assert wait_s(list(repairing().hosts.values()), 0.0) == pytest.approx(30.0)
    beyond_repair, works = (list(repairing(*healthy, repair_s=None).hosts.values()) for healthy in ((), (0,)))
    assert wait_s(beyond_repair, 0.0) is None and wait_s(beyond_repair + works, 0.0) == 0.0
