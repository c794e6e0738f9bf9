"""One step of the exchange: what layers call during a forward pass.

Layers call the verbs in the order of the forward pass; the k-th call of a step whose values outlast it is
slot k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from math import prod
from typing import ClassVar, Literal, NamedTuple, Self

import torch

from distriray.config import Kind, Mix, StatisticsMode
from distriray.parallel.exchange.bucket import Buckets
from distriray.parallel.exchange.carriers import Carrier
from distriray.parallel.exchange.halos import PaddedPatch
from distriray.parallel.exchange.own import OwnKeysValues
from distriray.parallel.exchange.patch import Patch
from distriray.parallel.exchange.slots import Slot, Values
from distriray.parallel.exchange.statistics_and_rows import StatisticsAndRows
from distriray.parallel.graphs import Recorder
from distriray.parallel.kernels.rows_around import RowsAround
from distriray.parallel.partition import Window
from distriray.parallel.stopwatch import Stopwatch

Measure = Callable[[torch.Tensor], object]
"""Puts this rank's statistics into what it is given, float32 (batch, groups, 2)."""


class Waiting(NamedTuple):
    """The time that messages cost a rank: of sending fresh values, and of waiting for the peers'.

    Attributes:
        rows: fresh statistics and halos.
        keys_values: fresh keys and values.
        buckets: values of the step before.
    """

    rows: Stopwatch
    keys_values: Stopwatch
    buckets: Stopwatch


