"""Profiles that hosts measure and keep."""

from __future__ import annotations

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distriray import __version__
from distriray.gang.calibrate import keep_profile
from distriray.gang.host import Host
from distriray.gang.profile import guessed_profile
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult
from distriray.routing.profile import Profile

from .fleet import FakeHost, until


def kept(folder: Path, asked: list[GenerationRequest] | None = None, **config: Any) -> Profile:
    """What a host of four workers starts from; `asked` has then what it has drawn for it."""

    async def scene() -> Profile:
        async with FakeHost(4, **config) as host:

            async def generate(request: GenerationRequest) -> GenerationResult:
                if asked is not None:
                    asked.append(request)
                return await host.dispatcher.accept_own(request).ended

            return await keep_profile(folder, host.config, host.dispatcher.facts, generate)

    return asyncio.run(scene())


def path_in(folder: Path) -> Path:
    return Profile.path(folder, "m", "4 x cpu in gangs of 1 2 4", __version__)


@pytest.mark.parametrize(
    "config", [{}, {"limits": {"max_steps": 1}}, {"limits": {"max_side": 64}}, {"max_queue": 1}]
)
def test_limits_for_clients_are_none_for_a_host_that_measures(tmp_path: Path, config: dict[str, Any]) -> None:
    profile = kept(tmp_path, **config)
    assert {entry.gang for entry in profile.entries} == {1, 2, 4}
    assert {busy for busy, _ in profile.contention} == {1, 2, 4}
    assert Profile.load(path_in(tmp_path)) == profile and not profile.guessed


def test_a_host_that_lends_other_gangs_measures_its_own(tmp_path: Path) -> None:
    """By a profile of lone workers alone no gang gains anything, so that none would ever be lent."""
    lone, all_sizes = kept(tmp_path, gang_sizes=(1,)), kept(tmp_path)
    assert [{entry.gang for entry in each.entries} for each in (lone, all_sizes)] == [{1}, {1, 2, 4}]
    assert kept(tmp_path, gang_sizes=(1,)) == lone


@pytest.mark.parametrize(
    "settings",
    [
        {"parallel": {"exchange": "sync"}},
        {"parallel": {"exchange": {"statistics": "stale"}, "warmup_steps": 2}},
        {"model": {"name": "m", "quantize": "int8"}},
        {"model": {"name": "m", "dtype": "float32"}},
        {"model": {"name": "m", "offload_text": True}},
        {"compile": ["64x64"]},
        {"nccl_max_ctas": 4},
    ],
    ids=str,
)
def test_a_host_that_computes_otherwise_measures_its_own(tmp_path: Path, settings: dict[str, Any]) -> None:
    kept(tmp_path)
    kept(tmp_path, **settings)
    kept(tmp_path, **settings, timeout_s=5.0)  # nothing that takes time
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize("exchange", ["sync", "displaced"])
def test_a_host_with_short_steps_measures_its_own_in_whole_turns(tmp_path: Path, exchange: str) -> None:
    """Turns begin behind the first three steps, also where more than these are synchronous."""
    asked: list[GenerationRequest] = []
    kept(tmp_path, parallel={"exchange": exchange})
    profile = kept(tmp_path, asked, parallel={"exchange": exchange, "cache_interval": 3})
    settings = {"parallel": {"exchange": exchange, "cache_interval": 3}}
    assert profile.device == f"4 x cpu in gangs of 1 2 4 with {json.dumps(settings)}"
    assert profile.warmup_steps == 3
    assert {request.num_inference_steps for request in asked} == {1, 3 + 9}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": "m"}', "\x00"])
def test_a_profile_that_cannot_be_read_is_measured_again(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path_in(tmp_path).write_text(content)
    with caplog.at_level(logging.WARNING):
        profile = kept(tmp_path)
    assert Profile.load(path_in(tmp_path)) == profile
    assert str(path_in(tmp_path)) in caplog.text


def test_a_profile_that_is_there_is_used(tmp_path: Path) -> None:
    first = kept(tmp_path)
    marked = first.model_copy(update={"regroup_s": 0.0123})
    marked.save(path_in(tmp_path))
    assert kept(tmp_path) == marked


def test_a_profile_that_cannot_be_kept_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert kept(tmp_path / "file").entries
    assert "cannot be kept" in caplog.text


def test_hosts_that_write_one_profile_at_once_leave_a_whole_one(tmp_path: Path) -> None:
    async def facts() -> Any:
        async with FakeHost(4) as host:
            return host.config, host.dispatcher.facts

    profile = guessed_profile(*asyncio.run(facts()))
    assert profile.guessed
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: profile.save(path_in(tmp_path)), range(400)))
    assert [Profile.load(path) for path in tmp_path.iterdir()] == [profile]


class Bundles:
    """A placement that counts how often it was given back, made in place of Ray's."""

    def __init__(self) -> None:
        self.group, self.device, self.released = SimpleNamespace(id=b"a host"), "cpu", 0

    async def make(self, _: Any) -> Any:
        return self

    def release(self) -> None:
        self.released += 1


def test_a_host_whose_start_is_cancelled_while_it_measures_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        fake, bundles = FakeHost(2, profiles=tmp_path), Bundles()
        monkeypatch.setattr("distriray.gang.host.Launcher", lambda *_: fake.fleet)
        monkeypatch.setattr("distriray.gang.host.Placement", bundles)
        starting = asyncio.create_task(Host.start(fake.config))
        await until(lambda: fake.fleet.gangs)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert not any(worker.alive for worker in fake.fleet.launched) and bundles.released == 1

    asyncio.run(scene())


def test_a_host_that_cannot_be_made_gives_its_bundles_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def launcher(*_: Any) -> Any:
        raise OSError("the node's address is none of this machine's")

    async def scene() -> None:
        bundles = Bundles()
        monkeypatch.setattr("distriray.gang.host.Launcher", launcher)
        monkeypatch.setattr("distriray.gang.host.Placement", bundles)
        with pytest.raises(OSError, match="none of this machine's"):
            await Host.start(FakeHost(2).config)
        assert bundles.released == 1

    asyncio.run(scene())
