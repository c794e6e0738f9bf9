"""A made-up family of networks: all that adding one takes, besides its line in `NETWORKS`.

It has nothing of a U-Net's ways. Its time rises, guidance branches are calls of their own, its output is a
dictionary, and its last layer sees the whole image, so the rows are gathered in the middle of its forward.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from distriray.errors import UnsupportedModel
from distriray.parallel.agreement import Compared, described
from distriray.parallel.context import PatchContext
from distriray.parallel.exchange.own import Computed
from distriray.parallel.exchange.step import Step
from distriray.parallel.layers.attending import attend_to_all, of_queries
from distriray.parallel.layers.attention import PatchSelfAttention
from distriray.parallel.networks.base import Call, Collect, Network
from distriray.parallel.networks.spatial import convert_conv_or_norm, is_foreign
from distriray.parallel.partition import Partition
from distriray.parallel.share import Share

CHANNELS = 8


class Center(nn.Module):
    """Subtracts the mean of the whole image."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image - image.mean((2, 3), keepdim=True)


class Pond(nn.Module):
    """A network with one layer of every kind that exchanges."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.frozen = frozen
        self.inlet = nn.Conv2d(4, CHANNELS, 3, padding=1)
        self.norm = nn.GroupNorm(2, CHANNELS)
        self.attention = Attention(CHANNELS, heads=2, dim_head=4)
        self.outlet = nn.Conv2d(CHANNELS, 4, 5, padding=2)
        self.center = Center()

    def forward(
        self, latents: torch.Tensor, clock: float, *, caption: torch.Tensor, side: str = "wet"
    ) -> dict[str, torch.Tensor]:
        """Latents (batch, 4, rows, columns), a clock from 0 to 1, a caption (batch, tokens, `CHANNELS`)."""
        waves = self.norm(self.inlet(latents)) + clock * caption.mean(1)[:, :, None, None]
        tokens = self.attention(waves.flatten(2).transpose(1, 2))
        waves = waves + tokens.transpose(1, 2).reshape(waves.shape)
        velocity = self.center(self.outlet(waves))
        return {"velocity": velocity if side == "wet" else -velocity}


class PondNetwork(Network):
    """A `Pond`."""

    kind = Pond

    @property
    def row_unit(self) -> int:
        return 1

    def check(self) -> None:
        if self.module.frozen:
            raise UnsupportedModel("the pond is frozen; supported are ponds with water in them")

    def convert(self, context: PatchContext) -> bool:
        converted = False
        for name, layer in self.module.named_modules():
            if is_foreign(layer):
                raise UnsupportedModel(f"layer {name}, {type(layer).__name__}, is not cut into patches")
            converted |= convert_conv_or_norm(layer, context)
        if getattr(self.module.attention.processor, "context", None) is not context:
            self.module.attention.processor = PatchSelfAttention(context)
            converted = True
        return converted

    def read(self, latents: torch.Tensor, clock: float, *, caption: torch.Tensor, side: str = "wet") -> Call:
        return Call(latents, -clock, caption, branch=side)

    def partition(self, call: Call, patches: int) -> Partition:
        return Partition(*call.sample.shape[2:], 0, patches)

    def dry_run(self, call: Call, share: Share, step: Step) -> None:
        rows = share.cut_rows(call.sample.to("meta"))
        waves = rows.new_empty((len(rows), CHANNELS, *rows.shape[2:]))
        step.padded(rows, self.module.inlet.window)
        step.send_statistics(step.read_statistics(waves, self.module.norm.num_groups))
        tokens = waves.flatten(2).transpose(1, 2)
        query, own = tokens.unflatten(2, (self.module.attention.heads, -1)), Computed(tokens, tokens)
        attend_to_all(step, query, own, step.tokens_like(tokens.shape[1]), of_queries)
        step.padded(waves, self.module.outlet.window)

    def compared(self, call: Call) -> Compared:
        return Compared(described(call.sample), near={"caption": call.text})

    def compute(self, call: Call, share: Share, collect: Collect) -> Any:
        gather = self.module.center.register_forward_pre_hook(lambda center, rows: (collect(rows[0]),))
        with gather:
            caption = share.cut(call.text)
            return self.forward(
                share.cut_rows(call.sample), -call.timestep, caption=caption, side=call.branch
            )
