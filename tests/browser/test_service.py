"""Both views on the real service: a local Ray, four workers on CPUs, the built-in model."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
from .test_draw import wait_for_text

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


def generate(address: str, prompt: str, **fields: Any) -> httpx.Response:
    body = {"prompt": prompt, "size": "256x256", **fields}
    return httpx.post(f"{address}v1/images/generations", json=body, timeout=240)


def until(page: Page, condition: Callable[[], object], seconds: float = 60) -> None:
    for _ in range(int(10 * seconds)):
        if condition():
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"not so within {seconds} s")


def keep(page: Page, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=path, **options)


def test_a_picture_is_drawn_with_previews_and_another_is_cancelled(
    open_page: Open, address: str, shots: Path
) -> None:
    page = open_page(address)
    page.fill("#f-prompt", "a lake at dusk, snowy mountains")
    page.fill("#f-seed", "1")
    page.check("input[name=gang][value='2']", force=True)
    page.click("#submit:enabled")
    page.wait_for_selector(".frame.preview img", timeout=90_000)
    page.wait_for_selector(".facts", timeout=90_000)
    assert page.inner_text(".facts dd >> nth=0") == "1" and page.inner_text(".facts dd >> nth=3") == "2"
    drawn = page.evaluate("() => { const i = document.querySelector('.frame img'); return i.naturalWidth; }")
    assert drawn == 256
    for prompt, seed in (
        ("autumn trees on a meadow, a sunny day", 12),
        ("a desert at night, a full moon", 5),
    ):
        page.fill("#f-prompt", prompt)
        page.fill("#f-seed", str(seed))
        page.click("#submit")
        page.wait_for_selector(f".facts >> text={seed}", timeout=90_000)
    page.locator(".strip button").last.click()
    page.fill("#f-prompt", "a lake at dusk, snowy mountains")
    keep(page, shots / "page-draw.png")
    page.emulate_media(color_scheme="dark")
    keep(page, shots / "page-draw-dark.png")
    page.set_viewport_size(PHONE)
    keep(page, shots / "page-phone.png")
    page.set_viewport_size({"width": 1280, "height": 860})
    page.fill("#f-num_inference_steps", "100")
    page.click("#submit")
    wait_for_text(page, ".status", "Step", 60)
    page.click("#cancel")
    until(page, lambda: fleet(address)["outcomes"].get("cancelled") == 1)


def test_a_killed_worker_is_seen_as_a_repair_in_both_views(
    open_page: Open, address: str, shots: Path
) -> None:
    """A minute of a fleet: requests of all sizes, some that give way, one that is cancelled, a death."""
    watching = open_page(f"{address}#watch", viewport={"width": 1280, "height": 800})
    wait_for_text(watching, ".live", "Live")
    drawing = open_page(address)
    with ThreadPoolExecutor(8) as others:
        drawing.fill("#f-prompt", "a mountain lake at dawn")
        drawing.fill("#f-num_inference_steps", "30")
        drawing.check("input[name=gang][value='2']", force=True)
        answers = [
            others.submit(generate, address, prompt, gang_size=size, seed=size, num_inference_steps=steps)
            for prompt, size, steps in (("a pine forest", 1, 20), ("hills in fog", 1, 16))
        ]
        drawing.click("#submit:enabled")
        wait_for_text(drawing, ".status", r"Step ([4-9]|\d\d) of", 90)
        host = fleet(address)
        victims = next(r["workers"] for r in host["running"] if len(r["workers"] or ()) == 2)
        os.kill(host["workers"][victims[1]]["pid"], signal.SIGKILL)
        drawing.wait_for_selector(".progress .mark.repaired", timeout=60_000)
        watching.wait_for_selector(".timeline .mark.repaired", state="attached", timeout=60_000)
        said = watching.inner_text("[role=log]")
        assert f"Worker {victims[1]} of host" in said and "repaired" in said
        answers += [
            others.submit(generate, address, prompt, **fields)
            for prompt, fields in (
                ("a beach at noon", {"gang_size": 4, "num_inference_steps": 8}),
                ("a river at night", {"num_inference_steps": 12}),
                ("snow on a mountain", {"gang_size": 2, "num_inference_steps": 10}),
            )
        ]
        drawing.wait_for_selector(".facts", timeout=120_000)
        assert int(drawing.inner_text(".facts dd >> nth=5")) == 1
        wait_for_text(drawing, ".status", rf"[Ww]orker {victims[1]} died")
        gone = threading.Event()

        def leaves() -> None:
            body = {"prompt": "a storm", "size": "256x256", "num_inference_steps": 90, "stream": True}
            with httpx.stream("POST", f"{address}v1/images/generations", json=body, timeout=60):
                gone.wait(6)

        others.submit(leaves)
        until(watching, lambda: all(answer.done() for answer in answers[:4]), 120)
        gone.set()
        answers.append(others.submit(generate, address, "a meadow in spring", num_inference_steps=30))
        watching.wait_for_selector(".timeline .mark.cancelled", state="attached", timeout=60_000)
        until(watching, lambda: fleet(address)["free_workers"] < 4 and fleet(address)["running"])
        watching.wait_for_timeout(2500)
        keep(watching, shots / "page-watch.png")
        watching.emulate_media(color_scheme="dark")
        keep(watching, shots / "page-watch-dark.png")
        assert [answer.result().status_code for answer in answers] == [200] * len(answers)
    until(watching, lambda: watching.locator(".worker.free").count() == 4)
