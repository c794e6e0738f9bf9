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
from dataclasses import dataclass
from typing import Literal

import torch

from distriray.collective.base import Communicator
from distriray.config import ParallelConfig
from distriray.errors import GangBroken
from distriray.parallel.bucket import Bucket
from distriray.parallel.groupnorm import correct, merge
from distriray.parallel.partition import Partition, Window

# Messages of a bucket have the time between its last slot and its first one, a step later, to arrive: the
# more buckets, the nearer to a whole step, and the more messages.
BUCKETS = 4


@dataclass(frozen=True)
class Slot:
    """One layer's place in the exchange: what it sends and receives, by peer.

    `send` and `receive` map a peer to the shape of the message; `rows` is, for keys and values, the number of
    tokens of every rank.
    """

    kind: Literal["statistics", "halos", "keys_values"]
    send: tuple[tuple[int, tuple[int, ...]], ...]
    receive: tuple[tuple[int, tuple[int, ...]], ...]
    dtype: torch.dtype
    tokens: tuple[int, ...] = ()


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
        self._shares: dict[int, torch.Tensor] = {}

    @property
    def buffer_bytes(self) -> int:
        """Memory held between steps."""
        return sum(bucket.nbytes for bucket in self._buckets)

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

    def statistics(self, own: torch.Tensor, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of the whole image's groups from the own part's.

        Args:
            own: float32 (batch, groups, 2), mean and biased variance of this rank's rows.
            input: the feature map they belong to, (batch, channels, own rows, columns).
        """
        shares = self._row_shares(input)
        if self.config.group_norm in ("fresh", "local"):  # nothing stale is ever read: no slot
            return merge(self._gather_statistics(own), shares)
        shape = tuple((peer, tuple(own.shape)) for peer in self.peers)
        slot = Slot("statistics", shape, shape, torch.float32)
        bucket = self._enter(slot)
        if not self.displacing:
            everyone = self._gather_statistics(own)
            self._leave(slot, bucket, {rank: everyone[rank] for rank in range(len(everyone))})
            return merge(everyone, shares)
        assert bucket is not None
        everyone = bucket.statistics(self._index)
        if self.config.group_norm == "corrected":
            merged = correct(everyone, own, self.rank, shares)
            bucket.set_statistics(self._index, own)
        else:
            bucket.set_statistics(self._index, own)
            merged = merge(everyone, shares)
        self._leave(slot, bucket)
        return merged

    def halos(self, input: torch.Tensor, window: Window) -> list[torch.Tensor]:
        """The pieces, from top to bottom, that a convolution with `window` reads: halos, patch, padding."""
        batch, channels, rows, columns = input.shape
        level = self.partition.level_of(self.rank, (rows, columns))
        halo = self.partition.halo(self.rank, level, window)
        sends = {peer: input[:, :, start:stop] for peer, (start, stop) in halo.send.items()}
        slot = Slot(
            "halos",
            tuple((peer, tuple(rows.shape)) for peer, rows in sends.items()),
            tuple((peer, (batch, channels, count, columns)) for peer, count in halo.receive.items()),
            input.dtype,
        )
        bucket = self._enter(slot)
        if self.displacing:
            assert bucket is not None
            received = bucket.halos(self._index)
            bucket.set_halos(self._index, sends)
            self._leave(slot, bucket)
        else:
            received = {peer: input.new_empty(shape) for peer, shape in slot.receive}
            self._swap({peer: rows.contiguous() for peer, rows in sends.items()}, received)
            self._leave(slot, bucket, received)
        return [
            *([input.new_zeros((batch, channels, halo.zeros[0], columns))] if halo.zeros[0] else ()),
            *(received[peer] for peer in sorted(received) if peer < self.rank),
            input,
            *(received[peer] for peer in sorted(received) if peer > self.rank),
            *([input.new_zeros((batch, channels, halo.zeros[1], columns))] if halo.zeros[1] else ()),
        ]

    def keys_values(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the whole image from the own tokens', each (batch, tokens, channels)."""
        batch, own_tokens, channels = key.shape
        level = self.partition.level_of(self.rank, (own_tokens,))
        columns = self.partition.shape(level)[1]
        bounds = [self.partition.rows(rank, level) for rank in range(self.communicator.world_size)]
        tokens = tuple((stop - start) * columns for start, stop in bounds)
        slot = Slot(
            "keys_values",
            tuple((peer, (own_tokens, 2, batch, channels)) for peer in self.peers),
            tuple((peer, (tokens[peer], 2, batch, channels)) for peer in self.peers),
            key.dtype,
            tokens,
        )
        bucket = self._enter(slot)
        own = torch.stack([key.transpose(0, 1), value.transpose(0, 1)], 1)
        if self.displacing:
            assert bucket is not None
            everyone = bucket.keys_values(self._index)
            bucket.set_keys_values(self._index, own)
            self._leave(slot, bucket)
        else:
            everyone = key.new_empty((sum(tokens), 2, batch, channels))
            parts = dict(enumerate(everyone.split(tokens)))
            parts[self.rank].copy_(own)
            self._swap(
                dict.fromkeys(self.peers, parts[self.rank]), {peer: parts[peer] for peer in self.peers}
            )
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

    def _row_shares(self, input: torch.Tensor) -> torch.Tensor:
        level = self.partition.level_of(self.rank, tuple(input.shape[2:]))
        if level not in self._shares:
            height = self.partition.shape(level)[0]
            rows = [self.partition.rows(rank, level) for rank in range(self.communicator.world_size)]
            shares = [(stop - start) / height for start, stop in rows]
            self._shares[level] = torch.tensor(shares, dtype=torch.float32, device=input.device).view(
                -1, 1, 1
            )
        return self._shares[level]

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
