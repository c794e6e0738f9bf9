"""Trains a small transformer on latents of drawn scenes and their captions, shaped as Stable Diffusion 3's.

    torchrun --nproc-per-node 2 -m distriray.landscapes.training.transformer --shares 128x128=1 [--compile]

Needs what `dataset`, `vae` and `text_encoders` wrote. Resumable (`denoising`).
`python -m distriray.landscapes.training.export --model landscapes-sd3` makes the model folder of it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from distriray.landscapes.training import dataset
from distriray.landscapes.training.denoising import Lesson, captions, noise_like, parse, train
from distriray.landscapes.training.text import POOLED, WIDTH, tokenize

T5_TOKENS = 256
TRANSFORMER_CONFIG = {
    "sample_size": 64,
    "patch_size": 2,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 6,
    "attention_head_dim": 48,
    "num_attention_heads": 4,
    "joint_attention_dim": 2 * WIDTH,
    "caption_projection_dim": 192,
    "pooled_projection_dim": WIDTH + POOLED,
    "pos_embed_max_size": 64,
    "qk_norm": "rms_norm",
}
FLOW_CONFIG = {"num_train_timesteps": 1000, "shift": 2.0}


def projecting(first: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The first text encoder as Stable Diffusion 3 wants it: with a projection, which changes nothing."""
    config = type(first.config)(**{**first.config.to_dict(), "projection_dim": WIDTH})
    model = CLIPTextModelWithProjection(config)
    weights = {name.removeprefix("text_model."): weight for name, weight in first.state_dict().items()}
    model.text_model.load_state_dict(weights)
    model.text_projection.weight.data.copy_(torch.eye(WIDTH))
    return model.eval()


def silent_t5(vocabulary: int) -> T5EncoderModel:
    """A T5 that answers zeros, which is what Stable Diffusion 3 has in the place of one that is missing.

    A folder without one does not load by diffusers alone.
    """
    width = 2 * WIDTH
    config = T5Config(vocab_size=vocabulary, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    model = T5EncoderModel(config)
    model.encoder.final_layer_norm.weight.data.zero_()
    return model.eval()


def sigmas(rng: np.random.Generator, count: int, side: float) -> Tensor:
    """Noise level of each picture, (N,) float32: the middle oftenest, and higher for larger pictures.

    As in Esser et al. 2024 (arXiv 2403.03206), sections 3.1 and 5.3.2.
    """
    between = 1 / (1 + np.exp(-rng.standard_normal(count)))
    shift = max(1.0, side / 256)
    return torch.from_numpy((shift * between / (1 + (shift - 1) * between)).astype(np.float32))


def flow_loss(velocity: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean squared error of (N, C, H, W), each channel as what an error in it costs in the picture."""
    return ((velocity.float() - target).square().mean(dim=(2, 3)) @ weights / len(weights)).mean()


class OneForAllZeros:
    """Joint attention whose last token of text stands for all `T5_TOKENS` that are zero.

    They have no positions, so they stay alike, and as keys they count as often as there are of them.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        def heads(projection: Any, tokens: Tensor, norm: Any) -> Tensor:
            projected = projection(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return projected if norm is None else norm(projected)

        image, text = hidden_states, encoder_hidden_states
        query, key, value = (
            torch.cat((heads(of_image, image, norm), heads(of_text, text, norm_of_text)), 2)
            for of_image, norm, of_text, norm_of_text in (
                (attn.to_q, attn.norm_q, attn.add_q_proj, attn.norm_added_q),
                (attn.to_k, attn.norm_k, attn.add_k_proj, attn.norm_added_k),
                (attn.to_v, None, attn.add_v_proj, None),
            )
        )
        often = query.new_zeros(1, key.shape[2])
        often[:, -1] = math.log(T5_TOKENS)
        if query.device.type == "cpu":  # the fused attention's backward pass took a quarter of a step there
            scores = query * query.shape[-1] ** -0.5 @ key.mT + often
            output = scores.softmax(-1).to(value.dtype) @ value
        else:
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=often)
        output = output.transpose(1, 2).flatten(2)
        image, text = output.split([image.shape[1], text.shape[1]], 1)
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image)), text


class FlowConditioning:
    """Captions to what the transformer takes; with a chance of `drop` an empty one, for guidance."""

    def __init__(self, folder: Path, device: torch.device, drop: float = 0.1) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        first = CLIPTextModel.from_pretrained(folder / "text_encoder")
        self.first = projecting(first).to(device)
        self.second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").to(device).eval()
        self.device, self.drop = device, drop

    @torch.no_grad()
    def __call__(
        self, bucket: dataset.Bucket, indices: np.ndarray, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Embeddings, (N, tokens and one of zeros, 2 WIDTH), and their summaries, (N, WIDTH + POOLED)."""
        texts = captions(bucket, indices, rng)
        fate = rng.uniform(0, 1, len(texts))
        texts = ["" if chance < self.drop else text for chance, text in zip(fate, texts, strict=True)]
        ids = tokenize(self.tokenizer, texts).to(self.device)
        one, two = (encoder(ids, output_hidden_states=True) for encoder in (self.first, self.second))
        embeddings = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        pooled = torch.cat([one.text_embeds, two.text_embeds], dim=-1)
        return F.pad(embeddings, (0, 0, 0, 1)), pooled


class TransformerLesson(Lesson):
    """Flow matching: predicting the way from a picture to noise, along a straight line."""

    name = "transformer"
    kind = SD3Transformer2DModel
    config = TRANSFORMER_CONFIG
    outer = ("pos_embed", "context_embedder", "time_text_embed", "norm_out", "proj_out")
    block = JointTransformerBlock

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__(folder, device)
        self._conditioning = FlowConditioning(folder, device)

    def made(self, initial: Path | None) -> Any:
        transformer = super().made(initial)
        transformer.set_attn_processor(OneForAllZeros())
        return transformer

    def loss(
        self,
        network: Any,
        clean: Tensor,
        bucket: dataset.Bucket,
        indices: np.ndarray,
        rng: np.random.Generator,
        weights: Tensor,
    ) -> Tensor:
        embeddings, pooled = self._conditioning(bucket, indices, rng)
        noisiness = sigmas(rng, len(clean), (bucket.height * bucket.width) ** 0.5).to(self.device)
        noise, share = noise_like(clean, rng), noisiness[:, None, None, None]
        with torch.autocast(self.device.type, torch.bfloat16):
            velocity = network(
                hidden_states=(1 - share) * clean + share * noise,
                timestep=1000 * noisiness,
                encoder_hidden_states=embeddings,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
        return flow_loss(velocity, noise - clean, weights)


if __name__ == "__main__":
    train(parse(__doc__), TransformerLesson)
