"""Graphs of one network's steps: which of its steps may be graphs, and what drops them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import nn

from distriray.parallel.baked import Baked, arithmetic
from distriray.parallel.context import PatchContext
from distriray.parallel.exchange.step import Step
from distriray.parallel.graphs import CaptureFailed, GraphMaker, StepGraphs
from distriray.parallel.layers.bare import is_autocast_on
from distriray.parallel.networks.base import Call, Collect, Network
from distriray.parallel.room import is_out_of_memory
from distriray.parallel.share import Share

MOST_SETTINGS = 8
"""Settings of a network, such as adapters in use, whose graphs are kept; those used longest ago go first."""

log = logging.getLogger(__name__)


class _UnderWay(NamedTuple):
    """A call that is being computed, and the graphs that it may be one of."""

    call: Call
    share: Share
    graphs: StepGraphs | None
    collect: Collect


class NetworkGraphs:
    """Graphs of one network's steps, in all of its exchanges.

    Args:
        network: what is captured.
        context: what its layers look up.

    Attributes:
        alone: those of steps without an exchange; None if nothing is captured.
        obstacle: what kept a step that was to be a graph from being one, None if nothing did.
    """

    def __init__(self, network: Network, context: PatchContext) -> None:
        self.alone: StepGraphs | None = None
        self.obstacle: str | None = None
        self._network = network
        self._context = context
        self._maker: GraphMaker | None = None
        self._made: WeakSet[StepGraphs] = WeakSet()
        self._baked: list[Baked] = []  # of layers that stand, the last one as the network is now
        self._of_controls: dict[nn.Module, Baked] = {}
        self._obstacles_told: set[str] = set()
        self._under_way: _UnderWay

    def make_with(self, maker: GraphMaker | None) -> None:
        """Let later steps be graphs that `maker` makes, none if it is None."""
        self._maker = maker
        self.alone = self.new()
        self.obstacle = None

    def new(self) -> StepGraphs | None:
        """Those of another exchange."""
        if self._maker is None:
            return None
        graphs = StepGraphs(self._maker)
        self._made.add(graphs)
        return graphs

    def give_back(self) -> None:
        """Drop what was captured, and let go of its memory, which nothing else could have."""
        for graphs in self._made:
            graphs.drop()
        if self._maker is not None:
            self._maker.let_go()

    def begin_image(self) -> None:
        """Look anew for an obstacle: it may be gone."""
        if self._baked and self._baked[-1].obstacle is not None:
            self._baked.clear()

    @contextmanager
    def during(
        self, call: Call, share: Share, graphs: StepGraphs | None, collect: Collect
    ) -> Iterator[Collect]:
        """Let the network compute this call, one of `graphs` where it may be; it is to collect with what this
        yields."""
        self._under_way = _UnderWay(call, share, graphs, collect)
        try:
            yield self._collect
        finally:
            del self._under_way

    def compute(self, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """`forward`, the network's own, by graphs where steps like this one were captured.

        Raises:
            CaptureFailed: as `StepGraphs.run`.
        """
        call, share, graphs, _ = self._under_way
        if call.reuse is not None:
            given = call.reuse.added if call.short else None
            output, added = self._run(partial(self._reusing, forward), given, *args, **kwargs)
            if given is None:
                call.reuse.added = added
            return output
        return self._run(forward, *args, **kwargs)

    def _reusing(
        self, forward: Callable[..., Any], added: torch.Tensor | None, /, *args: Any, **kwargs: Any
    ) -> tuple[Any, torch.Tensor | None]:
        """The output of a short step, or, if nothing is `added`, that of a whole one and what others add."""
        with self._network.reusing(added) as of_whole:
            output = forward(*args, **kwargs)
        return output, of_whole() if added is None else None

    def _run(self, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """`forward`, by graphs where steps like this one were captured."""
        call, share, graphs, _ = self._under_way
        step = self._context.step
        kind = "alone" if step is None else step.kind
        if graphs is None or kind is None:
            return forward(*args, **kwargs)
        part = share.communicator.rank, share.part.start, share.part.stop
        shared = share.layout, share.partition, share.batch, part
        modes = (
            call.reuse is None,
            self._context.new_text,
            torch.is_inference_mode_enabled(),
            self._network.switches(),
        )
        baked, beside = self._as_it_is(), self._beside(call)
        key = baked, kind, beside, *shared, *modes, *arithmetic()
        self.obstacle = self._obstacle(call, baked, *beside) or graphs.failed.get(key)
        if self.obstacle is None:
            try:
                return graphs.run(key, forward, step, args, kwargs, self._network.cached(call))
            except CaptureFailed as failure:
                if is_out_of_memory(failure.__cause__):
                    self.give_back()  # launched, the step needs what its capture has taken
                raise
        if self.obstacle not in self._obstacles_told:
            self._obstacles_told.add(self.obstacle)
            log.warning("steps are launched kernel by kernel, not as CUDA graphs: %s", self.obstacle)
        return forward(*args, **kwargs)

    def _collect(self, part: torch.Tensor) -> torch.Tensor:
        """The whole output: now, or in every replay of the graphs that are being captured."""
        _, share, graphs, collect = self._under_way
        if graphs is None or graphs.recorder is None:
            return collect(part)
        whole = part.new_empty(share.whole(part))

        def fill(step: Step | None) -> None:
            whole.copy_(self._under_way.collect(part))  # of the step that is replayed

        graphs.recorder.between(fill)
        return whole

    def _as_it_is(self) -> Baked:
        """The network as it is now; graphs of layers that stand no more are dropped."""
        if self._baked:
            now = self._baked[-1]
            if now.obstacle is not None or now.holds():
                return now
            if now.stands():
                return self._set_otherwise()
        for graphs in self._made:
            graphs.clear()
        self._baked = [Baked(self._network.module, self._network.replaced)]
        return self._baked[-1]

    def _set_otherwise(self) -> Baked:
        """The network whose layers stand, with other settings: perhaps some that it had before."""
        before = next((baked for baked in self._baked if baked.holds()), None)
        if before is not None:
            self._baked.remove(before)
        elif len(self._baked) == MOST_SETTINGS:
            oldest = self._baked.pop(0)
            for graphs in self._made:
                graphs.forget(lambda kind: kind[0] is oldest)
        self._baked.append(before or Baked(self._network.module, self._network.replaced))
        return self._baked[-1]

    def _beside(self, call: Call) -> tuple[Baked, ...]:
        """The ControlNets of a call as they are now."""
        known, modules = self._of_controls, self._network.beside(call)
        for module in modules:
            if module not in known or not known[module].holds():
                for gone in known.keys() - {*self._network.controls.values()}:
                    del known[gone]
                known[module] = Baked(module, module.forward)
        return tuple(known[module] for module in modules)

    def _obstacle(self, call: Call, *baked: Baked) -> str | None:
        """What keeps graphs from standing for this call."""
        if is_autocast_on(call.sample.device):
            return "autocast is on, and drops the weights that it has cast when it ends"
        obstacles = (each.obstacle for each in baked if each.obstacle is not None)
        return next(obstacles, None) or self._network.uncaptured(call)
