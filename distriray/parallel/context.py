"""Context of a call: what the layers of one network look up during it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distriray.parallel.exchange.step import Step


@dataclass(eq=False)
class PatchContext:
    """State that the layers of one network share; the network's engine or decoder owns it and writes it.

    Attributes:
        step: the step that layers exchange in; None outside a call and in a gang of one, where they behave
            as the layers that they replace.
        exchanges, fuses: whether there is one, and whether it `fuses`. Layers are compiled for each value of
            what they look up, so that they ask this, and not the step.
        new_text: whether text keys and values that layers have cached are no longer valid.
        caches_text: whether all cross-attention is known to be given the text of the call.
    """

    step: Step | None = None
    exchanges: bool = field(default=False, init=False)
    fuses: bool = field(default=False, init=False)
    new_text: bool = True
    caches_text: bool = True

    def __post_init__(self) -> None:
        self._turn_to(self.step)

    @contextmanager
    def during(self, step: Step | None) -> Iterator[None]:
        """Let the layers exchange in `step` for as long as this lasts."""
        self._turn_to(step)
        try:
            yield
        finally:
            self._turn_to(None)

    def _turn_to(self, step: Step | None) -> None:
        self.step, self.exchanges, self.fuses = step, step is not None, step is not None and step.fuses
