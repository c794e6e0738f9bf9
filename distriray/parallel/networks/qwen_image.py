"""Qwen-Image: `QwenImageTransformer2DModel`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.attention_processor import Attention as AttentionLayer
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenEmbedRope,
    QwenImageTransformerBlock,
    QwenTimestepProjEmbeddings,
    apply_rotary_emb_qwen,
)

from distriray.errors import UnsupportedModel
from distriray.parallel.layers.tokens import PatchJointAttention
from distriray.parallel.networks.base import Call
from distriray.parallel.networks.plan import Attention, Input, Plan
from distriray.parallel.networks.tokens import TokenNetwork


class PatchQwenImageAttention(PatchJointAttention, QwenDoubleStreamAttnProcessor2_0):
    """Attention of Qwen-Image, whose rotary embeddings are complex numbers, the image's and the text's."""

    def rotated(self, x: torch.Tensor, rotary: Any) -> torch.Tensor:
        of_image, of_text = rotary
        turned: torch.Tensor = apply_rotary_emb_qwen(x, torch.cat((of_text, of_image)), use_real=False)
        return turned


class QwenImage(TokenNetwork):
    """A `QwenImageTransformer2DModel`: its pipeline packs 2x2 latents into a token and masks padded text."""

    kind = QwenImageTransformer2DModel
    pads_text = False
    row_unit = 2
    plan = Plan(
        cuts={
            "transformer_blocks.0": {"hidden_states": ("image", 1), "encoder_hidden_states": ("text", 1)},
            "transformer_blocks.*": {"encoder_hidden_states_mask": ("text", 1)},
            "pos_embed": {0: ("image", 0), 1: ("text", 0)},
        },
        attention={
            "transformer_blocks.*.attn": Attention(QwenDoubleStreamAttnProcessor2_0, PatchQwenImageAttention)
        },
        inputs={
            "encoder_hidden_states_mask": Input("text mask"),
            "img_shapes": Input("shapes of the images", "plain", batched=False),
            "guidance": Input("embedded guidance scale"),
        },
        kwargs="attention_kwargs",
        whole=("pos_embed",),
        mask="encoder_hidden_states_mask",
    )
    layers = frozenset[type](
        {AttentionLayer, QwenEmbedRope, QwenImageTransformerBlock, QwenTimestepProjEmbeddings}
    )

    def check(self) -> None:
        super().check()
        for option in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            if self.module.config[option]:
                raise UnsupportedModel(f"a QwenImageTransformer2DModel with {option}, of editing or layers")

    def uncaptured(self, call: Call) -> str | None:
        if call.arguments["encoder_hidden_states_mask"] is not None:
            return "QwenImageTransformer2DModel copies the length of masked text from the host"
        return None

    def cached(self, call: Call) -> Any:
        first, device = call.arguments["img_shapes"][0], call.sample.device
        shapes = first if isinstance(first, list) else [first]
        return [
            self.module.pos_embed._compute_video_freqs(*shape, index, device)
            for index, shape in enumerate(shapes)
        ]
