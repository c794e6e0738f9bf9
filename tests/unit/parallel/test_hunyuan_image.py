"""HunyuanImage in gangs: a text and what it quotes, their padding, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AdaptiveProjectedMixGuidance, PerturbedAttentionGuidance
from diffusers.hooks import LayerSkipConfig

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.errors import GangMismatch, InvalidRequest, UnsupportedModel
from tests.models import tiny_hunyuan_image, tiny_hunyuan_image_transformer
from tests.unit.parallel.transformers import TRANSFORMERS, Shape, error, noise, step

NAME = "hunyuan-image"
SHAPE = Shape(masked=True)
QUOTED = ("encoder_hidden_states_2", "encoder_attention_mask_2")


def inputs(**others: Any) -> dict[str, Any]:
    return {**TRANSFORMERS[NAME].inputs(SHAPE), **others}


def predicted(communicator: Communicator | None, given: dict[str, Any], **network: Any) -> torch.Tensor:
    """By one rank of a gang in sync, or by diffusers alone."""
    made = tiny_hunyuan_image_transformer(**network)
    if communicator is not None:
        made = parallelize(made, communicator, ParallelConfig(exchange="sync", cfg_parallel=False))
    return step(made, TRANSFORMERS[NAME], given, 0.5)


@pytest.mark.parametrize("text_embed_2_dim", [None, 16])
@pytest.mark.parametrize("quotes", [False, True])
@torch.no_grad()
def test_a_text_may_quote_nothing_and_a_network_may_not_read_it(
    text_embed_2_dim: int | None, quotes: bool
) -> None:
    """diffusers ignores quotes that a network has nothing for."""
    given = inputs() if quotes else inputs(**dict.fromkeys(QUOTED))
    expected = predicted(None, given, text_embed_2_dim=text_embed_2_dim)
    assert torch.equal(predicted(connect("local"), given, text_embed_2_dim=text_embed_2_dim), expected)
    for ours in run_in_lockstep(3, lambda c: predicted(c, given, text_embed_2_dim=text_embed_2_dim)):
        assert error(ours, expected) < 3e-7


@torch.no_grad()
def test_what_is_masked_of_either_text_is_not_seen_wherever_it_stands() -> None:
    masks = {
        "encoder_attention_mask": torch.tensor([[1, 0, 1, 0], [1, 0, 0, 1]]),  # all look at the first
        "encoder_attention_mask_2": torch.tensor([[0, 1, 0], [0, 0, 0]]),
    }
    expected = predicted(None, inputs(**masks))
    changed = inputs(**masks)
    for name, mask in zip(("encoder_hidden_states", QUOTED[0]), masks.values(), strict=True):
        changed[name] = torch.where(mask[..., None] > 0, changed[name], 0.5 * noise(9, *changed[name].shape))
    for given in (inputs(**masks), changed):
        for ours in run_in_lockstep(3, lambda c, given=given: predicted(c, given)):
            assert error(ours, expected) < 3e-7


@pytest.mark.parametrize(
    ("others", "kind", "says"),
    [
        ({"hidden_states": noise(1, 2, 16, 1, 5, 3)}, UnsupportedModel, "hidden_states of 5 dimensions"),
        (
            {"encoder_attention_mask": None},
            InvalidRequest,
            "encoder_hidden_states without encoder_attention_mask, which says which",
        ),
        (
            {"encoder_attention_mask_2": None},
            InvalidRequest,
            "encoder_hidden_states_2 without encoder_attention_mask_2",
        ),
        (
            {"encoder_attention_mask": torch.ones(2, 5)},
            InvalidRequest,
            r"encoder_attention_mask of \(2, 5\) images and tokens, where encoder_hidden_states has \(2, 4\)",
        ),
        (
            {"encoder_attention_mask_2": torch.ones(1, 3)},
            InvalidRequest,
            r"encoder_attention_mask_2 of \(1, 3\) images and tokens, where .*_2 has \(2, 3\)",
        ),
        ({"attention_kwargs": {"mask": None}}, UnsupportedModel, "attention_kwargs mask; with patches only"),
    ],
)
def test_calls_that_are_not_an_images_with_its_masks_are_refused(
    others: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        predicted(connect("local"), inputs(**others))


def test_the_refiners_network_of_frames_is_refused() -> None:
    network = tiny_hunyuan_image_transformer(patch_size=(1, 1, 1), rope_axes_dim=(4, 6, 6))
    with pytest.raises(UnsupportedModel, match=r"patch_size \(1, 1, 1\), of frames: the refiner's"):
        parallelize(network, connect("local"))


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ({name: given[:, :2] for name, given in inputs().items() if name in QUOTED}, "tokens of quoted text"),
        ({QUOTED[0]: 2 * inputs()[QUOTED[0]]}, "embeddings of quoted text"),
        ({QUOTED[1]: torch.ones(2, 3)}, "mask of quoted text"),
        ({"encoder_attention_mask": torch.ones(2, 4)}, "text mask"),
    ],
)
def test_ranks_with_other_texts_or_masks_are_told_so(others: dict[str, Any], says: str) -> None:
    with pytest.raises(GangMismatch, match=says):
        run_in_lockstep(2, lambda c: predicted(c, inputs(**(others if c.rank else {}))))


def test_guidance_of_quoting_prompts_is_looked_at_too() -> None:
    """A pipeline may have one guider for these, and another for all others."""
    pipeline = tiny_hunyuan_image()
    skips = [LayerSkipConfig(indices=[0], skip_attention_scores=True, skip_attention=False, skip_ff=False)]
    pipeline.register_modules(
        guider=AdaptiveProjectedMixGuidance(),
        ocr_guider=PerturbedAttentionGuidance(perturbed_guidance_config=skips[0]),
    )
    parallelize(pipeline, connect("local"))
    with pytest.raises(UnsupportedModel, match="PerturbedAttentionGuidance leaves attention out"):
        pipeline("a sign that says 'lake'", height=64, width=64, num_inference_steps=1)
