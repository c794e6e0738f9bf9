"""Detection of a new image, for pipelines that call the network without saying when one starts."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch


class _Seen(NamedTuple):
    timestep: float
    text: torch.Tensor
    scale: Any


class Signs(NamedTuple):
    """How a call differs from the one before of the same branch.

    Attributes:
        new_image: it does not go on from that one.
        new_text: text keys and values that were cached then are not valid.
    """

    new_image: bool
    new_text: bool


class NewImageDetector:
    """Compares every call of the network with the one before of the same guidance branch.

    An image starts where the text changes, where time goes back, and where a watched pipeline's scheduler has
    been given other timesteps. A driver that knows better says so to the engine, and needs none of this.
    """

    def __init__(self) -> None:
        self._timesteps: WeakKeyDictionary[Any, torch.Tensor | None] = WeakKeyDictionary()
        self._last: dict[Hashable, _Seen] = {}

    def watch(self, pipeline: Any) -> None:
        """Treat a new `timesteps` tensor on this pipeline's scheduler as the start of an image."""
        self._timesteps.setdefault(pipeline, None)

    def look(self, timestep: float, text: torch.Tensor, scale: Any, branch: Hashable = None) -> Signs:
        """Compare a call with the one before.

        Args:
            timestep: falls from call to call within an image.
            text: prompt embeddings, (batch, tokens, channels).
            scale: what else the text's keys and values depend on, such as a LoRA's scale.
            branch: of guidance, where each has calls of its own.
        """
        last, self._last[branch] = self._last.get(branch), _Seen(timestep, text, scale)
        new_schedule = self._new_schedule()
        if last is None:
            return Signs(new_image=True, new_text=True)
        same_text = text is last.text or (text.shape == last.text.shape and torch.equal(text, last.text))
        # Schedulers of second order repeat a timestep; without a scheduler to ask, it may be the next image.
        repeats = timestep == last.timestep and not self._timesteps
        new_image = not same_text or timestep > last.timestep or repeats or new_schedule
        return Signs(new_image, not same_text or scale != last.scale)

    def _new_schedule(self) -> bool:
        """Whether a watched pipeline's scheduler has been given other timesteps since the last call."""
        changed = False
        for pipeline, before in list(self._timesteps.items()):
            scheduler = getattr(pipeline, "scheduler", None)
            self._timesteps[pipeline] = timesteps = getattr(scheduler, "timesteps", None)
            changed |= timesteps is not before
        return changed
