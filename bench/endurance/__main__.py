"""The service for as long as asked, under load and strikes: `python -m bench.endurance --minutes 30`.

Starts Ray and a service on this machine, one pool of hosts on the built-in model. Clients ask without pause,
over HTTP and by handle, for pictures, streams, edits and adapters, with deadlines and priorities; some leave,
some cancel. Meanwhile workers, hosts and routers are killed and stopped, and the service is described anew.
Every picture is held against the one that a single worker drew of the same request before that. Watched are
the memory, threads and open files of each process. The status is 1 if a request was lost, a picture is
another one, or the service is not whole at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.arguments import add_json
from bench.endurance import clients, resources
from bench.endurance.clients import Clients
from bench.endurance.resources import Resources
from bench.endurance.scenes import draw_references, scenes
from bench.endurance.service import Service
from bench.endurance.strikes import STRIKES, Strikes
from bench.report import Report
from bench.serving import local_serve
from distriray import AsyncClient
from distriray.arguments import positive, positive_number


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
        "--every", type=positive_number, default=20.0, help="seconds between strikes, as a mean"
    )
    parser.add_argument("--strikes", nargs="*", choices=sorted(STRIKES), default=sorted(STRIKES))
    parser.add_argument(
        "--look", type=positive_number, default=10.0, help="seconds between looks at processes"
    )
    parser.add_argument("--seed", type=int, default=0)
    add_json(parser)
    options = parser.parse_args()
    strikes = f"a strike every {options.every:g} s" if options.strikes else "no strikes"
    under = (
        f"{options.minutes:g} minutes, {options.clients} clients, {options.hosts} hosts of {options.workers} "
        f"workers, {options.routers} routers, {strikes}"
    )
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    told, held = (
        Report(f"bench.endurance: {what} in {under}", columns, seed=options.seed, settings=settings)
        for what, columns in (("requests", clients.COLUMNS), ("processes", resources.COLUMNS))
    )
    with TemporaryDirectory() as folder, local_serve() as url:
        service = Service(url, options.hosts, options.workers, options.routers, Path(folder))
        good = asyncio.run(endure(service, options, told, held))
    told.publish(options.json)
    held.publish(options.json and options.json.with_stem(f"{options.json.stem}-processes"))
    sys.exit(not good)


async def endure(service: Service, options: argparse.Namespace, told: Report, held: Report) -> bool:
    """Load and strikes for as long as asked; whether nothing was lost and all is whole.

    Args:
        told: gets what came of the requests, and what struck.
        held: gets what processes held.
    """
    async with AsyncClient(service.url) as client:
        await service.start(client)
        asked = scenes(options.workers)
        askers = Clients(service.url, asked, await draw_references(client, asked), options.seed)
        strikes = Strikes(service, client, random.Random(f"{options.seed} strikes"))
        processes = Resources()
        async with asyncio.TaskGroup() as group:
            meanwhile = (
                group.create_task(processes.look_on(options.look)),
                group.create_task(strikes.strike_on(options.strikes, options.every)),
            )
            asking = [
                group.create_task(askers.ask_on(number, 60 * options.minutes))
                for number in range(options.clients)
            ]
            await asyncio.wait(asking)
            for task in meanwhile:
                task.cancel()
        began = time.monotonic()
        is_whole = await service.whole(client)
        askers.tell(told)
        strikes.tell(told)
        if is_whole:
            told.add("whole and idle again", "", "", "", f"{time.monotonic() - began:.2f}")
            askers.compare(await draw_references(client, asked), told)
        processes.look()
        processes.tell(held)
        return is_whole and not askers.faults


if __name__ == "__main__":
    main()
