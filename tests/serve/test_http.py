"""HTTP through Serve's proxy: a picture, an error, and a client that leaves."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

from distriray.client import Client
from distriray.events import Finished
from distriray.handle import HandleClient
from distriray.requests import GenerationRequest
from distriray.status import HostStatus

from .conftest import HTTP, Service, until

pytestmark = pytest.mark.ray


def body(service: Service, **fields: object) -> dict[str, object]:
    return {
        "prompt": "a lake",
        "model": service.models["pair"],
        "size": "128x128",
        "num_inference_steps": 4,
        "response_format": "b64_json",
        **fields,
    }


def test_http_draws_what_a_handle_draws(
    service: Service, client: HandleClient, ask: Callable[..., GenerationRequest]
) -> None:
    response = httpx.post(f"{HTTP}/v1/images/generations", json=body(service, seed=7), timeout=60)
    assert response.status_code == 200, response.text
    drawn = Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"])))
    assert drawn.convert("RGB").tobytes() == client.generate(ask(seed=7)).images[0].tobytes()


def test_the_client_over_http_hears_what_a_handle_hears(
    service: Service, client: HandleClient, ask: Callable[..., GenerationRequest]
) -> None:
    with Client(HTTP) as over_http:
        assert over_http.models() == client.models()
        assert over_http.fleet().pools.keys() == client.fleet().pools.keys()
        drawn, expected = over_http.generate(ask(seed=7)), client.generate(ask(seed=7))
        assert drawn.images[0].tobytes() == expected.images[0].tobytes()
        assert drawn.summary().keys() == expected.summary().keys()
        *_, last = over_http.stream(ask(seed=7, previews=1))
        assert isinstance(last, Finished) and last.result.images[0].tobytes() == expected.images[0].tobytes()


def test_http_says_what_is_up(service: Service, client: HandleClient) -> None:
    assert httpx.get(f"{HTTP}/healthz", timeout=30).status_code == 200
    models = httpx.get(f"{HTTP}/v1/models", timeout=30).json()["data"]
    assert [model["id"] for model in models] == list(service.models.values())
    pools = httpx.get(f"{HTTP}/v1/fleet", timeout=30).json()["pools"]
    assert set(pools) == {"pair", "twins", "elastic"} and len(pools["twins"]["hosts"]) == 2


def test_what_happens_in_the_fleet_is_streamed_to_who_watches(service: Service, client: HandleClient) -> None:
    """Everything first, then a segment that begins and one that ends; watching costs no place in a queue."""

    def news(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
        return (json.loads(line[5:]) for line in lines if line.startswith("data:"))

    def segments(told: dict[str, Any]) -> list[dict[str, Any]]:
        return [s for host in told["pools"]["pair"]["hosts"].values() for s in host["segments"]]

    with httpx.stream("GET", f"{HTTP}/v1/fleet/events", timeout=60) as answer, ThreadPoolExecutor(1) as pool:
        told = news(answer.iter_lines())
        first = next(told)
        assert first["complete"] and set(first["pools"]) == {"pair", "twins", "elastic"}
        assert abs(first["now"] - time.time()) < 30 and len(first["pools"]["twins"]["hosts"]) == 2
        asked = body(service, gang_size=2, num_inference_steps=60)
        drawing = pool.submit(httpx.post, f"{HTTP}/v1/images/generations", json=asked, timeout=60)
        seen: list[dict[str, Any]] = []
        while not any("end" in segment for segment in seen):
            seen += segments(next(told))
        result = drawing.result().json()
        assert {segment["request"] for segment in seen} == {result["id"]}
        over = seen[-1]
        assert over["workers"] == result["segments"][0]["workers"] and over["last_step"] == 60
        assert over["end"] == "finished" and over["exchange"] == "sync" and 0 < over["waited"] < 1


def test_an_unknown_model_is_not_found(service: Service) -> None:
    response = httpx.post(f"{HTTP}/v1/images/generations", json=body(service, model="none"), timeout=30)
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_gang(service: Service, client: HandleClient, stream: bool) -> None:
    def host() -> HostStatus:
        return next(iter(client.fleet().pools["pair"].hosts.values()))

    cancelled = host().outcomes.get("cancelled", 0)
    with httpx.Client(timeout=httpx.Timeout(60, read=1.0)) as http, pytest.raises(httpx.ReadTimeout):
        request = body(service, num_inference_steps=200, stream=stream)
        with http.stream("POST", f"{HTTP}/v1/images/generations", json=request) as response:
            response.read()
    until(lambda: host().outcomes.get("cancelled", 0) == cancelled + 1)
    assert not host().running
