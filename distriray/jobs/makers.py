"""Who makes a job's pictures: hosts of its own, or a service that runs already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ..requests import GenerationRequest, GenerationResult
from .run import Maker

if TYPE_CHECKING:
    from ..gang import HostConfig


@contextmanager
def own_hosts(
    config: HostConfig, count: int, *, address: str | None, cpus: int | None
) -> Iterator[list[Maker]]:
    """`count` equal hosts that end with the block.

    Args:
        address: of the Ray cluster to use; None starts a local Ray.
        cpus: logical CPUs of a Ray started here.

    Raises:
        NotEnoughDevices, ModelNotFound, UnsupportedModel, ConnectionError: as `open_host`.
    """
    from ..gang import open_host

    with ExitStack() as stack:
        yield [stack.enter_context(open_host(config, address=address, cpus=cpus)) for _ in range(count)]


@contextmanager
def running_app(name: str, *, address: str | None) -> Iterator[list[Maker]]:
    """The Serve application `name` of the cluster at `address` (None is the one on this machine).

    Raises:
        ConnectionError: no cluster there, or no such application on it.
    """
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    started = not ray.is_initialized()
    if started:
        ray.init(address=address or "auto", log_to_driver=False)
    try:
        try:
            yield [_App(serve.get_app_handle(name))]
        except RayServeException as error:
            raise ConnectionError(f"no Serve application {name!r} here; `serve status` lists them") from error
    finally:
        if started:
            ray.shutdown()


class _App:
    """A Serve handle with the verbs of a maker."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._responses: dict[str, Any] = {}

    def generate(self, request: GenerationRequest) -> GenerationResult:
        response = self._responses[request.id] = self._handle.generate.remote(request)
        try:
            result = response.result()
            assert isinstance(result, GenerationResult)
            return result
        finally:
            del self._responses[request.id]

    def cancel(self, request_id: str) -> None:
        if request_id in self._responses:
            self._responses[request_id].cancel()
