"""Puts the trained parts together as an ordinary diffusers folder in half precision.

python -m distriray.landscapes.training.export [--model landscapes-sd3] [--to FOLDER]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from distriray.landscapes import MODELS
from distriray.landscapes.training.transformer import (
    FLOW_CONFIG,
    TRANSFORMER_CONFIG,
    projecting,
    silent_t5,
)
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


def assemble_sd3(runs: Path) -> StableDiffusion3Pipeline:
    """The same of the averaged transformer."""
    transformer = SD3Transformer2DModel(**TRANSFORMER_CONFIG)
    transformer.load_state_dict(torch.load(runs / "transformer.pt", map_location="cpu")["average"])
    transformer.register_to_config(sample_size=32)  # what is drawn by default; positions lie in the weights
    tokenizer = CLIPTokenizer.from_pretrained(runs / "tokenizer")
    vae = AutoencoderKL.from_pretrained(runs / "vae")
    vae.register_to_config(shift_factor=0.0)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**FLOW_CONFIG),
        vae=vae,
        text_encoder=projecting(CLIPTextModel.from_pretrained(runs / "text_encoder")),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(runs / "text_encoder_2"),
        tokenizer_2=tokenizer,
        text_encoder_3=silent_t5(len(tokenizer)),
        tokenizer_3=tokenizer,
    )


ASSEMBLE: dict[str, Callable[[Path], DiffusionPipeline]] = {
    "landscapes": assemble,
    "landscapes-sd3": assemble_sd3,
}


def export(pipeline: DiffusionPipeline, to: Path) -> None:
    """Writes the pipeline to the folder `to`, in half precision."""
    pipeline.to(torch.float16).save_pretrained(to)
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer"):
            part.backend_tokenizer.model.save(str(to / name))  # what older transformers read
        elif name.startswith("text_encoder"):
            # Else transformers computes in the files' half precision beside the network's single precision.
            path = to / name / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/landscapes"))
    parser.add_argument("--model", choices=ASSEMBLE, default="landscapes")
    parser.add_argument("--to", type=Path, help="folder; the one that ships, unless given")
    arguments = parser.parse_args()
    export(ASSEMBLE[arguments.model](arguments.runs), arguments.to or MODELS[arguments.model])


if __name__ == "__main__":
    main()
