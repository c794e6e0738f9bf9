"""The view to draw on, in a browser, before a service that draws grey pictures."""

from __future__ import annotations

import re
from typing import Any

import pytest

from distriray.errors import GangBroken, QueueFull
from distriray.events import Event, Regrouped, Repaired, Started, Step
from tests.unit.http.fake import FakeService

from .conftest import Open, Serve
from .hands import REFUSED, draw, wait_for_count, wait_for_text

pytestmark = pytest.mark.browser


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
