"""`python -m distriray.jobs.generate prompts.jsonl --out DIR`: many prompts, every one made exactly once."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distriray.cli import check_ray, errors_as_messages
from distriray.errors import DistrirayError, InvalidRequest
from distriray.gang.config import HostConfig
from distriray.gang.config_file import read_config
from distriray.jobs.folder import Folder
from distriray.jobs.makers import own_hosts, running_app
from distriray.jobs.prompts import BadLine, Prompt, plain, read_prompts
from distriray.jobs.run import Maker, Run
from distriray.jobs.settings import settings_of
from distriray.results import GenerationResult

ALL_MADE, SOME_MISSING, STOPPED = 0, 1, 130
"""Exit codes. Something is missing after bad lines, failures, or when nothing could be started."""

IN_A_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


class _Notes(Console):
    def say(self, text: str) -> None:
        """One line, as it is, also where it is longer than a terminal's."""
        self.print(text, markup=False, emoji=False, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        """Say no more; rich would close standard output, where the summary goes, and end the thread."""
        self.quiet = True


notes = _Notes(stderr=True, highlight=False)


def generate(
    prompts: Annotated[Path, typer.Argument(help="JSON lines of GenerationRequest fields.")],
    out: Annotated[
        Path, typer.Option(help="Folder for images/, manifest.jsonl, errors.jsonl, summary.json.")
    ],
    app: Annotated[
        str | None, typer.Option(help="Send them to this running Serve application; else start hosts.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Of the app, or of the hosts started here: builtin:landscapes unless given."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Of each host started here; 1 unless given.")
    ] = None,
    hosts: Annotated[
        int | None, typer.Option(min=1, help="To start here, 1 unless given; each sits on one node.")
    ] = None,
    gang_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Gangs that hosts lend; repeatable, 1 unless given.")
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None, typer.Option(help="Of the workers; auto unless given.")
    ] = None,
    lora_dir: Annotated[
        Path | None, typer.Option(help="Adapters of hosts started here: a folder of .safetensors files.")
    ] = None,
    pool: Annotated[
        Path | None,
        typer.Option(help="YAML file of a pool's fields for hosts started here; options go before it."),
    ] = None,
    in_flight: Annotated[
        int | None, typer.Option(min=1, help="Prompts under way at each host, or at the app.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="Join this Ray cluster; else start one here.")
    ] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="Logical CPUs of a Ray started here.")] = None,
) -> None:
    """Make every prompt of a file once. Run again, it makes what is missing.

    The first Ctrl-C or SIGTERM lets what is under way finish; the second one does not.
    """
    began = time.monotonic()
    with errors_as_messages():
        if IN_A_RAY_JOB in os.environ and not out.is_absolute():
            raise InvalidRequest(
                f"--out {out} lies in the job's upload, which Ray deletes; use an absolute path", "out"
            )
        own: dict[str, Any] = {
            "workers": workers,
            "gang_size": gang_size or None,
            "device": device,
            "lora_dir": lora_dir,
            "pool": pool,
        }
        if app is not None:
            _refuse({**own, "hosts": hosts, "cpus": cpus})
            good, bad = _read(prompts, model=model)
            makers, each = running_app(app, address=address), in_flight or 8
        else:
            check_ray(address, cpus)
            config = _config(model, **own)
            settings = partial(settings_of, config)
            good, bad = _read(prompts, model=config.model.name, limits=config.limits, settings=settings)
            makers = own_hosts(config, hosts or 1, address=address, cpus=cpus)
            each = in_flight or config.workers // config.sizes[0] + 1
        with Folder(out) as folder:
            folder.begin(good, bad)
            before = sum(prompt.id in folder.made for prompt in good)
            run = _finish(good, folder, makers, each, before) if before < len(good) else None
            facts = {
                "prompts": len(good),
                "bad_lines": len(bad),
                "made_before": before,
                "made": run.completed if run else 0,
                "failed": run.failed if run else 0,
                "stopped": run.stopped if run else False,
                "seconds": round(time.monotonic() - began, 2),
            }
            folder.write_summary(facts)
    _tell(json.dumps(facts))
    raise typer.Exit(_exit_code(facts))


def _tell(summary: str) -> None:
    """Print what `summary.json` has; a log that is full, or read by nobody, is not the job's end."""
    try:
        print(summary, flush=True)
    except OSError:  # and what is left of it would fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(options: dict[str, Any]) -> None:
    """Raise InvalidRequest for an option of hosts that nobody starts."""
    for name, value in options.items():
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise InvalidRequest(f"{option} is for hosts started here; with --app leave it out", name)


def _config(
    model: str | None, *, pool: Path | None, gang_size: list[int] | None, **options: Any
) -> HostConfig:
    sizes = sorted(set(gang_size)) if gang_size else None
    return read_config(pool, {"model": {"name": model}, "gang_sizes": sizes, **options}, {"gang_sizes": [1]})


def _read(path: Path, **terms: Any) -> tuple[list[Prompt], list[BadLine]]:
    try:
        return read_prompts(path, **terms)
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}", "prompts") from error


def _finish(
    prompts: list[Prompt],
    folder: Folder,
    makers: AbstractContextManager[list[Maker]],
    in_flight: int,
    before: int,
) -> Run:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with (
        redirect_stdout(sys.stderr),  # what Ray says of a worker that died
        Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar,
    ):
        task = bar.add_task("starting", total=len(prompts), completed=before)

        def tell(prompt: Prompt, end: GenerationResult | DistrirayError) -> None:
            with suppress(OSError):  # a log that is full, say, is no reason to leave pictures undrawn
                note(prompt, end)

        def note(prompt: Prompt, end: GenerationResult | DistrirayError) -> None:
            bar.advance(task)
            if isinstance(end, DistrirayError):
                notes.say(f"line {prompt.line}: {plain(end)}")
                return
            for warning in end.warnings:
                notes.say(f"line {prompt.line}: {warning}")
            if not notes.is_terminal:
                done = before + run.completed + run.failed
                notes.say(f"{done} of {len(prompts)}: line {prompt.line}, {end.timings.total_s:.1f} s")

        with makers as started:
            run = Run(prompts, folder, started, in_flight=in_flight, tell=tell)
            bar.update(task, description="drawing")
            with _signals_stop(run):
                run.finish()
    return run


@contextmanager
def _signals_stop(run: Run) -> Iterator[None]:
    """Ctrl-C and SIGTERM stop the run instead of the program.

    A thread does it: a handler interrupts the main thread anywhere, and would wait for ever for a lock that
    this one holds.
    """
    signals: SimpleQueue[int | None] = SimpleQueue()  # to put something there takes no lock

    def obey() -> None:
        told = False
        while signals.get() is not None:
            run.stop()
            if not told:
                told = True
                with suppress(OSError):
                    notes.say("stopping; what is under way is finished first, unless you stop it again")

    thread = threading.Thread(target=obey, name="stop", daemon=True)
    thread.start()
    kinds = signal.SIGINT, signal.SIGTERM
    former = {kind: signal.signal(kind, lambda number, _: signals.put(number)) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in former.items():
            signal.signal(kind, handler)
        signals.put(None)
        thread.join()


def _exit_code(facts: dict[str, int | float | bool]) -> int:
    if facts["stopped"]:
        return STOPPED
    return SOME_MISSING if facts["bad_lines"] or facts["failed"] else ALL_MADE


def main() -> None:
    """The command."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(generate)
    command()


if __name__ == "__main__":
    main()
