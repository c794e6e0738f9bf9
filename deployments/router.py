"""The service itself, as HTTP and handles see it: each request goes to the host that has it done first."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from math import ceil

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from deployments.attempts import Attempts
from deployments.config import AppConfig
from deployments.fitting import fitting, offer
from deployments.models import sizes_of, terms_of
from deployments.pool_client import HostSilent, PoolClient
from deployments.pool_state import choose, wait_s
from deployments.watch import watch
from distriray.denoise.pipelines.terms import Terms
from distriray.errors import (
    DeadlineUnmet,
    GangBroken,
    InvalidRequest,
    ModelNotFound,
    NotEnoughDevices,
    QueueFull,
    TooLong,
)
from distriray.events import Event, Finished
from distriray.gang.admission import check_gang_size
from distriray.gang.messages import WorkerFacts
from distriray.gang.metrics import Refusals
from distriray.requests import MULTIPLE_OF, GenerationRequest, check_sides
from distriray.results import GenerationResult
from distriray.routing.router import MORE_CHOICES
from distriray.service import Fleet, FleetNews, ModelCard, PoolReport

LONGEST_RETRY_S = 3600.0


class Router:
    """The `distriray.service.Service` of any number of pools."""

    def __init__(
        self, config: AppConfig, pools: Mapping[str, DeploymentHandle], draw: random.Random, created: int
    ) -> None:
        self._config, self._draw = config, draw
        self._clients = [PoolClient(pool, config.router, pools[pool.name], draw) for pool in config.pools]
        self._under_way: dict[str, Attempts] = {}
        self._sizes = {pool.model.name: sizes_of(pool.model) for pool in config.pools}
        self._terms = {pool.model.name: terms_of(pool.model) for pool in config.pools}
        self._created = created
        self._refusals = Refusals()

    async def generate(self, request: GenerationRequest, give_up_s: float | None = None) -> GenerationResult:
        """The images of `request`. Cancelling this coroutine cancels the request."""
        with self._taken(request, give_up_s) as attempts:
            async with attempts.going_on():
                while True:
                    client, host, asked = await self._place(attempts)
                    try:
                        return await client.generate(host, asked, host in attempts.sent)
                    except (QueueFull, RayActorError, HostSilent, ModelNotFound) as error:
                        self._again(attempts, client, host, error)

    async def stream(
        self, request: GenerationRequest, give_up_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """Events of `request`, ending with `Finished`. Closing the generator cancels it."""
        finished: Finished | None = None
        with self._taken(request, give_up_s) as attempts:
            while finished is None:
                async with attempts.going_on():
                    client, host, asked = await self._place(attempts)
                try:
                    async with aclosing(client.stream(host, asked, host in attempts.sent)) as events:
                        while finished is None:
                            async with attempts.going_on():  # by itself: the next one may be another task's
                                event = await anext(events)
                            if isinstance(event, Finished):
                                finished = event
                            elif attempts.shows(event):
                                yield event
                except (QueueFull, RayActorError, HostSilent, ModelNotFound) as error:
                    self._again(attempts, client, host, error)
        yield finished  # what happens to the host from now on is nobody's trouble, and the id is free

    @contextmanager
    def _taken(self, request: GenerationRequest, give_up_s: float | None) -> Iterator[Attempts]:
        """The attempts at a request, which is under way while the block runs.

        Raises:
            InvalidRequest: one of that id is under way already.
        """
        if request.id in self._under_way:
            raise InvalidRequest(f"request {request.id!r} is already being worked on", "id")
        attempts = self._under_way[request.id] = Attempts(self._by_its_name(request), give_up_s)
        try:
            yield attempts
        finally:
            del self._under_way[request.id]

    async def cancel(self, request_id: str) -> bool:
        """Stop a request; whether there was one. Only for one that is not this router's are hosts asked."""
        if await self.call_off(request_id):
            return True
        answers = [await client.everyone("cancel", request_id) for client in self._clients]
        return any(any(answer) for answer in answers)

    async def call_off(self, request_id: str) -> bool:
        """Stop a request of this router's, wherever it is; whether there was one.

        Its host ends it after the step that it is in; where that has nothing of it, or drains, the call to it
        is ended.
        """
        attempts = self._under_way.get(request_id)
        if attempts is None:
            return False
        attempts.unwanted = True
        if attempts.host is not None:
            client, host = attempts.host
            if host in await client.members() and any(await client.answers([host], "cancel", request_id)):
                return True
        attempts.call_off()
        return self._under_way.get(request_id) is attempts

    def models(self) -> list[ModelCard]:
        """Every model, and then their other names.

        Sizes and what it lacks are known from a model's folder, or from the first host that had it. Limits
        are as old as the hosts' last answers, and are asked for again; needs a running event loop.
        """
        cards = []
        for client in self._clients:
            client.glance()
        for name in self._config.models:
            clients = self._clients_of(name)
            limits, gang_sizes = offer(clients)
            (default_size, size_unit), terms = self._sizes_of(name), self._terms_of(name)
            cards.append(
                ModelCard(
                    id=name,
                    created=self._created,
                    default_size=default_size,
                    size_unit=size_unit,
                    limits=limits,
                    gang_sizes=gang_sizes,
                    lacks=dict(terms.lacks) if terms else {},
                    defaults=clients[0].config.defaults,
                    controls=tuple(sorted({spec.name for each in clients for spec in each.config.controls})),
                    ip_adapters=tuple(
                        sorted({spec.name for each in clients for spec in each.config.ip_adapters})
                    ),
                    loras=tuple(sorted({name for client in clients for name in client.state.adapters})),
                )
            )
        by_name = {card.id: card for card in cards}
        return cards + [
            by_name[name].model_copy(update={"id": alias, "alias_of": name})
            for alias, name in self._config.aliases.items()
        ]

    async def fleet(self) -> Fleet:
        """Hosts, gangs, queues and predicted waits, as they are now."""
        pools = {}
        for client in self._clients:
            hosts = dict(await client.everyone("status"))
            wait = wait_s(
                [client.state.hosts[host] for host in await client.look(self._choices)], time.monotonic()
            )
            pools[client.config.name] = PoolReport(
                model=client.config.model.name, predicted_wait_s=wait, hosts=hosts
            )
        return Fleet(pools=pools)

    def watch(self) -> AsyncGenerator[FleetNews, None]:
        """Events of the fleet; see `distriray.service.Service.watch`."""
        return watch(self._clients, lambda: self._refusals.total)

    async def check_health(self) -> None:
        """Ask the workers. Returns if every model has one that answers, or a pool that starts when asked.

        Raises:
            GangBroken: hosts are up, or were a moment ago, and none of their workers answers.
            NotEnoughDevices: no host is up.
        """
        for name in self._config.models:
            await self._check_pools(name, self._clients_of(name))

    async def _check_pools(self, model: str, clients: list[PoolClient]) -> None:
        """`check_health` of the pools of one model. All hosts are asked only if none of a few answers."""
        for client in clients:
            few = await client.look(self._choices)
            if any(await client.answers(few, "ping")) or (
                client.config.min_hosts == 0 and not client.state.members
            ):
                return
        answers = [answer for client in clients for answer in await client.everyone("ping")]
        if any(answers):
            return
        if hosts := sum(len(client.state.members) for client in clients):
            raise GangBroken(f"no worker of the {hosts} hosts of {model!r} answers")
        raise NotEnoughDevices(f"no host of {model!r} is up; `serve status` says what they wait for")

    def _by_its_name(self, request: GenerationRequest) -> GenerationRequest:
        """`request` for the model itself, where it names another name of it."""
        name = self._config.aliases.get(request.model or "")
        return request if name is None else request.model_copy(update={"model": name})

    async def _place(self, attempts: Attempts) -> tuple[PoolClient, str, GenerationRequest]:
        """The host to send a request to now, and the request as it is to be sent.

        Raises:
            ModelNotFound, AdapterNotFound, InvalidRequest, QueueFull, DeadlineUnmet, NotEnoughDevices:
                nowhere.
        """
        clients = self._clients_of(attempts.request.model)
        try:
            while True:
                client, host, asked = await self._find(attempts, clients)
                if host is not None:
                    attempts.host = client, host
                    return client, host, asked
                await self._wait_for_host(attempts, client)
        except (QueueFull, DeadlineUnmet):  # hosts count what they refuse themselves
            self._refusals.add(clients[0].config.model.name)
            raise

    async def _find(
        self, attempts: Attempts, clients: list[PoolClient]
    ) -> tuple[PoolClient, str | None, GenerationRequest]:
        """The host for a request, or a pool without one that is to be woken for it.

        A few hosts are compared, drawn from all. What none of them takes is refused only when more were asked
        anew: what was sent to a host counts until its next report, done or not.
        """
        few = await self._look(clients, self._choices, attempts.request)
        limits, gang_sizes = offer(clients)
        limits.check(attempts.request)
        self._check_size(attempts.request, clients[0].config.model.name)
        check_gang_size(attempts.request, gang_sizes)
        with suppress(QueueFull, DeadlineUnmet, NotEnoughDevices):
            client, host, asked = self._choose(attempts, few)
            if host is not None:
                return client, host, asked
        more = await self._look(clients, MORE_CHOICES * self._choices, attempts.request, news=True)
        return self._choose(attempts, more)

    @property
    def _choices(self) -> int:
        return self._config.router.choices

    async def _look(
        self, clients: list[PoolClient], choices: int, request: GenerationRequest, news: bool = False
    ) -> dict[PoolClient, list[str]]:
        adapters = [lora.name for lora in request.loras if lora.scale]
        found = await asyncio.gather(*(client.look(choices, news, adapters) for client in clients))
        return dict(zip(clients, found, strict=True))

    def _sizes_of(self, name: str) -> tuple[tuple[int, int] | None, int]:
        """Default size and unit of a model, as far as they are known."""
        if facts := self._facts_of(name):
            return facts.default_size, facts.size_unit
        sizes = self._sizes[name]
        return (None, MULTIPLE_OF) if sizes is None else (sizes.default, sizes.unit)

    def _check_size(self, request: GenerationRequest, name: str) -> None:
        """Raise InvalidRequest unless a model draws that size, as far as it is known.

        What is edited may have any, and so may an image while nobody knows what the model makes of it.
        """
        _, unit = self._sizes_of(name)
        terms = self._terms_of(name)
        if terms is None or terms.editing:
            check_sides(request.height, request.width, unit)
        else:
            request.check_size(unit)

    def _terms_of(self, name: str) -> Terms | None:
        """Terms of a model, as far as they are known."""
        facts = self._facts_of(name)
        return facts.terms if facts else self._terms[name]

    def _facts_of(self, name: str) -> WorkerFacts | None:
        """Facts of a model, from the first of its pools that had a host."""
        return next((client.state.facts for client in self._clients_of(name) if client.state.facts), None)

    async def _wait_for_host(self, attempts: Attempts, client: PoolClient) -> None:
        """Wait until the pool has a host, for as long as the request has until its deadline."""
        request, pool = attempts.request, client.config.name
        attempts.wakes += 1
        if attempts.wakes > self._config.router.max_attempts:
            raise NotEnoughDevices(f"hosts of pool {pool} come up and are gone; `serve status` says why")
        try:
            async with asyncio.timeout(attempts.left_s(time.monotonic())):
                await client.wake()
        except TimeoutError:
            message = f"deadline_s {request.deadline_s:g} cannot be met: pool {pool} had no host in that time"
            raise DeadlineUnmet(message) from None

    def _choose(
        self, attempts: Attempts, drawn: Mapping[PoolClient, list[str]]
    ) -> tuple[PoolClient, str | None, GenerationRequest]:
        """`_find` by what is known of the hosts that were drawn, of which some may be lost meanwhile."""
        now = time.monotonic()
        drawn = {
            client: [host for host in hosts if host in client.state.hosts] for client, hosts in drawn.items()
        }
        request, left_s = attempts.request, attempts.left_s(now)
        if left_s is not None:
            request = request.model_copy(update={"deadline_s": max(left_s, 1e-3)})
        fits = fitting(request, list(drawn), now, left_s)
        margin = self._config.router.error_margin
        up = [
            (client, asked, view, client.state.route(drawn[client], view, now, self._draw, margin))
            for client, asked, view in fits
            if drawn[client] and view is not None
        ]
        routes = [route for *_, route in up]
        members = [len(client.state.members) for client, *_ in up]
        best = choose(routes, members, now, self._draw, margin)
        if best is not None and routes[best].host is not None:
            client, asked, view, route = up[best]
            if not route.meets:
                could_s = route.possible_s - now
                message = f"deadline_s {attempts.request.deadline_s:g} cannot be met"
                # rounded up, so that it is one that could be met
                raise DeadlineUnmet(f"{message}; {ceil(10 * could_s) / 10:g} s is possible now", could_s)
            if not client.state.guesses:
                self._check_patience(attempts, route.finish_s - now, route.error, now)
            client.state.send(route, view, now)
            return client, route.host, asked
        down = [(client, asked) for client, asked, _ in fits if not drawn[client]]
        for client, asked in down:
            if client.waking < client.config.max_queue:
                return client, None, asked
        hosts = [client.state.hosts[host] for client, *_ in up for host in drawn[client]]
        if hosts and not down and all(host.waiting < host.max_waiting for host in hosts):
            raise NotEnoughDevices("too many workers are down for a gang that could serve this")
        retry_s = routes[best].finish_s - now if best is not None else down[0][0].config.scale_up_after_s
        retry_s = min(max(0.1, retry_s), LONGEST_RETRY_S)
        raise QueueFull(f"every queue is full; try again in {retry_s:.1f} s", retry_s)

    def _check_patience(self, attempts: Attempts, takes_s: float, error: float, now_s: float) -> None:
        """Raise TooLong if the request would surely be given up before it is done."""
        if attempts.give_up_s is None:
            return
        soonest_s = takes_s * (1 - self._config.router.error_margin * error)
        if soonest_s > attempts.began_s + attempts.give_up_s - now_s:
            raise TooLong(
                f"this would take about {takes_s:.0f} s, and a request is given up after "
                f"{attempts.give_up_s:g} s; ask for fewer steps or smaller images, or when less is queued",
                takes_s,
            )

    def _again(
        self,
        attempts: Attempts,
        client: PoolClient,
        host: str,
        error: QueueFull | RayActorError | HostSilent | ModelNotFound,
    ) -> None:
        """A host refused a request, did not accept it or died: try another, unless that was tried enough.

        One with another model is a host that Serve took instead of the one chosen, which had gone.
        """
        attempts.host = None
        if attempts.unwanted:
            raise attempts.cancelled() from error
        if isinstance(error, QueueFull):
            client.state.refused(host)
        else:
            client.state.lost(host, time.monotonic())
            if not isinstance(error, ModelNotFound):
                attempts.sent.add(host)
        attempts.count += 1
        if attempts.count >= self._config.router.max_attempts:
            if isinstance(error, QueueFull):
                raise error
            if isinstance(error, HostSilent | ModelNotFound):
                raise NotEnoughDevices(f"{attempts.count} hosts failed to take it: {error}") from error
            raise GangBroken(
                f"request {attempts.request.id}: {attempts.count} hosts died under it: {error}"
            ) from error

    def _clients_of(self, model: str | None) -> list[PoolClient]:
        name = self._config.models[0] if model is None else model
        clients = [client for client in self._clients if client.config.model.name == name]
        if not clients:
            raise ModelNotFound(f"no model {name!r}; there is {', '.join(map(repr, self._config.models))}")
        return clients
