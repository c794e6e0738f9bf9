"""What a router knows of IP-Adapters: which there are."""

from __future__ import annotations

import asyncio
import random

import pytest
from PIL import Image

from deployments.config import AppConfig
from deployments.router import Router
from distriray.errors import IPAdapterNotFound
from distriray.gang.config import HostConfig
from distriray.ip_adapters import IPAdapter
from distriray.picture import Picture
from distriray.requests import GenerationRequest

from .test_adapters import Hosts, front
from .test_router import CREATED, serve_tells_who_is_there

LIKE = Picture.of(Image.new("RGB", (16, 8)))
__all__ = ["serve_tells_who_is_there"]


def ask(name: str) -> GenerationRequest:
    named = IPAdapter(name=name, image=LIKE)
    return GenerationRequest(prompt="x", num_inference_steps=2, ip_adapters=(named,))


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    hosts = Hosts("a")
    service = front(hosts, ip_adapters=[{"name": "style", "source": "some/style"}])
    with pytest.raises(IPAdapterNotFound, match="^no IP-Adapter 'face'; there is 'style'$"):
        asyncio.run(service.generate(ask("face")))
    assert not hosts.calls

    async def scene() -> None:
        await service.generate(ask("style"))
        assert service.models()[0].ip_adapters == ("style",)

    asyncio.run(scene())
    ((_, request),) = hosts.calls
    assert request.ip_adapters[0].image == LIKE


def test_a_pool_without_any_says_so() -> None:
    with pytest.raises(IPAdapterNotFound, match="there is none here"):
        asyncio.run(front(Hosts("a")).generate(ask("style")))


@pytest.mark.parametrize(("listed", "field"), [("ip_adapters", "ip_adapters"), ("controls", "control")])
def test_of_two_pools_the_one_that_has_it_draws(listed: str, field: str) -> None:
    without, having = Hosts("a"), Hosts("b")
    own = {listed: [{"name": "style", "source": "some/style"}]}
    having.config = HostConfig.model_validate({"model": {"name": "some/model"}, **own})
    without.config = HostConfig.model_validate({"model": {"name": "some/model"}})
    pools = [{"name": "a", "model": "some/model"}, {"name": "b", "model": "some/model", **own}]
    config = AppConfig.model_validate({"pools": pools, "router": {"choices": 2}})
    service = Router(config, {"a": without, "b": having}, random.Random(0), CREATED)  # type: ignore[dict-item]
    asked = {field: [{"name": "style", "image": LIKE}]}
    asyncio.run(service.generate(GenerationRequest.parse({"prompt": "x", "num_inference_steps": 2, **asked})))
    assert having.calls and not without.calls
