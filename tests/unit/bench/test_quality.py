"""What the comparison of pictures measures, and how it is planned and kept."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from bench.quality.__main__ import main
from bench.quality.design import BASE, Section, Setting, by_schedulers, sections
from bench.quality.judges import (
    IDENTICAL_DB,
    LandscapeJudge,
    MissingExtra,
    alike,
    differences,
    frechet_distance,
)
from bench.quality.painter import Paint, Painter
from bench.quality.photos import PhotoJudge
from bench.quality.prompts import Prompt, landscape_prompts, read_prompts
from bench.quality.table import Table
from bench.quality.work import Album, Job, Plan, Unit, make
from distriray.denoise import Denoiser
from distriray.errors import InvalidRequest
from distriray.landscapes.draw import draw
from distriray.landscapes.scene import sample_scene
from distriray.models import ModelSpec
from distriray.parallel.networks.registry import network_of
from distriray.requests import SamplingParams
from tests.models import save, tiny_flux3, tiny_qwen_image, tiny_sd3, tiny_sdxl

DRAWN = np.stack([draw(sample_scene(seed), 64, 64) for seed in range(3)])


def shifted(pictures: np.ndarray, by: int) -> np.ndarray:
    return np.where(pictures > 127, pictures - by, pictures + by).astype(np.uint8)


def test_psnr_is_that_of_eight_bit_pictures() -> None:
    assert differences(DRAWN, DRAWN)["psnr"].tolist() == [IDENTICAL_DB] * 3
    off_by_four = differences(shifted(DRAWN, 4), DRAWN)
    assert off_by_four["psnr"] == pytest.approx(20 * np.log10(255 / 4), abs=1e-3)
    assert (off_by_four["ssim"] < 1).all()


def test_a_difference_is_visible_where_a_person_sees_it() -> None:
    grey = np.full((1, 64, 64, 3), 128, np.uint8)
    spot = grey.copy()
    spot[:, :16, :16] += 40
    assert differences(grey + 1, grey)["visible"] == [0.0]
    assert differences(spot, grey)["visible"] == pytest.approx([1 / 16])
    assert not alike(differences(spot, grey)).any() and alike(differences(grey + 1, grey)).all()


def test_frechet_distance_of_a_shift_is_its_square() -> None:
    features = np.random.default_rng(0).normal(size=(500, 4))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features + [3, 0, 0, 4], features) == pytest.approx(25)
    assert frechet_distance(2 * features, features) > 1


def test_a_single_picture_has_no_frechet_distance_to_reach() -> None:
    judge = LandscapeJudge(64, drawings=4)
    assert judge.floor(1) is None and judge.floor(2) is not None


def test_checker_feature_distance_grows_with_the_difference() -> None:
    judge, prompts = LandscapeJudge(64, drawings=4), landscape_prompts(3, 0)
    same, near, far = (
        judge.measure(pictures, DRAWN, prompts)["distance"]
        for pictures in (DRAWN, shifted(DRAWN, 6), DRAWN[[1, 2, 0]])
    )
    assert (same == 0).all() and (near > 0).all() and (near < far).all()


def test_prompt_accuracy_counts_what_the_caption_states() -> None:
    judge = LandscapeJudge(256, drawings=4)
    scene = sample_scene(5)
    picture = draw(scene, 256, 256)[None]
    wrong = "night" if scene.time != "night" else "day"
    for time, right in ((scene.time, 1), (wrong, 0)):
        measures = judge.measure(picture, picture, [Prompt("", 0, {"time": time})])
        assert (measures["stated"], measures["right"]) == ([1], [right])


def test_prompts_of_a_file_are_lines_or_the_first_caption_of_each_image(tmp_path: Path) -> None:
    lines, coco = tmp_path / "prompts.txt", tmp_path / "captions.json"
    lines.write_text("a lake\n\na hill\n")
    captions = [(7, "a cat"), (7, "the cat"), (9, "a dog")]
    coco.write_text(json.dumps({"annotations": [{"image_id": i, "caption": c} for i, c in captions]}))
    assert [(p.text, p.seed) for p in read_prompts(lines, 2, 5)] == [("a lake", 5), ("a hill", 6)]
    assert [p.text for p in read_prompts(coco, 2, 0)] == ["a cat", "a dog"]
    with pytest.raises(ValueError, match="holds 2 prompts, not 3"):
        read_prompts(lines, 3, 0)


def test_every_setting_is_planned_once_and_after_its_single_device() -> None:
    every = sections(100, 40, 10)
    plan = Plan(every, at_once=20)
    units = list(plan)
    assert len({(unit.setting.name, unit.start) for unit in units}) == len(units)
    for section in every:
        for setting in section.settings:
            for wanted in (setting, setting.alone):
                assert sum(unit.stop - unit.start for unit in plan.units(wanted)) >= section.count
    compared = [unit.setting != unit.setting.alone for unit in units]
    assert all(compared[compared.index(True) :])


def test_an_album_gives_what_is_finished_up_to_the_first_gap(tmp_path: Path) -> None:
    plan, album = Plan([Section("", (BASE,), 25)], at_once=10), Album(tmp_path)
    first, _, third = units = plan.units(BASE)
    assert album.read(units) == {}
    for unit in (third, first):
        album.keep(unit, {"psnr": np.arange(unit.start, unit.stop)})
    assert [album.has(unit) for unit in units] == [True, False, True]
    assert album.read(units)["psnr"].tolist() == list(range(10))


def test_pictures_are_kept_apart_by_the_code_and_the_device_that_draw_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(ModelSpec(), "cpu", 64, 4.0, 1, (Prompt("a lake", 0),), tmp_path)
    monkeypatch.setattr("bench.quality.work.CODE", (tmp_path,), raising=False)
    digests = [job.digest(), job.digest(), replace(job, device="cuda").digest()]
    for code in ("1", "2"):
        (tmp_path / "step.py").write_text(code)
        digests.append(job.digest())
    assert digests[0] == digests[1] and len(set(digests)) == 4


class Crew:
    """A job of grey pictures, a tenth of a second each; its folder has a file for each worker's process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.prompts = folder, (Prompt("a lake", 0),) * 1000

    def painter(self) -> Crew:
        (self.folder / f"{os.getpid()}.pid").touch()
        return self

    def judge(self) -> Crew:
        return self

    def paint(self, setting: Setting, prompts: list[Prompt]) -> Paint:
        sleep(0.1)
        return Paint(np.zeros((1, 1, 1, 1), np.float32), np.zeros(1, np.int64))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return np.zeros((1, 1, 1, 3), np.uint8)

    def measure(self, *pictures: Any) -> dict[str, np.ndarray]:
        return {"psnr": np.zeros(1)}


