"""FLUX.1: `FluxTransformer2DModel`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)

from distriray.errors import InvalidRequest, UnsupportedModel
from distriray.parallel.agreement import Compared, tensors_in
from distriray.parallel.layers.tokens import PatchJointAttention, Tokens
from distriray.parallel.networks.base import Call, Collect
from distriray.parallel.networks.controls import UsedControl
from distriray.parallel.networks.local import LocalCode
from distriray.parallel.networks.plan import OF_TWO_KINDS, Attention, Cut, Input, Plan
from distriray.parallel.networks.token_control import Added, TokenControl, repeated
from distriray.parallel.networks.tokens import TokenNetwork
from distriray.parallel.share import Share

# FLUX.2 has these too.
CUTS: Mapping[str, Mapping[str | int, Cut]] = {
    "": {
        "hidden_states": ("image", 1),
        "encoder_hidden_states": ("text", 1),
        "img_ids": ("image", -2),
        "txt_ids": ("text", -2),
    }
}
IMAGE_EMBEDS = "ip_adapter_image_embeds"
"""The entry of what attention processors are given that is for the IP-Adapters in the network."""
POSITIONS = {
    "img_ids": Input("positions of the image's tokens", batched=False),
    "txt_ids": Input("positions of the text's tokens", batched=False),
}


class PatchFluxAttention(PatchJointAttention, FluxAttnProcessor):
    """Attention of FLUX.1, in its blocks of both kinds."""


class PatchPromptedFluxAttention(PatchJointAttention, FluxIPAdapterAttnProcessor):
    """The same with IP-Adapters: the image attends to image prompts too, which every rank has whole."""

    own: ClassVar[Mapping[str, Any]] = {"hidden_size": 0, "cross_attention_dim": 0, "num_tokens": ()}
    kept = (*PatchJointAttention.kept, "hidden_size", "cross_attention_dim", "scale", "to_k_ip", "to_v_ip")

    def __call__(  # type: ignore[override]  # diffusers gives the last by name
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        ip_hidden_states: list[torch.Tensor] | None = None,
    ) -> Any:
        if not self.context.exchanges:
            return FluxIPAdapterAttnProcessor.__call__(
                self,
                attn,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                image_rotary_emb,
                ip_hidden_states,
            )
        self.check(attention_mask)
        projected = self.of_image(attn, hidden_states)
        prompted = self._prompted(projected[0], ip_hidden_states or [])
        return *self.joined(attn, projected, encoder_hidden_states, image_rotary_emb), prompted

    def _prompted(self, query: torch.Tensor, prompts: list[torch.Tensor]) -> torch.Tensor:
        """What queries, (batch, own tokens, heads, channels of a head), have of image prompts' tokens.

        Args:
            prompts: of each IP-Adapter, (batch, pictures, tokens, channels).

        Returns:
            (batch, own tokens, channels).
        """
        output = torch.zeros_like(query.flatten(2))
        weights = zip(self.scale, self.to_k_ip, self.to_v_ip, strict=True)
        for prompt, (scale, *projections) in zip(prompts, weights, strict=True):
            key, value = (
                projection(prompt).view(len(query), -1, *query.shape[2:]) for projection in projections
            )
            attended = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
            output += scale * attended.flatten(2).to(query.dtype)
        return output


BLOCKS_OF_TWO = "transformer_blocks.*.attn"
ATTENTION = {
    BLOCKS_OF_TWO: Attention(FluxAttnProcessor, PatchFluxAttention),
    "single_transformer_blocks.*.attn": Attention(FluxAttnProcessor, PatchFluxAttention),
}
LAYERS = frozenset[type](
    {FluxAttention, FluxPosEmbed, FluxSingleTransformerBlock, FluxTransformerBlock, AdaLayerNormZeroSingle}
)


# A union's text begins with a token for the kind of its picture, which its forward puts there.
OF_A_UNION: Mapping[str, Mapping[str | int, Cut]] = {
    "pos_embed": {0: ("joint", 0), 1: ("joint", 0)},
    "transformer_blocks.0": {"hidden_states": ("image", 1), "encoder_hidden_states": ("text", 1)},
}


class FluxControl(TokenControl):
    """A `FluxControlNetModel`, whose picture is given as packed latents; some are unions of several."""

    kind = FluxControlNetModel
    plan = Plan(cuts={"": {**CUTS[""], "controlnet_cond": ("image", 1)}}, attention=ATTENTION, inputs={})
    layers = LAYERS
    like = (
        "in_channels",
        "num_attention_heads",
        "attention_head_dim",
        "joint_attention_dim",
        "pooled_projection_dim",
        "axes_dims_rope",
    )

    def __init__(self, module: Any, local: LocalCode | None = None, tokens: Tokens | None = None) -> None:
        if module.union:
            self.plan = replace(type(self).plan, cuts=OF_A_UNION, whole=("pos_embed",))
        super().__init__(module, local, tokens)

    @classmethod
    def check_fits(cls, network: Any, transformer: Any) -> None:
        super().check_fits(network, transformer)
        if network.config.guidance_embeds and not transformer.config.guidance_embeds:
            raise UnsupportedModel("it takes a guidance scale, and the model has none")
        hint, side = network.config.conditioning_embedding_channels, network.config.patch_size
        if hint is not None and hint * side**2 != network.config.in_channels:
            raise UnsupportedModel(
                f"its picture's tokens are of {side} by {side} with {hint} channels, and not with "
                f"{network.config.in_channels} in all, which it takes"
            )
        if network.union and not network.transformer_blocks:
            raise UnsupportedModel("it is a union without blocks of two streams")

    def of_share(self, share: Share) -> Share:
        if not self.module.union:
            return share
        return replace(share, partition=replace(share.tokens, text=share.tokens.text + 1))

    @staticmethod
    def arguments(control: UsedControl, given: Mapping[str, Any]) -> dict[str, Any]:
        names = (
            "hidden_states",
            "encoder_hidden_states",
            "pooled_projections",
            "timestep",
            "img_ids",
            "txt_ids",
        )
        arguments = {name: given[name] for name in names}
        sample = arguments["hidden_states"]
        if control.network.config.guidance_embeds:
            arguments["guidance"] = given["guidance"]
        if control.mode is not None:
            arguments["controlnet_mode"] = sample.new_full((len(sample), 1), control.mode, dtype=torch.long)
        return arguments

    @staticmethod
    def spread(network: Any, transformer: Any, output: Any) -> dict[str, Added]:
        of_both, of_one = output
        in_turn = network.config.conditioning_embedding_channels is not None  # as those of XLabs are made
        return {
            "controlnet_block_samples": repeated(of_both, transformer.transformer_blocks, in_turn),
            "controlnet_single_block_samples": repeated(of_one, transformer.single_transformer_blocks),
        }


class Flux(TokenNetwork):
    """A `FluxTransformer2DModel`: a token is 2x2 latents, which the pipeline packs."""

    kind = FluxTransformer2DModel
    row_unit = 2
    control = FluxControl
    plan = Plan(
        cuts=CUTS,
        attention={
            **ATTENTION,
            BLOCKS_OF_TWO: replace(
                ATTENTION[BLOCKS_OF_TWO], others={FluxIPAdapterAttnProcessor: PatchPromptedFluxAttention}
            ),
        },
        whole=("encoder_hid_proj",),  # of the tokens of image prompts alone
        inputs={
            "pooled_projections": Input("pooled prompt embeddings", "near"),
            "guidance": Input("embedded guidance scale"),
            "controlnet_blocks_repeat": Input("turns of ControlNet residuals", "plain", batched=False),
            **POSITIONS,
        },
        residuals=("controlnet_block_samples", "controlnet_single_block_samples"),
        blocks=OF_TWO_KINDS,
    )
    layers = LAYERS | {FluxIPAdapterAttnProcessor, PatchPromptedFluxAttention}

    def read(self, *args: Any, image_prompts: Sequence[str] = (), **kwargs: Any) -> Call:
        """A call with IP-Adapters in the network, or without.

        Args:
            args, kwargs: as of `TokenNetwork`.
            image_prompts: IP-Adapters that are in the network for this image and not for others.

        Raises:
            UnsupportedModel: as of `TokenNetwork`.
            InvalidRequest: there are image prompts of another number of images.
        """
        call = super().read(*args, **kwargs)
        for embeds in _image_embeds(call):
            if len(embeds) != call.batch:
                raise InvalidRequest(
                    f"{IMAGE_EMBEDS} of {len(embeds)} images, where there are {call.batch}; give each its own"
                )
        return call.with_image_prompts(image_prompts)

    def scale_of(self, arguments: Mapping[str, Any]) -> Mapping[str, Any] | None:
        given = super().scale_of(arguments)
        return given and {name: value for name, value in given.items() if name != IMAGE_EMBEDS}

    def compared(self, call: Call) -> Compared:
        compared, embeds = super().compared(call), _image_embeds(call)
        return compared.plus(numbers={"number of image prompts": len(embeds)}, near={"image prompts": embeds})

    def compute(self, call: Call, share: Share, collect: Collect) -> Any:
        given = IMAGE_EMBEDS in (call.arguments["joint_attention_kwargs"] or {})
        if given and getattr(self.module, "encoder_hid_proj", None) is None:
            raise UnsupportedModel(f"joint_attention_kwargs {IMAGE_EMBEDS} without an IP-Adapter")
        if not given and any(isinstance(p, FluxIPAdapterAttnProcessor) for p in self._attending.values()):
            raise UnsupportedModel(f"an IP-Adapter without {IMAGE_EMBEDS} in joint_attention_kwargs")
        return super().compute(call, share, collect)


def _image_embeds(call: Call) -> list[torch.Tensor]:
    """What IP-Adapters are given in a call, as their image encoders have it: (batch, pictures, ...) each."""
    return tensors_in((call.arguments["joint_attention_kwargs"] or {}).get(IMAGE_EMBEDS))
