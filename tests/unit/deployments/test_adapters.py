"""What a router knows of adapters: which there are, and who holds them."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.config import AppConfig
from deployments.host_report import HostReport
from deployments.pool_state import PoolState
from deployments.router import Router
from distriray.adapters import AdapterSpec, Lora
from distriray.errors import AdapterNotFound
from distriray.gang.config import HostConfig
from distriray.requests import GenerationRequest

from .test_pool_state import report
from .test_router import CREATED, FakeHandle, serve_tells_who_is_there

INK = [Lora(name="ink", scale=0.5)]
LISTED = AdapterSpec(name="oil", source="some/oil")
__all__ = ["serve_tells_who_is_there"]


class Hosts(FakeHandle):
    """Hosts that tell which adapters there are and which of them each holds."""

    adapters: tuple[str, ...] = ("ink", "oil")
    held: dict[str, set[str]] = {}

    def _report(self, host: str) -> HostReport:
        told = super()._report(host)
        assert told.knowledge is not None
        state = replace(told.state, adapters=frozenset(self.held.get(host, ())))
        return replace(told, state=state, knowledge=replace(told.knowledge, adapters=self.adapters))


def front(handle: FakeHandle, **pool: Any) -> Router:
    config = {"pools": [{"name": "pool", "model": "some/model", **pool}], "router": {"choices": 2}}
    handle.config = HostConfig.model_validate({"model": {"name": "some/model"}, **pool})
    return Router(AppConfig.model_validate(config), {"pool": handle}, random.Random(0), CREATED)  # type: ignore[dict-item]


def generate(service: Router, loras: list[Lora]) -> None:
    asyncio.run(service.generate(GenerationRequest(prompt="x", num_inference_steps=2, loras=loras)))


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    hosts = Hosts("a")
    service = front(hosts, loras=[LISTED])
    with pytest.raises(AdapterNotFound, match="^no adapter 'fog'; there is 'ink', 'oil'$"):
        generate(service, [Lora(name="fog")])
    assert not hosts.calls
    generate(service, INK)
    assert [request.loras for _, request in hosts.calls] == [tuple(INK)]


def test_models_list_their_adapters() -> None:
    service = front(Hosts("a"), loras=[LISTED])

    async def scene() -> None:
        await service.generate(GenerationRequest(prompt="x", num_inference_steps=2))
        assert service.models()[0].loras == ("ink", "oil")

    asyncio.run(scene())


def test_before_a_host_was_seen_a_folder_may_have_any_name_and_a_list_has_its_own(tmp_path: Path) -> None:
    state = PoolState(HostConfig(lora_dir=tmp_path, loras=(LISTED,)))
    assert state.adapters == ("ink", "neon", "oil") or state.adapters == ("oil",)
    state.check_adapters([Lora(name="fog")])
    with pytest.raises(AdapterNotFound, match="no adapter 'fog'; there is 'oil'"):
        PoolState(HostConfig.model_validate({"model": {"name": "m"}, "loras": [LISTED]})).check_adapters(
            [Lora(name="fog")]
        )
    told = report("a")
    assert told.knowledge is not None
    state.meet(("a",))
    state.learn(replace(told, knowledge=replace(told.knowledge, adapters=("ink",))), 0.0)
    with pytest.raises(AdapterNotFound, match="no adapter 'fog'; there is 'ink'"):
        state.check_adapters([Lora(name="fog")])


def test_a_host_that_holds_the_adapter_goes_first_however_many_there_are() -> None:
    hosts = Hosts(*(f"host-{index}" for index in range(12)))
    hosts.held = {"host-7": {"ink"}}
    service = front(hosts)

    async def scene() -> None:
        for _ in range(40):  # until each was asked once
            await service._clients[0].look(4, news=True)
        for _ in range(4):
            await service._clients[0].look(12, news=True)
            await service.generate(GenerationRequest(prompt="x", num_inference_steps=2, loras=INK))

    asyncio.run(scene())
    assert Counter(host for host, _ in hosts.calls) == {"host-7": 4}


def test_a_busy_host_that_holds_it_is_passed_by() -> None:
    hosts = Hosts("a", "b", waiting=3)
    hosts.held, hosts.free = {"a": {"ink"}}, {"b"}
    generate(front(hosts), INK)
    assert [host for host, _ in hosts.calls] == ["b"]
