"""What the page shows where the service has more: adapters, pictures to start from, masks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from distriray.adapters import Lora
from distriray.picture import mask_of
from tests.unit.http.fake import FakeService

from .conftest import Open
from .hands import draw, wait_for_count

if TYPE_CHECKING:
    from playwright.sync_api import Route

pytestmark = pytest.mark.browser


def test_adapters_are_there_where_the_service_has_them(
    open_page: Open, url: str, service: FakeService
) -> None:
    def models(route: Route) -> None:
        told = route.fetch().json()
        for card in told["data"]:
            card["loras"] = [{"name": "ink"}, {"name": "neon"}]
        route.fulfill(json=told)

    page = open_page(url)
    page.wait_for_selector("#f-seed")
    assert page.locator("#f-loras").count() == 0
    page.route("**/v1/models", models)
    page.reload()
    page.click("text=More settings")
    page.click("#f-loras")
    page.select_option(".row select", label="neon")
    page.fill(".row input", "0.8")
    draw(page)
    page.wait_for_selector(".facts")
    assert service.asked[-1].loras == (Lora(name="neon", scale=0.8),)


def test_what_a_model_lacks_is_not_asked_for(open_page: Open, url: str, tmp_path: Path) -> None:
    """The first has one text encoder, the second draws from text alone, and the third fills no masks."""
    lacks = [{"prompt_2": "why", "target_size": "why"}, {"image": "why"}, {"mask_image": "why"}]

    def models(route: Route) -> None:
        told = route.fetch().json()
        told["data"] = [
            {**told["data"][0], "id": f"model-{index}", "lacks": each} for index, each in enumerate(lacks)
        ]
        route.fulfill(json=told)

    page = open_page(url)
    page.route("**/v1/models", models)
    page.reload()
    page.wait_for_selector("#f-model")
    assert page.locator("#f-prompt_3").count() == 1
    assert page.locator("#f-prompt_2, #f-target_size").count() == 0
    Image.new("RGB", (160, 80), (90, 90, 90)).save(tmp_path / "grey.png")
    page.set_input_files("#f-image", str(tmp_path / "grey.png"))
    page.wait_for_selector("#f-mask", state="visible")
    page.select_option("#f-model", "model-2")
    assert page.locator("#f-prompt_2, #f-target_size").count() == 2
    assert page.is_hidden("#f-mask") and page.is_visible("text=No picture")
    page.select_option("#f-model", "model-1")
    assert page.is_hidden("#picture") and page.locator("#f-strength").count() == 0


def test_a_picture_and_a_painted_mask_are_sent_as_a_form(
    open_page: Open, url: str, service: FakeService, tmp_path: Path
) -> None:
    Image.new("RGB", (160, 80), (90, 90, 90)).save(tmp_path / "grey.png")
    page = open_page(url)
    page.set_input_files("#f-image", str(tmp_path / "grey.png"))
    page.wait_for_selector("#f-mask", state="visible")
    page.focus("#f-mask")
    for key in ("Space", "Shift+ArrowRight", "Shift+ArrowRight"):
        page.keyboard.press(key)
    page.click("text=More settings")
    draw(page, strength="0.6", seed="3")
    page.wait_for_selector(".facts")
    asked = service.asked[-1]
    assert (asked.prompt, asked.strength, asked.seed) == ("a lake", 0.6, 3)
    assert asked.image is not None and asked.image.data == (tmp_path / "grey.png").read_bytes()
    assert asked.mask_image is not None
    mask = mask_of(asked.mask_image)
    assert mask.size == (160, 80) and mask.getpixel((80, 40)) == 255 and mask.getpixel((4, 4)) == 0


def test_what_was_drawn_can_be_started_from(open_page: Open, url: str, service: FakeService) -> None:
    page = open_page(url)
    draw(page, num_inference_steps="3")
    page.wait_for_selector(".facts")
    page.click("text=Start from this")
    page.wait_for_selector("#f-mask", state="visible")
    page.click("#submit:enabled")
    wait_for_count(page, ".strip [data-state=done]", 2)
    asked = service.asked[-1]
    assert asked.image is not None and asked.image.format == "png" and asked.mask_image is None
    page.click("button:text-is('No picture')")
    page.click("#submit:enabled")
    wait_for_count(page, ".strip [data-state=done]", 3)
    assert service.asked[-1].image is None


def test_there_is_no_picture_to_start_from_where_the_service_takes_none(open_page: Open, url: str) -> None:
    def without(route: Route) -> None:
        told = route.fetch().json()
        del told["paths"]["/v1/images/edits"]
        route.fulfill(json=told)

    page = open_page(url)
    page.route("**/openapi.json", without)
    page.reload()
    page.wait_for_selector("#submit:enabled")
    assert page.is_hidden("#picture")
