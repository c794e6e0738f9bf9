"""What attention and downsampling are handed in a step of a gang is used, or refused by name."""

from __future__ import annotations

import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.errors import UnsupportedModel
from distriray.parallel import engine_of
from tests.models import tiny_sdxl_unet
from tests.unit.parallel.test_agreement import outcomes
from tests.unit.parallel.test_local import noise, transformer

SYNC = ParallelConfig(exchange="sync", cfg_parallel=False)


class Handing(nn.Module):
    """A block of a user's own that hands its layer more than diffusers does."""

    def __init__(self, layer: nn.Module, more: Callable[[torch.Tensor], dict[str, Any]]) -> None:
        super().__init__()
        self.layer, self.more = layer, more

    def forward(self, hidden_states: torch.Tensor, **inputs: Any) -> Any:
        return self.layer(hidden_states, **{**inputs, **self.more(hidden_states)})


MORE: dict[str, tuple[str, Callable[[torch.Tensor], dict[str, Any]], str]] = {
    "other tokens": (
        "attn1",
        lambda x: {"encoder_hidden_states": torch.cat([x, x], 1)},
        "given other tokens",
    ),
    "a mask": ("attn1", lambda x: {"attention_mask": torch.ones((1, x.shape[1]))}, "with an attention_mask"),
    "a temb": ("attn1", lambda x: {"temb": torch.ones(1)}, "given a temb, which PatchSelfAttention"),
    "a temb to the text": (
        "attn2",
        lambda x: {"temb": torch.ones(1)},
        "given a temb, which CachedCrossAttention",
    ),
    "no text": ("attn2", lambda x: {"encoder_hidden_states": None}, "given no text"),
}


@pytest.mark.parametrize(("layer", "more", "name"), MORE.values(), ids=MORE)
def test_what_attention_does_not_use_is_refused(
    layer: str, more: Callable[[torch.Tensor], dict[str, Any]], name: str
) -> None:
    def rank(communicator: Communicator) -> None:
        unet = tiny_sdxl_unet()
        block = transformer(unet)
        setattr(block, layer, Handing(getattr(block, layer), more))
        noise(parallelize(unet, communicator, SYNC, local=[Handing]))

    for outcome in outcomes(2, rank):
        assert outcome.startswith("UnsupportedModel") and name in outcome


@pytest.mark.parametrize("same", [lambda x: {"encoder_hidden_states": x}, lambda x: {}])
def test_the_same_tokens_are_no_other_ones(same: Callable[[torch.Tensor], dict[str, Any]]) -> None:
    def rank(communicator: Communicator) -> torch.Tensor:
        unet = tiny_sdxl_unet()
        transformer(unet).attn1 = Handing(transformer(unet).attn1, same)
        return noise(parallelize(unet, communicator, SYNC, local=[Handing]))

    for together in run_in_lockstep(2, rank):
        torch.testing.assert_close(together, noise(tiny_sdxl_unet()), atol=1e-4, rtol=0)


def test_texts_of_a_users_own_are_not_taken_from_the_cache() -> None:
    """Code that was said to be local hands a layer another text in every step."""
    calls = iter(range(100))

    def other(hidden_states: torch.Tensor) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(next(calls))
        return {"encoder_hidden_states": torch.randn((1, 9, 32), generator=generator)}

    def draw(unet: Any) -> torch.Tensor:
        nonlocal calls
        calls = iter(range(100))
        added = {"text_embeds": torch.ones((1, 16)), "time_ids": torch.ones((1, 6))}
        sample, text = torch.ones((1, 4, 24, 8)), torch.ones((1, 9, 32))
        timesteps = torch.tensor([900, 800, 700])
        return torch.stack([unet(sample, t, text, added_cond_kwargs=added).sample for t in timesteps])

    def handing() -> Any:
        unet = tiny_sdxl_unet()
        transformer(unet).attn2 = Handing(transformer(unet).attn2, other)
        return unet

    def rank(communicator: Communicator) -> torch.Tensor:
        return draw(parallelize(handing(), communicator, SYNC, local=[Handing]))

    (together,) = run_in_lockstep(1, rank)
    torch.testing.assert_close(together, draw(handing()), atol=1e-4, rtol=0)


def test_reference_only_attention_is_refused() -> None:
    def attend(attn: Attention, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        reference = {"encoder_hidden_states": torch.cat([hidden_states, hidden_states.flip(0)], dim=1)}
        return Attention.forward(attn, hidden_states, **{**kwargs, **reference})

    def rank(communicator: Communicator, local: list[Any]) -> None:
        unet = tiny_sdxl_unet()
        attn = transformer(unet).attn1
        attn.forward = types.MethodType(attend, attn)
        noise(parallelize(unet, communicator, SYNC, local=local))

    for outcome in outcomes(2, lambda communicator: rank(communicator, [])):
        assert "UnsupportedModel: the forward of layer mid_block" in outcome
    for outcome in outcomes(2, lambda communicator: rank(communicator, [attend])):
        assert "UnsupportedModel: self-attention that is given other tokens" in outcome


def test_processors_and_downsampling_use_all_that_they_are_given() -> None:
    unet = parallelize(tiny_sdxl_unet(downsample_padding=0), connect("local"), SYNC)
    noise(unet)
    engine = engine_of(unet)
    assert engine is not None
    attn, x = transformer(unet).attn1, torch.ones((1, 6, 32))
    step: Any = SimpleNamespace(fuses=False)
    with engine.context.during(step):
        with pytest.raises(UnsupportedModel, match="given focus, which is not used"):
            attn.processor(attn, x, focus=1)
        with pytest.raises(UnsupportedModel, match="given 1 more arguments"):
            attn.processor(attn, x, None, None, None, 0.5)
        with pytest.raises(UnsupportedModel, match="downsampling that is given more"):
            unet.down_blocks[0].downsamplers[0](torch.ones((1, 16, 4, 8)), scale=0.5)
