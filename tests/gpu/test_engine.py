"""The engine, the decoder and the denoiser on an NVIDIA GPU: ranks in lock-step, and over NCCL.

NCCL's ranks are held against those in lock-step bit for bit, since both do the same arithmetic on the same
device. One GPU is enough; nothing here says anything about speed.
"""

from __future__ import annotations

import random
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.config import PAPER, ExchangeMode
from distriray.denoise import Denoiser, DenoiseState
from distriray.parallel import compile_blocks, engine_of, many_shapes
from distriray.parallel.decoder import PatchDecoder
from distriray.parallel.graphs import CaptureFailed, CudaGraphs, StepGraphs
from distriray.parallel.networks.families import qwen_image21
from distriray.requests import SamplingParams
from tests.cases import PIPELINES, Case, call
from tests.distributed.gpus import gpu_of
from tests.distributed.ranks import run_processes
from tests.models import (
    tiny_hunyuan_image_vae,
    tiny_qwen_image21_transformer,
    tiny_qwen_image21_vae,
    tiny_qwen_vae,
    tiny_sdxl,
    tiny_vae,
)
from tests.regroup import DISPLACED, REQUEST
from tests.unit import test_control as control
from tests.unit import test_control_of_transformers as transformers_control
from tests.unit.parallel.test_branches import drawn as guided
from tests.unit.parallel.test_qwen_image21 import EDIT
from tests.unit.parallel.test_qwen_image21 import draw as draw_kept
from tests.unit.parallel.transformers import TRANSFORMERS, Shape, draw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
needs_nccl = pytest.mark.skipif(find_spec("cupy") is None, reason="needs CuPy")

CASES = [
    Case(steps=6, config={"exchange": "sync", "cfg_parallel": False}),
    Case(
        steps=6,
        config={
            "exchange": "displaced",
            "warmup_steps": 1,
            "cfg_parallel": False,
            "prediction": {"keys_values": 0.5},
        },
    ),
    Case(steps=6, images=3, config={"exchange": PAPER, "warmup_steps": 2, "cfg_parallel": False}),
    Case(
        steps=6,
        height=264,
        scheduler="euler",
        config={"exchange": "displaced", "warmup_steps": "auto", "cfg_parallel": False},
    ),
    Case(steps=6, config={"exchange": "displaced", "warmup_steps": 0, "cfg_parallel": True}),
]
SLEEPS = (0, 0, 200_000, 5_000_000)
"""Clock cycles by which a transfer is made to come late; a tenth of a millisecond and some."""


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.float().cpu(), wanted.float().cpu()
    return float((found - wanted).norm() / wanted.norm())


