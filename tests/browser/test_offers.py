"""What the page shows where the service has more: adapters, pictures to start from, masks."""

from __future__ import annotations

import io
from email import message_from_bytes, policy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI, Request
from PIL import Image

from deployments.http import HttpConfig, build_http
from deployments.http.errors import Refusal
from distriray.service import Service
from tests.unit.http.fake import FakeService

from .conftest import Open
from .hands import REFUSED, draw, wait_for_count, wait_for_text

if TYPE_CHECKING:
    from playwright.sync_api import Route

pytestmark = pytest.mark.browser

LORAS = {
    "description": "Adapters and their scales.",
    "anyOf": [{"type": "array", "items": {"$ref": "#/components/schemas/LoraUse"}}, {"type": "null"}],
}
LORA = {"type": "object", "properties": {"name": {"type": "string"}, "scale": {"type": "number"}}}
EDITS = "/v1/images/edits"


def knows_more(service: Service, config: HttpConfig, taken: list[dict[str, bytes]]) -> FastAPI:
    """The service as it would be with adapters, and with pictures to start from, which `taken` collects."""
    app = build_http(service, config)
    plain = app.openapi

    def document() -> dict[str, Any]:
        told = plain()
        schemas = told["components"]["schemas"]
        schemas["ImageRequest"]["properties"]["loras"] = LORAS
        schemas["LoraUse"] = LORA
        fields = {**schemas["ImageRequest"]["properties"], "strength": {"type": "number", "maximum": 1}}
        schemas["Edit"] = {"type": "object", "properties": {**fields, "image": {}, "mask": {}}}
        body = {"content": {"multipart/form-data": {"schema": {"$ref": "#/components/schemas/Edit"}}}}
        told["paths"][EDITS] = {"post": {"requestBody": body}}
        return told

    @app.post(EDITS)
    async def edit(request: Request) -> None:
        head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
        parts = message_from_bytes(head + await request.body(), policy=policy.HTTP).iter_parts()
        taken.append(
            {
                str(part.get_param("name", header="Content-Disposition")): bytes(
                    part.get_payload(decode=True)
                )
                for part in parts
            }
        )
        raise Refusal(400, "invalid_value", "image is too small; use 64x64", "image")

    app.openapi = document  # type: ignore[method-assign]
    return app


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, bytes]]:
    found: list[dict[str, bytes]] = []
    monkeypatch.setattr(
        "tests.unit.conftest.build_http", lambda service, config: knows_more(service, config, found)
    )
    return found


def test_adapters_are_there_where_the_service_has_them(open_page: Open, taken: object, url: str) -> None:
    def models(route: Route) -> None:
        told = route.fetch().json()
        for card in told["data"]:
            card["loras"] = [{"name": "ink"}, {"name": "neon"}]
        route.fulfill(json=told)

    page = open_page(url, allowed=REFUSED)
    page.route("**/v1/models", models)
    page.reload()
    page.click("text=More settings")
    page.click("#f-loras")
    page.select_option(".row select", label="neon")
    page.fill(".row input", "0.8")
    with page.expect_request("**/v1/images/generations") as asked:
        draw(page)
    assert asked.value.post_data_json["loras"] == [{"name": "neon", "scale": 0.8}]
    wait_for_text(page, "#f-loras-error", "there is no field 'loras'")


def test_a_picture_and_a_painted_mask_are_sent_as_a_form(
    open_page: Open, taken: list[dict[str, bytes]], url: str, tmp_path: Path
) -> None:
    Image.new("RGB", (80, 40), (90, 90, 90)).save(tmp_path / "grey.png")
    page = open_page(url, allowed=REFUSED)
    page.set_input_files("#f-image", str(tmp_path / "grey.png"))
    page.wait_for_selector("#f-mask", state="visible")
    page.focus("#f-mask")
    for key in ("Space", "Shift+ArrowRight", "Shift+ArrowRight"):
        page.keyboard.press(key)
    page.click("text=More settings")
    draw(page, strength="0.6", seed="3")
    wait_for_text(page, "#f-image-error", "image is too small")
    (form,) = taken
    assert {name: form[name] for name in ("prompt", "strength", "seed", "stream", "partial_images")} == {
        "prompt": b"a lake", "strength": b"0.6", "seed": b"3", "stream": b"true", "partial_images": b"3"
    }  # fmt: skip
    assert form["image"] == (tmp_path / "grey.png").read_bytes()
    mask = Image.open(io.BytesIO(form["mask"]))
    assert mask.size == (80, 40) and mask.mode == "RGBA"
    assert mask.getchannel("A").getpixel((40, 20)) == 0 and mask.getchannel("A").getpixel((2, 2)) == 255


def test_what_was_drawn_can_be_started_from(
    open_page: Open, taken: list[dict[str, bytes]], url: str, service: FakeService
) -> None:
    page = open_page(url, allowed=REFUSED)
    draw(page, num_inference_steps="3")
    page.wait_for_selector(".facts")
    page.click("text=Start from this")
    page.wait_for_selector("#f-mask", state="visible")
    page.click("#submit")
    wait_for_text(page, "#f-image-error", "image is too small")
    (form,) = taken
    assert form["image"].startswith(b"\x89PNG") and "mask" not in form
    page.click("button:text-is('No picture')")
    page.click("#submit")
    wait_for_count(page, ".strip [data-state=done]", 2)


def test_there_is_no_picture_to_start_from_where_the_service_takes_none(open_page: Open, url: str) -> None:
    page = open_page(url)
    page.wait_for_selector("#submit:enabled")
    assert page.is_hidden("#picture") and page.locator("#f-loras").count() == 0
