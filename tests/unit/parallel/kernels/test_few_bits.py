"""Changes in few bits by Triton are those by torch: interpreted everywhere, compiled where there is a GPU."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from distriray.parallel.kernels import plain
from distriray.parallel.kernels.few_bits import GROUP, message_bytes
from tests.parameters import pairwise
from tests.unit.parallel.kernels.conftest import CUDA, Run

BITS = [2, 4, 8]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1,), (3, 2, 5, 7), (65 * GROUP,), (64 * GROUP + 1,)]  # 64 groups are a program's


def normal(
    device: str, step: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Normal numbers, of another size in each group."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(step))
    sizes = 10.0 ** ((torch.arange(numbers.numel()) // GROUP) % 5 - 2)
    return (numbers * sizes.view(shape)).to(device, dtype)


def check_ends(device: str, shape: tuple[int, ...], dtype: torch.dtype, bits: int) -> None:
    from distriray.parallel.kernels import fused

    # The interpreter cuts bfloat16 off instead of rounding it.
    others = (fused,) if (device, dtype) == ("cpu", torch.bfloat16) else (plain, fused)
    for encoding, decoding in product(others, repeat=2):
        start = normal(device, 0, shape, dtype)
        sent, received, into = start.clone(), start.clone(), torch.empty_like(start)
        for step in range(1, 4):
            message = encoding.encode(normal(device, step, shape, dtype), sent, bits)
            assert message.dtype == torch.uint8 and message.shape == (message_bytes(sent.numel(), bits),)
            decoding.decode(message, received, bits, into)
            assert torch.equal(received, sent) and torch.equal(into, sent)


@pytest.mark.parametrize(("shape", "dtype", "bits"), pairwise(SHAPES, DTYPES, BITS), ids=str)
def test_both_ends_hold_the_same_bits_whichever_kernels_they_have(
    run: Run, shape: tuple[int, ...], dtype: torch.dtype, bits: int
) -> None:
    run(check_ends, shape, dtype, bits)


def check_levels(device: str, dtype: torch.dtype, bits: int) -> None:
    from distriray.parallel.kernels import fused

    shape, levels = (70, GROUP), 2**bits - 1
    start, wanted = normal(device, 0, shape, dtype), normal(device, 1, shape, dtype)
    known = start.clone()
    messages = plain.encode(wanted, start.clone(), bits), fused.encode(wanted, known, bits)
    scales = [each.view(70, -1)[:, :2].contiguous().view(torch.bfloat16) for each in messages]
    assert torch.equal(*scales)
    level = scales[0].float()
    torch.testing.assert_close(
        level, (wanted.float() - start.float()).abs().amax(1, True) * 2 / levels, rtol=1 / 256, atol=0
    )
    # Half a level; a scale that was rounded down clips the largest by 1/512 of it, and the sum is rounded.
    rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    most = level * (0.5 + levels / 1024) + rounding * wanted.float().abs()
    assert ((known.float() - wanted.float()).abs() <= most).all()
    # What is as near to two levels may become either.
    assert (messages[0] != messages[1]).float().mean() < 0.01


@pytest.mark.parametrize(("dtype", "bits"), pairwise(DTYPES, BITS), ids=str)
def test_numbers_are_the_nearest_levels(run: Run, dtype: torch.dtype, bits: int) -> None:
    run(check_levels, dtype, bits)


def check_views(device: str) -> None:
    from distriray.parallel.kernels import fused

    wanted = normal(device, 1, (4, 6, 50)).transpose(0, 1)
    known = [torch.zeros(wanted.shape, device=device) for _ in range(2)]
    message = fused.encode(wanted, known[0], 4)
    whole = torch.full((6, 4, 60), -1.0, device=device)
    fused.decode(message, known[1], 4, whole[:, :, 5:55])
    assert torch.equal(known[0], known[1]) and torch.equal(whole[:, :, 5:55], known[0])
    assert (whole[:, :, :5] == -1).all() and (whole[:, :, 55:] == -1).all()
    before = known[1].clone()
    fused.decode(fused.encode(wanted, known[0], 4), known[1], 4)
    assert torch.equal(known[0], known[1]) and not torch.equal(known[0], before)


def test_values_and_where_they_go_may_be_rows_of_something_larger(run: Run) -> None:
    run(check_views)


def check_memory(device: str) -> None:
    from distriray.parallel.kernels import fused

    count = 64 * GROUP + 5
    whole = torch.full((count + 2 * GROUP,), 7.0, device=device)
    fused.decode(fused.encode(normal(device, 1, (count,)), whole[GROUP:-GROUP], 2), whole[GROUP:-GROUP], 2)
    assert (whole[:GROUP] == 7).all() and (whole[-GROUP:] == 7).all()


def test_nothing_is_written_beyond_what_is_known(run: Run) -> None:
    run(check_memory)


def check_edges(device: str) -> None:
    from distriray.parallel.kernels import fused

    for kernels in (plain, fused):
        known = normal(device, 3, (5 * GROUP,))
        unchanged = known.clone()
        message = kernels.encode(unchanged, known, 4)
        assert torch.equal(known, unchanged)
        kernels.decode(message, known, 4)
        assert torch.equal(known, unchanged)
        for wrong in (float("nan"), float("inf")):
            sent, received, values = unchanged.clone(), unchanged.clone(), unchanged + 1.0
            values[GROUP + 3] = wrong
            kernels.decode(kernels.encode(values, sent, 4), received, 4)
            for end in (sent, received):
                groups = end.view(5, GROUP).isfinite()
                assert groups[[0, 2, 3, 4]].all() and not groups[1].any()


def test_what_does_not_change_is_exact_and_what_is_not_finite_is_not_hidden(run: Run) -> None:
    run(check_edges)


@CUDA
@pytest.mark.gpu
def test_a_message_of_more_than_two_to_the_31_numbers() -> None:
    from distriray.parallel.kernels import fused

    known = torch.zeros(2**31 + GROUP + 1, dtype=torch.float16, device="cuda")
    received, wanted = known.clone(), torch.ones_like(known)
    fused.decode(fused.encode(wanted, known, 4), received, 4)
    assert torch.equal(known, received)
    torch.testing.assert_close(known[-GROUP:], wanted[-GROUP:], rtol=1 / 128, atol=0)
