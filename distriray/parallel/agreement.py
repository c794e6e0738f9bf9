"""Checks that all ranks of a gang do the same."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from itertools import combinations
from os.path import commonprefix
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from distriray.collective.all_gather import all_gather
from distriray.collective.base import Communicator
from distriray.config import ParallelConfig
from distriray.errors import GangMismatch
from distriray.parallel.sums import WEIGHTED, Sums

_FINGERPRINT = 160  # numbers, of which `_compare` uses as many as it needs
_TEXT_BYTES = 1024  # of a text that ranks tell each other once theirs differ
_SHOWN, _SHOWN_BEFORE = 80, 20  # characters of it in an error, from so many before the two part
_NEAR = 3e-3  # of what networks have computed, at least: devices of another kind round otherwise
_EQUAL = 1e-6  # of what was given, and is only summed in another order
_OF_ONE_RANK = {"cuda_graphs", "max_buffer_bytes"}  # of a configuration: nobody else's matter

Tensors = torch.Tensor | Sequence[torch.Tensor] | None


class Compared(NamedTuple):
    """Values that the ranks of a gang compare, by the names that an error gives them.

    The names are the same whatever a call is given: what is not given is None.

    Attributes:
        numbers: that must be equal.
        near: tensors that must be equal, within the tolerance that different devices need.
        equal: tensors that must be equal.
        texts: that must be equal, and may be long.
    """

    numbers: Mapping[str, float | None]
    near: Mapping[str, Tensors] = {}
    equal: Mapping[str, Tensors] = {}
    texts: Mapping[str, str] = {}

    def plus(self, **more: Mapping[str, Any]) -> Compared:
        """The same and further values of each kind."""
        return self._replace(**{kind: {**getattr(self, kind), **values} for kind, values in more.items()})


def described(latents: torch.Tensor) -> dict[str, float]:
    """Shape and dtype of latents, which may be packed as tokens, as numbers by the names of dimensions."""
    packed = latents.ndim == 3
    names = ("batch", "tokens", "channels") if packed else ("batch", "channels", "rows", "columns")
    shape = dict(zip(names, latents.shape, strict=True))
    return {**shape, "precision of the latents": torch.finfo(latents.dtype).eps}


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """All tensors of an argument that holds some, or none."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def check_same_image(
    communicator: Communicator,
    compared: Sequence[Compared],
    config: ParallelConfig,
    step: int,
    timestep: float,
    num_steps: int | None,
    refused: bool,
) -> None:
    """Compare what the ranks were called with, before anything of a size that depends on it is sent.

    Args:
        compared: what decides the picture, and the size of messages, of each call that ranks make.
        config: by which this rank shares a step.
        step: number of the step within the image.
        timestep: of the scheduler.
        num_steps: of the whole image; None if it is not known.
        refused: whether this rank refuses the call.

    Raises:
        GangMismatch: on every rank, naming what differs and the values.
        GangBroken: a peer died or hung.
    """
    shared = {
        f"parallel configurations' {field}": json.dumps(value)
        for field, value in config.model_dump(mode="json", exclude=_OF_ONE_RANK).items()
    }
    for each in compared:
        numbers = {
            "refused calls": float(refused),
            "calls made at once": len(compared),
            **each.numbers,
            "number of steps": num_steps,
            "step": step,
            "timestep": timestep,
        }
        texts = {**each.texts, **shared}
        _compare(communicator, each._replace(numbers=numbers, texts=texts))


def check_same_latents(
    communicator: Communicator, latents: torch.Tensor, in_patches: bool, weights: Tensors
) -> None:
    """Compare what the ranks are to decode, with which weights, and whether they can decode it in patches.

    Args:
        latents: (batch, channels, rows, columns).
        in_patches: whether this rank's decoder and these latents can be cut into patches.
        weights: some of this rank's decoder's.

    Raises:
        GangMismatch: on every rank, naming what differs and the values.
        GangBroken: a peer died or hung.
    """
    numbers = {**described(latents), "decoding in patches": float(in_patches)}
    _compare(communicator, Compared(numbers, {"latents": latents}, {"weights of the decoder": weights}))


