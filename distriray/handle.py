"""The service for Python programs on its Ray cluster; `client` is the one for all others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, RequestCancelledError

from distriray.cluster import join
from distriray.errors import DistrirayError, GenerationCancelled
from distriray.events import Event, Finished
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult
from distriray.service import ROUTERS, Fleet, ModelCard

LOOK_S = 5.0  # between two looks, for a call that waits for a router, at whether there still is a service


class HandleClient:
    """Calls a service through its Serve handle, so nothing is encoded and no port need be open.

    A request is a `GenerationRequest`, or a prompt with its other fields as keywords. Methods raise errors
    of `distriray.errors` as themselves, and ConnectionError when the service cannot be reached. Methods
    prefixed with `a` are coroutines; the others block. What a script asked for is cancelled within seconds of
    its being killed.

        client = HandleClient.connect()
        result = client.generate("a lake at dawn", num_inference_steps=20)
        result.images[0].save("lake.png")
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    @classmethod
    def connect(cls, app: str = "distriray", address: str = "auto") -> HandleClient:
        """The client of a running application.

        Args:
            app: its name in Serve's configuration.
            address: of the Ray cluster, unless this process is connected already.

        Raises:
            ConnectionError: there is no cluster at `address`, or no such application on it.
        """
        if not ray.is_initialized():
            join(address)
        try:
            # Not `get_app_handle`: it denies an application that Serve is building anew, or failed to, though
            # its routers go on.
            return cls(serve.get_deployment_handle(ROUTERS, app))
        except (KeyError, RayServeException) as error:
            raise ConnectionError(f"Serve application {app!r} is not on this cluster, or not yet") from error

    def generate(self, request: GenerationRequest | str, **fields: Any) -> GenerationResult:
        """The images of a request. Leaving early, as with Ctrl-C, cancels it."""
        asked = GenerationRequest.of(request, fields)
        result: GenerationResult = self._call("generate", asked, _driver())
        return result

    async def agenerate(self, request: GenerationRequest | str, **fields: Any) -> GenerationResult:
        """As `generate`. Cancelling this coroutine cancels the request."""
        asked = GenerationRequest.of(request, fields)
        result: GenerationResult = await self._acall("generate", asked, _driver())
        return result

    def stream(self, request: GenerationRequest | str, **fields: Any) -> Generator[Event, None, None]:
        """The events of a request, ending with `Finished`. Closing the generator cancels it."""
        asked, finished = GenerationRequest.of(request, fields), False
        with self._asked("stream", asked, _driver(), stream=True) as events:
            self._wait_for_router(events)
            for event in events:
                finished |= isinstance(event, Finished)
                yield event
        if not finished:
            raise _broken_off(asked)

    async def astream(self, request: GenerationRequest | str, **fields: Any) -> AsyncGenerator[Event, None]:
        """As `stream`."""
        asked, finished = GenerationRequest.of(request, fields), False
        with self._asked("stream", asked, _driver(), stream=True) as events:
            await self._await_router(events)
            async for event in events:
                finished |= isinstance(event, Finished)
                yield event
        if not finished:
            raise _broken_off(asked)

    def cancel(self, request_id: str) -> bool:
        """Stop a request after the step it is in, whoever sent it; whether there was one."""
        return bool(self._call("cancel", request_id))

    async def acancel(self, request_id: str) -> bool:
        """As `cancel`."""
        return bool(await self._acall("cancel", request_id))

    def models(self) -> list[ModelCard]:
        """The models on offer; the first is the default."""
        cards: list[ModelCard] = self._call("models")
        return cards

    async def amodels(self) -> list[ModelCard]:
        """As `models`."""
        cards: list[ModelCard] = await self._acall("models")
        return cards

    def fleet(self) -> Fleet:
        """Every pool with its hosts, gangs and queues."""
        fleet: Fleet = self._call("fleet")
        return fleet

    async def afleet(self) -> Fleet:
        """As `fleet`."""
        fleet: Fleet = await self._acall("fleet")
        return fleet

    def _call(self, method: str, *args: Any) -> Any:
        with self._asked(method, *args) as response:
            self._wait_for_router(response)
            return response.result()

    async def _acall(self, method: str, *args: Any) -> Any:
        with self._asked(method, *args) as response:
            await self._await_router(response)
            return await response

    def _wait_for_router(self, response: Any) -> None:
        """Wait until a router has the call.

        Serve itself leaves it waiting for ever, if all routers have left since the application is deleted.
        """
        while not wait([response._replica_result_future], LOOK_S).done:
            self._check()

    async def _await_router(self, response: Any) -> None:
        """As `_wait_for_router`."""
        taken = asyncio.wrap_future(response._replica_result_future)
        while not (await asyncio.wait([taken], timeout=LOOK_S))[0]:
            await asyncio.to_thread(self._check)
        await taken

    def _check(self) -> None:
        """Raise ConnectionError if the application is deleted."""
        name = self._handle.app_name
        application = serve.status().applications.get(name)
        if application is None or application.status == "DELETING":
            raise ConnectionError(f"Serve application {name!r} is not on this cluster any more")

    @contextmanager
    def _asked(self, method: str, *args: Any, stream: bool = False) -> Iterator[Any]:
        """The response to a call, which is cancelled if the caller leaves before its end.

        Raises:
            DistrirayError: what the service raised, as itself.
            ConnectionError: there is no service, or it broke off.
        """
        response = None
        try:
            handle = self._handle.options(stream=True) if stream else self._handle
            response = getattr(handle, method).remote(*args)
            yield response
        except RayTaskError as error:
            raise own_error(error) from None
        except (RequestCancelledError, TaskCancelledError):
            raise GenerationCancelled("the request was cancelled") from None
        except DeploymentUnavailableError as error:  # whose own words say only the second
            message = f"Serve application {self._handle.app_name!r} is deleted, or could not be started"
            raise ConnectionError(f"{message}; `serve status` says which") from error
        except (RayError, RayServeException) as error:
            raise ConnectionError(f"the service cannot be reached, or broke off: {error}") from error
        except BaseException as error:
            if response is not None:
                response.cancel()
            if isinstance(error, asyncio.CancelledError) and not is_cancelled():
                raise GenerationCancelled("the request was cancelled") from None
            raise


def own_error(error: RayTaskError) -> BaseException:
    """The error that was raised on the other side of a call, where it is one of distriray's."""
    return error.cause if isinstance(error.cause, DistrirayError) else error


def is_cancelled() -> bool:
    """Whether this task is being cancelled: awaiting a call that was cancelled elsewhere raises the same."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _broken_off(request: GenerationRequest) -> ConnectionError:
    return ConnectionError(f"the service broke off before request {request.id} was finished")


def _driver() -> str | None:
    """The id of this program's Ray job, if the job ends with this process; the service cancels for the dead.

    Tasks and actors may outlive the driver that began their job, so for them it is None.
    """
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    mode = getattr(getattr(context, "worker", None), "mode", None)
    return context.get_job_id() if mode == ray.SCRIPT_MODE else None
