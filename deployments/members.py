"""Membership: the hosts of a pool, as Serve has told this process.

Serve makes the routers of its handles (`ToNamedHost`), tells them which replicas run when that changes, and
hands them to nobody. So they are found here, by the deployment; all of one are told the same. A module of
its own, since Serve copies the class of such a router with all that its module holds.
"""

from __future__ import annotations

from typing import Protocol
from weakref import WeakValueDictionary

from ray.serve._private.common import DeploymentID
from ray.serve.handle import DeploymentHandle


class Told(Protocol):
    """An object that is told the ids of all replicas; None before that."""

    members: tuple[str, ...] | None


_told: WeakValueDictionary[DeploymentID, Told] = WeakValueDictionary()


def keep(deployment: DeploymentID, told: Told) -> None:
    """From now on `told` says who is there, for as long as it lives."""
    _told[deployment] = told


def members_of(handle: DeploymentHandle) -> tuple[str, ...] | None:
    """The ids of the replicas that run; None while Serve has not told them.

    The same object until there are others.
    """
    told = _told.get(handle.deployment_id)
    return None if told is None else told.members
