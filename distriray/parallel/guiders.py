"""Guiders of diffusers' modular pipelines, which know of which branch of guidance a call is."""

from __future__ import annotations

from contextlib import suppress
from typing import Any
from weakref import WeakSet

from diffusers.guiders import BaseGuidance


class Guiders:
    """The guiders of the pipelines that are watched.

    A modular pipeline calls its network once for each branch. It names none to the network, but tells its
    guider before every call that it prepares the next one.
    """

    def __init__(self) -> None:
        self._watched: WeakSet[Any] = WeakSet()

    def watch(self, pipeline: Any) -> None:
        """Look at this pipeline's guider from now on, if it has one."""
        self._watched.add(pipeline)

    @property
    def branch(self) -> str | None:
        """The branch of the call under way; None without a guider, and where it might be either of two's.

        Of a call that no guider has prepared it is that of the last one which was. Two calls of one branch in
        a step, as some guiders make, are as good as unnamed ones.
        """
        guiders = [
            guider
            for pipeline in self._watched
            if isinstance(guider := getattr(pipeline, "guider", None), BaseGuidance)
        ]
        if len(guiders) != 1:
            return None
        # Of a guider that does not say; diffusers' tangential one reads an attribute that it lacks.
        with suppress(NotImplementedError, AttributeError):
            return "cond" if guiders[0].is_conditional else "uncond"
        return None
