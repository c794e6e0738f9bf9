"""Detection of a new image, for pipelines that call the network without saying when one starts."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch


class Signs(NamedTuple):
    """How a call differs from the one before.

    Attributes:
        new_image: it does not go on from that one.
        new_text: text keys and values that were cached then are not valid.
    """

    new_image: bool
    new_text: bool


class NewImageDetector:
    """Compares every call of the network with the one before.

    An image starts where the text changes, where time goes back, and where a watched pipeline's scheduler has
    been given other timesteps. A driver that knows better says so to the engine, and needs none of this.
    """

    def __init__(self) -> None:
        self._timesteps: WeakKeyDictionary[Any, torch.Tensor | None] = WeakKeyDictionary()
        self._timestep = float("inf")
        self._text: torch.Tensor | None = None
        self._scale: Any = None

    def watch(self, pipeline: Any) -> None:
        """Treat a new `timesteps` tensor on this pipeline's scheduler as the start of an image."""
        self._timesteps.setdefault(pipeline, None)

    def look(self, timestep: float, text: torch.Tensor, scale: Any) -> Signs:
        """Compare a call with the one before.

        Args:
            timestep: of the scheduler; falls from call to call within an image.
            text: prompt embeddings, (batch, tokens, channels).
            scale: what else the text's keys and values depend on, such as a LoRA's scale.
        """
        same_text = text is self._text or (
            self._text is not None and text.shape == self._text.shape and torch.equal(text, self._text)
        )
        # Schedulers of second order repeat a timestep; without a scheduler to ask, it may be the next image.
        repeats = timestep == self._timestep and not self._timesteps
        new_image = not same_text or timestep > self._timestep or repeats
        for pipeline, before in list(self._timesteps.items()):
            scheduler = getattr(pipeline, "scheduler", None)
            self._timesteps[pipeline] = timesteps = getattr(scheduler, "timesteps", None)
            new_image |= timesteps is not before
        new_text = not same_text or scale != self._scale
        self._timestep, self._text, self._scale = timestep, text, scale
        return Signs(new_image, new_text)
