"""Serve's part of routing: a request goes to the host that its sender chose."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class ToNamedHost(RequestRouter):
    """Sends a call to the replica whose id is its first argument.

    With None there, or once that replica is gone, any other will do: the least busy one gets it.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request:  # else Serve asks again at once, and goes on asking, while no replica accepts
            pending_request.routing_context.should_backoff = True
        target = pending_request.args[0] if pending_request and pending_request.args else None
        chosen = [replica for replica in candidate_replicas if replica.replica_id.unique_id == target]
        return [chosen or candidate_replicas]
