"""Captured steps draw what the same steps draw without: by a stand-in that records operations on a CPU."""

from __future__ import annotations

import gc
import warnings
from typing import Any
from weakref import WeakSet

import pytest
import torch

from distriray import ParallelConfig, parallelize
from distriray.collective import LockstepCommunicator, connect, run_in_lockstep
from distriray.config import PAPER, Mix
from distriray.errors import GangBroken
from distriray.parallel import engine_of
from distriray.parallel.baked import arithmetic
from distriray.parallel.engine import Engine
from distriray.parallel.graphs import MOST_MET, CaptureFailed, StepGraphs
from tests.cases import Case, call
from tests.models import SHALLOW, tiny_sdxl, tiny_sdxl_unet
from tests.parameters import sweep
from tests.unit.parallel.recorded import RecordedGraph, RecordedGraphs
from tests.unit.parallel.test_baked import noise

COMPRESSED = Mix(halos_width="int8", keys_values_width="int4")
CASES: list[tuple[int, dict[str, Any]]] = [
    (
        2,
        {
            "exchange": "displaced",
            "warmup_steps": 2,
            "cfg_parallel": False,
            "prediction": {"halos": 0.5, "keys_values": 0.5},
        },
    ),
    (1, {}),
    (4, {"exchange": "displaced", "warmup_steps": 2}),
    (2, {"exchange": PAPER, "warmup_steps": 1, "cfg_parallel": False}),
    (2, {"exchange": "displaced_attention", "warmup_steps": 1, "cfg_parallel": False}),
    (2, {"exchange": COMPRESSED, "warmup_steps": 1, "cfg_parallel": False}),
    (2, {"exchange": "displaced", "warmup_steps": "auto", "auto_warmup_drift": 5.0, "cfg_parallel": False}),
    (2, {"exchange": "sync", "cfg_parallel": False}),
    (2, {"exchange": "sync", "attention": "ulysses", "cfg_parallel": False}),
    (2, {"exchange": "none"}),
]
IMAGES = [  # the second is of another size, the third as the first, the fourth is a batch
    {"height": 128},
    {"height": 144},
    {"height": 128},
    {"height": 128, "images": 2},
    {"height": 128},
]
STEPS = 4


def drawn(
    ranks: int, config: dict[str, Any], images: list[dict[str, int]], graphs: bool, buckets: int = 4
) -> tuple[list[list[torch.Tensor]], list[int]]:
    """The latents of images by each rank, and how often its graphs were replayed."""
    replays = []

    def rank(communicator: LockstepCommunicator) -> list[torch.Tensor]:
        pipeline = parallelize(tiny_sdxl(**SHALLOW), communicator, ParallelConfig(**config))
        maker, engine = RecordedGraphs(), engine_of(pipeline)
        assert engine is not None
        engine.exchanges.bucket_count = buckets
        if graphs:
            engine.capture_with(maker)
        found = [call(pipeline, Case(steps=STEPS, config=config, **image)) for image in images]
        replays.append(sum(graph.replays for graph in maker.made))
        return found

    return run_in_lockstep(ranks, rank), replays


@pytest.mark.parametrize(("ranks", "config"), sweep(CASES), ids=str)
def test_captured_steps_draw_the_same_bit_for_bit(ranks: int, config: dict[str, Any]) -> None:
    images = IMAGES if ranks == 1 or "prediction" in config else IMAGES[:3]
    others = [image for index, image in enumerate(images) if image not in images[:index]]
    wanted, _ = drawn(ranks, config, others, graphs=False)  # none depends on what was drawn before
    found, replays = drawn(ranks, config, images, graphs=True)
    for ours, theirs in zip(found, wanted, strict=True):
        for index, (here, image) in enumerate(zip(ours, images, strict=True)):
            assert torch.equal(here, theirs[others.index(image)]), index
    assert min(replays) > 5


def test_captured_steps_send_all_buckets_where_each_slot_has_its_own() -> None:
    """The last two leave together, as the step ends: of a norm's statistics and of the rows around it."""
    config = {"exchange": "displaced", "warmup_steps": 1, "cfg_parallel": False}
    (found, replays), (wanted, _) = (
        drawn(2, config, IMAGES[:1] * 2, graphs, buckets=1000) for graphs in (True, False)
    )
    assert all(map(torch.equal, sum(found, []), sum(wanted, []))) and min(replays) > 5


def test_graphs_outlast_an_image_and_nothing_is_captured_again() -> None:
    def rank(communicator: LockstepCommunicator) -> list[int]:
        pipeline = parallelize(
            tiny_sdxl(**SHALLOW),
            communicator,
            ParallelConfig(exchange="displaced", warmup_steps=2, cfg_parallel=False),
        )
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


