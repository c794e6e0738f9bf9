"""The service under load: `python -m bench.serving`.

Starts Ray and the service of serve_config.yaml on this machine, then measures over HTTP: what one image takes
beside calling the pipeline, a host and the handle directly; capacity, with more requests in flight than
workers; and Poisson arrivals at fractions of that capacity, which wait for nobody (open loop). Latency counts
from the moment a request was due. The client shares the machine's cores with the workers.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import ray
import torch
import yaml
from ray import serve

from bench.arguments import add_json
from bench.report import Report
from deployments.app import build_app
from deployments.config import AppConfig
from distriray.arguments import positive, positive_number
from distriray.gang import open_host, reaper
from distriray.models import load_pipeline
from distriray.requests import GenerationRequest
from distriray.wire import IMAGES

CONFIG = Path(__file__).parents[1] / "serve_config.yaml"
LOGICAL_CPUS = 8  # of Ray's accounting, so that placement groups fit on a machine of any size
WARM_UP_S = 3.0
PROMPT = "a lake at dusk, snowy mountains"
COLUMNS = (
    "load",
    "sent/s",
    "sent",
    "finished",
    "refused",
    "lost",
    "p50 s",
    "p95 s",
    "p99 s",
    "goodput/s",
    "refusal p99 ms",
)


@dataclass(frozen=True)
class Answer:
    """Outcome of one request; `seconds` from when it was due, `status` 0 if no answer came."""

    status: int
    seconds: float
    good: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=positive, default=128, help="pixels of a side (default 128)")
    parser.add_argument("--steps", type=positive, default=6)
    parser.add_argument(
        "--loads", type=positive_number, nargs="+", default=[0.5, 0.9, 2.0], help="of capacity"
    )
    parser.add_argument("--seconds", type=positive_number, default=30.0, help="of arrivals at each load")
    parser.add_argument("--max-queue", type=positive, default=16, help="requests that may wait at the host")
    parser.add_argument("--rounds", type=positive, default=15, help="of single images")
    parser.add_argument("--seed", type=int, default=0)
    add_json(parser)
    options = parser.parse_args()
    with service(options.max_queue) as (url, config):
        direct = overhead(url, config, options)
        direct.publish(options.json and options.json.with_stem(f"{options.json.stem}-overhead"))
        print(flush=True)
        asyncio.run(load(url, options)).publish(options.json)


@contextmanager
def service(max_queue: int) -> Iterator[tuple[str, AppConfig]]:
    """The URL and configuration of the service, which ends with the block."""
    (application,) = yaml.safe_load(CONFIG.read_text())["applications"]
    args = application["args"]
    args["pools"] = [{**pool, "max_queue": max_queue} for pool in args["pools"]]
    config = AppConfig.model_validate(args)
    with local_serve() as url:
        serve.run(build_app(config), name=application["name"], route_prefix=application["route_prefix"])
        yield url, config


@contextmanager
def local_serve() -> Iterator[str]:
    """The URL of Serve on a Ray of its own; both end with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(address="local", num_cpus=LOGICAL_CPUS, include_dashboard=False, log_to_driver=False)
    watcher = reaper.start()
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        watcher.communicate()


def overhead(url: str, config: AppConfig, options: argparse.Namespace) -> Report:
    """Seconds of one image at a time by one worker, whichever way it is asked for."""
    torch.set_num_threads(1)
    pool = config.pools[0].host.model_copy(update={"workers": 1, "gang_sizes": (1,)})
    pipeline = load_pipeline(pool.model, "cpu")
    handle = serve.get_app_handle("distriray")
    with open_host(pool) as host, httpx.Client(base_url=url, timeout=None) as client:
        ways: dict[str, Callable[[int], object]] = {
            "the pipeline, in this process": lambda seed: pipeline(
                PROMPT,
                height=options.size,
                width=options.size,
                num_inference_steps=options.steps,
                guidance_scale=5.0,
                generator=torch.Generator().manual_seed(seed),
            ),
            "a host, its worker in another process": lambda seed: host.generate(request(options, seed)),
            "the service, by handle": lambda seed: handle.generate.remote(request(options, seed)).result(),
            "the service, over HTTP": lambda seed: client.post(
                IMAGES, json={**fields(options, seed), "gang_size": 1}
            ).raise_for_status(),
        }
        rounds = [{way: _time(ask, seed) for way, ask in ways.items()} for seed in range(-2, options.rounds)][
            2:
        ]
    report = Report(
        f"bench.serving: one image of {options.size}x{options.size} in {options.steps} steps, "
        "one after the other, by one worker; medians",
        columns=("by way of", "ms", "above the pipeline, ms", "above the host, ms"),
        seed=options.seed,
        settings=_settings(options),
    )
    baselines = list(ways)[:2]
    for way in ways:
        above = [f"{1e3 * median(r[way] - r[base] for r in rounds):.1f}" for base in baselines]
        report.add(way, f"{1e3 * median(r[way] for r in rounds):.1f}", *above)
    return report


