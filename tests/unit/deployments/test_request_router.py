"""Who is there, as Serve tells it, and where a call goes."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID

from deployments.members import members_of
from deployments.request_router import ToNamedHost

POOL = DeploymentID("pool", "app")
HANDLE: Any = SimpleNamespace(deployment_id=POOL)


class Replicas(list[Any]):
    """Replicas that may not be walked through."""

    def __iter__(self) -> Any:
        raise AssertionError("a call costs as much as there are replicas")


def router() -> ToNamedHost:
    return ToNamedHost(POOL, DeploymentHandleSource.REPLICA)


def replicas(*names: str) -> list[Any]:
    async def queue_len(*, deadline_s: float) -> int:
        return 0

    return [
        SimpleNamespace(
            replica_id=ReplicaID(name, POOL), max_ongoing_requests=9, get_queue_len=queue_len, node_id="n"
        )
        for name in names
    ]


def test_members_are_who_runs_and_nobody_knows_before_serve_has_told() -> None:
    async def scene() -> None:
        made = router()
        assert members_of(HANDLE) is None
        made.update_replicas([])
        assert members_of(HANDLE) == ()
        made.update_replicas(replicas("a", "b"))
        before = members_of(HANDLE)
        made.update_replicas(replicas("a", "b"))
        assert before == ("a", "b") and members_of(HANDLE) is before
        made.on_replica_actor_died(ReplicaID("a", POOL))
        assert members_of(HANDLE) == ("b",)

    asyncio.run(scene())


def test_a_call_goes_to_the_host_that_is_named_and_else_to_any() -> None:
    async def scene() -> None:
        made, there = router(), replicas(*(f"host-{i}" for i in range(300)))
        made.update_replicas(there)

        async def chosen(target: str | None) -> list[str]:
            call: Any = SimpleNamespace(args=[target], routing_context=SimpleNamespace(should_backoff=False))
            (group,) = await made.choose_replicas(Replicas(there), call)
            assert call.routing_context.should_backoff
            return [replica.replica_id.unique_id for replica in group]

        assert await chosen("host-7") == ["host-7"]
        drawn = Counter[str]()
        for _ in range(300):
            drawn.update(await chosen(None))
        assert sum(drawn.values()) == 600 and len(drawn) > 150
        assert len(await chosen("gone")) == 2

    asyncio.run(scene())
