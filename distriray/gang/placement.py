"""Placement of a host's workers: one bundle each, in a placement group of their own or in the replica's."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distriray.errors import NotEnoughDevices
from distriray.gang.config import HostConfig
from distriray.gang.devices import DEVICES, worker_resources

PATIENCE_S = 5.0
"""After which it is said that a host waits for others to end."""

log = logging.getLogger("ray.serve.distriray")


@dataclass(frozen=True)
class Placement:
    """A placement group whose bundles from `first` on hold one worker each."""

    group: PlacementGroup
    first: int
    owned: bool
    device: str
    config: HostConfig

    @classmethod
    async def make(cls, config: HostConfig) -> Placement:
        """The group of the Serve replica or actor that this is called in, else a new one.

        Raises:
            NotEnoughDevices: the cluster or the group has too little for `config`.
        """
        device = resolve_device(config)
        current = ray.util.get_current_placement_group()
        if current is not None:
            if current.bundle_count < config.workers + 1:
                raise NotEnoughDevices(
                    f"the placement group has {current.bundle_count} bundles; a host of {config.workers} "
                    f"workers needs {config.workers + 1}, the first one for itself"
                )
            return cls(current, 1, False, device, config)
        bundle = worker_resources(device, config.cpus_per_worker)
        _check_room(config, bundle)
        group = placement_group([bundle] * config.workers, strategy=config.strategy)
        telling = asyncio.get_running_loop().call_later(PATIENCE_S, _tell_wait, config, bundle)
        try:
            await asyncio.wait_for(_as_awaitable(group.ready()), config.start_timeout_s)
        except TimeoutError:
            remove_placement_group(group)
            raise NotEnoughDevices(
                f"{config.workers} times {bundle} did not come free {_where(config)} within "
                f"{config.start_timeout_s:g} s"
            ) from None
        except BaseException:
            remove_placement_group(group)
            raise
        finally:
            telling.cancel()
        return cls(group, 0, True, device, config)

    def options(self, index: int) -> dict[str, Any]:
        """Ray's options for the actor of worker `index`."""
        kind = DEVICES[self.device]
        return {
            "num_cpus": self.config.cpus_per_worker,
            "num_gpus": kind.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, self.first + index),
            "runtime_env": {"env_vars": dict(kind.environment(self.config))},
            "max_restarts": 0,
            "max_concurrency": 1000,
        }

    def release(self) -> None:
        """Give the bundles back, if they were reserved here."""
        if self.owned:
            remove_placement_group(self.group)


def _tell_wait(config: HostConfig, bundle: dict[str, float]) -> None:
    log.warning(
        "a host waits for %d times %s %s to come free for its workers, for %g s at most",
        config.workers,
        bundle,
        _where(config),
        config.start_timeout_s,
    )


def _where(config: HostConfig) -> str:
    return "on one node" if config.strategy == "STRICT_PACK" else "on the cluster"


async def _as_awaitable(ref: Any) -> Any:
    return await ref


def resolve_device(config: HostConfig) -> str:
    """The kind of device that `config` means on this cluster."""
    if config.device != "auto":
        return config.device
    return "cuda" if ray.cluster_resources().get("GPU", 0.0) >= config.workers else "cpu"


def _check_room(config: HostConfig, bundle: dict[str, float]) -> None:
    """Raise NotEnoughDevices for more workers than the nodes would hold if nothing else ran on them."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # a quotient such as 0.7 / 0.1 is a little too small
    held = [min(int(node.get(kind, 0.0) / each + 1e-6) for kind, each in bundle.items()) for node in nodes]
    fit = max(held) if config.strategy == "STRICT_PACK" else sum(held)
    if fit < config.workers:
        each = " and ".join(f"{amount:g} {kind}s" for kind, amount in bundle.items())
        instead = f"use at most {fit} workers" if fit else "not one does"
        raise NotEnoughDevices(
            f"{config.workers} workers of {each} each do not fit {_where(config)}; {instead}"
        )
