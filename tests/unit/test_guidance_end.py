"""Guidance that ends before the picture does: the pipelines' numbers, in gangs too, and what it saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from PIL import Image

from distriray import ParallelConfig
from distriray.denoise import Denoiser
from distriray.denoise.pipelines.terms import Terms
from distriray.errors import InvalidRequest
from distriray.gang.admission import admit
from distriray.gang.config import HostConfig
from distriray.requests import GenerationRequest
from distriray.routing.latency import LatencyModel
from distriray.routing.profile import Entry, Profile
from tests.guiding import guiders_with
from tests.likeness import LIKENESS, apart, differs
from tests.models import (
    tiny_chroma,
    tiny_ernie_image,
    tiny_flux2_klein,
    tiny_hunyuan_image,
    tiny_qwen_image,
    tiny_qwen_image21,
    tiny_sd3,
    tiny_sd15,
    tiny_sdxl,
    tiny_z_image,
)
from tests.unit.deployments.test_pool_state import FACTS
from tests.unit.flow_matching.gangs import TALL, Gangs
from tests.unit.flow_matching.ordinary import plain
from tests.unit.test_denoise import begin, finish, finish_through_bytes

MODELS: dict[str, Callable[[], Any]] = {
    "sdxl": tiny_sdxl,
    "sd15": tiny_sd15,
    "sd3": tiny_sd3,
    "chroma": tiny_chroma,
    "ernie-image": tiny_ernie_image,
    "hunyuan-image": tiny_hunyuan_image,
    "qwen-image": tiny_qwen_image,
    "qwen-image-2.1": tiny_qwen_image21,
    "flux2-klein": tiny_flux2_klein,
    "z-image": tiny_z_image,
}
STEPS, GUIDED, END = 8, 3, 0.45  # of eight steps 3.6: three
CALL: dict[str, Any] = {
    **TALL,
    "height": 224,
    "width": 96,
    "num_inference_steps": STEPS,
    "guidance_scale": 4.0,
}
BOTH_BRANCHES = ("prompt_embeds", "add_text_embeds", "add_time_ids", "pooled_prompt_embeds")


def leave(pipeline: Any, step: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
    """What diffusers' users do after a step to end guidance with it, where a call has both branches."""
    if step + 1 == GUIDED:
        pipeline._guidance_scale = 0.0
        values |= {name: value.chunk(2)[1] for name, value in values.items() if name in BOTH_BRANCHES}
    return values


class WithoutSecondCalls:
    """Answers a network's calls for the second branch, from some step on, as it did those for the first.

    Where each branch has a call, guidance adds nothing then.
    """

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, _: Any, __: Any, output: Any) -> Any:
        second, step = self.calls % 2, self.calls // 2
        self.calls += 1
        if second and step >= GUIDED:
            return self.first
        self.first = output
        return output


class WithoutFirstHalves:
    """Gives the unguided half of a network's outputs, from some step on, as it did the other.

    Where both branches are one batch of which nothing can be taken out, guidance adds nothing then.
    """

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, _: Any, __: Any, output: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        self.calls += 1
        return output if self.calls <= GUIDED else (output[0].chunk(2)[1].repeat(2, 1, 1, 1),)


def ended(pipeline: Any, **call: Any) -> Any:
    """diffusers' own picture, with guidance in the first steps alone."""
    name = type(pipeline).__name__
    if name == "ZImagePipeline":  # which has it by noise level
        levels: list[float] = []
        plain(pipeline, [1], callback_on_step_end=lambda _p, _s, t, v: levels.append(float(t)) or v, **call)
        end = 1 - (levels[GUIDED - 1] + levels[GUIDED]) / 2000
        return plain(pipeline, [1], cfg_truncation=end, **call)
    if name == "HunyuanImagePipeline":  # whose guider has a memory, too
        with guiders_with(pipeline, stop=END):
            return plain(pipeline, [1], **call)
    by_calls = ("ChromaPipeline", "QwenImagePipeline", "QwenImage21Pipeline", "Flux2KleinPipeline")
    if name in (*by_calls, "ErnieImagePipeline"):
        leaving = WithoutSecondCalls() if name in by_calls else WithoutFirstHalves()
        hook = pipeline.transformer.register_forward_hook(leaving)
        try:
            return plain(pipeline, [1], **call)
        finally:
            hook.remove()
    inputs = [each for each in pipeline._callback_tensor_inputs if each in BOTH_BRANCHES]
    return plain(pipeline, [1], callback_on_step_end=leave, callback_on_step_end_tensor_inputs=inputs, **call)


