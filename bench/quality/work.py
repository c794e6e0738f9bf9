"""Makes and judges the pictures of all settings, by several processes, and keeps what is finished."""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from numpy.typing import NDArray

import distriray
from bench.quality.design import Section, Setting
from bench.quality.judges import Judge, LandscapeJudge
from bench.quality.painter import Painter
from bench.quality.photos import PhotoJudge
from bench.quality.prompts import Prompt
from distriray.models import BUILTIN, ModelSpec, locate

# A setting's step in steps of one device, measured on one core with the built-in U-Net at 256x256.
STEP_COST = {1: 1.0, 2: 1.6, 4: 2.0, 8: 3.3}
PICTURE_COST = 4.5  # decoding and judging

CODE = tuple(Path(distriray.__file__).parent / name for name in ("collective", "denoise", "parallel"))
"""What draws: pictures of other code are not those that a command of today measures."""

_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Unit:
    """Some pictures of one setting: what is made in one go, and kept."""

    setting: Setting
    start: int
    stop: int

    @property
    def cost(self) -> float:
        factor = STEP_COST.get(self.setting.ranks, 2.5)
        return (self.stop - self.start) * (self.setting.steps * factor + PICTURE_COST)


@dataclass(frozen=True)
class Job:
    """All that decides what the pictures look like, and where they are kept.

    Attributes:
        at_once: pictures in one unit.
        folder: where finished units lie, under a digest of the rest.
        reference: pictures for a photograph's FID.
        drawings: drawn scenes for a landscape's Fréchet distance.
    """

    spec: ModelSpec
    device: str
    size: int
    guidance_scale: float | None
    at_once: int
    prompts: tuple[Prompt, ...]
    folder: Path
    reference: Path | None = None
    drawings: int = 1000

    def painter(self) -> Painter:
        return Painter(self.spec, self.device, size=self.size, guidance_scale=self.guidance_scale)

    def judge(self) -> Judge:
        if self.spec.name.startswith(BUILTIN):
            return LandscapeJudge(self.size, self.drawings)
        return PhotoJudge(self.reference, self.device)

    def digest(self) -> str:
        """Of the model's files, the prompts, the code that draws, and what else the pictures depend on."""
        told = self.device, self.size, self.guidance_scale, self.spec.dtype, self.prompts
        total = hashlib.sha256(repr(told).encode())
        for folder in (locate(self.spec), *CODE):
            for path in sorted(folder.rglob("*")):
                if path.suffix in (".json", ".txt", ".safetensors", ".py"):
                    with path.open("rb") as file:
                        total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()[:16]


class Album:
    """The finished units of one job."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, unit: Unit) -> bool:
        return self._path(unit).exists()

    def keep(self, unit: Unit, values: dict[str, NDArray[Any]]) -> None:
        path = self._path(unit)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}")
        with partial.open("wb") as file:
            np.savez(file, **values)  # type: ignore[arg-type]
        partial.rename(path)

    def read(self, units: Iterable[Unit], *names: str) -> dict[str, NDArray[Any]]:
        """Values of the finished ones among a setting's first units, joined: all, or those named."""
        parts: list[dict[str, NDArray[Any]]] = []
        for unit in units:
            if not self.has(unit):
                break
            with np.load(self._path(unit)) as file:
                parts.append({name: file[name] for name in names or file.files})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def _path(self, unit: Unit) -> Path:
        return self._folder / unit.setting.name / f"{unit.start}-{unit.stop}.npz"


class Plan:
    """Every setting once, with as many pictures as any section asks for; single devices come first."""

    def __init__(self, sections: list[Section], at_once: int) -> None:
        self._counts: dict[Setting, int] = {}
        self._at_once = at_once
        for alone in (True, False):
            for section in sections:
                for setting in section.settings:
                    wanted = setting.alone if alone else setting
                    self._counts[wanted] = max(self._counts.get(wanted, 0), section.count)

    def units(self, setting: Setting) -> list[Unit]:
        count, size = self._counts.get(setting, 0), self._at_once
        return [Unit(setting, at, min(at + size, count)) for at in range(0, count, size)]

    def __iter__(self) -> Iterator[Unit]:
        for setting in self._counts:
            yield from self.units(setting)


def make(job: Job, plan: Plan, album: Album, workers: int, deadline: float) -> None:
    """Make and judge what the album lacks. Past `deadline` (of the monotonic clock) nothing new is begun.

    Raises:
        RuntimeError: a worker failed. What was finished is kept.
    """
    missing = [unit for unit in plan if not album.has(unit)]
    for units in (
        [unit for unit in missing if unit.setting == unit.setting.alone],  # what the others are compared with
        [unit for unit in missing if unit.setting != unit.setting.alone],
    ):
        queue = _CONTEXT.Queue()
        for unit in (*units, *[None] * workers):
            queue.put(unit)
        count = min(workers, len(units))
        crew = [
            _CONTEXT.Process(target=_work, args=(job, plan, album, queue, deadline, workers), daemon=True)
            for _ in range(count)
        ]
        for process in crew:
            process.start()
        for process in crew:
            process.join()
        if codes := [process.exitcode for process in crew if process.exitcode]:
            raise RuntimeError(
                f"workers ended with {codes}: tracebacks are above, but for those that a signal ended (-9: "
                "memory ran out); finished parts are kept"
            )


def _work(job: Job, plan: Plan, album: Album, queue: Any, deadline: float, workers: int) -> None:
    logging.set_verbosity_error()  # diffusers warns of guiders for every gang that is formed
    if workers > 1:
        torch.set_num_threads(1)
    painter, judge, parent = job.painter(), job.judge(), multiprocessing.parent_process()
    assert parent is not None
    while parent.is_alive() and (unit := queue.get()) is not None:
        if time.monotonic() > deadline:
            return
        started = time.monotonic()
        prompts = list(job.prompts[unit.start : unit.stop])
        paint = painter.paint(unit.setting, prompts)
        pictures = painter.decode(paint.latents)
        values: dict[str, NDArray[Any]] = {
            "latents": paint.latents,
            "synchronous": paint.synchronous_steps,
        }
        if unit.setting == unit.setting.alone:
            values["pictures"] = alone = pictures
        else:
            kept = album.read(plan.units(unit.setting.alone), "pictures")["pictures"]
            alone = kept[unit.start : unit.stop]
        values |= judge.measure(pictures, alone, prompts)
        album.keep(unit, values)
        print(
            f"{unit.setting.name} {unit.start}-{unit.stop}: {values['psnr'].mean():.1f} dB, "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )


def estimate_s(painter: Painter, job: Job, plan: Plan, album: Album, workers: int) -> float:
    """Seconds that `make` will take, from two steps timed here.

    Raises:
        InvalidRequest: pictures of this size cannot have all the patches that are planned.
    """
    torch.set_num_threads(1 if workers > 1 else torch.get_num_threads())
    painter.check(unit.setting for unit in plan)
    alone = next(iter(plan)).setting.alone
    painter.paint(replace(alone, steps=2), job.prompts[:1])
    started = time.monotonic()
    painter.paint(replace(alone, steps=2), job.prompts[:1])
    step_s = (time.monotonic() - started) / 2
    return step_s * sum(unit.cost for unit in plan if not album.has(unit)) / workers
