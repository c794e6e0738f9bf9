"""What a host takes on: checks that need its workers' facts."""

from __future__ import annotations

from ..errors import InvalidRequest
from ..requests import GenerationRequest
from .config import HostConfig
from .messages import WorkerFacts


def admit(
    request: GenerationRequest, config: HostConfig, facts: WorkerFacts
) -> tuple[GenerationRequest, int]:
    """A client's `request` with everything settled, and the largest gang that its image can be cut for.

    Raises:
        InvalidRequest: it is beyond a limit, or no gang of this host can serve it.
    """
    request = request.settled(*facts.default_size)
    config.limits.check(request)
    return fit(request, config, facts)


def fit(request: GenerationRequest, config: HostConfig, facts: WorkerFacts) -> tuple[GenerationRequest, int]:
    """The same without limits."""
    request = request.settled(*facts.default_size)
    assert request.height is not None
    max_gang = facts.max_gang(request.height)
    if request.gang_size != "auto":
        if request.gang_size not in config.sizes:
            raise InvalidRequest(
                f"gang_size {request.gang_size} is not lent here; use one of {list(config.sizes)}",
                "gang_size",
            )
        if request.gang_size > max_gang:
            raise InvalidRequest(
                f"height {request.height} is too small for a gang of {request.gang_size}; "
                f"use at most {max_gang}",
                "gang_size",
            )
    return request, max_gang
