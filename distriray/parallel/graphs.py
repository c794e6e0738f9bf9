"""Steps of a network as CUDA graphs, cut where ranks talk to each other.

A step of a network is thousands of kernels, and a host launches them more slowly than a GPU runs them. A
graph launches all of them at once. Transfers between ranks stay outside, so a graph never waits for a peer
and holds no communicator: a step is a few graphs in a row, with what is said to the peers in between
(docs/decisions/graphs-between-messages.md).
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from numbers import Number
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

Between = Callable[[Any], None]
"""Something that is done between two graphs, to the step that is under way."""

MOST_GRAPHS = 16
"""Steps of one shape that are kept as graphs; those used longest ago go first."""

MOST_MET = 64
"""Steps that were met once and are remembered: those whose numbers are others every time never end."""

_NUMBERS = (Number, str, type(None), torch.dtype, torch.device)


class CaptureFailed(Exception):
    """A step cannot be captured; nothing was computed or said to the peers. The message says why."""


class Graph(Protocol):
    """Work given to a device between `capture_begin` and `capture_end`, done again at each replay."""

    def capture_begin(self, pool: Any = ...) -> None: ...

    def capture_end(self) -> None: ...

    def replay(self) -> None: ...


class GraphMaker(Protocol):
    """A source of graphs: a device's own (`CudaGraphs`), or a stand-in for it."""

    def capturing(self) -> Any:
        """The context in which graphs are captured."""

    def new(self) -> tuple[Graph, dict[str, Any]]:
        """A graph, and the arguments with which its capture begins."""

    def let_go(self) -> None:
        """Let go of the memory of graphs: it is nobody's once all that were made so far are dropped."""


