"""A gang of two workers behind the service, and one of them killed: `python -m bench.gpu.serve`.

Starts Ray and a service with one pool of two workers, asks for images over HTTP, ends one worker with SIGKILL
in the middle of an image, and sees that image through to its end. One GPU is enough: the workers share it,
so nothing here says how fast a gang of two GPUs is. `--device cpu` does the same on any machine.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil
import ray
import torch
from ray import serve

from bench.gpu.sharing import has_switch, sharing_environment
from bench.likeness import psnr
from bench.report import Report
from deployments.app import build_app
from deployments.config import AppConfig
from distriray import Client, GenerationRequest
from distriray.arguments import positive_number
from distriray.events import Event, Finished, Repaired, Step
from distriray.gang import reaper
from distriray.results import GenerationResult
from distriray.status import HostStatus

WORKERS, POOL, PROMPT, SEED = 2, "pair", "a lake at dusk, snowy mountains", 1
SCENES = {"cpu": (128, 24), "cuda": (512, 60)}
"""Pixels of a side and steps, by device."""
LOGICAL_CPUS = 8  # of Ray's accounting
ALIKE_DB = 20.0  # PSNR that two displaced patches reach against one device's picture, with room
LOGS = Path("/tmp/ray/session_latest/logs")
COMPLAINT = re.compile(r"Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*.*|.*NCCL WARN.*")
LOG_CHARS, TOLD, TOLD_CHARS = 100_000, 8, 1000

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=sorted(SCENES), default="cuda")
    parser.add_argument("--out", type=Path, help="write the table here, pictures and logs beside it")
    parser.add_argument(
        "--deadline", type=positive_number, default=420.0, help="seconds until all is ended (420)"
    )
    options = parser.parse_args()
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    report = Report(
        f"bench.gpu.serve: a gang of {WORKERS} workers on {_devices(options.device)}",
        ("what", "figure"),
        seed=SEED,
        settings={"device": options.device},
    )
    guard = threading.Timer(options.deadline, _end_all, (report, options))
    guard.daemon = True
    guard.start()
    try:
        with pool(options.device, report) as url, Client(url, timeout_s=options.deadline) as client:
            watch_a_gang(client, report, options)
        tell(report, "everything ended", "yes")
    except BaseException:
        tell(report, "failed", traceback.format_exc().splitlines()[-1])
        traceback.print_exc()
        _tell_logs(options.out)
        sys.exit(1)
    finally:
        guard.cancel()
        report.publish(options.out)


@contextmanager
def pool(device: str, report: Report) -> Iterator[str]:
    """The URL of a service with one pool of one host, which ends with the block."""
    config = config_of(device)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.perf_counter()
    ray.init(
        address="local",
        num_cpus=LOGICAL_CPUS,
        num_gpus=WORKERS if device == "cuda" else 0,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=256 * 2**20,
        runtime_env=_sharing(report) if device == "cuda" else None,
    )
    watcher = reaper.start()
    try:
        tell(report, "Ray starts", f"{time.perf_counter() - began:.1f} s")
        began = time.perf_counter()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        tell(report, "Serve starts", f"{time.perf_counter() - began:.1f} s")
        began = time.perf_counter()
        serve.run(build_app(config), name="distriray")
        tell(report, "the pool starts: workers, weights, gangs", f"{time.perf_counter() - began:.1f} s")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        watcher.communicate()


def config_of(device: str) -> AppConfig:
    """One pool of one host."""
    pool = {
        "name": POOL,
        "device": device,
        "workers": WORKERS,
        "cpus_per_worker": 0.5,
        "parallel": {"cfg_parallel": False},  # else the two would share no picture
        "start_timeout_s": 150,
    }
    return AppConfig.model_validate({"pools": [pool], "router": {"max_replicas": 1}})


def _sharing(report: Report) -> dict[str, object]:
    """The runtime environment of workers that share a GPU, which others inherit from this process.

    NCCL 2.30 has a switch for it (to have it, run this with `LD_PRELOAD`). Before, each process claims to be
    a machine of its own, whose bytes go over sockets.
    """
    from cupy.cuda import nccl

    if torch.cuda.device_count() >= WORKERS:
        return {}
    inherited = {
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        "RAY_LD_PRELOAD_ON_WORKERS": "1",
        "NCCL_DEBUG": "WARN",
    }
    switch = has_switch()
    tell(report, "NCCL", f"{nccl.get_version()}, {'its switch' if switch else 'sockets'} to share a GPU")
    for name, value in {**inherited, **(sharing_environment(None) if switch else {})}.items():
        os.environ.setdefault(name, value)
    return {} if switch else {"worker_process_setup_hook": _be_a_machine}


def _be_a_machine() -> None:
    os.environ.update(sharing_environment(f"process-{os.getpid()}"))


def watch_a_gang(client: Client, report: Report, options: argparse.Namespace) -> None:
    """Images by one worker and by the gang, the gang's with a worker killed, and the mended gang's."""
    side, steps = SCENES[options.device]
    ask = partial(
        GenerationRequest, prompt=PROMPT, height=side, width=side, num_inference_steps=steps, seed=SEED
    )
    for worker in host(client).workers:
        tell(report, f"worker {worker.index}", f"{worker.device}, loaded in {worker.load_s:.1f} s")
    pictures = {}
    for name, size in (("one worker", 1), ("a gang", WORKERS)):
        client.generate(ask(gang_size=size, num_inference_steps=8))  # warms up
        seconds, result = timed(partial(client.generate, ask(gang_size=size)))
        pictures[name] = result.images[0]
        tell_image(report, f"{side}x{side} over HTTP by {name}", seconds, result)
        assert result.gang_size == size, result.summary()
    before = len(host(client).repairs)
    result = _seen_through(client, report, ask(gang_size=WORKERS), steps)
    pictures["a gang that lost a worker"] = result.images[0]
    until(lambda: len(host(client).repairs) > before and host(client).free_workers == WORKERS, 120)
    (repair,) = host(client).repairs[before:]
    tell(report, "the worker was replaced", f"in {repair.seconds:.1f} s, cause: {repair.cause}")
    seconds, result = timed(partial(client.generate, ask(gang_size=WORKERS)))
    tell_image(report, "by the mended gang", seconds, result)
    pictures["the mended gang"] = result.images[0]
    for number, (name, picture) in enumerate(pictures.items()):
        if options.out is not None:
            picture.save(options.out.with_name(f"{options.out.stem}-{number}.png"))
        if number == 0:
            continue
        likeness = psnr(picture, pictures["one worker"])
        tell(report, f"PSNR of the picture by {name} to one worker's", f"{likeness:.1f} dB")
        assert likeness >= ALIKE_DB, f"the picture by {name} is another one"
    again = psnr(pictures["a gang"], pictures["the mended gang"])
    tell(report, "PSNR of the mended gang's picture to the gang's", f"{again:.1f} dB")


def _seen_through(client: Client, report: Report, request: GenerationRequest, steps: int) -> GenerationResult:
    """The result of an image whose second worker is killed after a third of the steps."""
    victim = host(client).workers[-1]
    seen: list[Event] = []
    done = killed_at = 0
    began = killed = time.perf_counter()
    for event in client.stream(request):
        seen.append(event)
        if not isinstance(event, Step | Finished):
            print(f"{time.perf_counter() - began:7.2f} s  {event}", flush=True)
        if isinstance(event, Step):
            done = event.step
            if not killed_at and done >= steps // 3:
                killed_at, killed = done, time.perf_counter()
                os.kill(victim.pid, signal.SIGKILL)
        if isinstance(event, Repaired):
            tell(
                report,
                "the gang is known to be broken",
                f"{time.perf_counter() - killed:.2f} s after the kill",
            )
            tell(report, "told steps that are lost", str(max(0, done - event.step)))
    seconds = time.perf_counter() - began
    result = next(event.result for event in seen if isinstance(event, Finished))
    tell(report, "worker killed", f"worker {victim.index}, after step {killed_at} of {steps} was told")
    tell(report, "events", ", ".join(event.kind for event in seen if not isinstance(event, Step)))
    tell_image(report, "the image whose worker was killed", seconds, result)
    tell(report, "gangs that broke under it", str(result.repairs))
    assert killed_at and result.repairs and any(isinstance(event, Repaired) for event in seen), seen
    return result


def tell(report: Report, what: str, figure: str) -> None:
    """Add a line to the table, and print it at once."""
    report.add(what, figure)
    print(f"{what}: {figure}", flush=True)


def tell_image(report: Report, what: str, seconds: float, result: GenerationResult) -> None:
    """Add what came of one image."""
    timings = result.timings
    tell(report, what, f"{seconds:.2f} s")
    tell(
        report,
        "  prepare, denoise, decode",
        f"{timings.prepare_s:.2f}, {timings.denoise_s:.2f}, {timings.decode_s:.2f} s",
    )
    for segment in result.segments:
        means = [
            f"{kind} {1e3 * mean:.1f} ms"
            for kind, mean in (("fresh", segment.fresh_step_s), ("stale", segment.stale_step_s))
            if mean is not None
        ]
        rate = segment.steps / segment.seconds if segment.seconds else 0.0
        figure = f"{rate:.1f} steps/s ({', '.join(means)})"
        tell(
            report,
            f"  steps {segment.first_step} to {segment.last_step} by workers {segment.workers}",
            figure,
        )


def host(client: Client) -> HostStatus:
    """The only host's report."""
    (only,) = client.fleet().pools[POOL].hosts.values()
    return only


