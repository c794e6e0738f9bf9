"""Old values in small parts hold up fewer of the fresh ones behind them, by the model of a link."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from bench.overlap import BYTES_PER_S, FLOPS, LAUNCH_S, exchanges_of, steps_of, timing
from bench.projection.links import exposed_s, parse_link


def test_operations_take_the_longer_time_of_their_bytes_and_their_arithmetic() -> None:
    large, small = (torch.empty(1, 1, n, n, dtype=torch.float16, device="meta") for n in (4096, 16))
    attended = [large[..., :64]] * 3
    seconds = [2 * 4096**3 / FLOPS, 4 * 4096**2 * 64 / FLOPS, 3 * small.nbytes / BYTES_PER_S]
    with timing() as clock:
        for operation, expected in zip(
            (
                lambda: large @ large,
                lambda: F.scaled_dot_product_attention(*attended),
                lambda: small + small,
            ),
            seconds,
            strict=True,
        ):
            before = clock.now_s
            operation()
            assert clock.now_s - before == pytest.approx(LAUNCH_S + expected)


@pytest.mark.sweep
def test_large_keys_and_values_in_parts_keep_fresh_values_waiting_less_than_half_as_long() -> None:
    few, many = (steps_of(1024, 8, "displaced_attention", buckets) for buckets in (4, None))
    (of_few, *_), (of_many, *_) = few, many
    assert of_few.sent == of_many.sent
    assert exchanges_of(of_few) == 57 < exchanges_of(of_many)
    assert of_many.seconds < 1.02 * of_few.seconds
    pcie5 = parse_link("pcie5:20:50")
    assert exposed_s(many, pcie5)[-1] < 0.5 * exposed_s(few, pcie5)[-1]
    alone = parse_link("endless:0:1e9")
    assert exposed_s(many, alone)[-1] < 1e-6