def _compare(communicator: Communicator, compared: Compared) -> None:
    """Raise, on all ranks alike, unless they have the same of everything.

    The message has one size, whatever is compared. Texts that differ are told in another one.
    """
    names = [*compared.numbers, *compared.near, *compared.equal, *compared.texts]
    numbers = [
        float(zlib.crc32("\0".join(names).encode())),
        *(math.nan if number is None else float(number) for number in compared.numbers.values()),
        *(float(zlib.crc32(text.encode())) for text in compared.texts.values()),
    ]
    device = communicator.device
    sums = [
        *(_summed(tensors, _NEAR, device) for tensors in compared.near.values()),
        *(_summed(tensors, _EQUAL, device) for tensors in compared.equal.values()),
    ]
    mine = torch.cat((torch.tensor(numbers, dtype=torch.float64, device=device), *sums))
    if len(mine) > _FINGERPRINT:
        raise ValueError(f"{len(mine)} numbers to compare; a message of {_FINGERPRINT} holds no more")
    mine = F.pad(mine, (0, _FINGERPRINT - len(mine)))
    everyone = [mine if r == communicator.rank else mine.clone() for r in range(communicator.world_size)]
    all_gather(communicator, everyone).wait()
    table = torch.stack(everyone).tolist()
    communicator.check()  # on a GPU a transfer that was aborted ends like any other, and leaves garbage
    columns = iter(zip(*table, strict=True))
    different = _different(next(columns))
    if different is not None:
        raise GangMismatch(
            f"{_who(*different)}: one is denoising while the other is decoding; let all ranks make the same "
            "calls"
        )
    for name in compared.numbers:
        _check(name, next(columns))
    for name, text in compared.texts.items():
        different = _different(next(columns))
        if different is not None:
            texts = _texts_of_all(communicator, text)
            raise _mismatch(*different, f"{name}{_apart(*(texts[rank] for rank in different))}")
    for name in (*compared.near, *compared.equal):
        tolerance = max(next(columns))
        _check(f"sum of the {name}", next(columns), tolerance)
        for _ in range(WEIGHTED):
            _check(f"weighted sum of the {name}", next(columns), tolerance)


def _check(name: str, values: Sequence[float], tolerance: float = 0.0) -> None:
    """Raise unless all ranks' values are alike."""
    different = _different(values, tolerance)
    if different is not None:
        first, second = different
        raise _mismatch(first, second, f"{name} {values[first]:g} and {values[second]:g}")


def _mismatch(first: int, second: int, what: str) -> GangMismatch:
    return GangMismatch(
        f"{_who(first, second)}: {what}; give all ranks the same arguments and adapters, and equally seeded "
        "generators"
    )


def _texts_of_all(communicator: Communicator, text: str) -> list[str]:
    """The beginning of a text of every rank, by rank; all of them call it."""
    own = text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
    mine = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(communicator.device)
    everyone = [mine if r == communicator.rank else mine.clone() for r in range(communicator.world_size)]
    all_gather(communicator, everyone).wait()
    texts = [bytes(each.tolist()).rstrip(b"\0").decode(errors="ignore") for each in everyone]
    communicator.check()  # as in `_compare`
    return texts


def _apart(first: str, second: str) -> str:
    """Two texts where they part, for behind their name; nothing if they part beyond what was sent."""
    if first == second:
        return ""
    begin = 0
    if max(len(first), len(second)) > _SHOWN:
        begin = max(0, len(commonprefix([first, second])) - _SHOWN_BEFORE)

    def shown(text: str) -> str:
        part = text[begin : begin + _SHOWN]
        return f"{'…' if begin else ''}{part}{'…' if len(text) > begin + _SHOWN else ''}" or "nothing"

    return f" {shown(first)} and {shown(second)}"


def _different(values: Sequence[float], tolerance: float = 0.0) -> tuple[int, int] | None:
    """Two ranks whose values differ."""
    pairs = combinations(range(len(values)), 2)
    return next(((a, b) for a, b in pairs if not _alike(values[a], values[b], tolerance)), None)


def _who(first: int, second: int) -> str:
    return f"rank {first} and rank {second} were called with different inputs"


def _alike(a: float, b: float, tolerance: float) -> bool:
    """Whether two numbers agree; two infinities or NaNs do: what made them is not the gang's to judge."""
    return a == b or (math.isnan(a) and math.isnan(b)) or abs(a - b) <= tolerance < math.inf


def _summed(tensors: Tensors, tolerance: float, device: torch.device) -> torch.Tensor:
    """The tolerance of the `Sums` of tensors together, and the sums, on the gang's device."""
    listed = [tensors] if isinstance(tensors, torch.Tensor) else tensors or ()
    total = torch.zeros(2 + WEIGHTED, dtype=torch.float64, device=device)
    for place, tensor in enumerate(listed):
        rounding = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
        sums = Sums(tensor.numel(), tensor.device)(tensor).to(device)
        sums[0] *= max(tolerance, 5 * rounding if tolerance == _NEAR else 0.0)
        sums[1:] *= 1.0 + place / 7  # so that it counts in which order they are
        total += sums
    return total
