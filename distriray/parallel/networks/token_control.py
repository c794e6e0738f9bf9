"""Common part of the ControlNets of transformers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any, ClassVar

import torch
from torch import nn

from distriray.parallel.exchange.step import Step
from distriray.parallel.networks.base import Call
from distriray.parallel.networks.controls import UsedControl, check_same
from distriray.parallel.networks.tokens import TokenNetwork
from distriray.parallel.share import Share

Added = Mapping[int, torch.Tensor]
"""What blocks add, by their index."""
Run = Callable[[str, dict[str, Any]], Any]
"""Computes the ControlNet of that name with those arguments, and returns what its forward does."""


class TokenControl(TokenNetwork):
    """A ControlNet of a transformer, with blocks like its own; it looks at the same tokens.

    Its plan has no `gather`: what it adds to a rank's tokens stays there.

    Attributes:
        like: entries of its configuration that are those of the transformer's.
    """

    like: ClassVar[tuple[str, ...]]

    @classmethod
    def check_fits(cls, network: Any, transformer: Any) -> None:
        """Raise UnsupportedModel, with what is wrong, unless a ControlNet is one for this transformer."""
        own, its = network.config, transformer.config
        for name in cls.like:
            check_same(name, own.get(name), its.get(name))

    @staticmethod
    @abstractmethod
    def arguments(control: UsedControl, given: Mapping[str, Any]) -> dict[str, Any]:
        """The ControlNet's arguments, but for `shown`, for those of the transformer."""

    @staticmethod
    def shown(control: UsedControl) -> dict[str, Any]:
        """Those of its arguments that are its picture and scale."""
        return {
            "controlnet_cond": control.picture,
            "conditioning_scale": control.scale,
            "return_dict": False,
        }

    @staticmethod
    @abstractmethod
    def spread(network: Any, transformer: Any, output: Any) -> dict[str, Added]:
        """What each block of the transformer is to add, by its argument for it and the block's index.

        Args:
            network: the ControlNet.
            output: of its forward.
        """

    @staticmethod
    def argument(added: Added) -> Any:
        """What blocks add, in the form of the transformer's argument for it: a list with one for each."""
        return [added[index] for index in range(len(added))]

    @classmethod
    def residuals_of(
        cls, transformer: Any, controls: Sequence[UsedControl], given: Mapping[str, Any], run: Run
    ) -> dict[str, Any]:
        """Arguments of the transformer for what ControlNets add; that of several is added up.

        Args:
            given: the others.

        Source: Zhang et al., ICCV 2023 (arXiv 2302.05543).
        """
        added: dict[str, Added] = {}
        for control in controls:
            output = run(control.name, {**cls.arguments(control, given), **cls.shown(control)})
            for name, parts in cls.spread(control.network, transformer, output).items():
                added[name] = _sums(added.get(name, {}), parts)
        return {name: cls.argument(parts) for name, parts in added.items() if parts}

    def of_share(self, share: Share) -> Share:
        """A rank's share of a call of the transformer, as it is of one of the ControlNet."""
        return share

    def dry_run(self, call: Call, share: Share, step: Step) -> None:
        super().dry_run(call, self.of_share(share), step)

    def output(self, share: Share, given: dict[str, Any]) -> Any:
        """Of its forward, for this rank's tokens, of whole arguments of this rank's part of the batch."""
        with self.cutting(self.of_share(share), given) as cut:
            output = self.module(**cut)
        self.check_entered(share.exchanges)
        return output


def controlled(
    kind: type[TokenControl], transformer: Any, controls: Sequence[UsedControl], *, given: Mapping[str, Any]
) -> dict[str, Any]:
    """`TokenControl.residuals_of` a transformer that is not cut into patches."""
    batch = len(given[kind.names[0]])
    networks = {control.name: control.network for control in controls}
    whole = [control.for_batch(batch) for control in controls]
    return kind.residuals_of(transformer, whole, given, lambda name, given: networks[name](**given))


def repeated(samples: Sequence[torch.Tensor] | None, blocks: nn.ModuleList, in_turn: bool = False) -> Added:
    """What each of `blocks` adds, where a ControlNet has fewer: each for some in a row, or all in turn."""
    if not samples:
        return {}
    each = ceil(len(blocks) / len(samples))
    return {
        index: samples[index % len(samples) if in_turn else index // each] for index in range(len(blocks))
    }


def _sums(one: Added, other: Added) -> Added:
    """Of what each block adds twice: one sum for all blocks that add the same, which is in memory once."""
    sums: dict[tuple[int, int], torch.Tensor] = {}
    total = {**one, **other}
    for index in one.keys() & other.keys():
        a, b = one[index], other[index]
        if (id(a), id(b)) not in sums:
            sums[id(a), id(b)] = a + b
        total[index] = sums[id(a), id(b)]
    return total
