"""The interface between the engine and a network family (docs/adding-a-model.md)."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from distriray.collective.base import Communicator
from distriray.config import KINDS, Kind, ParallelConfig
from distriray.errors import UnsupportedModel
from distriray.parallel.agreement import Compared
from distriray.parallel.context import PatchContext
from distriray.parallel.exchange.step import Step
from distriray.parallel.layout import GangLayout
from distriray.parallel.networks.local import LocalCode
from distriray.parallel.partition import Partition, dealt_heads
from distriray.parallel.share import Share

Collect = Callable[[torch.Tensor], torch.Tensor]
"""End the exchange of a step, and gather the whole output from every rank's part of it."""


@dataclass(eq=False)
class Reuse:
    """What short steps of an image take from its last whole one (`ParallelConfig.cache_interval`).

    Attributes:
        added: what the blocks that short steps leave out have added, or made, for this rank's part: a tensor
            on its device. None before the first whole step.
        like: shape and dtype of the latents, whole, that it is of, and `Call.branches`.
        short: whether the call under way is a short step; a whole one changes `added`.
        age: number of short steps since the whole one.
        in_turn: whether the image is so far that some of its steps are short.
    """

    added: torch.Tensor | None = None
    like: tuple[torch.Size, torch.dtype, int] | None = None
    short: bool = False
    age: int = 0
    in_turn: bool = False


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a network, in the engine's terms.

    Attributes:
        sample: what is denoised, whole; its first dimension is the batch.
        timestep: as the network was given it: a tensor on a GPU is not to be read there (`Schedules`), and
            where it lies tells which step it is of (`Element`).
        text: prompt embeddings, (batch, tokens, channels); other text means another image, unless a caller
            says that it is the same.
        text_scale: what cached text keys and values depend on besides the text, such as a LoRA's scale.
        branch: names the guidance branch where each has calls of its own; None where one call has all.
        arguments: the other arguments, by the names of the network's parameters.
        besides: names what else runs in the call, such as ControlNets, whose layers exchange too; None is
            nothing.
        replaces_layers: whether some of that stands in the place of layers, as IP-Adapters do; such a step is
            launched kernel by kernel.
        reuse: where some steps are short; else None.
        branches: of guidance that have calls of their own in the step, as far as the caller says how many.
        dealt: where each half of a gang makes a call of its own, those of both, of which this is one; else
            none.
    """

    sample: torch.Tensor
    timestep: torch.Tensor | float
    text: torch.Tensor
    text_scale: Any = None
    branch: Hashable = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    besides: tuple[Hashable, ...] | None = None
    replaces_layers: bool = False
    reuse: Reuse | None = None
    branches: int = 1
    dealt: Sequence[Call] = ()

    @property
    def batch(self) -> int:
        """Images of the call, both guidance branches counted where it has both."""
        return self.sample.shape[0]

    @property
    def predictions(self) -> int:
        """Images that all ranks have a prediction for after it: of both halves where calls are dealt."""
        return self.batch * max(1, len(self.dealt))

    def with_image_prompts(self, names: Sequence[str]) -> Call:
        """This call, where those IP-Adapters are in the network for its image and not for others."""
        if not names:
            return self
        besides = *(self.besides or ()), *(f"{name} (IP)" for name in names)
        return replace(self, besides=besides, replaces_layers=True)

    @property
    def short(self) -> bool:
        """Whether it is a short step."""
        return self.reuse is not None and self.reuse.short

    @property
    def of_halves(self) -> Sequence[Call]:
        """The calls that ranks make: those of both halves where they are dealt, else this one."""
        return [replace(call, dealt=self.dealt) for call in self.dealt] or [self]


def check_scale_alone(name: str | None, given: Iterable[str] | None) -> None:
    """Raise `UnsupportedModel` for arguments of attention processors, by name, other than a LoRA's scale."""
    foreign = sorted(set(given or ()) - {"scale"})
    if foreign:
        raise UnsupportedModel(f"{name} {', '.join(foreign)}; with patches only 'scale' (LoRA) works")


