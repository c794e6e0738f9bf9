"""Admission: the checks that need a host's configuration or its workers' facts."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from math import log2
from typing import Any, NamedTuple

from PIL import Image

from distriray.config import ParallelConfig
from distriray.errors import InvalidRequest
from distriray.gang.config import HostConfig
from distriray.gang.messages import WorkerFacts
from distriray.names import check_names
from distriray.requests import GenerationRequest
from distriray.routing.latency import Besides
from distriray.routing.policy import RequestView
from distriray.steps import guided_steps

ADDED = 0.3
"""Share of a step that a LoRA or a ControlNet is guessed to add: 0.22 to 0.41 where it was measured."""
_NOT_OF_A_STEP: Any = {"warmup_steps", "auto_warmup_drift", "max_buffer_bytes"}
"""Settings of `ParallelConfig` that the time of a step does not depend on."""


def check_gang_size(request: GenerationRequest, sizes: Collection[int]) -> None:
    """Raise InvalidRequest unless the gang that `request` names is among the `sizes` that are lent."""
    if request.gang_size != "auto" and request.gang_size not in sizes:
        raise InvalidRequest(
            f"gang_size {request.gang_size} is not lent here; use one of {sorted(sizes)}", "gang_size"
        )


def check_parallel(parallel: ParallelConfig, sizes: Collection[int], facts: WorkerFacts) -> None:
    """Raise InvalidRequest unless gangs of all `sizes` can share steps so, whatever the request."""
    _check_short_steps(parallel, facts)
    _check_heads(parallel, sizes, facts)


def _check_short_steps(parallel: ParallelConfig, facts: WorkerFacts) -> None:
    if parallel.cache_interval > 1 and not facts.has_short_steps:
        raise InvalidRequest(
            f"cache_interval is for transformers, which {facts.model} is not; fewer steps, by `unipc`, cost "
            "its pictures no more",
            "parallel",
        )


def _check_heads(parallel: ParallelConfig, sizes: Collection[int], facts: WorkerFacts) -> None:
    """Raise InvalidRequest unless heads can be dealt to the gangs of all `sizes`, if they are to be.

    One without guidance is cut by all ranks of a gang that shares others by halves.
    """
    heads, halves = facts.key_heads, 2 if parallel.cfg_parallel is True else 1
    if heads is None or parallel.attention != "ulysses" or parallel.exchange == "none":
        return
    refused = sorted(size for size in sizes if size // halves > heads)
    if not refused:
        return
    dealt = sorted(set(sizes).difference(refused))
    instead = f", or gangs of {dealt} only" if dealt else ""
    raise InvalidRequest(
        f"attention='ulysses' cannot deal {heads} heads of {facts.model} to gangs of "
        f"{' or '.join(map(str, refused))}; use 'auto', which deals them where that sends less{instead}",
        "parallel",
    )


def check_listed(request: GenerationRequest, config: HostConfig) -> None:
    """Check what a request names of what only a configuration lists; adapters a folder may have too.

    Raises:
        ControlNetNotFound, IPAdapterNotFound: it is not there.
        InvalidRequest: it is named more than once.
    """
    check_names("control", request.control, (spec.name for spec in config.controls))
    check_names("ip_adapters", request.ip_adapters, (spec.name for spec in config.ip_adapters))


class Admitted(NamedTuple):
    """A request that a host can take on.

    Attributes:
        request: with a size and a seed.
        max_gang: the largest gang that its image can be cut for.
        num_steps: calls of the network that it takes.
        guided: each of them is of two branches,
        unguided_steps: but for so many of the last.
        fresh: each of them is synchronous, and none short.
        warmup_steps: the first of them, which are synchronous.
        shown_pixels: of references, whose tokens go through the network beside the picture's own.
        otherwise: how gangs share its steps, where that is not the host's way.
    """

    request: GenerationRequest
    max_gang: int
    num_steps: int
    guided: bool
    fresh: bool
    warmup_steps: int
    unguided_steps: int = 0
    shown_pixels: int = 0
    otherwise: str = ""

    def view(self, arrival_s: float, deadline_s: float | None) -> RequestView:
        """The request as routing sees it before anything of it is done; both times are of one clock."""
        request = self.request
        assert request.height is not None and request.width is not None
        return RequestView(
            id=request.id,
            height=request.height,
            width=request.width,
            batch=request.num_images,
            steps_total=self.num_steps,
            steps_done=0,
            arrival_s=arrival_s,
            deadline_s=deadline_s,
            priority=request.priority,
            gang_size=None if request.gang_size == "auto" else request.gang_size,
            max_gang=self.max_gang,
            guided=self.guided,
            unguided_steps=self.unguided_steps,
            fresh=self.fresh,
            warmup_steps=self.warmup_steps,
            adapters=tuple(lora.name for lora in request.loras if lora.scale),
            besides=_besides(request, self.shown_pixels, self.otherwise),
        )


def _besides(request: GenerationRequest, shown_pixels: int, otherwise: str) -> Besides:
    """What makes a request's steps unlike others, named so that predictions treat like as like."""
    adapted = [(f"lora {lora.name}", ADDED) for lora in request.loras if lora.scale]
    controlled = [
        (f"control {each.name} {each.start:g} {each.end:g}", ADDED * max(0.0, each.end - each.start))
        for each in request.control
        if each.scale
    ]
    alike = [(f"ip_adapter {each.name}", 0.0) for each in request.ip_adapters if each.scale]
    shown = []
    if shown_pixels:
        assert request.height is not None and request.width is not None
        pixels = round(2 ** (round(2 * log2(shown_pixels)) / 2))  # few cases, whatever sizes clients send
        shown = [(f"references {pixels}", pixels / (request.height * request.width))]
    shared = [(f"parallel {otherwise}", 0.0)] if otherwise else []
    return tuple(sorted(adapted + controlled + alike + shown + shared))


