"""What hosts of a job's own are configured with that decides a picture, besides its line."""

from __future__ import annotations

from typing import Any

from distriray.gang.config import HostConfig
from distriray.names import KINDS
from distriray.requests import GenerationRequest

_NOT_SEEN = {"attention", "cuda_graphs", "max_buffer_bytes", "parallel_vae"}
"""Of how a gang shares a step: what leaves the picture as it is."""


def settings_of(config: HostConfig, request: GenerationRequest) -> dict[str, Any]:
    """What `config` says of the picture of `request` that neither this nor the model's name does.

    For the ids of prompts, so without what is as it is by default: a job that sets nothing has none.
    """
    named = {
        field: [
            spec.model_dump(mode="json", exclude_defaults=True)
            for spec in getattr(config, kind.option)
            if spec.name in {each.name for each in getattr(request, field)}
        ]
        for field, kind in KINDS.items()
    }
    defaults = config.defaults.model_dump(mode="json", exclude_none=True)
    settings: dict[str, Any] = {
        "model": config.model.model_dump(exclude_defaults=True, exclude={"name", "offload_text"}),
        "defaults": {name: value for name, value in defaults.items() if getattr(request, name) is None},
        **named,
    }
    if max(config.sizes) > 1 and request.gang_size != 1 and request.parallel is None:
        unset = _NOT_SEEN | ({"exchange"} if request.exchange is not None else set())
        settings["parallel"] = config.parallel.model_dump(mode="json", exclude_defaults=True, exclude=unset)
    return {name: value for name, value in settings.items() if value}
