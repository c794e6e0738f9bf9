"""Triton's group norm is torch's: in Triton's interpreter everywhere, compiled where there is a GPU."""

from __future__ import annotations

import logging
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distriray.config import StatisticsMode
from distriray.parallel.context import PatchContext
from distriray.parallel.kernels import plain
from distriray.parallel.kernels.choice import kernels_of
from distriray.parallel.kernels.rows_around import RowsAround
from distriray.parallel.layers import group_norm
from distriray.parallel.layers.group_norm import patch_group_norm
from tests.parameters import pairwise
from tests.unit.parallel.kernels.conftest import CUDA, Run
from tests.unit.parallel.test_group_norm import TwoRanks

# One rounding of the output; the interpreter cuts bfloat16 off instead of rounding it.
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(ROUNDING)


def feature_map(device: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
    """Normal numbers around 0, 1 and so on for each image of the batch."""
    generator = torch.Generator(device).manual_seed(0)
    image = torch.randn(shape, generator=generator, device=device)
    image += torch.arange(len(image), device=device).view(-1, *(1 for _ in shape[1:]))
    image = image.to(dtype)
    if layout == "channels last":
        return image.to(memory_format=torch.channels_last)
    if layout == "rows of a larger map":
        return F.pad(image, (0, 0, 2, 1))[:, :, 2:-1]
    return image


def affine(channels: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.arange(channels, device=like.device, dtype=like.dtype) / channels
    return numbers + 0.5, numbers - 0.5


def assert_statistics(statistics: torch.Tensor, input: torch.Tensor, groups: int) -> None:
    grouped = input.double().reshape(len(input), groups, -1)
    mean, variance = grouped.mean(-1), grouped.var(-1, correction=0)
    assert statistics.dtype == torch.float32
    torch.testing.assert_close(statistics[..., 0].double(), mean, rtol=2e-7, atol=1e-6)
    torch.testing.assert_close(statistics[..., 1].double(), variance, rtol=1e-5, atol=1e-9)


def check_one_rank(
    device: str, shape: tuple[int, ...], groups: int, dtype: torch.dtype, layout: str, mean: float
) -> None:
    from distriray.parallel.kernels import fused

    image = feature_map(device, shape, dtype, layout).add_(mean)
    statistics = fused.group_statistics(image, groups)
    assert_statistics(statistics, image, groups)
    weight, bias = affine(shape[1], image)
    case = image, statistics[None], None, weight, bias, 1e-5
    output = fused.normalize(*case)
    assert output.dtype == dtype and output.shape == image.shape
    if layout == "channels last":
        assert output.is_contiguous(memory_format=torch.channels_last)
    expected = F.group_norm(image.double(), groups, weight.double(), bias.double())
    # Where all values are alike, a rounding of the mean is divided by the root of eps.
    near = max(1e-6, 1e-6 * mean) * float((statistics[..., 1].min() + 1e-5).rsqrt().clamp_min(1.0))
    torch.testing.assert_close(output.double(), expected, rtol=ROUNDING[dtype], atol=near)
    torch.testing.assert_close(output, plain.normalize(*case), rtol=ROUNDING[dtype], atol=5 * near)


SHAPES = [  # and groups
    ((2, 8, 7, 5), 4),
    ((1, 12, 3, 3), 3),
    ((2, 48, 10, 33), 8),
    ((1, 2, 160, 211), 2),
    ((3, 80, 2, 2), 1),
]
LAYOUTS = ["contiguous", "channels last", "rows of a larger map"]


@pytest.mark.parametrize(
    ("map_", "dtype", "layout", "mean"), pairwise(SHAPES, DTYPES, LAYOUTS, [0.0, 1000.0]), ids=str
)
def test_kernels_equal_nn_group_norm(
    run: Run, map_: tuple[tuple[int, ...], int], dtype: torch.dtype, layout: str, mean: float
) -> None:
    run(check_one_rank, *map_, dtype, layout, mean)


@pytest.mark.parametrize("shape", [(2, 6, 9), (3, 8)])
def test_maps_of_other_ranks_than_four(run: Run, shape: tuple[int, ...]) -> None:
    run(check_one_rank, shape, 2, torch.float32, "contiguous", 0.0)


def check_no_scales(device: str) -> None:
    from distriray.parallel.kernels import fused

    image = feature_map(device, (2, 4, 3, 3), torch.float32, "contiguous")
    case = image, fused.group_statistics(image, 2)[None], None
    for weight in (None, affine(4, image)[0]):
        output = fused.normalize(*case, weight, None, 1e-5)
        torch.testing.assert_close(output, F.group_norm(image, 2, weight))
        torch.testing.assert_close(output, plain.normalize(*case, weight, None, 1e-5))


def test_norms_without_scale_or_shift(run: Run) -> None:
    run(check_no_scales)


def check_ranks(device: str, ranks: int, dtype: torch.dtype, layout: str) -> None:
    from distriray.parallel.kernels import fused

    image = feature_map(device, (2, 16, 37, 5), dtype, layout).add_(30)
    rows = [37 // ranks + (rank < 37 % ranks) for rank in range(ranks)]
    parts = image.split(rows, 2)
    everyone = torch.full((ranks, 3, 2, 4, 2), float("nan"), device=device)[
        :, 1
    ]  # rows apart, as in a bucket
    for own, part in zip(everyone, parts, strict=True):
        assert fused.group_statistics(part, 4, out=own) is own
    shares = torch.tensor([count / 37 for count in rows], device=device).view(-1, 1, 1)
    weight, bias = affine(16, image)
    output = torch.cat([fused.normalize(part, everyone, shares, weight, bias, 1e-5) for part in parts], 2)
    expected = F.group_norm(image.double(), 4, weight.double(), bias.double())
    torch.testing.assert_close(output.double(), expected, rtol=ROUNDING[dtype], atol=2e-5)


@pytest.mark.parametrize(
    ("ranks", "dtype", "layout"),
    [
        *((ranks, torch.float32, "contiguous") for ranks in range(1, 9)),
        *((ranks, torch.float16, "channels last") for ranks in (2, 5, 8)),
        *((ranks, torch.bfloat16, "contiguous") for ranks in (2, 5, 8)),
    ],
)
def test_patches_of_any_gang_make_the_norm_of_the_whole(
    run: Run, ranks: int, dtype: torch.dtype, layout: str
) -> None:
    run(check_ranks, ranks, dtype, layout)


def check_around(device: str, dtype: torch.dtype, layout: str, rows: tuple[int, int, int, int]) -> None:
    """Rows above the patch, below it, and zeros beyond those."""
    from distriray.parallel.kernels import fused

    above, below, *zeros = rows
    whole = feature_map(device, (2, 12, above + 6 + below, 5), dtype, "contiguous").add_(3)
    image = whole[:, :, above : above + 6].contiguous()
    if layout == "channels last":
        image = image.to(memory_format=torch.channels_last)
    parts = [
        part.contiguous() if part.shape[2] else None
        for part in (whole[:, :, :above], whole[:, :, above + 6 :])
    ]
    around = RowsAround(*parts, (zeros[0], zeros[1]))
    statistics = plain.group_statistics(whole, 3)
    case = image, statistics[None], None, *affine(12, image), 1e-5
    padded = plain.normalize(*case, around)
    assert padded.is_contiguous(memory_format=torch.channels_last) == (layout == "channels last")
    inner = plain.normalize(whole, *case[1:])
    assert torch.equal(padded, F.pad(inner, (0, 0, *zeros)))
    output = fused.normalize(*case, around)
    assert output.stride() == padded.stride()
    torch.testing.assert_close(output, padded, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    assert torch.equal(output == 0, padded == 0)


@pytest.mark.parametrize(
    ("dtype", "layout", "rows"),
    pairwise(
        DTYPES, ["contiguous", "channels last"], [(1, 1, 0, 0), (0, 2, 1, 0), (2, 0, 0, 3), (0, 0, 1, 1)]
    ),
    ids=str,
)
def test_rows_around_a_patch_are_normalized_with_it(
    run: Run, dtype: torch.dtype, layout: str, rows: tuple[int, int, int, int]
) -> None:
    run(check_around, dtype, layout, rows)


def check_prediction(device: str) -> None:
    from distriray.parallel.kernels import fused

    image = feature_map(device, (1, 2, 4, 4), torch.float32, "contiguous")
    predicted = torch.tensor([[[[1.0, -0.5]]], [[[1.0, 0.5]]]], device=device)
    case = image, predicted, torch.full((2, 1, 1), 0.5, device=device), None, None, 1e-5
    torch.testing.assert_close(fused.normalize(*case), plain.normalize(*case))


def test_a_variance_predicted_below_zero_counts_as_zero(run: Run) -> None:
    run(check_prediction)


def check_layer(device: str, mode: StatisticsMode) -> None:
    from distriray.parallel.kernels import fused

    image = feature_map("cpu", (2, 8, 4, 4), torch.float32, "contiguous") + 2

    def displaced(where: str) -> tuple[torch.Tensor, torch.Tensor]:
        step = TwoRanks(plain.group_statistics(image, 4), mode)
        step.everyone = step.everyone.to(where)
        with patch.object(step, "shares", lambda input: torch.full((2, 1, 1), 0.5, device=where)):
            norm = nn.GroupNorm(4, 8, device=where).requires_grad_(False)
            patch_group_norm(norm, PatchContext(step=step))  # type: ignore[arg-type]
            return norm(image.to(where)).cpu(), step.everyone.cpu()

    expected = displaced("cpu")
    with patch.object(group_norm, "kernels_of", lambda device_type: fused):
        torch.testing.assert_close(displaced(device), expected)


@pytest.mark.parametrize("mode", ["stale", "corrected", "fresh", "local"])
def test_a_displaced_norm_is_the_same_with_either_kernels(run: Run, mode: StatisticsMode) -> None:
    run(check_layer, mode)


def check_refusals(device: str) -> None:
    from distriray.parallel.kernels import fused

    empty, statistics = torch.empty((2, 4, 0, 3), device=device), torch.ones((1, 2, 2, 2), device=device)
    with pytest.raises(ValueError, match=r"\(2, 4, 0, 3\) has no elements"):
        fused.group_statistics(empty, 2)
    with pytest.raises(ValueError, match="has no elements"):
        fused.normalize(empty, statistics, None, None, None, 1e-5)
    with pytest.raises(ValueError, match="4 channels are no multiple of 3 groups"):
        fused.group_statistics(torch.ones((1, 4, 2, 2), device=device), 3)


def test_what_has_no_statistics_is_refused(run: Run) -> None:
    run(check_refusals)


def test_a_cpu_has_the_plain_kernels() -> None:
    assert kernels_of("cpu") is plain


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines where Triton does not work")
def test_without_triton_the_plain_kernels_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert kernels_of.__wrapped__("cuda") is plain
    assert "Triton does not work here: " in caplog.text


def test_a_gpu_that_is_full_when_it_is_asked_has_its_kernels_later(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")

    def zeros(*shape: object, **kwargs: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(torch.OutOfMemoryError):
        kernels_of.__wrapped__("cuda")


@CUDA
@pytest.mark.gpu
def test_a_gpu_has_the_fused_kernels() -> None:
    assert kernels_of("cuda").__name__.endswith("fused")  # type: ignore[attr-defined]


@CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 320, 32, 128),  # SDXL at 1024 x 1024, one of four patches
        (2, 1280, 8, 32),
        (2, 960, 120, 480),  # at 3840 x 3840
        (2, 320, 480, 480),
        (1, 1920, 61, 121),  # odd
        (1, 256, 960, 1920),  # a VAE's
    ],
)
def test_maps_of_sdxl_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    check_one_rank("cuda", shape, 32, dtype, layout, 10.0)


@CUDA
@pytest.mark.gpu
def test_a_map_of_more_than_two_to_the_31_elements() -> None:
    from distriray.parallel.kernels import fused

    image = torch.empty((1, 160, 3840, 3840), dtype=torch.float16, device="cuda").normal_(5.0)
    assert image.numel() > 2**31
    statistics = fused.group_statistics(image, 32)
    output = fused.normalize(image, statistics[None], None, None, None, 1e-5)
    for group in (0, 29, 31):
        part, normalized = (of[:, 5 * group : 5 * group + 5] for of in (image, output))
        assert_statistics(statistics[:, group : group + 1], part, 1)
        torch.testing.assert_close(normalized, F.group_norm(part.float(), 1).half(), rtol=1e-3, atol=1e-5)
