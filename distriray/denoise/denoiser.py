"""Drives a pipeline one step at a time."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils import _pytree as pytree

from distriray.adapters import CACHE_BYTES
from distriray.denoise.adapters import Adapters
from distriray.denoise.controls import Controls
from distriray.denoise.ip_adapters import IPAdapters
from distriray.denoise.network_output import NetworkOutput
from distriray.denoise.pipelines.base import Commission, check_finite
from distriray.denoise.pipelines.registry import PIPELINES, family_of
from distriray.denoise.pipelines.sizes import configs_of
from distriray.denoise.schedulers import (
    FLOW_SCHEDULERS,
    SCHEDULERS,
    follows_flow,
    make_scheduler,
    scheduler_class,
    step_count,
)
from distriray.denoise.state import DenoiseState
from distriray.denoise.unused import unused
from distriray.errors import GangBroken, GangMismatch, InvalidRequest, UnsupportedModel
from distriray.parallel import engine_of
from distriray.parallel.networks.base import Call
from distriray.picture import mask_of, opaque
from distriray.requests import SamplingParams, image_of
from distriray.steps import SchedulerName

PREVIEW_SCALE, PREVIEW_SIDE = 0.25, 128  # of the picture, and pixels at most


class _Noted(Exception):
    """Ends a step of which all calls are known."""


class Denoiser:
    """prepare, step x n, decode for a pipeline, parallelized or not, of a family that is known.

    The models are the pipeline's own. One thread uses a denoiser at a time, for any number of states in any
    order.

    Args:
        pipeline: a diffusers pipeline of a family in `pipelines.registry.PIPELINES`.
        most_adapter_bytes: of the adapters that it holds in memory.

    Attributes:
        family: the family's name there.
        adapters: those that requests may name; at first none.
        controls: the ControlNets that they may name; at first none.
        ip_adapters: the IP-Adapters that they may name; at first none.
        sizes: of its pictures.
        terms: what the model says of a request's other fields.
        guides: whether guidance takes a second branch.
        own_steps: how often the model's own scheduler calls the network.

    Raises:
        UnsupportedModel: the pipeline is of no such family, its family refuses it, or it has a scheduler that
            cannot be part of a state.
    """

    def __init__(self, pipeline: Any, most_adapter_bytes: int = CACHE_BYTES) -> None:
        self.family = family_of(pipeline)
        self.adapters = Adapters(pipeline, self.family, most_adapter_bytes)
        self._pipeline = pipeline
        self._steps = PIPELINES[self.family].steps(pipeline)
        self.controls = Controls(pipeline, self.family, self._steps)
        self.ip_adapters = IPAdapters(pipeline, self.family, self._steps)
        self.sizes = PIPELINES[self.family].sizes(configs_of(pipeline))
        self.terms = PIPELINES[self.family].terms(configs_of(pipeline))
        self.guides = self._steps.guides
        _check_scheduler(pipeline, self._steps.flow, self.terms.schedulers)
        self.own_steps = step_count(pipeline.scheduler)
        self.scheduler: Any = None  # of the state at hand: the engine looks it up here
        self._last: weakref.ref[DenoiseState] | None = None  # whose step came last,
        self._last_at = (-1, -1)  # where that left it, and by which gang
        self._image: AbstractContextManager[Any] | None = None  # in that gang

    @torch.no_grad()
    def prepare(self, params: SamplingParams) -> DenoiseState:
        """Encode the prompt and the pictures, and draw the noise: the state before the first step.

        Args:
            params: must have a seed; image `i` of any batch is the image of its seed alone.

        Raises:
            InvalidRequest: a value is out of range, or a picture is damaged; `param` names it.
            AdapterNotFound, UnusableAdapter: it names an adapter that is not known, or that does not fit.
            ControlNetNotFound, IPAdapterNotFound: it names a ControlNet or an IP-Adapter that is not known.
        """
        seeds = params.seeds
        params = self.terms.settle(params, self.sizes.default, self.sizes.unit)
        params.check_size(self.sizes.unit)
        params.num_steps(self.own_steps, rounds_up=self.terms.rounds_up)  # or there are none to do
        most = self._steps.max_clip_skip
        if params.clip_skip is not None and params.clip_skip > most:
            raise InvalidRequest(
                f"clip_skip {params.clip_skip} skips all of a text encoder; use at most {most}", "clip_skip"
            )
        commission = self._commission(params, seeds)
        control = self.controls.prepare(params.control, commission)
        image_prompts = self.ip_adapters.prepare(params.ip_adapters)
        adapters = self._steps.kept_texts.adapters = self.adapters.choose(params.loras)
        try:
            values = self._steps.prepare(commission)
        except InvalidRequest:
            raise
        except ValueError as error:  # diffusers' own word for arguments that do not go together
            raise InvalidRequest(f"the pipeline does not take this request: {error}") from error
        values = {**values, **control, **image_prompts}
        values = {name: _contiguous(value) for name, value in values.items() if value is not None}
        commission.check_timesteps(values["timesteps"])
        as_drawn = self.terms.editing is not None and self.terms.editing.as_drawn
        return DenoiseState(
            family=self.family,
            task=commission.task,
            values=values,
            scheduler=commission.scheduler,
            generators=commission.generators,
            guidance_scale=commission.guidance_scale,
            guidance_rescale=params.guidance_rescale,
            guidance_end=params.guidance_end,
            height=commission.height,
            width=commission.width,
            adapters=adapters,
            warnings=tuple(unused(params, self._steps, len(values["timesteps"]), as_drawn)),
        ).to(values["latents"].device)

    def _commission(self, params: SamplingParams, seeds: Sequence[int]) -> Commission:
        """What the family's `prepare` is given of `params` that leave no size open; loads the pictures."""
        editing = self.terms.editing
        shown = (lambda picture: picture) if editing and editing.sees_transparency else opaque
        references = [
            shown(each.image.load(image_of("references", index)))
            for index, each in enumerate(params.references)
            if each.image is not None
        ]
        kept = references[0] if params.mask_image is not None and references else None
        return Commission(
            params=params,
            scheduler=make_scheduler(self._pipeline.scheduler, params.scheduler),
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],
            image=kept if params.image is None else opaque(params.image.load()),
            mask_image=None if params.mask_image is None else mask_of(params.mask_image),
            references=references,
        )

    @torch.no_grad()
    def calls(self, params: SamplingParams) -> list[Call]:
        """The calls of the network in the first step of an image, which compute nothing.

        Only of a pipeline that was parallelized.

        Args:
            params: as of `prepare`, whose errors are raised.

        Returns:
            One for each branch of guidance that has calls of its own.
        """
        engine, state, calls = engine_of(self._pipeline), self.prepare(params), list[Call]()
        assert engine is not None
        network = engine.network
        answer = network.module.forward

        @functools.wraps(answer)
        def note(*args: Any, branches: Mapping[str, dict[str, Any]] | None = None, **kwargs: Any) -> None:
            for own in [{}] if branches is None else branches.values():
                given = {**kwargs, **own}
                calls.append(network.read(*args, **given))
                if "residuals" in given:
                    given["residuals"].made_by(lambda controls: {})  # as if this call had run the ControlNets
            raise _Noted

        network.module.forward = note
        network.controls = self.controls.networks
        self._steps.controls = self.controls.of_step(state)
        try:
            self._steps.begin(state)
            with suppress(_Noted):
                self._steps.step(state)
        finally:
            network.module.forward = answer
            self._steps.begin(state)
        return calls

    def adapt(self, state: DenoiseState) -> None:
        """Use the adapters of `state`, as its next step would: what may fail on one rank alone goes first.

        Raises:
            UnusableAdapter: one is not held here, and its file is not what it was.
            UnusableControlNet, UnusableIPAdapter: its ControlNets or IP-Adapters are not here.
        """
        self.controls.check(state)
        self.ip_adapters.use(state)
        self.adapters.use(state.adapters)

    @torch.no_grad()
    def step(self, state: DenoiseState) -> None:
        """Do the next step of `state`, in place; if it raises, the state is as it was.

        In a gang of GPUs a step that is not the last returns before it is known to have gone well.
        If it has not, the next one raises, and the state is as it was before both. `settle` a state before
        it leaves its gang between two steps.

        Raises:
            GenerationCancelled, GangBroken, GangMismatch: from the gang.
            InvalidRequest: the state is another family's, or a gang cannot share its call (`Engine.forward`).
            OutOfMemory: the gang has no room for its buffers.
            UnusableAdapter, UnusableControlNet, UnusableIPAdapter: as `adapt`.
            ValueError: the state is done.
        """
        self._check_family(state)
        if state.done:
            raise ValueError(f"all {state.num_steps} steps are done")
        self.adapt(state)
        self._follow(state)
        timestep, before = state.values["timesteps"][state.step], state.latents
        self.scheduler = state.scheduler
        engine = engine_of(self._pipeline)
        self._last, snapshot = None, state.snapshot()
        try:
            with self._image or nullcontext():
                if engine is not None and state.step + 1 < state.num_steps:
                    engine.announce_more()
                self._steps.controls = self.controls.of_step(state)
                self._steps.image_prompts = self.ip_adapters.prompts(state)
                latents, output = self._steps.step(state)
        except BaseException as error:
            broken = isinstance(error, GangBroken | GangMismatch)
            state.restore(state.unsettled if broken and state.unsettled is not None else snapshot)
            raise
        state.network_output = NetworkOutput(before, output, timestep)
        state.values["latents"] = _contiguous(latents)
        state.step += 1
        state.unsettled = None if engine is None or engine.settled else snapshot
        self._last, self._last_at = weakref.ref(state), (state.step, self._gang)
        if state.done:
            self.let_go(state)  # decoding has the room

    def settle(self, state: DenoiseState) -> None:
        """Wait until the last step of `state` is known to have gone well. All ranks alike.

        Raises:
            GangBroken, GangMismatch: from the gang; the state is as it was before that step.
            GenerationCancelled: from the gang.
        """
        engine, before = engine_of(self._pipeline), state.unsettled
        if engine is None or before is None:
            return
        try:
            engine.settle()
        except (GangBroken, GangMismatch):
            state.restore(before)
            raise
        finally:
            state.unsettled = None

    def let_go(self, state: DenoiseState) -> None:
        """Let go of what is kept of `state` from step to step; a further step makes it anew."""
        self._steps.begin(state)

    @torch.no_grad()
    def decode(self, state: DenoiseState) -> list[Image.Image]:
        """The pictures of the latents as they are.

        With a parallel VAE all ranks of the gang call it, and all get the pictures.

        Raises:
            NotFinite: latents or pixels are not, on all ranks alike; nothing is shown of such a picture.
            InvalidRequest: the state is another family's.
            GangBroken, GangMismatch: from the gang.
        """
        self._check_family(state)
        _check_latents(state)
        return self._steps.decode(state.latents)

    @torch.no_grad()
    def preview(self, state: DenoiseState) -> Image.Image:
        """The first image as it is predicted to become, at a quarter of its size, 128 pixels at most.

        Any rank may call it, alone.

        Raises:
            NotFinite: as `decode`.
        """
        self._check_family(state)
        _check_latents(state)
        estimate = state.estimate
        latents = (state.latents if estimate is None else estimate)[:1]
        scale = min(PREVIEW_SCALE, PREVIEW_SIDE / self.sizes.latent_row / max(latents.shape[2:]))
        sides = [max(1, round(scale * side)) for side in latents.shape[2:]]
        latents = F.interpolate(latents.float(), size=sides, mode="area")
        engine = engine_of(self._pipeline)
        with engine.decoder.alone() if engine is not None and engine.decoder is not None else nullcontext():
            return self._steps.decode(latents)[0]

    @property
    def _gang(self) -> int:
        engine = engine_of(self._pipeline)
        return -1 if engine is None else engine.generation

    def _check_family(self, state: DenoiseState) -> None:
        if state.family != self.family:
            raise InvalidRequest(f"a state of {state.family} cannot go on with a model of {self.family}")

    def _follow(self, state: DenoiseState) -> None:
        """Unless this continues the previous step, begin an image and drop what the family kept of that."""
        engine = engine_of(self._pipeline)
        same = self._last is not None and self._last() is state and self._last_at == (state.step, self._gang)
        if same and not (engine is not None and engine.yielding):
            return
        last = None if self._last is None else self._last()
        if last is not None:
            self.settle(last)
        self._image = None  # so that its buffers are the next one's
        if engine is not None:
            engine.watch(self)
            engine.network.controls = self.controls.networks
            self._image = engine.image(at_step=state.step, num_steps=state.num_steps)
        self._steps.begin(state)


