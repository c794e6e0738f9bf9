"""Plans: where tensors of a transformer are cut to the tokens of one rank, and what is made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from distriray.errors import InvalidRequest
from distriray.parallel.partition import Sequence, Stream, TokenPartition

Cut = tuple[Sequence, int]
"""The stream whose tokens lie along a dimension, and that dimension; `joint` is text, then image."""


@dataclass(frozen=True)
class Attention:
    """One kind of attention of a family.

    Attributes:
        replaces: the class of processors that it has in diffusers.
        processor: the class of those that take their place; None where they stay, and see all tokens.
        sequence: the tokens that it is over; None if it is to text that every rank has.
        others: further classes that diffusers may put there in place of the first, which exchange the same,
            and of what takes their place.
    """

    replaces: type
    processor: type | None
    sequence: Sequence | None = "joint"
    others: Mapping[type, type] = field(default_factory=dict)

    @property
    def kinds(self) -> Mapping[type, type | None]:
        """By each class of processors that may stand there, the class that takes its place, or its own."""
        replaced = {self.replaces: self.processor, **self.others}
        return {**{kind: kind for kind in replaced.values() if kind is not None}, **replaced}


@dataclass(frozen=True)
class Input:
    """An argument of the network besides latents, prompt embeddings and timestep.

    Attributes:
        name: what an error calls it.
        compared: as tensors that networks have made (`near`), that were given (`equal`), or as plain values.
        batched: whether its first dimension is the batch.
    """

    name: str
    compared: Literal["near", "equal", "plain"] = "equal"
    batched: bool = True


@dataclass(frozen=True)
class Blocks:
    """A family's blocks, as short steps know them (`ParallelConfig.cache_interval`).

    Attributes:
        first: the one that short steps compute, the first of a list.
        others: lists of which they compute none.
        output: which of the first one's outputs is the image's tokens.
        after: the module whose first argument is what all blocks made of them, which are the last of their
            tokens where there are fewer.
    """

    first: str = "transformer_blocks.0"
    others: tuple[str, ...] = ()
    output: int = 1
    after: str = "norm_out"

    @property
    def lists(self) -> tuple[str, ...]:
        """All lists of which short steps leave blocks out; that of the first block is the first."""
        return self.first.rpartition(".")[0], *self.others

    def are_short(self, layer: str) -> bool:
        """Whether short steps compute a layer, by its name."""
        within = f"{layer}.".startswith
        return within(f"{self.first}.") or not any(within(f"{each}.") for each in self.lists)


OF_TWO_KINDS = Blocks(others=("single_transformer_blocks",))
"""Blocks of two streams of tokens, and after them blocks of one."""


@dataclass(frozen=True)
class Plan:
    """A family's plan: where tensors are cut to a rank's tokens, and what attends across them.

    Names of modules are those of `named_modules`, in which `*` is any number.

    Attributes:
        cuts: by module, `""` is the network itself: by the name of an argument, or the index of an output,
            how it is cut. The first output is that of modules with one.
        attention: by module.
        gather: the module whose output, (batch, this rank's tokens of the image, channels), is gathered.
        inputs: by the name of the network's argument. Others are refused unless they have their default.
        kwargs: the argument for attention processors, of which only a LoRA's `scale` works, and what a family
            takes out of it (`TokenNetwork.scale_of`); None if there is none.
        whole: the modules that see all tokens, and are not cut.
        mask: the argument that says which tokens of the text are attended to, bool (batch, tokens).
        residuals: the arguments that are lists of what ControlNets add to the image's tokens after blocks,
            (batch, tokens, channels) each.
        blocks: those that short steps compute, and those that they do not; None of ControlNets.
    """

    cuts: Mapping[str, Mapping[str | int, Cut]]
    attention: Mapping[str, Attention]
    inputs: Mapping[str, Input]
    gather: str = "proj_out"
    kwargs: str | None = "joint_attention_kwargs"
    whole: tuple[str, ...] = ()
    mask: str | None = None
    residuals: tuple[str, ...] = ()
    blocks: Blocks | None = None


@dataclass(frozen=True)
class Cutter:
    """Cuts whole tensors to the tokens of one rank."""

    partition: TokenPartition
    rank: int

    def cut(self, cuts: Mapping[Any, Cut], values: Mapping[Any, Any]) -> dict[Any, Any]:
        """Values by name or index, those that a plan cuts cut; None is left alone."""
        return {
            key: value if key not in cuts or value is None else self._cut(key, value, *cuts[key])
            for key, value in values.items()
        }

    def image(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """Of the image's tokens, (batch, tokens, channels), this rank's; raises InvalidRequest."""
        return self._cut(name, tokens, "image", 1)

    def hooks(self, module: nn.Module, cuts: Mapping[str | int, Cut]) -> Iterator[Any]:
        """Hooks on a module that cut its arguments, which are given by name, and its outputs."""
        arguments = {key: cut for key, cut in cuts.items() if isinstance(key, str)}
        outputs = {key: cut for key, cut in cuts.items() if isinstance(key, int)}

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            missing = arguments.keys() - kwargs.keys()
            assert not missing, f"{missing} are not given by name"
            return args, self.cut(arguments, kwargs)

        def after(module: nn.Module, inputs: Any, output: Any) -> Any:
            if isinstance(output, torch.Tensor):
                return self.cut(outputs, {0: output})[0]
            return tuple(self.cut(outputs, dict(enumerate(output))).values())

        if arguments:
            yield module.register_forward_pre_hook(before, with_kwargs=True)
        if outputs:
            yield module.register_forward_hook(after)

    def _cut(self, name: Any, tensor: torch.Tensor, stream: Sequence, dimension: int) -> torch.Tensor:
        streams: tuple[Stream, ...] = ("text", "image") if stream == "joint" else (stream,)
        tokens, given = [self.partition.whole(each) for each in streams], tensor.shape[dimension]
        if given != sum(tokens):
            raise InvalidRequest(
                f"{name} of {given} tokens, where there are {sum(tokens)} of the {' and '.join(streams)}"
            )
        own = []
        for each, whole in zip(streams, tensor.split(tokens, dimension), strict=True):
            start, stop = self.partition.tokens(each, self.rank)
            own.append(whole.narrow(dimension, start, stop - start))
        return torch.cat(own, dimension) if len(own) > 1 else own[0].contiguous()


def key_mask(mask: torch.Tensor, partition: TokenPartition) -> torch.Tensor:
    """Mask of the keys of all ranks that are attended to, where each rank's come text first.

    Args:
        mask: of the text, (batch, tokens).

    Returns:
        bool (batch, 1, 1, tokens of all ranks).
    """
    image = mask.new_ones((len(mask), partition.height), dtype=torch.bool)
    return of_all_ranks(mask.bool(), image, partition)


def of_all_ranks(
    text: torch.Tensor, image: torch.Tensor, partition: TokenPartition, text_first: bool = True
) -> torch.Tensor:
    """Values of the text's and of the image's tokens, in the order of the ranks.

    Args:
        text, image: (batch, tokens).
        text_first: whether each rank's text comes before its part of the image.

    Returns:
        (batch, 1, 1, tokens of all ranks).
    """
    parts = []
    for rank in range(partition.world_size):
        own = [text[:, slice(*partition.tokens("text", rank))], image[:, slice(*partition.rows(rank))]]
        parts += own if text_first else own[::-1]
    return torch.cat(parts, 1)[:, None, None]
