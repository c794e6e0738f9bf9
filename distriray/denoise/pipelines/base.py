"""The interface between a denoiser and a family of pipelines (docs/adding-a-model.md)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image

from distriray.denoise.pipelines.image_prompts import ImagePrompt
from distriray.denoise.pipelines.kept_texts import KeptTexts
from distriray.denoise.pipelines.prompted import Prompted
from distriray.denoise.schedulers import follows_flow
from distriray.denoise.state import DenoiseState
from distriray.errors import InvalidRequest, NotFinite
from distriray.parallel.networks.controls import UsedControl
from distriray.requests import SamplingParams


class TokenCount(NamedTuple):
    """Numbers of tokens: given to a text encoder, and taken by it; without special ones."""

    given: int
    taken: int


def tokens_of(tokenizer: Any, text: str, most: int | None = None) -> TokenCount:
    """The tokens of `text`. Its encoder takes `most`, special ones included, or what the tokenizer says."""
    special = tokenizer.num_special_tokens_to_add()
    given = len(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)
    return TokenCount(given, min(given, (tokenizer.model_max_length if most is None else most) - special))


def tokens_in_chat(tokenizer: Any, text: str, around: str, most: int) -> TokenCount:
    """The tokens of `text` for an encoder that takes `most` with the template `around` it."""
    return tokens_of(tokenizer, text, most - tokens_of(tokenizer, around).given)


def check_finite(values: torch.Tensor, what: str, advice: str) -> None:
    """Raise NotFinite, naming `what` it is, unless all values are numbers. On a GPU the host waits for it."""
    if not bool(torch.isfinite(values).all()):
        raise NotFinite(f"{what} hold infinities or NaN, and the picture would be black; {advice}")


def check_pixels(decoded: torch.Tensor) -> None:
    """`check_finite` of what a VAE gives."""
    check_finite(decoded, "the decoded pixels", "this VAE may need dtype float32 or bfloat16")


@dataclass(frozen=True, eq=False)
class Commission:
    """A batch of images to be prepared, checked and with nothing left open.

    Attributes:
        params: what is asked for, with height and width, steps and guidance.
        scheduler: the request's own, with the model's noise schedule and no timesteps yet.
        generators: one on the CPU for each image, which draws all that is random about it.
        image: a picture to begin from, RGB of any size, or None. Of models that edit, with a mask alone: the
            first of `references`.
        mask_image: where to fill `image` in, white, in grey levels, or None.
        references: pictures to edit, of any size: RGB, or RGBA for models that see transparency.
    """

    params: SamplingParams
    scheduler: Any
    generators: list[torch.Generator]
    image: Image.Image | None = None
    mask_image: Image.Image | None = None
    references: Sequence[Image.Image] = ()

    @property
    def task(self) -> str:
        """`text-to-image`, `image-to-image` or `inpainting`."""
        if self.image is None:
            return "text-to-image"
        return "image-to-image" if self.mask_image is None else "inpainting"

    @property
    def height(self) -> int:
        """In pixels, a multiple of the family's unit."""
        assert self.params.height is not None
        return self.params.height

    @property
    def width(self) -> int:
        """In pixels, a multiple of the family's unit."""
        assert self.params.width is not None
        return self.params.width

    @property
    def strength(self) -> float:
        """Share of the steps that are done on `image`."""
        return 1.0 if self.params.strength is None else self.params.strength

    @property
    def num_inference_steps(self) -> int:
        """The number of steps that are asked for."""
        assert self.params.num_inference_steps is not None
        return self.params.num_inference_steps

    @property
    def scheduler_name(self) -> str:
        """As it was asked for, or the class of the model's own."""
        return self.params.scheduler or type(self.scheduler).__name__

    @property
    def guidance_scale(self) -> float:
        assert self.params.guidance_scale is not None
        return self.params.guidance_scale

    def check_timesteps(self, timesteps: torch.Tensor) -> None:
        """Raise InvalidRequest unless there are steps to do, each within the scheduler's noise schedule.

        And each from one noise level to another: a step between equal ones divides by zero.
        """
        asked = self.num_inference_steps
        if not len(timesteps):
            raise InvalidRequest(f"strength {self.strength} of {asked} steps leaves none to do", "strength")
        end = self.scheduler.config.num_train_timesteps
        if timesteps.max() >= end and not follows_flow(self.scheduler):
            raise InvalidRequest(
                f"num_inference_steps {asked} is too many for this scheduler, which has {end} "
                "timesteps to choose from; use fewer",
                "num_inference_steps",
            )
        sigmas = getattr(self.scheduler, "sigmas", None)  # of second order, each has two calls by design
        if sigmas is not None and self.scheduler.order == 1 and bool((sigmas[:-1].diff() == 0).any()):
            raise InvalidRequest(
                f"num_inference_steps {asked} is too many for {type(self.scheduler).__name__}, which would "
                f"take some of its {end} timesteps twice; use fewer",
                "num_inference_steps",
            )


