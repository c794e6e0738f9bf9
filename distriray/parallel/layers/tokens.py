"""Attention processors of diffusion transformers: own queries, keys and values of all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb

from distriray.errors import UnsupportedModel
from distriray.parallel.context import PatchContext
from distriray.parallel.exchange.own import Computed
from distriray.parallel.layers.attending import attend_to_all
from distriray.parallel.layers.opaque import Opaque
from distriray.parallel.partition import Sequence, TokenPartition


class Tokens:
    """The tokens of one call, as the attention processors of a network see them.

    Attributes:
        partition: who owns which.
        key_mask: which keys of all ranks, in the order in which `Step.keys_values` gives them, are attended
            to; bool (batch, 1, 1, tokens of all ranks), or what a family makes `mask` of. None where all are.
        entered: how often each processor exchanged.
    """

    def __init__(self) -> None:
        self.partition: TokenPartition
        self.key_mask: torch.Tensor | None = None
        self.entered: Counter[object] = Counter()

    def begin(self, partition: TokenPartition, key_mask: torch.Tensor | None) -> None:
        """Begin a call."""
        self.partition, self.key_mask = partition, key_mask
        self.entered.clear()

    def of(self, sequence: Sequence) -> tuple[int, ...]:
        """Numbers of tokens of a sequence that each rank owns."""
        return self.partition.of_sequence(sequence)


class PatchTokenAttention(Opaque):
    """Common part of the attention processors of all transformers.

    Hidden states are (batch, this rank's tokens, channels). Outside a step of an exchange a processor is
    diffusers' own, which it is a subclass of.

    Args:
        context: where the step is looked up.
        tokens: of the call.
        sequence: that this attention is over.

    Attributes:
        own: what the processor of diffusers is made with.
        kept: the attributes that it has of the processor whose place it takes.
    """

    own: ClassVar[Mapping[str, Any]] = {}
    kept: ClassVar[tuple[str, ...]] = ("_attention_backend",)
    # By these names `set_attention_backend` and diffusers' own context parallelism find them.
    _attention_backend: AttentionBackendName | None = None
    _parallel_config: Any = None

    def __init__(
        self,
        context: PatchContext | None = None,
        tokens: Tokens | None = None,
        sequence: Sequence = "joint",
    ) -> None:
        # diffusers makes new processors of a class without arguments when an IP-Adapter is loaded; they are
        # found and replaced before the next step.
        super().__init__(**self.own)
        self.context = context or PatchContext()
        self.tokens = tokens or Tokens()
        self.sequence = sequence
        self.enroll()

    def check(self, attention_mask: torch.Tensor | None) -> None:
        """Raise `UnsupportedModel` for an `attention_mask`, which would be over one rank's tokens.

        Only within a step.
        """
        if attention_mask is not None:
            raise UnsupportedModel("attention with an attention_mask, which is not cut into patches")

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *prefix: torch.Tensor
    ) -> torch.Tensor:
        """Attention of this rank's tokens to those of all ranks; only within a step.

        Args:
            query, key, value: (batch, this rank's tokens, heads, channels of a head).
            prefix: keys and values of tokens before those, which every rank has; (batch, tokens, heads,
                channels of a head) each.

        Returns:
            (batch, this rank's tokens, channels).
        """
        return self.exchange(query, key, value, *prefix).flatten(2)

    def exchanged(self, *inputs: Any) -> torch.Tensor:
        query, key, value, *prefix = inputs
        step, tokens = self.context.step, self.tokens.of(self.sequence)
        assert step is not None
        self.tokens.entered[self] += 1
        own = Computed(key.flatten(2), value.flatten(2))
        return attend_to_all(step, query, own, tokens, self._attend, prefix).to(query.dtype)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, heads, channels of a head) each; keys and values are of all tokens."""
        attended: torch.Tensor = dispatch_attention_fn(
            query, key, value, attn_mask=self.mask(query.shape[1]), backend=self._attention_backend
        )
        return attended

    def mask(self, queries: int) -> torch.Tensor | None:
        """Mask of what that many tokens attend to, this rank's or those of all ranks; None is everything.

        Returns:
            (batch, 1, 1 or `queries`, tokens of all ranks).
        """
        return self.tokens.key_mask


class PatchJointAttention(PatchTokenAttention):
    """Attention over text and image, each with projections of its own, or over one or both with one.

    Attributes:
        text_first: whether the text's tokens come before the image's.
    """

    text_first: ClassVar[bool] = True

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
    ) -> Any:
        if not self.context.exchanges:
            others = {
                "attention_mask": attention_mask,
                "image_rotary_emb": image_rotary_emb,
                "encoder_hidden_states_mask": encoder_hidden_states_mask,
            }
            given = {name: other for name, other in others.items() if other is not None}
            own: Any = super()
            return own.__call__(attn, hidden_states, encoder_hidden_states, **given)
        self.check(attention_mask)
        if encoder_hidden_states_mask is not None and self.tokens.key_mask is None:
            raise UnsupportedModel("attention that is given a text mask, where the network was given none")
        return self.joined(attn, self.of_image(attn, hidden_states), encoder_hidden_states, image_rotary_emb)

    @staticmethod
    def of_image(attn: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values of the image's own tokens, (batch, tokens, heads, channels of a head)."""
        return projections_of(attn, tokens, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))

    def joined(
        self, attn: Any, projected: list[torch.Tensor], text: torch.Tensor | None, image_rotary_emb: Any
    ) -> Any:
        """Attention of the image's tokens and of the text's to both, as diffusers' processors give it.

        Only within a step.

        Args:
            projected: `of_image` of the image's.
        """
        image_tokens = projected[0].shape[1]
        if text is not None:
            of_text = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
            both = projections_of(attn, text, *of_text), projected
            both = both if self.text_first else both[::-1]
            projected = [torch.cat(parts, 1) for parts in zip(*both, strict=True)]
        query, key, value = projected
        if image_rotary_emb is not None:
            query, key = (self.rotated(x, image_rotary_emb) for x in (query, key))
        attended = self.attend(query, key, value)
        if text is None:
            return attended if attn.pre_only else output_of(attn, attended)
        if self.text_first:
            text, image = attended.split([text.shape[1], image_tokens], 1)
        else:
            image, text = attended.split([image_tokens, text.shape[1]], 1)
        if not getattr(attn, "context_pre_only", False):
            text = attn.to_add_out(text)
        return output_of(attn, image), text

    def rotated(self, x: torch.Tensor, rotary: Any) -> torch.Tensor:
        """Queries or keys, (batch, own tokens, heads, channels of a head), turned by their position."""
        turned: torch.Tensor = apply_rotary_emb(x, rotary, sequence_dim=1)
        return turned


def projections_of(
    attn: Any, tokens: torch.Tensor, projections: tuple[str, ...], norms: tuple[str, ...]
) -> list[torch.Tensor]:
    """Queries, keys and values of a stream, (batch, tokens, heads, channels of a head)."""
    projected = [getattr(attn, name)(tokens).unflatten(-1, (attn.heads, -1)) for name in projections]
    for index, name in enumerate(norms):
        norm = getattr(attn, name)
        if norm is not None:
            projected[index] = norm(projected[index])
    return projected


def output_of(attn: Any, attended: torch.Tensor) -> torch.Tensor:
    projection, dropout = attn.to_out
    output: torch.Tensor = dropout(projection(attended))
    return output