class Step(ABC):
    """One step among the ranks of `patch`. What it does not override swaps fresh values.

    Attributes:
        displaced: whether layers read what the peers sent one step ago, of the kinds that are stale then.
        waiting: the time that messages cost this rank.
        waits: how often it waited for its peers.
        mix: the kinds of stale values.
        recorder: of the graphs that the layers are being captured into, if they are.

    Args:
        carriers: how fresh values of each kind but statistics travel.
    """

    displaced: ClassVar[bool]

    def __init__(self, patch: Patch, carriers: Mapping[Kind, Carrier], mix: Mix) -> None:
        self.recorder: Recorder | None = None
        self.rank = patch.rank
        self.waiting = Waiting(*(Stopwatch(patch.communicator.device) for _ in Waiting._fields))
        self.waits = 0
        self.mix = mix
        self._patch = patch
        self._carriers = carriers

    @property
    def drift(self) -> torch.Tensor | float:
        """Relative change of what this rank sends, since the step before; infinite if not measured.

        What was measured is a scalar on the device.
        """
        return float("inf")

    @property
    @abstractmethod
    def statistics(self) -> StatisticsMode:
        """Whose statistics a group norm uses."""

    @property
    def fuses(self) -> bool:
        """Whether a group norm normalizes the rows around its patch too, for the convolution behind it.

        Not where ranks normalize by other statistics than their peers: of these, the peers' rows would be.
        """
        return self.mix.statistics in ("fresh", "stale")

    def read_statistics(self, input: torch.Tensor, groups: int) -> torch.Tensor:
        """Everyone's statistics; this rank puts its own into its row, and `send_statistics` ends the slot.

        Where they are stale, all of them are the previous step's until then, this rank's row too; else
        nothing is in them yet.

        Args:
            input: the feature map that they are of, (batch, channels, this rank's rows, columns).

        Returns:
            float32 (ranks, batch, groups, 2), means and biased variances.
        """
        shape = self._patch.communicator.world_size, input.shape[0], groups, 2
        return input.new_empty(shape, dtype=torch.float32)

    def send_statistics(self, everyone: torch.Tensor) -> None:
        """Send this rank's row of what `read_statistics` returned; fresh ones fill the others' now."""
        parts = everyone.unbind()
        peers = {peer: parts[peer] for peer in self._patch.communicator.peers}
        self._swap("rows", dict.fromkeys(peers, parts[self.rank]), peers)

    def rows_around(
        self, input: torch.Tensor, window: Window, groups: int, measure: Measure
    ) -> tuple[RowsAround, torch.Tensor]:
        """Statistics of a group norm, and its input for the other rows that the convolution behind it reads.

        Only in a step that `fuses`; where both are fresh, they travel in one message.

        Args:
            input: of the norm, (batch, channels, this rank's rows, columns).
            window: of the convolution.
            groups: of the norm.
            measure: puts this rank's statistics into what it is given, float32 (batch, groups, 2).

        Returns:
            The rows, and the statistics of all ranks, float32 (ranks, batch, groups, 2).
        """
        padded = self._patch.padded(input, window)
        rows, everyone = self._swap_norm(padded, input, groups, measure)
        return padded.around(rows), everyone

    def cut(self, whole: torch.Tensor, window: Window) -> torch.Tensor:
        """The rows that a convolution with `window` reads, of an input that every rank has.

        Args:
            whole: (batch, channels, rows of all ranks, columns).

        Returns:
            (batch, channels, halo rows and this rank's, columns).
        """
        return self._patch.cut(whole, window)

    def padded(self, input: torch.Tensor, window: Window) -> torch.Tensor:
        """The rows that a convolution with `window` reads: halo or padding, `input`, halo or padding.

        Args:
            input: (batch, channels, this rank's rows, columns).

        Returns:
            The same with more rows, in a buffer that the next layer of this shape overwrites.
        """
        padded = self._patch.padded(input, window)
        return padded.fill(input, self._swap_halos(padded, input))

    def tokens_like(self, own: int) -> tuple[int, ...]:
        """Numbers of tokens that every rank has of the feature map of which this one has `own`."""
        return self._patch.partition.tokens_like(self.rank, own)

    def dealt_heads(self, heads: int) -> tuple[int, ...] | None:
        """How many of a layer's heads of keys every rank gets; None where its keys and values are gathered.

        What is dealt lasts no longer than the layer, so that is where they are fresh and whole in every step.
        """
        return self._patch.dealt_heads(heads) if self.mix.fresh_keys_values else None

    @abstractmethod
    def keys_values(self, own: OwnKeysValues, tokens: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the whole image from those of this rank's tokens.

        Args:
            own: this rank's, as they are or as products that are computed where they are sent from.
            tokens: of every rank.

        Returns:
            Both, (batch, tokens of all ranks, channels), in the order of the ranks.

        Raises:
            UnsupportedModel: the number of this rank's tokens is another one.
        """

    def deal_heads(
        self, projections: Sequence[torch.Tensor], tokens: tuple[int, ...], heads: tuple[int, ...]
    ) -> tuple[torch.Tensor, ...]:
        """This rank's share of the heads, of all ranks' tokens, from all heads of its own tokens.

        Only where `dealt_heads` says so.

        Args:
            projections: (batch, this rank's tokens, heads, channels of a head) each, the heads as many as
                all `heads` are, or a multiple.
            tokens: of every rank.
            heads: that every rank gets of the projection with fewest, as `dealt_heads` has them.

        Returns:
            (batch, tokens of all ranks, heads of this rank, channels of a head) each, in the order of the
            ranks, in a buffer that the next layer of this shape overwrites.
        """
        first, multiples = projections[0], [whole.shape[2] // sum(heads) for whole in projections]
        outbox: list[torch.Tensor] = []
        start = 0
        # Messages to ranks that get as many are one launch, where copies would be one each.
        for each, ranks in Counter(heads).items():
            stop = start + each * ranks
            by_rank = [
                whole[:, :, start * n : stop * n].unflatten(2, (ranks, -1)).flatten(3).permute(2, 1, 0, 3)
                for whole, n in zip(projections, multiples, strict=True)
            ]
            shape = ranks, tokens[self.rank], len(first), each * sum(multiples), first.shape[3]
            messages = self._patch.scratch(shape, first)
            torch.cat(by_rank, 3, out=messages.flatten(3))
            outbox += messages.unbind()
            start = stop
        inbox = self._patch.scratch((sum(tokens), *outbox[self.rank].shape[1:]), first)
        parts = inbox.split(tokens)
        parts[self.rank].copy_(outbox[self.rank])
        self._swap_parts(outbox, parts)
        own = [heads[self.rank] * n for n in multiples]
        return tuple(part.transpose(0, 1) for part in inbox.split(own, 2))

    def deal_tokens(
        self, attended: torch.Tensor, tokens: tuple[int, ...], heads: tuple[int, ...]
    ) -> torch.Tensor:
        """All heads of this rank's tokens, from its share of the heads of all tokens: undoes `deal_heads`.

        Args:
            attended: (batch, tokens of all ranks, heads of this rank, channels of a head).
            tokens, heads: as `deal_heads` takes them.

        Returns:
            (batch, this rank's tokens, heads, channels of a head).
        """
        outbox = attended.transpose(0, 1).contiguous()  # a batch of one is that already
        parts = outbox.split(tokens)
        own = parts[self.rank]
        multiple = own.shape[2] // heads[self.rank]
        shapes = [
            (*own.shape[:2], heads[peer] * multiple, own.shape[3]) for peer in self._patch.communicator.peers
        ]
        of_peers = [prod(shape) for shape in shapes]
        inbox = self._patch.scratch((sum(of_peers),), attended).split(of_peers)
        received = [part.view(shape) for part, shape in zip(inbox, shapes, strict=True)]
        received.insert(self.rank, own)
        self._swap_parts(parts, received)
        whole = torch.cat([part.flatten(2).transpose(0, 1) for part in received], 2)
        return whole.unflatten(2, (-1, attended.shape[3]))

    @property
    @abstractmethod
    def kind(self) -> Hashable:
        """Kind of the step: all that layers do in it beyond their inputs; None if no other is like it."""

    def skip(self) -> None:
        """Let all slots be over: graphs stand for the layers."""
        for carrier in self._carriers.values():
            carrier.skip()

    @abstractmethod
    def end(self) -> Buckets | None:
        """End the step; return the buckets for the next one, None if nothing is kept."""

    def shares(self, input: torch.Tensor) -> torch.Tensor:
        """Every rank's share of the rows at the level of `input`, float32 (ranks, 1, 1)."""
        return self._patch.shares(input)

    def _swap_norm(
        self, padded: PaddedPatch, input: torch.Tensor, groups: int, measure: Measure
    ) -> tuple[Values, torch.Tensor]:
        """The rows around `input`, by the peer that they come from, and the statistics of all ranks."""
        slot, carrier = padded.slot, self._carriers["halos"]
        rows = carrier.pack(slot, padded.sends(input))
        room = carrier.room(slot, padded.room())
        shape = self._patch.communicator.world_size, len(input), groups, 2
        messages = StatisticsAndRows(self.rank, shape, rows, room, input.device)
        measure(messages.statistics[self.rank])
        self._swap("rows", messages.sends(), messages.receives)
        return carrier.unpack(slot, messages.rows), messages.statistics

    def _swap_halos(self, padded: PaddedPatch, input: torch.Tensor) -> Values:
        """The rows around `input`, fresh, by the peer that they come from."""
        slot, carrier = padded.slot, self._carriers["halos"]
        sends = carrier.pack(slot, padded.sends(input))
        receives = carrier.room(slot, padded.room())
        self._swap("rows", sends, receives)
        return carrier.unpack(slot, receives)

    def _swap_keys_values(
        self, own: OwnKeysValues, slot: Slot, everyone: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Fill `everyone`, (tokens of all ranks, 2, batch, channels); return each rank's part of it."""
        parts, carrier = everyone.split(slot.extents), self._carriers["keys_values"]
        own.put(parts[self.rank])
        peers = self._patch.communicator.peers
        sends = carrier.pack(slot, dict.fromkeys(peers, parts[self.rank]))
        receives = carrier.room(slot, {peer: parts[peer] for peer in peers})
        self._swap("keys_values", sends, receives)
        carrier.unpack(slot, receives)
        return parts

    def _swap_parts(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor]) -> None:
        """Send each peer its part, and receive one from each; this rank's own are not looked at."""
        peers = self._patch.communicator.peers
        of_peers = ({peer: parts[peer] for peer in peers} for parts in (sends, receives))
        self._swap("keys_values", *of_peers)

    def _swap(self, what: Literal["rows", "keys_values"], sends: Values, receives: Values) -> None:
        """Send and receive now, and wait.

        Args:
            receives: contiguous.
        """
        sends = {peer: tensor.contiguous() for peer, tensor in sends.items()}
        if self.recorder is not None:  # the same tensors in every replay
            sends, receives = map(self._patch.communicator.messages, (sends, receives))
        self._talk(lambda step: step._swap_now(what, sends, receives))

    def _talk(self, action: Callable[[Self], None]) -> None:
        """Say something to the peers: now, or in every replay of the graphs that are being captured."""
        if self.recorder is None:
            action(self)
        else:
            self.recorder.between(action)

    def _swap_now(self, what: Literal["rows", "keys_values"], sends: Values, receives: Values) -> None:
        self.waits += 1
        with getattr(self.waiting, what):
            self._patch.communicator.exchange(sends, receives).wait()
