"""Draws one prompt and seed plain, with each adapter that ships, and with all of them.

python -m distriray.landscapes.training.adapter_sheet docs/images/adapters.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

from distriray.landscapes import ADAPTERS_DIR, MODEL_DIR
from distriray.landscapes.evaluate import contact_sheet, generate

PROMPT = "a still lake mirrors snowy mountains at sunset, the sun low in the middle"
SHARED_SCALE = 0.6
"""Of each adapter where there are several."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sheet", type=Path)
    parser.add_argument("--adapters", type=Path, default=ADAPTERS_DIR)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL_DIR, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    names = [file.stem for file in sorted(arguments.adapters.glob("*.safetensors"))]
    for name in names:
        pipeline.load_lora_weights(arguments.adapters, weight_name=f"{name}.safetensors", adapter_name=name)
    sets = [{}, *({name: 1.0} for name in names), dict.fromkeys(names, SHARED_SCALE)]
    pictures, titles = [], []
    for scales in sets:
        if scales:
            pipeline.enable_lora()
            pipeline.set_adapters(list(scales), list(scales.values()))
        else:
            pipeline.disable_lora()
        pictures += list(
            generate(
                pipeline,
                [arguments.prompt],
                arguments.size,
                arguments.steps,
                arguments.guidance,
                arguments.seed,
            )
        )
        titles.append(", ".join(f"{name} {scale:g}" for name, scale in scales.items()) or "no adapter")
    contact_sheet(np.stack(pictures), tuple(titles)).save(arguments.sheet, optimize=True)


if __name__ == "__main__":
    main()
