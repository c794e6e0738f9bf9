"""How long a step takes: a measured profile, corrected by what is observed since."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Shape = tuple[int, int, int]


class Entry(BaseModel):
    """One measured case: `height` and `width` in pixels, times in seconds (medians).

    `step_s` is a displaced step and `sync_step_s` a synchronous one, such as the first after a regrouping;
    None means that it takes as long. `prepare_s` and `decode_s` are what comes before and after the steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gang: Count
    height: Count
    width: Count
    batch: Count = 1
    step_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    sync_step_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    prepare_s: Seconds = 0.0
    decode_s: Seconds = 0.0


class Profile(BaseModel):
    """What a host measures at start and keeps by model, device and version.

    `regroup_s` is the time from a yield to the first step in another gang, without the synchronous step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    device: str
    version: str
    entries: Annotated[tuple[Entry, ...], Field(min_length=1)]
    regroup_s: Seconds = 0.0

    @classmethod
    def load(cls, path: Path | str) -> Profile:
        """Read a profile; raises OSError, or pydantic.ValidationError naming what is wrong in it."""
        return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))

    def save(self, path: Path | str) -> None:
        """Write it as JSON, replacing the file in one go."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f"{target.name}.draft")
        draft.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        draft.replace(target)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A time in seconds and the relative error to expect of it (0.1: about 10 %)."""

    seconds: float
    error: float


class LatencyModel:
    """Seconds for every (gang size, height, width, batch), measured or not.

    Between measured sizes times are interpolated on logarithmic scales of the work (pixels) and of the gang;
    beyond them the last slope goes on. `observe` corrects every later answer.

    Args:
        profile: the measurements to start from.
        window: how many observations of one case count; their median is the correction, so that fewer
            than half of them can be outliers.
    """

    def __init__(self, profile: Profile, window: int = 31) -> None:
        self.profile = profile
        self._window = window
        self._by_gang: dict[int, list[Entry]] = {}
        for entry in sorted(profile.entries, key=lambda e: (e.gang, e.height * e.width, e.batch)):
            self._by_gang.setdefault(entry.gang, []).append(entry)
        self._observed: dict[tuple[int, int, int, int], deque[float]] = {}
        self._recent: deque[float] = deque(maxlen=4 * window)
        self._cache: dict[tuple[str, int, int, int, int], float] = {}
        self._error_cache: dict[tuple[int, int, int, int], float] = {}

    def step_s(self, gang: int, height: int, width: int, batch: int) -> float:
        """One displaced step, in seconds."""
        raise NotImplementedError

    def sync_step_s(self, gang: int, height: int, width: int, batch: int) -> float:
        """One synchronous step, in seconds."""
        raise NotImplementedError

    def prepare_s(self, gang: int, height: int, width: int, batch: int) -> float:
        """Everything before the first step, in seconds."""
        raise NotImplementedError

    def decode_s(self, gang: int, height: int, width: int, batch: int) -> float:
        """Everything after the last step, in seconds."""
        raise NotImplementedError

    def regroup_s(self, gang: int, height: int, width: int, batch: int) -> float:
        """What starting in another gang costs: forming it, and the extra of its one synchronous step."""
        raise NotImplementedError

    def estimate(self, gang: int, height: int, width: int, batch: int) -> Estimate:
        """One displaced step and how sure the model is of it."""
        raise NotImplementedError

    def observe(self, gang: int, height: int, width: int, batch: int, step_s: float) -> None:
        """Learn from one segment: its mean seconds per displaced step."""
        raise NotImplementedError
