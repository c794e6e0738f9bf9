"""The rows of the table, from what the album holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.quality.design import Section, Setting
from bench.quality.judges import Judge, alike
from bench.quality.work import Album, Plan
from bench.report import Report

COLUMNS = (
    "question",
    "patches",
    "steps",
    "scheduler",
    "method",
    "pictures",
    "PSNR, dB",
    "against base, dB",
    "SSIM",
    "visible pixels",
    "alike",
    "synchronous steps",
)


class Table:
    """Aggregates an album, section by section.

    A row of fewer pictures than its section asks for is not finished, and says so by its count; a setting of
    which there is none is left out.
    """

    def __init__(self, album: Album, plan: Plan, judge: Judge) -> None:
        self._album = album
        self._plan = plan
        self._judge = judge

    def report(self, title: str, sections: list[Section], seed: int, settings: dict[str, Any]) -> Report:
        report = Report(title, (*COLUMNS, *self._judge.columns), seed=seed, settings=settings)
        for question, setting, count in _rows(sections):
            measures = self.measures(setting, count)
            if measures:
                report.add(question, *self._cells(setting, measures))
        return report

    def measures(self, setting: Setting, count: int) -> dict[str, NDArray[Any]]:
        """What is known of a setting's first `count` pictures; empty if there are none."""
        values = self._album.read(self._plan.units(setting))
        return {name: array[:count] for name, array in values.items() if name not in ("latents", "pictures")}

    def _cells(self, setting: Setting, measures: dict[str, NDArray[Any]]) -> tuple[str, ...]:
        count = len(measures["psnr"])
        alone = self.measures(setting.alone, count)
        single = setting == setting.alone
        return (
            str(setting.patches),
            str(setting.steps),
            setting.scheduler,
            setting.method,
            str(count),
            "-" if single else _mean(measures["psnr"]),
            self._gain(setting, measures["psnr"]),
            f"{measures['ssim'].mean():.4f}",
            f"{measures['visible'].mean():.2%}",
            f"{alike(measures).mean():.0%}",
            "-"
            if setting.patches == 1 or setting.exchange == "none"
            else f"{measures['synchronous'].mean():.1f}",
            *self._judge.summarize(measures, alone),
        )

    def _gain(self, setting: Setting, psnr: NDArray[np.float64]) -> str:
        """What a picture gains over the base method with the same prompt and seed."""
        plain = self.measures(setting.plain, len(psnr)).get("psnr")
        if setting.patches == 1 or setting == setting.plain or plain is None or len(plain) < len(psnr):
            return "-"
        return _mean(psnr - plain, sign="+")


def _mean(values: NDArray[np.float64], sign: str = "") -> str:
    """Mean and the half width of its 95 % interval, by Student's distribution: pictures may be few."""
    from scipy.stats import t  # which comes with scikit-image

    count = len(values)
    if count < 2:
        return f"{values.mean():{sign}.1f}"
    half = t.ppf(0.975, count - 1) * values.std(ddof=1) / count**0.5
    return f"{values.mean():{sign}.1f} ± {half:.1f}"


def _rows(sections: list[Section]) -> Iterator[tuple[str, Setting, int]]:
    """Each question's settings, once, with the most pictures that the question has of it."""
    for title in dict.fromkeys(section.title for section in sections):
        counts: dict[Setting, int] = {}
        for section in sections:
            for setting in section.settings if section.title == title else ():
                counts[setting] = max(counts.get(setting, 0), section.count)
        yield from ((title, setting, count) for setting, count in counts.items())
