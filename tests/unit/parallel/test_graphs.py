"""Captured steps draw what the same steps draw without: by a stand-in that records operations on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distriray import ParallelConfig, parallelize
from distriray.collective import LockstepCommunicator, run_in_lockstep
from distriray.errors import UnsupportedModel
from distriray.parallel import engine_of
from distriray.parallel.graphs import StepGraphs, fingerprint
from tests.distributed.cases import Case, call
from tests.models import tiny_sdxl
from tests.unit.parallel.recorded import RecordedGraphs

CONFIGS = [
    {"warmup_steps": 2},
    {"warmup_steps": 3, "cfg_parallel": False, "prediction": {"halos": 0.5, "keys_values": 0.5}},
    {"warmup_steps": 1, "group_norm": "corrected", "cfg_parallel": False},
    {"warmup_steps": 1, "group_norm": "fresh", "cfg_parallel": False},
    {"warmup_steps": "auto", "cfg_parallel": False},
    {"exchange": "sync", "cfg_parallel": False},
    {"exchange": "none"},
]
IMAGES = [  # the second is of another size, the third as the first, the fourth is a batch
    {"height": 128},
    {"height": 144},
    {"height": 128},
    {"height": 128, "images": 2},
    {"height": 128},
]


def drawn(ranks: int, config: dict[str, Any], graphs: bool) -> tuple[list[list[torch.Tensor]], list[int]]:
    """The latents of all images by each rank, and how often its graphs were replayed."""
    replays = []

    def rank(communicator: LockstepCommunicator) -> list[torch.Tensor]:
        pipeline = parallelize(tiny_sdxl(), communicator, ParallelConfig(**config))
        maker = RecordedGraphs()
        if graphs:
            engine = engine_of(pipeline)
            assert engine is not None
            engine.capture_with(maker)
        found = [call(pipeline, Case(steps=8, config=config, **image)) for image in IMAGES]
        replays.append(sum(graph.replays for graph in maker.made))
        return found

    return run_in_lockstep(ranks, rank), replays


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_captured_steps_draw_the_same_bit_for_bit(config: dict[str, Any], ranks: int) -> None:
    wanted, _ = drawn(ranks, config, graphs=False)
    found, replays = drawn(ranks, config, graphs=True)
    for ours, theirs in zip(found, wanted, strict=True):
        for index, (here, there) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.equal(here, there), index
    assert min(replays) > 10


def test_what_graphs_cannot_see_drops_them() -> None:
    unet = tiny_sdxl().unet
    before = fingerprint(unet)
    assert fingerprint(unet) == before
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.scale = 2.0
    after = fingerprint(unet)
    assert after != before
    unet.to(torch.float64)
    assert fingerprint(unet) != after


def test_graphs_outlast_an_image_and_nothing_is_captured_again() -> None:
    def rank(communicator: LockstepCommunicator) -> list[int]:
        pipeline = parallelize(tiny_sdxl(), communicator, ParallelConfig(warmup_steps=2, cfg_parallel=False))
        maker, engine = RecordedGraphs(), engine_of(pipeline)
        assert engine is not None
        engine.capture_with(maker)
        made = []
        for _ in range(4):
            call(pipeline, Case(steps=6))
            made.append(len(maker.made))
        return made

    # The first step of an image lays buffers out once, and then does what no other step does.
    first, second, third, fourth = run_in_lockstep(2, rank)[0]
    assert 0 < first < second < third == fourth


def test_what_cannot_be_captured_is_refused_by_name() -> None:
    graphs = StepGraphs(RecordedGraphs())

    def reads(x: torch.Tensor) -> torch.Tensor:
        return x * float(x.sum())

    x = torch.ones(3)
    graphs.run("reads", reads, None, (x,), {})
    with pytest.raises(UnsupportedModel, match=r"cannot be a CUDA graph .*reads a value.*cuda_graphs=False"):
        graphs.run("reads", reads, None, (x,), {})


def test_a_value_that_is_no_tensor_is_a_part_of_the_graph() -> None:
    graphs = StepGraphs(RecordedGraphs())
    for scale in (1.0, 2.0, 1.0, 2.0, 1.0, 2.0):
        for value in (3.0, 4.0):
            x = torch.full((2,), value)
            out = graphs.run("scaled", lambda x, scale: x * scale, None, (x,), {"scale": scale})
            assert out.tolist() == [value * scale] * 2
    assert len(graphs) == 2
