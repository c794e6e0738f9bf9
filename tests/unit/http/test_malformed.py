"""Whatever is sent, the answer is an error object and the service goes on."""

from __future__ import annotations

import gc
import tempfile
import tracemalloc
from typing import Any

import httpx
import pytest

from deployments.http import HttpConfig
from deployments.http.errors import ErrorResponse
from tests.unit.conftest import serving
from tests.unit.http.fake import FakeService
from tests.unit.http.malformed import (
    BOUNDARY,
    EDITS,
    IMAGES,
    MOST,
    Malformed,
    form,
    malformed,
    malformed_forms,
    picture,
)


def test_five_hundred_malformed_requests_are_each_refused_with_the_error_object(
    http: httpx.Client, service: FakeService
) -> None:
    for number, request in enumerate(malformed(seed=6, count=500)):
        response = request.send(http)
        assert response.status_code == request.status, (number, request, response.text)
        if request.method != "HEAD":
            error = ErrorResponse.model_validate(response.json()).error
            assert error.message and error.code and error.type == "invalid_request_error"
            assert len(response.content) < 2000
    assert not service.asked
    assert http.post(IMAGES, json={"prompt": "a lake"}).status_code == 200


def no_file(*_: Any, **__: Any) -> Any:
    raise AssertionError("a form is written to a disk")


def test_two_hundred_malformed_forms_are_each_refused_and_leave_neither_files_nor_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for opens in ("TemporaryFile", "NamedTemporaryFile", "mkstemp", "mkdtemp"):
        monkeypatch.setattr(tempfile, opens, no_file)
    service, sent, kept = FakeService(), 0, 0
    config = HttpConfig(keys_env="NO_SUCH_VARIABLE", max_upload_bytes=MOST)
    tracemalloc.start()
    with serving(service, config) as url, httpx.Client(base_url=url, timeout=60) as http:
        for number, request in enumerate(malformed_forms(seed=7, count=300)):
            response = request.send(http)
            assert response.status_code == request.status, (number, response.text, request.content[:300])
            error = ErrorResponse.model_validate(response.json()).error
            assert error.message and error.code and error.type == "invalid_request_error"
            assert len(response.content) < 2000
            sent += len(b"".join(request.content) if isinstance(request.content, list) else request.content)
            if number == 40:
                kept = held()
        del request, response
        assert held() < kept + 2**21, "what was sent is kept"
        assert not service.asked and sent > 150 * 2**20
        large = picture((1000, 900), compress_level=0)
        fields = {"prompt": "a lake", "size": "96x64"}
        assert http.post(EDITS, data=fields, files={"image": large}).status_code == 200
        assert service.asked[-1].image is not None and service.asked[-1].image.data == large
        assert len(large) > 2**21
    tracemalloc.stop()


def test_json_that_is_longer_than_a_form_may_be_is_not_read() -> None:
    config = HttpConfig(keys_env="NO_SUCH_VARIABLE", max_upload_bytes=300_000)
    body = b'{"prompt": "' + b"a" * 300_000 + b'"}'
    with serving(FakeService(), config) as url, httpx.Client(base_url=url, timeout=60) as http:
        for content in (body, [body[:65536], body[65536:]]):
            answer = Malformed(content, 413).send(http)
            assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


def test_a_text_in_a_form_that_is_longer_than_one_may_be_is_too_large() -> None:
    config = HttpConfig(keys_env="NO_SUCH_VARIABLE", max_body_bytes=1000)
    with serving(FakeService(), config) as url, httpx.Client(base_url=url, timeout=60) as http:
        answer = http.post(EDITS, data={"prompt": "a" * 1001}, files={"image": picture()})
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
    assert "1000 bytes" in answer.json()["error"]["message"]


def test_a_mark_of_utf8_before_json_is_no_part_of_it(http: httpx.Client, service: FakeService) -> None:
    for body, status in ((b'{"prompt": "a lake"}', 200), (b"\xef\xbb\xbf", 400), (b"", 400)):
        answer = Malformed(b"\xef\xbb\xbf" + body).send(http)
        assert answer.status_code == status, answer.text
    assert service.asked[-1].prompt == "a lake"


@pytest.mark.parametrize("charset", ["punycode", "unicode_escape", "zlib", "utf-8"])
def test_a_form_is_read_as_utf8_whatever_its_charset(
    charset: str, http: httpx.Client, service: FakeService
) -> None:
    text = "-é \\ud800"
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}; charset={charset}"}
    answer = http.post(EDITS, content=form(("image", picture()), ("prompt", text)), headers=headers)
    assert answer.status_code == 200 and service.asked[-1].prompt == text
    answer = http.post(EDITS, content=form((text, ""), (text, "")), headers=headers)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == text


@pytest.mark.parametrize("charset", ["latin-1", "gbk", "utf-16"])
def test_a_text_that_is_no_utf8_is_refused_by_its_field(
    charset: str, http: httpx.Client, service: FakeService
) -> None:
    text, asked = "湖" if charset == "gbk" else "été", len(service.asked)
    part = form(("image", picture()), ("prompt", text)).replace(text.encode(), text.encode(charset))
    headers = {"Content-Type": f'multipart/form-data; boundary="{BOUNDARY}"; charset={charset}'}
    answer = http.post(EDITS, content=part, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["message"]) == (400, "prompt", "prompt is no UTF-8")
    assert len(service.asked) == asked


def held() -> int:
    """Bytes of everything that is there."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize("values", ['"loras": [1{}]', '"references": [{{"image": ""}}{}]', '"seed": 1{}'])
def test_a_body_of_very_many_values_is_refused_before_each_is_found_wrong(
    values: str, http: httpx.Client
) -> None:
    more = (',{"image": ""}' if "image" in values else ",1") * 20_000
    if values.startswith('"seed"'):
        more = "".join(f', "field{number}": 1' for number in range(20_000))
    body = f'{{"prompt": "a lake", {values.format(more)}}}'
    answer = http.post(IMAGES, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json"
    assert "over 10000 commas" in answer.json()["error"]["message"]
