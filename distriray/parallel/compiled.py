"""Blocks of a network, compiled for the shapes that they meet."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from distriray.errors import UnsupportedModel
from distriray.parallel.networks.registry import network_of
from distriray.parallel.parallelize import engine_of

MOST_SHAPES = 1024
"""Of one class of blocks: torch compiles for 8 and gives up, which gangs of a few sizes are beyond."""


def compile_blocks(pipeline: Any, backend: str | Callable[..., Any] = "inductor") -> None:
    """Let torch compile the blocks that a network repeats: once for each shape, when a call first has it.

    Where the network's texts have any length, twice: the second time for all lengths.

    A block becomes one graph. Layers that talk to peers are operators in it, called as they are. So what is
    compiled for a shape is used in every gang and mode in which a rank's part has that shape. May be called
    before `parallelize`, too, but what was compiled by then is compiled anew in a gang.

    To compile for some shapes only, call the network with these, and then
    `torch.compiler.set_stance("eager_on_recompile")`. torch gives up after 8 shapes of a block: within
    `many_shapes()` it does not.

    Args:
        pipeline: a diffusers pipeline around a network of a family in `networks.registry.NETWORKS`, or such a
            network.
        backend: as in `torch.compile`.

    Raises:
        UnsupportedModel: its blocks are not known.
    """
    engine = engine_of(pipeline)
    network = network_of(pipeline) if engine is None else engine.network
    blocks = list(network.repeated_blocks)
    if not blocks:
        raise UnsupportedModel(f"a {network.kind.__name__} without blocks that repeat has nothing to compile")
    dynamic = False if network.pads_text else None
    for block in blocks:
        # Not `block.compile()`: hooks on blocks cut what goes into them, and stay outside.
        block.forward = torch.compile(block.forward, backend=backend, dynamic=dynamic, fullgraph=True)


def many_shapes() -> AbstractContextManager[Any]:
    """Let torch compile blocks for as many shapes as gangs of all sizes have. For the calling thread."""
    limits = {"cache_size_limit": MOST_SHAPES, "accumulated_cache_size_limit": 16 * MOST_SHAPES}
    patched: AbstractContextManager[Any] = torch._dynamo.config.patch(limits)
    return patched
