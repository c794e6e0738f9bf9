"""Steps in which layers read what the peers sent one step ago."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from distriray.config import Kind, Mix, StatisticsMode
from distriray.parallel.exchange.bucket import Bucket, Buckets
from distriray.parallel.exchange.carriers import Carrier
from distriray.parallel.exchange.halos import PaddedPatch
from distriray.parallel.exchange.own import OwnKeysValues
from distriray.parallel.exchange.patch import Patch
from distriray.parallel.exchange.slots import LAYERS_CHANGED, Slot, Values
from distriray.parallel.exchange.step import Measure, Step


class DisplacedStep(Step):
    """Layers read stale values of some kinds; what they send of them leaves in the background, by buckets.

    When a bucket's last slot has been computed, its messages leave; when the next step reaches the bucket's
    first slot, it waits for them. So what is stale is always exactly one step old.

    Args:
        buckets: filled by the step before.
        steps: of the image that came before, from which stale values can be extrapolated.
    """

    displaced = True

    def __init__(
        self, patch: Patch, carriers: Mapping[Kind, Carrier], mix: Mix, buckets: Buckets, steps: int
    ) -> None:
        super().__init__(patch, carriers, mix)
        self._buckets = buckets
        self._steps = steps
        self._index = 0
        self._complete: list[Bucket] = []

    @property
    def statistics(self) -> StatisticsMode:
        return self.mix.statistics

    def read_statistics(self, input: torch.Tensor, groups: int) -> torch.Tensor:
        if not self.mix.is_stale("statistics"):
            return super().read_statistics(input, groups)
        bucket = self._enter(self._patch.statistics_slot(input, groups))
        return bucket.statistics.read(self._index)

    def send_statistics(self, everyone: torch.Tensor) -> None:
        if not self.mix.is_stale("statistics"):
            return super().send_statistics(everyone)
        self._leave(self._buckets[self._index])  # they leave with the bucket, from where the layer put them
        return None

    def _swap_norm(
        self, padded: PaddedPatch, input: torch.Tensor, groups: int, measure: Measure
    ) -> tuple[Values, torch.Tensor]:
        if self.mix.statistics == self.mix.halos == "fresh":
            return super()._swap_norm(padded, input, groups, measure)
        everyone = self.read_statistics(input, groups)
        measure(everyone[self.rank])
        self.send_statistics(everyone)
        return self._swap_halos(padded, input), everyone

    def _swap_halos(self, padded: PaddedPatch, input: torch.Tensor) -> Values:
        if not self.mix.is_stale("halos"):
            return super()._swap_halos(padded, input)
        bucket = self._enter(padded.slot)
        received = bucket.halos.read(self._index)
        bucket.halos.send(self._index, padded.sends(input))
        self._leave(bucket)
        return received

    def keys_values(self, own: OwnKeysValues, tokens: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        slot = self._patch.keys_values_slot(own, tokens)
        if not self.mix.is_stale("keys_values"):
            everyone = self._patch.scratch(slot.whole, own.like)
            self._swap_keys_values(own, slot, everyone)
        else:
            bucket = self._enter(slot)
            region = bucket.keys_values[self._index]
            everyone = region.read(self._index)
            region.send(self._index, own)
            self._leave(bucket)
        return everyone[:, 0].transpose(0, 1), everyone[:, 1].transpose(0, 1)

    @property
    def kind(self) -> Hashable:
        return "displaced"

    def skip(self) -> None:
        super().skip()
        slots = self._buckets.slots
        self._index = len(slots)
        entered = max((i for i, slot in enumerate(slots) if slot.kind != "halos"), default=0)
        self._complete = list(dict.fromkeys(self._buckets[i] for i in range(entered, len(slots))))

    def end(self) -> Buckets:
        self._turn(self._complete, None)
        if self._index < len(self._buckets.slots):
            raise RuntimeError(LAYERS_CHANGED)
        return self._buckets

    def _enter(self, slot: Slot) -> Bucket:
        """The bucket of the next slot, ready to be read.

        What is complete leaves, unless the slot is of halos: a norm may read them beside its statistics, the
        slot before.
        """
        if not self._buckets.has(self._index, slot):
            raise RuntimeError(LAYERS_CHANGED)
        bucket = self._buckets[self._index]
        complete: list[Bucket] = []
        if slot.kind != "halos":
            complete, self._complete = self._complete, []
        entered = bucket if self._index == bucket.first else None
        if complete or entered is not None:
            self._talk(lambda step: step._turn(complete, entered))
        return bucket

    def _leave(self, bucket: Bucket) -> None:
        if self._index == bucket.last:
            self._complete.append(bucket)
        self._index += 1

    def _turn(self, complete: list[Bucket], entered: Bucket | None) -> None:
        """Send buckets whose last slot is over, and wait for the one whose first slot begins.

        Not earlier: messages are received into the buffers that the layer of the last slot was still reading.
        """
        for bucket in complete:
            bucket.launch()
        if entered is not None:
            self.waits += 1
            with self.waiting.buckets:
                entered.wait()
            entered.predict(self._steps)
