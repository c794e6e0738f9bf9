"""Projection from one device to N: `python -m bench.projection`.

One rank's share of a denoising step is measured by itself, its peers' buffers filled, for gangs of 1, 2, 4
and 8, with the guidance branches split between the halves of the gang and without. The bytes it sends to each
peer and the moments at which it sends and waits are noted, and replayed against a model of the link: what is
not there when a rank waits for it is exposed, of a fresh value all of it. A column named projected is not a
measurement. Not modelled: communication kernels that take a part of the device, peers that are late, and
memory that devices share.

On a GPU this takes the U-Net of SDXL with random weights, in float16:

    python -m bench.projection --device cuda

On a CPU it takes the built-in model, and checks itself: two ranks are measured for real, too. There each
share is measured while another core computes another rank's, since two busy cores slow each other down, and
the link is this machine's loopback as measured over gloo, whose bytes the cores themselves move.
"""

from __future__ import annotations

import argparse
import os
from statistics import median
from typing import Any

import torch

from bench.arguments import add_json, side
from bench.projection.links import Link, add_links
from bench.projection.rounds import Round, alone, cases, measure, slowest
from bench.projection.share import Share
from bench.report import Report
from distriray import ParallelConfig
from distriray.arguments import at_least, positive
from distriray.collective import launch
from distriray.config import MIXES

SIZES = {"cpu": [256, 512, 768], "cuda": [1024, 2048, 3840]}
PAPER = {("sdxl", 3840, 2): "1.8x", ("sdxl", 3840, 4): "3.4x", ("sdxl", 3840, 8): "6.1x"}
COLUMNS = (
    "size",
    "guidance",
    "ranks",
    "exchange",
    "link",
    "its latency, us",
    "its GB/s",
    "projected faster, a step",
    "projected faster, an image",
    "paper, A100s, an image",
    "share of a step, s",
    "projected exposed, s",
    "projected step, s",
    "sent a step, MiB",
    "most to one peer, MiB",
    "least to one peer, MiB",
    "measured step, s",
    "projected of measured",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--model",
        choices=("landscapes", "sdxl"),
        help="the U-Net; default landscapes on a CPU, sdxl (with random weights) on a GPU",
    )
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--sizes", type=side, nargs="+", help="pixels of a side")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--exchange", choices=tuple(MIXES), nargs="+", default=["displaced", "sync"])
    add_links(parser, "; CPUs: the loopback, measured")
    parser.add_argument(
        "--steps", type=positive, default=5, help="steps after the warm-up that count, a turn"
    )
    parser.add_argument(
        "--rounds", type=positive, help="default: 7 on CPUs, which other work may disturb, else 3"
    )
    parser.add_argument("--image-steps", type=positive, default=50)
    parser.add_argument(
        "--warmup-steps",
        type=at_least(0),
        help="synchronous ones of an image; default: as the exchange needs",
    )
    add_json(parser)
    arguments = parser.parse_args()
    arguments.model = arguments.model or {"cpu": "landscapes", "cuda": "sdxl"}[arguments.device]
    arguments.dtype = arguments.dtype or {"cpu": "float32", "cuda": "float16"}[arguments.device]
    arguments.rounds = arguments.rounds or {"cpu": 7, "cuda": 3}[arguments.device]
    arguments.sizes = arguments.sizes or SIZES[arguments.device]
    arguments.ranks = sorted({1, *arguments.ranks})

    processes = min(2, os.cpu_count() or 1) if arguments.device == "cpu" else 1
    backend = "gloo" if arguments.device == "cpu" and processes > 1 else None  # a link, and not memory
    links = ["loopback"] if processes > 1 else [link.name for link in arguments.links]
    report = Report(
        f"bench.projection: {arguments.model} in {arguments.dtype} on {device_name(arguments.device)}, one "
        f"step with guidance, and an image of {arguments.image_steps} steps",
        COLUMNS,
        seed=0,
        settings={**vars(arguments), "links": links},
    )
    for size in arguments.sizes:
        of_size = argparse.Namespace(**{**vars(arguments), "sizes": [size]})
        found = launch(processes, measure, of_size, device=arguments.device, backend=backend)
        tabulate(report, [slowest(taken) for taken in zip(*found, strict=True)], of_size)
        if arguments.json:  # what is cut off has lost one size
            report.write(arguments.json)
    report.print()


def links_of(rounds: list[Round], arguments: argparse.Namespace) -> list[Link]:
    """The links to project for: on CPUs the loopback, median over the rounds."""
    measured = [taken.loopback for taken in rounds if taken.loopback]
    if not measured:
        return list(arguments.links)
    return [
        Link(
            "loopback",
            median(link.latency_s for link in measured),
            median(link.bytes_per_s for link in measured),
            hides=False,
        )
    ]


def tabulate(report: Report, rounds: list[Round], arguments: argparse.Namespace) -> None:
    """One row for each case and link; ratios are medians of the rounds' ratios."""

    for case in cases(arguments.sizes, arguments.ranks, arguments.exchange):
        one_rank = alone(case, arguments.exchange)
        pairs = [(taken.shares[one_rank], taken.shares[case]) for taken in rounds]
        sent = pairs[0][1].later[-1].sent or {0: 0}
        warmup = ParallelConfig(warmup_steps=arguments.warmup_steps).warmup_of(MIXES[case.exchange])

        def image(share: Share, link: Link, warmup: Any = warmup) -> float:
            return share.image(link, arguments.image_steps, warmup)

        for link in links_of(rounds, arguments):
            measured = [taken.measured[case] for taken in rounds if case in taken.measured]
            of_measured = [
                taken.shares[case].step(link) / taken.measured[case]
                for taken in rounds
                if case in taken.measured
            ]
            report.add(
                f"{case.size}x{case.size}",
                "split" if case.split else "together",
                str(case.ranks),
                case.exchange if case.exchanges else "-",
                link.name if case.ranks > 1 else "-",
                f"{1e6 * link.latency_s:.0f}" if case.ranks > 1 else "-",
                f"{link.bytes_per_s / 1e9:.2f}" if case.ranks > 1 else "-",
                f"{median(one.seconds / share.step(link) for one, share in pairs):.2f}x",
                f"{median(image(one, link) / image(share, link) for one, share in pairs):.2f}x",
                PAPER.get((arguments.model, case.size, case.ranks), "-"),
                f"{median(share.seconds for _, share in pairs):.4f}",
                f"{median(share.exposed(link) for _, share in pairs):.4f}",
                f"{median(share.step(link) for _, share in pairs):.4f}",
                f"{sum(sent.values()) / 2**20:.2f}",
                f"{max(sent.values()) / 2**20:.2f}",
                f"{min(sent.values()) / 2**20:.2f}",
                f"{median(measured):.4f}" if measured else "-",
                f"{median(of_measured):.3f}x" if measured else "-",
            )
            if case.ranks == 1:
                break


def device_name(device: str) -> str:
    """As people call it."""
    return str(torch.cuda.get_device_name()) if device == "cuda" else "a CPU core a rank"


if __name__ == "__main__":
    main()
