"""The pools that a request fits, and what pools of one model offer together."""

from __future__ import annotations

from deployments.pool_client import PoolClient
from distriray.gang.admission import admit, check_gang_size, check_listed
from distriray.limits import Limits
from distriray.names import REFUSALS
from distriray.requests import GenerationRequest
from distriray.routing.policy import RequestView


def offer(clients: list[PoolClient]) -> tuple[Limits, tuple[int, ...]]:
    """The limits and the gang sizes of pools of one model: all that at least one of them allows."""
    limits = Limits.widest(client.state.config.limits for client in clients)
    return limits, tuple(sorted({size for client in clients for size in client.config.sizes}))


def fitting(
    request: GenerationRequest, clients: list[PoolClient], now_s: float, left_s: float | None
) -> list[tuple[PoolClient, GenerationRequest, RequestView | None]]:
    """The pools that can serve a request, and the request as each of them would.

    Raises:
        InvalidRequest, AdapterNotFound, ControlNetNotFound, IPAdapterNotFound: there is none; what the first
            pool has against it.
    """
    fits: list[tuple[PoolClient, GenerationRequest, RequestView | None]] = []
    unfit: Exception | None = None
    for client in clients:
        try:
            fits.append((client, *_view_of(request, client, now_s, left_s)))
        except REFUSALS as error:
            unfit = unfit or error
    if unfit is not None and not fits:
        raise unfit
    return fits


def _view_of(
    request: GenerationRequest, client: PoolClient, now_s: float, left_s: float | None
) -> tuple[GenerationRequest, RequestView | None]:
    """The request as the pool's hosts would take it on, and as routing sees it.

    While no host of the pool was ever seen, only what its configuration says can be checked.

    Raises:
        InvalidRequest, AdapterNotFound, ControlNetNotFound, IPAdapterNotFound: the pool cannot serve it.
    """
    config, facts = client.state.config, client.state.facts
    client.state.check_adapters(request.loras)
    check_listed(request, config)
    if facts is None:
        config.limits.check(request)
        check_gang_size(request, config.sizes)
        return request, None
    admitted = admit(request, config, facts)
    deadline_s = None if left_s is None else now_s + left_s
    return admitted.request, admitted.view(now_s, deadline_s)
