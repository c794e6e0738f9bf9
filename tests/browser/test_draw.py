"""The view to draw on, in a browser, before a service that draws grey pictures."""

from __future__ import annotations

import io
import re
from email import message_from_bytes, policy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI, Request
from PIL import Image

from deployments.http import HttpConfig, build_http
from deployments.http.errors import Refusal
from distriray.errors import GangBroken, QueueFull
from distriray.events import Event, Regrouped, Repaired, Started, Step
from distriray.service import Service
from tests.unit.http.fake import FakeService

from .conftest import Open, Serve

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

pytestmark = pytest.mark.browser

REFUSED = ("status of 4", "status of 5")


def draw(page: Page, prompt: str = "a lake", **fields: str) -> None:
    page.fill("#f-prompt", prompt)
    for name, value in fields.items():
        page.fill(f"#f-{name}", value)
    page.click("#submit:enabled")


def wait_for_text(page: Page, selector: str, pattern: str, seconds: float = 20.0) -> None:
    from playwright.sync_api import expect

    text = re.compile(pattern, re.DOTALL)
    expect(page.locator(selector).first).to_have_text(text, timeout=1e3 * seconds)


def wait_for_count(page: Page, selector: str, count: int) -> None:
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_count(count, timeout=20_000)


def test_a_prompt_becomes_a_picture_with_previews_on_the_way(
    open_page: Open, url: str, service: FakeService
) -> None:
    page = open_page(url)
    draw(page, "a lake at dusk", num_inference_steps="40", guidance_scale="2.5")
    page.wait_for_selector(".frame.preview img")
    wait_for_text(page, ".status", r"Step \d+ of 40 · gang of 2")
    assert int(page.get_attribute(".progress", "aria-valuenow") or 0) > 0
    assert page.locator(".gang .cell").all_text_contents() == ["0", "1"]
    page.wait_for_selector(".facts")
    assert page.get_attribute(".frame img", "alt") == "a lake at dusk"
    (asked,) = service.asked
    assert (asked.num_inference_steps, asked.guidance_scale, asked.previews) == (40, 2.5, 3)
    assert asked.gang_size == "auto" and asked.seed is None
    assert "96 × 64" in page.inner_text(".facts") and page.locator(".strip li").count() == 1
    with page.expect_download() as download:
        page.click("text=Download")
    assert re.fullmatch(r"a-lake-at-dusk-\d+\.png", download.value.suggested_filename)
    assert page.inner_text("#told").startswith("The picture is finished")


def test_every_control_reaches_the_service(open_page: Open, url: str, service: FakeService) -> None:
    page = open_page(url)
    page.wait_for_selector("#f-seed")
    page.fill("#f-size", "64")
    page.fill("#f-size-height", "128")
    page.click("text=More settings")
    page.select_option("#f-scheduler", label="heun")
    page.select_option("#f-exchange", label="displaced")
    page.fill("#f-clip_skip", "1")
    page.fill("#f-deadline_s", "90.5")
    page.check("input[name=gang][value='2']", force=True)
    page.select_option("#f-model", "builtin:landscapes")
    draw(page, seed="7", negative_prompt="fog", num_inference_steps="4")
    page.wait_for_selector(".facts")
    (asked,) = service.asked
    told = {name: getattr(asked, name) for name in ("width", "height", "seed", "scheduler", "exchange")}
    assert told == {"width": 64, "height": 128, "seed": 7, "scheduler": "heun", "exchange": "displaced"}
    assert (asked.clip_skip, asked.deadline_s, asked.gang_size) == (1, 90.5, 2)
    assert asked.negative_prompt == "fog"


def test_an_error_is_the_services_sentence_beside_the_field_it_names(open_page: Open, url: str) -> None:
    page = open_page(url, allowed=REFUSED)
    page.wait_for_selector("#f-size")
    page.fill("#f-size", "100")
    page.fill("#f-size-height", "64")
    draw(page)
    wait_for_text(page, "#f-size-error", "width 100 is not a multiple of 8; use 96 or 104")
    assert page.get_attribute("#f-size", "aria-invalid") == "true"
    assert page.evaluate("document.activeElement.id") == "f-size"
    page.fill("#f-size", "96")
    page.click("text=More settings")
    page.fill("#f-clip_skip", "99")
    page.click("text=More settings")
    draw(page)
    wait_for_text(page, "#f-clip_skip-error", "clip_skip 99 is above the limit of 11")
    assert page.is_visible("#f-clip_skip") and page.inner_text("#f-size-error") == ""
    page.fill("#f-clip_skip", "")
    draw(page, prompt="")
    wait_for_text(page, "#f-prompt-error", "prompt")


def test_what_is_no_value_is_said_before_anything_is_asked(
    open_page: Open, url: str, service: FakeService
) -> None:
    page = open_page(url)
    page.wait_for_selector("#f-seed")
    draw(page, seed="a lot")
    wait_for_text(page, "#f-seed-error", "whole number")
    draw(page, seed="9223372036854775807")
    wait_for_text(page, "#f-seed-error", "up to 9007199254740991")
    assert not service.asked


@pytest.mark.parametrize(
    "error", [QueueFull("every queue is full; try again in 3.0 s", 3.0), GangBroken("3 gangs broke under it")]
)
def test_an_error_of_the_whole_request_is_said_on_the_stage(
    open_page: Open, serve: Serve, error: Exception
) -> None:
    url = serve(FakeService(refusal=error))
    page = open_page(url, allowed=REFUSED)
    draw(page)
    wait_for_text(page, "#stage-error", str(error))
    assert page.locator(".strip [data-state=failed]").count() == 1


