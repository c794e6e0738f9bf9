"""What all ranks of a gang tell one another: every step's noise, the picture, and that they do the same."""

from __future__ import annotations

import math
import time

import torch

from distriray.collective.base import Communicator
from distriray.errors import GangMismatch
from distriray.parallel.partition import Partition

_HEADER = 16  # bytes: yield, cancel and drift as float32, and padding
_FINGERPRINT = 16  # numbers, of which `_compare` uses as many as it needs


class Gather:
    """The synchronous gather of the predicted noise or of the picture, with each rank's flags on board.

    Args:
        communicator: the whole gang, over all halves of the batch.
        partition: the rows of the ranks that share one half.
        shape: of the whole noise, (batch, channels, rows, columns).
        dtype: of the noise.
    """

    def __init__(
        self,
        communicator: Communicator,
        partition: Partition,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.wait_s = 0.0
        self._communicator = communicator
        batch, channels, _, columns = shape
        ranks, self._rank = communicator.world_size, communicator.rank
        part_batch = batch * partition.world_size // ranks
        self._places: list[tuple[slice, slice]] = []
        self._messages: list[torch.Tensor] = []
        self._noises: list[torch.Tensor] = []
        for rank in range(ranks):
            half, part = divmod(rank, partition.world_size)
            rows = slice(*partition.rows(part))
            noise_shape = (part_batch, channels, rows.stop - rows.start, columns)
            size = part_batch * channels * noise_shape[2] * columns * dtype.itemsize
            message = torch.zeros(_HEADER + size, dtype=torch.uint8, device=communicator.device)
            self._places.append((slice(half * part_batch, (half + 1) * part_batch), rows))
            self._messages.append(message)
            self._noises.append(message[_HEADER:].view(dtype).view(noise_shape))

    def __call__(
        self, noise: torch.Tensor, asked: tuple[bool, ...], drift: float
    ) -> tuple[torch.Tensor, tuple[bool, bool], float]:
        """The whole noise, whether any rank asked to yield or to cancel, and the largest drift."""
        own = self._messages[self._rank]
        header = torch.tensor([*map(float, asked), drift, 0.0], dtype=torch.float32)
        own[:_HEADER].view(torch.float32).copy_(header)
        self._noises[self._rank].copy_(noise)
        peers = [rank for rank in range(self._communicator.world_size) if rank != self._rank]
        started = time.perf_counter()
        self._communicator.exchange(
            dict.fromkeys(peers, own), {peer: self._messages[peer] for peer in peers}
        ).wait()
        self.wait_s = time.perf_counter() - started
        whole = noise.new_empty(self.shape)
        for (batch, rows), part in zip(self._places, self._noises, strict=True):
            whole[batch, :, rows] = part
        headers = torch.stack([message[:_HEADER].view(torch.float32) for message in self._messages])
        yielding, cancelled, drift, _ = headers.max(0).values.tolist()
        _trust(self._communicator)
        return whole, (bool(yielding), bool(cancelled)), drift


def check_same_image(
    communicator: Communicator, sample: torch.Tensor, timestep: float, text: torch.Tensor, step: int
) -> None:
    """Compare what the ranks were called with, before anything of a size that depends on it is sent.

    Latents and text are compared by their sums, with the tolerance that different devices need.

    Raises:
        GangMismatch: on every rank, naming what differs and the values.
        GangBroken: a peer died or hung meanwhile.
    """
    shapes = {"text batch": text.shape[0], "text tokens": text.shape[1]}
    numbers = {**_kind(sample), **shapes, "step": step, "timestep": timestep}
    _compare(communicator, numbers, {"sum of the latents": sample, "sum of the prompt embeddings": text})


def check_same_latents(communicator: Communicator, latents: torch.Tensor, in_patches: bool) -> None:
    """The same for what is to be decoded, and for whether this rank's decoder can be cut into patches."""
    numbers = {**_kind(latents), "decoding in patches": float(in_patches)}
    _compare(communicator, numbers, {"sum of the latents": latents})


def _kind(sample: torch.Tensor) -> dict[str, float]:
    """Shape and dtype as numbers."""
    shape = dict(zip(("batch", "channels", "rows", "columns"), sample.shape, strict=True))
    return {**shape, "precision of the latents": torch.finfo(sample.dtype).eps}


def _compare(communicator: Communicator, numbers: dict[str, float], tensors: dict[str, torch.Tensor]) -> None:
    """Raise unless all ranks have these numbers exactly, and the sums of these tensors about.

    The message has one size, whatever is compared.
    """
    values = {name: (float(number), 0.0) for name, number in numbers.items()}
    for name, tensor in tensors.items():
        whole = tensor.double()
        values[name] = float(whole.sum()), 1e-3 * float(whole.abs().sum()) + 1e-6
    fingerprint = [float(len(values)), *(value for value, _ in values.values())]
    mine = torch.zeros(_FINGERPRINT, dtype=torch.float64, device=communicator.device)
    mine[: len(fingerprint)] = torch.tensor(fingerprint, dtype=torch.float64)
    theirs = {r: torch.empty_like(mine) for r in range(communicator.world_size) if r != communicator.rank}
    communicator.exchange(dict.fromkeys(theirs, mine), theirs).wait()
    received = {rank: other.tolist() for rank, other in theirs.items()}
    _trust(communicator)
    for rank, (count, *other) in received.items():
        who = f"rank {communicator.rank} and rank {rank} were called with different inputs"
        if count != len(values):
            raise GangMismatch(
                f"{who}: one is at a step of the U-Net and one decodes; let all ranks make the same calls"
            )
        for (name, (a, tolerance)), b in zip(values.items(), other, strict=False):
            if not _alike(a, b, tolerance):
                raise GangMismatch(
                    f"{who}: {name} {a:g} and {b:g}; give all ranks the same arguments and equally seeded "
                    "generators"
                )


def _alike(a: float, b: float, tolerance: float) -> bool:
    """Also where both are not finite: what made them so is not the gang's to judge."""
    return a == b or (math.isnan(a) and math.isnan(b)) or abs(a - b) <= tolerance < math.inf


def _trust(communicator: Communicator) -> None:
    """Raise what broke the communicator, after received values came to the host.

    On a GPU `wait` returns before the transfer is over. One that was aborted ends too, and leaves garbage.
    """
    if communicator.broken:
        communicator.exchange({}, {})
