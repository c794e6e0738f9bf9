"""What ControlNets add to a step, alone and in gangs: `python -m bench.control`.

ControlNets of the model's own layout with weights that are not trained, which take the time that trained ones
take. The ranks of a gang are in lock-step, each in a thread of one process; what stands in the table is the
processor's time of such a thread, the mean of the ranks.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory

import torch
from diffusers import ControlNetModel, StableDiffusionXLPipeline
from PIL import Image

from bench.report import Report
from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.config import ExchangeMode
from distriray.controls import ControlNetSpec
from distriray.denoise import Denoiser
from distriray.landscapes import MODEL_DIR
from distriray.picture import Picture
from distriray.requests import Control, SamplingParams

NAMES = "first", "second"
EXCHANGES: tuple[ExchangeMode, ...] = ("sync", "displaced")


def write_controlnet(folder: Path, pipeline: StableDiffusionXLPipeline, seed: int) -> None:
    """One that begins from the U-Net's own weights, and adds noise of no consequence."""
    torch.manual_seed(seed)
    network = ControlNetModel.from_unet(pipeline.unet)
    for layer in (*network.controlnet_down_blocks, network.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=1e-3)
    network.save_pretrained(folder)


def milliseconds(
    communicator: Communicator, *, folder: Path, exchange: ExchangeMode, size: int, steps: int
) -> list[float]:
    """The processor's, of this rank for a step without ControlNets, with one and with two: medians."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL_DIR, dtype=torch.float32)
    gang = connect("local") if communicator.world_size == 1 else communicator
    config = ParallelConfig(exchange=exchange, cfg_parallel=False, warmup_steps=1)
    denoiser = Denoiser(parallelize(pipeline, gang, config))
    for name in NAMES:
        denoiser.controls.load(ControlNetSpec(name=name, source=str(folder / name)))
    found, grey = [], Picture.of(Image.new("RGB", (size, size), "grey"))
    for count in range(len(NAMES) + 1):
        control = tuple(Control(name=name, image=grey) for name in NAMES[:count])
        state = denoiser.prepare(
            SamplingParams(
                prompt="a lake", seed=1, height=size, width=size, num_inference_steps=steps, control=control
            )
        )
        times = []
        while not state.done:
            began = time.thread_time()
            denoiser.step(state)
            times.append(1000 * (time.thread_time() - began))
        denoiser.settle(state)
        found.append(median(times[2:]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gangs", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--json", help="also write the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(
        f"bench.control: builtin:landscapes in float32, {arguments.size}x{arguments.size}, guided",
        columns=("ranks", "exchange", "ms a step of a rank", "with one", "with two", "share of one"),
        seed=0,
        settings=vars(arguments),
    )
    with TemporaryDirectory() as folder:
        pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL_DIR, dtype=torch.float32)
        for seed, name in enumerate(NAMES):
            write_controlnet(Path(folder) / name, pipeline, seed)
        for ranks in arguments.gangs:
            for exchange in EXCHANGES if ranks > 1 else EXCHANGES[:1]:
                measure = partial(
                    milliseconds,
                    folder=Path(folder),
                    exchange=exchange,
                    size=arguments.size,
                    steps=arguments.steps,
                )
                by_rank = run_in_lockstep(ranks, measure)
                without, one, two = map(fmean, zip(*by_rank, strict=True))
                share = f"{100 * (one - without) / one:.0f} %"
                report.add(str(ranks), exchange, f"{without:.0f}", f"{one:.0f}", f"{two:.0f}", share)
    report.publish(arguments.json)


if __name__ == "__main__":
    main()
