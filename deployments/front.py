"""The service itself, as HTTP and handles see it: each request goes to the host that has it done first."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from distriray.errors import (
    DeadlineUnmet,
    GangBroken,
    InvalidRequest,
    ModelNotFound,
    NotEnoughDevices,
    QueueFull,
)
from distriray.gang.admission import admit, check_gang_size
from distriray.gang.events import Event, Preview, Queued, Step
from distriray.requests import GenerationRequest, GenerationResult, Limits
from distriray.routing.policy import RequestView
from distriray.service import Fleet, ModelCard, PoolReport

from .config import AppConfig
from .link import PoolLink
from .models import size_of
from .state import choose, wait_s

LONGEST_RETRY_S = 3600.0


@dataclass
class Trip:
    """A request on its way, which may take more than one attempt.

    It has a seed from the first attempt on. `queued`, `step` and `previews` are what a stream has shown of
    it, so that another attempt does not show it again.
    """

    request: GenerationRequest
    began_s: float = field(default_factory=time.monotonic)
    attempts: int = 0
    queued: bool = False
    step: int = 0
    previews: int = 0

    def __post_init__(self) -> None:
        self.request = self.request.seeded()

    def shows(self, event: Event) -> bool:
        """Whether `event` is news to whoever listens."""
        match event:
            case Queued():
                new, self.queued = not self.queued, True
                return new
            case Step(step=step):
                new, self.step = step > self.step, max(step, self.step)
                return new
            case Preview(index=index):
                new, self.previews = index >= self.previews, max(index + 1, self.previews)
                return new
            case _:
                return True


class Front:
    """What `distriray.service.Service` asks for, over any number of pools."""

    def __init__(
        self, config: AppConfig, pools: Mapping[str, DeploymentHandle], draw: random.Random, created: int
    ) -> None:
        self._config, self._draw = config, draw
        refresh_s = config.router.refresh_s
        self._links = [PoolLink(pool, pools[pool.name], refresh_s) for pool in config.pools]
        self._sizes = {pool.model.name: size_of(pool.model) for pool in config.pools}
        self._created = created

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        """The images of `request`. Cancelling this coroutine cancels the request."""
        trip = Trip(request)
        while True:
            link, host, asked = await self._place(trip)
            try:
                return await link.generate(host, asked)
            except (QueueFull, RayActorError) as error:
                self._again(trip, link, host, error)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """What happens to `request`, ending with `Finished`. Closing the generator cancels it."""
        trip = Trip(request)
        while True:
            link, host, asked = await self._place(trip)
            try:
                async with aclosing(link.stream(host, asked)) as events:
                    async for event in events:
                        if trip.shows(event):
                            yield event
                return
            except (QueueFull, RayActorError) as error:
                self._again(trip, link, host, error)

    async def cancel(self, request_id: str) -> bool:
        """Stop a request, wherever it is; whether there was one."""
        answers = [await link.everyone("cancel", request_id) for link in self._links]
        return any(any(answer) for answer in answers)

    def models(self) -> list[ModelCard]:
        """Every model. Its size is known from its folder, or from the first host that had it.

        Limits are as old as the hosts' last answers, and are asked for again; needs a running event loop.
        """
        cards = []
        for link in self._links:
            link.renew()
        for name in self._config.models:
            links = self._links_of(name)
            limits, gang_sizes = _offer(links)
            seen = next((link.state.facts.default_size for link in links if link.state.facts), None)
            cards.append(
                ModelCard(
                    id=name,
                    created=self._created,
                    default_size=seen or self._sizes[name],
                    limits=limits,
                    gang_sizes=gang_sizes,
                )
            )
        return cards

    async def fleet(self) -> Fleet:
        """Hosts, gangs, queues and predicted waits, as they are now."""
        pools = {}
        for link in self._links:
            await link.refresh()
            hosts = dict(await link.everyone("status"))
            wait = wait_s(list(link.state.hosts.values()), time.monotonic())
            pools[link.config.name] = PoolReport(
                model=link.config.model.name, predicted_wait_s=wait, hosts=hosts
            )
        return Fleet(pools=pools)

    async def check_health(self) -> None:
        """Ask the workers. Returns if every model has one that answers, or a pool that starts when asked.

        Raises:
            GangBroken: hosts are up, or were a moment ago, and none of their workers answers.
            NotEnoughDevices: no host is up.
        """
        for name in self._config.models:
            links = self._links_of(name)
            for link in links:
                await link.refresh()
            answers = [answer for link in links for answer in await link.everyone("ping")]
            if any(answers) or any(link.config.min_hosts == 0 and not link.state.hosts for link in links):
                continue
            if hosts := sum(len(link.state.hosts) for link in links) or len(answers):
                raise GangBroken(f"no worker of the {hosts} hosts of {name!r} answers")
            raise NotEnoughDevices(f"no host of {name!r} is up; `serve status` says what they wait for")

    async def _place(self, trip: Trip) -> tuple[PoolLink, str | None, GenerationRequest]:
        """Where to send a request now, and the request as it is to be sent.

        Refused is on news only: what was sent to a host counts until its next report, done or not.

        Raises:
            ModelNotFound, InvalidRequest, QueueFull, DeadlineUnmet, NotEnoughDevices: nowhere.
        """
        links = self._links_of(trip.request.model)
        for link in links:
            await link.refresh()
        limits, gang_sizes = _offer(links)
        limits.check(trip.request)
        check_gang_size(trip.request, gang_sizes)
        try:
            return self._choose(trip, links)
        except (QueueFull, DeadlineUnmet, NotEnoughDevices):
            for link in links:
                await link.news()
            return self._choose(trip, links)

    def _choose(self, trip: Trip, links: list[PoolLink]) -> tuple[PoolLink, str | None, GenerationRequest]:
        """`_place` by what is known of the hosts."""
        now = time.monotonic()
        request, left_s = trip.request, None
        if request.deadline_s is not None:
            left_s = request.deadline_s - (now - trip.began_s)
            request = request.model_copy(update={"deadline_s": max(left_s, 1e-3)})
        fitting = _fitting(request, links, now, left_s)
        up = [(link, asked, view) for link, asked, view in fitting if link.state.hosts and view is not None]
        chosen = choose(
            [link.state for link, *_ in up],
            [view for *_, view in up],
            now,
            self._draw,
            self._config.router.error_margin,
        )
        if chosen is not None and chosen[1].host is not None:
            link, asked, view = up[chosen[0]]
            if not chosen[1].meets:
                could_s = chosen[1].finish_s - now
                raise DeadlineUnmet(
                    f"deadline_s {trip.request.deadline_s:g} cannot be met; {could_s:.1f} could be met now",
                    could_s,
                )
            link.state.send(chosen[1], view, now)
            return link, chosen[1].host, asked
        down = [(link, asked) for link, asked, _ in fitting if not link.state.hosts]
        for link, asked in down:
            if link.undirected < link.config.max_queue:
                return link, None, asked
        hosts = [host for link, *_ in up for host in link.state.hosts.values()]
        if hosts and not down and all(host.waiting < host.max_waiting for host in hosts):
            raise NotEnoughDevices("too many workers are down for a gang that could serve this")
        retry_s = chosen[1].finish_s - now if chosen else down[0][0].config.scale_up_after_s
        retry_s = min(max(0.1, retry_s), LONGEST_RETRY_S)
        raise QueueFull(f"every queue is full; try again in {retry_s:.1f} s", retry_s)

    def _again(self, trip: Trip, link: PoolLink, host: str | None, error: QueueFull | RayActorError) -> None:
        """A host refused a request or died under it: try another, unless that was tried often enough."""
        if host is not None:
            (link.state.refused if isinstance(error, QueueFull) else link.state.lost)(host)
        trip.attempts += 1
        if trip.attempts >= self._config.router.max_attempts:
            if isinstance(error, QueueFull):
                raise error
            raise GangBroken(
                f"request {trip.request.id}: {trip.attempts} hosts died under it: {error}"
            ) from error

    def _links_of(self, model: str | None) -> list[PoolLink]:
        name = self._config.models[0] if model is None else model
        links = [link for link in self._links if link.config.model.name == name]
        if not links:
            raise ModelNotFound(f"no model {name!r}; there is {', '.join(map(repr, self._config.models))}")
        return links


def _offer(links: list[PoolLink]) -> tuple[Limits, tuple[int, ...]]:
    """The limits and the gang sizes of pools of one model: all that at least one of them allows."""
    limits = Limits.widest(link.state.config.limits for link in links)
    return limits, tuple(sorted({size for link in links for size in link.config.sizes}))


def _fitting(
    request: GenerationRequest, links: list[PoolLink], now_s: float, left_s: float | None
) -> list[tuple[PoolLink, GenerationRequest, RequestView | None]]:
    """The pools that can serve a request, and the request as each of them would.

    Raises:
        InvalidRequest: there is none; what the first pool has against it.
    """
    fitting: list[tuple[PoolLink, GenerationRequest, RequestView | None]] = []
    unfit: InvalidRequest | None = None
    for link in links:
        try:
            fitting.append((link, *_view_of(request, link, now_s, left_s)))
        except InvalidRequest as error:
            unfit = unfit or error
    if unfit is not None and not fitting:
        raise unfit
    return fitting


def _view_of(
    request: GenerationRequest, link: PoolLink, now_s: float, left_s: float | None
) -> tuple[GenerationRequest, RequestView | None]:
    """The request as the pool's hosts would take it on, and as routing sees it.

    While no host of the pool was ever seen, only what its configuration says can be checked.

    Raises:
        InvalidRequest: the pool cannot serve it.
    """
    config, facts = link.state.config, link.state.facts
    if facts is None:
        config.limits.check(request)
        check_gang_size(request, config.sizes)
        return request, None
    settled, max_gang = admit(request, config, facts)
    assert settled.height is not None and settled.width is not None
    view = RequestView(
        id=settled.id,
        height=settled.height,
        width=settled.width,
        batch=settled.num_images,
        steps_total=settled.num_inference_steps,
        steps_done=0,
        arrival_s=now_s,
        deadline_s=None if left_s is None else now_s + left_s,
        priority=settled.priority,
        gang_size=None if settled.gang_size == "auto" else settled.gang_size,
        max_gang=max_gang,
    )
    return settled, view
