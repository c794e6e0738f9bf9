"""The interface of a service that makes images, and its reports."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from distriray.events import Event
from distriray.limits import Limits
from distriray.quantities import Count, Seconds
from distriray.requests import MULTIPLE_OF, Defaults, GenerationRequest
from distriray.results import GenerationResult
from distriray.status import HostNews, HostStatus

ROUTERS = "Ingress"
"""The name of the Serve deployment that has the service's interface."""


class ModelCard(BaseModel):
    """One model on offer.

    Attributes:
        created: when the service was set up, in seconds since the epoch.
        default_size: (height, width) in pixels of a request that names none; None until a host was up.
        size_unit: pixels; heights and widths are multiples of it. Of a model that no host had yet and whose
            folder is elsewhere, it may be more.
        limits: those of requests for this model.
        gang_sizes: the sizes that the model's pools lend, ascending.
        lacks: the fields of requests that it has nothing for, and why: it refuses them by name, unless their
            value asks for nothing. Empty until a host was up, if its folder is elsewhere.
        defaults: what requests for this model are drawn with that leave it open.
        loras: the adapters that its requests may name, as far as hosts have told.
        controls: the ControlNets that they may name.
        ip_adapters: the IP-Adapters that they may name.
        alias_of: the model that it is, where this is another name of it.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    created: int
    owned_by: str = "distriray"
    default_size: tuple[int, int] | None
    size_unit: Count = MULTIPLE_OF
    limits: Limits = Limits()
    gang_sizes: tuple[int, ...] = (1,)
    lacks: dict[str, str] = {}
    defaults: Defaults = Defaults()
    loras: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    ip_adapters: tuple[str, ...] = ()
    alias_of: str | None = None


class PoolReport(BaseModel):
    """The hosts of one pool that are up; `predicted_wait_s` is how long a request that came now would wait
    for a gang, in seconds, or None while no host is up that has one."""

    model_config = ConfigDict(frozen=True)

    model: str
    predicted_wait_s: Seconds | None
    hosts: dict[str, HostStatus]


class Fleet(BaseModel):
    """Every pool by name."""

    model_config = ConfigDict(frozen=True)

    pools: dict[str, PoolReport]


class PoolNews(BaseModel):
    """Changes in one pool: `hosts` have news, `silent` ones gave no answer, `gone` ones are no more.
    `predicted_wait_s` as in PoolReport."""

    model_config = ConfigDict(frozen=True)

    model: str
    predicted_wait_s: Seconds | None = None
    hosts: dict[str, HostNews] = {}
    silent: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()


class FleetNews(BaseModel):
    """Changes in the fleet, by pool. `complete`: it says all that is remembered, whatever was told
    before. `now` is when it was told; all times are on the clock of whoever tells it, in seconds since the
    epoch. `refused`: how many requests the router that tells it has turned away since it started; what hosts
    turned away is in their `outcomes`."""

    model_config = ConfigDict(frozen=True)

    now: float
    complete: bool = False
    refused: int = 0
    pools: dict[str, PoolNews]


class Service(Protocol):
    """Makes images. Every method raises errors of `distriray.errors`, unwrapped."""

    async def generate(self, request: GenerationRequest, give_up_s: float | None = None) -> GenerationResult:
        """The images of `request`. Cancelling this coroutine stops the gang after the step it is in.

        Args:
            give_up_s: after so many seconds the caller cancels what is not done.

        Raises:
            InvalidRequest, ModelNotFound, QueueFull, DeadlineUnmet: at once; TooLong too, for what would
                be given up.
            GenerationCancelled, GangBroken, NotEnoughDevices: it cannot be finished.
        """
        ...

    def stream(
        self, request: GenerationRequest, give_up_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """The events of `request`, ending with `Finished`; closing the generator cancels it.

        The first event comes at once, or a refusal instead of it; where a first host must start, when that is
        up. Raises as `generate` does.
        """
        ...

    async def cancel(self, request_id: str) -> bool:
        """Stop a request after the step it is in; whether there was one."""
        ...

    def models(self) -> list[ModelCard]:
        """The models on offer; the first is the default."""
        ...

    async def fleet(self) -> Fleet:
        """Hosts, gangs, queues and predicted waits, as they are now."""
        ...

    def watch(self) -> AsyncGenerator[FleetNews, None]:
        """Events of the fleet from now on, and first those remembered of the last minutes.

        Hosts are asked at a bounded pace, however many there are.
        """
        ...

    async def check_health(self) -> None:
        """Return if a request that came now could be served; raises a DistrirayError that says why not."""
        ...
