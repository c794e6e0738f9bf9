"""Serve's part of routing: a request goes to the host that its sender chose."""

from __future__ import annotations

import random
from typing import Any

from ray.serve._private.common import ReplicaID
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deployments.members import keep

TRIED = 2  # replicas that Serve compares where the sender has chosen none


class ToNamedHost(RequestRouter):
    """Sends a call to the replica whose id is its first argument.

    With None there, or once that replica is gone, any other will do: the less busy one of two gets it.

    Attributes:
        members: the ids of all replicas; None before Serve has told them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.members: tuple[str, ...] | None = None
        keep(self._deployment_id, self)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """For Serve, when replicas have come or gone."""
        super().update_replicas(replicas)
        self._tell()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """For Serve, when a call finds a replica dead."""
        super().on_replica_actor_died(replica_id)
        self._tell()

    def _tell(self) -> None:
        members = tuple(replica.unique_id for replica in self.curr_replicas)
        if members != self.members:
            self.members = members

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One group of replicas for Serve to choose from."""
        if pending_request:  # else Serve asks again at once, and goes on asking, while no replica accepts
            pending_request.routing_context.should_backoff = True
        target = pending_request.args[0] if pending_request and pending_request.args else None
        named = self.curr_replicas.get(ReplicaID(target, self._deployment_id)) if target else None
        if named is not None:
            return [[named]]
        return [random.sample(candidate_replicas, min(TRIED, len(candidate_replicas)))]
