"""Captured steps of transformers draw what launched ones draw, and read nothing that may go away."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch.utils import _pytree as pytree

from distriray import ParallelConfig, parallelize
from distriray.collective import LockstepCommunicator, connect, run_in_lockstep
from distriray.collective.absent import AbsentPeers
from distriray.parallel import compile_blocks, engine_of, many_shapes
from distriray.parallel.engine import Engine
from tests.compiling import CountingCompiler
from tests.parameters import sweep
from tests.unit.parallel.recorded import CompiledGraphs, RecordedGraphs
from tests.unit.parallel.stand_in import DEVICE, StandIn
from tests.unit.parallel.transformers import TRANSFORMERS, Shape, draw

WIDE, PADDED = Shape(), Shape(masked=True)
COPIES = {
    ("qwen-image", True),
    ("qwen-image-edit", True),
    ("qwen-image-2.1", False),
    ("qwen-image-2.1", True),
}
"""Families whose forward takes a tensor from the host, or reads one there, without masked text or with it."""
CONFIGS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"exchange": "sync", "cfg_parallel": False}),
    (3, {"exchange": "sync", "attention": "ulysses", "cfg_parallel": False}),
    (2, {"exchange": "displaced", "warmup_steps": 1, "cfg_parallel": False}),
    (2, {"exchange": "compressed", "warmup_steps": 1, "cfg_parallel": False}),
    (4, {"exchange": "sync"}),
    (2, {"exchange": "none"}),
]


@pytest.fixture(autouse=True)
def native_backend() -> Iterator[None]:
    """`set_attention_backend` changes the whole process's."""
    with attention_backend("native"):
        yield


def captured(name: str, communicator: Any, **config: Any) -> tuple[Any, Engine, RecordedGraphs]:
    """A network, in a gang that captures its steps."""
    transformer, maker = TRANSFORMERS[name], RecordedGraphs()
    heads = transformer.twelve_heads if "attention" in config else {}
    network = parallelize(transformer.make(**heads), communicator, ParallelConfig(**config))
    engine = engine_of(network)
    assert engine is not None
    engine.capture_with(maker)
    return network, engine, maker


CASES = [
    (name, masked, *CONFIGS[(index + other) % len(CONFIGS)])
    for index, (name, masked) in enumerate(product(TRANSFORMERS, [False, True]))
    for other in (0, 3)
    if (name, masked) not in COPIES
]


@pytest.mark.parametrize(("name", "masked", "ranks", "config"), sweep(CASES, first=8), ids=str)
def test_captured_steps_draw_the_same_bit_for_bit(
    name: str, masked: bool, ranks: int, config: dict[str, Any]
) -> None:
    shapes = [Shape(masked=masked), Shape(batch=1, masked=masked), Shape(masked=masked)]

    def rank(communicator: LockstepCommunicator) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
        network, engine, maker = captured(name, communicator, **config)
        found = [latents for shape in shapes for latents in draw(network, TRANSFORMERS[name], shape, 3)]
        assert engine.graphs.obstacle is None
        engine.capture_with(None)
        wanted = [latents for shape in shapes[:2] for latents in draw(network, TRANSFORMERS[name], shape, 3)]
        return found, wanted + wanted[:3], sum(graph.replays for graph in maker.made)

    for found, wanted, replays in run_in_lockstep(ranks, rank):
        assert all(map(torch.equal, found, wanted))
        assert replays > 2 * len(shapes)  # each replay has two pieces and more: the gather is in between


COMPILED = [
    "z-image",
    "flux",
    "sd3",
    "pixart",
    "qwen-image",
    "flux2",
    "ernie-image",
    "krea2",
    "hunyuan-image",
    "flux3-references",
    "qwen-image-edit",
]


