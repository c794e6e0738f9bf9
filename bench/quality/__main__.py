"""Fidelity of a gang's pictures to those of one device: `python -m bench.quality`.

Every picture is compared with the one that a single device makes of the same prompt and seed. The ranks of a
gang take turns in one process (`distriray.collective.lockstep`), which gives the pictures that separate
processes give.
Finished parts are kept in `--work`, so the command can be stopped and repeated, while the code that draws is
the same.

With the built-in model nothing is downloaded. For a model of one's own, on a GPU, with COCO's captions and
pictures, as in the paper:

    pip install -e '.[quality]'
    python -m bench.quality --model stabilityai/stable-diffusion-xl-base-1.0 --device cuda --count 5000 \\
        --prompts captions_val2014.json --reference val2014/ --rows "one device" exchange "group norm"
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from bench.arguments import add_json, side
from bench.quality.design import BASE, SHORT_STEPS, Section, by_schedulers, quick, sections
from bench.quality.figures import draw_pictures, plot_warmup
from bench.quality.judges import ALIKE_SHARE, JUST_NOTICEABLE, LandscapeJudge, MissingExtra, require
from bench.quality.prompts import Prompt, landscape_prompts, read_prompts
from bench.quality.table import Table
from bench.quality.work import Album, Job, Plan, estimate_s, make
from distriray.arguments import non_negative_number, positive, positive_number
from distriray.errors import DistrirayError, InvalidRequest
from distriray.models import BUILTIN, ModelSpec
from distriray.steps import SchedulerName


def main() -> None:
    arguments = parse()
    try:
        require("torchmetrics", "skimage")
        job = make_job(arguments)
        judge, painter = job.judge(), job.painter()
    except (MissingExtra, DistrirayError, ValueError, NotADirectoryError) as error:
        sys.exit(str(error))
    scheduler: SchedulerName = BASE.scheduler if BASE.scheduler in painter.schedulers else "euler"
    chosen = choose(arguments, scheduler, painter.schedulers, painter.has_short_steps)
    plan, album = Plan(chosen, job.at_once), Album(job.folder)
    if not arguments.report_only:
        try:
            seconds = estimate_s(painter, job, plan, album, arguments.workers)
        except InvalidRequest as error:
            sys.exit(str(error))
        del painter  # workers have their own, perhaps on the same GPU
        print(
            f"{len(list(plan))} parts, {sum(album.has(unit) for unit in plan)} of them finished; about "
            f"{seconds / 60:.0f} minutes with {arguments.workers} workers",
            flush=True,
        )
        make(job, plan, album, arguments.workers, time.monotonic() + 60 * arguments.minutes)
    table = Table(album, plan, judge)
    settings = {
        "model": arguments.model,
        "digest": job.folder.name,
        "size": job.size,
        "guidance_scale": job.guidance_scale,
        "base": BASE.method,
        "visible": f"difference above {JUST_NOTICEABLE} in CIELAB",
        "alike": f"at most {ALIKE_SHARE:.0%} of the pixels visibly different",
    }
    if isinstance(judge, LandscapeJudge):
        settings["frechet_of_other_drawings"] = judge.floor(arguments.count)
        settings["drawings"] = job.drawings
    title = f"bench.quality: {arguments.model} at {job.size}x{job.size}, each picture against one device's"
    table.report(title, chosen, arguments.seed, settings).publish(arguments.json)
    if arguments.figures:
        arguments.figures.mkdir(parents=True, exist_ok=True)
        asked = {section.title for section in chosen}
        if "in pictures" in asked:
            sheet = draw_pictures(album, plan, job.painter(), job.prompts, scheduler)
            sheet.save(arguments.figures / "patches.png", optimize=True)
        if "warm-up" in asked:
            plot_warmup(table, arguments.figures / "warmup.png", arguments.count, scheduler)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--count", type=positive, default=100, help="pictures of the main rows; others have fewer"
    )
    parser.add_argument("--rows", nargs="+", metavar="QUESTION", help="only the rows of these questions")
    parser.add_argument("--quick", action="store_true", help="five steps and a row of each kind")
    parser.add_argument(
        "--minutes", type=non_negative_number, default=float("inf"), help="begin nothing new after this"
    )
    parser.add_argument(
        "--workers", type=positive, help="processes; a thread each (default: 2 on a CPU, else 1)"
    )
    parser.add_argument("--report-only", action="store_true", help="the table of what is finished")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="where parts are kept")
    add_json(parser)
    parser.add_argument(
        "--figures", type=Path, help="draw patches.png (rows in pictures), warmup.png (warm-up) here"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next has the next")
    parser.add_argument("--model", default="builtin:landscapes", help="built in, a folder, or a Hub id")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=Path, help="one a line, or COCO's captions (.json)")
    parser.add_argument("--reference", type=Path, help="folder of pictures for the FID (not builtin)")
    parser.add_argument("--size", type=side, help="pixels of a side (default: 256 built in, 1024 else)")
    parser.add_argument(
        "--guidance", type=positive_number, help="scale (default: 4 built in, or the model's)"
    )
    arguments = parser.parse_args()
    if arguments.workers is None:
        arguments.workers = 2 if arguments.device == "cpu" else 1
    if arguments.prompts is None and not arguments.model.startswith(BUILTIN):
        parser.error(
            f"--model {arguments.model} needs --prompts: the built-in captions are of its own landscapes"
        )
    return arguments


def make_job(arguments: argparse.Namespace) -> Job:
    builtin = arguments.model.startswith(BUILTIN)
    prompts: list[Prompt]
    if arguments.prompts is None:
        prompts = landscape_prompts(arguments.count, arguments.seed)
    else:
        prompts = read_prompts(arguments.prompts, arguments.count, arguments.seed)
    job = Job(
        spec=ModelSpec(name=arguments.model),
        device=arguments.device,
        size=arguments.size or (256 if builtin else 1024),
        guidance_scale=arguments.guidance or (4.0 if builtin else None),
        at_once=20 if builtin else 1,
        prompts=tuple(prompts),
        folder=arguments.work,
        reference=arguments.reference,
    )
    return replace(job, folder=arguments.work / job.digest())


def choose(
    arguments: argparse.Namespace,
    scheduler: SchedulerName,
    taken: Collection[SchedulerName],
    has_short_steps: bool,
) -> list[Section]:
    """The sections asked for, with that scheduler as the base's, for a model that takes those `taken`."""
    full = arguments.count
    every = quick(full) if arguments.quick else sections(full, max(1, full * 2 // 5), max(1, full // 10))
    every = by_schedulers(every, scheduler, taken)
    every = [each for each in every if has_short_steps or each.title != SHORT_STEPS]
    known = list(dict.fromkeys(section.title for section in every))
    unknown = [title for title in arguments.rows or () if title not in known]
    if unknown:
        sys.exit(f"no rows {unknown}; there are {known}")
    return [section for section in every if section.title in (arguments.rows or known)]


if __name__ == "__main__":
    main()
