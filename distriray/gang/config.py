"""Configuration of a host, frozen and validated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from distriray.adapters import CACHE_BYTES, AdapterSpec
from distriray.config import ParallelConfig
from distriray.controls import ControlNetSpec
from distriray.ip_adapters import IPAdapterSpec
from distriray.limits import Limits
from distriray.models import ModelSpec
from distriray.names import KINDS, MOST_LOADED, check_unique
from distriray.quantities import Count, PositiveSeconds, ReservedCpus
from distriray.requests import Defaults, Sides
from distriray.routing.buddy import check_gang_sizes
from distriray.routing.policies import check_policy

LIVE_FIELDS = frozenset({"limits", "max_attempts", "max_queue", "parallel", "policy", "stall_s"})
"""What may change while a host runs."""


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values that `change` names, at any depth; all else stays as it is in `base`."""
    both = {
        name: merged(base[name], value)
        for name, value in change.items()
        if isinstance(value, Mapping) and isinstance(base.get(name), Mapping)
    }
    return {**base, **change, **both}


class HostConfig(BaseModel):
    """One host: how many workers, with which model, and which gangs it lends.

    Attributes:
        model: a name such as `builtin:landscapes`, or all fields of a `ModelSpec`.
        workers: processes, each with one device and one copy of the model.
        gang_sizes: what it lends, ascending, each dividing the next; None is every power of two that fits.
        device: of each worker; `auto` is `cuda` where the cluster has enough GPUs, else `cpu`.
        cpus_per_worker: what Ray reserves for each worker, in logical CPUs.
        strategy: of the placement group: all workers on one node, or not.
        defaults: what requests are drawn with that leave it open.
        loras: adapters that requests may name; each worker reads them once when it starts, so that what does
            not fit the model is found then.
        lora_dir: folder of more of them, `.safetensors` files that requests name without the suffix; it is
            looked at again while the host runs.
        lora_cache_bytes: memory of each worker for adapters; what was not used for longest makes room.
        controls: ControlNets that requests may name; each worker loads all of them when it starts, and keeps
            them in its device's memory.
        ip_adapters: IP-Adapters that requests may name; loaded and kept likewise, each image encoder once.
        compile: sizes of pictures, such as `1024x1024`, for which a worker lets torch compile the blocks that
            the network repeats when it starts. Others are drawn as without, and so are several images of a
            request, steps with guidance where the default is none or without where it is some, LoRAs and
            IP-Adapters.
        nccl_max_ctas: of a GPU's multiprocessors, how many a transfer takes at most; None leaves it to NCCL.
        max_queue: requests that may wait; beyond them `QueueFull`.
        timeout_s: after which a silent peer of a gang counts as hung; also for forming gangs.
        silence_s: after which a worker that answers no control call is replaced.
        stall_s: after which a gang is replaced that neither makes a step nor comes back; 30 times what its
            longest step took, or twice `timeout_s` and 10 s, where that is more.
        start_timeout_s: for resources to come free, and for the model to load and to be compiled.
        max_attempts: gangs that may break under one request: it fails with the last of them, or as soon as
            two workers have failed under it by the same error.
        policy: who decides which request runs where: `elastic` plans ahead and regroups,
            `earliest_deadline` gives each the largest free gang, keeps a place for the first that finds
            none, and leaves alone what runs.
        profiles: folder of latency profiles; a host that finds none of its model, device, gang sizes,
            version and way to compute there measures one at start. None starts from a guess. What is observed
            corrects either.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelSpec = ModelSpec()
    workers: Count = 1
    gang_sizes: tuple[Count, ...] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpus_per_worker: ReservedCpus = 1.0
    strategy: Literal["STRICT_PACK", "PACK", "SPREAD"] = "STRICT_PACK"
    parallel: ParallelConfig = ParallelConfig()
    limits: Limits = Limits()
    defaults: Defaults = Defaults()
    loras: tuple[AdapterSpec, ...] = ()
    lora_dir: Path | None = None
    lora_cache_bytes: Count = CACHE_BYTES
    controls: Annotated[tuple[ControlNetSpec, ...], Field(max_length=MOST_LOADED)] = ()
    ip_adapters: Annotated[tuple[IPAdapterSpec, ...], Field(max_length=MOST_LOADED)] = ()
    compile: tuple[Sides, ...] = ()
    nccl_max_ctas: Annotated[int, Field(ge=1, le=64)] | None = None
    max_queue: Count = 64
    timeout_s: PositiveSeconds = 30.0
    silence_s: PositiveSeconds = 30.0
    stall_s: PositiveSeconds = 600.0
    start_timeout_s: PositiveSeconds = 600.0
    max_attempts: Count = 3
    policy: Annotated[str, AfterValidator(check_policy)] = "elastic"
    profiles: Path | None = None

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if check_gang_sizes(self.sizes)[-1] > self.workers:
            raise ValueError(f"gang_sizes {list(self.sizes)} exceed the {self.workers} workers of the host")
        return self

    @model_validator(mode="after")
    def _check_halves(self) -> Self:
        odd = [size for size in self.sizes if size > 1 and size % 2]
        if self.parallel.cfg_parallel is True and odd:
            raise ValueError(
                f"parallel.cfg_parallel true splits gangs into halves, and of gang_sizes {list(self.sizes)} "
                f"{odd} are odd; use 'auto'"
            )
        return self

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for kind in KINDS.values():
            check_unique(kind.option, getattr(self, kind.option), kind.word)
        return self

    @model_validator(mode="after")
    def _check_defaults(self) -> Self:
        """Nobody is refused for what they did not ask for, where a pool says what that is."""
        for field in Defaults.model_fields.keys() & Limits.LARGEST.keys():
            value, limit = getattr(self.defaults, field), Limits.LARGEST[field]
            if value is not None and value > getattr(self.limits, limit):
                raise ValueError(
                    f"defaults.{field} {value} is above limits.{limit} {getattr(self.limits, limit)}"
                )
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the gangs that the host lends."""
        if self.gang_sizes is not None:
            return self.gang_sizes
        return tuple(2**i for i in range(self.workers.bit_length()))