class CudaGraphs:
    """Graphs of one GPU, whose tensors share one pool of memory, since no two are replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._keeper: Graph | None = None

    @contextmanager
    def capturing(self) -> Iterator[None]:
        give_back_unused(self._device)  # graphs have memory of their own, and cannot take what is merely kept
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            if self._keeper is None:
                self._pool = torch.cuda.graph_pool_handle()
            try:
                self._keeper = self._keeper or self._keep()
                yield
            except BaseException:
                self._recover()
                raise
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def new(self) -> tuple[Graph, dict[str, Any]]:
        # Other threads, such as a watchdog that asks events, may go on calling CUDA meanwhile.
        return torch.cuda.CUDAGraph(), {"pool": self._pool, "capture_error_mode": "thread_local"}

    def let_go(self) -> None:
        self._keeper = None

    def _keep(self) -> Graph:
        """A graph that keeps the pool: it ends with the last of its graphs, even where its tensors live on,
        and no more can be captured into it then.
        """
        # Torch before 2.11 captures nothing outside inference mode once it has captured in it.
        with torch.inference_mode(False):
            keeper, arguments = self.new()
            keeper.capture_begin(**arguments)
            torch.zeros(1, device=self._device)
            keeper.capture_end()
        return keeper

    def _recover(self) -> None:
        """Do what torch before 2.13 leaves out where CUDA refuses to end a capture.

        That is under way for its allocator, which gives no memory back meanwhile, and its graph never lets go
        of the pool. And the device's default generator draws nothing until another capture has ended.
        """
        end: Any = getattr(torch._C, "_cuda_endAllocateToPool", None)  # since torch 2.8
        end = end or getattr(torch._C, "_cuda_endAllocateCurrentStreamToPool", None)
        with suppress(Exception):  # it was ended
            end(self._device.index, self._pool)
            torch._C._cuda_releasePool(self._device.index, self._pool)
        with suppress(Exception):  # of a device that does nothing any more, or a pool that has ended
            self._keeper = self._keep()


class Recorder:
    """The pieces of a step that is being captured."""

    def __init__(self, maker: GraphMaker) -> None:
        self.pieces: list[tuple[Graph, Between | None]] = []
        self._maker = maker
        self._begin()

    def between(self, action: Between) -> None:
        """Do `action` here in every replay, and nothing now."""
        self._graph.capture_end()
        self.pieces.append((self._graph, action))
        self._begin()

    def end(self) -> None:
        with warnings.catch_warnings():
            # Many networks have nothing to compute behind the last message. Torch takes that for a mistake.
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")
            self._graph.capture_end()
        self.pieces.append((self._graph, None))

    def _begin(self) -> None:
        self._graph, arguments = self._maker.new()
        self._graph.capture_begin(**arguments)


class StepGraph:
    """One step, captured: `forward(*args, **kwargs)` with inputs that may differ from step to step.

    Args:
        forward: must neither read what the device computes nor keep what it returns.
        told: those who say what is done between graphs, to the `Recorder` that their `recorder` is meanwhile.
        leaves, spec: args and kwargs, as `pytree` takes them apart; what is no tensor becomes a part of the
            graph.
        kept: what else `forward` reads; it lives as long as this.
    """

    def __init__(
        self,
        maker: GraphMaker,
        forward: Callable[..., Any],
        told: Sequence[Any],
        leaves: list[Any],
        spec: pytree.TreeSpec,
        kept: Any = None,
    ) -> None:
        self._kept = kept
        self._inputs = [_copied(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        own_args, own_kwargs = pytree.tree_unflatten(self._inputs, spec)
        with maker.capturing():
            recorder = Recorder(maker)
            for each in told:
                each.recorder = recorder
            try:
                # Compiling asks the device for more than a capture allows: what is not compiled by now is
                # captured as it is.
                with torch.compiler.set_stance("eager_on_recompile"):
                    self._output = forward(*own_args, **own_kwargs)
            except BaseException:
                with suppress(Exception):  # of a capture that has failed; what made it fail says why
                    recorder.end()
                raise
            finally:
                for each in told:
                    each.recorder = None
            recorder.end()
        for leaf in pytree.tree_leaves(self._output):
            if not isinstance(leaf, (torch.Tensor, *_NUMBERS)):
                raise TypeError(f"its output has a {type(leaf).__name__}, in which tensors cannot be found")
        self._pieces = recorder.pieces

    def replay(self, step: Any, leaves: list[Any]) -> Any:
        """The output for these inputs, in tensors of its own."""
        for own, leaf in zip(self._inputs, leaves, strict=True):
            if isinstance(own, torch.Tensor):
                own.copy_(leaf)
        for graph, action in self._pieces:
            graph.replay()
            if action is not None:
                action(step)
        return pytree.tree_map(
            lambda out: out.clone() if isinstance(out, torch.Tensor) else out, self._output
        )


class StepGraphs:
    """The captured steps of one exchange, or of a network without one.

    A step is captured when it is met for the second time: the first time compiles kernels, and makes the
    buffers that later steps find.

    Attributes:
        recorder: of the step that is being captured, None if none is.
        failed: the kinds of steps of which one could not be captured, and why.
    """

    def __init__(self, maker: GraphMaker) -> None:
        self.recorder: Recorder | None = None
        self.failed: dict[Hashable, str] = {}
        self._maker = maker
        self._graphs: OrderedDict[tuple[Hashable, ...], StepGraph | None] = OrderedDict()

    def __len__(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    def run(
        self,
        kind: Hashable,
        forward: Callable[..., Any],
        step: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kept: Any = None,
    ) -> Any:
        """`forward(*args, **kwargs)`, by a graph where there is one.

        Not where an input is neither a tensor nor a number or a text: it might change and stay the same.

        Args:
            kind: all that decides what `forward` does, besides its inputs' shapes and what is no tensor.
            step: the step of the exchange that its layers are in, None without one.
            kept: as in `StepGraph`.

        Raises:
            CaptureFailed: the network does something that no graph can hold, or there is no memory for one;
                `failed` says so now.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if not all(isinstance(leaf, (torch.Tensor, *_NUMBERS)) for leaf in leaves):
            return forward(*args, **kwargs)
        key = (kind, spec, tuple(_described(leaf) for leaf in leaves))
        if key not in self._graphs:
            met = [other for other, graph in self._graphs.items() if graph is None]
            if len(met) == MOST_MET:
                del self._graphs[met[0]]
            self._graphs[key] = None
            return forward(*args, **kwargs)
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        if graph is None:
            told = [self] if step is None else [self, step]
            try:
                graph = self._graphs[key] = StepGraph(self._maker, forward, told, leaves, spec, kept)
            except Exception as error:
                self.failed[kind] = f"a step cannot be captured: {error}"
                raise CaptureFailed(self.failed[kind]) from error
            while len(self) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        elif step is not None:
            step.skip()
        return graph.replay(step, leaves)

    def forget(self, kinds: Callable[[Any], bool]) -> None:
        """Drop those of some kinds."""
        for key in [key for key in self._graphs if kinds(key[0])]:
            del self._graphs[key]
        for kind in list(filter(kinds, self.failed)):
            del self.failed[kind]

    def drop(self) -> None:
        """Drop what was captured, to be captured anew; what cannot be is not tried again."""
        self._graphs.clear()

    def clear(self) -> None:
        """Drop all."""
        self.drop()
        self.failed.clear()


def give_back_unused(device: torch.device | None = None) -> None:
    """Give back what torch keeps of the memory of a GPU, the current one unless given, and does not use.

    To free memory waits for all that the GPU was given, for transfers from peers too, and locks torch's
    allocator meanwhile, if no more. So what it would wait for is waited for first, in a way that keeps no
    other thread from aborting a transfer from a peer that is gone.
    """
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, for which a block is compiled; an expanded tensor's has others."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return tensor.clone()
    return tensor.new_empty_strided(tensor.shape, tensor.stride()).copy_(tensor)


def _described(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), repr(leaf)
