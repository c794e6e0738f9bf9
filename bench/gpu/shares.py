"""One rank's share of a step on one GPU: `python -m bench.gpu.shares [--model flux]`.

A published network with random weights does a step for diffusers alone, and one rank's share of it in a gang
of 1, 2, 4 and 8, its peers absent (`bench.projection.peers`): kernel by kernel and as CUDA graphs; with
--compiled once more, with the blocks compiled that it repeats; with --exchange in other modes of it; with
--short a transformer's short step too, as `cache_interval` has them. Each row has the time until the host has
given everything to the device, and until the device is done. What is waited for is copied from what the rank
sends, one launch a transfer, and that is in it; what a link between GPUs costs is not: `bench.projection`
adds that.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.arguments import add_json, side
from bench.barrier import finish
from bench.exchange import SETTLING
from bench.projection.peers import NotedPeers, filled_once
from bench.projection.rounds import places
from bench.published import PUBLISHED, Published, random_network
from bench.report import Report
from distriray import ParallelConfig, parallelize
from distriray.arguments import positive
from distriray.config import MIXES, ExchangeMode
from distriray.parallel import compile_blocks, engine_of, many_shapes

COLUMNS = (
    "size",
    "share of",
    "guidance",
    "exchange",
    "launched by",
    "kernels",
    "kernels take, ms",
    "host, ms",
    "step, ms",
    "faster than diffusers",
    "buffers, MB",
    "memory, GB",
)


@dataclass(frozen=True)
class Timing:
    """Medians over some steps; kernels and what they take are those of one step, by the profiler."""

    host_ms: float
    step_ms: float
    kernels: int = 0
    kernels_ms: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=PUBLISHED, default="sdxl")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: a dry run, small")
    parser.add_argument("--sizes", type=side, nargs="+", help="pixels of a side; default 1024 2048 3840")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--exchange", choices=MIXES, nargs="+", help="default: displaced of a U-Net, sync of a transformer"
    )
    parser.add_argument("--short", action="store_true", help="a transformer's short steps too")
    parser.add_argument("--steps", type=positive, default=8, help="steps that are timed")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: the model's")
    parser.add_argument("--compiled", action="store_true", help="also with compiled blocks")
    add_json(parser)
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    arguments.sizes = arguments.sizes or ([1024, 2048, 3840] if on_gpu else [128])
    model = PUBLISHED[arguments.model]
    if arguments.short and model.spatial:
        parser.error(f"--short is for transformers, which {model.name} is not")
    arguments.exchange = arguments.exchange or ["displaced" if model.spatial else "sync"]
    usual = str(model.dtype).removeprefix("torch.") if on_gpu else "float32"
    arguments.dtype = arguments.dtype or usual
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    name = torch.cuda.get_device_name() if on_gpu else "a CPU, much smaller"
    report = Report(
        f"bench.gpu.shares: {model.name} in {arguments.dtype} on {name}",
        COLUMNS,
        seed=0,
        settings=vars(arguments),
    )
    dtype = getattr(torch, arguments.dtype)
    network = random_network(model.make if on_gpu else model.small, device, dtype)

    def add(
        size: int, of: str, guidance: str, exchange: str, launched: str, timing: Timing, buffers: int
    ) -> None:
        memory = torch.cuda.max_memory_reserved() if on_gpu else 0
        report.add(
            f"{size}x{size}",
            of,
            guidance if model.splits else "-",
            exchange,
            launched,
            str(timing.kernels),
            f"{timing.kernels_ms:.1f}",
            f"{timing.host_ms:.1f}",
            f"{timing.step_ms:.1f}",
            f"{alone[size].step_ms / timing.step_ms:.2f}x",
            f"{buffers / 1e6:.0f}",
            f"{memory / 1e9:.1f}",
        )
        report.print_last()
        if arguments.json:
            report.write(arguments.json)  # after each row: what was measured is kept if time runs out

    modes: Sequence[ExchangeMode] = arguments.exchange
    kinds = (False, True) if arguments.short else (False,)
    alone = {}
    failed: list[str] = []
    for size in arguments.sizes:
        alone[size] = whole_step(model, network, size, arguments.steps)
        add(size, "diffusers", "together", "-", "kernel", alone[size], 0)
    for compiled, size, ranks in product(
        (False, True) if arguments.compiled else (False,), arguments.sizes, arguments.ranks
    ):
        if compiled and (size, ranks) == (arguments.sizes[0], arguments.ranks[0]):
            compile_blocks(network, "inductor" if on_gpu else "eager")
        for split, graphs in product((True, False), (False, True) if on_gpu else (False,)):
            if split and (ranks % 2 or not model.splits):
                continue
            guidance, launched = "split" if split else "together", "graph" if graphs else "kernel"
            launched += ", compiled" * compiled
            exchanged = ranks > (2 if split else 1)
            for exchange, short in product(modes if exchanged else modes[:1], kinds):
                said = (exchange if exchanged else "", "a short step" if short else "")
                exchanges = ", ".join(filter(None, said)) or "-"
                row = size, f"a gang of {ranks}", guidance, exchanges, launched
                try:
                    with many_shapes():
                        measured = share(
                            model, network, ranks, size, split, exchange, graphs, arguments.steps, short
                        )
                except RuntimeError as error:  # no graph, or no memory: the rows that follow are measured
                    failed.append(f"{size}x{size}, {', '.join(row[1:])}: {error}")
                    print(failed[-1], flush=True)
                    continue
                add(*row, *measured)
    report.print()
    if failed:
        raise SystemExit("\n".join(("not measured:", *failed)))


def whole_step(model: Published, network: Any, size: int, steps: int) -> Timing:
    """Timing of a step by diffusers, before the network is parallelized."""
    inputs, timestep = model.inputs_of(network, size), model.timestep_on(network.device, 500.0)
    with torch.no_grad():
        return timed(lambda: model.call(network, timestep, inputs), steps, network.device)


def share(
    model: Published,
    network: Any,
    ranks: int,
    size: int,
    split: bool,
    exchange: ExchangeMode,
    graphs: bool,
    steps: int,
    short: bool = False,
) -> tuple[Timing, int]:
    """Timing of one rank's share of a step, and the bytes of its buffers.

    The rank has a neighbour on each side, where one of the gang does.
    """
    peers = NotedPeers(max(places(ranks // (2 if split else 1))), ranks, network.device)
    timesteps = SETTLING + steps + 3
    config = ParallelConfig(
        exchange=exchange,
        warmup_steps=1,
        cache_interval=timesteps if short else 1,  # all short behind the first
        cfg_parallel=split,
        cuda_graphs=graphs,
    )
    parallelize(network, peers, config)
    engine = engine_of(network)
    assert engine is not None
    engine.give_back()  # what is kept of the gang before
    if network.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    inputs = model.inputs_of(network, size)
    elements = iter([_on(network.device, model.timestep(999 - at)) for at in range(timesteps)])

    def step() -> None:
        engine.announce_more()
        model.call(network, next(elements), inputs)

    with engine.image():
        step()
        peers.fills = not filled_once(MIXES[exchange])
        for _ in range(SETTLING):
            step()
        timing = timed(step, steps, network.device)
    if graphs and engine.graphs.obstacle:
        raise RuntimeError(f"not launched as graphs: {engine.graphs.obstacle}")
    return timing, engine.buffer_bytes


def _on(device: torch.device, timestep: torch.Tensor | float) -> torch.Tensor | float:
    return timestep.to(device) if isinstance(timestep, torch.Tensor) else timestep


def timed(step: Callable[[], Any], steps: int, device: torch.device) -> Timing:
    """Time `step`, which is warm after one call more."""
    step()
    finish(device)
    host, whole = [], []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        host.append(1e3 * (time.perf_counter() - began))
        finish(device)
        whole.append(1e3 * (time.perf_counter() - began))
    if device.type != "cuda":
        return Timing(median(host), median(whole))
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        finish(device)
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return Timing(
        median(host), median(whole), len(kernels), sum(event.device_time for event in kernels) / 1e3
    )


if __name__ == "__main__":
    main()
