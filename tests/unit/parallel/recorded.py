"""A stand-in for CUDA graphs: operations, recorded as they run, and run again into the same tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from distriray.parallel.layers.opaque import _exchange
from tests.compiling import CountingCompiler

HOST_READS = {"_local_scalar_dense", "item", "equal", "nonzero", "is_nonzero"}


class RecordedGraph:
    """What a graph does: the same operations on the same memory, and nothing of the Python around them.

    As on a GPU, nothing that is computed can be read meanwhile, and no memory that outlasts the capture is
    written by it.
    """

    def __init__(self, tape: Tape) -> None:
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.replays = 0
        self._tape = tape
        self._before: dict[int, tuple[Any, Any]] = {}

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, now and in every replay."""
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else kwargs[argument.name]
                storage = value.untyped_storage()
                self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        output = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, output))
        return output

    def capture_begin(self) -> None:
        self._tape.graph = self

    def capture_end(self) -> None:
        self._tape.graph = None
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, output in self.operations:
            again = func(*args, **kwargs)
            pairs = zip(pytree.tree_leaves(output), pytree.tree_leaves(again), strict=True)
            for before, now in pairs:
                if isinstance(before, torch.Tensor) and before.data_ptr() != now.data_ptr():
                    before.copy_(now)


class Tape(TorchDispatchMode):
    """Gives operations to the graph that is being captured, also those within layers' exchanges.

    So it sees what a GPU is given. Of compiled code it sees what is called in it: all that a compiler leaves
    as it is, and no kernel that a compiler makes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph: RecordedGraph | None = None
        self._layer: torch.Tensor | None = None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run meanwhile: torch runs what it was compiled from otherwise."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.distriray.exchange.default:
            self._layer = args[1]
            with self:
                return _exchange(*args)
        if func.overloadpacket.__name__ in HOST_READS and args[0] is not self._layer:
            raise RuntimeError(f"{func} reads a value while it is captured")
        if self.graph is None:
            return func(*args, **kwargs or {})
        return self.graph.record(func, args, kwargs or {})


class RecordedGraphs:
    """Makes them, and remembers all that it made."""

    def __init__(self) -> None:
        self.made: list[RecordedGraph] = []
        self.tape = Tape()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        with self.tape:
            yield

    def new(self) -> tuple[RecordedGraph, dict[str, Any]]:
        self.made.append(RecordedGraph(self.tape))
        return self.made[-1], {}

    def let_go(self) -> None:
        """Its memory is everybody's."""


class CompiledGraphs(RecordedGraphs):
    """Notes how often compiled code has run in each capture."""

    def __init__(self, compiler: CountingCompiler) -> None:
        super().__init__()
        self.runs: list[int] = []
        self._compiler = compiler

    @contextmanager
    def capturing(self) -> Iterator[None]:
        before = self._compiler.runs
        with super().capturing():
            yield
        self.runs.append(self._compiler.runs - before)
