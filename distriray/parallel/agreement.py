"""Checks that all ranks of a gang do the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from distriray.collective.all_gather import all_gather
from distriray.collective.base import Communicator
from distriray.errors import GangMismatch

_FINGERPRINT = 16  # numbers, of which `_compare` uses as many as it needs


class Compared(NamedTuple):
    """What the ranks of a gang compare, by the names that an error calls it.

    Attributes:
        numbers: that must be equal.
        tensors: whose sums must be, within the tolerance that different devices need.
    """

    numbers: Mapping[str, float]
    tensors: Mapping[str, torch.Tensor]


def described(
    tensor: torch.Tensor, dimensions: Sequence[str] = ("batch", "channels", "rows", "columns")
) -> dict[str, float]:
    """Shape and dtype of latents as numbers, by the names of the dimensions."""
    shape = dict(zip(dimensions, tensor.shape, strict=True))
    return {**shape, "precision of the latents": torch.finfo(tensor.dtype).eps}


def check_same_image(communicator: Communicator, compared: Compared, step: int, timestep: float) -> None:
    """Compare what the ranks were called with, before anything of a size that depends on it is sent.

    Args:
        compared: what decides the picture, and the size of messages.
        step: number of the step within the image.
        timestep: of the scheduler.

    Raises:
        GangMismatch: on every rank, naming what differs and the values.
        GangBroken: a peer died or hung.
    """
    numbers = {**compared.numbers, "step": step, "timestep": timestep}
    _compare(communicator, numbers, compared.tensors)


def check_same_latents(communicator: Communicator, latents: torch.Tensor, in_patches: bool) -> None:
    """Compare what the ranks are to decode, and whether they can decode it in patches.

    Args:
        latents: (batch, channels, rows, columns).
        in_patches: whether this rank's decoder and these latents can be cut into patches.

    Raises:
        GangMismatch: on every rank, naming what differs and the values.
        GangBroken: a peer died or hung.
    """
    numbers = {**described(latents), "decoding in patches": float(in_patches)}
    _compare(communicator, numbers, {"sum of the latents": latents})


def _compare(
    communicator: Communicator, numbers: Mapping[str, float], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Raise unless all ranks have exactly these numbers, and nearly the sums of these tensors.

    The message has one size, whatever is compared.
    """
    values = {name: (float(number), 0.0) for name, number in numbers.items()}
    for name, tensor in tensors.items():
        whole = tensor.double()
        values[name] = float(whole.sum()), 1e-3 * float(whole.abs().sum()) + 1e-6
    fingerprint = [float(len(values)), *(value for value, _ in values.values())]
    mine = torch.zeros(_FINGERPRINT, dtype=torch.float64, device=communicator.device)
    mine[: len(fingerprint)] = torch.tensor(fingerprint, dtype=torch.float64)
    everyone = [mine if r == communicator.rank else mine.clone() for r in range(communicator.world_size)]
    all_gather(communicator, everyone).wait()
    received = {peer: everyone[peer].tolist() for peer in communicator.peers}
    communicator.check()  # on a GPU a transfer that was aborted ends like any other, and leaves garbage
    for rank, (count, *other) in received.items():
        who = f"rank {communicator.rank} and rank {rank} were called with different inputs"
        if count != len(values):
            raise GangMismatch(
                f"{who}: one is denoising while the other is decoding; let all ranks make the same calls"
            )
        for (name, (a, tolerance)), b in zip(values.items(), other, strict=False):
            if not _alike(a, b, tolerance):
                raise GangMismatch(
                    f"{who}: {name} {a:g} and {b:g}; give all ranks the same arguments and equally seeded "
                    "generators"
                )


def _alike(a: float, b: float, tolerance: float) -> bool:
    """Whether two numbers agree; two infinities or NaNs do: what made them is not the gang's to judge."""
    return a == b or (math.isnan(a) and math.isnan(b)) or abs(a - b) <= tolerance < math.inf