async def load(url: str, options: argparse.Namespace) -> Report:
    """Latency, goodput and refusals at each load."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        capacity = await measure_capacity(client, options)
        report = Report(
            f"bench.serving: open loop over HTTP, {options.size}x{options.size} in {options.steps} steps, "
            f"{options.seconds:g} s of arrivals each; capacity {capacity:.2f} images/s",
            columns=COLUMNS,
            seed=options.seed,
            settings={**_settings(options), "capacity": capacity},
        )
        for share in options.loads:
            before = await _outcomes(client)
            rate = share * capacity
            draw = random.Random(f"{options.seed} {share}")
            began = time.monotonic()
            answers = await arrivals(client, options, rate, draw)
            elapsed = time.monotonic() - began
            finished = [answer.seconds for answer in answers if answer.status == 200 and answer.good]
            refused = [answer.seconds for answer in answers if answer.status == 429 and answer.good]
            ended = await _outcomes(client)
            made = {kind: ended.get(kind, 0) - before.get(kind, 0) for kind in ended}
            if made.get("finished", 0) != len(finished):
                raise AssertionError(f"hosts finished {made}, and {len(finished)} images came")
            report.add(
                f"{share:g}",
                f"{rate:.2f}",
                str(len(answers)),
                str(len(finished)),
                str(len(refused)),
                str(len(answers) - len(finished) - len(refused)),
                *(_percentile(finished, percent, "{:.2f}") for percent in (50, 95, 99)),
                f"{len(finished) / elapsed:.2f}",
                _percentile([1e3 * seconds for seconds in refused], 99, "{:.0f}"),
            )
    return report


async def measure_capacity(client: httpx.AsyncClient, options: argparse.Namespace) -> float:
    """Images a second while half as many requests as the queue holds are always in flight."""
    came: list[float] = []
    counts_from = time.monotonic() + WARM_UP_S
    ends_at = counts_from + options.seconds / 2

    async def ask_on() -> None:
        while time.monotonic() < ends_at:
            answer = await ask(client, fields(options, len(came)), time.monotonic())
            assert answer.good and answer.status == 200, answer
            came.append(time.monotonic())

    await asyncio.gather(*(ask_on() for _ in range(max(4, options.max_queue // 2))))
    return sum(counts_from <= moment < ends_at for moment in came) / (ends_at - counts_from)


async def arrivals(
    client: httpx.AsyncClient, options: argparse.Namespace, rate: float, draw: random.Random
) -> list[Answer]:
    """All answers to requests that come at `rate` a second, each sent when it is due."""
    began = time.monotonic()
    due = 0.0
    asked: list[asyncio.Task[Answer]] = []
    while (due := due + draw.expovariate(rate)) < options.seconds:
        await asyncio.sleep(max(0.0, began + due - time.monotonic()))
        asked.append(asyncio.create_task(ask(client, fields(options, len(asked)), began + due)))
    return await asyncio.gather(*asked)


async def ask(client: httpx.AsyncClient, body: dict[str, Any], due: float) -> Answer:
    """Send one request. `good` is an image, or a refusal that says when to come again."""
    try:
        response = await client.post(IMAGES, json=body)
    except httpx.HTTPError:
        return Answer(0, time.monotonic() - due, False)
    seconds = time.monotonic() - due
    if response.status_code == 200:
        (image,) = response.json()["data"]
        return Answer(200, seconds, base64.b64decode(image["b64_json"]).startswith(b"\x89PNG"))
    return Answer(response.status_code, seconds, response.headers.get("retry-after", "").isdigit())


def fields(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """A request's JSON."""
    size = f"{options.size}x{options.size}"
    return {"prompt": PROMPT, "size": size, "num_inference_steps": options.steps, "seed": abs(seed)}


def request(options: argparse.Namespace, seed: int) -> GenerationRequest:
    """The same for a host."""
    return GenerationRequest(
        prompt=PROMPT,
        height=options.size,
        width=options.size,
        num_inference_steps=options.steps,
        seed=abs(seed),
        gang_size=1,
    )


async def _outcomes(client: httpx.AsyncClient) -> dict[str, int]:
    """Requests by how they ended, over all hosts."""
    fleet = (await client.get("/v1/fleet")).raise_for_status().json()
    total: dict[str, int] = {}
    for pool in fleet["pools"].values():
        for host in pool["hosts"].values():
            for kind, count in host["outcomes"].items():
                total[kind] = total.get(kind, 0) + count
    return total


def _time(ask: Callable[[int], object], seed: int) -> float:
    began = time.perf_counter()
    ask(seed)
    return time.perf_counter() - began


def _percentile(values: list[float], percent: int, form: str) -> str:
    if len(values) < 2:
        return form.format(*values) if values else "-"
    return form.format(quantiles(values, n=100, method="inclusive")[percent - 1])


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name != "json"}


if __name__ == "__main__":
    main()
