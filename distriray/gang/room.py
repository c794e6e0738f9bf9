"""Room: whether a worker's device holds the buffers of the gangs that it will be in, asked before serving."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from math import isqrt

import torch

from distriray.errors import InvalidRequest, UnsupportedModel
from distriray.gang.admission import example, settle
from distriray.gang.config import HostConfig
from distriray.gang.messages import WorkerFacts
from distriray.gang.runner import SegmentRunner
from distriray.parallel.networks.base import Call
from distriray.parallel.room import META
from distriray.requests import GenerationRequest

log = logging.getLogger("ray.serve.distriray.worker")


def check_room(runner: SegmentRunner, config: HostConfig, facts: WorkerFacts) -> None:
    """Say what exchange buffers the largest request that `config.limits` allow takes, and what is free.

    Of weights alone `weights.check_fit` has said it before. Nothing is said where the device's memory is not
    known.

    Raises:
        UnsupportedModel: not even one image of the pool's own size fits, with the bytes. Larger requests that
            do not fit end with OutOfMemory before their first step.
    """
    room = runner.room
    if room is None or max(config.sizes) == 1:
        return
    prompt = ("a lake and its boats " * config.limits.max_prompt_chars)[: config.limits.max_prompt_chars]
    own = settle(example(facts, prompt=prompt, seed=0), config, facts)
    own = own.model_copy(update={"prompt": _taken(runner, own)})
    assert own.height is not None and own.width is not None
    needed, gang = _most(runner, config, facts, runner.calls(own), own.height)
    if needed > room.nbytes:
        what = f"an image of {own.width}x{own.height} in a gang of {gang}"
        least = config.parallel.exchange in ("auto", "sync")
        less = "`gang_sizes: [1]` needs" if least else "`exchange: sync` and `gang_sizes: [1]` need"
        raise UnsupportedModel(f"{room.refusal(needed, what, config.parallel)}; {less} less")
    needed, gang, images, side = _largest(runner, config, facts, own)
    what = f"the largest request that limits allow, {images} of {side}x{side} in a gang of {gang},"
    told = room.refusal(needed, what, config.parallel)
    if needed > room.nbytes:
        log.warning(
            "%s: it ends with OutOfMemory before its first step; lower limits refuse it at once", told
        )
    else:
        log.info("%s", told)


def _taken(runner: SegmentRunner, request: GenerationRequest) -> str:
    """As much of a request's prompt, from its beginning, as the model has positions for."""

    def refused(length: int) -> bool:
        try:
            runner.calls(request.model_copy(update={"prompt": request.prompt[:length]}))
        except InvalidRequest as error:
            if error.param != "prompt":
                raise
            return True
        return False

    whole = len(request.prompt)
    if not refused(whole):
        return request.prompt
    return request.prompt[: bisect_left(range(1, whole), True, key=refused)]


def _largest(
    runner: SegmentRunner, config: HostConfig, facts: WorkerFacts, own: GenerationRequest
) -> tuple[int, int, int, int]:
    """The most bytes that a request takes which limits allow: in a gang of how many, images of which side.

    Args:
        own: a request for one image of the pool's own size.

    Returns:
        The bytes, the gang's size, the number of images, and their side in pixels.
    """
    limits, editing = config.limits, facts.terms.editing
    assert own.height is not None and own.width is not None
    kinds = [(own, limits.max_images)]
    if facts.guides:
        guided, without = (
            own.model_copy(update={"guidance_scale": each})
            for each in (limits.max_guidance_scale, facts.terms.unguided)
        )
        odd = limits.max_images - 1 + limits.max_images % 2  # halves of a gang need less
        kinds = [(guided, limits.max_images), (without, odd)]
    side = min(limits.max_side, isqrt(limits.max_pixels)) // facts.size_unit * facts.size_unit
    size, drawn = (own.height, own.width), own.height * own.width
    own_shown = editing.shown_pixels(own.references, facts.size_unit, drawn) if editing else 0
    masked = 0 if "mask_image" in facts.terms.lacks else side**2
    shown = editing.most_exchanged_pixels(limits.max_references, masked) if editing else 0
    found = []
    for request, images in kinds:
        calls = [_enlarged(call, images, size, own_shown, side, shown) for call in runner.calls(request)]
        found.append((*_most(runner, config, facts, calls, side), images, side))
    return max(found)


def _most(
    runner: SegmentRunner, config: HostConfig, facts: WorkerFacts, calls: Sequence[Call], height: int
) -> tuple[int, int]:
    """The most bytes that an image takes in a gang which the host lends, and that gang's size."""
    needed = [(0, 1)]
    for gang in config.sizes:
        if 1 < gang <= facts.max_gang(height):
            with suppress(InvalidRequest):  # whoever asks such a gang is told so
                needed.append((runner.buffer_bytes_of(calls, gang, config.parallel), gang))
    return max(needed)


def _enlarged(call: Call, images: int, size: tuple[int, int], own_shown: int, side: int, shown: int) -> Call:
    """A call of one image of `size` pixels as it would be of so many of `side` by `side`, without values.

    Args:
        own_shown: pixels of the pictures that the one image edits.
        shown: of those that each of the others does.
    """
    batch, *shape = call.sample.shape
    height, width = size
    if len(shape) == 3:
        larger = [shape[0], shape[1] * side // height, shape[2] * side // width]
    else:
        larger = [shape[0] * (side**2 + shown) // (height * width + own_shown), shape[1]]
    sample = torch.empty(batch * images, *larger, dtype=call.sample.dtype, device=META)
    return replace(call, sample=sample)
