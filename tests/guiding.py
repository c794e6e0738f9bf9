"""Guiders of diffusers' pipelines, other ones for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def guiders_with(pipeline: Any, **changed: Any) -> Iterator[None]:
    """Let the guiders of a HunyuanImage pipeline be others in what is `changed`, as long as this lasts."""
    names = [name for name in ("guider", "ocr_guider") if getattr(pipeline, name) is not None]
    before = {name: getattr(pipeline, name) for name in names}
    pipeline.register_modules(**{name: guider.new(**changed) for name, guider in before.items()})
    try:
        yield
    finally:
        pipeline.register_modules(**before)
