"""Serve's log has a line for a refusal and a traceback for a bug."""

from __future__ import annotations

import logging

import pytest

from deployments.logs import shorten_refusals
from distriray.errors import QueueFull


def test_a_refusal_is_one_line_and_a_bug_keeps_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("ray.serve")
    shorten_refusals()
    shorten_refusals()
    for error in (QueueFull("every queue is 100 % full"), ZeroDivisionError("a bug")):
        try:
            raise error
        except Exception:
            log.exception("Request failed.")
    refusal, bug = caplog.records
    assert refusal.getMessage() == "QueueFull: every queue is 100 % full" and refusal.exc_info is None
    assert bug.getMessage() == "Request failed." and bug.exc_info is not None
