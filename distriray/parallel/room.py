"""Memory of a device: what the buffers of exchanges need, whether it has that, and whether it has run out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import replace

import torch

from distriray.collective.absent import AbsentPeers
from distriray.collective.base import Communicator
from distriray.config import MIXES, Mix, ParallelConfig
from distriray.parallel.exchange.exchange import Exchange
from distriray.parallel.networks.base import Call, Network, Reuse
from distriray.parallel.share import Share

META = torch.device("meta")
"""Torch's device of tensors that have shapes, and neither values nor memory."""

MAX_SHAPES = 1024
"""Shapes whose buffers are known, those used last: whoever asks for pictures chooses the shapes."""


def buffer_bytes(
    network: Network, call: Call, share: Share, config: ParallelConfig, mix: Mix | None = None
) -> int:
    """Memory of the buffers that a call's exchange keeps on this rank, in bytes.

    It is what an exchange itself says when layers have handed it tensors without values: in a step that lays
    buffers out, one that fills them, and one that reads old values if any are read.

    Args:
        network: converted.
        mix: that of a first image unless given.
    """
    mix = mix or config.first_mix
    if mix is None or not share.exchanges:
        return 0
    of_short = 0
    if config.cache_interval > 1 and not call.short and network.may_be_short(call):
        short = replace(call, reuse=Reuse(short=True))
        of_short = buffer_bytes(network, short, share, config, MIXES["sync"])
    patches = share.partition.world_size
    peers = AbsentPeers(share.communicator.rank, patches, META)
    weights = config.prediction.weights(mix)
    exchange = Exchange(peers, share.partition, mix, weights, config.attention, network.kinds)
    for displaced in (False, False) if mix.exact else (False, False, True):
        with exchange.step(displaced) as step:
            network.dry_run(call, share, step)
    return exchange.buffer_bytes + of_short


def most_buffer_bytes(
    network: Network, calls: Iterable[Call], world_size: int, config: ParallelConfig
) -> int:
    """`buffer_bytes` of all these calls on the rank of a gang that needs most.

    Raises:
        InvalidRequest: such a gang cannot share such a call.
    """
    calls, first = list(calls), AbsentPeers(0, world_size, META)
    dealt = network.deal(calls, first, config)
    made = calls if dealt is None else dealt.of_halves
    shares = [network.share(call, first, config) for call in made]

    def of_step(rank: int) -> int:
        own = AbsentPeers(rank, world_size, META)
        each = (buffer_bytes(network, call, network.share(call, own, config), config) for call in made)
        return sum(each) if dealt is None else max(each)

    unlike = {
        tuple(share.partition.buffers_of(rank) for share in shares): rank
        for rank in reversed(range(min(share.partition.world_size for share in shares)))
    }
    return max(map(of_step, unlike.values()))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether there was too little memory, of a device or of the host.

    CUDA says so in its own words where it takes memory that torch's allocator does not give, as for a graph.
    """
    words = "can't allocate memory", "out of memory"
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(said in str(error) for said in words)


class Room:
    """Memory that a device has left for the buffers of exchanges.

    Args:
        nbytes: so much.
        told: what an error says of it: whose it is, and what takes the rest.
    """

    def __init__(self, nbytes: int, told: str) -> None:
        self.nbytes = nbytes
        self.told = told
        self._known: OrderedDict[Hashable, int] = OrderedDict()

    def needed(
        self,
        network: Network,
        call: Call,
        communicator: Communicator,
        config: ParallelConfig,
        mix: Mix | None = None,
    ) -> int:
        """`buffer_bytes` of a call, or of the half's that takes most, so that both refuse it alike."""
        return max(
            self._needed(network, each, network.share(each, communicator, config), config, mix)
            for each in call.of_halves
        )

    def _needed(
        self, network: Network, call: Call, share: Share, config: ParallelConfig, mix: Mix | None
    ) -> int:
        """`buffer_bytes`, worked out once for a shape, the adapters in use, and a rank's part of it."""
        part = share.communicator.rank, share.partition, share.images, share.exchanges
        shape = part, call.sample.dtype, call.besides, network.adapters_that_exchange(), config, mix
        needed = self._known.pop(shape, None)
        if needed is None:
            needed = buffer_bytes(network, call, share, config, mix)
        self._known[shape] = needed
        if len(self._known) > MAX_SHAPES:
            self._known.popitem(last=False)
        return needed

    def forget(self) -> None:
        """Forget what is known of shapes: the network's layers are others."""
        self._known.clear()

    def refusal(self, needed: int, what: str, config: ParallelConfig) -> str:
        """The message of an error where there is too little room."""
        exchange = config.exchange if isinstance(config.exchange, str) else "a mix"
        begins = ", which begins with 'sync'" if exchange == "auto" else ""
        return (
            f"{what} would take {needed / 1e9:.1f} GB of exchange buffers on each worker of a gang, in "
            f"exchange {exchange!r}{begins}, where {self.told}"
        )
