"""The command line: `distriray generate`."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from PIL import Image
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from distriray.arguments import obstacle_to_writing
from distriray.config import ExchangeMode
from distriray.errors import DistrirayError, InvalidRequest
from distriray.gang.admission import check_listed
from distriray.gang.config_file import read_config
from distriray.picture import opaque
from distriray.requests import GenerationRequest, SamplingParams
from distriray.results import GenerationResult
from distriray.validation import invalid_request
from distriray.version import __version__

if TYPE_CHECKING:
    from distriray.gang import BlockingHost

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
notes = Console(stderr=True, highlight=False)


_SHORT = {
    "num_inference_steps": ["--steps"],
    "guidance_scale": ["--guidance"],
    "mask_image": ["--mask"],
}
"""Second spellings of options with long names."""

_AFTER_PATH = re.compile(r"@(-?[0-9.e+-]+(?:,[0-9.e+-]+){0,2})$")
"""Numbers at the end of `--control` and `--ip-adapter`."""

_LORA = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="<name[=scale]>", help="Adapter to draw with; repeatable."),
]

_CONTROL = Annotated[
    list[str] | None,
    typer.Option(
        "--control",
        metavar="<name=path[@scale[,start[,end]]]>",
        help="ControlNet to draw with, and the picture that it goes by; repeatable.",
    ),
]


_IP_ADAPTER = Annotated[
    list[str] | None,
    typer.Option(
        "--ip-adapter",
        metavar="<name=path[@scale]>",
        help="IP-Adapter to draw with, and the picture that it takes after; repeatable.",
    ),
]

_REFERENCE = Annotated[
    list[str] | None,
    typer.Option("--reference", metavar="<path>", help="Picture to edit, after --image; repeatable."),
]

_LISTS = {"loras": _LORA, "control": _CONTROL, "ip_adapters": _IP_ADAPTER, "references": _REFERENCE}


def _options() -> Iterator[inspect.Parameter]:
    """The prompt as an argument, and an option for every other field of SamplingParams.

    Values are text, which SamplingParams reads and checks, so that its messages are the only ones.
    """
    schema = SamplingParams.model_json_schema()["properties"]
    for name, field in SamplingParams.model_fields.items():
        if field.is_required():
            argument = Annotated[str, typer.Argument(help=field.description)]
            yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=argument)
            continue
        if name in _LISTS:
            annotation = _LISTS[name]
            yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=None)
            continue
        kind = {**schema[name], **schema[name].get("anyOf", [{}])[0]}
        names = kind.get("enum", [kind["type"]])
        option = typer.Option(
            *(f"--{name.replace('_', '-')}", *_SHORT.get(name, ())),
            help=field.description,
            metavar="<path>" if name in SamplingParams.FILES else f"<{'|'.join(names)}>",
        )
        default = None if field.default is None else str(field.default)
        yield inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[str | None, option], default=default
        )


def _with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the options of SamplingParams in place of its parameter `sampling`, a mapping."""

    def run(**values: Any) -> None:
        fields = {name: values.pop(name) for name in SamplingParams.model_fields}
        fields |= {name: Path(fields[name]) for name in SamplingParams.FILES if fields[name] is not None}
        with errors_as_messages():
            fields["loras"] = [_lora(text) for text in fields["loras"] or ()]
            for name, numbers in _NUMBERS.items():
                fields[name] = [_with_image(name, numbers, text) for text in fields[name] or ()]
            fields["references"] = [{"image": Path(path)} for path in fields["references"] or ()]
        command(sampling={k: v for k, v in fields.items() if v is not None}, **values)

    own = inspect.signature(command, eval_str=True).parameters.values()
    others = [each.replace(kind=each.KEYWORD_ONLY) for each in own if each.name != "sampling"]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([*_options(), *others])  # type: ignore[attr-defined]
    return run


def _lora(text: str) -> dict[str, Any]:
    name, equals, scale = text.partition("=")
    if not equals:
        return {"name": name}
    try:
        return {"name": name, "scale": float(scale)}
    except ValueError:
        raise InvalidRequest(f"--lora {text}: the scale {scale!r} is no number", "loras") from None


_NUMBERS = {"control": ("scale", "start", "end"), "ip_adapters": ("scale",)}
"""What the numbers after the path of a picture are, in options that are called by such a list's name."""


