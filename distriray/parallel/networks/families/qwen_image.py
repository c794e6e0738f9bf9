"""Qwen-Image: `QwenImageTransformer2DModel`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

import torch
from diffusers import QwenImageControlNetModel, QwenImageTransformer2DModel
from diffusers.models.attention_processor import Attention as AttentionLayer
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenEmbedRope,
    QwenImageTransformerBlock,
    QwenTimestepProjEmbeddings,
    apply_rotary_emb_qwen,
)
from torch import nn

from distriray.errors import UnsupportedModel
from distriray.parallel.layers.tokens import PatchJointAttention
from distriray.parallel.networks.base import Call
from distriray.parallel.networks.controls import UsedControl
from distriray.parallel.networks.plan import Attention, Blocks, Cut, Input, Plan
from distriray.parallel.networks.token_control import Added, TokenControl, repeated
from distriray.parallel.networks.tokens import TokenNetwork


class PatchQwenImageAttention(PatchJointAttention, QwenDoubleStreamAttnProcessor2_0):
    """Attention of Qwen-Image, whose rotary embeddings are complex numbers, the image's and the text's."""

    def rotated(self, x: torch.Tensor, rotary: Any) -> torch.Tensor:
        of_image, of_text = rotary
        turned: torch.Tensor = apply_rotary_emb_qwen(x, torch.cat((of_text, of_image)), use_real=False)
        return turned


CUTS: Mapping[str, Mapping[str | int, Cut]] = {
    "transformer_blocks.0": {"hidden_states": ("image", 1), "encoder_hidden_states": ("text", 1)},
    "transformer_blocks.*": {"encoder_hidden_states_mask": ("text", 1)},
    "pos_embed": {0: ("image", 0), 1: ("text", 0)},
}
ATTENTION = {
    "transformer_blocks.*.attn": Attention(QwenDoubleStreamAttnProcessor2_0, PatchQwenImageAttention)
}
LAYERS = frozenset[type](
    {AttentionLayer, QwenEmbedRope, QwenImageTransformerBlock, QwenTimestepProjEmbeddings}
)
MASK = "encoder_hidden_states_mask"


class QwenImageControl(TokenControl):
    """A `QwenImageControlNetModel`, whose picture is given as packed latents."""

    kind = QwenImageControlNetModel
    plan = Plan(cuts=CUTS, attention=ATTENTION, inputs={}, whole=("pos_embed",), mask=MASK)
    layers = LAYERS
    like = (
        "in_channels",
        "num_attention_heads",
        "attention_head_dim",
        "joint_attention_dim",
        "axes_dims_rope",
    )

    @classmethod
    def check_fits(cls, network: Any, transformer: Any) -> None:
        super().check_fits(network, transformer)
        if network.config.extra_condition_channels:
            raise UnsupportedModel("it takes a mask beside its picture, by extra_condition_channels")

    @staticmethod
    def arguments(control: UsedControl, given: Mapping[str, Any]) -> dict[str, Any]:
        names = "hidden_states", "timestep", "encoder_hidden_states", "img_shapes"
        return {**{name: given[name] for name in names}, MASK: given.get(MASK)}

    @staticmethod
    def spread(network: Any, transformer: Any, output: Any) -> dict[str, Added]:
        return {"controlnet_block_samples": repeated(output, transformer.transformer_blocks)}


class QwenImage(TokenNetwork):
    """A `QwenImageTransformer2DModel`: its pipeline packs 2x2 latents into a token and masks padded text.

    Tokens of pictures to edit are the image's, behind those that are drawn. With `zero_cond_t` they are
    modulated as if there were no noise.
    """

    kind = QwenImageTransformer2DModel
    pads_text = False
    row_unit = 2
    control = QwenImageControl
    plan = Plan(
        cuts={
            **CUTS,
            "transformer_blocks.*": {**CUTS["transformer_blocks.*"], "modulate_index": ("image", 1)},
        },
        attention=ATTENTION,
        inputs={
            MASK: Input("text mask"),
            "img_shapes": Input("shapes of the images", "plain", batched=False),
            "guidance": Input("embedded guidance scale"),
        },
        kwargs="attention_kwargs",
        whole=("pos_embed",),
        mask=MASK,
        residuals=("controlnet_block_samples",),
        blocks=Blocks(),
    )
    layers = LAYERS

    def check(self) -> None:
        super().check()
        for option in ("use_additional_t_cond", "use_layer3d_rope"):
            if self.module.config[option]:
                raise UnsupportedModel(f"a QwenImageTransformer2DModel with {option}, of layers")

    def uncaptured(self, call: Call) -> str | None:
        if call.arguments["encoder_hidden_states_mask"] is not None:
            return "QwenImageTransformer2DModel copies the length of masked text from the host"
        return None

    def _compute(self, **arguments: Any) -> Any:
        if not self.module.zero_cond_t:
            return super()._compute(**arguments)
        with self._edited(arguments) as arguments:
            return super()._compute(**arguments)

    @contextmanager
    def _edited(self, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Let the forward not copy from the host, as `zero_cond_t` has it, which tokens have no noise.

        The same is made on the device, so that a step can be captured.

        Yields:
            the arguments for it, with timesteps of 0 for pictures that are edited behind the others.
        """
        (share, _), timestep, shapes = self._shared, arguments["timestep"], arguments["img_shapes"]
        if len(shapes) == share.batch:
            shapes = shapes[share.part]
        edited = timestep.new_zeros(len(shapes), arguments["hidden_states"].shape[1], dtype=torch.int)
        for image, (drawn, *_) in enumerate(shapes):
            edited[image, prod(drawn) :].fill_(1)

        def modulate(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "modulate_index": edited}

        def of_drawn(norm: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return args[0], args[1].chunk(2)[0]

        with ExitStack() as hooks:
            hooks.callback(setattr, self.module, "zero_cond_t", True)
            self.module.zero_cond_t = False
            for block in self.module.transformer_blocks:
                hooks.enter_context(block.register_forward_pre_hook(modulate, with_kwargs=True))
            hooks.enter_context(self.module.norm_out.register_forward_pre_hook(of_drawn))
            yield {**arguments, "timestep": torch.cat([timestep, timestep * 0])}

    def cached(self, call: Call) -> Any:
        first, device = call.arguments["img_shapes"][0], call.sample.device
        shapes = first if isinstance(first, list) else [first]
        return [
            self.module.pos_embed._compute_video_freqs(*shape, index, device)
            for index, shape in enumerate(shapes)
        ]
