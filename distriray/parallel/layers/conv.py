"""Convolutions whose input rows are spread over the gang."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from torch import nn

from distriray.errors import UnsupportedModel
from distriray.parallel.context import PatchContext
from distriray.parallel.layers.opaque import Opaque
from distriray.parallel.partition import Window


class PatchConv2d(nn.Conv2d, Opaque):
    """`nn.Conv2d` on one rank's rows, with the halo rows of its peers (Li et al. 2024, section 4.2).

    Shares the original's parameters under the same names: a convolution becomes one by changing its class.
    Input and output are (batch, channels, this rank's rows, columns). Outside a step of an exchange it is
    `nn.Conv2d`.

    Attributes:
        halos_from: what the input has in a step besides this rank's rows: its halo rows, where a group norm
            that fuses has put them (`norm`); the rows of all ranks (`whole`); or nothing.
    """

    context: PatchContext | None = None
    halos_from: Literal["norm", "whole"] | None = None
    pads_end: bool = False  # one row below and one column to the right, instead of its own padding

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        alone = self.context is None or not self.context.exchanges
        if alone or self.kernel_size[0] == self.stride[0] == 1:
            return super().forward(input)
        if self.halos_from == "whole":
            return self.exchanged(input)
        return self.exchange(input)

    def exchanged(self, *inputs: Any) -> torch.Tensor:
        (input,) = inputs
        assert self.context is not None and self.context.step is not None
        step = self.context.step
        if self.halos_from == "whole":
            read = step.cut(input, self.window)
        elif self._has_halos:
            read = input
        else:
            read = step.padded(input, self.window)
        if self.pads_end:
            read = F.pad(read, (0, 1))
        columns = int(self.padding[1])
        return F.conv2d(read, self.weight, self.bias, self.stride, (0, columns), self.dilation, self.groups)

    def exchanged_shape(self, *inputs: Any) -> tuple[int, ...]:
        batch, _, rows, columns = inputs[0].shape
        above, beside = self.stride
        down, across = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))
        columns += int(self.pads_end) + 2 * int(self.padding[1])
        rows = (rows - down) // above + 1 if self._has_halos else -(-rows // above)
        return batch, self.out_channels, rows, (columns - across) // beside + 1

    @property
    def _has_halos(self) -> bool:
        return self.halos_from == "norm" and self.context is not None and self.context.fuses

    @cached_property
    def window(self) -> Window:
        rows = (0, 1) if self.pads_end else (int(self.padding[0]),) * 2
        return Window(self.kernel_size[0], self.stride[0], self.dilation[0], rows)


class PatchDownsample2D(Downsample2D):
    """diffusers' downsampling without padding, which pads the right and the bottom edge by hand.

    The row below a patch belongs to the next rank, so the convolution asks for it and pads the image's edges.
    """

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        context = self.conv.context
        if context is None or not context.exchanges:
            return super().forward(hidden_states, *args, **kwargs)
        if args or kwargs:
            raise UnsupportedModel("downsampling that is given more than hidden states, which is not used")
        return self.conv(hidden_states)


def patch_conv(module: nn.Conv2d, context: PatchContext) -> None:
    """Turn `module` into a `PatchConv2d` that looks its step up in `context`, in place."""
    module.__class__ = PatchConv2d
    assert isinstance(module, PatchConv2d)
    module.context = context
    module.enroll()


def pads_by_hand(module: nn.Module) -> bool:
    """Whether it is a `Downsample2D` that adds a row and a column at the end before its convolution."""
    return type(module) is Downsample2D and bool(module.use_conv and module.padding == 0)


def patch_downsample(module: Downsample2D) -> None:
    """Let the convolution of one that pads by hand ask its neighbour for the row below."""
    if isinstance(module.conv, PatchConv2d):
        if module.norm is not None:
            raise UnsupportedModel(f"{module} normalizes and pads by hand, which no supported U-Net does")
        module.__class__ = PatchDownsample2D
        module.conv.pads_end = True
