"""The nodes: what they ask for, and what they hand on."""

from __future__ import annotations

import base64
import io
from typing import Any

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from PIL import Image

from .service import Fields, ServiceError, events, own_url

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
LARGEST_SEED = 2**63 - 1
Inputs = dict[str, dict[str, tuple[Any, ...]]]

_URL = ("STRING", {"default": own_url()})
_PROMPT = ("STRING", {"default": "a lake at dusk, snowy mountains", "multiline": True})
_SEED = ("INT", {"default": 0, "min": 0, "max": LARGEST_SEED, "control_after_generate": True})
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "negative_prompt": ("STRING", {"default": "", "multiline": True}),
    "model": ("STRING", {"default": "", "tooltip": "one of the service's models; empty for its first"}),
    "steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "0: the model's own"}),
    "guidance": ("FLOAT", {"default": -1.0, "min": -1.0, "max": 100.0, "tooltip": "-1: the model's own"}),
    "width": ("INT", {"default": 0, "min": 0, "max": 16384, "step": 8, "tooltip": "0: the model's own"}),
    "height": ("INT", {"default": 0, "min": 0, "max": 16384, "step": 8, "tooltip": "0: the model's own"}),
    "scheduler": ("STRING", {"default": "", "tooltip": "empty: the model's own"}),
    "gang_size": (["auto", "1", "2", "4", "8"], {"tooltip": "workers that draw together"}),
    "previews": ("INT", {"default": 3, "min": 0, "max": 64, "tooltip": "pictures on the way"}),
    "loras": ("STRING", {"default": "", "tooltip": "adapters and their scales: ink:0.8, neon"}),
}
_CONTROL = "DISTRIRAY_CONTROL"
_OPTIONAL = {"control": (_CONTROL, {"tooltip": "of distriray: Control"}), **_SETTINGS}


class DistrirayControl:
    """Names a ControlNet of the service, and the picture that it goes by; chained, several add up."""

    RETURN_TYPES = (_CONTROL,)
    RETURN_NAMES = ("control",)
    FUNCTION = "add"
    CATEGORY = "distriray"
    DESCRIPTION = "Lets a ControlNet of the service lead what is drawn; chain several to use all of them."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        share = {"min": 0.0, "max": 1.0, "step": 0.001}
        return {
            "required": {
                "name": ("STRING", {"default": "", "tooltip": "one of the model's controls"}),
                "image": ("IMAGE",),
                "scale": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01}),
                "start": ("FLOAT", {"default": 0.0, **share, "tooltip": "share of the steps"}),
                "end": ("FLOAT", {"default": 1.0, **share, "tooltip": "share of the steps"}),
            },
            "optional": {"control": (_CONTROL, {"tooltip": "what else leads"})},
        }

    def add(
        self,
        name: str,
        image: torch.Tensor,
        scale: float,
        start: float,
        end: float,
        control: tuple[Fields, ...] = (),
    ) -> tuple[tuple[Fields, ...]]:
        """`control` and this one, as the service takes them.

        Args:
            image: (1, height, width, channels) from 0 to 1; more than one is refused.
            scale: how much it counts.
            start, end: shares of the steps between which it does.
        """
        if image.shape[0] != 1:
            raise ServiceError(f"control {name!r} goes by one picture; there are {image.shape[0]}")
        own = {"name": name.strip(), "image": _png(image[0]), "scale": scale, "start": start, "end": end}
        return ((*control, own),)


class DistrirayGenerate:
    """Draws a picture from a prompt."""

    RETURN_TYPES = ("IMAGE", "INT")
    RETURN_NAMES = ("image", "seed")
    FUNCTION = "generate"
    CATEGORY = "distriray"
    DESCRIPTION = "Lets a distriray service draw: several GPUs for each picture."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"url": _URL, "prompt": _PROMPT, "seed": _SEED}, "optional": dict(_OPTIONAL)}

    def generate(self, url: str, prompt: str, seed: int, **settings: Any) -> tuple[torch.Tensor, int]:
        """The picture (1, height, width, 3) in float32 from 0 to 1, and its seed."""
        return _draw(url, GENERATIONS, _fields(prompt, seed, settings))