def test_a_stream_that_fails_half_way_keeps_its_preview(open_page: Open, serve: Serve) -> None:
    url = serve(FakeService(failure=GangBroken("3 gangs broke under it"), pace_s=0.02))
    page = open_page(url)
    draw(page)
    wait_for_text(page, "#stage-error", "3 gangs broke")
    assert page.is_visible(".frame img") and page.is_hidden("#cancel")


def test_cancel_ends_the_request_at_the_service(open_page: Open, url: str, service: FakeService) -> None:
    page = open_page(url)
    draw(page, num_inference_steps="50")
    wait_for_text(page, ".status", "Step")
    page.click("#cancel")
    wait_for_text(page, ".status", r"Cancelled at step \d+")
    for _ in range(100):
        if service.ended:
            break
        page.wait_for_timeout(50)
    assert service.ended == ["cancelled"]
    assert page.locator(".strip [data-state=cancelled]").count() == 1


def test_a_regrouping_and_a_repair_are_seen_on_the_way(open_page: Open, serve: Serve) -> None:
    class Broken(FakeService):
        async def stream(self, request: Any, give_up_s: float | None = None) -> Any:
            async for event in super().stream(request, give_up_s):
                yield event
                if isinstance(event, Started):
                    changes: list[Event] = [
                        Step(request.id, 3, 25, 2, 0.1),
                        Repaired(request.id, (1,), 2),
                        Regrouped(request.id, (2, 3), 2),
                    ]
                    for change in changes:
                        yield change

    url = serve(Broken(pace_s=0.05))
    page = open_page(url)
    draw(page)
    wait_for_text(page, ".status", "gang of 2.*regrouped")
    assert page.locator(".progress .mark.repaired").count() == 1
    page.wait_for_selector(".facts")
    wait_for_text(page, ".status", "Worker 1 died|worker 1 died")


def test_again_with_another_seed_or_with_one_change(open_page: Open, url: str, service: FakeService) -> None:
    page = open_page(url)
    draw(page, "a hill", num_inference_steps="3")
    page.wait_for_selector(".facts")
    page.click("text=Another seed")
    wait_for_count(page, ".strip [data-state=done]", 2)
    page.fill("#f-prompt", "something else")
    page.fill("#f-num_inference_steps", "9")
    page.locator(".strip button").last.click()
    page.click("text=Change one thing")
    page.fill("#f-guidance_scale", "3")
    page.click("#submit")
    wait_for_count(page, ".strip [data-state=done]", 3)
    first, second, third = service.asked
    seed = int(page.inner_text(".facts dd >> nth=0"))
    assert second.prompt == "a hill" and second.seed is None and second.num_inference_steps == 3
    assert third.model_dump(exclude={"id", "seed", "guidance_scale"}) == first.model_dump(
        exclude={"id", "seed", "guidance_scale"}
    )
    assert third.seed == seed and third.guidance_scale == 3


def test_a_few_at_once_and_no_more(open_page: Open, service: FakeService, url: str) -> None:
    service.pace_s = 0.1
    page = open_page(url)
    for number in range(4):
        draw(page, f"lake {number}")
    draw(page, "one too many")
    wait_for_text(page, "#submit-error", "4 pictures are under way")
    wait_for_count(page, ".strip [data-state=done]", 4)
    assert len(service.asked) == 4


def test_it_is_all_done_by_keys(open_page: Open, url: str, service: FakeService) -> None:
    page = open_page(url)
    page.wait_for_selector("#submit:enabled")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.focus("#f-prompt")
    page.keyboard.type("a lake by keys")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".facts")
    page.focus("#to-watch")
    page.keyboard.press("Enter")
    page.wait_for_selector("#watch", state="visible")
    assert page.is_hidden("#draw")
    assert service.asked[0].prompt == "a lake by keys"


def test_every_control_has_a_name(open_page: Open, url: str) -> None:
    page = open_page(url)
    page.wait_for_selector("#submit:enabled")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('input, select, textarea, button, a, img, canvas')]
            .filter((e) => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim()
              || e.getAttribute('alt') !== null)).map((e) => e.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(open_page: Open, url: str, scheme: str) -> None:
    page = open_page(url, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    draw(page)
    page.wait_for_selector(".facts")
    for view in ("draw", "watch"):
        page.click(f"#to-{view}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_key_is_asked_for_once_and_kept_in_the_tab(
    open_page: Open, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEYS", "secret")
    url = serve(FakeService(), HttpConfig(keys_env="SOME_KEYS"))
    page = open_page(url, allowed=REFUSED)
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    wait_for_text(page, "#key-reason", "this key is not one of the service's")
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    page.wait_for_selector("#submit:enabled")
    page.reload()
    page.wait_for_selector("#submit:enabled")
    draw(page)
    page.wait_for_selector(".facts")
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    other = open_page(url, allowed=REFUSED)
    other.wait_for_selector("#key-dialog[open]")


def test_the_policy_keeps_the_page_from_other_places(open_page: Open, url: str) -> None:
    page = open_page(url, allowed=("Content Security Policy", "Failed to load"))
    page.wait_for_selector("#submit:enabled")
    refused = page.evaluate("() => fetch('http://127.0.0.1:9/').then(() => false, () => true)")
    ran = page.evaluate(
        """() => { const script = document.createElement('script'); script.textContent = 'window.ran = 1';
                   document.body.append(script); return window.ran ?? 0; }"""
    )
    assert refused and ran == 0


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
