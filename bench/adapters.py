"""What switching adapters takes, and the memory that they take: `python -m bench.adapters`.

Adapters with random weights, of the rank of those that ship and on more layers. Each is asked for twice, in
turn with none: the first time it is read, checked and put into the network, the second time it is there.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import psutil
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from bench.report import Report
from distriray.adapters import AdapterSpec
from distriray.denoise import Denoiser
from distriray.landscapes import MODEL_DIR
from distriray.requests import Lora, SamplingParams

RANK = 6


def write_adapter(path: Path, unet: UNet2DConditionModel, seed: int) -> None:
    """Random factors for every linear layer and convolution but those of timesteps, in half precision."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and "emb" not in name:
            out, into, *kernel = layer.weight.shape
            for factor, shape in (("A", (RANK, into, *kernel)), ("B", (out, RANK, *(1 for _ in kernel)))):
                weight = 0.02 * torch.randn(shape, generator=generator)
                weights[f"unet.{name}.lora_{factor}.weight"] = weight.half()
    save_file(weights, path)


@contextmanager
def clocked(times: list[float]) -> Iterator[None]:
    """Note the milliseconds that the block takes."""
    began = time.perf_counter()
    yield
    times.append(1000 * (time.perf_counter() - began))


def step_ms(denoiser: Denoiser, size: int, loras: Sequence[Lora], steps: int) -> float:
    """Median of a request's steps but for the first."""
    params = SamplingParams(
        prompt="a lake", seed=1, height=size, width=size, num_inference_steps=steps, loras=tuple(loras)
    )
    state, times = denoiser.prepare(params), list[float]()
    while not state.done:
        with clocked(times):
            denoiser.step(state)
    return median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--held", type=int, default=8, help="adapters that the bound has room for")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--json", help="also write the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL_DIR, torch_dtype=torch.float32)
    names = [f"style-{index}" for index in range(arguments.adapters)]
    report = Report(
        f"bench.adapters: builtin:landscapes in float32, {len(names)} adapters of rank {RANK}",
        columns=("what", "", ""),
        seed=0,
        settings=vars(arguments),
    )
    with TemporaryDirectory() as folder:
        for seed, name in enumerate(names):
            write_adapter(Path(folder) / f"{name}.safetensors", pipeline.unet, seed)
        first = load_file(Path(folder) / f"{names[0]}.safetensors")
        each = 2 * sum(weight.nbytes for weight in first.values())  # in single precision
        denoiser = Denoiser(pipeline, arguments.held * each)
        adapters, process = denoiser.adapters, psutil.Process(os.getpid())
        adapters.learn(
            AdapterSpec(name=name, source=str(Path(folder) / f"{name}.safetensors")) for name in names
        )
        plain = step_ms(denoiser, arguments.size, (), arguments.steps)
        before, cold, warm, off = process.memory_info().rss, list[float](), list[float](), list[float]()
        memory = []
        for name in names:
            with clocked(cold):
                adapters.choose([Lora(name=name)])
            with clocked(off):
                adapters.choose([])
            with clocked(warm):
                adapters.choose([Lora(name=name)])
            memory.append(adapters.nbytes)
        after = process.memory_info().rss
        counts = adapters.counts
        for what, times in (("first use", cold), ("held already", warm), ("none again", off)):
            report.add(what, f"{median(times):.1f} ms", f"{min(times):.1f} to {max(times):.1f} ms")
        report.add("weights of one", f"{each / 2**20:.2f} MiB", "in memory")
        report.add("weights of those held", f"{max(memory) / 2**20:.2f} MiB", f"{len(adapters.held)} of them")
        report.add("the process has grown by", f"{(after - before) / 2**20:.0f} MiB", "")
        report.add("loads, evictions", str(counts.loads), str(counts.evictions))
        last = adapters.held
        for count in (0, 1, 2):
            loras = [Lora(name=name, scale=0.1) for name in last[:count]]
            took = step_ms(denoiser, arguments.size, loras, arguments.steps)
            what = f"a step of {arguments.size}x{arguments.size} with {count}"
            report.add(what, f"{took:.0f} ms", f"{took / plain:.2f} of one without")
    report.publish(arguments.json)


if __name__ == "__main__":
    main()
