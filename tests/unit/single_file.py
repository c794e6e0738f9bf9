"""The weights of a Stable Diffusion 1.x pipeline by the names that its authors' own code gives them."""

from __future__ import annotations

from typing import Any

import torch

Weights = dict[str, torch.Tensor]

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
WHOLE = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def single_file(pipeline: Any) -> Weights:
    """All of the pipeline's weights in one dictionary, with those names."""
    weights = {f"model.diffusion_model.{name}": w for name, w in _unet(pipeline.unet).items()}
    weights |= {f"first_stage_model.{name}": w for name, w in _vae(pipeline.vae).items()}
    for name, weight in pipeline.text_encoder.state_dict().items():
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        weights[f"cond_stage_model.transformer.{name}"] = weight
    return {name: weight.clone().contiguous() for name, weight in weights.items()}


def _renamed(name: str, table: dict[str, str]) -> str:
    for mine, theirs in table.items():
        if name.startswith(f"{mine}."):
            return theirs + name[len(mine) :]
    return name


def _unet(unet: Any) -> Weights:
    levels, layers = len(unet.config.block_out_channels), unet.config.layers_per_block
    places = dict(WHOLE)
    for i in range(levels):
        for j in range(layers):
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{(layers + 1) * i + j + 1}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{(layers + 1) * i + j + 1}.1"
        for j in range(layers + 1):
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{(layers + 1) * i + j}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{(layers + 1) * i + j}.1"
        places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(layers + 1) * (i + 1)}.0.op"
        upsampler = f"output_blocks.{(layers + 1) * i + layers}.{1 if i == 0 else 2}"
        places[f"up_blocks.{i}.upsamplers.0"] = upsampler
    for j in range(2):
        places[f"mid_block.resnets.{j}"] = f"middle_block.{2 * j}"
    places["mid_block.attentions.0"] = "middle_block.1"
    weights = {}
    for name, weight in unet.state_dict().items():
        if ".resnets." in name:
            block, index, rest = name.partition(".resnets.")[0], *name.partition(".resnets.")[2].split(".", 1)
            name = f"{block}.resnets.{index}.{_renamed(rest, RESNET)}"
        weights[_renamed(name, places)] = weight
    return weights


def _vae(vae: Any) -> Weights:
    levels, layers = len(vae.config.block_out_channels), vae.config.layers_per_block
    places = {"encoder.conv_norm_out": "encoder.norm_out", "decoder.conv_norm_out": "decoder.norm_out"}
    for i in range(levels):
        for j in range(layers + 1):
            places[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
            places[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{levels - 1 - i}.block.{j}"
        places[f"encoder.down_blocks.{i}.downsamplers.0"] = f"encoder.down.{i}.downsample"
        places[f"decoder.up_blocks.{i}.upsamplers.0"] = f"decoder.up.{levels - 1 - i}.upsample"
    for side in ("encoder", "decoder"):
        for j in range(2):
            places[f"{side}.mid_block.resnets.{j}"] = f"{side}.mid.block_{j + 1}"
        places[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
    weights = {}
    for name, weight in vae.state_dict().items():
        name = _renamed(name, places).replace("conv_shortcut", "nin_shortcut")
        head, attention, rest = name.partition(".mid.attn_1.")
        if attention:
            rest = _renamed(rest, ATTENTION)
            name = f"{head}.mid.attn_1.{rest}"
            weight = weight[..., None, None] if weight.ndim == 2 else weight
        weights[name] = weight
    return weights
