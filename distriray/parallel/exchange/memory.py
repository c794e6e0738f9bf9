"""Memory of a synchronous step: the values that it moves are forgotten, recorded, or put into buckets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import ClassVar

import torch

from distriray.parallel.exchange.bucket import Buckets
from distriray.parallel.exchange.slots import LAYERS_CHANGED, Slot, Values


class Memory(ABC):
    """Keeps the slots of one synchronous step, in their order."""

    @property
    def drift(self) -> torch.Tensor | float:
        """Relative change, since the step before, of what this rank sends; infinite if not measured.

        What was measured is a scalar on the device.
        """
        return float("inf")

    @abstractmethod
    def expect(self, slot: Slot) -> Memory:
        """Prepare for the next slot; return the memory to keep it in, which is another where this one cannot.

        Raises:
            RuntimeError: the slot is not the one of the steps before, in the middle of an image.
        """

    @abstractmethod
    def keep(self, everyone: Values) -> None:
        """Keep what the expected slot has moved."""

    borrows: ClassVar[bool] = True
    """Whether what it keeps may be overwritten after `keep`."""

    @property
    def kind(self) -> Hashable:
        """Equal where the same is done with what is moved; None where no other step does that."""
        return None

    def skip(self) -> None:  # noqa: B027 - most need nothing
        """Let all slots be kept: graphs stand for the layers."""

    @abstractmethod
    def end(self) -> Buckets | None:
        """End the step; return the buckets that hold its values, None if nothing does."""


class Forgetting(Memory):
    """Keeps nothing: no step is displaced."""

    @property
    def kind(self) -> Hashable:
        return "forgetting"

    def expect(self, slot: Slot) -> Memory:
        return self

    def keep(self, everyone: Values) -> None:
        pass

    def end(self) -> None:
        return None


class Recording(Memory):
    """Learns the slots in the first step of a shape, and keeps their values until buckets are laid out.

    Args:
        lay_out: makes buckets for slots and fills them with values, which it takes out of the list.
        slots, values: those that were moved already.
    """

    borrows = False

    def __init__(
        self, lay_out: Callable[[list[Slot], list[Values]], Buckets], slots: list[Slot], values: list[Values]
    ) -> None:
        self._lay_out = lay_out
        self._slots = slots
        self._values = values

    def expect(self, slot: Slot) -> Memory:
        self._slots.append(slot)
        return self

    def keep(self, everyone: Values) -> None:
        self._values.append(everyone)

    def end(self) -> Buckets:
        return self._lay_out(self._slots, self._values)


class Refilling(Memory):
    """Puts the values into buckets that were laid out before.

    Where the layers that ask are no longer those that the buckets were made for (what a user brought asks in
    some images only, say), a recording takes over.

    Args:
        record: drops the buckets and returns a recording that begins with these slots and values.
        follows: whether a step of the same image came before.
        measure_drift: whether to compare with that step.
    """

    def __init__(
        self,
        buckets: Buckets,
        record: Callable[[list[Slot], list[Values]], Recording],
        follows: bool,
        measure_drift: bool,
    ) -> None:
        self._buckets = buckets
        self._record = record
        self._follows = follows
        self._measured = buckets.measured_kind if follows and measure_drift else None
        self._index = 0
        self._sums: torch.Tensor | None = None  # float64: squares of the changes, and of the values

    @property
    def drift(self) -> torch.Tensor | float:
        if self._sums is None:
            return float("inf")
        change, magnitude = self._sums
        return torch.where(magnitude > 0, change / magnitude, float("inf")).sqrt()

    @property
    def kind(self) -> Hashable:
        return "refilling" if self._measured is None else None

    def skip(self) -> None:
        self._index = len(self._buckets.slots)

    def expect(self, slot: Slot) -> Memory:
        if not self._buckets.has(self._index, slot):
            return self._give_up().expect(slot)
        bucket = self._buckets[self._index]
        if self._index == bucket.first:
            bucket.remember(read=False)
        return self

    def keep(self, everyone: Values) -> None:
        region = self._buckets.region(self._index)
        if self._buckets.slots[self._index].kind == self._measured:
            new, old = (of[region.rank].float() for of in (everyone, region.stored(self._index)))
            sums = torch.stack([(new - old).square().sum(), new.square().sum()]).double()
            self._sums = sums if self._sums is None else self._sums + sums
        region.store(self._index, everyone)
        self._index += 1

    def end(self) -> Buckets:
        if self._index < len(self._buckets.slots):
            return self._give_up().end()
        return self._buckets

    def _give_up(self) -> Recording:
        if self._follows:
            raise RuntimeError(LAYERS_CHANGED)
        values: list[Values] = [self._buckets.region(index).stored(index) for index in range(self._index)]
        return self._record(self._buckets.slots[: self._index], values)
