"""Patch-parallel decoder of a VAE: every rank decodes its own rows of the latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from distriray.collective.base import Communicator
from distriray.config import Mix, Weights
from distriray.parallel.agreement import check_same_latents
from distriray.parallel.context import PatchContext
from distriray.parallel.exchange.exchange import Exchange
from distriray.parallel.gather import Gather
from distriray.parallel.layout import GangLayout
from distriray.parallel.networks.likeness import weights_of
from distriray.parallel.networks.local import LocalCode
from distriray.parallel.networks.spatial import takes_whole
from distriray.parallel.networks.vae import can_be_cut, convert_decoder, picture_partition
from distriray.parallel.uncopied import Uncopied

# Every value is fresh: a decoder runs once an image, so there is no step before it to take old ones from.
FRESH = Mix(), Weights()


class PatchDecoder(Uncopied):
    """One VAE's decoder, made patch-parallel within a gang.

    Its layers exchange synchronously, so the picture is that of one device, up to rounding.

    Args:
        decoder: the network; its layers are converted in place, its parameters stay.

    Attributes:
        communicator: the gang; None where this rank decodes alone.
        context: what its layers look up during a call.
        local: the code in it that works on some rows without the others.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.communicator: Communicator | None = None
        self.local = LocalCode()
        self.context = PatchContext()
        self._decoder = decoder
        self._network: Callable[..., torch.Tensor]

    def install(self) -> None:
        """Replace the decoder's current forward, hooks included."""
        self._network = self._decoder.forward
        # a VAE's decode, which calls it, is what users compile
        self._decoder.forward = torch.compiler.disable(self.forward)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Decode without the gang for as long as this lasts."""
        communicator, self.communicator = self.communicator, None
        try:
            yield
        finally:
            self.communicator = communicator

    def forward(self, sample: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        """The decoder's forward, to be called alike on every rank of the gang: whole latents, whole picture.

        Every rank decodes all of it where there are fewer latent rows than ranks, where a layer has since
        been replaced by one that cannot be cut into patches, and where a gradient of the latents is wanted.

        Args:
            sample: (batch, latent channels, rows, columns); with frames behind the channels where the VAE
                was made for videos.
            others, named: what else the decoder's forward takes, which has no rows.

        Returns:
            (batch, channels, pixel rows, pixel columns), with frames or without.

        Raises:
            GangMismatch: the ranks were called with different latents, or have different layers or weights.
            GangBroken: a peer died or hung, or did not decode.
        """
        gang = self.communicator
        if gang is None:
            return self._network(sample, *others, **named)
        enough = sample.shape[-2] >= gang.world_size
        learns = torch.is_grad_enabled() and sample.requires_grad
        in_patches = enough and not learns and can_be_cut(self._decoder, self.local, self._network)
        check_same_latents(gang, _as_maps(sample), in_patches, weights_of(self._decoder))
        if not in_patches:
            return self._network(sample, *others, **named)
        return self._decode_rows(gang, sample, *others, **named)

    @torch.no_grad()
    def _decode_rows(
        self, gang: Communicator, sample: torch.Tensor, *others: Any, **named: Any
    ) -> torch.Tensor:
        convert_decoder(self._decoder, self.context)
        partition = picture_partition(self._decoder, sample, gang.world_size)
        if not takes_whole(self._decoder):
            start, stop = partition.rows(gang.rank, partition.levels)
            sample = sample[..., start:stop, :].contiguous()
        with Exchange(gang, partition, *FRESH).step() as step, self.context.during(step):
            rows = self._network(sample, *others, **named)
        maps = _as_maps(rows)
        shape = (*maps.shape[:2], partition.height, partition.width)
        gathered = Gather(gang, GangLayout(gang.world_size), partition, shape, maps.dtype)(maps)
        gathered.header.read()
        return gathered.whole.unflatten(1, rows.shape[1:-2])


def _as_maps(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures as (batch, channels, rows, columns), with a channel for each of each frame."""
    return pictures.flatten(1, -3)
