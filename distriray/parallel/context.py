"""Context of a call: what the layers of one network look up during it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distriray.parallel.exchange.steps import Step


@dataclass(eq=False)
class PatchContext:
    """What the layers of one network share; the network's engine or decoder owns it and writes it.

    Attributes:
        step: the step that layers exchange in; None outside a call and in a gang of one, where they behave
            as the layers that they replace.
        new_text: whether text keys and values that layers have cached are no longer valid.
        caches_text: whether all cross-attention is known to be given the text of the call.
    """

    step: Step | None = None
    new_text: bool = True
    caches_text: bool = True

    @contextmanager
    def during(self, step: Step | None) -> Iterator[None]:
        """Let the layers exchange in `step` for as long as this lasts."""
        self.step = step
        try:
            yield
        finally:
            self.step = None