class FailingGraphs(RecordedGraphs):
    """Makes graphs of which the third cannot be captured, on one rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def new(self) -> tuple[RecordedGraph, dict[str, Any]]:
        if self._rank == 1 and len(self.made) == 2:
            raise torch.OutOfMemoryError("no third graph")
        return super().new()


@pytest.mark.parametrize(
    "config",
    sweep(
        [
            {"exchange": "displaced", "warmup_steps": 2},
            {"exchange": "sync"},
            {"exchange": "displaced", "warmup_steps": "auto", "auto_warmup_drift": 5.0},
            {"exchange": COMPRESSED, "warmup_steps": 1},
        ]
    ),
    ids=str,
)
def test_a_step_that_cannot_be_captured_is_launched(
    config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(steps=6)

    def rank(communicator: LockstepCommunicator) -> list[torch.Tensor]:
        pipeline = parallelize(
            tiny_sdxl(**SHALLOW), communicator, ParallelConfig(**config, cfg_parallel=False)
        )
        engine = engine_of(pipeline)
        assert engine is not None
        wanted = call(pipeline, case)
        engine.capture_with(FailingGraphs(communicator.rank))
        engine.start_image()
        found = [call(pipeline, case) for _ in range(2)]
        assert (engine.graphs.obstacle is None) == (communicator.rank == 0)
        return [wanted, *found]

    for wanted, *found in run_in_lockstep(2, rank):
        assert all(torch.equal(latents, wanted) for latents in found)
    (warning,) = caplog.messages  # of rank 1, once
    assert "not as CUDA graphs: a step cannot be captured: no third graph" in warning


class SmallPool(RecordedGraphs):
    """Has memory for one graph.

    Attributes:
        living: graphs that somebody has.
        taken: graphs that have taken memory, which only the end of the pool gives back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.living: WeakSet[RecordedGraph] = WeakSet()
        self.taken = 0

    def new(self) -> tuple[RecordedGraph, dict[str, Any]]:
        pool = self

        class Graph(RecordedGraph):
            def capture_end(self) -> None:
                super().capture_end()
                if pool.taken > 1:
                    raise torch.OutOfMemoryError("no memory for a second graph")

        self.taken += 1
        self.living.add(graph := Graph(self.tape))
        return graph, {}

    def let_go(self) -> None:
        self.taken = 0


def test_a_step_that_is_launched_has_the_memory_that_its_capture_took() -> None:
    unet = parallelize(tiny_sdxl_unet(), connect("local"), ParallelConfig())
    engine, pool, kept = engine_of(unet), SmallPool(), []
    assert engine is not None
    wanted = {images: noise(unet, 0, images=images) for images in (1, 2)}
    engine.capture_with(pool)
    gc.disable()  # what is not free at once is none of the step's
    try:
        for images in (1, 1, 2, 2, 2, 1, 1, 2):
            assert torch.equal(noise(unet, 0, images=images), wanted[images])
            kept.append((pool.taken, len(pool.living)))
    finally:
        gc.enable()
    none, captured = (0, 0), (1, 1)  # what was not captured once is not tried again
    assert kept == [none, captured, captured, none, none, none, captured, captured]


class NoGraphs(RecordedGraphs):
    """Has no memory for any."""

    def new(self) -> tuple[RecordedGraph, dict[str, Any]]:
        raise torch.OutOfMemoryError("no memory for a graph")


def test_a_step_after_something_has_left_the_call_stays_synchronous_where_its_capture_fails() -> None:
    """Buffers are others then; those of the image before must not be read."""

    def drawn_with(engine: Engine, unet: Any, seed: int) -> list[torch.Tensor]:
        steps = []
        with engine.image():
            for step in range(4):
                besides = {"image_prompts": ("prompt",)} if step < 3 else {}
                steps.append(noise(unet, step, seed=seed, **besides))
        return steps

    def rank(communicator: LockstepCommunicator) -> list[bool]:
        config = ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=False)
        unet = parallelize(tiny_sdxl_unet(), communicator, config)
        engine = engine_of(unet)
        assert engine is not None
        wanted = [drawn_with(engine, unet, seed) for seed in range(3)]
        engine.capture_with(NoGraphs() if communicator.rank == 1 else RecordedGraphs())
        found = [drawn_with(engine, unet, seed) for seed in range(3)]
        return [
            torch.equal(*pair)
            for images in zip(wanted, found, strict=True)
            for pair in zip(*images, strict=True)
        ]

    assert all(map(all, run_in_lockstep(2, rank)))


def test_what_cannot_be_captured_is_named() -> None:
    graphs = StepGraphs(RecordedGraphs())

    def reads(x: torch.Tensor) -> torch.Tensor:
        return x * float(x.sum())

    x = torch.ones(3)
    graphs.run("reads", reads, None, (x,), {})
    with pytest.raises(CaptureFailed, match="cannot be captured: .*reads a value"):
        graphs.run("reads", reads, None, (x,), {})


