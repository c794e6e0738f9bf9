"""Compiled blocks draw what they draw without, are whole graphs, and are compiled once for a shape."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import nn

from distriray import ParallelConfig, parallelize
from distriray.collective import LockstepCommunicator, connect, run_in_lockstep
from distriray.parallel import compile_blocks, engine_of, many_shapes
from distriray.parallel.graphs import StepGraphs
from distriray.parallel.layers.conv import PatchConv2d, patch_conv
from tests.cases import Case, call
from tests.compiling import CountingCompiler
from tests.models import SHALLOW, tiny_sdxl
from tests.parameters import sweep
from tests.unit.parallel.recorded import CompiledGraphs
from tests.unit.parallel.transformers import TRANSFORMERS, Shape, draw, error

LAYERS_OF_BLOCKS = {"BasicTransformerBlock", "ResnetBlock2D", "Downsample2D", "Upsample2D"}
MODES: list[dict[str, Any]] = [
    {"exchange": "sync", "cfg_parallel": False},
    {"exchange": "displaced", "warmup_steps": 2, "cfg_parallel": False},
]
SHORT: dict[str, Any] = {"exchange": "sync", "cache_interval": 2, "cfg_parallel": False}


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_blocks_of_transformers_are_whole_graphs_for_all_modes(
    name: str, ranks: int, compiler: CountingCompiler
) -> None:
    transformer = TRANSFORMERS[name]
    graphs = []

    def rank(communicator: LockstepCommunicator, compiles: bool, config: dict[str, Any]) -> Any:
        network = parallelize(transformer.make(), communicator, ParallelConfig(**config))
        if compiles:
            compile_blocks(network, compiler)
        with many_shapes():
            masked = name in ("qwen-image", "qwen-image-2.1", "chroma", "pixart")
            return draw(network, transformer, Shape(masked=masked))

    for config in [*(MODES if ranks > 1 else MODES[:1]), SHORT]:  # one rank has nothing to exchange
        plain, compiled = (
            run_in_lockstep(ranks, lambda c, compiles=compiles, config=config: rank(c, compiles, config))
            for compiles in (False, True)
        )
        graphs.append(compiler.graphs)
        for ours, theirs in zip(compiled, plain, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert 0 < graphs[0] == graphs[-1]


def compile_layers(network: nn.Module, compiler: CountingCompiler) -> None:
    """More than blocks that repeat: all that exchanges."""
    for module in network.modules():
        if type(module).__name__ in LAYERS_OF_BLOCKS:
            module.compile(backend=compiler, dynamic=False, fullgraph=True)


@pytest.mark.parametrize("channels_last", [False, True])
def test_blocks_of_unets_are_whole_graphs(channels_last: bool, compiler: CountingCompiler) -> None:

    def rank(
        communicator: LockstepCommunicator, compiles: bool, config: dict[str, Any]
    ) -> list[torch.Tensor]:
        pipeline = parallelize(tiny_sdxl(**SHALLOW), communicator, ParallelConfig(**config))
        if channels_last:
            pipeline.unet.to(memory_format=torch.channels_last)
        if compiles:
            compile_layers(pipeline.unet, compiler)
        with many_shapes():
            return [call(pipeline, Case(steps=4, config=config, height=height)) for height in (128, 144)]

    graphs = []
    for config in MODES[channels_last:]:  # a displaced image begins with synchronous steps
        plain, compiled = (
            run_in_lockstep(2, lambda c, compiles=compiles, config=config: rank(c, compiles, config))
            for compiles in (False, True)
        )
        graphs.append(compiler.graphs)
        for ours, theirs in zip(compiled, plain, strict=True):
            for here, there in zip(ours, theirs, strict=True):
                torch.testing.assert_close(here, there, rtol=0, atol=1e-5)
    assert 0 < graphs[0] <= graphs[-1]


@pytest.mark.parametrize(("ranks", "config"), sweep([(2, MODES[1]), (2, MODES[0]), (1, MODES[0])]), ids=str)
def test_captured_steps_with_compiled_blocks_draw_the_same_bit_for_bit(
    ranks: int, config: dict[str, Any], compiler: CountingCompiler
) -> None:
    makers = []

    def rank(communicator: LockstepCommunicator, compiles: bool, captures: bool) -> list[torch.Tensor]:
        pipeline = parallelize(tiny_sdxl(**SHALLOW), communicator, ParallelConfig(**config))
        blocks = [module for module in pipeline.unet.modules() if type(module).__name__ in LAYERS_OF_BLOCKS]
        for block in blocks if compiles else ():
            block.forward = torch.compile(block.forward, backend=compiler, dynamic=False, fullgraph=True)
        maker, engine = CompiledGraphs(compiler), engine_of(pipeline)
        assert engine is not None
        if captures:
            engine.capture_with(maker)
            makers.append(maker)
        with many_shapes():
            found = [
                call(pipeline, Case(steps=4, config=config, height=height)) for height in (128, 144, 128)
            ]
        assert set(maker.runs) <= {len(blocks) if compiles else 0}
        return found

    def drawn(compiles: bool, captures: bool) -> list[list[torch.Tensor]]:
        return run_in_lockstep(ranks, lambda communicator: rank(communicator, compiles, captures))

    for ours, theirs in zip(drawn(True, True), drawn(True, False), strict=True):
        assert all(torch.equal(here, there) for here, there in zip(ours, theirs, strict=True))
    drawn(False, True)
    replays = [sum(graph.replays for graph in maker.made) for maker in makers]
    assert 5 < replays[0] == replays[-1], "exchanges cut compiled code as they cut what is not compiled"


@pytest.mark.parametrize("in_a_wrapper", [False, True])
def test_a_network_that_is_compiled_as_a_whole_draws_what_it_draws_without(
    in_a_wrapper: bool, compiler: CountingCompiler
) -> None:
    case = Case(steps=2, config=MODES[0])

    def rank(communicator: LockstepCommunicator) -> torch.Tensor:
        pipeline = parallelize(tiny_sdxl(**SHALLOW), communicator, ParallelConfig(**case.config))
        if in_a_wrapper:
            pipeline.unet = torch.compile(pipeline.unet, backend=compiler)
        else:
            pipeline.unet.compile(backend=compiler)
        return call(pipeline, case)

    expected = call(tiny_sdxl(**SHALLOW), case)
    for drawn in run_in_lockstep(2, rank):
        torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)


def test_nothing_is_compiled_while_a_step_is_captured(compiler: CountingCompiler) -> None:
    maker, x = CompiledGraphs(compiler), torch.tensor([-1.0, 1.0])
    graphs, compiled = StepGraphs(maker), torch.compile(torch.relu, backend=compiler, fullgraph=True)
    with torch.no_grad():
        graphs.run("positive", compiled, None, (x,), {})
    assert compiler.graphs == 1
    for sign in (1, -1):  # with gradients, for which it was not compiled
        assert torch.equal(graphs.run("positive", compiled, None, (sign * x,), {}), torch.relu(sign * x))
    assert len(graphs) == compiler.graphs == 1
    assert maker.runs == [0]
    compiled(x)
    assert compiler.graphs == 2


def test_a_strided_input_is_one_that_was_compiled_for(compiler: CountingCompiler) -> None:
    maker, x = CompiledGraphs(compiler), torch.arange(12.0).view(3, 4)[:, :2]
    graphs, compiled = StepGraphs(maker), torch.compile(torch.square, backend=compiler, fullgraph=True)
    for factor in range(3):
        assert torch.equal(graphs.run("squares", compiled, None, (x.mul_(factor),), {}), x * x)
    assert maker.runs == [1]


def test_a_gang_that_forms_again_compiles_nothing_new(compiler: CountingCompiler) -> None:
    transformer = TRANSFORMERS["flux"]
    config = ParallelConfig(exchange="displaced", warmup_steps=1)

    def rank(communicator: LockstepCommunicator) -> int:
        network, alone = transformer.make(), connect("local")
        compile_blocks(network, compiler)  # before it is parallelized, too
        with many_shapes():
            for gang in (communicator, alone):
                draw(parallelize(network, gang, config), transformer, Shape())
            graphs = compiler.graphs
            for gang in (communicator, alone):
                draw(parallelize(network, gang, config), transformer, Shape())
        return graphs

    assert max(run_in_lockstep(2, rank)) == compiler.graphs > 0


@pytest.mark.usefixtures("compiler")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPUs by a C++ compiler")
def test_what_torch_compiles_for_a_cpu_draws_the_same() -> None:
    transformer = TRANSFORMERS["sd3"]  # two attentions in a block, neither of which waits for the other

    def rank(communicator: LockstepCommunicator, compiles: bool) -> list[torch.Tensor]:
        one_block = transformer.make(num_layers=1)  # there is a C++ compiler for each of its kernels
        network = parallelize(one_block, communicator, ParallelConfig(exchange="sync"))
        if compiles:
            compile_blocks(network)
        with many_shapes():
            return draw(network, transformer, Shape(), steps=2)

    plain, compiled = (
        run_in_lockstep(2, lambda c, compiles=compiles: rank(c, compiles)) for compiles in (False, True)
    )
    for ours, theirs in zip(compiled, plain, strict=True):
        assert max(error(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-4


def test_a_shape_that_was_not_compiled_for_is_drawn_as_without(compiler: CountingCompiler) -> None:
    transformer = TRANSFORMERS["flux"]
    network, plain = (transformer.make() for _ in range(2))
    compile_blocks(network, compiler)
    for each in (network, plain):
        parallelize(each, connect("local"))
    draw(network, transformer, Shape())
    known = compiler.graphs
    with torch.compiler.set_stance("eager_on_recompile"):
        for shape in (Shape(rows=9), Shape()):
            ours, theirs = (draw(each, transformer, shape) for each in (network, plain))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert compiler.graphs == known > 0


@pytest.mark.parametrize("name", ["qwen-image", "qwen-image-2.1", "z-image"])
def test_texts_of_any_length_are_compiled_for_by_the_second(name: str, compiler: CountingCompiler) -> None:
    transformer = TRANSFORMERS[name]
    network, plain = (parallelize(transformer.make(), connect("local")) for _ in range(2))
    compile_blocks(network, compiler)
    lengths = (5, 40, 70, 100) if name == "z-image" else (5, 7, 9, 12)
    with many_shapes():
        for text in lengths[:2]:
            draw(network, transformer, Shape(text=text), steps=2)
    with torch.compiler.set_stance("fail_on_recompile"):
        for text in lengths[2:]:
            ours, theirs = (draw(each, transformer, Shape(text=text), steps=2) for each in (network, plain))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_layer_of_another_output_than_compiled_for_is_refused() -> None:
    conv = PatchConv2d(3, 4, 3)
    patch_conv(conv, None)  # type: ignore[arg-type]
    conv.exchanged = lambda input: input  # type: ignore[method-assign]
    turn, rows = torch.tensor(0), torch.zeros(1, 3, 8, 8)
    with pytest.raises(RuntimeError, match=r"compiled for torch.float32 \[1, 4, 8, 8\]"):
        torch.ops.distriray.exchange(turn, conv._number, [rows], [1, 4, 8, 8])