class Network(ABC):
    """One network of a family, as an engine drives it.

    A subclass knows everything of its family's network and nothing of gangs, steps and buffers.

    Args:
        module: the network, of class `kind` or a subclass.
        local: the code in it that works on some rows without the others.

    Attributes:
        kind: the class of the networks.
        kinds: of values that its layers exchange.
        displacement_measured: whether it is known what old values do to the pictures of a trained network of
            the family; else `auto` keeps to fresh ones.
        repeats: the classes of its blocks that repeat, by name; None are those that diffusers says.
        pads_text: whether prompts are padded to the same number of tokens before the network gets them.
        forward: what computes a rank's part; what answered the module's calls before the engine did, hooks
            included, or graphs of it. It goes by its arguments, by `Share` and by nothing else that is not
            the module's, `context`'s or in `switches`.
        controls: ControlNets that its calls may name, by name, which are cut into patches with it.
        replaced: what answered the module's calls before the engine did; None until then.

    Raises:
        UnsupportedModel: as `check`.
    """

    kind: ClassVar[type[nn.Module]]
    kinds: ClassVar[frozenset[Kind]] = KINDS
    displacement_measured: ClassVar[bool] = False
    pads_text: ClassVar[bool] = True
    repeats: ClassVar[tuple[str, ...] | None] = None
    controls: Mapping[str, nn.Module] = {}
    forward: Callable[..., Any]
    replaced: Callable[..., Any] | None = None

    def __init__(self, module: Any, local: LocalCode | None = None) -> None:
        self.module = module
        self.local = local or LocalCode()
        self.check()

    def replace_forward(self, forward: Callable[..., Any]) -> None:
        """Let `forward` answer the module's calls, and keep what did as `replaced`, which `forward` runs.

        Accelerate's hooks stay around it: pipelines that offload whole models take theirs off after every
        image, and put back what they were put around.
        """
        held = "_old_forward" if "_hf_hook" in vars(self.module) else "forward"
        self.forward = self.replaced = getattr(self.module, held)
        forward = torch.compiler.disable(forward)  # of a network that torch is to compile as a whole

        @functools.wraps(self.forward)  # diffusers' modular blocks pass on the parameters that they find here
        def answer(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        setattr(self.module, held, answer)

    @property
    def repeated_blocks(self) -> Iterator[nn.Module]:
        """The blocks that there are many of, and most of the time is spent in."""
        names = getattr(self.kind, "_repeated_blocks", None) if self.repeats is None else self.repeats
        return (module for module in self.module.modules() if type(module).__name__ in (names or ()))

    @property
    @abstractmethod
    def row_unit(self) -> int:
        """Latent rows of the smallest patch: an image of n units can be cut among n ranks."""

    @abstractmethod
    def check(self) -> None:
        """Raise `UnsupportedModel`, naming it, for anything about the network that patches cannot honour.

        Called by `parallelize`, before anything is changed. What may change later is for `convert`.
        """

    @abstractmethod
    def convert(self, context: PatchContext) -> bool:
        """Convert every layer that is not yet patch-parallel; called when an image begins.

        Args:
            context: where the layers look up the step that they exchange in.

        Returns:
            Whether any layer was converted (a LoRA was loaded, say), so that buffers are laid out anew.

        Raises:
            UnsupportedModel: a layer that is not known to be cut, by its name.
        """

    def text_weights(self) -> Hashable:
        """A mark that changes with the weights that make text keys and values; asked in every step."""
        return None

    def adapters_that_exchange(self) -> Hashable:
        """The adapters in use of which some layers ask their peers for rows; asked in every step."""
        return None

    def switches(self) -> Hashable:
        """All that layers go by that is neither theirs nor torch's, such as a process's way to attend."""
        return None

    def uncaptured(self, call: Call) -> str | None:
        """The part of a call that no graph can hold, such as a copy from the host; None if none is known."""
        return None

    def beside(self, call: Call) -> Sequence[nn.Module]:
        """The ControlNets that `forward` runs in a call."""
        return ()

    @property
    def has_short_steps(self) -> bool:
        """Whether it is known which blocks short steps may leave out."""
        return False

    def may_be_short(self, call: Call) -> bool:
        """Whether a call may be a short step, as far as its arguments go."""
        return call.besides is None

    def reusing(self, added: torch.Tensor | None) -> AbstractContextManager[Callable[[], torch.Tensor]]:
        """Let the module's own forward be a short step with what others have `added`, or a whole one.

        Yields:
            What gives, after it, the same of a whole step.
        """
        raise NotImplementedError("a network without short steps")

    def cached(self, call: Call) -> Any:
        """Tensors that a call reads, and that the network's own code keeps elsewhere than in modules.

        It may let go of them; graphs that read them keep them.
        """
        return None

    @abstractmethod
    def read(self, *args: Any, **kwargs: Any) -> Call:
        """A call of the network, whose parameters an implementation repeats with their defaults.

        Raises:
            UnsupportedModel: an input that patches cannot honour.
        """

    @abstractmethod
    def partition(self, call: Call, patches: int) -> Partition:
        """Partition of the sample: which of `patches` ranks owns which rows.

        Raises:
            InvalidRequest: fewer units of rows than ranks.
        """

    def deal(self, calls: Sequence[Call], communicator: Communicator, config: ParallelConfig) -> Call | None:
        """That one of a step's calls, one for each branch of guidance, which a rank's half of the gang makes.

        None where all ranks make all: in odd gangs, and without a second branch.

        Raises:
            InvalidRequest: `cfg_parallel=True`, and the gang is odd.
        """
        if len(calls) != 2 or calls[0].sample.shape != calls[1].sample.shape:
            return None
        layout = GangLayout.of(communicator.world_size, len(calls), config.cfg_parallel)
        if layout.halves != len(calls):
            return None
        calls = self.apart(calls)
        own = calls[layout.half(communicator.rank)]
        # Of one name, so that the step is known to be the same one on all ranks.
        return replace(own, branch=calls[0].branch, dealt=tuple(calls))

    def apart(self, calls: Sequence[Call]) -> Sequence[Call]:
        """Calls of one step so that none needs what another has made."""
        return calls

    def share(self, call: Call, communicator: Communicator, config: ParallelConfig) -> Share:
        """The part of a call that one rank of a gang computes.

        Raises:
            InvalidRequest: the gang cannot share such a call, or its ranks outnumber the heads that they are
                to deal.
        """
        rank = communicator.rank
        layout = GangLayout.of(communicator.world_size, call.predictions, config.cfg_parallel)
        exchanges = layout.patches > 1 and config.exchange != "none"
        for heads in sorted(self.key_heads) if exchanges else ():
            dealt_heads(config.attention, heads, layout.patches)  # refused before a layer asks
        return Share(
            layout,
            communicator.subgroup(layout.ranks(layout.half(rank))),
            self.partition(call, layout.patches),
            call.batch,
            slice(0, call.batch) if call.dealt else layout.batch_slice(rank, call.batch),
            exchanges,
            call.predictions,
        )

    @property
    def key_heads(self) -> Set[int]:
        """Numbers of heads of keys that its layers of attention to the whole image have."""
        return frozenset()

    @abstractmethod
    def dry_run(self, call: Call, share: Share, step: Step) -> None:
        """Hand `step` what layers would in this call, in tensors of torch's meta device: their shapes alone.

        So it is known what the buffers of an image take before there are any. Order does not matter.
        """

    @abstractmethod
    def compared(self, call: Call) -> Compared:
        """All that decides the picture and the size of messages; ranks compare it when an image begins."""

    @abstractmethod
    def compute(self, call: Call, share: Share, collect: Collect) -> Any:
        """Compute this rank's part, and return the whole output in the form that the caller asked for.

        Args:
            call: whole inputs.
            share: this rank's part of them, and how to cut them to it.
            collect: to be called once, after the last layer that exchanges, with this rank's part of the
                output, (part of the batch, channels, this rank's rows, columns), and on every rank; it
                returns (`share.predictions`, channels, rows, columns).
        """
