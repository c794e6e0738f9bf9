"""The exchange of one gang for one shape of its input, from step to step.

A synchronous step moves every slot at once. A displaced step moves *buckets*, runs of consecutive slots, in
the background (docs/decisions/buckets-of-slots.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from math import prod

from distriray.collective.base import Communicator
from distriray.config import KINDS, AttentionMode, Kind, Mix, Weights
from distriray.errors import GangBroken
from distriray.parallel.exchange.bucket import Buckets
from distriray.parallel.exchange.carriers import AsChanges, Carrier, WholeAndKept
from distriray.parallel.exchange.displaced import DisplacedStep
from distriray.parallel.exchange.memory import Forgetting, Memory, Recording, Refilling, Values
from distriray.parallel.exchange.patch import Patch
from distriray.parallel.exchange.reconstructions import Reconstructions
from distriray.parallel.exchange.slots import Slot
from distriray.parallel.exchange.step import Step
from distriray.parallel.exchange.synchronous import SynchronousStep
from distriray.parallel.graphs import StepGraphs
from distriray.parallel.partition import Partition

BUCKETS = 4
"""Buckets of a step, at least. Messages of one have the time between its last slot and its first one, a step
later, to arrive: the more buckets, the nearer to a whole step, and the more messages."""

MOST_BUCKETS = 64
BUCKET_BYTES = 16 * 2**20
"""Keys and values of all ranks in a bucket, on average, where fresh values wait on the link behind it; more
where `MOST_BUCKETS` of them do not hold all."""


class Exchange:
    """Slots, buffers and transfers that outlast a step.

    Args:
        communicator: the ranks among which one image's rows are spread.
        partition: who owns which rows.
        mix: which values displaced steps read from the step before.
        weights: of their extrapolation.
        attention: how heads are dealt, where keys and values are fresh and whole.
        kinds: of values that its layers exchange.
        bucket_count: buckets a step, fewer where there are fewer slots; None is as many as the mix wants.
        graphs: where its steps are captured, if they are.
    """

    def __init__(
        self,
        communicator: Communicator,
        partition: Partition,
        mix: Mix,
        weights: Weights,
        attention: AttentionMode = "gather",
        kinds: frozenset[Kind] = KINDS,
        bucket_count: int | None = None,
        graphs: StepGraphs | None = None,
    ) -> None:
        self.graphs = graphs
        self._patch = Patch(communicator, partition, attention)
        self._mix = mix
        self._weights = weights
        self._waits_between = any(getattr(mix, kind) == "fresh" for kind in kinds)
        self._bucket_count = bucket_count
        self._bits: dict[Kind, int | None] = {
            "halos": mix.bits("halos"),
            "keys_values": None if mix.is_stale("keys_values") else mix.bits("keys_values"),
        }
        self._reconstructions = Reconstructions()
        self._buckets: Buckets | None = None
        self._steps = 0  # of this image

    @property
    def buffer_bytes(self) -> int:
        """Memory held between steps."""
        buckets = 0 if self._buckets is None else self._buckets.nbytes
        return self._patch.nbytes + self._reconstructions.nbytes + buckets

    @property
    def broken(self) -> bool:
        """Whether its gang is broken or closed, so that no step can follow."""
        return self._patch.communicator.broken

    @contextlib.contextmanager
    def step(self, displaced: bool = False, measure_drift: bool = False) -> Iterator[Step]:
        """One step; if an exception ends it, `restart` must come before the next one.

        Args:
            displaced: needs a step of the same image before it.
            measure_drift: whether a synchronous step measures its `drift`.

        Raises:
            RuntimeError: the layers' calls differ from those of the image's steps before.
            GangBroken: a peer died or hung.
        """
        step: Step
        if displaced:
            assert self._buckets is not None, "no step came before"
            changes = AsChanges(self._reconstructions)
            carriers = {kind: changes if self._bits[kind] else Carrier() for kind in self._bits}
            step = DisplacedStep(self._patch, carriers, self._mix, self._buckets, self._steps)
        else:
            self.drain()
            carriers = {
                kind: WholeAndKept(self._reconstructions, bits) if bits else Carrier()
                for kind, bits in self._bits.items()
            }
            step = SynchronousStep(self._patch, carriers, self._mix, self._memory(measure_drift))
        self._reconstructions.rewind()
        yield step
        self._reconstructions.end(displaced)
        self._buckets = step.end()
        self._steps += 1

    def restart(self) -> None:
        """Forget the previous steps: the next one must be synchronous."""
        self.drain()
        self._steps = 0
        if self._buckets is not None:
            self._buckets.begin()

    def drain(self) -> None:
        """Wait for the transfers in flight."""
        if self._buckets is not None:
            self._buckets.wait()

    def abandon(self) -> None:
        """Wait for transfers in flight, ignoring failures: nobody will read them."""
        with contextlib.suppress(GangBroken):
            self.drain()

    def _memory(self, measure_drift: bool) -> Memory:
        if self._mix.exact:
            return Forgetting()
        if self._buckets is None:
            return self._record([], [])
        return Refilling(self._buckets, self._record, self._steps > 0, measure_drift)

    def _record(self, slots: list[Slot], values: list[Values]) -> Recording:
        self._buckets = None
        if self.graphs is not None:
            self.graphs.clear()
        self._patch.drop_buffers()
        return Recording(self._lay_out, slots, values)

    def _lay_out(self, slots: list[Slot], values: list[Values]) -> Buckets:
        bits = self._mix.bits("keys_values")
        count = self._bucket_count or self._buckets_for(slots)
        return Buckets(self._patch.communicator, slots, values, count, self._weights, bits)

    def _buckets_for(self, slots: list[Slot]) -> int:
        """Buckets that these slots are dealt to, as many on all ranks."""
        if not self._waits_between:
            return BUCKETS
        whole = sum(prod(slot.whole) * slot.dtype.itemsize for slot in slots if slot.kind == "keys_values")
        return max(BUCKETS, min(MOST_BUCKETS, whole // BUCKET_BYTES))