def _with_image(field: str, numbers: tuple[str, ...], text: str) -> dict[str, Any]:
    option = f"--{field.removesuffix('s').replace('_', '-')} {text}"
    name, equals, path = text.partition("=")
    found = _AFTER_PATH.search(path)
    values = found[1].split(",") if found else []
    if not equals or not path:
        raise InvalidRequest(f"{option}: write name=path, such as {name or 'one'}=picture.png@0.8", field)
    if len(values) > len(numbers):
        raise InvalidRequest(f"{option}: behind the @ there is but {', '.join(numbers)}", field)
    entry: dict[str, Any] = {"name": name, "image": Path(path[: found.start()] if found else path)}
    try:
        return entry | dict(zip(numbers, map(float, values), strict=False))
    except ValueError:
        raise InvalidRequest(f"{option}: {','.join(values)} are no numbers", field) from None


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """One image, many devices: diffusion models on gangs of workers."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
@_with_sampling
def generate(
    sampling: dict[str, Any],
    out: Annotated[
        Path, typer.Option(help="Output file; several images get -1, -2, … before the suffix.")
    ] = Path("out.png"),
    gang_size: Annotated[int, typer.Option(min=1, help="Workers that draw it together.")] = 1,
    model: Annotated[
        str | None,
        typer.Option(help="builtin:…, a folder, or a Hugging Face id; builtin:landscapes unless given."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a Hugging Face model.")] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the weight files, such as fp16.")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"] | None,
        typer.Option(help="Of the weights; auto unless given."),
    ] = None,
    quantize: Annotated[
        Literal["int8", "float8"] | None, typer.Option(help="Round the network's weights, by torchao.")
    ] = None,
    offload_text: Annotated[
        bool | None, typer.Option("--offload-text", help="Keep text encoders in the host's memory.")
    ] = None,
    lora_dir: Annotated[
        Path | None, typer.Option(help="Folder of .safetensors files, which --lora names without the suffix.")
    ] = None,
    pool: Annotated[
        Path | None,
        typer.Option(help="YAML file of a pool's fields, such as controls; options go before what it has."),
    ] = None,
    exchange: Annotated[
        ExchangeMode | None,
        typer.Option(help="Which of the peers' values a worker waits for; auto unless given."),
    ] = None,
    warmup_steps: Annotated[
        str | None,
        typer.Option(help="Synchronous steps at the start, or auto; by default as --exchange needs."),
    ] = None,
    cache_interval: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100,
            help="Compute one of so many steps whole, the others by their first block; else all.",
        ),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None, typer.Option(help="Of the workers; auto unless given.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Join this Ray cluster; else start one here.")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="Logical CPUs of a Ray started here.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Draw it with one worker too, and compare.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Draw a picture with a gang of workers."""
    with errors_as_messages():
        request = GenerationRequest.parse({**sampling, "gang_size": gang_size}).seeded()
        for name, picture in request.pictures.items():
            picture.load(name)
        _check_out(out)
        check_ray(address, cpus)
        if compare and gang_size == 1:
            raise InvalidRequest(
                "--compare is of a gang with one worker; use --gang-size 2 or more", "compare"
            )
        weights = {"revision": revision, "variant": variant, "dtype": dtype, "quantize": quantize}
        options = {
            "model": {"name": model, "offload_text": offload_text, **weights},
            "workers": gang_size,
            "gang_sizes": sorted({1, gang_size} if compare else {gang_size}),
            "device": device,
            "parallel": {
                "exchange": exchange,
                "warmup_steps": warmup_steps,
                "cache_interval": cache_interval,
            },
            "lora_dir": lora_dir,
        }
        config = read_config(pool, options)
        check_listed(request, config)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it logs while it is imported
        from distriray.gang import open_host

        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        with (
            redirect_stdout(sys.stderr),  # what Ray says of a worker that died
            Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar,
        ):
            start = bar.add_task(f"starting {gang_size} worker{'s' * (gang_size > 1)}", total=None)
            with open_host(config, address=address, cpus=cpus) as host:
                bar.remove_task(start)
                alone = _compare(host, request, bar) if compare else None
                result = _draw(host, request, bar)
        paths = _save(result, out)
        _tell(result, paths, alone, as_json)


def _draw(host: BlockingHost, request: GenerationRequest, bar: Progress) -> GenerationResult:
    from distriray.events import Finished, Step

    task = bar.add_task(f"gang of {request.gang_size}", total=None)
    for event in host.stream(request):
        if isinstance(event, Step):
            said = f"gang of {event.gang_size}, step {event.step} of {event.num_steps}"
            bar.update(task, completed=event.step, total=event.num_steps, description=said)
        elif isinstance(event, Finished):
            bar.remove_task(task)
            return event.result
    raise AssertionError("a stream ends with its result or raises")


