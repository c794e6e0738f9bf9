"""What a person does on the page, and sees."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

REFUSED = ("status of 4", "status of 5")
"""Chromium's console says so of every answer that is no success."""


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