@pytest.fixture(scope="module", params=MODELS)
def make(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def pipeline(make: Callable[[], Any]) -> Any:
    return make()


@pytest.fixture(scope="module")
def expected(pipeline: Any) -> tuple[torch.Tensor, Image.Image]:
    """Latents and picture."""
    return ended(pipeline, **CALL), ended(pipeline, output_type="pil", **CALL)[0]


def test_guidance_that_ends_is_the_pipelines_also_through_bytes(
    pipeline: Any, expected: tuple[torch.Tensor, Image.Image]
) -> None:
    denoiser = Denoiser(pipeline)
    state = begin(denoiser, [1], prompt="a lake", guidance_end=END, **CALL)
    carried = finish_through_bytes(denoiser, state)
    latents = finish(denoiser, state)
    assert differs(latents, expected[0]) <= LIKENESS
    assert differs(plain(pipeline, [1], **CALL), latents) > 1e-3, "and is another picture"
    assert torch.equal(carried, latents)


def test_the_branch_that_guidance_goes_by_is_not_computed_after_it(pipeline: Any) -> None:
    evaluated: list[int] = []
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    count = lambda _, args, kwargs: evaluated.append(len(next(iter((*args, *kwargs.values())))))  # noqa: E731
    hook = network.register_forward_pre_hook(count, with_kwargs=True)
    try:
        finish(Denoiser(pipeline), begin(Denoiser(pipeline), [1], prompt="x", guidance_end=END, **CALL))
    finally:
        hook.remove()
    assert sum(evaluated) == 2 * GUIDED + (STEPS - GUIDED)


@pytest.mark.parametrize("cfg_parallel", [False, "auto"])
@pytest.mark.parametrize("sizes", [(2,), (2, 4, 1, 2)])
def test_gangs_draw_it_as_the_pipeline_does_and_change_across_its_end(
    make: Callable[[], Any],
    expected: tuple[torch.Tensor, Image.Image],
    cfg_parallel: Any,
    sizes: tuple[int, ...],
) -> None:
    """Also where halves of a gang had a branch each: all of its ranks are one half then."""
    gangs = Gangs(make, exchange="sync", cfg_parallel=cfg_parallel)
    for drawn in gangs.draw(sizes, guidance_end=END, **CALL):
        assert differs(drawn.latents, expected[0]) <= 10 * LIKENESS
        assert apart(drawn.picture, expected[1]) <= 1


def test_the_step_after_guidance_is_synchronous_where_both_branches_are_one_call() -> None:
    """Nothing of it was computed before by whoever has its rows now."""
    gangs = Gangs(tiny_sdxl, exchange="displaced", warmup_steps=1, cfg_parallel=False)
    gangs.draw((2,), guidance_end=END, **CALL)
    assert gangs.synchronous == [step in (0, GUIDED) for step in range(STEPS)]


def test_ranks_that_had_a_branch_each_exchange_rows_after_it() -> None:
    """A gang of two that shares nothing but branches must share more from there on, displaced as well."""
    sync, displaced, alone = (
        Gangs(tiny_sdxl, exchange=exchange, warmup_steps=1).draw((2,), guidance_end=END, **CALL)[0].latents
        for exchange in ("sync", "displaced", "none")
    )
    assert 0 < differs(displaced, sync) < differs(alone, sync) / 10


def test_guidance_that_ends_is_not_for_a_network_that_takes_its_scale() -> None:
    denoiser = Denoiser(tiny_sdxl(time_cond_proj_dim=8))
    with pytest.raises(InvalidRequest, match="^guidance_end: .* as an input.*; leave it out$"):
        begin(denoiser, [1], prompt="x", guidance_end=0.5, **CALL)


def test_an_end_of_no_guidance_is_said_to_be_none() -> None:
    call = {**CALL, "guidance_scale": 1.0}
    state = begin(Denoiser(tiny_sd15()), [1], prompt="x", guidance_end=0.5, **call)
    assert state.warnings == ("guidance_end is not used with a guidance_scale of 1",)


def test_an_end_before_the_first_step_is_said_to_leave_no_guidance() -> None:
    state = begin(Denoiser(tiny_sd15()), [1], prompt="x", guidance_end=0.1, **CALL)
    assert state.warnings == (f"guidance_end 0.1 leaves none of {state.num_steps} steps with guidance",)


# What a host makes of it


def admitted(config: HostConfig | None = None, terms: Terms | None = None, **fields: Any) -> Any:
    config, terms = config or HostConfig(workers=2), terms or Terms()
    return admit(GenerationRequest(prompt="x", **fields), config, replace(FACTS, guides=True, terms=terms))


def test_a_prediction_knows_which_steps_take_half_the_work() -> None:
    model = LatencyModel(
        Profile(
            model="m",
            device="d",
            version="1",
            entries=(Entry(gang=1, height=512, width=512, step_s=0.2),),
        )
    )

    def left_s(done: int, **fields: Any) -> float:
        view = admitted(height=512, width=512, num_inference_steps=10, guidance_scale=5.0, **fields)
        view = replace(view.view(0.0, None), steps_done=done)
        return float(view.left_s(model.times(1, *view.shape)))

    assert left_s(0) == pytest.approx(10 * 0.2)
    assert left_s(0, guidance_end=0.4) == pytest.approx(4 * 0.2 + 6 * 0.1)
    assert left_s(7, guidance_end=0.4) == pytest.approx(3 * 0.1)
    assert left_s(0, guidance_end=0.05) == pytest.approx(10 * 0.1), "no step has any"


def test_halves_that_must_have_a_branch_each_are_refused_with_what_would_do() -> None:
    halves = HostConfig(workers=2, parallel=ParallelConfig(cfg_parallel=True))
    ask = partial(admitted, halves, guidance_scale=5.0)
    with pytest.raises(InvalidRequest, match="guidance_end 0.5 leaves .* use cfg_parallel='auto'") as error:
        ask(guidance_end=0.5)
    assert error.value.param == "guidance_end"
    assert ask().unguided_steps == 0 and ask(guidance_end=0.5, num_images=2).unguided_steps > 0
    with pytest.raises(InvalidRequest, match="1 without guidance has none for a gang of 2") as error:
        ask(guidance_scale=1.0)
    assert error.value.param == "guidance_scale"
    for chosen in ({"num_images": 2}, {"gang_size": 1}):
        assert not ask(guidance_scale=1.0, **chosen).guided
    assert ask(guidance_end=0.5, gang_size=1).unguided_steps > 0, "a gang of one has no halves"


def test_a_request_that_must_have_halves_is_refused_at_once_where_it_may_have_an_odd_gang() -> None:
    halves = ParallelConfig(cfg_parallel=True)
    ask = partial(admitted, HostConfig(workers=6, gang_sizes=(1, 3, 6)), guidance_scale=5.0, parallel=halves)
    for chosen in ({}, {"gang_size": 3}):
        with pytest.raises(InvalidRequest, match=r"\[3\] are odd; use 'auto'") as error:
            ask(**chosen)
        assert error.value.param == "gang_size"
    assert ask(gang_size=6).guided and ask(gang_size=1).guided
