"""The page as a whole: by keys, by name, on a phone, with a key, and kept to its service."""

from __future__ import annotations

import pytest

from deployments.http import HttpConfig
from tests.unit.http.fake import FakeService

from .conftest import Open, Serve
from .hands import REFUSED, draw, wait_for_text

pytestmark = pytest.mark.browser


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
        page.evaluate("scrollTo(0, 200)")
        page.click(f"#to-{view}")
        page.wait_for_selector(f"#{view}", state="visible")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("scrollY") == 0


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
