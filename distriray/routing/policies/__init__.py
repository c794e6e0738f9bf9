"""Host policies, by the names that a configuration gives them.

A new policy is a file here and a line in `POLICIES`, from which the configuration takes its choices, the host
its policy and the simulator its contenders. Every policy of the table must serve, within a bounded time, each
request that its host can form a gang for. The baselines need not: only the simulator runs them.
"""

from __future__ import annotations

from collections.abc import Callable

from distriray.routing.policies.earliest_deadline import EarliestDeadlineFirst
from distriray.routing.policies.elastic import Elastic
from distriray.routing.policy import HostPolicy

POLICIES: dict[str, Callable[[], HostPolicy]] = {
    "earliest_deadline": EarliestDeadlineFirst,
    "elastic": Elastic,
}


def check_policy(name: str) -> str:
    """`name` itself; raises ValueError, with the names that there are, unless it is in `POLICIES`."""
    if name not in POLICIES:
        raise ValueError(f"no policy {name!r}; use one of {', '.join(POLICIES)}")
    return name


def make_policy(name: str) -> HostPolicy:
    """A new policy of that name; raises as `check_policy`."""
    return POLICIES[check_policy(name)]()
