"""The ingress: HTTP and handle calls go in, each request goes out to a host."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.callers import Callers, dead_drivers
from deployments.config import AppConfig
from deployments.http import build_http
from deployments.logs import shorten_refusals
from deployments.others import Others
from deployments.pool_client import ANSWER_S
from deployments.router import Router
from distriray.events import Event
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult
from distriray.service import Fleet, ModelCard


@serve.ingress()
class Ingress:
    """Stateless: what it knows of the hosts it asks them, so that any number of replicas may serve.

    Handle calls raise errors of `distriray.errors`. A caller that is a driver names its Ray job (`driver`):
    what it asked for ends with it.

    Args:
        created: what every replica says of its models, in seconds since the epoch.
    """

    def __init__(self, config: AppConfig, pools: dict[str, DeploymentHandle], created: int) -> None:
        shorten_refusals()
        self._config = config
        self._front = Router(config, pools, random.Random(), created)
        self._callers = Callers(self._front.cancel, dead_drivers)
        self._others = Others()

    def __serve_build_asgi_app__(self) -> Any:
        return build_http(self._front, self._config.http, self.cancel)

    async def generate(self, request: GenerationRequest, driver: str | None = None) -> GenerationResult:
        """The images of `request`. Cancelling the call cancels the request."""
        with self._callers.waiting(driver, request.id):
            return await self._front.generate(request)

    async def stream(
        self, request: GenerationRequest, driver: str | None = None
    ) -> AsyncGenerator[Event, None]:
        """Events of `request`, ending with `Finished`. Cancelling the call cancels the request."""
        with self._callers.waiting(driver, request.id):
            async with aclosing(self._front.stream(request)) as events:
                async for event in events:
                    yield event

    async def cancel(self, request_id: str) -> bool:
        """Stop a request, whichever router has it, also one that drains; whether there was one.

        Hosts are asked for what no router has that answers.
        """
        return (
            await self._front.call_off(request_id)
            or await self._called_off_elsewhere(request_id)
            or await self._front.cancel(request_id)
        )

    async def _called_off_elsewhere(self, request_id: str) -> bool:
        answers = self._others.answers("call_off", request_id, timeout_s=2 * ANSWER_S)
        async with aclosing(answers):
            async for called_off in answers:
                if called_off:
                    return True
        return False

    async def call_off(self, request_id: str) -> bool:
        """Stop a request of this replica's; whether there was one."""
        return await self._front.call_off(request_id)

    async def models(self) -> list[ModelCard]:
        """The models on offer."""
        return self._front.models()

    async def fleet(self) -> Fleet:
        """Every pool with its hosts."""
        return await self._front.fleet()