def test_an_output_that_cannot_be_copied_is_in_no_graph() -> None:
    class Box:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    graphs, x = StepGraphs(RecordedGraphs()), torch.ones(3)
    graphs.run("boxed", Box, None, (x,), {})
    with pytest.raises(CaptureFailed, match="its output has a Box"):
        graphs.run("boxed", Box, None, (x,), {})
    assert "boxed" in graphs.failed


def test_why_a_capture_failed_is_what_failed_first() -> None:
    class Failing(RecordedGraph):
        def capture_end(self) -> None:
            super().capture_end()
            raise RuntimeError("the capture has failed")

    maker = RecordedGraphs()
    maker.new = lambda: (Failing(maker.tape), {})  # type: ignore[method-assign]
    graphs, x = StepGraphs(maker), torch.ones(3)
    graphs.run("reads", lambda x: x, None, (x,), {})
    with pytest.raises(CaptureFailed, match="reads a value"):
        graphs.run("reads", lambda x: x * float(x.sum()), None, (x,), {})


def test_nothing_to_compute_behind_the_last_message_is_no_mistake() -> None:
    class Suspicious(RecordedGraph):
        def capture_end(self) -> None:
            super().capture_end()
            if not self.operations:
                warnings.warn("The CUDA Graph is empty. This usually means that it was", stacklevel=2)

    def doubles(x: torch.Tensor) -> torch.Tensor:
        doubled = 2 * x
        if graphs.recorder is not None:
            graphs.recorder.between(lambda step: None)
        return doubled

    maker = RecordedGraphs()
    maker.new = lambda: (Suspicious(maker.tape), {})  # type: ignore[method-assign]
    graphs = StepGraphs(maker)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for factor in range(3):
            doubled = graphs.run("doubles", doubles, None, (factor * torch.ones(2),), {})
            assert doubled.tolist() == [2.0 * factor] * 2
    assert len(graphs) == 1


def test_a_gang_that_breaks_in_a_replay_leaves_nothing_behind() -> None:
    case = Case(steps=3)

    def rank(communicator: LockstepCommunicator) -> torch.Tensor:
        config = ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=False)
        pipeline = parallelize(tiny_sdxl(**SHALLOW), communicator, config)
        maker, engine, exchange = RecordedGraphs(), engine_of(pipeline), communicator.exchange
        assert engine is not None
        engine.capture_with(maker)
        for _ in range(2):
            call(pipeline, case)
        replays = sum(graph.replays for graph in maker.made)
        sent = []

        def breaks(sends: Any, receives: Any) -> Any:
            sent.append(sum(graph.replays for graph in maker.made) - replays)
            if communicator.rank == 1 and sent[-1] > 8:
                communicator.abort()
            return exchange(sends, receives)

        communicator.exchange = breaks  # type: ignore[method-assign]
        with pytest.raises(GangBroken):
            call(pipeline, case)
        assert max(sent) > 0
        alone = parallelize(pipeline, connect("local"), ParallelConfig())
        engine.capture_with(RecordedGraphs())
        return torch.stack([call(alone, case) for _ in range(3)])

    wanted = call(parallelize(tiny_sdxl(**SHALLOW), connect("local"), ParallelConfig()), case)
    for found in run_in_lockstep(2, rank):
        assert torch.equal(found, torch.stack([wanted] * 3))


def test_a_value_that_is_no_tensor_is_a_part_of_the_graph() -> None:
    graphs = StepGraphs(RecordedGraphs())
    for scale in (1.0, 2.0, 1.0, 2.0, 1.0, 2.0):
        for value in (3.0, 4.0):
            x = torch.full((2,), value)
            out = graphs.run("scaled", lambda x, scale: x * scale, None, (x,), {"scale": scale})
            assert out.tolist() == [value * scale] * 2
    assert len(graphs) == 2


def test_steps_whose_numbers_never_repeat_are_forgotten() -> None:
    graphs = StepGraphs(RecordedGraphs())
    for scale in range(3 * MOST_MET):
        graphs.run("scaled", lambda x, scale: x * scale, None, (torch.ones(2),), {"scale": scale})
    assert len(graphs._graphs) == MOST_MET


def test_an_input_that_cannot_be_told_apart_is_in_no_graph() -> None:
    class Box:
        value = 1.0

        def __repr__(self) -> str:
            return "a box"

    graphs, box = StepGraphs(RecordedGraphs()), Box()
    for value in (1.0, 2.0, 3.0):
        box.value = value
        out = graphs.run("scaled", lambda x, box: x * box.value, None, (torch.ones(2),), {"box": box})
        assert out.tolist() == [value] * 2


@pytest.mark.parametrize(
    "switch",
    [
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_accumulation",
    ],
)
def test_sums_of_less_precision_are_in_other_graphs(switch: str) -> None:
    before = arithmetic()
    allowed = getattr(torch.backends.cuda.matmul, switch)
    setattr(torch.backends.cuda.matmul, switch, not allowed)
    try:
        assert arithmetic() != before
    finally:
        setattr(torch.backends.cuda.matmul, switch, allowed)
    assert arithmetic() == before