PictureOf = Callable[[torch.Tensor, Commission], torch.Tensor]
"""Makes of a picture what its ControlNet takes in every step (`UsedControl.picture`), for a commission.

It is given pixels of the commission's size, float32 (1, 3, height, width) on the CPU, of `control_range`.
"""


class PipelineSteps(ABC):
    """One pipeline of a family, as a denoiser drives it.

    A subclass knows everything of its family's prompts, latents, guidance and pictures, and nothing of gangs
    and of how states are kept. It changes nothing of the pipeline, whose models it uses.

    Args:
        pipeline: of one of `kinds`, or of a subclass.

    Attributes:
        kinds: the classes of the pipelines.
        flow: whether they denoise by flow matching.
        unguided: the largest scale of guidance that takes no second branch, as in the family's `Terms`.
        prompted: the kind of its network that IP-Adapters are put into; None where none are drawn with.
        control_range: black and white, as its ControlNets are shown them unless their makers say otherwise.
        controls: the ControlNets of the next step.
        image_prompts: what the IP-Adapters in the network are to attend to, in their order.
        kept_texts: what text encoders made of the texts that were read last.

    Raises:
        UnsupportedModel: as `check`.
    """

    kinds: ClassVar[tuple[type, ...]]
    flow: ClassVar[bool] = False
    unguided: ClassVar[float] = 1.0
    prompted: ClassVar[type[Prompted] | None] = None
    control_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    controls: tuple[UsedControl, ...] = ()
    image_prompts: tuple[ImagePrompt, ...] = ()

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.kept_texts = KeptTexts()
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Raise `UnsupportedModel`, naming it, for a pipeline of which no request could be drawn rightly."""

    @property
    def guides(self) -> bool:
        """Whether a step with guidance takes a second branch, and so twice the network's work."""
        return True

    def is_guided(self, scale: float) -> bool:
        """Whether a step with that scale of guidance takes a second branch."""
        return self.guides and scale > self.unguided

    @property
    def control_kind(self) -> type[Any] | None:
        """The class of its ControlNets; None where none are drawn with."""
        return None

    @property
    @abstractmethod
    def max_clip_skip(self) -> int:
        """The largest `clip_skip` that leaves a layer of every text encoder."""

    @abstractmethod
    def tokens(self, text: str) -> Sequence[TokenCount]:
        """Of each text encoder, in their order, what it takes of a prompt (`tokens_of`)."""

    @abstractmethod
    def prepare(self, commission: Commission) -> dict[str, Any]:
        """Values that a state begins with: `latents`, `timesteps`, and all that `step` needs besides them.

        The values are plain ones and tensors, nested as one likes; a state keeps them as they are, but for
        `latents`. What is random about image `i` is drawn from generator `i` alone.

        Returns:
            By name: `latents`, whose first dimension is the batch, on the pipeline's device, `timesteps`,
            one-dimensional, and others. None stands for what is not there.

        Raises:
            InvalidRequest: a value is out of range; `param` names it.
            ValueError: the pipeline does not take these arguments together.
        """

    def take_control(self, network: Any) -> PictureOf:
        """Make a ControlNet of `control_kind` one of this pipeline's; what random there is about its pictures
        is drawn as in `prepare`, before it.

        Raises:
            UnsupportedModel: it does not fit, with what is wrong.
        """
        raise NotImplementedError

    def begin(self, state: DenoiseState) -> None:
        """Forget what was kept of the last step: the next one is of another state, or from elsewhere."""
        return None

    @abstractmethod
    def step(self, state: DenoiseState) -> tuple[torch.Tensor, torch.Tensor]:
        """Do the next step of `state` but for its latents.

        One call of the network has all branches of guidance, or each has a call of its own, of which a gang
        is told at once (`Engine.forward`). Of the state only scheduler and generators change, and values are
        replaced that a family remembers from step to step; none is written into.

        Returns:
            The latents after the step, and the network's output with guidance, of the same shape.
        """

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """The pictures of latents, of any size, as the pipeline would give them out.

        Raises:
            NotFinite: the VAE's output is not (`check_pixels`).
        """
