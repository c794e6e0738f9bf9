"""Steps in which every rank waits for its peers' fresh values."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from distriray.config import Kind, Mix
from distriray.parallel.exchange.bucket import Buckets
from distriray.parallel.exchange.carriers import Carrier
from distriray.parallel.exchange.halos import PaddedPatch
from distriray.parallel.exchange.memory import Memory
from distriray.parallel.exchange.own import OwnKeysValues
from distriray.parallel.exchange.patch import Patch
from distriray.parallel.exchange.slots import Slot, Values
from distriray.parallel.exchange.step import Measure, Step


class SynchronousStep(Step):
    """Every value is swapped at once, and `memory` keeps those that the next step reads as stale ones.

    Args:
        memory: keeps them.
    """

    displaced = False
    statistics = "fresh"

    def __init__(self, patch: Patch, carriers: Mapping[Kind, Carrier], mix: Mix, memory: Memory) -> None:
        super().__init__(patch, carriers, mix)
        self._memory = memory

    @property
    def drift(self) -> torch.Tensor | float:
        return self._memory.drift

    def read_statistics(self, input: torch.Tensor, groups: int) -> torch.Tensor:
        self._expect(self._patch.statistics_slot(input, groups))
        return super().read_statistics(input, groups)

    def send_statistics(self, everyone: torch.Tensor) -> None:
        super().send_statistics(everyone)
        self._keep("statistics", dict(enumerate(everyone)))

    def _swap_halos(self, padded: PaddedPatch, input: torch.Tensor) -> Values:
        self._expect(padded.slot)
        received = super()._swap_halos(padded, input)
        self._keep("halos", received)
        return received

    def _swap_norm(
        self, padded: PaddedPatch, input: torch.Tensor, groups: int, measure: Measure
    ) -> tuple[Values, torch.Tensor]:
        self._expect(self._patch.statistics_slot(input, groups))
        rows, everyone = super()._swap_norm(padded, input, groups, measure)
        self._keep("statistics", dict(enumerate(everyone)))
        self._expect(padded.slot)
        self._keep("halos", rows)
        return rows, everyone

    def keys_values(self, own: OwnKeysValues, tokens: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        slot = self._patch.keys_values_slot(own, tokens)
        self._expect(slot)
        lasts = self.mix.is_stale("keys_values") and not self._memory.borrows
        everyone = own.like.new_empty(slot.whole) if lasts else self._patch.scratch(slot.whole, own.like)
        parts = self._swap_keys_values(own, slot, everyone)
        self._keep("keys_values", dict(enumerate(parts)))
        return everyone[:, 0].transpose(0, 1), everyone[:, 1].transpose(0, 1)

    @property
    def kind(self) -> Hashable:
        return self._memory.kind

    def skip(self) -> None:
        super().skip()
        self._memory.skip()

    def end(self) -> Buckets | None:
        return self._memory.end()

    def _expect(self, slot: Slot) -> None:
        if self.mix.is_stale(slot.kind):
            self._memory = self._memory.expect(slot)

    def _keep(self, kind: Kind, everyone: Values) -> None:
        if self.mix.is_stale(kind):
            self._memory.keep(everyone)
