"""Makes the pictures of a setting: by one device, or by a gang that takes turns on it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.quality.design import Setting
from bench.quality.prompts import Prompt
from distriray.collective import LockstepCommunicator, run_in_lockstep
from distriray.denoise import Denoiser, DenoiseState
from distriray.errors import InvalidRequest, NotFinite
from distriray.models import ModelSpec, load_pipeline
from distriray.parallel import engine_of, parallelize
from distriray.parallel.networks.registry import network_of
from distriray.requests import SamplingParams
from distriray.steps import SchedulerName


@dataclass(frozen=True)
class Paint:
    """Latents of some prompts, (N, channels, rows, columns) float32, and the synchronous steps each took."""

    latents: NDArray[np.float32]
    synchronous_steps: NDArray[np.int64]


class Painter:
    """One model on one device, and as many ranks of it as are asked for; all share its weights.

    Args:
        spec: a model of any family that is served.
        device: where it runs; on a GPU too the ranks take turns.
        size: of the pictures, in pixels a side.
        guidance_scale: the model's own if it is None.
    """

    def __init__(self, spec: ModelSpec, device: str, *, size: int, guidance_scale: float | None) -> None:
        self.pipeline = load_pipeline(spec, device)
        self._alone = Denoiser(self.pipeline)
        self._device = torch.device(device)
        self._size = size
        self._guidance_scale = guidance_scale
        self._ranks: list[Any] = []

    @property
    def schedulers(self) -> tuple[SchedulerName, ...]:
        """Those that the model takes."""
        return self._alone.terms.schedulers

    @property
    def has_short_steps(self) -> bool:
        """Whether the model takes `cache_interval`."""
        return network_of(self.pipeline).has_short_steps

    def check(self, settings: Iterable[Setting]) -> None:
        """Raise InvalidRequest, with what would do, unless pictures have rows for all patches."""
        unit = network_of(self.pipeline).row_unit
        scale = self._alone.sizes.latent_row
        rows = self._size // scale
        most, wanted = -(-rows // unit), max(setting.patches for setting in settings)
        if wanted > most:
            least = ((wanted - 1) * unit + 1) * scale
            raise InvalidRequest(
                f"--size {self._size} has rows for {most} patches at most, and --rows asks for {wanted}; "
                f"use --size {least} or more, or other --rows",
                "size",
            )

    def paint(self, setting: Setting, prompts: Iterable[Prompt]) -> Paint:
        """The latents of `prompts`, each from the noise of its seed."""
        latents, synchronous = zip(*(self._painted(setting, prompt) for prompt in prompts), strict=True)
        return Paint(np.concatenate(latents), np.array(synchronous))

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Pictures of latents, (N, height, width, 3). What is not a number comes out black."""
        state = self._alone.prepare(self._asked(Prompt("", 0)))
        pictures = []
        for one in torch.from_numpy(latents).to(self._device, state.latents.dtype):
            values = {**state.values, "latents": one[None]}
            try:
                (picture,) = self._alone.decode(replace(state, values=values))
            except NotFinite:
                pictures.append(np.zeros((self._size, self._size, 3), np.uint8))
            else:
                pictures.append(np.asarray(picture))
        return np.stack(pictures)

    def _painted(self, setting: Setting, prompt: Prompt) -> tuple[NDArray[np.float32], int]:
        """The latents of one prompt, (1, channels, rows, columns), and the synchronous steps."""
        asked = self._asked(prompt, num_inference_steps=setting.steps, scheduler=setting.scheduler)
        state = self._alone.prepare(asked)
        if setting.patches == 1 and setting.cache_interval == 1:
            while not state.done:
                self._alone.step(state)
            return state.latents.float().cpu().numpy(), state.num_steps
        begun, pipelines = state.to_bytes(), self._gang(setting.ranks)

        def rank(communicator: LockstepCommunicator) -> tuple[NDArray[np.float32], int]:
            pipeline = parallelize(pipelines[communicator.rank], communicator, setting.config)
            denoiser, engine = Denoiser(pipeline), engine_of(pipeline)
            state, synchronous = DenoiseState.from_bytes(begun).to(self._device), 0
            assert engine is not None
            while not state.done:
                denoiser.step(state)
                synchronous += engine.statistics.synchronous
            denoiser.settle(state)
            return state.latents.float().cpu().numpy(), synchronous

        result: tuple[NDArray[np.float32], int] = run_in_lockstep(setting.ranks, rank, self._device)[0]
        return result

    def _asked(self, prompt: Prompt, **others: Any) -> SamplingParams:
        return SamplingParams(
            prompt=prompt.text,
            seed=prompt.seed,
            height=self._size,
            width=self._size,
            guidance_scale=self._guidance_scale,
            **others,
        )

    def _gang(self, ranks: int) -> list[Any]:
        while len(self._ranks) < ranks:
            network = network_of(self.pipeline).module
            weights = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
            pipeline = copy.copy(self.pipeline)
            name = next(name for name, part in pipeline.components.items() if part is network)
            setattr(pipeline, name, copy.deepcopy(network, weights))
            self._ranks.append(pipeline)
        return self._ranks[:ranks]