class DistrirayEdit:
    """Draws on pictures, or what a mask covers of them."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "edit"
    CATEGORY = "distriray"
    DESCRIPTION = "Lets a distriray service draw on a picture, or fill in what a mask covers."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        strength = (
            "FLOAT",
            {"default": -1.0, "min": -1.0, "max": 1.0, "step": 0.01, "tooltip": "-1: its own"},
        )
        return {
            "required": {"url": _URL, "image": ("IMAGE",), "prompt": _PROMPT, "seed": _SEED},
            "optional": {"mask": ("MASK",), "strength": strength, **_OPTIONAL},
        }

    def edit(
        self,
        url: str,
        image: torch.Tensor,
        prompt: str,
        seed: int,
        mask: torch.Tensor | None = None,
        strength: float = -1.0,
        **settings: Any,
    ) -> tuple[torch.Tensor]:
        """The pictures (batch, height, width, 3), one request each.

        Args:
            image: (batch, height, width, channels) from 0 to 1.
            mask: (height, width) or (1 or batch, height, width), 1 where to draw anew.
        """
        fields = _fields(prompt, seed, settings)
        if strength >= 0:
            fields["strength"] = strength
        masks = None if mask is None else (mask if mask.ndim == 3 else mask[None])
        if masks is not None and masks.shape[0] not in (1, image.shape[0]):
            raise ServiceError(f"there are {masks.shape[0]} masks for {image.shape[0]} pictures")
        drawn = []
        for index, picture in enumerate(image):
            pictures = {"image": _png(picture)}
            if masks is not None:
                pictures["mask"] = _holes(masks[index % masks.shape[0]], picture)
            drawn.append(_draw(url, EDITS, {**fields, **pictures})[0])
        return (torch.cat(drawn),)


def _fields(prompt: str, seed: int, settings: dict[str, Any]) -> Fields:
    """The request's fields, without those that are left to the service."""
    given = {**{name: kind[1].get("default", "auto") for name, kind in _SETTINGS.items()}, **settings}
    fields: Fields = {"prompt": prompt, "seed": seed, "partial_images": given["previews"]}
    for name in ("negative_prompt", "model", "scheduler"):
        if text := given[name].strip():
            fields[name] = text
    if given["steps"]:
        fields["num_inference_steps"] = given["steps"]
    if given["guidance"] >= 0:
        fields["guidance_scale"] = given["guidance"]
    if bool(given["width"]) != bool(given["height"]):
        raise ServiceError("give both width and height, or 0 for both")
    if given["width"]:
        fields["size"] = f"{given['width']}x{given['height']}"
    if given["gang_size"] != "auto":
        fields["gang_size"] = int(given["gang_size"])
    if loras := _loras(given["loras"]):
        fields["loras"] = loras
    if control := given.get("control"):
        fields["control"] = list(control)
    return fields


def _loras(text: str) -> list[Fields]:
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, scale = part.partition(":")
        try:
            found.append({"name": name.strip(), **({"scale": float(scale)} if scale else {})})
        except ValueError:
            raise ServiceError(f"loras: {part!r} is no name with a scale; write ink:0.8, neon") from None
    return found


def _draw(url: str, path: str, fields: Fields) -> tuple[torch.Tensor, int]:
    """Follow a request in ComfyUI's bar; its picture and seed. Raises what ComfyUI does when cancelled."""
    bar: Any = None
    last: Any = None
    asked = {**fields, "stream": True, "progress": True}
    check = comfy.model_management.throw_exception_if_processing_interrupted
    for event in events(url.strip().rstrip("/"), path, asked, check):
        kind = event["type"].rpartition(".")[2]
        if kind == "completed":
            return _tensor(_image(event)), event["seed"]
        if kind == "partial_image":
            last = ("JPEG", _image(event), None)
        elif event.get("state") == "running":
            bar = bar or comfy.utils.ProgressBar(event["num_steps"])
            bar.update_absolute(event["step"], event["num_steps"], last)
    raise ServiceError("the service told no picture")


def _image(event: Fields) -> Image.Image:
    """The picture of an event: RGB, white where it is transparent."""
    image = Image.open(io.BytesIO(base64.b64decode(event["b64_json"])))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255.0)[None]


def _png(picture: torch.Tensor) -> str:
    """A PNG of the picture, as the service takes it, with its transparency, if it has any."""
    values = (picture.clamp(0, 1) * 255).round().byte().cpu().numpy()
    return _encoded(Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values))


def _holes(mask: torch.Tensor, picture: torch.Tensor) -> str:
    """A PNG of the picture's size that is transparent where `mask` is above one half."""
    height, width = picture.shape[:2]
    if tuple(mask.shape) != (height, width):
        given = " x ".join(map(str, mask.shape[::-1]))
        raise ServiceError(f"the mask is {given} and the picture {width} x {height}; resize one of them")
    alpha = Image.fromarray(((mask <= 0.5) * 255).byte().cpu().numpy())
    image = Image.new("RGBA", (width, height))
    image.putalpha(alpha)
    return _encoded(image)


def _encoded(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
