"""Serve's log has a line for a refusal and a traceback for a bug."""

from __future__ import annotations

import logging

import pytest

from deployments.app import pool_options
from deployments.config import PoolConfig
from deployments.logs import leave_out_calls, shorten_refusals
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


def test_pools_log_as_the_service_is_told_to_and_without_a_line_for_each_call(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert "logging_config" not in pool_options(PoolConfig(name="a", device="cpu")), (
        "Serve's would be ignored"
    )
    log = logging.getLogger("ray.serve")
    before = list(log.filters)
    caplog.set_level(logging.INFO, "ray.serve")
    try:
        leave_out_calls()
        leave_out_calls()
        log.info("CALL report OK 1.2ms", extra={"log_to_stderr": False, "serve_access_log": True})
        log.info("worker 1 is replaced")
    finally:
        log.filters[:] = before
    assert caplog.messages == ["worker 1 is replaced"]
