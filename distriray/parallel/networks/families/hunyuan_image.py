"""HunyuanImage 2.1: `HunyuanImageTransformer2DModel`."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import HunyuanImageTransformer2DModel
from diffusers.models.attention_processor import Attention as AttentionLayer
from diffusers.models.normalization import AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_hunyuanimage import (
    HunyuanImageAttnProcessor,
    HunyuanImageCombinedTimeGuidanceEmbedding,
    HunyuanImageSingleTransformerBlock,
    HunyuanImageTransformerBlock,
)
from torch import nn

from distriray.errors import InvalidRequest, UnsupportedModel
from distriray.parallel.agreement import Compared
from distriray.parallel.layers.tokens import PatchJointAttention
from distriray.parallel.networks.base import Call
from distriray.parallel.networks.plan import Attention, Blocks, Input, Plan
from distriray.parallel.networks.tokens import TokenNetwork
from distriray.parallel.partition import TokenPartition

QUOTED = "encoder_hidden_states_2"
"""Embeddings of what a prompt quotes, letter by letter: the words that the picture is to show."""
MASK, MASK_OF_QUOTED = "encoder_attention_mask", "encoder_attention_mask_2"


class PatchHunyuanImageAttention(PatchJointAttention, HunyuanImageAttnProcessor):
    """Attention of HunyuanImage, in its blocks of both kinds: positions are the image's alone."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
    ) -> Any:
        image, text = hidden_states, encoder_hidden_states
        others = attention_mask, image_rotary_emb, encoder_hidden_states_mask
        if not self.context.exchanges or text is None or attn.add_q_proj is not None:
            return super().__call__(attn, image, text, *others)
        joint = super().__call__(attn, torch.cat((text, image), 1), None, *others)
        text, image = joint.split((text.shape[1], image.shape[1]), 1)
        return image, text

    def check(self, attention_mask: torch.Tensor | None) -> None:
        """Take the mask that the network makes of this rank's tokens: `mask` is of those of all ranks."""

    def rotated(self, x: torch.Tensor, rotary: Any) -> torch.Tensor:
        text, image = x.tensor_split((x.shape[1] - len(rotary[0]),), 1)
        return torch.cat((text, super().rotated(image, rotary)), 1)


