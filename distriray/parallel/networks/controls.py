"""ControlNets beside a network, in one call or step of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from distriray.errors import UnsupportedModel


class UsedControl(NamedTuple):
    """A ControlNet in one call of its network.

    Attributes:
        name: of the ControlNet.
        network: without the layers that see its picture alone.
        picture: as `network` takes it: of a U-Net's, (1, channels, rows, columns) like its first feature map;
            of a transformer's, as latents are given to it, for one image or for each of the request's.
        scale: of what it adds.
        mode: which kind of picture it is, for a union of several ControlNets in one.
    """

    name: str
    network: Any
    picture: torch.Tensor
    scale: float
    mode: int | None = None

    def for_batch(
        self, batch: int, cut: Callable[[torch.Tensor], Any] = lambda picture: picture
    ) -> UsedControl:
        """The same with its picture for each of so many entries of a batch, of which `cut` takes some.

        A batch with both branches of guidance has all images of one before those of the other.
        """
        times = batch // len(self.picture)
        return self._replace(picture=cut(self.picture.repeat(times, *[1] * (self.picture.ndim - 1))))


class Residuals:
    """What the ControlNets of one step add to a transformer, made in the first call that is given it.

    A branch of guidance that has a call of its own adds what the first one's has made, as diffusers does.

    Args:
        controls: of the step.
        calls: of the network in the step.

    Attributes:
        for_others: whether what is made is for more than one call.
    """

    def __init__(self, controls: Sequence[UsedControl], calls: int = 1) -> None:
        self.controls = tuple(controls)
        self.for_others = calls > 1
        self._made: Mapping[str, Any] | None = None

    @property
    def due(self) -> tuple[UsedControl, ...]:
        """The ControlNets that the next call runs."""
        return self.controls if self._made is None else ()

    def made_by(self, make: Callable[[Sequence[UsedControl]], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Arguments of the network by name, which `make` makes where no call has."""
        if self._made is None:
            self._made = make(self.controls)
        return self._made


def check_cut(asked: Sequence[UsedControl], cut: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel for a ControlNet that is none of those, by name, that are cut into patches."""
    for control in asked:
        if cut.get(control.name) is not control.network:
            raise UnsupportedModel(f"the ControlNet {control.name!r} is not one that is cut into patches")


def check_same(name: str, own: Any, its: Any) -> None:
    """Raise UnsupportedModel unless an entry of a ControlNet's configuration is that of its model's.

    Files have lists where classes have tuples.
    """
    one, other = (tuple(each) if isinstance(each, list) else each for each in (own, its))
    if one != other:
        raise UnsupportedModel(f"its {name} is {own!r}, and that of the model {its!r}")
