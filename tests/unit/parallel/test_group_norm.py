"""Group norm from the statistics of parts."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distriray.collective.base import Communicator
from distriray.collective.lockstep import run_in_lockstep
from distriray.config import Mix, StatisticsMode, Weights
from distriray.parallel.context import PatchContext
from distriray.parallel.exchange.exchange import Exchange
from distriray.parallel.kernels.plain import group_statistics
from distriray.parallel.layers.group_norm import patch_group_norm
from distriray.parallel.moments import correct, merge
from distriray.parallel.partition import Partition, Window


class OneRank:
    """A step in a gang of one: this rank's statistics are everyone's."""

    statistics, fuses, rank = "fresh", False, 0

    def shares(self, input: torch.Tensor) -> torch.Tensor:
        return torch.ones((1, 1, 1))

    def read_statistics(self, input: torch.Tensor, groups: int) -> torch.Tensor:
        return torch.empty((1, len(input), groups, 2))

    def send_statistics(self, everyone: torch.Tensor) -> None: ...


def test_merged_statistics_equal_nn_group_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((2, 8, 11, 5), generator=generator) * 3 + 100  # a large mean, uneven parts
    parts = image.split([5, 4, 2], dim=2)
    statistics = torch.stack([group_statistics(part, 4) for part in parts])
    shares = torch.tensor([5 / 11, 4 / 11, 2 / 11]).view(-1, 1, 1)
    mean, variance = merge(statistics, shares).unbind(-1)
    grouped = image.double().view(2, 4, -1)
    torch.testing.assert_close(mean.double(), grouped.mean(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), grouped.var(-1, correction=0), rtol=1e-4, atol=0)
    own = (grouped - mean.unsqueeze(-1)) * torch.rsqrt(variance.unsqueeze(-1) + 1e-5)
    torch.testing.assert_close(own.view_as(image).float(), nn.GroupNorm(4, 8)(image), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_statistics_are_float32_in_any_precision(dtype: torch.dtype) -> None:
    image = torch.full((1, 4, 64, 64), 10.0, dtype=dtype)
    statistics = group_statistics(image, 2)
    assert statistics.dtype == torch.float32
    torch.testing.assert_close(statistics, torch.tensor([[[10.0, 0.0], [10.0, 0.0]]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_true_as_nn_group_norm(dtype: torch.dtype) -> None:
    """Where the mean is large, scale and shift in half precision would lose ten times as much."""
    image = (torch.randn((2, 8, 16, 16), generator=torch.Generator().manual_seed(0)) + 10).to(dtype)
    norm = nn.GroupNorm(4, 8).to(dtype).requires_grad_(False)
    truth = F.group_norm(image.double(), 4)

    def error(output: torch.Tensor) -> float:
        return float((output.double() - truth).square().mean().sqrt())

    whole = error(norm(image))
    patch_group_norm(norm, PatchContext(step=OneRank()))  # type: ignore[arg-type]
    output = norm(image)
    assert output.dtype == dtype and error(output) <= 1.1 * whole


def test_merged_variance_is_never_negative() -> None:
    """Also of predictions, which may overshoot below zero."""
    statistics = torch.tensor([[[[1.0, -0.5]]], [[[1.0, -0.1]]]])
    variance = merge(statistics, torch.tensor([0.5, 0.5]).view(-1, 1, 1))[..., 1]
    assert (variance >= 0).all()


def test_correction_stays_finite_where_its_formula_is_negative() -> None:
    """The own mean jumps from 0 to 10 with hardly any spread: E[x^2] - E[x]^2, shifted, is < 0."""
    stale = torch.tensor([[[[0.0, 1.0]]], [[[0.0, 1.0]]]])
    own = torch.tensor([[[10.0, 0.01]]])
    shares = torch.tensor([0.9, 0.1]).view(-1, 1, 1)
    stale[1, ..., 0] = 5.0
    mean, variance = correct(stale, own, 0, shares).unbind(-1)
    moments = (shares * (stale[..., 1] + stale[..., 0] ** 2)).sum(0) + (0.01 + 100.0) - 1.0
    assert float(moments - mean**2) < 0, "the case is not the one that the test is about"
    assert float(variance) == torch.tensor(0.01)
    assert torch.rsqrt(variance + 1e-5).isfinite().all()


def test_correction_without_change_is_the_stale_whole() -> None:
    stale = torch.tensor([[[[1.0, 2.0]]], [[[3.0, 4.0]]]])
    shares = torch.tensor([0.25, 0.75]).view(-1, 1, 1)
    torch.testing.assert_close(correct(stale, stale[1], 1, shares), merge(stale, shares))


class TwoRanks:
    """A displaced step between two equal patches; every statistic of the step before was 0 and 1."""

    rank, fuses = 0, False

    def __init__(self, own: torch.Tensor, statistics: StatisticsMode) -> None:
        self.statistics = statistics
        self.everyone = torch.tensor([0.0, 1.0]).expand(2, *own.shape).clone()

    def shares(self, input: torch.Tensor) -> torch.Tensor:
        return torch.full((2, 1, 1), 0.5)

    def read_statistics(self, input: torch.Tensor, groups: int) -> torch.Tensor:
        return self.everyone

    def send_statistics(self, everyone: torch.Tensor) -> None:
        assert everyone is self.everyone
        if self.statistics == "fresh":  # the peer's are the same
            everyone[1] = everyone[0]


@pytest.mark.parametrize("mode", ["stale", "corrected", "fresh", "local"])
def test_a_displaced_norm_uses_the_statistics_of_its_mode(
    mode: StatisticsMode,
) -> None:
    image = torch.randn((2, 8, 4, 4), generator=torch.Generator().manual_seed(0)) + 2
    own = group_statistics(image, 4)
    step, before = TwoRanks(own, mode), torch.tensor([0.0, 1.0]).expand(2, *own.shape)
    shares = step.shares(image)
    expected = {
        "stale": merge(torch.stack([own, before[1]]), shares),
        "corrected": correct(before, own, 0, shares),
        "fresh": own,
        "local": own,
    }[mode]
    norm = nn.GroupNorm(4, 8, eps=0.0, affine=False)
    patch_group_norm(norm, PatchContext(step=step))  # type: ignore[arg-type]
    mean, variance = expected.repeat_interleave(2, 1)[..., None, None].unbind(2)
    torch.testing.assert_close(norm(image), (image - mean) / variance.sqrt())
    sent = mode != "local"
    assert torch.equal(step.everyone[0], own) == sent, "others read what was sent, one step later"


@pytest.mark.parametrize("statistics", ["fresh", "stale"])
def test_old_rows_around_a_patch_are_normalized_by_the_statistics_of_this_step(
    statistics: Literal["fresh", "stale"],
) -> None:
    mix, window = Mix(statistics=statistics, halos="stale"), Window(3, 1, 1, (1, 1))
    partition = Partition(height=5, width=4, levels=0, world_size=2)  # patches of 3 and 2 rows
    generator = torch.Generator().manual_seed(0)
    before, now = (torch.randn((2, 8, 5, 4), generator=generator) * size for size in (1.0, 3.0))

    def rank(communicator: Communicator) -> torch.Tensor:
        norm, context = nn.GroupNorm(4, 8, affine=False), PatchContext()
        patch_group_norm(norm, context)
        norm.window = window  # type: ignore[assignment]
        exchange = Exchange(communicator, partition, mix, Weights())
        own = slice(*partition.rows(communicator.rank))
        for displaced, image in ((False, before), (True, now)):
            with exchange.step(displaced) as step, context.during(step):
                output: torch.Tensor = norm(image[:, :, own])
        return output

    upper, lower = run_in_lockstep(2, rank)
    shares = torch.tensor([3 / 5, 2 / 5]).view(-1, 1, 1)
    for own, output in enumerate((upper, lower)):
        parts = [
            (before if statistics == "stale" and peer != own else now).split([3, 2], 2) for peer in (0, 1)
        ]
        whole = merge(torch.stack([group_statistics(parts[peer][peer], 4) for peer in (0, 1)]), shares)
        rows = [(now if peer == own else before).split([3, 2], 2)[peer] for peer in (0, 1)]
        read = torch.cat([rows[0][:, :, -1:], rows[1]] if own else [rows[0], rows[1][:, :, :1]], 2)
        mean, variance = whole.repeat_interleave(2, 1)[..., None, None].unbind(2)
        inner = (read - mean) / (variance + 1e-5).sqrt()
        torch.testing.assert_close(output, F.pad(inner, (0, 0, *((0, 1) if own else (1, 0)))))
