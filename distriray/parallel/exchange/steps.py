"""One step of the exchange, synchronous or displaced: what layers call during a forward pass.

Layers call the verbs in the order of the forward pass; the k-th call of a step is slot k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import ClassVar, Self

import torch

from distriray.collective.all_gather import all_gather
from distriray.collective.base import Work
from distriray.parallel.exchange.bucket import Bucket, Buckets
from distriray.parallel.exchange.memory import LAYERS_CHANGED, Memory
from distriray.parallel.exchange.patch import Patch
from distriray.parallel.exchange.slots import Slot
from distriray.parallel.graphs import Recorder
from distriray.parallel.partition import Window
from distriray.parallel.stopwatch import Stopwatch


class Step(ABC):
    """One step among the ranks of `patch`.

    Attributes:
        displaced: whether layers read what the peers sent one step ago, rather than fresh values.
        waiting: the time in which this rank waited for its peers.
        recorder: of the graphs that the layers are being captured into, if they are.
    """

    displaced: ClassVar[bool]

    def __init__(self, patch: Patch) -> None:
        self.recorder: Recorder | None = None
        self.rank = patch.rank
        self.waiting = Stopwatch(patch.communicator.device)
        self._patch = patch

    @property
    def drift(self) -> torch.Tensor | float:
        """Relative change of what this rank sends, since the step before; infinite if not measured.

        What was measured is a scalar on the device.
        """
        return float("inf")

    @abstractmethod
    def read_statistics(self, input: torch.Tensor, groups: int) -> torch.Tensor:
        """Everyone's statistics; this rank puts its own into its row, and `send_statistics` ends the slot.

        In a displaced step all of them are the previous step's until then, this rank's row too; in a
        synchronous one nothing is in them yet.

        Args:
            input: the feature map that they are of, (batch, channels, this rank's rows, columns).

        Returns:
            float32 (ranks, batch, groups, 2), means and biased variances.
        """

    @abstractmethod
    def send_statistics(self, everyone: torch.Tensor) -> None:
        """Send this rank's row of what `read_statistics` returned; a synchronous step fills the others'."""

    @abstractmethod
    def padded(self, input: torch.Tensor, window: Window) -> torch.Tensor:
        """The rows that a convolution with `window` reads: halo or padding, `input`, halo or padding.

        Args:
            input: (batch, channels, this rank's rows, columns).

        Returns:
            The same with more rows, in a buffer that the next layer of this shape overwrites.
        """

    @abstractmethod
    def keys_values(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the whole image from those of this rank's tokens.

        Args:
            key, value: (batch, this rank's tokens, channels).

        Returns:
            Both, (batch, tokens of all ranks, channels).
        """

    @property
    @abstractmethod
    def kind(self) -> Hashable:
        """What layers do in it besides what follows from their inputs; None where no other step does that."""

    @abstractmethod
    def skip(self) -> None:
        """Let all slots be over: graphs stand for the layers."""

    @abstractmethod
    def end(self) -> Buckets | None:
        """End the step; return the buckets for the next one, None if nothing is kept."""

    def shares(self, input: torch.Tensor) -> torch.Tensor:
        """Every rank's share of the rows at the level of `input`, float32 (ranks, 1, 1)."""
        return self._patch.shares(input)

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """Everyone's fresh `own`, (ranks, *shape of `own`): no slot, whatever the step."""
        everyone = own.new_empty((self._patch.communicator.world_size, *own.shape))
        everyone[self.rank] = own
        self._talk(lambda step: step._await(all_gather(step._patch.communicator, everyone.unbind())))
        return everyone

    def _talk(self, action: Callable[[Self], None]) -> None:
        """Say something to the peers: now, or in every replay of the graphs that are being captured."""
        if self.recorder is None:
            action(self)
        else:
            self.recorder.between(action)

    def _await(self, work: Work) -> None:
        with self.waiting:
            work.wait()


class SynchronousStep(Step):
    """Every slot is swapped at once, and `memory` keeps it for the next step."""

    displaced = False

    def __init__(self, patch: Patch, memory: Memory) -> None:
        super().__init__(patch)
        self._memory = memory

    @property
    def drift(self) -> torch.Tensor | float:
        return self._memory.drift

    def read_statistics(self, input: torch.Tensor, groups: int) -> torch.Tensor:
        self._memory = self._memory.expect(self._patch.statistics_slot(input, groups))
        ranks = self._patch.communicator.world_size
        return input.new_empty((ranks, input.shape[0], groups, 2), dtype=torch.float32)

    def send_statistics(self, everyone: torch.Tensor) -> None:
        self._talk(lambda step: step._await(all_gather(step._patch.communicator, everyone.unbind())))
        self._memory.keep(dict(enumerate(everyone)))

    def padded(self, input: torch.Tensor, window: Window) -> torch.Tensor:
        padded = self._patch.padded(input, window)
        self._memory = self._memory.expect(padded.slot)
        received = {peer: input.new_empty(shape) for peer, shape in padded.slot.receive}
        sends = {peer: rows.contiguous() for peer, rows in padded.sends(input).items()}
        self._talk(lambda step: step._await(step._patch.communicator.exchange(sends, received)))
        whole = padded.fill(input, received)
        self._memory.keep(received)
        return whole

    def keys_values(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        slot = self._patch.keys_values_slot(key)
        self._memory = self._memory.expect(slot)
        shape = (sum(slot.extents), *slot.send[0][1][1:])
        everyone = self._patch.scratch(shape, key) if self._memory.borrows else key.new_empty(shape)
        parts = everyone.split(slot.extents)
        own = parts[self.rank]
        own[:, 0], own[:, 1] = key.transpose(0, 1), value.transpose(0, 1)
        self._talk(lambda step: step._await(all_gather(step._patch.communicator, parts)))
        self._memory.keep(dict(enumerate(parts)))
        return everyone[:, 0].transpose(0, 1), everyone[:, 1].transpose(0, 1)

    @property
    def kind(self) -> Hashable:
        return self._memory.kind

    def skip(self) -> None:
        self._memory.skip()

    def end(self) -> Buckets | None:
        return self._memory.end()


class DisplacedStep(Step):
    """Layers read what the peers sent one step ago; what they send now leaves in the background, by buckets.

    When a bucket's last slot has been computed, its messages leave; when the next step reaches the bucket's
    first slot, it waits for them. So what is read is always exactly one step old.

    Args:
        buckets: filled by the step before.
        predicts: whether two steps came before, from which stale values can be extrapolated.
    """

    displaced = True

    def __init__(self, patch: Patch, buckets: Buckets, predicts: bool) -> None:
        super().__init__(patch)
        self._buckets = buckets
        self._predicts = predicts
        self._index = 0
        self._complete: Bucket | None = None

    def read_statistics(self, input: torch.Tensor, groups: int) -> torch.Tensor:
        bucket = self._enter(self._patch.statistics_slot(input, groups))
        return bucket.statistics.read(self._index)

    def send_statistics(self, everyone: torch.Tensor) -> None:
        self._leave(self._buckets[self._index])  # they leave with the bucket, from where the layer put them

    def padded(self, input: torch.Tensor, window: Window) -> torch.Tensor:
        padded = self._patch.padded(input, window)
        bucket = self._enter(padded.slot)
        whole = padded.fill(input, bucket.halos.read(self._index))
        bucket.halos.send(self._index, padded.sends(input))
        self._leave(bucket)
        return whole

    def keys_values(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bucket = self._enter(self._patch.keys_values_slot(key))
        region = bucket.keys_values[self._index]
        everyone = region.read(self._index)
        region.send(self._index, key, value)
        self._leave(bucket)
        return everyone[:, 0].transpose(0, 1), everyone[:, 1].transpose(0, 1)

    @property
    def kind(self) -> Hashable:
        return "displaced"

    def skip(self) -> None:
        self._index = len(self._buckets.slots)
        self._complete = self._buckets[self._index - 1]

    def end(self) -> Buckets:
        self._turn(self._complete, None)
        if self._index < len(self._buckets.slots):
            raise RuntimeError(LAYERS_CHANGED)
        return self._buckets

    def _enter(self, slot: Slot) -> Bucket:
        """The bucket of the next slot, ready to be read."""
        if not self._buckets.has(self._index, slot):
            raise RuntimeError(LAYERS_CHANGED)
        bucket = self._buckets[self._index]
        complete, self._complete = self._complete, None
        entered = bucket if self._index == bucket.first else None
        if complete is not None or entered is not None:
            self._talk(lambda step: step._turn(complete, entered))
        return bucket

    def _leave(self, bucket: Bucket) -> None:
        if self._index == bucket.last:
            self._complete = bucket
        self._index += 1

    def _turn(self, complete: Bucket | None, entered: Bucket | None) -> None:
        """Send the bucket whose last slot is over, and wait for the one whose first slot begins.

        Not earlier: messages are received into the buffers that the layer of the last slot was still reading.
        """
        if complete is not None:
            complete.launch()
        if entered is not None:
            with self.waiting:
                entered.wait()
            entered.predict(self._predicts)
