"""The command line: what it says is wrong before it starts anything, and what it leaves and tells."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deployments.http.encode import encode
from distriray.cli import app
from distriray.config import ParallelConfig
from distriray.gang import HostConfig
from distriray.models import ModelSpec
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult
from tests.unit.test_doors import Recorder

SAYS_WHAT_IT_LOADED = """
import sys
from distriray.cli import main
try:
    main()
finally:
    print(sorted({"diffusers", "ray", "torch"} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--scheduler", "eulr"], "scheduler 'eulr': input should be 'ddim', "),
        (["--steps", "two"], "num_inference_steps 'two': input should be a valid integer"),
        (
            ["--num-inference-steps", "0"],
            "num_inference_steps '0': input should be greater than or equal to 1",
        ),
        (["--control", "canny"], "--control canny: write name=path, such as canny=picture.png@0.8"),
        (["--ip-adapter", "style="], "--ip-adapter style=: write name=path"),
        (
            ["--ip-adapter", "style=x.png@0.5,0.1"],
            "--ip-adapter style=x.png@0.5,0.1: behind the @ there",
        ),
        (["--height", "500"], "height 500 is not a multiple of 8; use 496 or 504"),
        (["--guidance-rescale", "2"], "guidance_rescale '2': input should be less than or equal to 1"),
        (["--image", "none.png"], "image 'none.png' cannot be read: no such file"),
        (["--image", __file__], "image cannot be read; send a PNG, JPEG or WebP file"),
        (["--strength", "0.5"], "strength is of an image, and there is none"),
        (["--mask", __file__], "mask_image cannot be read"),
        (["--compare"], "--compare is of a gang with one worker; use --gang-size 2 or more"),
        (
            ["--address", "head:6379", "--cpus", "2"],
            "--cpus is for a Ray started here, and head:6379 is to be joined; leave one of them out",
        ),
        (["--warmup-steps", "few"], "parallel.warmup_steps 'few': input should be"),
    ],
)
def test_a_wrong_value_is_named_before_ray_or_a_model_is_loaded(arguments: list[str], says: str) -> None:
    command = [sys.executable, "-c", SAYS_WHAT_IT_LOADED, "generate", "a lake", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"distriray: {says}")
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--image={}"], "image"),
        (["--image={whole}", "--mask={}"], "mask_image"),
        (["--image={whole}", "--reference={whole}", "--reference={}"], "references.1.image"),
        (["--control=canny={}@0.8"], "control.0.image"),
    ],
)
def test_a_damaged_picture_is_named_as_it_was_given_before_a_host_starts(
    given: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By its host it would be where the model has it: with those that it edits `image` is a reference."""
    whole, cut = tmp_path / "whole.png", tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(whole)
    cut.write_bytes(whole.read_bytes()[:500])
    monkeypatch.setattr("distriray.gang.open_host", pytest.fail, raising=False)
    pictures = [each.format(cut, whole=whole) for each in given]
    out = f"--out={tmp_path / 'x.png'}"
    assert app(["generate", "a lake", out, *pictures], standalone_mode=False) == 2
    assert capsys.readouterr().err.startswith(f"distriray: {says} '{cut}' is damaged or cut short: ")


def test_defaults_are_those_of_a_request() -> None:
    command, wide = (
        [sys.executable, "-m", "distriray", "generate", "--help"],
        {**os.environ, "COLUMNS": "200"},
    )
    shown = subprocess.run(command, capture_output=True, text=True, env=wide, check=True).stdout
    assert "--num-inference-steps" in shown and "[default: 0.0]" in shown
    assert "the model's own number by default" in shown


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("file/lake.png", "no folder"),
        ("folder.png", "cannot be written"),
        ("lake", "is no image format"),
        ("lake.xbm", "cannot be written as '.xbm'"),
    ],
)
def test_a_picture_that_cannot_be_written_is_not_begun(
    out: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr("distriray.gang.open_host", pytest.fail, raising=False)
    assert app(["generate", "a lake", "--out", str(tmp_path / out)], standalone_mode=False) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "says"),
    [("--control", "no ControlNet 'x'; there is none here"), ("--ip-adapter", "no IP-Adapter 'x'; there is")],
)
def test_what_nobody_listed_is_not_looked_for_by_starting_a_host(
    option: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture = tmp_path / "edges.png"
    Image.new("RGB", (64, 64)).save(picture)
    monkeypatch.setattr("distriray.gang.open_host", pytest.fail, raising=False)
    out = f"--out={tmp_path / 'x.png'}"
    assert app(["generate", "a lake", out, option, f"x={picture}"], standalone_mode=False) == 1
    assert says in capsys.readouterr().err


def test_a_file_has_fields_of_the_pool_and_options_go_before_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def open_host(config: HostConfig, **_: Any) -> Iterator[Any]:
        seen.append(config)
        yield Recorder()

    seen: list[HostConfig] = []
    monkeypatch.setattr("distriray.gang.open_host", open_host, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "style").mkdir()
    written, out = tmp_path / "pool.yaml", f"--out={tmp_path / 'x.png'}"
    arguments = ["generate", "a lake", out, f"--pool={written}"]
    written.write_text(
        "controls:\n- {name: canny, source: some/canny}\nip_adapters:\n- {name: style, source: style}\n"
        "model: {name: some/model, dtype: bfloat16, quantize: int8}\nworkers: 4\nlora_dir: ink\n"
        "parallel: {exchange: sync, max_wait: 0.3}\nloras:\ndefaults: {scheduler: euler}\n"
    )
    app([*arguments, "--dtype=float32", "--warmup-steps=3"], standalone_mode=False)
    (config,) = seen
    assert config.model == ModelSpec(name="some/model", dtype="float32", quantize="int8")
    assert config.parallel == ParallelConfig(exchange="sync", max_wait=0.3, warmup_steps=3)
    assert (config.workers, config.loras, config.lora_dir) == (1, (), tmp_path / "ink")
    assert config.defaults.scheduler == "euler"
    assert [(each.name, each.source) for each in config.controls] == [("canny", "some/canny")]
    assert [(each.name, each.source) for each in config.ip_adapters] == [("style", str(tmp_path / "style"))]
    for text, said in (
        ("wrokers: 4\nloras: []\n", f"pool {written}: there is no field 'wrokers'"),
        ("- canny\n", "has no fields; it may have"),
        ("1: 2\n", f"pool {written}: "),
        ("lora_dir: [a]\n", "lora_dir ['a']: input is not a valid path"),
        ("model: {}\nmax_queue: none\n", "max_queue 'none': input should be a valid integer"),
        ("controls: [", "cannot be read"),
        ("ip_adapters:\n- {source: style}\n", "ip_adapters.0.name is missing"),
        ("ip_adapters: 3\n", "ip_adapters 3: input should be a valid list"),
        ("ip_adapters: {name: style, source: style}\n", "input should be a valid list"),
    ):
        written.write_text(text)
        assert app(arguments, standalone_mode=False) == 2 and said in capsys.readouterr().err
    written.unlink()
    assert app(arguments, standalone_mode=False) == 2
    assert "cannot be read" in capsys.readouterr().err and len(seen) == 1


def test_one_command_draws_pictures_and_says_how(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def open_host(config: HostConfig, address: str | None, cpus: int | None) -> Iterator[Any]:
        assert (config.workers, config.gang_sizes, address, cpus) == (2, (2,), None, 4)
        print("(raylet) A worker died or was killed")  # as Ray does
        yield Recorder()

    monkeypatch.setattr("distriray.gang.open_host", open_host, raising=False)
    out = tmp_path / "new folder" / "lake.png"
    arguments = [
        "--gang-size",
        "2",
        "--steps",
        "3",
        "--num-images",
        "2",
        "--seed",
        "3",
        "--cpus",
        "4",
        "--json",
    ]
    app(["generate", "a lake", *arguments, "--out", str(out)], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert told["gang_size"] == 2 and told["seeds"] == [3, 4]
    assert told["paths"] == [str(out.with_stem("lake-1")), str(out.with_stem("lake-2"))]
    assert all(Path(path).stat().st_size > 0 for path in told["paths"])


def test_a_disk_that_is_full_is_said_with_what_makes_the_picture_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def open_host(config: HostConfig, address: str | None, cpus: int | None) -> Iterator[Any]:
        monkeypatch.setattr(Image.Image, "save", save)
        yield Recorder()

    def save(*_: object, **__: object) -> None:
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr("distriray.gang.open_host", open_host, raising=False)
    out = tmp_path / "lake.png"
    assert app(["generate", "a lake", "--seed", "3", "--out", str(out)], standalone_mode=False) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"distriray: {out} cannot be written: No space left on device; ")
    assert "--seed 3" in said


def test_a_sigterm_is_an_interrupt_before_and_after_ray_has_taken_it_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def before(*_: Any, **__: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)

    def after(*_: Any, **__: Any) -> Any:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        signal.raise_signal(signal.SIGTERM)

    for open_host in (before, after):
        monkeypatch.setattr("distriray.gang.open_host", open_host, raising=False)
        assert app(["generate", "a lake", f"--out={tmp_path / 'x.png'}"], standalone_mode=False) == 130
        assert capsys.readouterr().err.strip() == "distriray: interrupted"


def write(drawn: Image.Image, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command write to `out` what a host has drawn."""

    class Drawing(Recorder):
        def generate(self, request: GenerationRequest) -> GenerationResult:
            return super().generate(request).model_copy(update={"images": [drawn]})

    @contextmanager
    def open_host(config: HostConfig, address: str | None, cpus: int | None) -> Iterator[Any]:
        yield Drawing()

    monkeypatch.setattr("distriray.gang.open_host", open_host, raising=False)
    app(["generate", "a lake", "--seed", "3", "--out", str(out)], standalone_mode=False)


@pytest.mark.parametrize(
    ("suffix", "mode"), [("png", "RGBA"), ("tiff", "RGBA"), ("jpg", "RGB"), ("bmp", "RGB")]
)
def test_transparency_is_white_in_files_that_hold_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suffix: str, mode: str
) -> None:
    out = tmp_path / f"lake.{suffix}"
    write(Image.new("RGBA", (96, 64), (255, 0, 0, 0)), out, monkeypatch)
    with Image.open(out) as picture:
        assert picture.mode == mode
        assert picture.convert("RGBA").getpixel((1, 1)) == ((255, 0, 0, 0) if mode == "RGBA" else (255,) * 4)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_a_picture_is_as_good_in_a_file_that_loses_something_as_over_http(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suffix: str
) -> None:
    drawn = Image.effect_noise((96, 64), 90).convert("RGB")

    out = tmp_path / f"lake.{suffix}"
    write(drawn, out, monkeypatch)
    sent = encode(drawn, "jpeg" if suffix == "jpg" else "webp")
    assert b64encode(out.read_bytes()).decode() == sent
