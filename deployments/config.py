"""Configuration of a service, as `build_app` takes it: models, pools of hosts, the router and HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments.http.config import TIMEOUT_S, HttpConfig
from distriray.gang.config import LIVE_FIELDS, HostConfig, merged
from distriray.limits import Limits
from distriray.models import ModelSpec
from distriray.names import check_unique
from distriray.quantities import Count, NonNegative, PositiveSeconds, ReservedCpus, Seconds
from distriray.routing.router import CHOICES
from distriray.service import ROUTERS

ANSWERED_S = 10.0
"""Seconds in which the pictures of a request that has just been drawn are encoded and sent."""


class PoolConfig(HostConfig):
    """Hosts that are alike, and how many of them there are: one Serve deployment.

    Attributes:
        name: of the pool and its deployment.
        min_hosts: kept at all times; with 0 the pool costs nothing while nobody asks for it.
        max_hosts: started at most.
        target_backlog_s: seconds of accepted work that a host should have before it; hosts are added above
            and taken away below.
        look_back_s: work is averaged over this time before hosts are added or taken away.
        scale_up_after_s: how long more hosts must be wanted before they are started.
        scale_down_after_s: how long fewer must do before one is stopped, the last one included.
        cpus_per_host: what Ray reserves for the host itself, in logical CPUs; its workers come on top.
        drain_s: a host that is stopped may go on this long with what it has accepted.
        health_period_s: between two health checks of a host.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,60}$")]
    min_hosts: Annotated[int, Field(ge=0)] = 1
    max_hosts: Count = 1
    target_backlog_s: PositiveSeconds = 30.0
    look_back_s: PositiveSeconds = 20.0
    scale_up_after_s: Seconds = 5.0
    scale_down_after_s: Seconds = 300.0
    cpus_per_host: ReservedCpus = 0.1
    drain_s: PositiveSeconds = 120.0
    health_period_s: PositiveSeconds = 10.0

    @model_validator(mode="after")
    def _check_hosts(self) -> Self:
        if self.max_hosts < self.min_hosts:
            raise ValueError(
                f"pool {self.name}: max_hosts {self.max_hosts} is below min_hosts {self.min_hosts}; "
                f"use at least {self.min_hosts}"
            )
        return self

    @property
    def host(self) -> HostConfig:
        """The configuration that each host of the pool is started with."""
        return HostConfig(**{field: getattr(self, field) for field in HostConfig.model_fields})

    def changed(self, live: dict[str, Any]) -> PoolConfig:
        """This pool with other values of `LIVE_FIELDS`, which Serve's `user_config` may name.

        What `live` leaves out, also within a field of fields, stays as it is here.

        Raises:
            ValueError: a field cannot be changed while hosts run, or has a bad value.
        """
        if fixed := sorted(live.keys() - LIVE_FIELDS):
            raise ValueError(
                f"user_config of pool {self.name} names {fixed}, which hosts cannot change while they run; "
                f"it may name {sorted(LIVE_FIELDS)}. Change the rest in the application's args"
            )
        return PoolConfig.model_validate(merged(self.model_dump(mode="json"), live))


