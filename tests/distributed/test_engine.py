"""A gang of processes draws what ranks in lock-step draw, so what is shown of these is true of those.

The claims about pictures are in `tests/unit/parallel`.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, connect, launch, run_in_lockstep
from distriray.config import PAPER
from tests.cases import Case, call, together
from tests.models import tiny_sdxl
from tests.unit.parallel.test_branches import drawn as guided
from tests.unit.parallel.test_branches import in_gang
from tests.unit.parallel.transformers import TRANSFORMERS, Shape, drawn

pytestmark = pytest.mark.distributed

SYNC = ParallelConfig(exchange="sync", cfg_parallel=False)
CASES = [
    Case(
        images=2,
        config={
            "exchange": "displaced",
            "warmup_steps": 2,
            "cfg_parallel": False,
            "prediction": {"halos": 0.5},
        },
    ),
    Case(config={"exchange": PAPER, "warmup_steps": 1, "cfg_parallel": False}),
    Case(config={"exchange": "displaced_attention", "warmup_steps": 1, "cfg_parallel": False}),
    Case(config={"exchange": "compressed", "warmup_steps": 1, "cfg_parallel": False}),
    Case(height=136, config={"exchange": "sync", "cfg_parallel": False}),
    Case(config={"exchange": "none", "cfg_parallel": False}),
]
HALVES = Case(config={"exchange": "displaced", "warmup_steps": 1, "cfg_parallel": True})


def drawings(communicator: Communicator) -> dict[str, torch.Tensor]:
    """Latents of pipelines in every mode, with a LoRA, and of every family of transformers; and a picture."""
    cases = [*CASES, HALVES] if communicator.world_size % 2 == 0 else CASES
    outcomes = together(communicator, cases)
    found = {str(case): outcome.latents for case, outcome in zip(cases, outcomes, strict=True)}
    for name in TRANSFORMERS:
        latents, _ = drawn(communicator, name, Shape(masked=True), exchange="sync", cfg_parallel=False)
        found[name] = latents[-1]
    for exchange in ("sync", "displaced"):  # each branch of guidance by one half, where there are halves
        network, _ = in_gang(communicator, "qwen-image", exchange=exchange, warmup_steps=1)
        found[f"branches, {exchange}"] = guided(network, TRANSFORMERS["qwen-image"], apart=False)[-1]
    pipeline = parallelize(tiny_sdxl(), communicator, SYNC)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "conv1"]))
    for index, (name, parameter) in enumerate(pipeline.unet.named_parameters()):
        if "lora" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) / 4
    found["LoRA"] = call(pipeline, Case())
    found["picture"] = pipeline.vae.decode(found["LoRA"], return_dict=False)[0]
    return found


@pytest.mark.parametrize(("backend", "ranks"), [("shm", 3), ("gloo", 4)])
def test_processes_draw_what_ranks_in_lock_step_draw_bit_for_bit(backend: str, ranks: int) -> None:
    turns = run_in_lockstep(ranks, drawings)
    apart = launch(ranks, drawings, backend=backend)
    for here, there in zip(turns, apart, strict=True):
        assert here.keys() == there.keys()
        for name, latents in here.items():
            assert torch.equal(latents, there[name]), name


def _unseeded(communicator: Communicator) -> torch.Tensor:
    pipeline = tiny_sdxl()
    if communicator.rank == 0:  # a gang of one before, which the other rank knows nothing of
        parallelize(pipeline, connect("local"))
    torch.manual_seed(100 + communicator.rank)
    parallelize(pipeline, communicator, SYNC)
    return pipeline("x", height=96, width=64, num_inference_steps=2, output_type="latent").images


def test_calls_without_a_generator_draw_the_same_latents_everywhere() -> None:
    one, other = launch(2, _unseeded)
    assert torch.equal(one, other)
