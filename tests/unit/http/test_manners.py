"""What clients of HTTP expect besides pictures: other origins, OPTIONS, slashes, calling a request off."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from deployments.http import HttpConfig
from deployments.http.ids import is_of, new_id
from distriray import Client
from distriray.events import Queued
from tests.unit.conftest import serving
from tests.unit.http.fake import FakeService
from tests.unit.http.malformed import EDITS, IMAGES, picture

PAGE = "https://pictures.example.org"


def preflight(url: str, origin: str, method: str = "POST") -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    return httpx.options(f"{url}{IMAGES}", headers=headers)


def test_pages_of_the_origins_that_are_given_may_ask_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEYS", "secret")
    config = HttpConfig(keys_env="SOME_KEYS", cors_origins=(PAGE,))
    key = {"Authorization": "Bearer secret"}
    with serving(FakeService(), config) as url:
        allowed = preflight(url, PAGE)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == PAGE
        assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
        assert preflight(url, PAGE, "DELETE").status_code == 200
        for other in ("https://evil.example.org", "null", f"{PAGE}.evil.org", "http://pictures.example.org"):
            assert "access-control-allow-origin" not in preflight(url, other).headers
        for body, status in (({"prompt": "a lake"}, 200), ({}, 400)):
            answer = httpx.post(f"{url}{IMAGES}", json=body, headers={**key, "Origin": PAGE})
            assert answer.status_code == status and answer.headers["access-control-allow-origin"] == PAGE
            assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
        refused = httpx.post(f"{url}{IMAGES}", json={"prompt": "a"}, headers={"Origin": PAGE})
        assert refused.status_code == 401, "an origin is no key"


def test_without_origins_no_page_of_another_may_ask(url: str) -> None:
    answer = httpx.post(f"{url}{IMAGES}", json={"prompt": "a lake"}, headers={"Origin": PAGE})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert not [name for name in preflight(url, PAGE).headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "origin", ["pictures.example.org", "https://a.org/path", "https://", "ftp://a.org", ""]
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValidationError):
        HttpConfig(cors_origins=(origin,))


@pytest.mark.parametrize(
    ("path", "methods"),
    [(IMAGES, "POST, OPTIONS"), (EDITS, "POST, OPTIONS"), ("/v1/models", "GET, HEAD, OPTIONS")],
)
def test_options_says_what_a_path_takes(url: str, path: str, methods: str) -> None:
    answer = httpx.options(f"{url}{path}")
    assert (answer.status_code, answer.headers["allow"], answer.content) == (204, methods, b"")
    assert httpx.options(f"{url}/nothing").status_code == 404


def test_a_slash_at_the_end_of_a_path_means_nothing(url: str) -> None:
    for path in ("/v1/models", "/v1/models/some/other", "/healthz", "/openapi.json"):
        with_slash = httpx.get(f"{url}{path}/")
        assert with_slash.status_code == 200 and with_slash.content == httpx.get(f"{url}{path}").content
    assert httpx.post(f"{url}{IMAGES}/", json={"prompt": "a lake"}).status_code == 200
    form: dict[str, Any] = {"data": {"prompt": "a lake"}, "files": {"image": picture()}}
    assert httpx.post(f"{url}{EDITS}/", **form).status_code == 200
    assert httpx.get(f"{url}/v1/models//").status_code == 404 == httpx.get(f"{url}//").status_code


def test_names_are_their_owners_alone() -> None:
    names = {new_id("mine", b"me") for _ in range(1000)}
    assert len(names) == 1000
    for name in list(names)[:50]:
        assert name.startswith("mine-") and is_of(name, b"me")
        assert not is_of(name, b"you") and not is_of(name, b"") and not is_of(f"x{name}", b"me")
        assert not is_of(name[:-1], b"me") and not is_of(name.replace("mine", "mime"), b"me")
    assert not is_of("", b"me") and not is_of("é" * 40, b"me")


def test_a_request_is_cancelled_by_its_id_with_the_key_that_asked_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_KEYS", "mine, theirs")
    service = FakeService(pace_s=0.2)
    with serving(service, HttpConfig(keys_env="SOME_KEYS")) as url, Client(url, "mine") as client:
        seen: list[str] = []

        def watch() -> None:
            for event in client.stream("a lake", num_inference_steps=10):
                if isinstance(event, Queued):
                    seen.append(event.request_id)

        watching = threading.Thread(target=watch)
        watching.start()
        while not seen:
            time.sleep(0.01)
        (name,) = seen
        with Client(url, "theirs") as others:
            assert not others.cancel(name) and not service.cancelled
        assert httpx.delete(f"{url}{IMAGES}/{name}").status_code == 401
        key = {"Authorization": "Bearer mine"}
        answer = httpx.delete(f"{url}{IMAGES}/{name}", headers=key)
        assert answer.status_code == 200 and answer.json() == {"id": name, "cancelled": True}
        assert service.cancelled == [name] and client.cancel(name)
        watching.join()
        assert not client.cancel(name), "it is over"
        for unknown in ("nothing", name[:-1] + "?", "x" * 300, "%00"):
            refused = httpx.delete(f"{url}{IMAGES}/{unknown}", headers=key)
            assert refused.status_code == 404 and refused.json()["error"]["code"] == "request_not_found"
        assert service.cancelled == [name] * 3
