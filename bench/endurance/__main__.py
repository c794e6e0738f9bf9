"""The service for as long as asked, under load and deaths: `python -m bench.endurance --minutes 30`.

Starts Ray and a service on this machine, one pool of hosts on the built-in model. Clients ask without pause,
over HTTP and by handle, for pictures, streams, edits and adapters, with deadlines and priorities; some leave,
some cancel. Meanwhile workers, hosts and routers are killed and stopped. Every picture is held against the
one that a single worker drew of the same request before that. Watched are the memory, threads and open files
of each process. The status is 1 if a request was lost, a picture is another one, or the service is not whole
at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.arguments import add_json
from bench.endurance.clients import Clients
from bench.endurance.deaths import DEATHS, Deaths
from bench.endurance.resources import Resources
from bench.endurance.scenes import POOL, draw_references, pool, write_adapters
from bench.report import Report
from bench.serving import serving
from deployments.config import AppConfig
from distriray import AsyncClient
from distriray.arguments import positive, positive_number
from distriray.errors import DistrirayError

COLUMNS = ("what", "count", "figure")
WHOLE_S = 180.0
"""Seconds that the service has to be whole again after the last death."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=positive_number, default=10.0, help="of load (default 10)")
    parser.add_argument("--clients", type=positive, default=6, help="that ask without pause (default 6)")
    parser.add_argument("--hosts", type=positive, default=2)
    parser.add_argument("--workers", type=positive, default=4, help="of each host (default 4)")
    parser.add_argument("--routers", type=positive, default=2)
    parser.add_argument(
        "--every", type=positive_number, default=20.0, help="seconds between deaths, as a mean"
    )
    parser.add_argument("--deaths", nargs="*", choices=sorted(DEATHS), default=sorted(DEATHS))
    parser.add_argument(
        "--look", type=positive_number, default=10.0, help="seconds between looks at processes"
    )
    parser.add_argument("--seed", type=int, default=0)
    add_json(parser)
    options = parser.parse_args()
    report = Report(
        f"bench.endurance: {options.minutes:g} minutes, {options.clients} clients, {options.hosts} hosts of "
        f"{options.workers} workers, {options.routers} routers, a death every {options.every:g} s",
        COLUMNS,
        seed=options.seed,
        settings={name: value for name, value in vars(options).items() if name != "json"},
    )
    with TemporaryDirectory() as folder:
        write_adapters(Path(folder))
        config = AppConfig.model_validate(
            {
                "pools": [pool(options.hosts, options.workers, Path(folder))],
                "router": {"min_replicas": options.routers, "max_replicas": options.routers},
            }
        )
        with serving(config) as url:
            good = asyncio.run(endure(url, options, report))
    report.publish(options.json)
    sys.exit(not good)


async def endure(url: str, options: argparse.Namespace, report: Report) -> bool:
    """Load and deaths for as long as asked; whether nothing was lost and all is whole."""
    async with AsyncClient(url) as client:
        references = await draw_references(client)
        clients = Clients(url, references, options.seed)
        deaths = Deaths(client, random.Random(f"{options.seed} deaths"))
        resources = Resources()
        async with asyncio.TaskGroup() as group:
            meanwhile = (
                group.create_task(resources.look_on(options.look)),
                group.create_task(deaths.strike_on(options.deaths, options.every)),
            )
            asking = [
                group.create_task(clients.ask_on(number, 60 * options.minutes))
                for number in range(options.clients)
            ]
            await asyncio.wait(asking)
            for task in meanwhile:
                task.cancel()
        began = time.monotonic()
        is_whole = await whole(client, options.hosts, options.workers)
        clients.tell(report)
        deaths.tell(report)
        report.add("whole and idle again", "", f"{time.monotonic() - began:.1f} s" if is_whole else "no")
        if is_whole:
            clients.compare(await draw_references(client), report)
        resources.look()
        resources.tell(report)
        return is_whole and not clients.faults


async def whole(client: AsyncClient, hosts: int, workers: int) -> bool:
    """Wait until every host is there, its workers are free, and nobody waits; whether that came."""
    end = time.monotonic() + WHOLE_S
    while time.monotonic() < end:
        with suppress(ConnectionError, DistrirayError):
            there = (await client.fleet()).pools[POOL].hosts.values()
            if len(there) == hosts and all(
                host.free_workers == workers and not host.running and not host.waiting for host in there
            ):
                return True
        await asyncio.sleep(0.25)
    return False


if __name__ == "__main__":
    main()
