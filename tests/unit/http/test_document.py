"""The OpenAPI document says what the service does, and says it of the models that it has."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import deployments.http
from deployments.http import HttpConfig, build_http
from deployments.http.errors import ANSWERS, ErrorResponse, refusal_of
from deployments.http.images import EditRequest
from deployments.http.openapi import sides_pattern
from distriray.errors import QueueFull
from distriray.requests import GenerationRequest
from distriray.service import ModelCard
from distriray.wire import CARRIED, PARAMS, Code
from tests.unit.conftest import serving
from tests.unit.http.conformance import schemathesis, schemathesis_of_forms
from tests.unit.http.fake import CARDS, LIMITS, FakeService

ROOT = Path(deployments.http.__file__).parents[2]
DOCS = ROOT / "docs" / "http.md"


@settings(max_examples=30)
@given(st.integers(1, 1200), st.integers(1, 3000), st.sampled_from([8, 16, 32]))
def test_the_pattern_of_sides_is_the_multiples_of_the_unit_between_the_limits(
    smallest: int, largest: int, unit: int
) -> None:
    if not range(-(-smallest // unit) * unit, largest + 1, unit):
        return
    pattern = re.compile(sides_pattern(smallest, largest, unit))
    matching = [side for side in range(3200) if pattern.fullmatch(str(side))]
    assert matching == [side for side in range(smallest, largest + 1) if side % unit == 0]


def test_the_document_has_the_limits_of_the_models() -> None:
    fields = build_http(FakeService(), HttpConfig()).openapi()["components"]["schemas"]["ImageRequest"][
        "properties"
    ]
    assert fields["prompt"]["maxLength"] == 4000
    assert fields["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 4}
    assert fields["model"]["anyOf"][0]["enum"] == [card.id for card in CARDS]
    size = re.compile(fields["size"]["anyOf"][0]["pattern"])
    assert size.match("256x64") and size.match("auto")
    assert not size.match("264x64") and not size.match("100x64")


def test_the_document_is_made_anew_when_the_models_have_changed_and_only_then() -> None:
    class Changing(FakeService):
        def models(self) -> list[ModelCard]:
            return list(cards)

    cards = [*CARDS]
    app = build_http(Changing(), HttpConfig())
    first = app.openapi()
    assert app.openapi() is first
    cards.append(CARDS[0].model_copy(update={"id": "third"}))
    fields = app.openapi()["components"]["schemas"]["ImageRequest"]["properties"]
    assert fields["model"]["anyOf"][0]["enum"] == [card.id for card in cards]


def test_the_document_has_no_validation_error_of_the_framework(http: httpx.Client) -> None:
    text = http.get("/openapi.json").text
    assert "HTTPValidationError" not in text and '"422"' not in text


def test_a_key_is_in_the_document_where_one_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEYS", "secret")
    for config, needed in [(HttpConfig(keys_env="SOME_KEYS"), True), (HttpConfig(keys_env="NO_KEYS"), False)]:
        paths = build_http(FakeService(), config).openapi()["paths"]
        assert ("security" in paths["/v1/images/generations"]["post"]) is needed
        assert "security" not in paths["/healthz"]["get"]


def test_pictures_are_files_in_a_form_and_data_urls_in_json_and_lists_of_a_form_are_json() -> None:
    document = build_http(FakeService(), HttpConfig()).openapi()
    content = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    names = {kind: body["schema"]["$ref"].rpartition("/")[2] for kind, body in content.items()}
    form, as_json = (
        document["components"]["schemas"][names[kind]] for kind in ("multipart/form-data", "application/json")
    )
    assert form["properties"]["image"]["format"] == "binary"
    assert as_json["properties"]["image"]["pattern"].startswith("^data:")
    assert form["properties"]["loras"]["contentMediaType"] == "application/json"
    assert form["properties"]["loras"]["contentSchema"] == as_json["properties"]["loras"]
    assert as_json["required"] == ["prompt", "image"]


@pytest.mark.parametrize(("request_of", "needed"), [("edits", ["prompt"]), ("variations", [])])
def test_a_form_has_one_image_or_several(request_of: str, needed: list[str]) -> None:
    def described() -> tuple[dict[str, Any], dict[str, Any]]:
        document = build_http(service, HttpConfig()).openapi()
        body = document["paths"][f"/v1/images/{request_of}"]["post"]["requestBody"]["content"]
        content = body["multipart/form-data"]
        return content, document["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]

    service = FakeService()
    content, form = described()
    assert form["properties"]["image[]"]["items"] == {"type": "string", "format": "binary"}
    assert form["properties"]["image[]"]["maxItems"] == 1 + LIMITS.max_references
    assert form["required"] == needed
    assert form["oneOf"] == [{"required": ["image"]}, {"required": ["image[]"]}]
    assert content["encoding"]["image[]"] == content["encoding"]["image"]
    cards = service.models()
    service.models = lambda: [card.model_copy(update={"lacks": {"references": "no"}}) for card in cards]  # type: ignore[method-assign]
    assert described()[1]["properties"]["image[]"]["maxItems"] == 1


def test_what_every_model_lacks_can_only_be_left_out() -> None:
    service = FakeService()
    cards = service.models()
    service.models = lambda: [card.model_copy(update={"lacks": {"prompt_3": "no"}}) for card in cards]  # type: ignore[method-assign]
    document = build_http(service, HttpConfig()).openapi()
    asked = document["components"]["schemas"]["ImageRequest"]["properties"]
    assert asked["prompt_3"]["anyOf"] == [{"type": "null"}] and len(asked["prompt_2"]["anyOf"]) == 2


def test_the_page_names_every_field() -> None:
    page = DOCS.read_text()
    for name in EditRequest.model_fields:
        assert f"`{name}`" in page, name


def test_the_page_has_every_code_with_its_status_and_whether_it_is_worth_a_retry() -> None:
    section = DOCS.read_text().split("\n## Errors\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (`.*?`) \| (.*) \| .*\|$", section, re.MULTILINE)
    documented = {
        code: (int(status), "Not retried" not in when)
        for status, names, when in rows
        for code in re.findall(r"`(\w+)`", names)
    }
    assert documented.keys() == {kind.code for kind in ANSWERS} | set(Code)
    for kind, answer in ANSWERS.items():
        assert documented[kind.code] == (answer.status, answer.retry), kind


def test_the_page_has_the_defaults_of_a_request() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \|([^|]*)\|$", DOCS.read_text(), re.MULTILINE))
    for name, field in GenerationRequest.model_fields.items():
        param = PARAMS.get(name, name)
        if name in CARRIED and param in rows and field.default not in (None, ()) and not field.is_required():
            shown = field.default if isinstance(field.default, str) else f"{field.default:g}"
            assert rows[param].strip(" `") == shown, name
    assert {*rows, *PARAMS} >= CARRIED


def test_an_error_that_crossed_ray_is_answered_as_the_original() -> None:
    class RayTaskError(QueueFull):
        """As Ray makes them: of both types, with the original in `cause` and a traceback as its text."""

        cause = QueueFull("8 requests wait", 5.0)

    refusal = refusal_of(RayTaskError("Traceback ... secret path"))
    assert (refusal.status, refusal.code, refusal.headers) == (429, "queue_full", {"Retry-After": "5"})
    assert str(refusal) == "8 requests wait"


def test_a_bug_is_answered_without_its_text(http: httpx.Client, service: FakeService) -> None:
    service.refusal = KeyError("secret")
    try:
        response = http.post("/v1/images/generations", json={"prompt": "a lake"})
    finally:
        service.refusal = None
    assert response.status_code == 500 and "secret" not in response.text
    assert ErrorResponse.model_validate(response.json()).error.code == "internal_error"


def test_a_bug_in_the_middle_of_a_stream_is_in_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    with serving(FakeService(failure=KeyError("secret"))) as url:
        body = {"prompt": "a lake", "stream": True, "partial_images": 1}
        response = httpx.post(f"{url}/v1/images/generations", json=body)
    assert '"code":"internal_error"' in response.text and "secret" not in response.text
    assert "secret" in caplog.text


def test_schemathesis_finds_no_violation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEYS", "secret")
    service = FakeService()
    with serving(service, HttpConfig(keys_env="SOME_KEYS")) as url:
        schemathesis(url, "secret", examples=20, folder=tmp_path)
        assert len(service.asked) > 10, "hardly a valid request was tried"
        before = len(service.asked)
        schemathesis_of_forms(url, "secret", examples=20, folder=tmp_path)
    drawn_on = service.asked[before:]
    assert len(drawn_on) > 10 and all(asked.image for asked in drawn_on), "hardly a valid form was tried"


def test_the_commands_of_the_page_run_as_printed(url: str, tmp_path: Path) -> None:
    commands = re.findall(r"```bash\n(.*?)```", DOCS.read_text(), re.DOTALL)
    printed = []
    for command in commands:
        here = command.replace("http://localhost:8000", url)
        assert here != command
        done = subprocess.run(
            ["bash", "-c", f"set -e -o pipefail\n{here}"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and not done.stderr, done
        printed.append(done.stdout)
    assert Image.open(tmp_path / "lake.png").size == (96, 64)
    drawn, streamed, refused, models, fleet, health, edited = printed
    assert edited.startswith('{"id":') and '"size":"96x64"' in edited
    assert '"seed": 1' in drawn and "predicted_wait_s" in fleet and health == '{"status":"ok"}'
    assert streamed.count("event: image_generation.partial_image") == 2 and "completed" in streamed
    assert "use 496 or 504" in refused and "builtin:landscapes" in models
