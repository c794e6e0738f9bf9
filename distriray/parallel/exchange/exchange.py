"""The asynchronous swap of activations between a gang's ranks.

Layers call `halos`, `statistics` and `keys_values` in the order of the forward pass; the k-th call of a step
is slot k. A synchronous step moves every slot at once. A displaced step moves *buckets*, runs of consecutive
slots: when a bucket's last slot has been computed, its messages leave in the background; when the next step
reaches the bucket's first slot, it waits for them. What a layer reads of its peers is thus always exactly one
step old.
"""

from __future__ import annotations

import contextlib
import time
from typing import Protocol

import torch

from distriray.collective.base import Communicator
from distriray.config import ParallelConfig
from distriray.errors import GangBroken
from distriray.parallel.exchange.bucket import Bucket
from distriray.parallel.exchange.halos import PaddedPatch
from distriray.parallel.exchange.slots import Slot, keys_values_slot, statistics_slot
from distriray.parallel.layers.group_norm import correct, merge
from distriray.parallel.partition import Partition, Window

# Messages of a bucket have the time between its last slot and its first one, a step later, to arrive: the
# more buckets, the nearer to a whole step, and the more messages.
BUCKETS = 4


class Exchanging(Protocol):
    """What a layer looks its exchange up in; None outside of a call, and within a gang of one."""

    exchange: Exchange | None