def make_by_a_crew(folder: str) -> None:
    job, plan = Crew(Path(folder)), Plan([Section("", (BASE.alone,), 1000)], at_once=1)
    make(job, plan, Album(job.folder), 2, math.inf)  # type: ignore[arg-type]


def test_workers_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    code = f"from {__name__} import make_by_a_crew; make_by_a_crew({str(tmp_path)!r})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as run:
        while len(pids := [int(path.stem) for path in tmp_path.glob("*.pid")]) < 2:
            assert run.poll() is None
            sleep(0.1)
        run.kill()
    deadline = monotonic() + 20
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert monotonic() < deadline, alive
        sleep(0.1)


def rows_of(section: Section, psnr: dict[Setting, float], folder: Path) -> list[dict[str, str]]:
    """The table of two pictures of each setting, a decibel below and above its PSNR."""
    plan, album = Plan([section], at_once=2), Album(folder)
    for setting, mean in psnr.items():
        values = {name: np.zeros(2) for name in ("ssim", "visible", "synchronous")}
        album.keep(Unit(setting, 0, 2), {"psnr": mean + np.array([-1.0, 1.0]), **values})
    judge = SimpleNamespace(columns=("count",), summarize=lambda row, alone: (str(len(alone["psnr"])),))
    report = Table(album, plan, judge).report("", [section], seed=0, settings={})  # type: ignore[arg-type]
    return [dict(zip(report.columns, row, strict=True)) for row in report.rows]


