"""The cost of open pages: `python -m bench.pages`.

Starts Ray and the service of serve_config.yaml on this machine. As many clients as there would be pages
follow `/v1/fleet/events` as the page's view to watch does, asking again when a stream ends. Measured are the
processor's seconds of the service's processes, without pages and with them in turn, while nobody
draws, while one large picture is drawn, and while requests are always in flight; and the images a second of
the latter (none of it with `--seconds 0`).
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from statistics import median

import httpx
import psutil

from bench.arguments import add_json
from bench.report import Report
from bench.serving import measure_capacity, service
from distriray.arguments import positive, positive_number
from distriray.wire import IMAGES

EVENTS = "/v1/fleet/events"
ROLES = {"ProxyActor": "proxy", "Ingress": "router", "elastic": "host", "raylet": "raylet"}
"""Whose processes are counted, by a part of their command line; workers draw, and are not."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=positive, default=10)
    parser.add_argument(
        "--rounds", type=positive, default=3, help="without and with pages, each first in turn"
    )
    parser.add_argument(
        "--idle-seconds",
        type=positive_number,
        default=30.0,
        help="of each measurement without, or of one picture",
    )
    parser.add_argument(
        "--seconds", type=positive_number, default=60.0, help="half of it: of images a second, each"
    )
    parser.add_argument("--size", type=positive, default=128, help="pixels of a side (default 128)")
    parser.add_argument("--steps", type=positive, default=6)
    parser.add_argument("--max-queue", type=positive, default=16)
    add_json(parser)
    options = parser.parse_args()
    with service(options.max_queue) as (url, _):
        asyncio.run(measure(url, options)).publish(options.json)


async def measure(url: str, options: argparse.Namespace) -> Report:
    """All rounds; medians over them."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        if options.seconds:
            await measure_capacity(client, options)
        cost: dict[tuple[str, int], list[Counter[str]]] = {}
        images: dict[int, list[float]] = {}
        for number in range(2 * options.rounds):
            pages = options.pages if number % 4 in (1, 2) else 0  # a machine that drifts favours neither
            async with watching(client, pages):
                before, began = used(), time.monotonic()
                await asyncio.sleep(options.idle_seconds)
                cost.setdefault(("nothing", pages), []).append(share(before, began))
                async with drawing(client):
                    before, began = used(), time.monotonic()
                    await asyncio.sleep(options.idle_seconds)
                    cost.setdefault(("one picture", pages), []).append(share(before, began))
                if not options.seconds:
                    continue
                before, began = used(), time.monotonic()
                images.setdefault(pages, []).append(await measure_capacity(client, options))
                cost.setdefault(("requests", pages), []).append(share(before, began))
    report = Report(
        f"bench.pages: {options.pages} pages that watch; the processor in per cent of one core, medians",
        columns=("meanwhile", "pages", *ROLES.values(), "together", "images/s"),
        seed=0,
        settings={name: value for name, value in vars(options).items() if name != "json"},
    )
    for (meanwhile, pages), rounds in cost.items():
        drawn = f"{median(images[pages]):.2f}" if meanwhile == "requests" else "-"
        roles = [f"{100 * median(one[role] for one in rounds):.2f}" for role in ROLES.values()]
        together = f"{100 * median(one.total() for one in rounds):.2f}"
        report.add(meanwhile, str(pages), *roles, together, drawn)
    return report


@asynccontextmanager
async def drawing(client: httpx.AsyncClient) -> AsyncIterator[None]:
    """One worker is at one large picture after the other: every look has news, and all else stands still."""

    async def draw() -> None:
        while True:
            body = {"prompt": "a lake", "size": "512x512", "num_inference_steps": 100, "gang_size": 1}
            (await client.post(IMAGES, json=body)).raise_for_status()

    task = asyncio.create_task(draw())
    try:
        await asyncio.sleep(3.0)
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def watching(client: httpx.AsyncClient, pages: int) -> AsyncIterator[None]:
    """So many pages are open; they have heard something before the block begins."""
    heard = [asyncio.Event() for _ in range(pages)]
    tasks = [asyncio.create_task(watch(client, event)) for event in heard]
    try:
        for event in heard:
            await asyncio.wait_for(event.wait(), 30)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def watch(client: httpx.AsyncClient, heard: asyncio.Event) -> None:
    while True:
        async with client.stream("GET", EVENTS) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data:"):
                    heard.set()
        await asyncio.sleep(1.0)


def used() -> Counter[str]:
    """Seconds of the processor that each role has used so far."""
    found: Counter[str] = Counter()
    for process in psutil.Process().children(recursive=True):
        try:
            command, times = " ".join(process.cmdline()[:2]), process.cpu_times()
        except psutil.Error:
            continue
        for part, role in ROLES.items():
            if part in command:
                found[role] += times.user + times.system
                break
    return found


def share(before: Counter[str], began: float) -> Counter[str]:
    """Of one core, by role, since `began`."""
    elapsed, now = time.monotonic() - began, used()
    return Counter({role: (now[role] - before[role]) / elapsed for role in ROLES.values()})


if __name__ == "__main__":
    main()