class HunyuanImage(TokenNetwork):
    """A `HunyuanImageTransformer2DModel`: padded text, and before it what of it is quoted, for the letters.

    Every rank refines the whole of both. The network's own forward reads on the host which tokens are padding
    and puts them behind all others; the same is done here on the device, before the network is called.
    """

    kind = HunyuanImageTransformer2DModel
    plan = Plan(
        cuts={
            "": {MASK: ("text", 1)},
            "x_embedder": {0: ("image", 1)},
            "rope": {0: ("image", 0), 1: ("image", 0)},
            "context_embedder": {0: ("text", 1)},
        },
        attention={
            "transformer_blocks.*.attn": Attention(HunyuanImageAttnProcessor, PatchHunyuanImageAttention),
            "single_transformer_blocks.*.attn": Attention(
                HunyuanImageAttnProcessor, PatchHunyuanImageAttention
            ),
        },
        inputs={
            MASK: Input("text mask"),
            QUOTED: Input("embeddings of quoted text", "near"),
            MASK_OF_QUOTED: Input("mask of quoted text"),
            "timestep_r": Input("timesteps that the step goes to"),
            "guidance": Input("embedded guidance scale"),
        },
        kwargs="attention_kwargs",
        whole=("x_embedder", "rope", "context_embedder", "context_embedder_2"),
        mask=MASK,
        blocks=Blocks(others=("single_transformer_blocks",), output=0),
    )
    layers = frozenset[type](
        {
            AttentionLayer,
            AdaLayerNormZeroSingle,
            HunyuanImageCombinedTimeGuidanceEmbedding,
            HunyuanImageSingleTransformerBlock,
            HunyuanImageTransformerBlock,
        }
    )

    @property
    def row_unit(self) -> int:
        unit: int = self.module.config.patch_size[0]
        return unit

    def image_tokens(self, sample: torch.Tensor) -> int:
        sides = zip(sample.shape[2:], self.module.config.patch_size, strict=True)
        return math.prod(side // patch for side, patch in sides)

    def check(self) -> None:
        super().check()
        patch = self.module.config.patch_size
        if len(patch) != 2:
            raise UnsupportedModel(
                f"a HunyuanImageTransformer2DModel with patch_size {tuple(patch)}, of frames: the refiner's"
            )

    def read(self, *args: Any, **kwargs: Any) -> Call:
        call = super().read(*args, **kwargs)
        if call.sample.ndim != 4:
            raise UnsupportedModel(f"hidden_states of {call.sample.ndim} dimensions; known are images, of 4")
        texts = {"encoder_hidden_states": MASK, QUOTED: MASK_OF_QUOTED}
        for text, mask in list(texts.items())[: 2 if self._reads_quoted(call.arguments) else 1]:
            tokens, given = call.arguments[text].shape[:2], call.arguments[mask]
            if given is None:
                raise InvalidRequest(f"{text} without {mask}, which says which of its tokens are padding")
            if given.shape != tokens:
                raise InvalidRequest(
                    f"{mask} of {tuple(given.shape)} images and tokens, where {text} has {tuple(tokens)}"
                )
        return call

    def partition(self, call: Call, patches: int) -> TokenPartition:
        # The network's blocks of one stream take none of the text's tokens for all of the image's.
        text = max(self._text_tokens(call), patches)
        return TokenPartition.of(self.image_tokens(call.sample), text, patches)

    def compared(self, call: Call) -> Compared:
        tokens = self._text_tokens(call) - call.text.shape[1]
        return super().compared(call).plus(numbers={"tokens of quoted text": tokens})

    def _compute(self, **arguments: Any) -> Any:
        """With the mask of all texts as if it were the text's: their tokens come out of one embedder here."""
        masks = [arguments[MASK].bool()]
        quoted = arguments[QUOTED] if self._reads_quoted(arguments) else None
        if quoted is not None:
            masks.insert(0, arguments[MASK_OF_QUOTED].bool())
        joint, latents, (share, _) = torch.cat(masks, 1), arguments["hidden_states"], self._shared
        missing = share.tokens.text - joint.shape[1]
        # By this it makes pictures of what is gathered.
        sized = latents[:1].expand(share.predictions, -1, -1, -1)
        order = joint.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        joint = F.pad(joint.gather(1, order), (0, missing))

        def of_part(module: nn.Module, args: Any) -> tuple[torch.Tensor]:
            return (latents,)

        def of_text(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            text, timestep, _ = args
            return text, timestep, masks[-1]

        def join(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            if quoted is not None:
                output = torch.cat((self.module.context_embedder_2(quoted), output), 1)
                output = output.gather(1, order[..., None].expand_as(output))
            return F.pad(output, (0, 0, 0, missing))

        with ExitStack() as hooks:
            embedder = self.module.context_embedder
            hooks.enter_context(self.module.x_embedder.register_forward_pre_hook(of_part))
            hooks.enter_context(embedder.register_forward_pre_hook(of_text))
            hooks.enter_context(embedder.register_forward_hook(join))
            joined = {"hidden_states": sized, MASK: joint, QUOTED: None, MASK_OF_QUOTED: None}
            return super()._compute(**{**arguments, **joined})

    def _reads_quoted(self, arguments: Any) -> bool:
        """Whether the network looks at the second text that it is given."""
        return self.module.context_embedder_2 is not None and arguments[QUOTED] is not None

    def _text_tokens(self, call: Call) -> int:
        quoted = call.arguments[QUOTED].shape[1] if self._reads_quoted(call.arguments) else 0
        tokens: int = call.text.shape[1] + quoted
        return tokens
