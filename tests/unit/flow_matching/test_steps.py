"""What a step does, what it leaves as it was, and how many there are, in each family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from distriray.denoise import Denoiser, DenoiseState
from distriray.errors import GangBroken, InvalidRequest, NotFinite
from distriray.requests import SamplingParams
from tests.edits import shown
from tests.unit.flow_matching.families import (
    BRANCHES_APART,
    MODELS,
    SMALL,
    begin,
    skip_unless_it_begins_from_pictures,
    skip_unless_taken,
)
from tests.unit.test_denoise import MASK, PICTURE, failing_at_the_end, finish


@pytest.mark.parametrize("call", [{}, {"image": PICTURE}, {"image": PICTURE, "mask_image": MASK}])
def test_an_image_does_not_depend_on_its_batch(denoiser: Denoiser, call: dict[str, Any]) -> None:
    if "image" in call:
        skip_unless_it_begins_from_pictures(denoiser._pipeline)
    call = {**SMALL, **call}
    together, alone = begin(denoiser, [1, 2, 3], **call), begin(denoiser, [2], **call)
    torch.testing.assert_close(finish(denoiser, together)[1:2], finish(denoiser, alone), rtol=1e-4, atol=1e-4)


def test_a_sampler_that_draws_draws_from_the_requests_own_generators(
    monkeypatch: pytest.MonkeyPatch, pipeline: Any
) -> None:
    stochastic = FlowMatchEulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, stochastic_sampling=True
    )
    monkeypatch.setattr(pipeline, "scheduler", stochastic)
    denoiser = Denoiser(pipeline)
    together, alone = begin(denoiser, [1, 2], **SMALL), begin(denoiser, [2], **SMALL)
    denoiser.step(together)
    carried = DenoiseState.from_bytes(together.to_bytes())
    assert torch.equal(finish(denoiser, carried), finish(denoiser, together))
    torch.testing.assert_close(together.latents[1:], finish(denoiser, alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler", [None, "dpmpp-2m", "unipc"])
@pytest.mark.parametrize("part", ["transformer", "scheduler"])
def test_whatever_fails_the_state_stays(denoiser: Denoiser, scheduler: str | None, part: str) -> None:
    skip_unless_taken(denoiser, scheduler)
    state = begin(denoiser, [1], **SMALL, scheduler=scheduler)
    while not state.done:
        owner = denoiser._pipeline.transformer if part == "transformer" else state.scheduler
        before = state.to_bytes()
        name = "forward" if part == "transformer" else "step"
        with failing_at_the_end(owner, name), pytest.raises(GangBroken):
            denoiser.step(state)
        assert state.to_bytes() == before
        denoiser.step(state)


def test_the_users_pipeline_keeps_its_scheduler(pipeline: Any) -> None:
    scheduler, before = pipeline.scheduler, dict(vars(pipeline.scheduler))
    denoiser = Denoiser(pipeline)
    finish(denoiser, begin(denoiser, [1], **SMALL, scheduler="euler"))
    assert pipeline.scheduler is scheduler and vars(scheduler) == before


def test_a_second_branch_is_taken_by_guidance_alone(model: str, denoiser: Denoiser, pipeline: Any) -> None:
    batches: list[int] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, inputs, named: batches.append(len(named.get("hidden_states", named.get("x")))),
        with_kwargs=True,
    )
    scale = denoiser.terms.unguided
    for guidance_scale in (scale, scale + 1) if denoiser.guides else (scale,):
        batches.clear()
        denoiser.step(begin(denoiser, [1], **SMALL, guidance_scale=guidance_scale))
        assert sum(batches) == 1 + (guidance_scale > scale)
        assert len(batches) == 1 + (guidance_scale > scale and model in BRANCHES_APART)
    hook.remove()


@pytest.mark.parametrize("scheduler", [None, "dpmpp-2m", "heun", "unipc"])
def test_estimates_are_of_the_picture_and_the_last_one_is_it(
    denoiser: Denoiser, scheduler: str | None
) -> None:
    skip_unless_taken(denoiser, scheduler)
    state = begin(denoiser, [1], **{**SMALL, "scheduler": scheduler})
    noise = state.latents
    denoiser.step(state)
    output = state.network_output
    assert output is not None and state.estimate is not None
    # All noise at first, or nearly: the latents are the noise, and the output is noise less picture.
    torch.testing.assert_close(state.estimate, noise - output.output, rtol=2e-2, atol=2e-2)
    latents = finish(denoiser, state)
    torch.testing.assert_close(state.estimate, latents, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("scheduler", ["euler", "heun"])
def test_a_request_knows_how_many_steps_are_done_on_its_image(denoiser: Denoiser, scheduler: Any) -> None:
    skip_unless_taken(denoiser, scheduler)
    skip_unless_it_begins_from_pictures(denoiser._pipeline)
    for steps, strength in ((2, 0.5), (7, 0.3), (10, 0.3), (100, 0.29), (30, 1.0)):
        on_picture = {"image": PICTURE, "strength": strength, "num_inference_steps": steps}
        params = SamplingParams(prompt="x", seed=1, scheduler=scheduler, **on_picture)
        known = params.num_steps(denoiser.own_steps, rounds_up=denoiser.terms.rounds_up)
        assert denoiser.prepare(params).num_steps == known


@pytest.mark.parametrize("steps", [1, 2, 1000])
@pytest.mark.parametrize("scheduler", ["dpmpp-2m", "euler", "heun", "unipc"])
def test_any_number_of_steps_can_be_stepped_and_is_what_the_request_says(
    denoiser: Denoiser, scheduler: Any, steps: int
) -> None:
    skip_unless_taken(denoiser, scheduler)
    small = shown(denoiser, prompt="x", seed=1, height=32, width=32)
    params = SamplingParams(**small, scheduler=scheduler, num_inference_steps=steps)
    if steps == 1 and denoiser._pipeline.scheduler.config.get("shift_terminal"):
        with pytest.raises(InvalidRequest, match=r"steps 1 is too few .* at 0.02 of all noise") as error:
            denoiser.prepare(params)
        assert error.value.param == "num_inference_steps"
        return
    state = denoiser.prepare(params)
    settled = denoiser.terms.settle(params, denoiser.sizes.default, denoiser.sizes.unit)
    assert settled.num_steps(denoiser.own_steps) == state.num_steps
    denoiser.step(state)
    assert state.latents.isfinite().all() and state.estimate is not None
    assert state.scheduler.step_index == 1, "though the first timesteps are one when they are rounded"


def test_what_would_be_black_is_refused_by_name(model: str) -> None:
    pipeline = MODELS[model]()
    denoiser = Denoiser(pipeline)
    state = begin(denoiser, [1], **SMALL)
    denoiser.step(state)
    pipeline.vae.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.raises(NotFinite, match="the decoded pixels"):
        denoiser.decode(state)
    state.latents[0, 0, 1, 1] = float("nan")
    with pytest.raises(NotFinite, match="the latents after step 1"):
        denoiser.decode(state)
