"""Common parts of the families that denoise by flow matching."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from inspect import signature
from math import prod
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image

from distriray.denoise.pipelines.base import Commission, PictureOf, PipelineSteps, check_pixels
from distriray.denoise.pipelines.guidance import ConditionalHalf, guided
from distriray.denoise.pipelines.masks import keep_outside
from distriray.denoise.state import DenoiseState
from distriray.errors import InvalidRequest, UnsupportedModel
from distriray.parallel import engine_of
from distriray.parallel.networks.controls import Residuals
from distriray.parallel.networks.token_control import TokenControl, controlled

BRANCHES = {"cond": "", "uncond": "negative_"}
"""What the names of the values of each guidance branch begin with, by its name to `cache_context`."""


class FlowMatching(PipelineSteps):
    """A transformer on the latents of a VAE, by the methods of diffusers' ordinary pipelines.

    Attributes:
        kinds: the pipelines for text to image, image to image and inpainting; or one that does all that its
            model can, with one to fill in masks after it if diffusers has such a one.
        fills: of a model that edits, the pipeline whose methods prepare latents to fill in masks with.
        parts: the components that no request can be drawn without.
        optional_parts: those that a model may lack.
        latents_per_input: channels of the network's input to one of the latents.
        vae_kind: the class of its VAEs.
        vae_channels: what their configuration calls the number of the latents' channels.
        unsaid: what guidance is against where a request says nothing.
        most_shifted: tokens of a picture whose noise is shifted most, where the scheduler says none.
        control: the ControlNets that its family draws with; None where there are none.
    """

    flow = True
    control_range = (-1.0, 1.0)
    control: ClassVar[type[TokenControl] | None] = None
    fills: ClassVar[type | None] = None
    parts: ClassVar[tuple[str, ...]]
    optional_parts: ClassVar[tuple[str, ...]] = ()
    latents_per_input: ClassVar[int] = 1
    vae_kind: ClassVar[type[Any]] = AutoencoderKL
    vae_channels: ClassVar[str] = "latent_channels"
    unsaid: ClassVar[str] = ""
    most_shifted: ClassVar[int] = 4096

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        # Around the same models, but for each request's scheduler, which the user's pipeline never sees.
        parts = {name: pipeline.components[name] for name in (*self.parts, *self.optional_parts)}
        self._plain = self.around(self.kinds[0], parts)
        others = dict(zip(("image-to-image", "inpainting"), self.kinds[1:], strict=False))
        on_pictures = {"inpainting": self.fills} if self.fills else others
        self._on_pictures = {task: self.around(kind, parts) for task, kind in on_pictures.items()}
        self._transformer, self._vae = pipeline.transformer, pipeline.vae

    def around(self, kind: type, parts: dict[str, Any]) -> Any:
        """A pipeline of one of `kinds` around these models, without a scheduler."""
        return kind(**parts, scheduler=None)

    def check(self) -> None:
        components, what = self.pipeline.components, type(self.pipeline).__name__
        for name in self.parts:
            if components[name] is None:
                raise UnsupportedModel(f"{what} without {name} cannot be denoised step by step")
        vae, takes = components["vae"], components["transformer"].config.in_channels
        if not isinstance(vae, self.vae_kind):
            raise UnsupportedModel(f"{what} with {type(vae).__name__}; known is {self.vae_kind.__name__}")
        if vae.config.get("shift_factor", 0.0) is None:
            raise UnsupportedModel(f"{what} whose VAE has no shift_factor; 0.0 is none")
        if takes != self.input_channels:
            raise UnsupportedModel(
                f"a transformer of {takes} channels; with latents of {self.latent_channels} there are those "
                f"of {self.input_channels}"
            )

    @property
    def latent_channels(self) -> int:
        """Channels of the VAE's latents."""
        channels: int = self.pipeline.vae.config[self.vae_channels]
        return channels

    @property
    def input_channels(self) -> int:
        """Channels of the network's input."""
        return self.latent_channels * self.latents_per_input

    @property
    @abstractmethod
    def patch_size(self) -> int:
        """Rows of latents to a token."""

    @property
    def token_side(self) -> int:
        """Height and width of a token, in pixels."""
        side: int = self.patch_size * self._plain.vae_scale_factor
        return side

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of a picture of that size."""
        return height // self.token_side, width // self.token_side

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """What its pipeline's `encode_prompt` makes of these arguments."""
        return self.kept_texts.of(self._plain.encode_prompt, *args, **kwargs)

    @abstractmethod
    def encode(self, commission: Commission) -> dict[str, Any]:
        """The prompt as the network takes it: `prompt_embeds` and others."""

    @abstractmethod
    def noise(self, commission: Commission, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """`latents` of noise, (batch, channels, rows, columns), and what else goes by their size."""

    def noised(
        self, commission: Commission, dtype: torch.dtype, pictures: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The same of pictures, (batch, 3, height, width), as noisy as each one's timestep says.

        Only families have it that begin from pictures.
        """
        raise NotImplementedError

    def masked(
        self, commission: Commission, dtype: torch.dtype, pictures: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The same of pictures of which a mask is filled in, with what `outside` gives or the network takes.

        Only families have it that fill in masks.
        """
        raise NotImplementedError

    def pipeline_for(self, commission: Commission) -> Any:
        """The family's pipeline for its task, with its scheduler."""
        pipeline = self._on_pictures.get(commission.task, self._plain)
        pipeline.scheduler = commission.scheduler
        return pipeline

    def sigmas(self, steps: int) -> Any:
        """Noise level of each step's latents, before the shift; None leaves it to the scheduler."""
        return None

    def prompts(self, commission: Commission) -> dict[str, str]:
        """The prompt of each branch of guidance, by what the names of the branch's values begin with."""
        prompts = {"": commission.params.prompt}
        if self.is_guided(commission.guidance_scale):
            negative = commission.params.negative_prompt
            prompts["negative_"] = self.unsaid if negative is None else negative
        return prompts

    def shift(self, commission: Commission, tokens: int) -> float:
        """By how much the noise of all steps is shifted, for a picture of so many tokens."""
        config = commission.scheduler.config
        shift: float = calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", self.most_shifted),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        return shift

    def prepare(self, commission: Commission) -> dict[str, Any]:
        self._plain.scheduler = commission.scheduler
        values = self.encode(commission)
        timesteps, dtype = self._schedule(commission), values["prompt_embeds"].dtype
        if commission.image is None:
            return {**values, **self.noise(commission, dtype), "timesteps": timesteps}
        timesteps = self._last_of(timesteps, commission)
        # One each, so that every image is drawn with its own generator.
        pictures = self.pipeline_for(commission).image_processor.preprocess(
            [commission.image] * len(commission.generators),
            commission.height,
            commission.width,
        )
        first = timesteps[:1].repeat(len(pictures))
        begin = self.noised if commission.mask_image is None else self.masked
        return {**values, **begin(commission, dtype, pictures, first), "timesteps": timesteps}

    @property
    def control_kind(self) -> type[Any] | None:
        return None if self.control is None else self.control.kind

    def take_control(self, network: Any) -> PictureOf:
        assert self.control is not None
        self.control.check_fits(network, self._transformer)
        return partial(self.control_picture, network)

    def control_picture(self, network: Any, pixels: torch.Tensor, commission: Commission) -> torch.Tensor:
        """What a ControlNet takes of a picture (`PictureOf`); only families with `control` have it."""
        raise NotImplementedError

    def posterior(self, pixels: torch.Tensor) -> Any:
        """The distribution of a picture's latents, by the VAE."""
        return self._vae.encode(pixels.to(self._vae.device, self._vae.dtype)).latent_dist

    def scaled(self, latents: torch.Tensor, shift: float) -> torch.Tensor:
        """Latents of the VAE as the network is given them: the inverse of what `decode` begins with."""
        return ((latents - shift) * self._vae.config.scaling_factor).to(self._transformer.dtype)

    def output_of(self, **arguments: Any) -> torch.Tensor:
        """What the network predicts for these arguments, with the ControlNets of the step."""
        arguments = self._with_controls(Residuals(self.controls), arguments)
        output: torch.Tensor = self._transformer(**arguments, return_dict=False)[0]
        return output

    def outputs_of(
        self, state: DenoiseState, arguments: Callable[[str], dict[str, Any]]
    ) -> list[torch.Tensor]:
        """What the network predicts where each branch of guidance has a call of its own, the prompt's first.

        With the ControlNets of the step, which run with the prompt's.

        Args:
            arguments: of the network, for the branch whose values begin with what it is given.
        """
        names = self.branches_of(state)
        residuals = Residuals(self.controls, len(names))
        branches = {name: self._with_controls(residuals, arguments(BRANCHES[name])) for name in names}
        if engine_of(self._transformer) is not None:
            predicted: list[torch.Tensor] = self._transformer(branches=branches)
            return predicted
        outputs, naming = [], getattr(self._transformer, "cache_context", nullcontext)
        for name, given in branches.items():
            with naming(name):
                outputs.append(self._transformer(**given, return_dict=False)[0])
        return outputs

    @staticmethod
    def branches_of(state: DenoiseState) -> list[str]:
        """Names of the branches of guidance in the next step, the prompt's first."""
        return [
            branch
            for branch, prefix in BRANCHES.items()
            if f"{prefix}prompt_embeds" in state.values and not (prefix and state.guidance_over)
        ]

    def _with_controls(self, residuals: Residuals, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the network, and for the ControlNets of the step."""
        if not residuals.controls:
            return arguments
        if engine_of(self._transformer) is not None:
            return {**arguments, "residuals": residuals}
        assert self.control is not None
        whole = partial(controlled, self.control, self._transformer, given=arguments)
        return {**arguments, **residuals.made_by(whole)}

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        config = self._vae.config
        latents = latents.to(self._vae.dtype) / config.scaling_factor + config.shift_factor
        return self.pictures(self._vae.decode(latents, return_dict=False)[0])

    def pictures(self, decoded: torch.Tensor) -> list[Image.Image]:
        """Of what a VAE gives, (batch, 3, height, width); raises NotFinite."""
        check_pixels(decoded)
        images: list[Image.Image] = self._plain.image_processor.postprocess(decoded, output_type="pil")
        return images

    def timestep(self, state: DenoiseState, batch: int) -> torch.Tensor:
        """Timestep of the next step for all of a batch, made where the latents are: nothing is copied."""
        timestep = float(state.values["timesteps"][state.step])
        return torch.full((batch,), timestep, device=state.latents.device)

    def following_timestep(self, state: DenoiseState, batch: int) -> torch.Tensor:
        """The same of the step after it, 0 behind the last."""
        timesteps = state.values["timesteps"][state.step + 1 :]
        timestep = float(timesteps[0]) if len(timesteps) else 0.0
        return torch.full((batch,), timestep, device=state.latents.device)

    def with_references(self, state: DenoiseState, tokens: torch.Tensor) -> torch.Tensor:
        """A picture's tokens and, after them, those of what it edits; (batch, tokens, channels)."""
        references = state.values.get("references")
        return tokens if references is None else torch.cat([tokens, references], 1)

    def advanced(self, state: DenoiseState, output: torch.Tensor) -> torch.Tensor:
        """The latents after a step with that output; where a mask is filled in, inside it alone."""
        scheduler, timestep = state.scheduler, state.values["timesteps"][state.step]
        draws = "generator" in signature(scheduler.step).parameters
        options = {"generator": state.generators} if draws else {}
        latents: torch.Tensor
        (latents,) = scheduler.step(output, timestep, state.latents, **options, return_dict=False)
        return keep_outside(state, latents)

    def _size(self, commission: Commission, dtype: torch.dtype) -> tuple[Any, ...]:
        """The size as diffusers' methods that prepare latents take it, in their order."""
        images, size = len(commission.generators), (commission.height, commission.width)
        device = self._transformer.device
        return images, self.latent_channels, *size, dtype, device, commission.generators

    def _schedule(self, commission: Commission) -> torch.Tensor:
        """The timesteps of all steps; raises InvalidRequest."""
        scheduler, steps = commission.scheduler, commission.num_inference_steps
        options: dict[str, Any] = {}
        config = scheduler.config
        if steps == 1 and config.get("shift_terminal"):
            raise InvalidRequest(
                f"num_inference_steps 1 is too few for this model, whose last step is at "
                f"{config['shift_terminal']} of all noise and whose first is at all of it; use 2 or more",
                "num_inference_steps",
            )
        if config.get("use_dynamic_shifting", False):
            if "mu" not in signature(scheduler.set_timesteps).parameters:
                raise InvalidRequest(
                    f"scheduler {commission.scheduler_name} cannot shift by the size, as this model does",
                    "scheduler",
                )
            options["mu"] = self.shift(commission, prod(self.grid(commission.height, commission.width)))
        sigmas = self.sigmas(steps)
        if sigmas is not None and not config.get("use_flow_sigmas", False):
            options["sigmas"] = sigmas
        scheduler.set_timesteps(steps, device=self._transformer.device, **options)
        scheduler.set_begin_index(0)  # two steps may round to one timestep
        timesteps: torch.Tensor = scheduler.timesteps
        return timesteps

    def _last_of(self, timesteps: torch.Tensor, commission: Commission) -> torch.Tensor:
        """The timesteps of a request's strength; raises InvalidRequest."""
        if not hasattr(commission.scheduler, "scale_noise"):
            raise InvalidRequest(
                f"scheduler {commission.scheduler_name} cannot begin from an image with this model; use "
                "euler",
                "scheduler",
            )
        steps, device = commission.num_inference_steps, self._transformer.device
        timesteps, _ = self.pipeline_for(commission).get_timesteps(steps, commission.strength, device)
        commission.check_timesteps(timesteps)
        return timesteps


class GuidedInOneCall(FlowMatching):
    """A family whose network has both branches of guidance in one call.

    A state keeps their texts as one batch [unconditional, conditional].

    Attributes:
        texts: names of the values that are texts, by the network's name for each.
    """

    texts: ClassVar[dict[str, str]]

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self._conditional = ConditionalHalf()

    def begin(self, state: DenoiseState) -> None:
        self._conditional.forget()

    def step(self, state: DenoiseState) -> tuple[torch.Tensor, torch.Tensor]:
        has_branches = self.is_guided(state.guidance_scale)
        is_guided = has_branches and not state.guidance_over
        texts = {argument: state.values[name] for argument, name in self.texts.items()}
        if has_branches and not is_guided:
            texts = {argument: self._conditional.of(state, name) for argument, name in self.texts.items()}
        sample = torch.cat([state.latents] * 2) if is_guided else state.latents
        timestep = self.timestep(state, len(sample))
        output = self.output_of(hidden_states=sample, timestep=timestep, **texts)
        if is_guided:
            output = guided(output, state)
        return self.advanced(state, output), output
