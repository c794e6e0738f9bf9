"""HEAD, clients that leave early, health that many ask for, and values at the edge of what can be."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from contextlib import suppress
from io import BytesIO
from typing import Any

import httpx
import pytest
from PIL import Image

from deployments.http import HttpConfig, build_http, health
from deployments.http.routes import images
from distriray.errors import NotEnoughDevices, TooLong
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult
from tests.unit.conftest import LOG, serving
from tests.unit.http import fake
from tests.unit.http.fake import FakeService, result_of
from tests.unit.http.malformed import IMAGES

OPEN = HttpConfig(keys_env="NO_SUCH_VARIABLE")
SCOPE = {
    "type": "http",
    "http_version": "1.1",
    "method": "POST",
    "scheme": "http",
    "path": IMAGES,
    "raw_path": IMAGES.encode(),
    "root_path": "",
    "query_string": b"",
    "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    "client": ("127.0.0.1", 5000),
    "server": ("localhost", 8000),
}


def draw(service: FakeService | None = None, **fields: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(build_http(service or FakeService(), OPEN), client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.post(IMAGES, json={"prompt": "a lake", **fields})

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "path", ["/healthz", "/v1/models", "/v1/models/builtin:landscapes", "/v1/fleet", "/docs", "/openapi.json"]
)
def test_head_says_what_get_says_without_a_body(path: str, url: str) -> None:
    get, head = httpx.get(f"{url}{path}"), httpx.head(f"{url}{path}")
    assert get.status_code == head.status_code == 200 and not head.content and get.content
    assert head.headers["content-type"] == get.headers["content-type"]
    assert head.headers["content-length"] == get.headers["content-length"]


def test_head_is_refused_where_get_is_and_other_methods_are_told_of_both(url: str) -> None:
    assert httpx.head(f"{url}/nothing").status_code == 404
    refused = httpx.head(f"{url}{IMAGES}")
    assert refused.status_code == 405 and refused.headers["allow"] == "POST" and not refused.content
    refused = httpx.delete(f"{url}/healthz")
    assert refused.status_code == 405 and refused.headers["allow"] == "GET, HEAD"
    assert refused.json()["error"]["message"].endswith("use GET, HEAD")
    assert httpx.head(f"{url}/healthz", headers={"X-Request-ID": "mine"}).status_code == 200


def test_the_log_says_head(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOG)
    with serving(FakeService(), OPEN) as url:
        httpx.head(f"{url}/healthz")
    assert "method=HEAD" in caplog.text


@pytest.mark.parametrize("error", [None, RuntimeError("the request is gone"), StopAsyncIteration()])
def test_a_client_that_leaves_while_its_body_is_read_is_no_error(
    error: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        async def receive() -> dict[str, Any]:
            if first:
                return first.pop()
            if error is not None:  # as Serve's proxy has it that has forgotten the client
                raise error
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        first: list[dict[str, Any]] = [{"type": "http.request", "body": b'{"prompt"', "more_body": True}]
        await build_http(service, OPEN)(SCOPE, receive, send)

    caplog.set_level(logging.INFO, LOG)
    service, sent = FakeService(), list[Any]()
    asyncio.run(scene())
    assert "status=499" in caplog.text and "code=client_left" in caplog.text
    assert all(record.levelno < logging.WARNING and not record.exc_info for record in caplog.records)
    assert not service.asked and sent[0]["status"] == 499


@pytest.mark.parametrize("ill", [False, True])
def test_the_workers_are_asked_once_a_second_however_many_ask_for_health(
    ill: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        transport = httpx.ASGITransport(build_http(service, OPEN), client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            answers = await asyncio.gather(*(http.get("/healthz") for _ in range(20)))
            assert {answer.status_code for answer in answers} == {503 if ill else 200}
            assert service.looks == 1
            monkeypatch.setattr(health, "FRESH_S", 0.0)
            service.illness = None
            assert (await http.get("/healthz")).status_code == 200 and service.looks == 2

    service = FakeService(illness=NotEnoughDevices("no host is up") if ill else None)
    asyncio.run(scene())


def test_a_client_that_leaves_its_look_at_health_leaves_it_to_the_next() -> None:
    class Slow(FakeService):
        async def check_health(self) -> None:
            await super().check_health()
            await asyncio.sleep(0.05)

    async def scene() -> None:
        looked = health.Health(service)
        first, second = (asyncio.ensure_future(looked.check()) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        await second
        assert service.looks == 2 and first.cancelled()

    service = Slow()
    asyncio.run(scene())


def test_the_service_is_told_when_a_request_is_given_up_and_its_refusal_says_so() -> None:
    service = FakeService()
    assert draw(service).status_code == 200 and service.patience == [OPEN.timeout_s]
    refused = draw(FakeService(refusal=TooLong("this would take about 900 s", 900.0)))
    error = refused.json()["error"]
    assert refused.status_code == 429 and refused.headers["x-should-retry"] == "false"
    assert (error["code"], error["param"], error["possible_s"]) == ("deadline_unmet", None, 900.0)


def test_every_seed_that_is_answered_can_be_asked_for() -> None:
    last = 2**63 - 1
    refused = draw(seed=last, n=2).json()["error"]
    assert refused["param"] == "seed" and str(last - 1) in refused["message"]
    answer = draw(seed=last - 1, n=2).json()
    seeds = [image["seed"] for image in answer["data"]]
    assert seeds == [last - 1, last]
    assert all(draw(seed=seed).status_code == 200 for seed in seeds)


@pytest.mark.parametrize("size", ["64*64", "64", "64x", "0x64", "64X64", "-8x64", "big", "", "9" * 500])
def test_what_is_no_size_is_said_in_words(size: str) -> None:
    error = draw(size=size).json()["error"]
    assert error["param"] == "size" and "WIDTHxHEIGHT" in error["message"] and size[:20] in error["message"]
    assert not set("^$[]{}\\") & set(error["message"]) and len(error["message"]) < 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("output_format", "shown", "background"),
    [
        ("jpeg", (255, 255, 255), "opaque"),
        ("png", (0, 0, 0, 0), "transparent"),
        ("webp", None, "transparent"),
    ],
)
def test_a_picture_with_transparency_is_answered_in_every_format(
    output_format: str,
    shown: tuple[int, ...] | None,
    background: str,
    stream: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def transparent(request: GenerationRequest) -> GenerationResult:
        image = Image.new("RGBA", (request.width or 0, request.height or 0))
        return result_of(request).model_copy(update={"images": [image]})

    monkeypatch.setattr(fake, "result_of", transparent)
    answer = draw(output_format=output_format, stream=stream, size="64x64")
    assert answer.status_code == 200, answer.text
    told = json.loads(answer.text.split("data: ")[-1]) if stream else answer.json()
    drawn = told if stream else told["data"][0]
    assert told["background"] == background
    picture = Image.open(BytesIO(base64.b64decode(drawn["b64_json"])))
    assert shown is None or picture.getpixel((0, 0)) == shown


@pytest.mark.parametrize(
    ("pace_s", "steps"), [(0.18, 2), (0.02, 20)], ids=["no steps", "steps not asked for"]
)
def test_a_stream_in_which_nothing_is_told_is_kept_alive(
    pace_s: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "KEEP_ALIVE_S", 0.05)
    service = FakeService(pace_s=pace_s)
    answer = draw(service, stream=True, num_inference_steps=steps)
    *silence, told = [frame for frame in answer.text.split("\n\n") if frame]
    assert len(silence) >= 4 and set(silence) == {":"}
    assert told.startswith("event: image_generation.completed")
    assert service.ended == ["finished"]


@pytest.mark.parametrize("progress", [False, True])
def test_a_stream_is_kept_alive_while_the_first_host_starts(
    progress: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "KEEP_ALIVE_S", 0.02)
    service = FakeService(wakes_s=0.15)
    answer = draw(service, stream=True, num_inference_steps=1, progress=progress)
    first, *others = [frame for frame in answer.text.split("\n\n") if frame]
    assert answer.status_code == 200 and first == ":" and others.count(":") >= 3
    assert others[-1].startswith("event: image_generation.completed")
    assert service.ended == ["finished"]


@pytest.mark.parametrize(("wakes_s", "status"), [(0.0, 503), (0.15, 200)], ids=["at once", "late"])
def test_a_refusal_has_its_status_unless_the_stream_had_to_be_kept_alive(
    wakes_s: float, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "KEEP_ALIVE_S", 0.05)
    answer = draw(FakeService(refusal=NotEnoughDevices("none is up"), wakes_s=wakes_s), stream=True)
    told = answer.text.split("data: ")[-1]
    assert answer.status_code == status and json.loads(told)["error"]["code"] == "unavailable"
    assert answer.text.startswith(":\n\n") and "\n\nevent: error\n" in answer.text or not wakes_s


@pytest.mark.timeout(20)
@pytest.mark.parametrize("keep_alive_s", [60, 0.05], ids=["before", "after"])
def test_a_client_that_leaves_while_the_first_host_starts_cancels_its_image(
    keep_alive_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "KEEP_ALIVE_S", keep_alive_s)
    service = FakeService(wakes_s=60)
    with serving(service) as url:
        asked = {"prompt": "a lake", "stream": True}
        with (
            suppress(httpx.ReadTimeout),
            httpx.stream("POST", f"{url}{IMAGES}", json=asked, timeout=0.1) as response,
        ):
            assert next(response.iter_raw()) == b":\n\n"
        while service.ended != ["cancelled"]:
            time.sleep(0.01)
