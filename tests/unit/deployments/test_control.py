"""What a router knows of ControlNets: which there are."""

from __future__ import annotations

import asyncio

import pytest
from PIL import Image

from distriray.controls import Control
from distriray.errors import ControlNetNotFound
from distriray.picture import Picture
from distriray.requests import GenerationRequest

from .test_adapters import Hosts, front, serve_tells_who_is_there

EDGES = Picture.of(Image.new("L", (16, 8)))
CANNY = {"name": "canny", "source": "some/canny"}
__all__ = ["serve_tells_who_is_there"]


def ask(name: str) -> GenerationRequest:
    return GenerationRequest(prompt="x", num_inference_steps=2, control=(Control(name=name, image=EDGES),))


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    hosts = Hosts("a")
    service = front(hosts, controls=[CANNY])
    with pytest.raises(ControlNetNotFound, match="^no ControlNet 'pose'; there is 'canny'$"):
        asyncio.run(service.generate(ask("pose")))
    assert not hosts.calls

    async def scene() -> None:
        await service.generate(ask("canny"))
        assert service.models()[0].controls == ("canny",)

    asyncio.run(scene())
    ((_, request),) = hosts.calls
    assert request.control[0].image == EDGES


def test_a_pool_without_any_says_so() -> None:
    with pytest.raises(ControlNetNotFound, match="there is none here"):
        asyncio.run(front(Hosts("a")).generate(ask("canny")))
