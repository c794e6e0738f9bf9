"""The patch-parallel VAE decoder: every rank decodes its own rows of the latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers.models.autoencoders.vae import Decoder

from distriray.collective.base import Communicator
from distriray.config import ParallelConfig
from distriray.parallel.context import PatchContext
from distriray.parallel.convert import convert_decoder_layers
from distriray.parallel.exchange.exchange import Exchange
from distriray.parallel.gather import Gather, check_same_latents
from distriray.parallel.partition import Partition
from distriray.parallel.supported import can_be_cut

# Every value is fresh: a decoder runs once an image, so there is no step before it to take old ones from.
FRESH = ParallelConfig(exchange="sync", group_norm="fresh")


class PatchDecoder:
    """What makes one VAE's decoder patch-parallel within the gang of `communicator`.

    Its layers exchange synchronously, so the picture is one device's but for rounding.

    Attributes:
        communicator: the gang; None: this rank decodes alone.
        context: what its layers look up during a call.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.communicator: Communicator | None = None
        self.context = PatchContext(group_norm=FRESH.group_norm)
        self._decoder = decoder
        self._network: Callable[..., torch.Tensor]

    def install(self) -> None:
        """Stand in for the decoder's forward as it is now, hooks and all."""
        self._network, self._decoder.forward = self._decoder.forward, self.forward

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Decode without the gang meanwhile."""
        communicator, self.communicator = self.communicator, None
        try:
            yield
        finally:
            self.communicator = communicator

    def forward(self, sample: torch.Tensor, latent_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """`Decoder.forward`, the same on every rank of the gang: whole latents, whole picture.

        Every rank decodes all of it where there are fewer latent rows than ranks, or where a layer was
        replaced since by one that cannot be cut into patches. A gang's picture has no gradient.

        Args:
            sample: (batch, latent channels, rows, columns).

        Returns:
            (batch, channels, pixel rows, pixel columns).

        Raises:
            GangMismatch: the ranks were called with different latents, or have different layers.
            GangBroken: a peer died or hung, or did not decode.
        """
        gang = self.communicator
        if gang is None:
            return self._network(sample, latent_embeds)
        in_patches = sample.shape[2] >= gang.world_size and can_be_cut(self._decoder)
        check_same_latents(gang, sample, in_patches)
        if not in_patches:
            return self._network(sample, latent_embeds)
        return self._decode_rows(gang, sample, latent_embeds)

    @torch.no_grad()
    def _decode_rows(
        self, gang: Communicator, sample: torch.Tensor, latent_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        convert_decoder_layers(self._decoder, self.context)
        levels = len(self._decoder.up_blocks) - 1
        height, width = (side << levels for side in sample.shape[2:])
        partition = Partition(height, width, levels, gang.world_size)
        start, stop = partition.rows(gang.rank, levels)
        with Exchange(gang, partition, FRESH).step() as step, self.context.during(step):
            rows = self._network(sample[:, :, start:stop].contiguous(), latent_embeds)
        gather = Gather(gang, partition, (rows.shape[0], rows.shape[1], height, width), rows.dtype)
        return gather(rows, (False, False), 0.0)[0]
