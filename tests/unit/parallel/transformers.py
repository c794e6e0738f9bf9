"""One tiny transformer of every family, what it is called with, and how an image is drawn with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from distriray import ParallelConfig, parallelize
from distriray.parallel import StepStatistics, engine_of
from tests.models import (
    IMAGE_WIDTH,
    TEXT_WIDTH,
    tiny_chroma_transformer,
    tiny_ernie_image_transformer,
    tiny_flux2_transformer,
    tiny_flux3_transformer,
    tiny_flux_transformer,
    tiny_hunyuan_image_transformer,
    tiny_krea2_transformer,
    tiny_longcat_image_transformer,
    tiny_ovis_image_transformer,
    tiny_pixart_transformer,
    tiny_prompted_flux_transformer,
    tiny_qwen_image21_transformer,
    tiny_qwen_image_transformer,
    tiny_sd3_transformer,
    tiny_z_image_transformer,
)

STEPS = 4


@dataclass(frozen=True)
class Shape:
    """A call's sizes, in tokens; `masked` is text of which the last image's end is padding."""

    rows: int = 5
    columns: int = 3
    text: int = 7
    batch: int = 2
    masked: bool = False


def _by_name(network: Any, timestep: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    predicted: torch.Tensor = network(timestep=timestep, return_dict=False, **inputs)[0]
    return predicted


@dataclass(frozen=True)
class Transformer:
    """How one family is made and called.

    Attributes:
        make: one with random weights.
        twelve_heads: what it is made with to have as many.
        inputs: what it is called with besides timestep, by name, of a shape; latents are `hidden_states`.
        scale: of the timesteps that fall from 1 to 0.
        predict: calls the network, with a timestep for each image.
    """

    make: Callable[..., Any]
    inputs: Callable[[Shape], dict[str, Any]]
    twelve_heads: Mapping[str, int]
    scale: float = 1.0
    predict: Callable[[Any, torch.Tensor, dict[str, Any]], torch.Tensor] = _by_name

    def inputs_on(self, device: torch.device, shape: Shape) -> dict[str, Any]:
        """`inputs` on a device."""
        inputs: dict[str, Any] = pytree.tree_map(
            lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, self.inputs(shape)
        )
        return inputs


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def positions(shape: Shape, axes: int) -> torch.Tensor:
    """Of the image's tokens, (tokens, axes)."""
    grid = torch.zeros(shape.rows, shape.columns, axes)
    grid[..., 1] += torch.arange(shape.rows)[:, None]
    grid[..., 2] += torch.arange(shape.columns)
    return grid.flatten(0, 1)


def packed(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, shape.batch, shape.rows * shape.columns, 16),
        "encoder_hidden_states": noise(2, shape.batch, shape.text, TEXT_WIDTH),
    }


