"""One turn after the other of every gang that is projected, by processes of this machine."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from diffusers import UNet2DConditionModel

from bench.barrier import barrier
from bench.projection.links import Link
from bench.projection.share import Share, measure_gang, measure_share
from bench.published import PUBLISHED, random_network
from distriray import ParallelConfig
from distriray.collective import Communicator, all_gather
from distriray.config import ExchangeMode
from distriray.landscapes import MODEL_DIR


@dataclass(frozen=True)
class Case:
    """A gang that is projected, and how it shares a step."""

    size: int
    ranks: int
    split: bool
    exchange: ExchangeMode

    @property
    def exchanges(self) -> bool:
        """Whether the ranks share the rows of a picture at all."""
        return self.patches > 1

    @property
    def patches(self) -> int:
        """Ranks that share the rows of a picture, the first ones of the gang for one."""
        return self.ranks // self.halves

    @property
    def halves(self) -> int:
        """Into how many the guidance branches split it."""
        return 2 if self.split else 1

    @property
    def config(self) -> ParallelConfig:
        return ParallelConfig(exchange=self.exchange, warmup_steps=1, cfg_parallel=self.split)


@dataclass
class Round:
    """Findings of one process in one turn of all cases."""

    shares: dict[Case, Share] = field(default_factory=dict)
    measured: dict[Case, float] = field(default_factory=dict)
    loopback: Link | None = None


def cases(sizes: Sequence[int], ranks: Sequence[int], exchanges: Sequence[ExchangeMode]) -> list[Case]:
    """Every gang, with guidance split where it can be, in every mode where modes differ."""
    every = (
        Case(size, count, split, exchange)
        for size in sizes
        for count in ranks
        for split in (True, False)
        for exchange in exchanges
        if count % 2 == 0 or not split
    )
    return [case for case in every if case.exchanges or case.exchange == exchanges[0]]


def alone(case: Case, exchanges: Sequence[ExchangeMode]) -> Case:
    """The same picture by one rank, among `cases`."""
    return Case(case.size, 1, False, exchanges[0])


def places(patches: int, halves: int = 1) -> list[int]:
    """The ranks whose shares are measured: an outer one, and one with a neighbour on each side if one has.

    Where halves share no rows it is a rank of each, so that two cores compute as they would.
    """
    return sorted({0, patches // 2 or halves - 1})


def measure(communicator: Communicator, arguments: argparse.Namespace) -> list[Round]:
    """All cases in turn, round by round. Processes measure different ranks of a gang at the same time."""
    device, dtype = communicator.device, getattr(torch, arguments.dtype)
    if arguments.model == "sdxl":
        unet = random_network(PUBLISHED["sdxl"].make, device, dtype)
    else:
        unet = UNet2DConditionModel.from_pretrained(MODEL_DIR, subfolder="unet").to(device, dtype).eval()
    rounds = []
    for _ in range(arguments.rounds):
        taken = Round()
        if communicator.world_size > 1:
            taken.loopback = measure_loopback(communicator)
        for case in cases(arguments.sizes, arguments.ranks, arguments.exchange):
            barrier(communicator)
            own = places(case.patches, case.halves)[communicator.rank :: communicator.world_size]
            shares = [
                measure_share(unet, rank, case.ranks, case.size, arguments.steps, case.config) for rank in own
            ]
            if shares:
                taken.shares[case] = max(shares, key=lambda share: share.seconds)
            if communicator.world_size == case.ranks > 1:
                barrier(communicator)
                taken.measured[case] = measure_gang(
                    unet, communicator, case.size, arguments.steps, case.config
                )
        barrier(communicator)
        rounds.append(taken)
    return rounds


def measure_loopback(communicator: Communicator, nbytes: int = 2**22) -> Link:
    """What the processes of this machine have between them: each pair swaps one byte, then `nbytes`."""
    seconds = {}
    for size in (1, nbytes):
        tensors = [torch.zeros(size, dtype=torch.uint8) for _ in range(communicator.world_size)]
        times = []
        for _ in range(30):
            started = time.perf_counter()
            all_gather(communicator, tensors).wait()
            times.append(time.perf_counter() - started)
        seconds[size] = median(times)
    transfer_s = max(seconds[nbytes] - seconds[1], 1e-9)
    return Link("loopback", seconds[1], len(communicator.peers) * nbytes / transfer_s, hides=False)


def slowest(taken: tuple[Round, ...]) -> Round:
    """One round of all processes as one: a gang is as slow as its slowest rank."""
    shares = {
        case: max((r.shares[case] for r in taken if case in r.shares), key=lambda share: share.seconds)
        for case in taken[0].shares
    }
    measured = {case: max(r.measured[case] for r in taken) for case in taken[0].measured}
    return Round(shares, measured, taken[0].loopback)
