"""Denoise one image with every process that `torchrun` starts; no Ray.

    torchrun --nproc-per-node 2 examples/torchrun.py "a lake at dusk" --out lake.png

On GPUs, one a process: `--device cuda`. The model is the built-in one unless `--model` names a folder that a
diffusers pipeline was saved to.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from distriray import ParallelConfig, parallelize
from distriray.collective import connect
from distriray.landscapes import MODEL_DIR
from distriray.parallel import engine_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--address", default="127.0.0.1:29400", help="host:port for the gang's own store")
    parser.add_argument("--height", type=int, default=768)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("image.png"))
    arguments = parser.parse_args()

    if "RANK" not in os.environ:
        parser.error("no rank is in the environment; start this with torchrun, as above")
    if not (arguments.model / "model_index.json").is_file():
        parser.error(f"no diffusers pipeline was saved to {arguments.model}: it has no model_index.json")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = f"cuda:{os.environ['LOCAL_RANK']}" if arguments.device == "cuda" else "cpu"
    communicator = connect(
        rank=rank,
        world_size=world_size,
        address=arguments.address,
        timeout_s=30,
        device=device,
    )
    pipe = parallelize(
        DiffusionPipeline.from_pretrained(arguments.model).to(device),
        communicator,
        ParallelConfig(exchange="displaced", warmup_steps=4),
    )
    image = pipe(
        arguments.prompt,
        height=arguments.height,
        width=arguments.width,
        num_inference_steps=arguments.steps,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),  # every rank the same
    ).images[0]
    engine = engine_of(pipe)
    assert engine is not None
    if rank == 0:
        image.save(arguments.out)
        how = f"{world_size} ranks, {communicator.backend}"
        print(f"{arguments.out}: {how}, {engine.statistics.seconds:.3f} s for the last step")
    communicator.close()


if __name__ == "__main__":
    main()
