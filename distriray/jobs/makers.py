"""Makers of a job's pictures: hosts of its own, or a service that runs already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from distriray.jobs.run import Maker

if TYPE_CHECKING:
    from distriray.gang import HostConfig


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
        yield [stack.enter_context(open_host(config, address=address, cpus=cpus)) for _ in range(count)]


@contextmanager
def running_app(name: str, *, address: str | None) -> Iterator[list[Maker]]:
    """The Serve application `name` of the cluster at `address` (None is the one on this machine).

    Raises:
        ConnectionError: no cluster there, or no such application on it.
    """
    import ray
    from ray.serve.exceptions import RayServeException

    from distriray.handle import HandleClient

    joined = ray.is_initialized()
    try:
        yield [HandleClient.connect(name, address or "auto")]
    except RayServeException as error:
        raise ConnectionError(f"Serve application {name!r} cannot be used: {error}") from error
    finally:
        if not joined:
            ray.shutdown()
