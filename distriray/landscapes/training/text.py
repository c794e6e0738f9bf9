"""The two text encoders and their tokenizer: trained to say which attributes a caption states.

    python -m distriray.landscapes.training.text_encoders

Both are CLIP text models, as SDXL wants them; both are frozen while the U-Net learns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import torch
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from distriray.landscapes.captions import FILLERS, OPENINGS, caption, label_indices
from distriray.landscapes.scene import ATTRIBUTES, sample_scene

MAX_TOKENS = 64
WIDTH = 96
POOLED = 128


def build_tokenizer(captions: Iterator[str], size: int = 900) -> CLIPTokenizer:
    """A byte-pair tokenizer like CLIP's manner; a word of no caption falls into pieces, not to nothing."""
    plain = CLIPTokenizer(vocab=None, merges=[]).backend_tokenizer
    bytes_ = sorted(ByteLevel.alphabet())
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = plain.normalizer, plain.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|startoftext|>", "<|endoftext|>"] + [letter + "</w>" for letter in bytes_],
        initial_alphabet=bytes_,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator(captions, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]
    ]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=MAX_TOKENS)


def build_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Untrained encoders of three layers; SDXL reads both's second layer and the second one's projection."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=POOLED,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="gelu",
    )
    return CLIPTextModel(config), CLIPTextModelWithProjection(config)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids as the SDXL pipeline makes them, (N, MAX_TOKENS) int64."""
    return tokenizer(
        texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def encode(first: CLIPTextModel, second: CLIPTextModelWithProjection, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings for the SDXL pipeline: (N, MAX_TOKENS, 2 * WIDTH), and pooled, (N, POOLED)."""
    one = first(ids, output_hidden_states=True)
    two = second(ids, output_hidden_states=True)
    return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds


class AttributeHeads(nn.Module):
    """Logits of each attribute's values and of "not said", from the pooled and from the token embeddings."""

    def __init__(self) -> None:
        super().__init__()
        total = sum(len(values) + 1 for values in ATTRIBUTES.values())
        self.pooled, self.tokens = nn.Linear(POOLED, total), nn.Linear(2 * WIDTH, total)

    def forward(self, embeddings: Tensor, pooled: Tensor, ids: Tensor, eos: int) -> tuple[Tensor, Tensor]:
        """The logits, (N, total), from the pooled embedding and from the first end token's embedding."""
        last = (ids == eos).int().argmax(dim=1)
        return self.pooled(pooled), self.tokens(embeddings[torch.arange(len(ids)), last])


def split_logits(logits: Tensor) -> list[Tensor]:
    """One (N, values + 1) block for each attribute; index 0 stands for "not said"."""
    return list(logits.split([len(values) + 1 for values in ATTRIBUTES.values()], dim=1))


def sample_captions(seed: int, count: int, first_scene: int = 0) -> tuple[list[str], Tensor]:
    """Captions of random scenes and the labels of what they say, (count, attributes) int64, -1 where open."""
    rng = np.random.default_rng([seed, 3])
    pairs = []
    for number in rng.integers(0, 500_000_000, count):
        text, said = caption(sample_scene(first_scene + int(number)), rng, keep=float(rng.uniform(0.3, 1.0)))
        pairs.append((text, label_indices(said)))
    return [text for text, _ in pairs], torch.tensor([labels for _, labels in pairs])


def words() -> list[str]:
    """Words worth a token although captions seldom hold them."""
    return [*FILLERS, *OPENINGS]
