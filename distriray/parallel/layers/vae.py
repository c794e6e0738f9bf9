"""Layers of VAEs that have classes of their own, on one rank's rows.

Their maps are (batch, channels, this rank's rows, columns), with frames behind the channels in VAEs that were
made for videos. Outside a step of an exchange each is the layer that it was.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_hunyuanimage import HunyuanImageAttentionBlock
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageAttentionBlock,
    QwenImageCausalConv3d,
)
from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import (
    QwenImage21AttentionBlock,
    QwenImage21CausalConv3d,
)
from torch import nn

from distriray.parallel.context import PatchContext
from distriray.parallel.exchange.own import Computed
from distriray.parallel.layers.attending import attend_to_all, attended
from distriray.parallel.layers.opaque import Opaque
from distriray.parallel.partition import Window


class _PatchLayer(Opaque):
    """A layer of a decoder that becomes patch-parallel by changing its class; its parameters stay."""

    context: PatchContext | None = None

    @property
    def exchanges(self) -> bool:
        return self.context is not None and self.context.exchanges


class _PatchCausalConv(_PatchLayer):
    """A convolution that gives as many frames, rows and columns as it is given."""

    def exchanged_shape(self: Any, *inputs: Any) -> tuple[int, ...]:
        batch, _, *rest = inputs[0].shape
        return batch, self.out_channels, *rest

    @cached_property
    def window(self: Any) -> Window:
        return Window(self.kernel_size[-2], 1, 1, (self._padding[2],) * 2)


class PatchCausalConv3d(QwenImageCausalConv3d, _PatchCausalConv):
    """Qwen-Image's convolution over rows, columns and this and earlier frames, with its peers' halo rows.

    Where there is one frame, and so nothing before it, its weights for earlier frames meet zeros: they are
    left out, and the convolution is one of pictures, with a third of the products.
    """

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        if not self.exchanges or self.kernel_size[1] == 1:
            output: torch.Tensor = super().forward(x, cache_x)
            return output
        return self.exchange(x, cache_x)

    def exchanged(self, *inputs: Any) -> torch.Tensor:
        x, earlier = inputs
        assert self.context is not None and self.context.step is not None
        columns, before = self._padding[0], self._padding[4]
        frames = x
        if earlier is not None and before > 0:
            frames = torch.cat((earlier.to(x.device), x), 2)
            before -= earlier.shape[2]
        read = self.context.step.padded(frames.flatten(1, 2), self.window)
        if frames.shape[2] == 1 and before == self.kernel_size[0] - 1:
            weight = self.weight[:, :, -1]
            return F.conv2d(read, weight, self.bias, padding=(0, columns)).unsqueeze(2)
        read = F.pad(read.unflatten(1, frames.shape[1:3]), (columns, columns, 0, 0, before, 0))
        return F.conv3d(read, self.weight, self.bias)


class PatchCausalConv2d(QwenImage21CausalConv3d, _PatchCausalConv):
    """Qwen-Image 2.1's, which is the former for one frame alone."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        if not self.exchanges or self.kernel_size[0] == 1 or cache_x is not None:
            output: torch.Tensor = super().forward(x, cache_x)
            return output
        return self.exchange(x)

    def exchanged(self, *inputs: Any) -> torch.Tensor:
        (x,) = inputs
        assert self.context is not None and self.context.step is not None
        read = self.context.step.padded(x.squeeze(2), self.window)
        columns = (0, self._padding[0])
        return F.conv2d(read, self.weight, self.bias, padding=columns).unsqueeze(2)


class _PatchAttention(_PatchLayer):
    """Self-attention, with one head, of the pixels of each feature map to those of all ranks."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of maps, (maps, channels, this rank's rows, columns) each, as one of them."""
        tokens = (each.flatten(2).transpose(1, 2) for each in (query, key, value))
        return self.exchange(*tokens).transpose(1, 2).reshape(query.shape)

    def of_frames(self: Any, x: torch.Tensor) -> torch.Tensor:
        """The layer's output for (batch, channels, frames, this rank's rows, columns)."""
        maps = x.transpose(1, 2).flatten(0, 1)
        output = self.proj(self.attend(*self.to_qkv(self.norm(maps)).chunk(3, 1)))
        attended_frames: torch.Tensor = output.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
        return attended_frames + x

    def exchanged(self, *inputs: Any) -> torch.Tensor:
        query, key, value = inputs
        assert self.context is not None and self.context.step is not None
        step, one_head = self.context.step, query.unsqueeze(2)
        tokens = step.tokens_like(query.shape[1])
        return attend_to_all(step, one_head, Computed(key, value), tokens, attended).squeeze(2)


class PatchFrameAttention(QwenImageAttentionBlock, _PatchAttention):
    """Qwen-Image's: each frame attends by itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.of_frames(x) if self.exchanges else super().forward(x)
        return output


class PatchFrameAttention21(QwenImage21AttentionBlock, _PatchAttention):
    """Qwen-Image 2.1's, which is alike."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.of_frames(x) if self.exchanges else super().forward(x)
        return output


class PatchMapAttention(HunyuanImageAttentionBlock, _PatchAttention):
    """HunyuanImage's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.exchanges:
            output: torch.Tensor = super().forward(x)
            return output
        normalized = self.norm(x)
        queries_keys_values = (project(normalized) for project in (self.to_q, self.to_k, self.to_v))
        output = self.proj(self.attend(*queries_keys_values))
        return output + x


PATCHED: dict[type[nn.Module], type[nn.Module]] = {
    QwenImageCausalConv3d: PatchCausalConv3d,
    QwenImage21CausalConv3d: PatchCausalConv2d,
    QwenImageAttentionBlock: PatchFrameAttention,
    QwenImage21AttentionBlock: PatchFrameAttention21,
    HunyuanImageAttentionBlock: PatchMapAttention,
}
"""By class of a layer, that of its patch-parallel form."""
FORMS = frozenset({*PATCHED, *PATCHED.values()})
"""The classes of such layers, before and after."""


def patch_layer(module: nn.Module, context: PatchContext) -> None:
    """Let a layer of one of `FORMS` look its step up in `context`, in place."""
    if getattr(module, "context", None) is context:
        return
    if type(module) in PATCHED:
        vars(module).pop("forward", None)  # left by a hook that was removed; it is not the new class's
        module.__class__ = PATCHED[type(module)]
    assert isinstance(module, _PatchLayer)
    module.context = context
    module.enroll()


def keeps_size(module: nn.Module) -> bool:
    """Whether a layer of one of `FORMS` gives as many rows, columns and frames as it is given."""
    if not isinstance(module, QwenImageCausalConv3d | QwenImage21CausalConv3d):
        return True
    *earlier, high, wide = module.kernel_size
    around = [wide // 2, wide // 2, high // 2, high // 2]
    if earlier:
        around += [earlier[0] - 1, 0]
    ones = {*module.stride, *module.dilation} == {1}
    plain = module.padding_mode == "zeros" and "_conv_forward" not in vars(module)
    return ones and plain and list(module._padding) == around
