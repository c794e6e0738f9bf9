"""Makers of a job's pictures: hosts of its own, or a service that runs already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from distriray.errors import NotEnoughDevices
from distriray.jobs.run import Maker, MakerLost
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult

if TYPE_CHECKING:
    from distriray.gang import HostConfig
    from distriray.gang.blocking import BlockingHost


class OwnHost:
    """A host of the job's own, which nobody replaces when its workers are beyond repair."""

    def __init__(self, host: BlockingHost) -> None:
        self._host = host

    def generate(self, request: GenerationRequest) -> GenerationResult:
        """As `Host.generate`; raises MakerLost once the host can form no gang any more."""
        try:
            return self._host.generate(request)
        except NotEnoughDevices as error:
            if self._host.host.sizes:
                raise
            raise MakerLost(str(error)) from error

    def cancel(self, request_id: str) -> bool:
        """As `Host.cancel`."""
        return self._host.cancel(request_id)


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
    from distriray.gang import open_host

    with ExitStack() as stack:
        yield [
            OwnHost(stack.enter_context(open_host(config, address=address, cpus=cpus))) for _ in range(count)
        ]


@contextmanager
def running_app(name: str, *, address: str | None) -> Iterator[list[Maker]]:
    """The Serve application `name` of the cluster at `address` (None is the one on this machine).

    Raises:
        ConnectionError: no cluster there, or no such application on it.
    """
    import ray

    from distriray.cluster import leave
    from distriray.handle import HandleClient

    joined = ray.is_initialized()
    try:
        yield [HandleClient.connect(name, address or "auto")]
    finally:
        if not joined:
            leave()
