"""Workers that cannot be linked, replaced or kept."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine
from typing import Any

import pytest

from distriray.errors import GangBroken
from distriray.gang.config import HostConfig
from distriray.gang.messages import WorkerId
from distriray.gang.remote import WorkerDied
from distriray.gang.worker_group import REPAIR_ATTEMPTS, WorkerGroup

from .fleet import FakeFleet, FakeWorker, until


class Told:
    """What a crew tells whoever lends its workers."""

    def __init__(self) -> None:
        self.hopeless = 0
        self.out: list[int] = []
        self.dead: list[WorkerId] = []
        self.ready: list[int] = []

    def worker_out(self, index: int) -> None:
        self.out.append(index)

    def worker_dead(self, worker: WorkerId) -> None:
        self.dead.append(worker)

    def worker_ready(self, index: int) -> None:
        self.ready.append(index)

    def beyond_repair(self) -> None:
        self.hopeless += 1

    def unfinished(self) -> tuple[Collection[int], int]:
        return {3, 5}, 7


class Scene:
    def __init__(self, workers: int = 2, **config: Any) -> None:
        self.fleet, self.told = FakeFleet(), Told()
        settings = {"workers": workers, "device": "cpu", **config}
        self.group = WorkerGroup(HostConfig.model_validate(settings), self.fleet, self.told)

    async def __aenter__(self) -> Scene:
        await self.group.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.group.close()

    def ids(self) -> list[WorkerId]:
        return [member.id for member in self.group.members]


def do(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 20))


def test_out_of_service_is_not_dead() -> None:
    async def scene() -> None:
        async with Scene() as s:
            before = s.ids()
            s.group.reform(before)
            assert s.told.out == [0, 1] and s.group.healthy == set()
            await until(lambda: s.group.healthy == {0, 1})
            assert not s.told.dead and s.told.ready == [0, 1] and s.ids() == before

    do(scene())


def test_a_worker_that_cannot_join_is_replaced_and_the_others_come_back() -> None:
    async def scene() -> None:
        async with Scene(4) as s:
            s.fleet.at(1).raises = RuntimeError("CUDA error")
            before = s.ids()
            s.group.reform(before[:2])
            await until(lambda: s.group.healthy == {0, 1, 2, 3})
            after = s.ids()
            assert after[1].incarnation > before[1].incarnation
            assert [after[i] for i in (0, 2, 3)] == [before[i] for i in (0, 2, 3)]
            assert s.told.dead == [before[1]] and s.group.failure is None
            assert "CUDA error" in s.group.repairs[0].cause
            assert all(group in s.group.communicators for group in [(0, 1, 2, 3), (0, 1), (1,)])

    do(scene())


def test_a_worker_whose_peers_are_lost_one_after_another_while_it_joins_them_is_not_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    join = FakeWorker.link

    async def scene() -> None:
        async with Scene(8) as s:
            doomed = [7, 3, 1]  # one of each gang that worker 0 is to join, the largest first

            def link(worker: FakeWorker, links: Any) -> asyncio.Future[None]:
                if doomed and worker.index == doomed[0]:
                    worker.raises = RuntimeError(f"CUDA error {doomed.pop(0)}")
                    s.fleet.load_s = 0.5  # so that nobody is back before the next one is lost
                return join(worker, links)

            monkeypatch.setattr(FakeWorker, "link", link)
            s.fleet.at(0).die()
            await until(lambda: s.group.failure or (not doomed and s.group.healthy == set(range(8))))
            assert s.group.failure is None and len(s.group.repairs) == 4

    do(scene())


@pytest.mark.parametrize(
    ("load_s", "raised", "said"),
    [
        (9.0, None, r"worker 0 did not load its model within 0.05 s \(`start_timeout_s`\)"),
        (0.0, WorkerDied("out of memory"), "worker 1 died while it loaded its model: out of memory"),
        (0.0, TimeoutError("the hub"), "^the hub$"),
    ],
    ids=str,
)
def test_a_host_that_does_not_start_says_which_worker_kept_it(
    load_s: float, raised: Exception | None, said: str
) -> None:
    async def scene() -> None:
        s = Scene(start_timeout_s=0.05)
        s.fleet.load_s = load_s
        if raised is not None:
            s.fleet.load_raises[1] = raised
        with pytest.raises(TimeoutError if said == "^the hub$" else GangBroken, match=said):
            await s.group.start()
        await s.group.close()
        assert not any(worker.alive for worker in s.fleet.launched)

    do(scene())


def test_a_worker_that_dies_while_the_first_gangs_form_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    join = FakeWorker.link

    def link(worker: FakeWorker, links: Any) -> asyncio.Future[None]:
        if worker.index == 1:
            worker.die()
        return join(worker, links)

    monkeypatch.setattr(FakeWorker, "link", link)

    async def scene() -> None:
        s = Scene()
        with pytest.raises(GangBroken, match="worker 1 could not join a gang: worker 1"):
            await s.group.start()
        await s.group.close()

    do(scene())


def test_a_worker_that_cannot_be_started_again_fails_the_host(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async with Scene() as s:
            s.fleet.load_raises[1] = RuntimeError("no device")
            s.fleet.at(1).die()
            await until(lambda: s.group.failure)
            assert s.group.failure is not None and "no device" in s.group.failure
            assert len(s.fleet.launched) == 2 + REPAIR_ATTEMPTS
            assert s.told.hopeless == 1 and s.group.sizes == {1}
            assert (
                f"workers [1] are beyond repair, and this host with them: {s.group.failure}"
                in caplog.messages
            )
            for attempt in range(1, REPAIR_ATTEMPTS + 1):  # each may take minutes
                told = f"worker 1 did not start again, attempt {attempt} of {REPAIR_ATTEMPTS}: "
                assert told + "RuntimeError('no device')" in caplog.messages

    do(scene())


def test_a_place_that_loses_its_worker_on_end_fails_the_host() -> None:
    async def scene() -> None:
        async with Scene() as s:
            for _ in range(REPAIR_ATTEMPTS + 1):
                await until(lambda: s.group.healthy == {0, 1})
                s.group.replace(s.ids()[1], "failed")
            assert s.group.failure is not None and "on end" in s.group.failure

    do(scene())


def test_a_place_whose_workers_do_what_they_are_asked_may_lose_any_number_of_which_the_last_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distriray.gang.worker_group.REMEMBERED", 2)

    async def scene() -> None:
        async with Scene() as s:
            for turn in range(2 * REPAIR_ATTEMPTS):
                s.group.proved(s.ids()[1])
                s.group.replace(s.ids()[1], f"failed {turn}")
                await until(lambda: s.group.healthy == {0, 1})
            assert s.group.failure is None and s.group.repaired == 2 * REPAIR_ATTEMPTS
            assert [repair.cause for repair in s.group.repairs] == ["failed 4", "failed 5"]

    do(scene())


def test_only_the_process_that_is_meant_is_lost() -> None:
    async def scene() -> None:
        async with Scene() as s:
            before = s.ids()[1]
            s.group.replace(before, "died")
            s.group.replace(before, "died")
            await until(lambda: s.group.healthy == {0, 1})
            s.group.replace(before, "died")
            assert s.told.dead == [before] and s.group.healthy == {0, 1}
            assert not s.group.alive(before) and s.group.remote(before) is None

    do(scene())


def test_a_silent_worker_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distriray.gang.worker_group.HEARTBEAT_S", 0.01)

    async def scene() -> None:
        async with Scene(silence_s=0.05) as s:
            hung = s.fleet.at(0)
            hung.hangs = True
            await until(lambda: s.told.dead)
            await until(lambda: s.group.healthy == {0, 1})
            assert not hung.alive and "answered nothing" in s.group.repairs[0].cause
            assert ({3, 5}, 7) in s.fleet.at(1).retained

    do(scene())


def test_a_worker_that_is_silent_for_longer_than_gangs_are_waited_for_costs_nobody_else() -> None:
    """A pause of many timeouts, but not as long as a worker may be silent."""

    async def scene() -> None:
        async with Scene() as at:
            at.fleet.at(1).hangs = True
            at.group.reform(at.ids())
            await asyncio.sleep(2 * (REPAIR_ATTEMPTS + 1) * at.fleet.timeout_s)
            assert at.group.failure is None and not at.group.healthy
            at.fleet.at(1).hangs = False
            await until(lambda: at.group.healthy == {0, 1})
            assert len(at.fleet.launched) == 2 and not at.told.dead

    do(scene())


def test_no_error_of_a_background_task_goes_unseen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        async with Scene() as s:

            async def fails() -> str | None:
                raise ZeroDivisionError

            monkeypatch.setattr(s.group, "_link_all", fails)
            s.group.reform(s.ids())
            await until(lambda: s.group.failure)
            assert any(r.exc_info and r.exc_info[0] is ZeroDivisionError for r in caplog.records)

    do(scene())
