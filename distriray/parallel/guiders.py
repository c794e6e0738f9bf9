"""Guiders of diffusers' modular pipelines, which know of which branch of guidance a call is."""

from __future__ import annotations

from contextlib import suppress
from itertools import chain
from typing import Any
from weakref import WeakSet

from diffusers.guiders import BaseGuidance
from diffusers.hooks import LayerSkipConfig

from distriray.errors import UnsupportedModel


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
        # Of a guider that does not say; diffusers' tangential one reads an attribute that it lacks.
        with suppress(NotImplementedError, AttributeError):
            if self._sole is not None:
                return "cond" if self._sole.is_conditional else "uncond"
        return None

    def check(self) -> None:
        """Raise UnsupportedModel for a guider that makes calls without the attention of some layers.

        It would find ours there once the image has begun, and say that it does not know it.
        """
        if self._sole is None or not self._sole._enabled:
            return
        lists = (value for value in vars(self._sole).values() if isinstance(value, list))
        if any(_leaves_attention_out(each) for each in chain.from_iterable(lists)):
            raise UnsupportedModel(
                f"{type(self._sole).__name__} leaves attention out of some layers, where the ranks share it; "
                "use another guider, such as ClassifierFreeGuidance"
            )

    @property
    def _sole(self) -> Any:
        """The guider, if there is just one."""
        guiders = [
            guider
            for pipeline in self._watched
            if isinstance(guider := getattr(pipeline, "guider", None), BaseGuidance)
        ]
        return guiders[0] if len(guiders) == 1 else None


def _leaves_attention_out(each: Any) -> bool:
    """Whether it says so of a layer that is not left out as a whole."""
    if not isinstance(each, LayerSkipConfig):
        return False
    return each.skip_attention_scores or each.skip_attention and not each.skip_ff
