"""The service for Python programs on its Ray cluster; `client` is the one for all others."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayTaskError, TaskCancelledError
from ray.serve.exceptions import RequestCancelledError

from .client import settled
from .errors import DistrirayError, GenerationCancelled
from .gang.events import Event
from .requests import GenerationRequest, GenerationResult

if TYPE_CHECKING:
    from .service import Fleet, ModelCard

Cancelled = (RequestCancelledError, TaskCancelledError)


class HandleClient:
    """Calls a service through its Serve handle, so nothing is encoded and no port need be open.

    A request is a `GenerationRequest`, or a prompt with its other fields as keywords. Methods raise errors
    of `distriray.errors` as themselves. `stream` and `generate` block; `astream` and `agenerate` belong into
    an event loop.

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
            ConnectionError: there is no cluster at `address`.
            ray.serve.exceptions.RayServeException: it has no such application.
        """
        if not ray.is_initialized():
            ray.init(address, logging_level="ERROR")
        return cls(serve.get_app_handle(app))

    def generate(self, request: GenerationRequest | str, **fields: Any) -> GenerationResult:
        """The images of a request. Leaving early, as with Ctrl-C, cancels it."""
        wanted = settled(request, fields)
        response = self._handle.generate.remote(wanted)
        try:
            result: GenerationResult = response.result()
            return result
        except RayTaskError as error:
            raise _own(error) from None
        except Cancelled:
            raise GenerationCancelled(f"request {wanted.id} was cancelled") from None
        except BaseException:
            response.cancel()
            raise

    async def agenerate(self, request: GenerationRequest | str, **fields: Any) -> GenerationResult:
        """As `generate`. Cancelling this coroutine cancels the request."""
        wanted = settled(request, fields)
        response = self._handle.generate.remote(wanted)
        try:
            result: GenerationResult = await response
            return result
        except RayTaskError as error:
            raise _own(error) from None
        except Cancelled:
            raise GenerationCancelled(f"request {wanted.id} was cancelled") from None
        except BaseException:
            response.cancel()
            raise

    def stream(self, request: GenerationRequest | str, **fields: Any) -> Generator[Event, None, None]:
        """What happens to a request, ending with `Finished`. Closing the generator cancels it."""
        wanted, over = settled(request, fields), False
        events = self._handle.options(stream=True).stream.remote(wanted)
        try:
            yield from events
            over = True
        except RayTaskError as error:
            over = True
            raise _own(error) from None
        finally:
            if not over:
                events.cancel()

    async def astream(self, request: GenerationRequest | str, **fields: Any) -> AsyncGenerator[Event, None]:
        """As `stream`."""
        wanted, over = settled(request, fields), False
        events = self._handle.options(stream=True).stream.remote(wanted)
        try:
            async for event in events:
                yield event
            over = True
        except RayTaskError as error:
            over = True
            raise _own(error) from None
        finally:
            if not over:
                events.cancel()

    def cancel(self, request_id: str) -> bool:
        """Stop a request after the step it is in, whoever sent it; whether there was one."""
        return bool(self._handle.cancel.remote(request_id).result())

    def models(self) -> list[ModelCard]:
        """What can be asked for; the first is drawn by whoever names none."""
        cards: list[ModelCard] = self._handle.models.remote().result()
        return cards

    def fleet(self) -> Fleet:
        """Every pool with its hosts, gangs and queues."""
        fleet: Fleet = self._handle.fleet.remote().result()
        return fleet


def _own(error: RayTaskError) -> BaseException:
    """What the service raised, where it is an error of distriray's."""
    return error.cause if isinstance(error.cause, DistrirayError) else error
