"""Both views on the real service: a local Ray, four workers on CPUs, the built-in model."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import ray
from ray import serve as ray_serve

from deployments.app import build_app
from deployments.config import AppConfig
from tests.distributed.ranks import free_address

from .conftest import Open
from .hands import wait_for_text

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

POOL = {
    "name": "elastic",
    "model": "builtin:landscapes",
    "device": "cpu",
    "workers": 4,
    "cpus_per_worker": 0.5,
}
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    port = int(free_address().split(":")[1])
    patch = pytest.MonkeyPatch()
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}.items():
        patch.setenv(name, value)
    patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    ray.init(address="local", num_cpus=8, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        ray_serve.start(http_options={"port": port})
        args = AppConfig.model_validate({"pools": [POOL], "router": {"max_replicas": 1}})
        ray_serve.run(build_app(args), name="distriray", route_prefix="/")
        yield f"http://127.0.0.1:{port}/"
        ray_serve.shutdown()
    finally:
        ray.shutdown()
        patch.undo()


def fleet(address: str) -> dict[str, Any]:
    """What the only host says."""
    (host,) = httpx.get(f"{address}v1/fleet", timeout=30).json()["pools"]["elastic"]["hosts"].values()
    return host  # type: ignore[no-any-return]


def until(page: Page, condition: Callable[[], object], seconds: float = 60) -> None:
    for _ in range(int(10 * seconds)):
        if condition():
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"not so within {seconds} s")


def keep(page: Page, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=path, **options)


def submit(page: Page, prompt: str, gang: str = "auto", **fields: str) -> None:
    """Ask for a picture as a person does, and for what is not named as the service would have it."""
    page.wait_for_selector("#submit:enabled")
    for name in ("size", "size-height", "num_inference_steps", "seed"):
        page.fill(f"#f-{name}", fields.get(name.replace("-", "_"), ""))
    page.check(f"input[name=gang][value='{gang}']", force=True)
    page.fill("#f-prompt", prompt)
    page.click("#submit")


def finished(page: Page, count: int) -> None:
    page.wait_for_selector(f".strip li:nth-child({count}) [data-state=done]", timeout=150_000)


def test_a_picture_is_drawn_with_previews_and_another_is_cancelled(
    open_page: Open, address: str, shots: Path
) -> None:
    page = open_page(address)
    submit(page, "a desert at night, a full moon", seed="5", size="384", size_height="384")
    submit(page, "autumn trees on a meadow, a sunny day", seed="12", size="384", size_height="384")
    finished(page, 2)
    submit(page, "a lake at dusk, snowy mountains", gang="2", seed="1")
    page.wait_for_selector(".frame.preview img", timeout=90_000)
    page.wait_for_selector(".facts >> text=512 × 512", timeout=150_000)
    assert [page.inner_text(f".facts dd >> nth={place}") for place in (0, 3, 5)] == ["1", "2", "0"]
    keep(page, shots / "page-draw.png", full_page=True)
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(500)  # colours change softly
    keep(page, shots / "page-draw-dark.png", full_page=True)
    page.set_viewport_size(PHONE)
    keep(page, shots / "page-phone.png")
    page.set_viewport_size({"width": 1280, "height": 860})
    submit(page, "nothing that anybody waits for", num_inference_steps="100")
    wait_for_text(page, ".status", "Step", 60)
    page.click("#cancel")
    until(page, lambda: fleet(address)["outcomes"].get("cancelled") == 1)


def test_a_killed_worker_is_seen_as_a_repair_in_both_views(
    open_page: Open, address: str, shots: Path
) -> None:
    """Some time of a fleet: requests of all sizes, some that give way, one that is cancelled, a death."""
    page = open_page(address, viewport={"width": 1280, "height": 700})
    small = {"size": "256", "size_height": "256"}
    submit(page, "a mountain lake at dawn", gang="2", num_inference_steps="24", **small)
    submit(page, "a pine forest in the morning", gang="1", num_inference_steps="14", **small)
    submit(page, "hills in fog", gang="1", num_inference_steps="11", **small)
    page.click("#to-watch")
    wait_for_text(page, ".live", "Live")
    gangs = [request for request in wait_for_gang(page, address) if len(request["workers"]) == 2]
    victim = gangs[0]["workers"][1]
    os.kill(fleet(address)["workers"][victim]["pid"], signal.SIGKILL)
    page.wait_for_selector(".timeline .mark.repaired", state="attached", timeout=60_000)
    said = page.inner_text("[role=log]")
    assert f"Worker {victim} of host" in said and "a mountain lake at dawn: repaired" in said
    page.click("#to-draw")
    page.locator(".strip button").last.click()
    page.wait_for_selector(".progress .mark.repaired", state="attached")
    wait_for_text(page, ".status", f"[Ww]orker {victim} died|after a repair")
    finished(page, 3)
    assert page.inner_text(".facts dd >> nth=5") == "1"
    page.click("#to-watch")
    until(page, lambda: page.locator(".worker.dead").count() == 0, 120)
    page.click("#to-draw")
    submit(page, "a beach at noon", gang="4", num_inference_steps="8", **small)
    submit(page, "a storm that nobody waits for", gang="2", num_inference_steps="90", **small)
    submit(page, "a river at night", gang="1", num_inference_steps="60", **small)
    page.click("#to-watch")
    page.wait_for_selector(".requests >> text=a storm", timeout=60_000)
    until(page, lambda: fleet(address)["free_workers"] == 1, 120)
    page.click("#to-draw")
    submit(page, "a meadow in spring, flowers", num_inference_steps="90", size="512", size_height="512")
    until(page, lambda: fleet(address)["free_workers"] == 0, 120)  # on the one worker that was left
    page.locator(".strip li:nth-child(3) button").click()
    page.click("#cancel")
    page.click("#to-watch")
    page.wait_for_selector(".timeline .mark.cancelled", state="attached", timeout=60_000)
    page.wait_for_selector(".requests >> text=a meadow", timeout=90_000)
    page.wait_for_selector(".timeline .mark.regrouped", state="attached", timeout=90_000)
    page.wait_for_timeout(2500)
    keep(page, shots / "page-watch.png")
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(500)  # colours change softly
    keep(page, shots / "page-watch-dark.png")
    page.click("#to-draw")
    page.locator(".strip li:nth-child(1) button").click()
    page.click("#cancel")
    until(page, lambda: fleet(address)["free_workers"] == 4, 120)


def wait_for_gang(page: Page, address: str) -> list[dict[str, Any]]:
    """What runs, once a gang of two has made some steps."""
    found: list[dict[str, Any]] = []

    def there() -> bool:
        found[:] = fleet(address)["running"]
        return any(len(request["workers"] or ()) == 2 and request["step"] > 3 for request in found)

    until(page, there, 120)
    return found
