"""Keys open the service; without keys it is open to this machine alone."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import httpx
import openai
import pytest
from PIL import Image

from deployments.http import HttpConfig, build_http
from distriray.errors import NotEnoughDevices
from distriray.picture import png
from distriray.wire import EDITS
from tests.unit.conftest import LOG, serving
from tests.unit.http.fake import FakeService
from tests.unit.http.malformed import IMAGES

GUARDED = ["/v1/models", "/v1/models/builtin:landscapes", "/v1/fleet"]
NO_KEYS = HttpConfig(keys_env="NO_SUCH_VARIABLE")


def get(
    config: HttpConfig,
    path: str,
    client: str = "127.0.0.1",
    host: str = "localhost:8000",
    service: FakeService | None = None,
    headers: dict[str, str] | None = None,
) -> httpx.Response:
    """What a client at the address `client` is answered."""

    raw = {name.encode(): text.encode() for name, text in (headers or {}).items()}

    async def ask() -> httpx.Response:
        app = build_http(service or FakeService(), config)
        transport = httpx.ASGITransport(app, client=(client, 50000))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as http:
            return await http.get(path, headers=raw)

    return asyncio.run(ask())


def test_the_openai_client_is_let_in_with_its_key_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEYS", "first, second")
    with serving(FakeService(), HttpConfig(keys_env="SOME_KEYS")) as url:
        for key in ("first", "second"):
            assert openai.OpenAI(base_url=f"{url}/v1", api_key=key).images.generate(prompt="a lake").data
        for key in ("third", "first,", "FIRST", "first, second"):
            with pytest.raises(openai.AuthenticationError) as refused:
                openai.OpenAI(base_url=f"{url}/v1", api_key=key).images.generate(prompt="a lake")
            assert refused.value.code == "invalid_api_key"
        assert httpx.post(f"{url}{IMAGES}", json={"prompt": "a"}).json()["error"]["code"] == "missing_api_key"


def test_keys_come_from_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nin-file\n\n  schlüssel  \n")
    monkeypatch.setenv("SOME_KEYS", "in-variable")
    config = HttpConfig(keys_env="SOME_KEYS", keys_file=file)
    for key in ("in-file", "in-variable", "schlüssel"):
        assert get(config, "/v1/models", headers={"Authorization": f"Bearer {key}"}).is_success
    assert get(config, "/v1/models", headers={"Authorization": "Bearer # of the team"}).status_code == 401
    assert get(config, "/v1/models", headers={"Authorization": "Basic in-file"}).status_code == 401


def test_a_mark_of_utf8_at_the_begin_of_a_file_belongs_to_no_line(tmp_path: Path) -> None:
    for text, keys in (("first\r\nsecond\r\n", ["first", "second"]), ("# a comment\r\nfirst", ["first"])):
        (tmp_path / "keys").write_text(text, encoding="utf-8-sig")  # as editors on Windows write it
        assert HttpConfig(keys_env="NO_SUCH_VARIABLE", keys_file=tmp_path / "keys").keys() == keys


def test_a_file_without_keys_does_not_open_the_service(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none yet\n")
    with pytest.raises(ValueError, match="holds no key"):
        build_http(FakeService(), HttpConfig(keys_file=tmp_path / "keys"))
    with pytest.raises(FileNotFoundError):
        build_http(FakeService(), HttpConfig(keys_file=tmp_path / "missing"))


@pytest.mark.parametrize("path", GUARDED)
def test_without_keys_this_machine_is_served(path: str) -> None:
    for client, host in [
        ("127.0.0.1", "localhost:8000"),
        ("::1", "[::1]:8000"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
    ]:
        assert get(NO_KEYS, path, client=client, host=host).is_success


@pytest.mark.parametrize(
    ("client", "host", "headers", "says"),
    [
        ("192.168.1.7", "localhost:8000", {}, "192.168.1.7 is another machine"),
        ("2001:db8::1", "localhost:8000", {}, "2001:db8::1 is another machine"),
        ("", "localhost:8000", {}, "an unknown address"),
        ("127.0.0.1", "gpu.example:8000", {}, "gpu.example"),
        ("127.0.0.1", "localhost.example", {}, "localhost.example"),
        ("127.0.0.1", "localhost:8000", {"X-Forwarded-For": "127.0.0.1"}, "proxy"),
        ("127.0.0.1", "localhost:8000", {"Forwarded": "for=1.2.3.4"}, "proxy"),
        ("127.0.0.1", "localhost:8000", {"Origin": "https://evil.example"}, "a page of https://evil.example"),
        ("127.0.0.1", "localhost:8000", {"Origin": "http://localhost.evil.example:8000"}, "a page of"),
        ("127.0.0.1", "localhost:8000", {"Origin": "null"}, "a page of null"),
    ],
)
def test_without_keys_others_are_told_what_to_set(
    client: str, host: str, headers: dict[str, str], says: str
) -> None:
    for path in GUARDED:
        response = get(NO_KEYS, path, client=client, host=host, headers=headers)
        error = response.json()["error"]
        assert response.status_code == 401 and error["code"] == "keys_not_configured"
        assert says in error["message"] and "NO_SUCH_VARIABLE" in error["message"]


def test_without_keys_pages_elsewhere_have_no_form_drawn() -> None:
    service, form = (
        FakeService(),
        {"data": {"prompt": "a lake"}, "files": {"image": png(Image.new("RGB", (64, 64)))}},
    )
    with serving(service, NO_KEYS) as url:
        foreign = httpx.post(f"{url}{EDITS}", **form, headers={"Origin": "https://evil.example"})
        assert foreign.status_code == 401 and not service.asked
        assert httpx.post(f"{url}{EDITS}", **form, headers={"Origin": url}).is_success


def test_without_keys_pages_that_may_ask_are_answered() -> None:
    for origins, origin in [
        ((), "http://localhost:8000"),
        ((), "http://127.0.0.1:3000"),
        ((), "http://[::1]:8000"),
        (("https://pictures.example.org",), "https://pictures.example.org"),
        (("*",), "null"),
    ]:
        config = NO_KEYS.model_copy(update={"cors_origins": origins})
        assert get(config, "/v1/models", headers={"Origin": origin}).is_success


def test_health_and_documentation_need_no_key() -> None:
    for path in ("/healthz", "/docs", "/openapi.json"):
        assert get(NO_KEYS, path, client="192.168.1.7", host="pod-3").is_success
    ill = FakeService(illness=NotEnoughDevices("no host is up"))
    response = get(NO_KEYS, "/healthz", service=ill)
    assert response.status_code == 503
    assert response.json()["error"] == {
        "message": "no host is up",
        "type": "server_error",
        "param": None,
        "code": "unavailable",
    }


def test_the_log_has_the_id_that_the_client_has_and_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOG)
    service = FakeService()
    with serving(service, NO_KEYS) as url:
        response = httpx.post(f"{url}{IMAGES}", json={"prompt": "a secret lake", "user": "me\nroot"})
        refused = httpx.post(f"{url}{IMAGES}", json={"prompt": "a secret lake", "n": 0})
    lines = [record.getMessage() for record in caplog.records if record.name == LOG]
    for line, answer in zip(lines, (response, refused), strict=True):
        assert f"request_id={answer.headers['X-Request-ID']}" in line
        assert f"status={answer.status_code}" in line and "secret" not in line
    assert r"user='me\nroot'" in lines[0] and "code=invalid_value" in lines[1]
    assert service.asked[0].id.startswith(response.headers["X-Request-ID"])
    assert response.json()["id"] == service.asked[0].id


def test_prompts_are_logged_where_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOG)
    with serving(FakeService(), NO_KEYS.model_copy(update={"log_prompts": True})) as url:
        httpx.post(f"{url}{IMAGES}", json={"prompt": "a lake"}, headers={"X-Request-ID": "mine"})
    assert "prompt='a lake'" in caplog.text and "request_id=mine" in caplog.text


def test_two_requests_of_one_id_are_told_apart() -> None:
    service = FakeService()
    with serving(service, NO_KEYS) as url:
        for _ in range(2):
            assert httpx.post(
                f"{url}{IMAGES}", json={"prompt": "a"}, headers={"X-Request-ID": "mine"}
            ).is_success
    first, second = (request.id for request in service.asked)
    assert first != second and first.startswith("mine-") and second.startswith("mine-")