def _otherwise(shared: ParallelConfig, usual: ParallelConfig) -> str:
    """The settings of `shared` that are not the `usual` ones, of those that the time of a step depends on."""
    settings, others = (each.model_dump(mode="json", exclude=_NOT_OF_A_STEP) for each in (shared, usual))
    differ = {name: value for name, value in settings.items() if value != others[name]}
    return json.dumps(differ) if differ else ""


def admit(
    request: GenerationRequest, config: HostConfig, facts: WorkerFacts, *, limited: bool = True
) -> Admitted:
    """A request as a host would take it on; `limited` is every one that is not the host's own.

    Raises:
        InvalidRequest: it is beyond a limit, or neither the model nor a gang of this host can serve it.
    """
    if limited:
        config.limits.check_pictures(request.pictures)  # by the names that they were sent with
    sent, request = request, settle(request, config, facts)
    if limited:
        config.limits.check(request, sent)
    request.check_size(facts.size_unit)
    assert request.height is not None and request.width is not None
    gangs = _gangs_of(request, config.sizes, facts)
    assert request.guidance_scale is not None
    num_steps = request.num_steps(facts.own_steps, rounds_up=facts.terms.rounds_up)
    with_guidance = guided_steps(request.guidance_end, num_steps)
    guided = facts.guides and request.guidance_scale > facts.terms.unguided and with_guidance > 0
    unguided_steps = num_steps - with_guidance if guided else 0
    shared = request.shared(config.parallel)
    if shared.cfg_parallel is True:
        _check_halves(request, gangs, guided, unguided_steps)
    fresh = shared.mix is not None and shared.mix.exact and shared.cache_interval == 1
    editing = facts.terms.editing
    shown_pixels = 0
    if editing:
        drawn, masked = request.height * request.width, request.mask_image is not None
        shown_pixels = editing.shown_pixels(request.references, facts.size_unit, drawn, masked)
    max_gang = facts.max_gang(request.height)
    return Admitted(
        request,
        max_gang,
        num_steps,
        guided,
        fresh,
        shared.usual_warmup,
        unguided_steps,
        shown_pixels,
        _otherwise(shared, config.parallel),
    )


def _gangs_of(request: GenerationRequest, sizes: Collection[int], facts: WorkerFacts) -> list[int]:
    """Those of `sizes` that a request may have; raises InvalidRequest where that is none."""
    assert request.height is not None
    check_gang_size(request, sizes)
    max_gang = facts.max_gang(request.height)
    if request.gang_size != "auto" and request.gang_size > max_gang:
        raise InvalidRequest(
            f"height {request.height} is too small for a gang of {request.gang_size}; use at most {max_gang}",
            "gang_size",
        )
    if min(sizes) > max_gang:
        raise InvalidRequest(
            f"height {request.height} is too small for the gangs lent here, of {min(sizes)} or more",
            "height",
        )
    if request.parallel is not None:
        _check_short_steps(request.parallel, facts)
    if request.gang_size != "auto":
        return [request.gang_size]
    gangs = [size for size in sizes if size <= max_gang]
    if request.parallel is not None:  # a gang that is named says so at once
        _check_heads(request.parallel, gangs, facts)
    return gangs


def _check_halves(
    request: GenerationRequest, gangs: Sequence[int], guided: bool, unguided_steps: int
) -> None:
    """Raise InvalidRequest unless `cfg_parallel=True` can split each of `gangs`, and the batch."""
    odd = [size for size in gangs if size > 1 and size % 2]
    if odd:
        raise InvalidRequest(
            f"cfg_parallel=True splits gangs into halves, and of those that this may have {odd} are odd; use "
            "'auto', or name another gang_size",
            "gang_size",
        )
    if max(gangs) == 1 or request.num_images % 2 == 0:
        return
    if not guided:
        raise InvalidRequest(
            f"cfg_parallel=True splits the batch into halves, and {request.num_images} without guidance has "
            f"none for a gang of {max(gangs)}; use 'auto', or gangs of 1",
            "guidance_scale",
        )
    if unguided_steps:
        raise InvalidRequest(
            f"guidance_end {request.guidance_end:g} leaves steps with one branch, which cfg_parallel=True "
            "cannot split; use cfg_parallel='auto', or leave guidance_end out",
            "guidance_end",
        )


def settle(request: GenerationRequest, config: HostConfig, facts: WorkerFacts) -> GenerationRequest:
    """The request with all that it leaves open: the host's defaults go before the model's own.

    Raises:
        InvalidRequest: the model lacks a field that it asks for.
    """
    return facts.terms.settle(request, facts.default_size, facts.size_unit, config.defaults)


def example(facts: WorkerFacts, **fields: Any) -> GenerationRequest:
    """A request of a host's own, of the default size, with a picture if the model needs one.

    And of the model's own number of steps, whatever `fields` say, if it takes no other.
    """
    if facts.terms.fixes_steps:
        fields.pop("num_inference_steps", None)
    height, width = facts.default_size
    fields = {"prompt": "a lake", "height": height, "width": width, **fields}
    if facts.terms.needs_mask:
        fields |= {name: Image.new("L", (width, height), level) for name, level in _GREY_TO_FILL.items()}
    if facts.terms.editing and facts.terms.editing.needs_references:
        fields["image"] = Image.new("RGB", (width, height), "grey")
    return GenerationRequest(**fields)


_GREY_TO_FILL = {"image": 128, "mask_image": 255}
