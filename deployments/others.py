"""A replica's calls to all others of its deployment, those included that drain.

Serve's own (`DeploymentHandle.broadcast`) leave out a replica from the moment that it is to stop, however
long it goes on with what it has. So they are made as Serve makes them, to the actor.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import ray
from ray import serve
from ray._private.state import actors as look_up
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.serve._private.common import ReplicaID, RequestMetadata
from ray.serve._private.constants import SERVE_NAMESPACE
from ray.serve._private.utils import generate_request_id

from distriray.gang.background import Background

log = logging.getLogger("ray.serve.distriray")


class Others:
    """The other replicas of the deployment of the one that this is in."""

    def __init__(self) -> None:
        self._background = Background(self._log)

    async def answers(self, method: str, *args: Any, timeout_s: float) -> AsyncGenerator[Any, None]:
        """Their answers as they come, of those that answer in time."""
        others = await asyncio.to_thread(_others, serve.get_replica_context().replica_id)
        calls = [self._background.spawn(_answer(other, method, args, timeout_s)) for other in others]
        for call in asyncio.as_completed(calls):
            for answer in await call:
                yield answer

    def _log(self, error: Exception) -> None:
        log.error("another replica could not be called", exc_info=error)


async def _answer(replica: ActorHandle, method: str, args: tuple[Any, ...], timeout_s: float) -> list[Any]:
    call = RequestMetadata(generate_request_id(), generate_request_id(), call_method=method)
    try:
        async with asyncio.timeout(timeout_s):
            return [await replica.handle_request.remote(pickle.dumps(call), *args)]
    except (TimeoutError, RayError):  # it hangs, starts or has gone
        return []


def _others(own: ReplicaID) -> list[ActorHandle]:
    others = []
    for actor in ray.util.list_named_actors(all_namespaces=True):
        name = actor["name"]
        if actor["namespace"] == SERVE_NAMESPACE and ReplicaID.is_full_id_str(name):
            replica = ReplicaID.from_full_id_str(name)
            if replica.deployment_id == own.deployment_id and replica != own:
                with suppress(ValueError):  # it has gone meanwhile
                    other = ray.get_actor(name, SERVE_NAMESPACE)
                    if look_up(other._actor_id.hex()).get("State") == "ALIVE":  # else it may wait for room
                        others.append(other)
    return others
