"""Makes the pictures of a setting: by one device, or by a gang that takes turns on it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from numpy.typing import NDArray

from bench.quality.design import Setting
from bench.quality.prompts import Prompt
from distriray.collective import LockstepCommunicator, run_in_lockstep
from distriray.denoise.pipelines.families.sdxl_blocks import DECODE, make_components
from distriray.denoise.schedulers import make_scheduler
from distriray.errors import InvalidRequest
from distriray.models import ModelSpec, load_pipeline
from distriray.parallel import engine_of, parallelize
from distriray.parallel.networks.registry import network_of

DECODED_AT_ONCE = 4


@dataclass(frozen=True)
class Paint:
    """Latents of some prompts, (N, channels, rows, columns) float32, and the synchronous steps each took."""

    latents: NDArray[np.float32]
    synchronous_steps: NDArray[np.int64]


class Painter:
    """One model on one device, and as many ranks of it as are asked for; all share its weights.

    Args:
        spec: a Stable Diffusion XL model.
        device: where it runs; on a GPU too the ranks take turns.
        size: of the pictures, in pixels a side.
        guidance_scale: of classifier-free guidance.
        at_once: pictures in one call of the U-Net.
    """

    def __init__(
        self, spec: ModelSpec, device: str, *, size: int, guidance_scale: float, at_once: int
    ) -> None:
        self.pipeline = load_pipeline(spec, device)
        self.at_once = at_once
        self._device = torch.device(device)
        self._size = size
        self._guidance_scale = guidance_scale
        self._scheduler = self.pipeline.scheduler
        self._components = make_components(self.pipeline)
        self._decode = DECODE()
        self._ranks: list[Any] = []

    def check(self, settings: Iterable[Setting]) -> None:
        """Raise InvalidRequest, with what would do, unless pictures have rows for all patches."""
        unit = network_of(self.pipeline).row_unit
        rows, scale = self._size // self.pipeline.vae_scale_factor, self.pipeline.vae_scale_factor
        most, wanted = -(-rows // unit), max(setting.patches for setting in settings)
        if wanted > most:
            least = ((wanted - 1) * unit + 1) * scale
            raise InvalidRequest(
                f"--size {self._size} has rows for {most} patches at most, and --rows asks for {wanted}; "
                f"use --size {least} or more, or other --rows",
                "size",
            )

    def paint(self, setting: Setting, prompts: list[Prompt]) -> Paint:
        """The latents of `prompts`, each from the noise of its seed."""
        size = 1 if setting.one_by_one else self.at_once
        parts = [self._call(setting, prompts[at : at + size]) for at in range(0, len(prompts), size)]
        return Paint(
            np.concatenate([latents for latents, _ in parts]),
            np.concatenate([np.full(len(latents), steps) for latents, steps in parts]),
        )

    @torch.no_grad()
    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Pictures of latents, (N, height, width, 3). What is not a number comes out black."""
        pictures = []
        for part in torch.from_numpy(latents).split(DECODED_AT_ONCE):
            state = PipelineState()
            state.set("latents", part.to(self._device, self.pipeline.vae.dtype))
            state.set("output_type", "pt")
            _, state = self._decode(self._components, state)
            values = (state.get("images").float().nan_to_num(0.0) * 255).round().byte()
            pictures.append(values.permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(pictures)

    def _call(self, setting: Setting, prompts: list[Prompt]) -> tuple[NDArray[np.float32], int]:
        with torch.no_grad():
            text = self._encoded([prompt.text for prompt in prompts])
        seeds = [prompt.seed for prompt in prompts]
        if setting.patches == 1:
            return self._denoise(self.pipeline, setting, text, seeds), setting.steps
        pipelines = self._gang(setting.ranks)

        def rank(communicator: LockstepCommunicator) -> tuple[NDArray[np.float32], int]:
            pipeline = parallelize(pipelines[communicator.rank], communicator, setting.config)
            engine = engine_of(pipeline)
            assert engine is not None
            synchronous = 0

            def count(_: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
                nonlocal synchronous
                synchronous += engine.statistics.synchronous
                return values

            latents = self._denoise(pipeline, setting, text, seeds, callback_on_step_end=count)
            return latents, synchronous

        result: tuple[NDArray[np.float32], int] = run_in_lockstep(setting.ranks, rank, self._device)[0]
        return result

    def _denoise(
        self, pipeline: Any, setting: Setting, text: dict[str, torch.Tensor], seeds: list[int], **options: Any
    ) -> NDArray[np.float32]:
        pipeline.scheduler = make_scheduler(self._scheduler, setting.scheduler)
        latents = pipeline(
            **text,
            height=self._size,
            width=self._size,
            num_inference_steps=setting.steps,
            guidance_scale=self._guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
            **options,
        ).images
        array: NDArray[np.float32] = latents.float().cpu().numpy()
        return array

    def _encoded(self, texts: list[str]) -> dict[str, torch.Tensor]:
        names = (
            "prompt_embeds",
            "negative_prompt_embeds",
            "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds",
        )
        encoded = self.pipeline.encode_prompt(texts, device=self._device, do_classifier_free_guidance=True)
        return dict(zip(names, encoded, strict=True))

    def _gang(self, ranks: int) -> list[Any]:
        while len(self._ranks) < ranks:
            unet = self.pipeline.unet
            weights = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
            components = {**self.pipeline.components, "unet": copy.deepcopy(unet, weights)}
            pipeline = type(self.pipeline)(**components)
            pipeline.set_progress_bar_config(disable=True)
            self._ranks.append(pipeline)
        return self._ranks[:ranks]