class RouterConfig(BaseModel):
    """The replicas that take requests and send each to a host.

    Attributes:
        min_replicas: kept at all times.
        max_replicas: started at most.
        target_requests: unfinished requests that one replica should have; more are started above it.
        cpus: what Ray reserves for each replica, in logical CPUs.
        choices: hosts of a pool that are asked and compared for each request, drawn from all; four times as
            many before one is refused.
        refresh_s: a host that was asked within this time is not asked again.
        error_margin: how many of the latency model's errors two hosts' predictions may lie apart and count as
            equal, and by how many a deadline must be missed to be refused.
        max_attempts: hosts that may die, refuse or say nothing under one request before it fails.
        accept_s: within which a host must say that it has a request, else another gets it.
        drain_s: a replica that is stopped may go on this long with the requests it has; None is
            `AppConfig.drain_s`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: Count = 1
    max_replicas: Count = 4
    target_requests: Count = 64
    cpus: NonNegative = 0.1
    choices: Count = CHOICES
    refresh_s: Seconds = 0.25
    error_margin: NonNegative = 1.0
    max_attempts: Count = 3
    accept_s: PositiveSeconds = 5.0
    drain_s: PositiveSeconds | None = None

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}; "
                f"use at least {self.min_replicas}"
            )
        return self


def _as_fields(pool: Mapping[str, Any]) -> dict[str, Any]:
    """`pool` with its model and limits as the fields that were set, also where they are objects already."""
    given = {
        field: value.model_dump(exclude_unset=True)
        for field in ("model", "limits")
        if isinstance(value := pool.get(field), ModelSpec | Limits)
    }
    if isinstance(pool.get("model"), str):
        given["model"] = {"name": pool["model"]}
    return {**pool, **given}


def _given_down(service: Mapping[str, Any], pool: Mapping[str, Any]) -> dict[str, Any]:
    """`pool` with what it leaves to the service: a model only where it names none."""
    service, pool = _as_fields(service), _as_fields(pool)
    model = pool.get("model", {})
    if not isinstance(model, Mapping) or "name" in model:
        service.pop("model", None)
    return merged(service, pool)


class AppConfig(BaseModel):
    """The whole service.

    Attributes:
        model: of pools that name none; such a pool may set some of its fields otherwise.
        limits: of all pools; a pool may set some of them otherwise.
        pools: at least one, each name once; the first one's model is drawn by whoever names none.
        aliases: further names of models, for clients that know no others, and the models that they are.
        router: the replicas that take requests.
        http: keys and bounds of the HTTP interface.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelSpec = ModelSpec()
    limits: Limits = Limits()
    pools: tuple[PoolConfig, ...]
    aliases: dict[str, str] = {}
    router: RouterConfig = RouterConfig()
    http: HttpConfig = HttpConfig()

    @model_validator(mode="before")
    @classmethod
    def _hand_down(cls, data: Any) -> Any:
        """Give the pools what they leave to the service."""
        if not isinstance(data, dict) or not isinstance(data.get("pools"), list | tuple):
            return data
        own = {field: data[field] for field in ("model", "limits") if field in data}
        pools = [_given_down(own, pool) if isinstance(pool, dict) else pool for pool in data["pools"]]
        return {**data, "pools": pools}

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        # pydantic's own bound is said of pools with mistakes too, as if they were not there
        if not self.pools:
            raise ValueError("pools lists none; give it one at least")
        check_unique("pools", self.pools, "pool")
        if any(pool.name == ROUTERS for pool in self.pools):
            raise ValueError(f"pool {ROUTERS!r} has the name of the routers' deployment; give it another")
        return self

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        for alias, name in self.aliases.items():
            if name not in self.models:
                raise ValueError(f"alias {alias!r} is of {name!r}, which no pool has; there is {self.models}")
            if alias in self.models:
                raise ValueError(f"alias {alias!r} is the name of a model itself; leave it out")
        for name in self.models:
            pools = [pool for pool in self.pools if pool.model.name == name]
            if other := [pool.name for pool in pools if pool.defaults != pools[0].defaults]:
                raise ValueError(
                    f"pools {pools[0].name} and {other[0]} have one model, {name!r}, and other defaults: "
                    "pictures would depend on which pool is free; give both the same"
                )
        return self

    @property
    def drain_s(self) -> float:
        """Seconds that a stopped router may go on: unless set, as long as a request over HTTP may take
        (`TIMEOUT_S` where that is for ever), and is answered.
        """
        if self.router.drain_s is not None:
            return self.router.drain_s
        return (self.http.timeout_s or TIMEOUT_S) + ANSWERED_S

    @property
    def models(self) -> tuple[str, ...]:
        """The names of all models, the default one first."""
        return tuple(dict.fromkeys(pool.model.name for pool in self.pools))
