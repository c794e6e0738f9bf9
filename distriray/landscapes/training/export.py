"""Puts the trained parts together as an ordinary diffusers folder in half precision.

python -m distriray.landscapes.training.export [--to distriray/landscapes/model]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from distriray.landscapes import MODEL_DIR
from distriray.landscapes.training.unet import SCHEDULER_CONFIG, UNET_CONFIG


def assemble(runs: Path) -> StableDiffusionXLPipeline:
    """The pipeline made of the averaged U-Net and the parts in `runs`."""
    unet = UNet2DConditionModel(**UNET_CONFIG)
    unet.load_state_dict(torch.load(runs / "unet.pt", map_location="cpu")["average"])
    tokenizer = CLIPTokenizer.from_pretrained(runs / "tokenizer")
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(runs / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(runs / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(runs / "text_encoder_2"),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULER_CONFIG),
        add_watermarker=False,
    )


def export(runs: Path, to: Path) -> None:
    """Writes the pipeline to the folder `to`, in half precision."""
    pipeline = assemble(runs)
    pipeline.to(torch.float16).save_pretrained(to)
    for name in ("tokenizer", "tokenizer_2"):
        pipeline.tokenizer.backend_tokenizer.model.save(str(to / name))  # what older transformers read
    for name in ("text_encoder", "text_encoder_2"):
        # Else transformers computes in the files' half precision beside the U-Net's single precision.
        config = to / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/landscapes"))
    parser.add_argument("--to", type=Path, default=MODEL_DIR)
    arguments = parser.parse_args()
    export(arguments.runs, arguments.to)


if __name__ == "__main__":
    main()
