"""Evaluation of the built-in model: reconstruction, the checker on drawn scenes, and prompt accuracy.

python -m distriray.landscapes.evaluate [--sizes 256 512] [--count 200] [--sheet docs/images/landscapes.png]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from distriray.landscapes import MODEL_DIR
from distriray.landscapes.captions import Labels, caption
from distriray.landscapes.checker import Checker, agreement, load_checker
from distriray.landscapes.draw import draw
from distriray.landscapes.pictures import psnr, to_float
from distriray.landscapes.scene import HELD_OUT_SEED, sample_scene

FIRST_SCENE = HELD_OUT_SEED + 10_000
SHEET_PROMPTS = (
    "a still lake mirrors snowy mountains at sunset, the sun low in the middle",
    "a meadow with many pine trees in summer, blue sky with clouds",
    "full moon high on the right over a lake at night, stars, rocky mountains",
    "sand dunes under an orange evening sky, no trees",
    "autumn, a few leafy trees on a wide meadow, rolling hills at dawn",
    "winter night, a lone fir tree in the snow, starry sky",
    "a calm lake in the morning, pink sky, the sun on the left, soft hills",
    "a desert at midday, jagged rocky peaks, the sun high on the left",
    "a forest of spruce trees at a lake, snow-capped peaks, daylight",
    "autumn evening by the water, several round trees, cloudy",
    "moon near the horizon on the left, calm water, no mountains, many stars",
    "dreamy winter landscape at sunrise with white peaks and pine trees",
)


def generate(
    pipeline: DiffusionPipeline, prompts: list[str], size: int, steps: int, guidance: float, seed: int
) -> NDArray[np.uint8]:
    """Pictures of the prompts, (N, size, size, 3) uint8; picture i starts from noise of seed `seed + i`."""
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    images = pipeline(
        prompts,
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type="np",
    ).images
    return (np.asarray(images) * 255 + 0.5).astype(np.uint8)


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, count: int, size: int = 256) -> float:
    """Mean PSNR in dB of held-out scenes after encoding and decoding."""
    pictures = to_float(
        np.stack([draw(sample_scene(FIRST_SCENE + index), size, size) for index in range(count)])
    )
    return float(np.mean([psnr(vae(picture[None]).sample, picture[None]).item() for picture in pictures]))


def score(pairs: list[tuple[Labels, Labels]]) -> dict[str, float]:
    """The share of stated attributes that are seen: each attribute's, and all together under "overall"."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for said, seen in pairs:
        for name, right in agreement(said, seen).items():
            hits[name].append(right)
            hits["overall"].append(right)
    return {name: round(float(np.mean(values)), 4) for name, values in hits.items()}


def checker_on_drawings(checker: Checker, count: int, size: int) -> dict[str, float]:
    """The checker's accuracy on held-out drawings, where the truth is known."""
    pairs = []
    for index in range(count):
        scene = sample_scene(FIRST_SCENE + 5_000 + index)
        truth = {name: value for name, value in vars(scene).items() if name != "seed" and value is not None}
        pairs.append((truth, checker.read(draw(scene, size, size)[None])[0]))
    return score(pairs)


def held_out_captions(count: int) -> list[tuple[str, Labels]]:
    """Captions of scenes that no training saw, and what each states."""
    rng = np.random.default_rng(FIRST_SCENE)
    return [caption(sample_scene(FIRST_SCENE + index), rng) for index in range(count)]


def prompt_accuracy(
    pipeline: DiffusionPipeline,
    checker: Checker,
    count: int,
    size: int,
    arguments: argparse.Namespace,
) -> dict[str, float]:
    """Of what held-out captions state, the share that the checker sees in the generated pictures."""
    captions = held_out_captions(count)
    pairs = []
    for at in range(0, count, arguments.batch):
        part = captions[at : at + arguments.batch]
        texts = [text for text, _ in part]
        pictures = generate(pipeline, texts, size, arguments.steps, arguments.guidance, FIRST_SCENE + at)
        pairs += list(zip([said for _, said in part], checker.read(pictures), strict=True))
    return score(pairs)


def contact_sheet(pictures: NDArray[np.uint8], prompts: tuple[str, ...], columns: int = 4) -> Image.Image:
    """Pictures in rows of `columns` with the prompts beneath them."""
    side, foot, gap = pictures.shape[1], 44, 8
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + foot + gap) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        x, y = gap + index % columns * (side + gap), gap + index // columns * (side + foot + gap)
        sheet.paste(Image.fromarray(picture), (x, y))
        pen.multiline_text(
            (x, y + side + 4), _wrapped(prompt, font, side), fill="black", font=font, spacing=2
        )
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 512])
    parser.add_argument("--count", type=int, default=200, help="held-out captions at each size")
    parser.add_argument("--drawings", type=int, default=400, help="drawn scenes for the checker")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--sheet", type=Path, help="also draw the contact sheet, into this file")
    arguments = parser.parse_args()

    pipeline = DiffusionPipeline.from_pretrained(arguments.model).to(arguments.device)
    pipeline.set_progress_bar_config(disable=True)
    checker = load_checker()
    if arguments.sheet:
        pictures = generate(pipeline, list(SHEET_PROMPTS), 256, arguments.steps, arguments.guidance, 0)
        contact_sheet(pictures, SHEET_PROMPTS).save(arguments.sheet, optimize=True)
    if arguments.drawings:
        print(f"reconstruction at 256: {reconstruction(pipeline.vae.cpu().float(), 32):.2f} dB", flush=True)
        print(
            "checker on drawings:",
            json.dumps(checker_on_drawings(checker, arguments.drawings, 256)),
            flush=True,
        )
        pipeline.vae.to(arguments.device)
    for size in arguments.sizes:
        scores = prompt_accuracy(pipeline, checker, arguments.count, size, arguments)
        print(f"prompt accuracy at {size}, {arguments.count} captions:", json.dumps(scores), flush=True)


if __name__ == "__main__":
    main()
