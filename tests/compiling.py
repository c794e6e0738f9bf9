"""A compiler that compiles nothing, for tests of what is given to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class CountingCompiler:
    """A backend of `torch.compile` that runs each graph as it is, and counts graphs and runs."""

    def __init__(self) -> None:
        self.graphs = 0
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run
