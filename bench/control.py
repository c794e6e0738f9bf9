"""The cost of ControlNets and IP-Adapters in a step, alone and in gangs: `python -m bench.control`.

ControlNets of the model's own layout and an IP-Adapter of four tokens, with weights that are not trained,
which take the time that trained ones take. The ranks of a gang are in lock-step, each in a thread of one
process; what stands in the table is the processor's time of such a thread, the mean of the ranks.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from bench.arguments import add_json
from bench.report import Report
from distriray import ParallelConfig, parallelize
from distriray.arguments import at_least, positive
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.config import ExchangeMode
from distriray.controls import Control, ControlNetSpec
from distriray.denoise import Denoiser
from distriray.ip_adapters import IPAdapter, IPAdapterSpec
from distriray.landscapes import MODEL_DIR
from distriray.picture import Picture
from distriray.requests import SamplingParams

NAMES = "first", "second"
TOKENS, WIDTH = 4, 64
"""Of the IP-Adapter, and of what its image encoder gives it."""
EXCHANGES: tuple[ExchangeMode, ...] = ("sync", "displaced")


def write_controlnet(folder: Path, pipeline: StableDiffusionXLPipeline, seed: int) -> None:
    """One that begins from the U-Net's own weights, and adds noise of no consequence."""
    torch.manual_seed(seed)
    network = ControlNetModel.from_unet(pipeline.unet)
    for layer in (*network.controlnet_down_blocks, network.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=1e-3)
    network.save_pretrained(folder)


def write_ip_adapter(folder: Path, pipeline: StableDiffusionXLPipeline, seed: int) -> None:
    """One as the first ones were, with a small image encoder: it reads a picture before the first step."""
    torch.manual_seed(seed)
    unet = pipeline.unet
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(hidden_size=48, intermediate_size=48, num_hidden_layers=1, projection_dim=WIDTH)
    )
    encoder.save_pretrained(folder / "image_encoder")
    width = unet.config.cross_attention_dim
    weights = {
        "image_proj.proj.weight": 0.1 * torch.randn(TOKENS * width, WIDTH),
        "image_proj.proj.bias": torch.zeros(TOKENS * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    attending = [name for name in unet.attn_processors if "attn2" in name]
    for index, name in enumerate(attending):
        inner = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for projection in ("to_k_ip", "to_v_ip"):
            weights[f"ip_adapter.{2 * index + 1}.{projection}.weight"] = 0.1 * torch.randn(inner, width)
    save_file(weights, folder / "ip-adapter.safetensors")


def milliseconds(
    communicator: Communicator, *, folder: Path, exchange: ExchangeMode, size: int, steps: int
) -> list[float]:
    """The processor's, of this rank, for a step alone, with one ControlNet, two, an IP-Adapter: medians."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL_DIR, dtype=torch.float32)
    gang = connect("local") if communicator.world_size == 1 else communicator
    config = ParallelConfig(exchange=exchange, cfg_parallel=False, warmup_steps=1)
    denoiser = Denoiser(parallelize(pipeline, gang, config))
    for name in NAMES:
        denoiser.controls.load(ControlNetSpec(name=name, source=str(folder / name)))
    denoiser.ip_adapters.load(IPAdapterSpec(name="style", source=str(folder)))
    found, grey = [], Picture.of(Image.new("RGB", (size, size), "grey"))
    controls = tuple(Control(name=name, image=grey) for name in NAMES)
    cases: tuple[dict[str, Any], ...] = (
        {},
        {"control": controls[:1]},
        {"control": controls},
        {"ip_adapters": (IPAdapter(name="style", image=grey),)},
    )
    plain = SamplingParams(prompt="a lake", seed=1, height=size, width=size, num_inference_steps=steps)
    for case in cases:
        state = denoiser.prepare(plain.model_copy(update=case))
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
    parser.add_argument("--gangs", type=positive, nargs="+", default=[1, 2, 4])
    parser.add_argument("--size", type=positive, default=256)
    parser.add_argument("--steps", type=at_least(3), default=9)
    add_json(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(
        f"bench.control: builtin:landscapes in float32, {arguments.size}x{arguments.size}, guided",
        columns=(
            "ranks",
            "exchange",
            "ms a step of a rank",
            "with one ControlNet",
            "with two",
            "share of one",
            "with an IP-Adapter",
            "its share",
        ),
        seed=0,
        settings=vars(arguments),
    )
    with TemporaryDirectory() as folder:
        pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL_DIR, dtype=torch.float32)
        for seed, name in enumerate(NAMES):
            write_controlnet(Path(folder) / name, pipeline, seed)
        write_ip_adapter(Path(folder), pipeline, len(NAMES))
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
                without, one, two, adapted = map(fmean, zip(*by_rank, strict=True))
                of_one, of_adapted = (f"{100 * (more - without) / more:.0f} %" for more in (one, adapted))
                report.add(
                    str(ranks),
                    exchange,
                    *(f"{each:.0f}" for each in (without, one, two)),
                    of_one,
                    f"{adapted:.0f}",
                    of_adapted,
                )
    report.publish(arguments.json)


if __name__ == "__main__":
    main()
