"""The same pictures by one device, by patches that do not talk and by a gang; and PSNR against warm-up."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from bench.quality.design import BASE, PICTURED, SHOWN
from bench.quality.painter import Painter
from bench.quality.prompts import Prompt
from bench.quality.table import Table
from bench.quality.work import Album, Plan
from distriray.steps import SchedulerName

GAP, LINE, LEFT = 6, 18, 150


def draw_pictures(
    album: Album, plan: Plan, painter: Painter, prompts: tuple[Prompt, ...], scheduler: SchedulerName
) -> Image.Image:
    """The rows of `PICTURED`, with each picture's PSNR against one device beneath it.

    Raises:
        ValueError: the album lacks a setting.
    """
    font = ImageFont.load_default(size=13)
    rows = []
    for words, pictured in PICTURED.items():
        setting = replace(pictured, scheduler=scheduler)
        values = album.read(plan.units(setting), "latents", "psnr")
        if not values:
            raise ValueError(f"no pictures of {setting.name} for the figure; run it first")
        rows.append((words, setting, painter.decode(values["latents"][:SHOWN]), values["psnr"]))
    count, side = rows[0][2].shape[:2]
    captions = [textwrap.wrap(prompt.text, side // 7) for prompt in prompts[:count]]
    head = LINE * max(map(len, captions)) + GAP
    width = LEFT + count * (side + GAP)
    sheet = Image.new("RGB", (width, head + len(rows) * (side + LINE + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, lines in enumerate(captions):
        pen.multiline_text((LEFT + index * (side + GAP), 2), "\n".join(lines), "black", font)
    for row, (words, setting, pictures, psnr) in enumerate(rows):
        top = head + row * (side + LINE + GAP)
        pen.multiline_text((GAP, top), textwrap.fill(words, LEFT // 8), "black", font)
        for index, picture in enumerate(pictures):
            left = LEFT + index * (side + GAP)
            sheet.paste(Image.fromarray(picture), (left, top))
            if setting.patches > 1:
                pen.text((left, top + side + 1), f"PSNR {psnr[index]:.1f} dB", "black", font)
    return sheet


def plot_warmup(table: Table, path: Path, count: int, scheduler: SchedulerName) -> None:
    """PSNR against the synchronous steps at the start, for the gangs of the base point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(
        xlabel="synchronous steps at the start, of 20",
        ylabel="PSNR against one device, dB",
        title=f"Displaced patches, {scheduler}, stale group norm, no prediction",
    )
    for patches, colour in ((4, "tab:blue"), (8, "tab:orange")):
        base = replace(BASE, patches=patches, scheduler=scheduler)
        psnr = {
            warmup: table.measures(replace(base, warmup=warmup), count).get("psnr")
            for warmup in (0, 1, 2, 4, 8)
        }
        known = {warmup: values.mean() for warmup, values in psnr.items() if values is not None}
        axes.plot(list(known), list(known.values()), "o-", color=colour, label=f"{patches} patches")
        naive = table.measures(replace(base, exchange="none"), count).get("psnr")
        if naive is not None:
            axes.axhline(
                naive.mean(), color=colour, linestyle=":", label=f"{patches} patches without exchange"
            )
    axes.legend()
    figure.savefig(path, dpi=120)
