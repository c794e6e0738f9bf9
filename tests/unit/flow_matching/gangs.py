"""Gangs in lock-step that hand a state on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.denoise import Denoiser, DenoiseState
from distriray.parallel import engine_of
from tests.unit.flow_matching.families import begin

TALL: dict[str, Any] = {"height": 160, "width": 64, "num_inference_steps": 8}
SYNC = {"exchange": "sync", "cfg_parallel": False}


class Drawn(NamedTuple):
    """What a rank has at the end."""

    latents: torch.Tensor
    picture: Image.Image
    preview: Image.Image


class Gangs:
    """Gangs of up to four around copies of one model, which hand a state on as bytes.

    Attributes:
        synchronous: of each step that was done, whether it was.
    """

    def __init__(self, make: Callable[[], Any], **config: Any) -> None:
        self._pipelines = [make() for _ in range(4)]
        self._config = ParallelConfig(**config)
        self.synchronous: list[bool] = []

    def draw(self, sizes: tuple[int, ...], **call: Any) -> list[Drawn]:
        """One image by gangs of these sizes, one after the other, each for as many steps."""
        state = begin(Denoiser(self._pipelines[0]), [1], prompt="a lake", **call)
        blob, steps = state.to_bytes(), state.num_steps
        for index, size in enumerate(sizes, 1):
            until = steps * index // len(sizes)
            ranks = run_in_lockstep(size, partial(self._rank, blob, until))
            blob = ranks[0][0]
        return [Drawn(*drawn) for _, *drawn in ranks]

    def _rank(self, blob: bytes, until: int, communicator: Communicator) -> Any:
        """The state after that step as bytes, and when it is done what there is to see."""
        gang = connect("local") if communicator.world_size == 1 else communicator
        pipeline = parallelize(self._pipelines[communicator.rank], gang, self._config)
        denoiser, state, engine = Denoiser(pipeline), DenoiseState.from_bytes(blob), engine_of(pipeline)
        assert engine is not None
        while state.step < until:
            denoiser.step(state)
            if communicator.rank == 0:
                self.synchronous.append(engine.statistics.synchronous)
        denoiser.settle(state)
        if not state.done:
            return (state.to_bytes(),)
        return state.to_bytes(), state.latents, denoiser.decode(state)[0], denoiser.preview(state)