# -------------------------------------------------------------------------------------- against diffusers


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("model", ["sdxl", "sd15"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_synchronous_gangs_draw_what_one_device_draws(model: str, dtype: torch.dtype, ranks: int) -> None:
    """As near to float32 on the CPU as diffusers alone is on this device in this dtype."""
    # Noise is not the same in every dtype, nor with every torch.
    noise = torch.randn((1, 4, 41, 12), generator=torch.Generator().manual_seed(0))

    def case(dtype: torch.dtype) -> Case:
        extra = {"latents": noise.to(dtype)}
        return Case(model, height=328, steps=4, scheduler="euler", config={"exchange": "sync"}, extra=extra)

    wanted = call(PIPELINES[model](), case(torch.float32))
    alone = distance(call(PIPELINES[model]().to("cuda", dtype), case(dtype)), wanted)

    def rank(communicator: Communicator) -> torch.Tensor:
        pipeline = PIPELINES[model]().to(communicator.device, dtype)
        parallelize(pipeline, communicator, ParallelConfig(exchange="sync"))
        return call(pipeline, case(dtype))

    found = run_in_lockstep(ranks, rank, "cuda")
    assert all(torch.equal(found[0], other) for other in found)
    ours = distance(found[0], wanted)
    print(f"{model} {dtype} ranks {ranks}: {ours:.1e} from float32 on the CPU, diffusers alone {alone:.1e}")
    assert ours < 2 * alone + 1e-5, alone
    assert alone < 0.1, "then nothing was compared"


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [tiny_vae, tiny_qwen_vae, tiny_qwen_image21_vae, tiny_hunyuan_image_vae])
def test_gangs_decode_what_one_device_decodes(make: Any, dtype: torch.dtype, ranks: int) -> None:
    """As near to float32 on the CPU as diffusers alone is on this device in this dtype."""
    wanted, _ = decoded(connect("local"), make, torch.float32)
    alone, _ = decoded(connect("local", device="cuda"), make, dtype)
    found = run_in_lockstep(ranks, lambda communicator: decoded(communicator, make, dtype), "cuda")
    for picture, sent in found:
        assert sent > 2 * 1280 and torch.equal(picture, found[0][0])
        assert distance(picture, wanted) < 2 * distance(alone, wanted) + 1e-5


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_steps_that_were_captured_draw_what_they_draw_without(dtype: torch.dtype, ranks: int) -> None:
    wanted = run_in_lockstep(ranks, lambda communicator: results(communicator, dtype, False), "cuda")
    found = run_in_lockstep(ranks, lambda communicator: results(communicator, dtype, True), "cuda")
    for ours, theirs in zip(found, wanted, strict=True):
        for index, (here, there) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.isfinite(here).all(), index
            assert torch.equal(here, there), (index, distance(here, there))


@pytest.mark.parametrize(("ranks", "exchange"), [(1, "sync"), (2, "sync"), (3, "sync"), (3, "compressed")])
@pytest.mark.parametrize("name", sorted(TRANSFORMERS.keys() - {"qwen-image-2.1"}))  # its prefix is not kept
@pytest.mark.parametrize("interval", [1, 2])
def test_captured_steps_of_transformers_draw_what_they_draw_without(
    name: str, ranks: int, exchange: ExchangeMode, interval: int
) -> None:
    steps = 8 if interval > 1 else 4  # of which three are short

    def rank(communicator: Communicator) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        config = ParallelConfig(
            exchange=exchange, warmup_steps=1, cache_interval=interval, cfg_parallel=False
        )
        network = TRANSFORMERS[name].make(**TRANSFORMERS[name].twelve_heads).to(communicator.device)
        parallelize(network, communicator, config)
        engine = engine_of(network)
        assert engine is not None
        transformer = TRANSFORMERS[name]
        captured = [each for _ in range(3) for each in draw(network, transformer, Shape(), steps)]
        assert engine.graphs.obstacle is None
        parallelize(network, communicator, config.model_copy(update={"cuda_graphs": False}))
        return captured, draw(network, transformer, Shape(), steps) * 3

    for captured, launched in run_in_lockstep(ranks, rank, "cuda"):
        assert all(map(torch.equal, captured, launched))


@pytest.mark.parametrize("exchange", ["sync", "displaced"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["qwen-image", "hunyuan-image", "chroma", "flux3"])
def test_captured_steps_of_halves_with_a_branch_each_draw_what_they_draw_without(
    name: str, ranks: int, exchange: ExchangeMode
) -> None:
    def rank(communicator: Communicator) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        config = ParallelConfig(exchange=exchange, warmup_steps=1)
        network = TRANSFORMERS[name].make().to(communicator.device)
        parallelize(network, communicator, config)
        engine = engine_of(network)
        assert engine is not None
        captured = [each for _ in range(3) for each in guided(network, TRANSFORMERS[name], apart=False)]
        assert engine.graphs.obstacle is None
        parallelize(network, communicator, config.model_copy(update={"cuda_graphs": False}))
        return captured, guided(network, TRANSFORMERS[name], apart=False) * 3

    for captured, launched in run_in_lockstep(ranks, rank, "cuda"):
        assert all(map(torch.equal, captured, launched))


@pytest.mark.parametrize(("ranks", "exchange"), [(1, "sync"), (2, "sync"), (2, "displaced")])
@pytest.mark.parametrize("model", [*control.MODELS, *transformers_control.MODELS])
def test_captured_steps_with_controlnets_draw_what_they_draw_without(
    model: str, ranks: int, exchange: ExchangeMode, tmp_path: Path
) -> None:
    """With another picture each; those that are not captured are drawn all the same."""
    cases: Any = control if model in control.MODELS else transformers_control
    cases.save(model, tmp_path)

    def rank(communicator: Communicator, graphs: bool) -> tuple[list[torch.Tensor], int]:
        config = ParallelConfig(exchange=exchange, warmup_steps=2, cfg_parallel=False, cuda_graphs=graphs)
        pipeline = parallelize(cases.made(model).to(communicator.device), communicator, config)
        denoiser, engine, latents = cases.denoiser_of(pipeline, tmp_path / model), engine_of(pipeline), []
        assert engine is not None
        for seed, name in enumerate(("canny", "depth", "canny")):
            shown = cases.params(*cases.ONE).control[0].model_copy(update={"image": cases.picture(name)})
            request = cases.params(seed=seed, num_inference_steps=6).model_copy(update={"control": (shown,)})
            state = denoiser.prepare(request)
            while not state.done:
                denoiser.step(state)
            denoiser.settle(state)
            latents.append(state.latents)
        return latents, sum(map(len, engine.graphs._made))

    wanted = run_in_lockstep(ranks, lambda communicator: rank(communicator, False), "cuda")
    found = run_in_lockstep(ranks, lambda communicator: rank(communicator, True), "cuda")
    for (here, captured), (there, _) in zip(found, wanted, strict=True):
        assert all(map(torch.equal, here, there))
        assert bool(captured) == (model not in ("qwen", "z-image", "z-image-2"))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("most_copied", [qwen_image21.MOST_COPIED, 0], ids=["copied", "read in place"])
def test_captured_steps_behind_a_kept_prefix_draw_what_they_draw_without(
    monkeypatch: pytest.MonkeyPatch, most_copied: int, ranks: int
) -> None:
    monkeypatch.setattr(qwen_image21, "MOST_COPIED", most_copied)

    def rank(communicator: Communicator) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        config = ParallelConfig(exchange="sync", cfg_parallel=False)
        network = tiny_qwen_image21_transformer().to(communicator.device)
        parallelize(network, communicator, config)
        engine, scenes = engine_of(network), [EDIT, replace(EDIT, said=20), EDIT]
        assert engine is not None
        captured = [latents for scene in scenes for latents in draw_kept(network, scene, True, steps=5)]
        assert engine.graphs.obstacle is None
        parallelize(network, communicator, config.model_copy(update={"cuda_graphs": False}))
        launched = [latents for scene in scenes for latents in draw_kept(network, scene, True, steps=5)]
        return captured, launched

    for captured, launched in run_in_lockstep(ranks, rank, "cuda"):
        assert all(map(torch.equal, captured, launched))


def test_gangs_that_are_joined_in_turn_draw_with_graphs_what_they_draw_without() -> None:
    def rank(communicator: Communicator) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        gangs = communicator, connect("local", device=communicator.device)

        def tours(graphs: bool) -> list[torch.Tensor]:
            config = DISPLACED.model_copy(update={"cuda_graphs": graphs})
            pipeline = parallelize(tiny_sdxl().to(communicator.device), gangs[1], config)
            denoiser, drawn = Denoiser(pipeline), []
            for _ in range(4):
                state = denoiser.prepare(SamplingParams(**REQUEST))
                for gang in gangs * 2:
                    parallelize(pipeline, gang, config)
                    for _ in range(state.num_steps // 4):
                        denoiser.step(state)
                    denoiser.settle(state)
                drawn.append(state.latents)
            return drawn

        return tours(True), tours(False)

    for captured, launched in run_in_lockstep(2, rank, "cuda"):
        assert all(map(torch.equal, captured, launched))


def test_a_gpu_goes_on_after_a_capture_that_failed() -> None:
    x = torch.ones(3, device="cuda")
    graphs = StepGraphs(CudaGraphs(x.device))
    graphs.run("reads", lambda x: x * float(x.sum()), None, (x,), {})
    with pytest.raises(CaptureFailed):
        graphs.run("reads", lambda x: x * float(x.sum()), None, (x,), {})
    assert torch.randn(3, device="cuda").isfinite().all()
    for factor in range(4):
        doubled = graphs.run("doubles", lambda x: 2 * x, None, (factor * x,), {})
        assert doubled.tolist() == [2.0 * factor] * 3


def test_memory_of_dropped_graphs_is_given_back() -> None:
    x = torch.ones(2**24, device="cuda")
    maker = CudaGraphs(x.device)
    graphs = StepGraphs(maker)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(2):
        graphs.run("doubles", lambda x: 2 * x, None, (x,), {})
    graphs.clear()
    maker.let_go()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_blocks_draw_what_they_draw_without_and_captured_the_same(ranks: int) -> None:
    plain, launched, captured = (
        run_in_lockstep(ranks, lambda communicator, how=how: drawn(communicator, *how), "cuda")
        for how in ((False, False), (True, False), (True, True))
    )
    for of_rank in zip(plain, launched, captured, strict=True):
        for index, (wanted, found, replayed) in enumerate(zip(*of_rank, strict=True)):
            assert distance(found, wanted) < 1e-4, index
            assert torch.equal(replayed, found), (index, distance(replayed, found))


# ------------------------------------------------------------------------------------------- over NCCL


def drawn(communicator: Communicator, compiles: bool, graphs: bool) -> list[torch.Tensor]:
    """Latents of the first two cases, each three times, so that a compiled step is met again; on the CPU."""
    pipeline, found = tiny_sdxl().to(communicator.device, torch.float32), []
    if compiles:
        compile_blocks(pipeline)
    with many_shapes():
        for case in CASES[:2]:
            parallelize(pipeline, communicator, ParallelConfig(**case.config, cuda_graphs=graphs))
            found += [call(pipeline, case).cpu() for _ in range(3)]
            engine = engine_of(pipeline)
            assert engine is not None and engine.graphs.obstacle is None
    return found


@torch.no_grad()
def decoded(communicator: Communicator, make: Any, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """A picture of given latents, on the CPU, and the bytes that were sent for it."""
    vae = make().to(communicator.device, dtype)
    decoder = PatchDecoder(vae.decoder)
    decoder.install()
    decoder.communicator = communicator if communicator.world_size > 1 else None
    channels, frame = vae.config.get("z_dim"), (1,)
    if channels is None:
        channels, frame = vae.config.latent_channels, ()
    latents = torch.randn((2, channels, *frame, 9, 6), generator=torch.Generator().manual_seed(0))
    picture = vae.decode(latents.to(communicator.device, dtype), return_dict=False)[0]
    return picture.cpu(), communicator.bytes_sent


def results(communicator: Communicator, dtype: torch.dtype, graphs: bool = True) -> list[torch.Tensor]:
    """Latents of all cases, those of the first two twice, and a picture; on the CPU."""
    torch.backends.cudnn.allow_tf32 = False
    pipeline = tiny_sdxl().to(communicator.device, dtype)
    found = []
    for case in CASES:
        parallelize(pipeline, communicator, ParallelConfig(**case.config, cuda_graphs=graphs))
        found += [call(pipeline, case).cpu() for _ in range(2 if case in CASES[:2] else 1)]
    picture = pipeline(
        "a lake at dusk",
        height=128,
        width=96,
        num_inference_steps=2,
        output_type="pt",
        generator=torch.Generator().manual_seed(1),
    ).images
    return [*found, picture.cpu()]


def _over_nccl(
    rank: int, world_size: int, address: str, dtype: torch.dtype, late: bool
) -> list[torch.Tensor]:
    device = gpu_of(rank, world_size)
    torch.cuda.set_device(device)
    communicator = connect(
        "nccl", rank=rank, world_size=world_size, address=address, device=device, timeout_s=60.0
    )
    if late:
        _make_late(communicator, random.Random(rank))
    try:
        return results(communicator, dtype)
    finally:
        communicator.close()


def _make_late(communicator: Any, dice: random.Random) -> None:
    """Let transfers begin late, and what follows them: an order that nothing enforces then breaks."""
    enqueue, stream = communicator._enqueue, communicator._stream

    def enqueue_late(*messages: Any) -> None:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(dice.choice(SLEEPS))
        if dice.random() < 0.3:
            torch.cuda._sleep(3_000_000)
        enqueue(*messages)

    communicator._enqueue = enqueue_late


@needs_nccl
@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    ("ranks", "dtype", "late"),
    [
        (2, torch.float32, False),
        (2, torch.float16, True),
        (4, torch.float16, False),
    ],
    ids=str,
)
def test_a_gang_over_nccl_draws_what_ranks_in_lockstep_draw(
    ranks: int, dtype: torch.dtype, late: bool
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    wanted = run_in_lockstep(ranks, lambda communicator: results(communicator, dtype), "cuda")
    work = (f"127.0.0.1:{store.port}", dtype, late)
    found = run_processes(ranks, _over_nccl, *work, device_type="cuda", timeout_s=240.0)
    for ours, theirs in zip(found, wanted, strict=True):
        for index, (here, there) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.isfinite(here).all(), index
            assert torch.equal(here, there), (index, distance(here, there))


# ------------------------------------------------------------------------------- step by step, regrouped


def test_a_state_moves_between_gangs_on_the_gpu() -> None:
    params = SamplingParams(prompt="a lake at dusk", seed=7, num_inference_steps=6, height=128, width=96)
    config = ParallelConfig(exchange="sync")

    def steps(count: int, blob: bytes | None) -> Any:
        def rank(communicator: Communicator) -> tuple[bytes, torch.Tensor]:
            pipeline = parallelize(tiny_sdxl().to(communicator.device), communicator, config)
            denoiser = Denoiser(pipeline)
            state = (
                denoiser.prepare(params)
                if blob is None
                else DenoiseState.from_bytes(blob).to(communicator.device)
            )
            for _ in range(count):
                denoiser.step(state)
            return state.to_bytes(), state.latents.cpu()

        return rank

    whole = run_in_lockstep(1, steps(6, None), "cuda")[0][1]
    blob = run_in_lockstep(2, steps(2, None), "cuda")[1][0]
    blob = run_in_lockstep(4, steps(2, blob), "cuda")[3][0]
    moved = run_in_lockstep(1, steps(2, blob), "cuda")[0][1]
    assert distance(moved, whole) < 1e-4
