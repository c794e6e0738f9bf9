"""Time and memory that adapters take, loaded and switched: `python -m bench.adapters`.

Adapters with random weights, of the rank of those that ship and on more layers. Each is asked for twice, in
turn with none: the first time it is read, checked and put into the network, the second time it is there.
Beside the time by the clock stands that of the processor, which other work on the machine does not lengthen.
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

from bench.arguments import add_json
from bench.report import Report
from distriray.adapters import AdapterSpec, Lora
from distriray.arguments import at_least, positive
from distriray.denoise import Denoiser
from distriray.landscapes import MODEL_DIR
from distriray.requests import SamplingParams

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


class Times(list[tuple[float, float]]):
    """Milliseconds by the clock, and of the processor."""

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Note what the block takes."""
        began = time.perf_counter(), time.process_time()
        yield
        self.append((1000 * (time.perf_counter() - began[0]), 1000 * (time.process_time() - began[1])))

    @property
    def medians(self) -> tuple[float, float]:
        clock, processor = map(median, zip(*self, strict=True))
        return clock, processor


def steps_of(denoiser: Denoiser, size: int, loras: Sequence[Lora], steps: int) -> Times:
    """A request's steps but for the first."""
    params = SamplingParams(
        prompt="a lake", seed=1, height=size, width=size, num_inference_steps=steps, loras=tuple(loras)
    )
    state, times = denoiser.prepare(params), Times()
    while not state.done:
        with times.one_more():
            denoiser.step(state)
    return Times(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=positive, default=20)
    parser.add_argument("--held", type=positive, default=8, help="adapters that the bound has room for")
    parser.add_argument("--size", type=positive, default=256)
    parser.add_argument("--steps", type=at_least(2), default=9)
    add_json(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL_DIR, dtype=torch.float32)
    names = [f"style-{index}" for index in range(arguments.adapters)]
    report = Report(
        f"bench.adapters: builtin:landscapes in float32, {len(names)} adapters of rank {RANK}",
        columns=("", "ms", "of the processor"),
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
        steps_of(denoiser, arguments.size, (), 3)
        before, memory = process.memory_info().rss, 0
        first_use, held, none = Times(), Times(), Times()
        for name in names:
            with first_use.one_more():
                adapters.choose([Lora(name=name)])
            with none.one_more():
                adapters.choose([])
            with held.one_more():
                adapters.choose([Lora(name=name)])
            memory = max(memory, adapters.nbytes)
        grown, counts, there = process.memory_info().rss - before, adapters.counts, adapters.held
        rows = {
            "an adapter is used for the first time": first_use,
            "one that is held": held,
            "none again": none,
        }
        for count in (0, 1, 2):
            loras = [Lora(name=name, scale=0.1) for name in there[:count]]
            what = f"a step of {arguments.size}x{arguments.size} with {count}"
            rows[what] = steps_of(denoiser, arguments.size, loras, arguments.steps)
        for what, times in rows.items():
            clock, processor = times.medians
            report.add(what, f"{clock:.1f}", f"{processor:.1f}")
    report.publish(arguments.json)
    print(
        f"{counts.loads} loaded, {counts.evictions} evicted; {len(there)} held in at most "
        f"{memory / 2**20:.2f} MiB of {arguments.held * each / 2**20:.2f}; the process has grown by "
        f"{grown / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()
