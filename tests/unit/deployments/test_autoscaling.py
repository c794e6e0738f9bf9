"""A pool is sized by the seconds of work before it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deployments.autoscaling import BACKLOG_S, QueuedWork


def context(backlog_s: dict[str, float] | None, queued: float = 0.0) -> Any:
    return SimpleNamespace(
        aggregated_metrics=None if backlog_s is None else {BACKLOG_S: backlog_s}, total_queued_requests=queued
    )


@pytest.mark.parametrize(
    ("backlog_s", "hosts"),
    [({}, 0), ({"a": 0.0}, 0), ({"a": 1.0}, 1), ({"a": 30.0}, 1), ({"a": 31.0}, 2), ({"a": 70, "b": 50}, 4)],
)
def test_each_host_gets_its_target_of_work(backlog_s: dict[str, float], hosts: int) -> None:
    assert QueuedWork(target_s=30.0)(context(backlog_s)) == (hosts, {})


def test_a_request_that_waits_for_a_first_host_wants_one() -> None:
    assert QueuedWork(30.0)(context(None, queued=0.2)) == (1, {})