def text_mask(shape: Shape) -> torch.Tensor:
    """(batch, tokens of the text)."""
    mask = torch.ones(shape.batch, shape.text, dtype=torch.long)
    mask[-1, shape.text // 2 :] = 0
    return mask


def flux(shape: Shape) -> dict[str, Any]:
    return {
        **packed(shape),
        "pooled_projections": noise(3, shape.batch, TEXT_WIDTH),
        "guidance": torch.linspace(3.0, 4.0, shape.batch),
        "img_ids": positions(shape, 3),
        "txt_ids": torch.zeros(shape.text, 3),
    }


def flux_with_image_prompts(shape: Shape) -> dict[str, Any]:
    """One picture for the first IP-Adapter, two for the other one."""
    embeds = [noise(4 + pictures, shape.batch, pictures, IMAGE_WIDTH) for pictures in (1, 2)]
    return {**flux(shape), "joint_attention_kwargs": {"ip_adapter_image_embeds": embeds}}


def chroma(shape: Shape) -> dict[str, Any]:
    inputs = {**packed(shape), "img_ids": positions(shape, 3), "txt_ids": torch.zeros(shape.text, 3)}
    if shape.masked:
        image = torch.ones(shape.batch, shape.rows * shape.columns)
        inputs["attention_mask"] = torch.cat((text_mask(shape), image), 1)
    return inputs


def longcat_image(shape: Shape) -> dict[str, Any]:
    return {
        **packed(shape),
        "guidance": torch.linspace(3.0, 4.0, shape.batch),
        "img_ids": positions(shape, 3),
        "txt_ids": torch.zeros(shape.text, 3),
    }


def ovis_image(shape: Shape) -> dict[str, Any]:
    return {**packed(shape), "img_ids": positions(shape, 3), "txt_ids": torch.zeros(shape.text, 3)}


def hunyuan_image(shape: Shape) -> dict[str, Any]:
    """Half of the text is what the other quotes; of each the last image's end may be padding."""
    quoted = shape.text // 2
    texts = [replace(shape, text=tokens) for tokens in (shape.text - quoted, quoted)]
    masks = [text_mask(each) if shape.masked else torch.ones(each.batch, each.text) for each in texts]
    masks[0][:, 0] = 1  # a prompt is never all padding
    return {
        "hidden_states": noise(1, shape.batch, 16, shape.rows, shape.columns),
        "encoder_hidden_states": noise(2, shape.batch, texts[0].text, TEXT_WIDTH),
        "encoder_attention_mask": masks[0],
        "encoder_hidden_states_2": noise(3, shape.batch, quoted, TEXT_WIDTH),
        "encoder_attention_mask_2": masks[1],
    }


def hunyuan_image_distilled(shape: Shape) -> dict[str, Any]:
    return {**hunyuan_image(shape), "guidance": torch.linspace(3000.0, 4000.0, shape.batch)}


def krea2(shape: Shape) -> dict[str, Any]:
    inputs = {
        "hidden_states": noise(1, shape.batch, shape.rows * shape.columns, 16),
        "encoder_hidden_states": noise(2, shape.batch, shape.text, 3, TEXT_WIDTH),
        "position_ids": torch.cat([torch.zeros(shape.text, 3), positions(shape, 3)]),
    }
    return {**inputs, "encoder_attention_mask": text_mask(shape).bool()} if shape.masked else inputs


def ernie_image(shape: Shape) -> dict[str, Any]:
    mask = text_mask(shape) if shape.masked else torch.ones(shape.batch, shape.text, dtype=torch.long)
    return {
        "hidden_states": noise(1, shape.batch, 16, shape.rows, shape.columns),
        "text_bth": noise(2, shape.batch, shape.text, TEXT_WIDTH),
        "text_lens": mask.sum(1),
    }


def flux2(shape: Shape) -> dict[str, Any]:
    return {
        **packed(shape),
        "guidance": torch.linspace(3.0, 4.0, shape.batch),
        "img_ids": positions(shape, 4)[None],
        "txt_ids": torch.zeros(1, shape.text, 4),
    }


def flux3(shape: Shape) -> dict[str, Any]:
    text = torch.zeros(shape.text, 4)
    text[:, 3] = torch.arange(shape.text)
    return {**packed(shape), "img_ids": positions(shape, 4), "txt_ids": text}


def flux3_with_references(shape: Shape) -> dict[str, Any]:
    """Two pictures, one as large as the image and one of half the rows."""
    of_one = positions(shape, 4)
    ids = torch.cat([of_one, of_one[: shape.rows // 2 * shape.columns]])
    ids[:, 3] = -1 - (torch.arange(len(ids)) >= len(of_one)).float()
    references = noise(4, shape.batch, len(ids), 16)
    return {**flux3(shape), "image_cond_hidden_states": references, "image_cond_ids": ids}


def pixart(shape: Shape) -> dict[str, Any]:
    sizes = torch.tensor([[80.0, 48.0]]).expand(shape.batch, -1)
    inputs = {
        "hidden_states": noise(1, shape.batch, 4, 2 * shape.rows, 2 * shape.columns),
        "encoder_hidden_states": noise(2, shape.batch, shape.text, TEXT_WIDTH),
        "added_cond_kwargs": {"resolution": sizes, "aspect_ratio": sizes[:, :1] / sizes[:, 1:]},
    }
    return {**inputs, "encoder_attention_mask": text_mask(shape)} if shape.masked else inputs


def sd3(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, shape.batch, 4, 2 * shape.rows, 2 * shape.columns),
        "encoder_hidden_states": noise(2, shape.batch, shape.text, TEXT_WIDTH),
        "pooled_projections": noise(3, shape.batch, 2 * TEXT_WIDTH),
    }


def qwen_image(shape: Shape) -> dict[str, Any]:
    inputs = {**packed(shape), "img_shapes": [[(1, shape.rows, shape.columns)]] * shape.batch}
    if shape.masked:
        inputs["encoder_hidden_states_mask"] = text_mask(shape)
    return inputs


def qwen_image_edit(shape: Shape) -> dict[str, Any]:
    """With one picture of half the rows, whose tokens are behind the image's."""
    inputs = qwen_image(shape)
    edited = 1, shape.rows // 2, shape.columns
    tokens = noise(4, shape.batch, edited[1] * edited[2], 16)
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], tokens], 1)
    return {**inputs, "img_shapes": [[(1, shape.rows, shape.columns), edited]] * shape.batch}