@pytest.mark.parametrize("name", sweep(COMPILED))
def test_captured_steps_run_compiled_blocks(name: str, compiler: CountingCompiler) -> None:
    runs = []

    def rank(communicator: LockstepCommunicator) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        network, engine, _ = captured(name, communicator, cfg_parallel=False)
        compile_blocks(network, compiler)
        blocks, maker = len(list(engine.network.repeated_blocks)), CompiledGraphs(compiler)
        with many_shapes():
            wanted = [latents for _ in range(2) for latents in draw(network, TRANSFORMERS[name], WIDE, 3)]
            engine.capture_with(maker)
            found = [latents for _ in range(2) for latents in draw(network, TRANSFORMERS[name], WIDE, 3)]
        runs.append((set(maker.runs), blocks))
        return found, wanted

    for found, wanted in run_in_lockstep(2, rank):
        assert all(map(torch.equal, found, wanted))
    for counted, blocks in runs:
        assert counted == {blocks}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_what_a_graph_reads_lives_as_long(name: str, masked: bool) -> None:
    network, engine, maker = captured(name, connect("local"))
    cached, cached_of = [], engine.network.cached

    def noted(call: Any) -> Any:
        cached.append(cached_of(call))
        return cached[-1]

    engine.network.cached = noted  # type: ignore[method-assign]
    draw(network, TRANSFORMERS[name], Shape(masked=masked))
    assert bool(maker.made) == ((name, masked) not in COPIES)
    assert engine.graphs.alone is not None
    inputs = [graph._inputs for graph in engine.graphs.alone._graphs.values() if graph is not None]
    layers = list(map(vars, network.modules()))
    processors = [vars(layer["processor"]) for layer in layers if "processor" in layer]
    known = _storages((inputs, cached, layers, processors))
    for graph in maker.made:
        for operation, args, kwargs, output in graph.operations:
            if operation is not torch.ops.aten.lift_fresh.default:  # a number, made where it is used
                assert _storages((args, kwargs)) <= known, f"{operation} reads something that nobody keeps"
            known |= _storages(output)


def _storages(tree: Any) -> set[int]:
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_nothing_in_a_step_that_is_captured_stops_the_device(name: str, masked: bool) -> None:
    """What would stop a GPU in the middle of a capture ends the capture."""
    made, transformer, shape = TRANSFORMERS[name].make(), TRANSFORMERS[name], Shape(masked=masked)
    with StandIn() as device, torch.no_grad():
        device.take(made)
        network = parallelize(made, AbsentPeers(0, 2, DEVICE), ParallelConfig(cfg_parallel=False))
        engine = engine_of(network)
        assert engine is not None
        inputs = transformer.inputs_on(DEVICE, shape)
        stops: list[Any] = []
        compute = engine.network.compute

        def watched(call: Any, share: Any, collect: Any) -> Any:
            device.stops.clear()

            def apart(part: torch.Tensor) -> torch.Tensor:
                """A gather is between graphs."""
                stops.extend(device.stops)
                whole = collect(part)
                device.stops.clear()
                return whole

            output = compute(call, share, apart)
            stops.extend(device.stops)
            return output

        engine.network.compute = watched  # type: ignore[method-assign]
        with engine.image():
            for step in range(3):
                stops.clear()
                timestep = torch.full((shape.batch,), (1.0 - step / 3) * transformer.scale)
                transformer.predict(network, timestep.to(DEVICE), inputs)
    assert (len(stops) > 0) == ((name, masked) in COPIES), stops


def test_another_way_to_attend_is_another_graph() -> None:
    network, engine, _ = captured("flux", connect("local"))
    assert engine.graphs.alone is not None
    made = []
    for backend in ("native", "_native_math"):
        with attention_backend(backend):
            for _ in range(2):
                draw(network, TRANSFORMERS["flux"], WIDE)
        made.append(len(engine.graphs.alone))
    assert made[1] == 2 * made[0] > 0


def test_a_part_of_the_batch_is_not_taken_for_a_part_of_the_tokens() -> None:
    """Two ranks have one image each of a batch of two, and half the tokens each of one image."""
    one = Shape(batch=1)

    def rank(communicator: LockstepCommunicator) -> list[torch.Tensor]:
        network, engine, _ = captured("flux", communicator, exchange="none")
        found = [draw(network, TRANSFORMERS["flux"], shape)[-1] for shape in (WIDE, one) * 2]
        engine.capture_with(None)
        return [*found, *(draw(network, TRANSFORMERS["flux"], shape)[-1] for shape in (WIDE, one) * 2)]

    for found in run_in_lockstep(2, rank):
        assert all(map(torch.equal, found[:4], found[4:]))


def test_a_network_that_copies_from_the_host_is_launched_and_named(caplog: pytest.LogCaptureFixture) -> None:
    network, engine, maker = captured("qwen-image", connect("local"))
    draw(network, TRANSFORMERS["qwen-image"], PADDED)
    assert not maker.made
    (warning,) = caplog.messages
    assert "not as CUDA graphs" in warning and "from the host" in warning
    draw(network, TRANSFORMERS["qwen-image"], WIDE)
    assert maker.made and engine.graphs.obstacle is None
