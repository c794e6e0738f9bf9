"""A client that leaves, and a request that takes too long, free their gang."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable

import httpx
import pytest

from deployments.http import HttpConfig
from distriray.wire import EDITS
from tests.unit.conftest import LOG, serving
from tests.unit.http.fake import FakeService
from tests.unit.http.malformed import IMAGES

SLOW = {"prompt": "a lake", "num_inference_steps": 50}


def until(claim: Callable[[], bool]) -> None:
    """Wait for `claim`; a test's own timeout is what fails it."""
    while not claim():
        time.sleep(0.01)


@pytest.mark.timeout(20)
def test_a_client_that_leaves_cancels_its_image(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOG)
    service = FakeService(pace_s=60)
    with serving(service) as url:
        with httpx.Client(base_url=url, timeout=0.3) as client, pytest.raises(httpx.ReadTimeout):
            client.post(IMAGES, json=SLOW)
        until(lambda: service.ended == ["cancelled"])
        until(lambda: "code=client_left" in caplog.text)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("progress", [True, False])
def test_a_client_that_leaves_its_stream_cancels_its_image(
    progress: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOG)
    service = FakeService(pace_s=0.05 if progress else 60)
    with serving(service) as url, httpx.Client(base_url=url) as client:
        with client.stream("POST", IMAGES, json={**SLOW, "stream": True, "progress": progress}) as response:
            assert response.status_code == 200
            if progress:
                assert "queued" in next(response.iter_text())
        until(lambda: service.ended == ["cancelled"])
        until(lambda: "code=client_left" in caplog.text)
    assert "failed" not in caplog.text


@pytest.mark.timeout(20)
@pytest.mark.parametrize("stream", [True, False])
def test_what_takes_longer_than_the_timeout_is_cancelled_and_said_so(stream: bool) -> None:
    service = FakeService(pace_s=60)
    config = HttpConfig(keys_env="NO_SUCH_VARIABLE", timeout_s=0.2)
    with serving(service, config) as url:
        response = httpx.post(f"{url}{IMAGES}", json={**SLOW, "stream": stream})
        assert response.status_code == (200 if stream else 503)
        assert '"code":"timeout"' in response.text.replace(": ", ":")
        assert service.ended == ["cancelled"]


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("path", "kind"), [(IMAGES, "application/json"), (EDITS, "multipart/form-data; boundary=x")]
)
def test_a_body_that_does_not_come_is_given_up_too(path: str, kind: str) -> None:
    config = HttpConfig(keys_env="NO_SUCH_VARIABLE", timeout_s=0.3)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 9\r\n\r\n"
    with serving(FakeService(), config) as url:
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port)) as client:
            client.sendall(head.encode())
            answer = client.recv(1000).decode()
    assert answer.startswith("HTTP/1.1 503") and "x-should-retry: false" in answer


@pytest.mark.timeout(20)
def test_others_are_served_while_one_waits() -> None:
    with (
        serving(FakeService(pace_s=0.02)) as url,
        httpx.stream("POST", f"{url}{IMAGES}", json={**SLOW, "stream": True}) as slow,
    ):
        quick = httpx.post(f"{url}{IMAGES}", json={"prompt": "a hill", "num_inference_steps": 1})
        assert quick.status_code == 200
        assert b"completed" in slow.read()