class Exchange:
    """The slots, buffers and transfers of one gang for one shape of its input.

    Args:
        communicator: the ranks among which one image's rows are spread.
        partition: who owns which rows.
        config: mode, group norm and prediction.
    """

    def __init__(self, communicator: Communicator, partition: Partition, config: ParallelConfig) -> None:
        self.communicator = communicator
        self.partition = partition
        self.config = config
        self.rank = communicator.rank
        self.peers = [peer for peer in range(communicator.world_size) if peer != self.rank]
        self.displacing = False
        self.wait_s = 0.0
        self._slots: list[Slot] = []
        self._buckets: list[Bucket] = []
        self._bucket_of: list[Bucket] = []
        self._recorded: list[dict[int, torch.Tensor]] | None = None
        self._seen: list[Slot] = []
        self._complete: Bucket | None = None
        self._index = 0
        self._history = 0
        self._measure = False
        self._change = [0.0, 0.0]
        self._shares: dict[tuple[int, ...], torch.Tensor] = {}
        self._padded: dict[tuple[object, ...], PaddedPatch] = {}

    @property
    def buffer_bytes(self) -> int:
        """Memory held between steps."""
        padded = sum(patch.whole.nbytes for patch in self._padded.values())
        return padded + sum(bucket.nbytes for bucket in self._buckets)

    # A step

    def begin(self, displace: bool, measure_drift: bool = False) -> None:
        """Start a step: synchronous, or displaced (which needs a step before it)."""
        self.displacing = displace
        self.wait_s = 0.0
        self._complete = None
        self._index = 0
        self._measure = measure_drift
        self._change = [0.0, 0.0]
        keeps = self.config.exchange == "displaced"
        self._recorded = [] if keeps and not self._buckets else None
        self._seen = []

    def end(self) -> None:
        """Finish a step; the first one of a shape lays the buffers out."""
        self._launch_complete()
        if self._buckets and self._index < len(self._slots):
            self._record_anew()
        if self._recorded is not None:
            self._lay_out(self._seen, self._recorded)
            self._recorded = None
        self._history += 1

    def restart(self) -> None:
        """Forget the previous steps: the next one must be synchronous."""
        self.drain()
        self._history = 0

    def drain(self) -> None:
        """Wait for the transfers in flight."""
        for bucket in self._buckets:
            bucket.wait()

    def abandon(self) -> None:
        """Let transfers in flight end as they may: nobody reads them any more."""
        with contextlib.suppress(GangBroken):
            self.drain()

    @property
    def drift(self) -> float:
        """Relative change of the keys and values (without attention: statistics) sent, since the step before.

        Infinite where it was not measured or there is no step before.
        """
        change, magnitude = self._change
        return (change / magnitude) ** 0.5 if magnitude else float("inf")

    # The layers' calls

    def statistics(self, own: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        """Mean and variance of the whole image's groups from the own part's.

        Args:
            own: float32 (batch, groups, 2), mean and biased variance of this rank's rows.
            input: the feature map they belong to, (batch, channels, own rows, columns).

        Returns:
            float32 (batch, groups, 2).
        """
        slot = statistics_slot(self.partition, self.rank, input.shape, own.shape[1])
        if self.config.group_norm in ("fresh", "local"):  # nothing stale is ever read: no slot
            return merge(self._gather_statistics(own), self._shares_of(slot))
        bucket = self._enter(slot)
        if not self.displacing:
            everyone = self._gather_statistics(own)
            self._leave(slot, bucket, dict(enumerate(everyone)))
            return merge(everyone, self._shares_of(slot))
        assert bucket is not None
        everyone, shares = bucket.statistics(self._index), self._shares_of(slot)
        if self.config.group_norm == "corrected":
            merged = correct(everyone, own, self.rank, shares)
            bucket.set_statistics(self._index, own)
        else:
            bucket.set_statistics(self._index, own)
            merged = merge(everyone, shares)
        self._leave(slot, bucket)
        return merged

    def padded(self, input: torch.Tensor, window: Window) -> torch.Tensor:
        """The rows that a convolution with `window` reads: halo or padding, the own rows, halo or padding.

        Args:
            input: the own rows, (batch, channels, own rows, columns).

        Returns:
            The same with more rows, in a buffer that every layer of this shape fills anew.
        """
        key = (input.shape, input.stride(), input.dtype, window)
        patch = self._padded.get(key)
        if patch is None:
            patch = self._padded[key] = PaddedPatch(self.partition, self.rank, input, window)
        bucket = self._enter(patch.slot)
        sends = patch.sends(input)
        if self.displacing:
            assert bucket is not None
            whole = patch.fill(input, bucket.halos(self._index))
            bucket.set_halos(self._index, sends)
            self._leave(patch.slot, bucket)
        else:
            received = {peer: input.new_empty(shape) for peer, shape in patch.slot.receive}
            self._swap({peer: rows.contiguous() for peer, rows in sends.items()}, received)
            whole = patch.fill(input, received)
            self._leave(patch.slot, bucket, received)
        return whole

    def keys_values(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the whole image from the own tokens', each (batch, tokens, channels)."""
        slot = keys_values_slot(self.partition, self.rank, key.shape, key.dtype)
        bucket = self._enter(slot)
        if self.displacing:
            assert bucket is not None
            everyone = bucket.keys_values(self._index)
            bucket.set_keys_values(self._index, key, value)
            self._leave(slot, bucket)
        else:
            everyone = key.new_empty((sum(slot.extents), *slot.send[0][1][1:]))
            parts = dict(enumerate(everyone.split(slot.extents)))
            own = parts[self.rank]
            own[:, 0], own[:, 1] = key.transpose(0, 1), value.transpose(0, 1)
            self._swap(dict.fromkeys(self.peers, own), {peer: parts[peer] for peer in self.peers})
            self._leave(slot, bucket, parts)
        return everyone[:, 0].transpose(0, 1), everyone[:, 1].transpose(0, 1)

    # Inside

    def _enter(self, slot: Slot) -> Bucket | None:
        """The bucket of the next slot, ready to be read; None while the slots are being recorded."""
        self._launch_complete()
        if self._buckets and (self._index >= len(self._slots) or self._slots[self._index] != slot):
            self._record_anew()
        if self._recorded is not None:
            self._seen.append(slot)
        if not self._buckets:
            return None
        bucket = self._bucket_of[self._index]
        if self._index == bucket.first:
            started = time.perf_counter()
            bucket.wait()
            self.wait_s += time.perf_counter() - started
            if self.displacing:
                bucket.predict(self._history)
            else:
                bucket.remember()
        return bucket

    def _leave(
        self, slot: Slot, bucket: Bucket | None, everyone: dict[int, torch.Tensor] | None = None
    ) -> None:
        """End a slot: store what a synchronous one received, note the bucket a displaced one completes."""
        if self._recorded is not None:
            assert everyone is not None
            self._recorded.append(everyone)
        elif bucket is not None:
            if everyone is not None:
                if self._measure:
                    self._add_drift(slot, bucket, everyone)
                bucket.store(self._index, everyone)
            if self.displacing and self._index == bucket.last:
                self._complete = bucket
        self._index += 1

    def _launch_complete(self) -> None:
        """Send the bucket whose last slot is over.

        Not earlier: its messages are received into the buffers that this slot's layer was still reading.
        """
        if self._complete is not None:
            self._complete.launch()
            self._complete = None

    def _record_anew(self) -> None:
        """Give up the layout, keeping what this step has moved: the layers are not those it was made for.

        A LoRA on a convolution, say, was loaded or disabled since the last image.
        """
        if self._history:
            raise RuntimeError("the U-Net's layers changed in the middle of an image")
        self._seen = self._slots[: self._index]
        self._recorded = [self._bucket_of[index].received(index) for index in range(self._index)]
        self._slots, self._buckets, self._bucket_of = [], [], []
        self._padded.clear()

    def _swap(self, sends: dict[int, torch.Tensor], receives: dict[int, torch.Tensor]) -> None:
        started = time.perf_counter()
        self.communicator.exchange(sends, receives).wait()
        self.wait_s += time.perf_counter() - started

    def _gather_statistics(self, own: torch.Tensor) -> torch.Tensor:
        everyone = own.new_empty((self.communicator.world_size, *own.shape))
        everyone[self.rank] = own
        own = own.contiguous()
        self._swap(dict.fromkeys(self.peers, own), {peer: everyone[peer] for peer in self.peers})
        return everyone

    def _shares_of(self, slot: Slot) -> torch.Tensor:
        """Every rank's share of the rows, (ranks, 1, 1)."""
        if slot.extents not in self._shares:
            shares = torch.tensor(slot.shares, device=self.communicator.device)
            self._shares[slot.extents] = shares.view(-1, 1, 1)
        return self._shares[slot.extents]

    def _add_drift(self, slot: Slot, bucket: Bucket, everyone: dict[int, torch.Tensor]) -> None:
        has_attention = any(other.kind == "keys_values" for other in self._slots)
        if self._history == 0 or slot.kind != ("keys_values" if has_attention else "statistics"):
            return
        new, old = everyone[self.rank].float(), bucket.own(self._index).float()
        self._change[0] += float((new - old).square().sum())
        self._change[1] += float(new.square().sum())

    def _lay_out(self, slots: list[Slot], received: list[dict[int, torch.Tensor]]) -> None:
        """Make the buckets for `slots` and fill them with what the recording step received."""
        self._slots = slots
        count = min(BUCKETS, len(slots))
        bounds = [len(slots) * i // count for i in range(count + 1)]
        for first, stop in zip(bounds, bounds[1:], strict=False):
            bucket = Bucket(self.communicator, slots[first:stop], first, self.config.prediction)
            self._buckets.append(bucket)
            for index in range(first, stop):
                self._bucket_of.append(bucket)
                bucket.store(index, received[index])
                received[index] = {}  # give the memory back as the buffers fill