def qwen_image21(shape: Shape) -> dict[str, Any]:
    """Of four tokens of the image to one of the shape's: each of its slots stands for as many."""
    image = 2 * shape.rows, 2 * shape.columns
    mask = torch.arange(shape.text + shape.rows * shape.columns) >= shape.text
    inputs = {
        "hidden_states": noise(1, shape.batch, image[0] * image[1], 16),
        "encoder_hidden_states": noise(2, shape.batch, shape.text, TEXT_WIDTH),
        "img_shapes": [[(1, *image)]] * shape.batch,
        "img_mask": mask.expand(shape.batch, -1),
    }
    return {**inputs, "encoder_hidden_states_mask": text_mask(shape)} if shape.masked else inputs


def z_image(shape: Shape) -> dict[str, Any]:
    lengths = [shape.text + 40 * (shape.masked and image % 2) for image in range(shape.batch)]
    return {
        "hidden_states": noise(1, shape.batch, 4, 2 * shape.rows, 2 * shape.columns),
        "cap_feats": [noise(2 + image, length, TEXT_WIDTH) for image, length in enumerate(lengths)],
    }


def _last(network: Any, timestep: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """Of the tokens behind all others, as pipelines take it."""
    return _by_name(network, timestep, inputs)[:, -inputs["hidden_states"].shape[1] :]


def _by_lists(network: Any, timestep: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    images = list(inputs["hidden_states"][:, :, None])
    predicted = network(images, 1 - timestep, inputs["cap_feats"], return_dict=False)[0]
    return -torch.stack(predicted)[:, :, 0]


def _in_precision(network: Any, timestep: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """With a timestep of the latents' precision, in which the network embeds it."""
    return _by_name(network, timestep.to(inputs["hidden_states"].dtype), inputs)


def _by_means(network: Any, timestep: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    following = (timestep - 1000.0 / STEPS).to(inputs["hidden_states"].dtype)
    return _in_precision(network, timestep, {**inputs, "timestep_r": following})


def _by_steps(network: Any, timestep: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    return _by_name(network, timestep, {**inputs, "target_timestep": timestep - 1 / STEPS})


HEADS = {"num_attention_heads": 12}
TRANSFORMERS = {
    "flux": Transformer(tiny_flux_transformer, flux, HEADS),
    "flux-image-prompts": Transformer(tiny_prompted_flux_transformer, flux_with_image_prompts, HEADS),
    "chroma": Transformer(tiny_chroma_transformer, chroma, HEADS),
    "longcat-image": Transformer(tiny_longcat_image_transformer, longcat_image, HEADS),
    "ovis-image": Transformer(tiny_ovis_image_transformer, ovis_image, HEADS),
    "hunyuan-image": Transformer(
        tiny_hunyuan_image_transformer, hunyuan_image, HEADS, scale=1000.0, predict=_in_precision
    ),
    "hunyuan-image-distilled": Transformer(
        partial(tiny_hunyuan_image_transformer, guidance_embeds=True, use_meanflow=True),
        hunyuan_image_distilled,
        HEADS,
        scale=1000.0,
        predict=_by_means,
    ),
    "krea2": Transformer(tiny_krea2_transformer, krea2, {**HEADS, "num_key_value_heads": 12}),
    "ernie-image": Transformer(
        tiny_ernie_image_transformer, ernie_image, {**HEADS, "hidden_size": 192}, scale=1000.0
    ),
    "flux2": Transformer(tiny_flux2_transformer, flux2, HEADS),
    "flux3": Transformer(tiny_flux3_transformer, flux3, HEADS),
    "flux3-references": Transformer(
        partial(tiny_flux3_transformer, flow_map=True), flux3_with_references, HEADS, predict=_by_steps
    ),
    "sd3": Transformer(
        tiny_sd3_transformer,
        sd3,
        {**HEADS, "caption_projection_dim": 192},
        scale=1000.0,
    ),
    "pixart": Transformer(
        tiny_pixart_transformer,
        pixart,
        {**HEADS, "cross_attention_dim": 144},
        scale=1000.0,
    ),
    "qwen-image": Transformer(tiny_qwen_image_transformer, qwen_image, HEADS),
    "qwen-image-edit": Transformer(
        partial(tiny_qwen_image_transformer, zero_cond_t=True), qwen_image_edit, HEADS
    ),
    "qwen-image-2.1": Transformer(tiny_qwen_image21_transformer, qwen_image21, HEADS, predict=_last),
    "z-image": Transformer(
        tiny_z_image_transformer, z_image, {"n_heads": 12, "n_kv_heads": 12, "dim": 192}, predict=_by_lists
    ),
}


def step(network: Any, transformer: Transformer, inputs: dict[str, Any], sigma: float) -> torch.Tensor:
    """What the network predicts, of the form of the latents."""
    latents = inputs["hidden_states"]
    timestep = torch.full((len(latents),), sigma * transformer.scale, device=latents.device)
    predicted = transformer.predict(network, timestep, inputs)
    return predicted[:, : latents.shape[1]] if latents.ndim == 4 else predicted


def draw(network: Any, transformer: Transformer, shape: Shape, steps: int = STEPS) -> list[torch.Tensor]:
    """The latents after every step of Euler's method, of one image."""
    inputs = transformer.inputs_on(network.device, shape)
    sigmas = torch.linspace(1.0, 0.0, steps + 1).tolist()
    latents, engine = [], engine_of(network)
    with nullcontext() if engine is None else engine.image():
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            predicted = step(network, transformer, inputs, sigma)
            inputs["hidden_states"] = inputs["hidden_states"] + (following - sigma) * predicted
            latents.append(inputs["hidden_states"])
    return latents


def drawn(
    communicator: Any, name: str, shape: Shape, heads: int = 2, steps: int = STEPS, **config: Any
) -> tuple[list[torch.Tensor], StepStatistics]:
    """As `draw`, by one rank of a gang, and the figures of the last step."""
    transformer = TRANSFORMERS[name]
    made = transformer.make(**(transformer.twelve_heads if heads == 12 else {}))
    network = parallelize(made, communicator, ParallelConfig(**config))
    engine = engine_of(network)
    assert engine is not None
    return draw(network, transformer, shape, steps), engine.statistics


def watched(network: Any) -> list[bool]:
    """Of every call from now on, whether it was synchronous."""
    engine, synchronous = engine_of(network), []
    assert engine is not None
    network.register_forward_hook(lambda *_: synchronous.append(engine.statistics.synchronous))
    return synchronous


def error(these: torch.Tensor, those: torch.Tensor) -> float:
    """The largest difference, of the largest value."""
    assert these.shape == those.shape
    return float((these - those).abs().max() / those.abs().max())