def test_the_table_compares_each_picture_with_the_base_methods(tmp_path: Path) -> None:
    better = replace(BASE, statistics=0.5)
    section = Section("prediction", (BASE, better, replace(BASE, halos=0.5)), 2)
    rows = rows_of(section, {BASE.alone: 100.0, BASE: 40.0, better: 42.0}, tmp_path)
    assert [row["against base, dB"] for row in rows] == ["-", "+2.0 ± 0.0"], "what was not made is left out"
    assert rows[1]["PSNR, dB"] == "42.0 ± 12.7", "of two pictures, by Student's distribution"
    assert rows[1]["count"] == "2"


def test_a_size_without_rows_for_as_many_patches_is_refused_before_anything_is_painted() -> None:
    def refusal(size: int, patches: int) -> str | None:
        painter = Painter(ModelSpec(), "cpu", size=size, guidance_scale=4.0)
        setting = replace(BASE, patches=patches, steps=1, exchange="sync")
        with pytest.raises(InvalidRequest) if size < 8 * least else nullcontext():
            painter.paint(setting, landscape_prompts(1, 0))
        try:
            painter.check([BASE.alone, setting])
        except InvalidRequest as error:
            return str(error)
        return None

    unit = network_of(Painter(ModelSpec(), "cpu", size=64, guidance_scale=4.0).pipeline).row_unit
    least = 3 * unit + 1
    assert refusal(8 * least, 4) is None
    said = f"has rows for 3 patches at most, and --rows asks for 4; use --size {8 * least} or more"
    assert said in (refusal(8 * least - 8, 4) or "")


@pytest.mark.parametrize(
    ("make", "size", "scheduler"),
    [
        (tiny_sdxl, 64, "ddim"),
        (tiny_sd3, 64, "euler"),
        (tiny_qwen_image, 64, "euler"),
        (tiny_flux3, 64, "euler"),
    ],
)
def test_another_models_gang_paints_what_one_device_paints(
    make: Callable[[], Any], size: int, scheduler: Any, tmp_path: Path
) -> None:
    save(make(), tmp_path)
    painter = Painter(ModelSpec(name=str(tmp_path)), "cpu", size=size, guidance_scale=None)
    prompts = [Prompt(text, seed) for seed, text in enumerate(("a lake", "a hill", "a tree"))]
    setting = replace(BASE, patches=2, steps=4, warmup=1, scheduler=scheduler)
    assert (BASE.scheduler in painter.schedulers) == (scheduler == BASE.scheduler)
    alone = painter.paint(setting.alone, prompts)
    sync = painter.paint(replace(setting, exchange="sync"), prompts)
    displaced = painter.paint(setting, prompts)
    assert np.abs(sync.latents - alone.latents).max() < 1e-3 * np.abs(alone.latents).max()
    assert not np.allclose(displaced.latents, alone.latents, rtol=1e-3)
    assert (displaced.synchronous_steps == 1).all() and (sync.synchronous_steps == 4).all()
    pictures = painter.decode(alone.latents)
    denoiser = Denoiser(make())
    asked = {"num_inference_steps": 4, "scheduler": scheduler, "height": size, "width": size}
    state = denoiser.prepare(SamplingParams(prompt="a hill", seed=1, **asked))
    while not state.done:
        denoiser.step(state)
    served = np.asarray(denoiser.decode(state)[0], np.int16)
    # Where weights lie in memory decides, on some CPUs, how products of matrices are rounded.
    assert np.abs(pictures[1] - served).max() <= 1, "as it is served"
    alone.latents[1] = np.nan
    assert (painter.decode(alone.latents)[1] == 0).all()


def test_models_by_scheduler_matching_are_asked_by_their_own_scheduler_alone() -> None:
    every = sections(100, 40, 10)
    flow = by_schedulers(every, "euler", ["euler"])
    assert {setting.scheduler for section in flow for setting in section.settings} == {"euler"}
    assert by_schedulers(every, BASE.scheduler, []) == every
    left_out = {section.title for section in every} - {section.title for section in flow}
    assert left_out == {"mixes and schedulers", "steps and schedulers"}
    (mixes, *_), (by_flow, *_) = (
        [section for section in each if section.title == "mixes"] for each in (every, flow)
    )
    assert [replace(each, scheduler="ddim") for each in by_flow.settings] == [*mixes.settings]


