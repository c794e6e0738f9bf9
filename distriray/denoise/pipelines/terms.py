"""A model's terms for fields of requests, size aside: neither torch nor diffusers is loaded here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

from distriray.errors import InvalidRequest
from distriray.references import Editing, Reference, check_reference
from distriray.requests import Defaults, SamplingParams
from distriray.steps import SchedulerName

Params = TypeVar("Params", bound=SamplingParams)

# What of a field asks for something, where a model may have nothing for it.
_ASKS: dict[str, Callable[[Any], bool]] = {
    "negative_prompt": bool,
    "guidance_rescale": bool,
    "guidance_end": lambda share: share < 1.0,
    "clip_skip": bool,
    **dict.fromkeys(("prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3"), bool),
    **dict.fromkeys(("original_size", "crops_coords_top_left", "target_size"), bool),
    **dict.fromkeys(("control", "ip_adapters"), bool),
    "image": lambda picture: picture is not None,
    "mask_image": lambda picture: picture is not None,
    "references": bool,
    "strength": lambda strength: strength is not None,
}

BEGINS_FROM_NOISE = "this model edits: it begins from noise, and is shown the image beside it in every step"
"""Why a model that edits has nothing for `strength`, without a mask at least."""

STRENGTH, STRENGTH_IN_MASK = 0.6, 1.0
"""Of requests that name none: inside a mask, all is drawn anew."""


@dataclass(frozen=True)
class Terms:
    """A model's terms for the fields of requests.

    Attributes:
        num_inference_steps, guidance_scale: of a request that names none.
        schedulers: the names that it takes.
        lacks: fields that it has nothing for, and why. A value that asks for nothing is taken all the same.
        unguided: the largest `guidance_scale` that takes no second branch.
        rounds_up: how many whole steps a share of them is: not at most, but at least.
        needs_mask: it draws nothing but what a mask leaves open of an image.
        editing: what it edits; None is of a model that begins from pictures instead.
        fixes_steps: it takes `num_inference_steps` and no other number.
    """

    num_inference_steps: int = 25
    guidance_scale: float = 5.0
    schedulers: tuple[SchedulerName, ...] = get_args(SchedulerName)
    lacks: Mapping[str, str] = field(default_factory=dict)
    unguided: float = 1.0
    rounds_up: bool = False
    needs_mask: bool = False
    editing: Editing | None = None
    fixes_steps: bool = False

    def settle(
        self, params: Params, default_size: tuple[int, int], unit: int, defaults: Defaults | None = None
    ) -> Params:
        """A copy of a request that leaves no size, seed, steps or guidance open, nor its image's strength.

        For a model that edits, the image is the first of its references, and has no mask that nobody sent:
        with one that somebody did, that first one is kept outside of it.

        Args:
            default_size: (height, width) in pixels of a request that names none and has no picture.
            unit: pixels that heights and widths of the model are multiples of.
            defaults: a pool's own, which go before the model's.

        Raises:
            InvalidRequest: it asks for what the model has not; `param` names the field.
        """
        if self.editing is not None:
            params, default_size = _edited(params, self.editing, default_size, unit)
        params = params.settled(*default_size, defaults)
        for name, why in self.lacks.items():
            if self._asks(name, getattr(params, name)):
                raise InvalidRequest(f"{name}: {why}; leave it out", name)
        if self.editing is not None and params.strength is not None and params.mask_image is None:
            raise InvalidRequest(f"strength: {BEGINS_FROM_NOISE}; leave it out, or send a mask", "strength")
        if params.scheduler is not None and params.scheduler not in self.schedulers:
            raise InvalidRequest(
                f"scheduler {params.scheduler} is not for this model; use {', '.join(self.schedulers)}",
                "scheduler",
            )
        if self.needs_mask and params.mask_image is None:
            missing = "image" if params.image is None else "mask_image"
            raise InvalidRequest("this model fills in masks, and needs an image and a mask_image", missing)
        if self.fixes_steps and params.num_inference_steps not in (None, self.num_inference_steps):
            raise InvalidRequest(
                f"num_inference_steps {params.num_inference_steps}: this model says the noise levels of its "
                f"{self.num_inference_steps} steps itself; leave it out",
                "num_inference_steps",
            )
        own: dict[str, Any] = {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
        }
        if params.drawn_on is not None:
            own["strength"] = STRENGTH if params.mask_image is None else STRENGTH_IN_MASK
        open_ = {name: value for name, value in own.items() if getattr(params, name) is None}
        return params.model_copy(update=open_)

    def _asks(self, name: str, value: Any) -> bool:
        """Whether a field's value asks for something."""
        if name == "guidance_scale":
            return value is not None and value > self.unguided
        return _ASKS[name](value)


def _edited(
    params: Params, editing: Editing, default_size: tuple[int, int], unit: int
) -> tuple[Params, tuple[int, int]]:
    """The request with its image among its references, and the (height, width) of what they become."""
    for name, picture in params.pictures.items():
        if name.partition(".")[0] in ("image", "references"):
            check_reference(picture, name)
    if params.mask_image is not None and params.mask_image.implied:
        params = params.model_copy(update={"mask_image": None})
    if params.image is not None:
        first = Reference(image=params.image)
        params = params.model_copy(update={"image": None, "references": (first, *params.references)})
    if editing.needs_references and not params.references:
        raise InvalidRequest("this model edits pictures, and needs an image", "image")
    if len(params.references) > editing.max_references:
        count = f"references and image are {len(params.references)} pictures"
        raise InvalidRequest(f"{count}; this model edits at most {editing.max_references}", "references")
    pictures = [each.image for each in params.references if each.image is not None]
    if pictures:
        width, height = editing.drawn_size(pictures[0].size, unit)
        default_size = height, width
    return params, default_size
