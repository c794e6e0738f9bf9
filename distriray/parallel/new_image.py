"""Detection of a new image, for pipelines that call the network without saying when one starts."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch

from distriray.parallel.schedules import Moment


class _Seen(NamedTuple):
    timestep: float
    text: torch.Tensor
    scale: Any


class Signs(NamedTuple):
    """How a call differs from the one before of the same branch.

    Attributes:
        new_image: it does not go on from that one.
        new_text: text keys and values that were cached then are not valid, or not known to be.
    """

    new_image: bool
    new_text: bool


class NewImageDetector:
    """Compares every call of the network with the one before of the same guidance branch.

    An image starts where the text changes, where time goes back, and where a watched pipeline's scheduler has
    been given other timesteps. A driver that knows better says so to the engine, and needs none of this.
    """

    def __init__(self) -> None:
        self._last: dict[Hashable, _Seen] = {}

    def look(self, moment: Moment, text: torch.Tensor, scale: Any, branch: Hashable = None) -> Signs:
        """Compare a call with the one before.

        Texts are compared number by number only if nothing else tells a new image: that stops a GPU.

        Args:
            moment: of the call; timesteps fall from call to call within an image.
            text: prompt embeddings, (batch, tokens, channels).
            scale: what else the text's keys and values depend on, such as a LoRA's scale.
            branch: of guidance, where each has calls of its own.
        """
        timestep = moment.timestep
        last, self._last[branch] = self._last.get(branch), _Seen(timestep, text, scale)
        if last is None:
            return Signs(new_image=True, new_text=True)
        # Schedulers of second order repeat a timestep; without a scheduler to ask, it may be the next image.
        repeats = timestep == last.timestep and moment.renewed is None
        new_image = timestep > last.timestep or repeats or bool(moment.renewed)
        same_text = text is last.text or (not new_image and _equal(text, last.text))
        return Signs(new_image or not same_text, not same_text or scale != last.scale)


def _equal(text: torch.Tensor, other: torch.Tensor) -> bool:
    return text.shape == other.shape and torch.equal(text, other)