def test_few_steps_are_compared_with_a_converged_schedule_by_what_a_model_takes() -> None:
    def few(sections: list[Section]) -> set[tuple[str, int]]:
        (section,) = (section for section in sections if section.title == "few steps")
        every = {unit.setting.alone for unit in Plan([section], at_once=5) if unit.setting.against}
        (converged,) = every
        assert converged.steps > 100 and converged.alone == converged and converged.patches == 1
        assert converged.scheduler == section.settings[0].scheduler
        assert len({setting.name for setting in section.settings}) == len(set(section.settings))
        return {(setting.scheduler, setting.steps) for setting in section.settings}

    every = sections(100, 40, 10)
    steps = {10, 14, 20, 28}
    named = {(name, count) for name in ("ddim", "euler", "dpmpp-2m", "unipc") for count in steps}
    assert few(every) == named
    flow = by_schedulers(every, "euler", ["unipc", "euler"])
    assert few(flow) == {(name, count) for name in ("euler", "unipc") for count in steps}


def test_the_table_says_how_near_few_steps_of_one_device_are(tmp_path: Path) -> None:
    few = replace(BASE.alone, steps=10, against="ddim")
    (row,) = rows_of(Section("few steps", (few,), 2), {few.alone: 100.0, few: 40.0}, tmp_path)
    assert row["PSNR, dB"].startswith("40.0") and row["method"] == "one device, against 200 steps ddim"
    assert row["against base, dB"] == row["synchronous steps"] == "-"


def test_judging_photographs_names_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"torchvision, cleanfid.*pip install -e '\.\[quality\]'"):
        PhotoJudge(None, "cpu")


def test_photographs_are_judged_by_the_paper_s_measures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With stand-ins for the two networks: mean colours as Inception's features, L1 as LPIPS."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    fid, resize, package = ModuleType("cleanfid.fid"), ModuleType("cleanfid.resize"), ModuleType("cleanfid")
    fid.build_feature_extractor = lambda *_, **__: None  # type: ignore[attr-defined]
    fid.get_batch_features = lambda batch, *_: batch.float().mean((2, 3)).numpy()  # type: ignore[attr-defined]
    fid.get_folder_features = lambda *_, **__: np.random.default_rng(0).normal(size=(9, 3))  # type: ignore[attr-defined]
    resize.build_resizer = lambda mode: lambda picture: picture.astype(np.float32)  # type: ignore[attr-defined]
    package.fid = fid  # type: ignore[attr-defined]
    for module in (package, fid, resize):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    class Lpips(torch.nn.Module):
        def __init__(self, **_: object) -> None:
            super().__init__()

        def forward(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            return (ours - theirs).abs().mean()

    monkeypatch.setattr("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", Lpips)
    judge = PhotoJudge(tmp_path, "cpu")
    pictures = np.concatenate([DRAWN, DRAWN[:, ::-1]])
    measures = judge.measure(pictures, shifted(pictures, 5), [Prompt("", seed) for seed in range(6)])
    assert measures["lpips"] == pytest.approx(5 / 255, abs=1e-4)
    lpips, reference, alone = judge.summarize(measures, measures)
    assert (lpips, alone) == ("0.0196", "0.000") and float(reference) > 1


@pytest.mark.parametrize(
    ("model", "says"), [("builtin:portraits", "no built-in model"), (None, "AutoencoderTiny")]
)
def test_a_model_that_cannot_be_drawn_from_is_refused_in_a_line(
    model: str | None, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if model is None:
        pipeline = tiny_sd3()
        pipeline.register_modules(vae=AutoencoderTiny(latent_channels=16))
        save(pipeline, tmp_path)
    words = ["--model", model or str(tmp_path), "--prompts", "docs/examples/landscapes.txt", "--count", "1"]
    monkeypatch.setattr("sys.argv", ["bench.quality", *words])
    monkeypatch.setattr("bench.quality.__main__.require", lambda *_: None)
    monkeypatch.setattr("bench.quality.work.PhotoJudge", lambda *_: None)
    with pytest.raises(SystemExit, match=says):
        main()
