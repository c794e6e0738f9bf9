"""How large a state between two steps is, and what saving, restoring and previewing it takes:
`python -m bench.state`.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from diffusers import StableDiffusionXLPipeline

from bench.arguments import add_json, side
from bench.report import Report
from distriray.arguments import positive
from distriray.denoise import Denoiser, DenoiseState
from distriray.landscapes import MODEL_DIR
from distriray.requests import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=side, nargs="+", default=[256, 512, 1024], help="pixels of a side")
    parser.add_argument("--schedulers", nargs="+", default=["ddim", "dpmpp-2m", "unipc"])
    parser.add_argument("--repeats", type=positive, default=20)
    add_json(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL_DIR, torch_dtype=torch.float32)
    denoiser = Denoiser(pipeline)
    report = Report(
        "bench.state: builtin:landscapes in float32, one image with guidance, after two steps",
        columns=(
            "size",
            "scheduler",
            "KiB",
            "save ms",
            "restore ms",
            "step ms",
            "restore of a step",
            "preview ms",
            "preview of an image",
        ),
        seed=1,
        settings=vars(arguments),
    )
    for size in arguments.sizes:
        for scheduler in arguments.schedulers:
            params = SamplingParams(
                prompt="a lake at dusk, snowy mountains",
                seed=1,
                height=size,
                width=size,
                num_inference_steps=25,
                scheduler=scheduler,
            )
            state = denoiser.prepare(params)
            denoiser.step(state)
            started = time.perf_counter()
            denoiser.step(state)
            step_ms = 1000 * (time.perf_counter() - started)
            saves, restores, previews = [], [], []
            for _ in range(arguments.repeats):
                started = time.perf_counter()
                blob = state.to_bytes()
                saves.append(1000 * (time.perf_counter() - started))
                started = time.perf_counter()
                DenoiseState.from_bytes(blob)
                restores.append(1000 * (time.perf_counter() - started))
                started = time.perf_counter()
                denoiser.preview(state)
                previews.append(1000 * (time.perf_counter() - started))
            report.add(
                f"{size}x{size}",
                scheduler,
                f"{len(blob) / 1024:.0f}",
                f"{median(saves):.2f}",
                f"{median(restores):.2f}",
                f"{step_ms:.0f}",
                f"{median(restores) / step_ms:.1%}",
                f"{median(previews):.0f}",
                f"{median(previews) / (step_ms * state.num_steps):.2%}",
            )
    report.publish(arguments.json)


if __name__ == "__main__":
    main()
