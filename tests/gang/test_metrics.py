"""What Ray exports of a host is what the table of metrics says."""

from __future__ import annotations

import time
import urllib.request

import pytest
import ray

from distriray.gang import BlockingHost
from distriray.gang.metrics import METRICS, Name
from tests.gang.conftest import ask

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

RARE = {Name.ADAPTERS, Name.BROKEN_GANGS, Name.REGROUPINGS, Name.REPAIRS}
"""Counters that stay silent until what they count happens."""


def exported() -> str:
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url) as answer:
        return str(answer.read(), "utf-8")


def test_every_metric_of_the_table_is_exported_under_its_name(host: BlockingHost) -> None:
    for size in (1, 2):
        host.generate(ask(gang_size=size, deadline_s=600))
    wanted = {f"# TYPE ray_{name} {spec.kind}" for name, spec in METRICS.items() if name not in RARE}
    end = time.monotonic() + 90
    while not (lines := set(exported().splitlines())) >= wanted and time.monotonic() < end:
        time.sleep(1)
    assert not wanted - lines
    text = "\n".join(lines)
    assert 'outcome="finished"' in text and 'outcome="met"' in text and 'state="free"' in text
