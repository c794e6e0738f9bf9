"""Configuration of the HTTP layer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from distriray.quantities import Count, PositiveSeconds

TIMEOUT_S = 600.0
"""Seconds that a request may take, unless it is said otherwise."""


class HttpConfig(BaseModel):
    """Keys, bounds and what is written down.

    Attributes:
        keys_env: the environment variable that holds bearer keys, separated by commas or blanks.
        keys_file: a file with a bearer key a line; lines that begin with # are comments. With no key in
            either place only clients on this machine are answered.
        max_body_bytes: the longest text in a form that is read.
        max_upload_bytes: the longest body that is read, with the pictures in it, which stay in memory.
        timeout_s: after so many seconds a request is given up and its gang freed; what is predicted to take
            longer is refused. None waits for ever.
        cors_origins: where pages may come from that ask from within a browser, such as
            `https://pictures.example.org`; `*` is from anywhere, with none no page may.
        log_prompts: whether prompts are written to the log.
        page: whether `/` is a page to draw on and to watch the fleet.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys_env: str = "DISTRIRAY_API_KEYS"
    keys_file: Path | None = None
    max_body_bytes: Count = 256 * 1024
    max_upload_bytes: Count = 33 * 2**20
    timeout_s: PositiveSeconds | None = TIMEOUT_S
    cors_origins: tuple[Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")], ...] = ()
    log_prompts: bool = False
    page: bool = True

    def keys(self) -> list[str]:
        """Every key of the environment and of the file.

        Raises:
            ValueError: the file holds no key, so that a mistake in it does not lock nothing.
            OSError: the file cannot be read.
        """
        keys = os.environ.get(self.keys_env, "").replace(",", " ").split()
        if self.keys_file is not None:
            lines = [line.strip() for line in self.keys_file.read_text("utf-8-sig").splitlines()]
            in_file = [line for line in lines if line and not line.startswith("#")]
            if not in_file:
                raise ValueError(
                    f"keys_file {self.keys_file} holds no key; write one a line, or leave it out"
                )
            keys += in_file
        return keys