def timed(ask: Callable[[], T]) -> tuple[float, T]:
    """Seconds of a call, and what came of it."""
    began = time.perf_counter()
    answer = ask()
    return time.perf_counter() - began, answer


def until(condition: Callable[[], object], timeout_s: float) -> None:
    """Wait for `condition`."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not so within {timeout_s:g} s")
        time.sleep(0.2)


def _devices(device: str) -> str:
    if device == "cpu" or not torch.cuda.is_available():
        return device
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def _end_all(report: Report, options: argparse.Namespace) -> None:
    """The time is up: say where everything is, keep what there is, and end all that was started."""
    tell(report, "failed", f"not over within {options.deadline:g} s")
    faulthandler.dump_traceback(all_threads=True)
    _tell_logs(options.out)
    report.publish(options.out)
    sys.stdout.flush()
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)


def _tell_logs(out: Path | None) -> None:
    """Print what Ray's processes complained of last; the logs' ends go into a file beside `out`."""
    files = [path for path in LOGS.rglob("*") if path.is_file() and path.suffix in {".err", ".log", ".out"}]
    files.sort(key=lambda path: path.stat().st_mtime)
    texts = {str(path.relative_to(LOGS)): path.read_text(errors="replace")[-LOG_CHARS:] for path in files}
    if out is not None:
        kept = "\n".join(f"==== {name}\n{text}" for name, text in texts.items() if text)
        out.with_suffix(".log").write_text(kept)
    complaints = {found: name for name, text in texts.items() for found in COMPLAINT.findall(text)}
    for complaint, name in list(complaints.items())[-TOLD:]:
        print(f"==== {name}\n{complaint[-TOLD_CHARS:]}", flush=True)


if __name__ == "__main__":
    main()
