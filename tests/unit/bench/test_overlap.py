"""Old values in small parts hold up fewer of the fresh ones behind them, by the model of a link."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from bench.overlap import steps_of
from bench.projection.links import exposed_s, parse_link


@pytest.mark.sweep
def test_large_keys_and_values_in_parts_keep_fresh_values_waiting_less_than_half_as_long() -> None:
    few, many = (steps_of(1024, 8, "displaced_attention", buckets) for buckets in (4, None))
    (of_few, *_), (of_many, *_) = few, many
    assert of_few.sent == of_many.sent
    launched = [sum(moment.kind == "launch" for moment in step.moments) for step in (of_few, of_many)]
    assert launched[0] == 57 and launched[1] > launched[0]
    assert of_many.seconds < 1.02 * of_few.seconds
    pcie5 = parse_link("pcie5:20:50")
    assert exposed_s(many, pcie5)[-1] < 0.5 * exposed_s(few, pcie5)[-1]
    alone = parse_link("endless:0:1e9")
    assert exposed_s(many, alone)[-1] < 1e-6
