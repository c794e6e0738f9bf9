"""Guiders of diffusers' pipelines, which know of which branch of guidance a call is."""

from __future__ import annotations

from contextlib import suppress
from itertools import chain
from typing import Any
from weakref import WeakSet

from diffusers.guiders import BaseGuidance
from diffusers.hooks import LayerSkipConfig

from distriray.errors import UnsupportedModel

_NAMES = "guider", "ocr_guider"
"""Of the components that are guiders."""


class Guiders:
    """The guiders of the pipelines that are watched.

    A modular pipeline calls its network once for each branch. It names none to the network, but tells its
    guider before every call that it prepares the next one. HunyuanImage's names them, and may have a second
    guider, for prompts that quote what is to be read in the picture.
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
            if len(self._guiders) == 1:
                return "cond" if self._guiders[0].is_conditional else "uncond"
        return None

    def check(self) -> None:
        """Raise UnsupportedModel for a guider that makes calls without the attention of some layers.

        It would find ours there once the image has begun, and say that it does not know it.
        """
        for guider in self._guiders:
            lists = (value for value in vars(guider).values() if isinstance(value, list))
            if guider._enabled and any(map(_leaves_attention_out, chain.from_iterable(lists))):
                raise UnsupportedModel(
                    f"{type(guider).__name__} leaves attention out of some layers, where the ranks share it; "
                    "use another guider, such as ClassifierFreeGuidance"
                )

    @property
    def _guiders(self) -> list[Any]:
        """Those of the one pipeline that has any; none where there are several such pipelines."""
        of_each = [
            [guider for name in _NAMES if isinstance(guider := getattr(pipeline, name, None), BaseGuidance)]
            for pipeline in self._watched
        ]
        guiding = [guiders for guiders in of_each if guiders]
        return guiding[0] if len(guiding) == 1 else []


def _leaves_attention_out(each: Any) -> bool:
    """Whether it says so of a layer that is not left out as a whole."""
    if not isinstance(each, LayerSkipConfig):
        return False
    return each.skip_attention_scores or each.skip_attention and not each.skip_ff
