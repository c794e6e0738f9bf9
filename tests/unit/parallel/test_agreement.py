"""Ranks that are called with different things are told so, all of them, before a picture is made of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import SlicedAttnProcessor
from peft import LoraConfig

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, run_in_lockstep
from distriray.denoise import Denoiser
from distriray.errors import DistrirayError, GangMismatch, InvalidRequest, UnsupportedModel
from distriray.parallel import engine_of
from distriray.parallel.agreement import Compared, _compare
from distriray.parallel.sums import Sums
from distriray.requests import SamplingParams
from tests.cases import Case, call
from tests.models import SHALLOW, tiny_sdxl, tiny_sdxl_unet
from tests.parameters import sweep

SYNC = ParallelConfig(exchange="sync", cfg_parallel=False)
DISPLACED = ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=False)
Give = Callable[[UNet2DConditionModel, dict[str, Any]], Any]
"""What the other rank changes about the network or its inputs."""


def adapted() -> UNet2DConditionModel:
    unet = tiny_sdxl_unet(time_cond_proj_dim=8, class_embed_type="timestep")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"]), "style")
    for index, (name, parameter) in enumerate(unet.named_parameters()):
        if "lora" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    return unet


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn((2, 4, 16, 8), generator=generator),
        "timestep": 500,
        "encoder_hidden_states": torch.randn((2, 9, 32), generator=generator),
        "added_cond_kwargs": {"text_embeds": torch.ones((2, 16)), "time_ids": torch.full((2, 6), 128.0)},
        "timestep_cond": torch.ones((2, 8)),
        "class_labels": torch.ones(2),
        "encoder_attention_mask": torch.ones((2, 9)),
        "cross_attention_kwargs": {"scale": 0.5},
        "down_block_additional_residuals": [torch.ones((2, 16, 16, 8)), *residuals()],
        "mid_block_additional_residual": torch.ones((2, 32, 4, 2)),
    }


def residuals() -> list[torch.Tensor]:
    shapes = [(16, 16, 8), (16, 8, 4), (32, 8, 4), (32, 4, 2), (32, 4, 2)]
    return [torch.ones((2, *shape)) for shape in shapes]


def merged(unet: UNet2DConditionModel, given: dict[str, Any]) -> None:
    unet.fuse_lora()
    unet.unfuse_lora()
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.base_layer
    layer.weight.data += 1e-3  # as a merge does, which leaves no trace


def added(name: str, value: torch.Tensor) -> Give:
    return lambda unet, given: given["added_cond_kwargs"].update({name: value})


def changed(name: str, change: Callable[[Any], Any]) -> Give:
    return lambda unet, given: given.update({name: change(given[name])})


GIVEN: dict[str, tuple[Give, str]] = {
    "pooled": (
        added("text_embeds", torch.full((2, 16), 1.1)),
        "sum of the pooled prompt embeddings 32 and 35.2",
    ),
    "size": (added("time_ids", torch.full((2, 6), 127.0)), "sum of the size conditions 1536 and 1524"),
    "guidance": (changed("timestep_cond", lambda x: 2 * x), "guidance scale embedding"),
    "class": (changed("class_labels", lambda x: x + 1), "class labels"),
    "mask": (changed("encoder_attention_mask", lambda x: x.tril()), "text mask"),
    "text": (
        changed("encoder_hidden_states", lambda x: x.roll(1, 1)),
        "weighted sum of the prompt embeddings",
    ),
    "order": (changed("sample", lambda x: x.flip(2)), "weighted sum of the latents"),
    "latents": (changed("sample", lambda x: x + 1), "sum of the latents"),
    "timestep": (changed("timestep", lambda t: t - 1), "timestep 500 and 499"),
    "scale": (changed("cross_attention_kwargs", lambda x: {"scale": 0.6}), "scale of adapters 0.5 and 0.6"),
    "control": (
        changed("mid_block_additional_residual", lambda x: 2 * x),
        "ControlNet residuals of the middle",
    ),
    "down": (
        changed("down_block_additional_residuals", lambda x: [x[0], 2 * x[1], *x[2:]]),
        "sum of the ControlNet residuals",
    ),
    "no control": (
        lambda unet, given: given.update(
            mid_block_additional_residual=None, down_block_additional_residuals=None
        ),
        "number of ControlNet residuals 6 and 0",
    ),
    "adapter": (
        lambda unet, given: unet.mid_block.resnets[0].conv1.lora_A["style"].weight.data.mul_(1.01),
        "sum of the weights",
    ),
    "adapter's scale": (
        lambda unet, given: unet.set_adapters(["style"], [0.9]),
        "adapters, their scales, or which are active",
    ),
    "no adapter": (lambda unet, given: unet.disable_adapters(), "adapters, their scales, or which"),
    "merged": (merged, "sum of the weights"),
    "other weights": (lambda unet, given: unet.conv_in.weight.data.mul_(2), "sum of the weights"),
    "other bias": (lambda unet, given: unet.conv_in.bias.data.add_(0.1), "sum of the weights"),
    "other norm": (
        lambda unet, given: unet.mid_block.resnets[0].norm1.weight.data.mul_(1.1),
        "sum of the weights",
    ),
    "processor": (
        lambda unet, given: (
            unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(SlicedAttnProcessor(1))
        ),
        "attention processors, or their scales",
    ),
}


def outcomes(ranks: int, function: Callable[[Communicator], Any]) -> list[str]:
    """What every rank raised."""

    def rank(communicator: Communicator) -> str:
        try:
            function(communicator)
        except DistrirayError as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    return run_in_lockstep(ranks, rank)


@pytest.mark.parametrize(("give", "name"), GIVEN.values(), ids=GIVEN)
def test_whatever_decides_the_picture_is_compared(give: Give, name: str) -> None:
    def rank(communicator: Communicator) -> None:
        unet, given = parallelize(adapted(), communicator, SYNC), inputs()
        if communicator.rank == 1:
            give(unet, given)
        unet(**given)

    for outcome in outcomes(2, rank):
        assert outcome.startswith("GangMismatch: rank 0 and rank 1 were called") and name in outcome


def test_ranks_that_were_called_alike_agree() -> None:
    run_in_lockstep(2, lambda communicator: parallelize(adapted(), communicator, SYNC)(**inputs()))


def test_all_ranks_are_told_whichever_differs() -> None:
    def rank(communicator: Communicator) -> None:
        unet, given = parallelize(adapted(), communicator, ParallelConfig(exchange="sync")), inputs()
        given["sample"] = given["sample"] + (communicator.rank == 3)
        unet(**given)

    assert all("rank 0 and rank 3 were" in outcome for outcome in outcomes(4, rank))


def test_no_two_noises_of_many_have_the_same_sums() -> None:
    """The plain sums of one in nine such pairs are nearly alike."""
    sums = Sums(65536, torch.device("cpu"))
    noises = [torch.randn(65536, generator=torch.Generator().manual_seed(seed)) for seed in range(40)]
    table = torch.stack([sums(noise) for noise in noises])
    tolerance = 3e-3 * table[:, 0].max()
    apart = (table[:, None, 1:] - table[None, :, 1:]).abs().amax(-1)
    assert (apart > tolerance).sum() == 40 * 39


def test_a_rank_that_refuses_alone_tells_the_others() -> None:
    def rank(communicator: Communicator) -> None:
        unet = parallelize(adapted(), communicator, SYNC)
        if communicator.rank == 1:
            unet.mid_block.register_forward_hook(lambda *_: None)
        unet(**inputs())

    refused, refuses = outcomes(2, rank)
    assert "GangMismatch" in refused and "refused calls 0 and 1" in refused
    assert refuses.startswith(UnsupportedModel.__name__)


def test_a_rank_whose_picture_is_too_small_alone_tells_the_others() -> None:
    def rank(communicator: Communicator) -> None:
        height = 64 if communicator.rank == 1 else 128
        call(parallelize(tiny_sdxl(), communicator, SYNC), Case(height=height, width=64, steps=2))

    told, small, _ = outcomes(3, rank)
    assert told.startswith(GangMismatch.__name__) and small.startswith(InvalidRequest.__name__)


# From step to step


@pytest.mark.parametrize(
    "config", sweep([DISPLACED, SYNC, ParallelConfig(exchange="none"), ParallelConfig()])
)
@pytest.mark.parametrize(
    ("differs", "name"),
    [
        ({"steps": 5}, "number of steps 4 and 5"),
        ({"guidance": 5.5}, "sum of the latents"),
        ({"scheduler": "euler-ancestral"}, "sum of the latents"),
        ({"extra": {"guidance_rescale": 0.7}}, "sum of the latents"),
    ],
    ids=str,
)
def test_pipelines_that_are_called_with_something_else(
    config: ParallelConfig, differs: dict[str, Any], name: str
) -> None:
    def rank(communicator: Communicator) -> None:
        case = {"steps": 4, "height": 128, "width": 64, **(differs if communicator.rank == 1 else {})}
        call(parallelize(tiny_sdxl(**SHALLOW), communicator, config), Case(**case))

    for outcome in outcomes(2, rank):
        assert outcome.startswith("GangMismatch") and name in outcome


@pytest.mark.parametrize(
    ("differs", "told"),
    [
        ({"exchange": "sync"}, """exchange "displaced" and "sync";"""),
        ({"warmup_steps": 3}, "warmup_steps 1 and 3;"),
        (
            {"prediction": {"statistics": 0.9}},
            """prediction {"statistics": "auto", "halos": "auto", "keys_values": "auto"} and """
            """{"statistics": 0.9, "halos": "auto", "keys_values": "auto"};""",
        ),
        ({"cfg_parallel": "auto"}, """cfg_parallel false and "auto";"""),
        ({"parallel_vae": False}, "parallel_vae true and false;"),
    ],
    ids=str,
)
def test_ranks_that_share_steps_otherwise_are_told_in_which_field(differs: dict[str, Any], told: str) -> None:
    def rank(communicator: Communicator) -> None:
        own = differs if communicator.rank == 1 else {}
        config = ParallelConfig.model_validate({**DISPLACED.model_dump(), **own})
        call(parallelize(tiny_sdxl(**SHALLOW), communicator, config), Case(steps=2, height=128, width=64))

    for outcome in outcomes(2, rank):
        assert outcome.startswith("GangMismatch") and f"parallel configurations' {told}" in outcome


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (("x" * 500 + "ab", "x" * 500 + "cd"), f"…{'x' * 20}ab and …{'x' * 20}cd;"),
        (("y" * 5000, "z" * 5000), f"{'y' * 80}… and {'z' * 80}…;"),
        (("é" * 5000, "é" * 5000 + "!"), "inputs: texts;"),
        (("", "a"), "texts nothing and a;"),
    ],
    ids=["late", "long", "beyond what is sent", "none"],
)
def test_texts_are_told_from_where_they_part_and_at_a_bounded_length(
    texts: tuple[str, str], told: str
) -> None:
    def rank(communicator: Communicator) -> None:
        _compare(communicator, Compared({}, texts={"texts": texts[communicator.rank]}))

    for outcome in outcomes(2, rank):
        assert outcome.startswith("GangMismatch") and told in outcome


def test_ranks_may_keep_and_capture_otherwise() -> None:
    def rank(communicator: Communicator) -> None:
        own = {"max_buffer_bytes": 0, "cuda_graphs": False} if communicator.rank == 1 else {}
        parallelize(adapted(), communicator, SYNC.model_copy(update=own))(**inputs())

    run_in_lockstep(2, rank)


def test_own_loops_that_step_otherwise() -> None:
    def rank(communicator: Communicator) -> None:
        unet, given, scheduler = parallelize(adapted(), communicator, SYNC), inputs(), DDIMScheduler()
        scheduler.set_timesteps(10 if communicator.rank == 0 else 20)
        first = torch.tensor(950)
        for timestep in (first, *scheduler.timesteps[1:]):
            unet(**{**given, "timestep": timestep})

    for outcome in outcomes(2, rank):
        assert outcome.startswith("GangMismatch") and "timestep" in outcome


def test_where_steps_lag_it_is_told_before_the_picture_is_trusted() -> None:
    def rank(communicator: Communicator) -> tuple[int, int] | None:
        pipeline = parallelize(tiny_sdxl(), communicator, DISPLACED)
        denoiser, engine = Denoiser(pipeline), engine_of(pipeline)
        assert engine is not None
        engine.lags = True
        state = denoiser.prepare(
            SamplingParams(prompt="a", seed=0, height=128, width=64, num_inference_steps=6)
        )
        done = 0
        try:
            while not state.done:
                if state.step == 3 and communicator.rank == 1:
                    state.values["latents"] = state.latents + 0.1
                denoiser.step(state)
                done += 1
        except GangMismatch:
            return done, state.step
        return None

    assert run_in_lockstep(2, rank) == [(4, 3)] * 2
