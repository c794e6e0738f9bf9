"""Guiders of modular pipelines say which branch a call is of, where they are alone in saying it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    StableDiffusionXLAutoBlocks,
    TangentialClassifierFreeGuidance,
)
from diffusers.guiders import BaseGuidance
from diffusers.hooks import LayerSkipConfig

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, run_in_lockstep
from distriray.errors import UnsupportedModel
from distriray.parallel import engine_of
from distriray.parallel.guiders import Guiders
from tests.models import SHALLOW, tiny_flux3, tiny_sdxl


class Silent(BaseGuidance):
    """One that does not say which branch it prepares."""

    _input_predictions = ["pred_cond"]


def test_a_guider_names_each_branch_in_its_turn_and_a_new_one_counts_at_once() -> None:
    pipeline, guiders = tiny_flux3(), Guiders()
    assert guiders.branch is None
    guiders.watch(pipeline)
    for scale in (3.0, 4.0):
        pipeline.update_components(guider=ClassifierFreeGuidance(guidance_scale=scale))
        said = []
        for step in range(2):
            pipeline.guider.set_state(step, 2, torch.tensor(1.0))
            for _ in range(2):
                pipeline.guider.prepare_models(pipeline.transformer)
                said.append(guiders.branch)
        assert said == ["cond", "uncond"] * 2


class Holder:
    """What a pipeline is here."""

    def __init__(self, guider: Any) -> None:
        self.guider = guider


def test_no_guider_one_that_does_not_say_and_one_of_two_name_nothing() -> None:
    guiders, speaking = Guiders(), ClassifierFreeGuidance()
    tangential = Holder(TangentialClassifierFreeGuidance())
    guiders.watch(tangential)
    assert guiders.branch is None, "diffusers' own, whose answer raises"
    del tangential
    without, silent, holder = Holder(None), Holder(Silent()), Holder(speaking)
    guiders.watch(without)
    assert guiders.branch is None
    speaking.prepare_models(torch.nn.Identity())
    guiders.watch(holder)
    assert guiders.branch == "cond"
    guiders.watch(silent)
    assert guiders.branch is None, "it might be a call of either"
    del holder
    assert guiders.branch is None, "this one does not say"


def tiny_modular_sdxl() -> Any:
    parts = tiny_sdxl(**SHALLOW).components
    pipeline = StableDiffusionXLAutoBlocks().init_pipeline()
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae", "scheduler")
    pipeline.update_components(**{name: parts[name] for name in names})
    return pipeline


def draw(pipeline: Any) -> torch.Tensor:
    pixels: torch.Tensor = pipeline(
        prompt="a lake",
        negative_prompt="fog",
        height=96,
        width=64,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
        output="images",
    )
    return pixels


@pytest.mark.parametrize(("exchange", "later"), [("sync", True), ("displaced", False)])
def test_branches_of_a_modular_pipeline_around_a_u_net_are_displaced_each_by_itself(
    exchange: Any, later: bool
) -> None:
    expected = draw(tiny_modular_sdxl())

    def rank(communicator: Communicator) -> tuple[torch.Tensor, list[bool]]:
        config = ParallelConfig(exchange=exchange, warmup_steps=1, cfg_parallel=False)
        pipeline = parallelize(tiny_modular_sdxl(), communicator, config)
        engine, synchronous = engine_of(pipeline), []
        assert engine is not None
        pipeline.unet.register_forward_hook(lambda *_: synchronous.append(engine.statistics.synchronous))
        return draw(pipeline), synchronous

    for pixels, synchronous in run_in_lockstep(2, rank):
        assert synchronous == [True, True, *[later] * 4]
        assert float((pixels - expected).abs().max()) < (1e-4 if exchange == "sync" else 0.4)


MIDDLE = "mid_block.attentions.0.transformer_blocks"


@pytest.mark.parametrize(
    ("guider", "says"),
    [
        (
            lambda: PerturbedAttentionGuidance(perturbed_guidance_config=LayerSkipConfig([0], MIDDLE)),
            "PerturbedAttentionGuidance leaves attention out of some layers",
        ),
        (
            lambda: SkipLayerGuidance(skip_layer_config=LayerSkipConfig([0], MIDDLE, skip_ff=False)),
            "SkipLayerGuidance leaves attention out of some layers",
        ),
        (
            lambda: SkipLayerGuidance(
                skip_layer_config=LayerSkipConfig([0], MIDDLE),
                skip_layer_guidance_start=0.0,
                skip_layer_guidance_stop=1.0,
            ),
            rf"the forward of layer {MIDDLE}\.0 was replaced by .*TransformerBlockSkipHook",
        ),
    ],
)
def test_a_guider_that_leaves_something_out_of_layers_that_are_cut_is_refused_by_name(
    guider: Any, says: str
) -> None:
    def rank(communicator: Communicator) -> None:
        pipeline = tiny_modular_sdxl()
        pipeline.update_components(guider=guider())
        parallelize(pipeline, communicator, ParallelConfig(exchange="sync", cfg_parallel=False))
        with pytest.raises(UnsupportedModel, match=says):
            draw(pipeline)

    run_in_lockstep(2, rank)


def test_a_guider_that_is_disabled_leaves_nothing_out() -> None:
    guiders, guider = Guiders(), PerturbedAttentionGuidance(perturbed_guidance_layers=0)
    guiders.watch(holder := Holder(guider))
    with pytest.raises(UnsupportedModel, match="PerturbedAttentionGuidance leaves attention out"):
        guiders.check()
    holder.guider.disable()
    guiders.check()