def _check_latents(state: DenoiseState) -> None:
    scheduler = type(state.scheduler).__name__
    check_finite(
        state.latents,
        f"the latents after step {state.step} of {state.num_steps} by {scheduler}",
        "ask for other steps or another scheduler, or load the model as float32 or bfloat16",
    )


def _check_scheduler(pipeline: Any, flow: bool, names: Sequence[SchedulerName]) -> None:
    """Raise `UnsupportedModel` unless a state may hold the model's own scheduler, one of the family's."""
    own = pipeline.scheduler
    try:
        scheduler_class(type(own).__name__)
    except InvalidRequest as error:
        raise UnsupportedModel(
            f"the model's own {error}; save the model with a scheduler of these names"
        ) from error
    if follows_flow(own) != flow:
        kinds = "noise", "flow matching"
        raise UnsupportedModel(
            f"the model's own scheduler {type(own).__name__} follows {kinds[not flow]}, and "
            f"{type(pipeline).__name__} denoises by {kinds[flow]}"
        )
    taken = [(FLOW_SCHEDULERS if flow else SCHEDULERS)[name].kind.__name__ for name in names]
    if type(own).__name__ not in taken:  # its steps would not be at the noise levels that the pipeline names
        raise UnsupportedModel(
            f"the model's own scheduler {type(own).__name__} is not one for {type(pipeline).__name__}; save "
            f"the model with {' or '.join(dict.fromkeys(taken))}"
        )


def _contiguous(value: Any) -> Any:
    """Tensors in the memory layout that bytes restore: other layouts round differently."""
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.contiguous, value)