def _compare(host: BlockingHost, request: GenerationRequest, bar: Progress) -> GenerationResult:
    """The same picture by one worker, after a few steps that warm both up."""
    fixed = host.host.facts.terms.fixes_steps
    few = {} if fixed else {"num_inference_steps": min(2, request.num_inference_steps or 2)}
    for size in (1, request.gang_size):
        host.generate(request.model_copy(update={**few, "id": f"warm-up {size}", "gang_size": size}))
    return _draw(host, request.model_copy(update={"id": "alone", "gang_size": 1}), bar)


def check_ray(address: str | None, cpus: int | None) -> None:
    """Raise InvalidRequest for what a Ray is to be started with where none is."""
    if address is not None and cpus is not None:
        raise InvalidRequest(
            f"--cpus is for a Ray started here, and {address} is to be joined; leave one of them out", "cpus"
        )


def _check_out(out: Path) -> None:
    Image.init()
    if out.suffix.lower() not in Image.EXTENSION or Image.EXTENSION[out.suffix.lower()] not in Image.SAVE:
        raise InvalidRequest(
            f"--out {out}: {out.suffix or 'no suffix'!r} is no image format; use .png", "out"
        )
    try:  # some only write what they read, or need a plugin
        Image.new("RGB", (8, 8)).save(BytesIO(), Image.EXTENSION[out.suffix.lower()])
    except (OSError, ValueError) as error:
        message = f"--out {out}: a picture cannot be written as {out.suffix!r} ({error}); use .png"
        raise InvalidRequest(message, "out") from error
    if why := obstacle_to_writing(out):
        raise InvalidRequest(f"--out {out}: {why}", "out")


_TRANSPARENT = "PNG", "TIFF", "WEBP"
"""Forms of files that hold transparency."""

_LOSSY = "JPEG", "WEBP", "AVIF"
"""Those that lose something; as over HTTP they are to lose as little as they can."""


def _save(result: GenerationResult, out: Path) -> list[Path]:
    if len(result.images) == 1:
        paths = [out]
    else:
        paths = [out.with_stem(f"{out.stem}-{i + 1}") for i in range(len(result.images))]
    for image, path in zip(result.images, paths, strict=True):
        form = Image.EXTENSION[path.suffix.lower()]
        options: dict[str, Any] = {"quality": 100} if form in _LOSSY else {}
        try:
            (image if form in _TRANSPARENT else opaque(image)).save(path, **options)
        except OSError as error:
            again = f"with --seed {result.seeds[0]} the same command draws it again"
            raise DistrirayError(
                f"{path} cannot be written: {error.strerror or error}; mend that, and {again}"
            ) from error
    return paths


def _tell(result: GenerationResult, paths: list[Path], alone: GenerationResult | None, as_json: bool) -> None:
    for warning in result.warnings:
        print(f"distriray: {warning}", file=sys.stderr)
    seconds = result.timings.total_s
    speedup = alone.timings.total_s / seconds if alone else None
    if as_json:
        report = {**result.summary(), "paths": [str(path.absolute()) for path in paths]}
        if alone is not None:
            report |= {"speedup": speedup, "alone": alone.summary()}
        print(json.dumps(report))
        return
    for path, seed in zip(paths, result.seeds, strict=True):
        print(f"{path.absolute()}  (seed {seed})")
    times = result.timings
    print(
        f"{seconds:.2f} s by a gang of {result.gang_size}, {result.exchange}: prepare {times.prepare_s:.2f}, "
        f"{result.segments[-1].last_step} steps {times.denoise_s:.2f}, decode {times.decode_s:.2f}"
    )
    if alone is not None:
        print(f"{alone.timings.total_s:.2f} s by one worker: the gang is {speedup:.2f} times as fast")


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Errors on purpose become one line and an exit status; an interrupt or SIGTERM ends what was started.

    Ray, once it is begun, makes a SIGTERM a SystemExit with a status of its own.
    """

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except ValidationError as error:
        _fail(str(invalid_request(error)), 2)
    except InvalidRequest as error:
        _fail(str(error), 2)
    except (DistrirayError, ConnectionError) as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, SystemExit):
        _fail("interrupted", 130)
    finally:
        signal.signal(signal.SIGTERM, former)


def _fail(message: str, status: int) -> NoReturn:
    print(f"distriray: {message}", file=sys.stderr)
    raise typer.Exit(status)


def main() -> None:
    """The `distriray` command."""
    app()
