"""The latency profile of a host: what it has measured, in a file."""

from __future__ import annotations

import re
import secrets
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from distriray.quantities import Count, Positive, PositiveSeconds, Seconds

LONGEST_NAME = 220
"""Characters of a file's name, of the 255 that file systems take; a draft's has a few more."""


class Entry(BaseModel):
    """One measured case: `height` and `width` in pixels, times in seconds (medians), while all are busy.

    `step_s` is a displaced step and `sync_step_s` a synchronous one, such as the first after a regrouping;
    None means that it takes as long. Those of a case that is `guided` are of two branches of each image.
    `prepare_s` and `decode_s` are what comes before and after the steps; the former includes sending the gang
    off and the result back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gang: Count
    height: Count
    width: Count
    batch: Count = 1
    guided: bool = True
    step_s: PositiveSeconds
    sync_step_s: PositiveSeconds | None = None
    prepare_s: Seconds = 0.0
    decode_s: Seconds = 0.0


class Profile(BaseModel):
    """Times that a host measures at start and keeps by model, device and version.

    `regroup_s` is the time from a yield to the first step elsewhere, without what its synchronous step
    costs; `warmup_steps` is how many steps of every image are synchronous. `contention` maps a number of busy
    workers to step time relative to a fully busy host, for some numbers: below 1 where workers share cores or
    memory, and empty where they share nothing. `guessed`: nothing of it was measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    device: str
    version: str
    entries: Annotated[tuple[Entry, ...], Field(min_length=1)]
    regroup_s: Seconds = 0.0
    warmup_steps: Count = 1
    contention: tuple[tuple[Count, Positive], ...] = ()
    guessed: bool = False

    @staticmethod
    def path(folder: Path | str, model: str, device: str, version: str) -> Path:
        """Path of the profile of this model, device and version in `folder`.

        What is too long for the name of a file ends with a digest of the whole.
        """
        name = "--".join(re.sub(r"[^A-Za-z0-9.]+", "-", part) for part in (model, device, version))
        if len(name) > LONGEST_NAME:
            digest = sha256(repr((model, device, version)).encode()).hexdigest()[:16]
            name = f"{name[: LONGEST_NAME - 17]}-{digest}"
        return Path(folder) / f"{name}.json"

    @classmethod
    def load(cls, path: Path | str) -> Profile:
        """Read a profile; raises OSError, or pydantic.ValidationError naming what is wrong in it."""
        return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))

    def save(self, path: Path | str) -> None:
        """Write it as JSON, replacing the file in one go."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f"{target.name}.{secrets.token_hex(4)}.draft")  # others may write it too
        draft.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        draft.replace(target)
