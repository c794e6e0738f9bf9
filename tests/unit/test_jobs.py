"""Jobs, with a maker that draws at once: what is read, what is kept, and what happens to trouble."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from errno import ENOSPC
from io import StringIO
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from distriray.config import ParallelConfig
from distriray.controls import ControlNetSpec
from distriray.errors import GangBroken, GenerationCancelled, InvalidRequest, NotEnoughDevices, QueueFull
from distriray.gang import HostConfig
from distriray.jobs import generate
from distriray.jobs.folder import Folder
from distriray.jobs.generate import _signals_stop, main
from distriray.jobs.makers import OwnHost
from distriray.jobs.prompts import read_prompts
from distriray.jobs.run import MAX_TRIES, MakerLost, Run
from distriray.jobs.settings import settings_of
from distriray.limits import Limits
from distriray.models import ModelSpec
from distriray.picture import Picture, png
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult, Segment, Timings

PROMPTS = """\
{"prompt": "a lake"}
{"prompt": "a lake", "num_images": 2}
no JSON

{"prompt": "a lake", "height": 500}
{ "prompt":   "a lake" }
{"prompt": "a moor", "seed": 5, "id": "mine"}
{"prompt": "a moor", "colour": "red"}
"""


class Painter:
    """Answers with plain pictures, unless `trouble` raises. `asked`: prompts; `attempts`: requests."""

    def __init__(self, trouble: Callable[[GenerationRequest], None] = lambda _: None) -> None:
        self.trouble = trouble
        self.asked: list[str] = []
        self.attempts: list[str] = []
        self.cancelled: list[str] = []

    def generate(self, request: GenerationRequest) -> GenerationResult:
        self.asked.append(request.id.split(".")[0])
        self.attempts.append(request.id)
        self.trouble(request)
        return GenerationResult(
            id=request.id,
            model=request.model or "default",
            height=8,
            width=8,
            seeds=request.seeds,
            timings=Timings(queued_s=0, prepare_s=0, denoise_s=0, decode_s=0, total_s=0),
            segments=[
                Segment(workers=(0,), first_step=0, last_step=1, seconds=0, sent_at=0, formed_at=0, left_at=0)
            ],
            warnings=["prompt is long"] if request.seed == 5 else [],
            images=[Image.new("RGB", (8, 8)) for _ in request.seeds],
        )

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(PROMPTS)
    return path


def run(file: Path, out: Path, painter: Painter, in_flight: int = 2) -> Run:
    good, bad = read_prompts(file)
    with Folder(out) as folder:
        folder.begin(good, bad)
        work = Run(good, folder, [painter], in_flight=in_flight, pause_s=0.001)
        work.finish()
    return work


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_bad_lines_are_named_and_the_others_read(file: Path) -> None:
    good, bad = read_prompts(file)
    assert [prompt.line for prompt in good] == [1, 2, 6, 7]
    assert [(line.line, line.param) for line in bad] == [(3, None), (5, "height"), (8, "colour")]
    assert "496 or 504" in bad[1].message


def test_a_line_beyond_the_limits_is_a_bad_one(file: Path) -> None:
    _, bad = read_prompts(file, limits=Limits(max_images=1))
    assert (2, "num_images") in [(line.line, line.param) for line in bad]


def test_the_field_at_fault_within_another_is_named_by_the_whole_way_to_it(tmp_path: Path) -> None:
    entries = [{"name": "ink"}, {"name": "neon", "scale": "much"}]
    lines = [
        {"prompt": "x", "loras": entries},
        {"prompt": "x", "loras": [{"name": "ink", "a lake at dusk": 1}]},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    good, bad = read_prompts(tmp_path / "prompts.jsonl")
    assert not good and [line.param for line in bad] == ["loras.1.scale", None]


def test_a_line_with_a_misspelt_scheduler_is_a_bad_one(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a lake", "scheduler": "eulr"}\n')
    good, (line,) = read_prompts(tmp_path / "prompts.jsonl")
    assert not good and line.param == "scheduler" and "'euler'" in line.message


def test_equal_lines_are_prompts_of_their_own(file: Path) -> None:
    good, _ = read_prompts(file)
    assert good[2].id == f"{good[0].id}-2"
    assert good[0].request.seed != good[2].request.seed


def test_ids_and_seeds_stay_when_lines_move(file: Path) -> None:
    before = {(prompt.id, prompt.request.seed) for prompt in read_prompts(file)[0]}
    file.write_text("\n".join(reversed(PROMPTS.splitlines())))
    assert {(prompt.id, prompt.request.seed) for prompt in read_prompts(file)[0]} == before


def test_the_manifest_names_the_lines_of_the_file_as_it_is_now(file: Path, tmp_path: Path) -> None:
    """Prompts are in none of its fields: by their lines alone pictures are known."""
    out = tmp_path / "out"
    run(file, out, Painter())
    (out / "manifest.jsonl").open("a").write('{"line": 3}\n')  # of somebody else's
    before = {entry.get("prompt_id"): entry for entry in lines(out / "manifest.jsonl")}
    ids = {prompt.line: prompt.id for prompt in read_prompts(file)[0]}
    file.write_text(
        '{"prompt": "a hill"}\n{"prompt": "a moor", "seed": 5, "id": "mine"}\n{"prompt": "a lake"}'
    )
    run(file, out, Painter())
    now = {entry.get("prompt_id"): entry for entry in lines(out / "manifest.jsonl")}
    (new,) = now.keys() - before.keys()
    where = {new: 1, ids[7]: 2, ids[1]: 3, ids[2]: None, ids[6]: None, None: 3}
    assert {name: entry["line"] for name, entry in now.items()} == where
    assert all({**now[name], "line": entry["line"]} == entry for name, entry in before.items())


def test_another_model_is_another_prompt(file: Path) -> None:
    one, other = ({prompt.id for prompt in read_prompts(file, model=name)[0]} for name in ("a", "b"))
    assert not one & other


HOST = HostConfig(workers=2)
LINE = GenerationRequest(prompt="a lake", control=[{"name": "canny", "image": Image.new("RGB", (64, 64))}])
CANNY = ControlNetSpec(name="canny", source="some/canny")


@pytest.mark.parametrize(
    "host",
    [
        {"model": {"revision": "v2"}},
        {"model": {"dtype": "bfloat16"}},
        {"model": {"quantize": "int8"}},
        {"defaults": {"num_inference_steps": 4}},
        {"controls": [CANNY]},
        {"parallel": {"exchange": "displaced"}},
    ],
)
def test_other_settings_of_hosts_that_decide_a_picture_are_told(host: dict[str, Any]) -> None:
    assert settings_of(HostConfig(workers=2, **host), LINE) != settings_of(HOST, LINE) == {}


@pytest.mark.parametrize(
    ("host", "line"),
    [
        ({"model": {"offload_text": True}, "max_queue": 3, "policy": "earliest_deadline"}, {}),
        ({"defaults": {"num_inference_steps": 4}}, {"num_inference_steps": 9}),
        ({"controls": [CANNY.model_copy(update={"name": "depth"})]}, {}),
        ({"parallel": {"exchange": "displaced"}}, {"exchange": "sync"}),
        ({"parallel": {"exchange": "displaced"}}, {"gang_size": 1}),
        ({"parallel": {"exchange": "displaced"}}, {"parallel": ParallelConfig()}),
        ({"parallel": {"exchange": "displaced"}, "gang_sizes": [1]}, {}),
        ({"parallel": {"cuda_graphs": False, "max_buffer_bytes": 0}}, {}),
    ],
)
def test_settings_that_leave_a_picture_as_it_is_are_not_told(
    host: dict[str, Any], line: dict[str, Any]
) -> None:
    assert settings_of(HostConfig(workers=2, **host), LINE.model_copy(update=line)) == {}


def test_a_job_with_other_defaults_draws_anew_what_they_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def own_hosts(*_: object, **__: object) -> AbstractContextManager[list[Painter]]:
        return nullcontext([Painter()])

    monkeypatch.setattr(generate, "own_hosts", own_hosts)
    prompts, pool = tmp_path / "prompts.jsonl", tmp_path / "pool.yaml"
    prompts.write_text('{"prompt": "a lake"}\n{"prompt": "a moor", "num_inference_steps": 9}\n')
    for steps, made in ((4, 2), (4, 0), (5, 1)):
        pool.write_text(f"defaults: {{num_inference_steps: {steps}}}\n")
        assert command(str(prompts), "--out", str(tmp_path / "out"), "--pool", str(pool)) == 0
        assert json.loads(capsys.readouterr().out)["made"] == made


def test_every_image_has_a_file_and_a_line(file: Path, tmp_path: Path) -> None:
    work = run(file, tmp_path / "out", Painter())
    assert (work.completed, work.failed) == (4, 0)
    manifest = lines(tmp_path / "out" / "manifest.jsonl")
    assert sorted((entry["line"], entry["index"]) for entry in manifest) == [
        (1, 0),
        (2, 0),
        (2, 1),
        (6, 0),
        (7, 0),
    ]
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out" / "images").iterdir()}
    assert files == {entry["file"] for entry in manifest}
    assert [entry["line"] for entry in lines(tmp_path / "out" / "errors.jsonl")] == [3, 5, 8]
    assert {entry["line"]: entry["warnings"] for entry in manifest} == {
        1: [], 2: [], 6: [], 7: ["prompt is long"],
    }  # fmt: skip


def test_a_second_run_makes_nothing(file: Path, tmp_path: Path) -> None:
    run(file, tmp_path / "out", Painter())
    painter = Painter()
    run(file, tmp_path / "out", painter)
    assert painter.asked == []


@pytest.mark.parametrize("kept", range(0, 1200, 37))
def test_a_manifest_cut_anywhere_costs_only_what_it_lost(file: Path, tmp_path: Path, kept: int) -> None:
    out = tmp_path / "out"
    run(file, out, Painter())
    whole = lines(out / "manifest.jsonl")
    (out / "manifest.jsonl").write_bytes((out / "manifest.jsonl").read_bytes()[:kept])
    run(file, out, Painter())
    again = lines(out / "manifest.jsonl")
    assert sorted(map(str, again)) == sorted(map(str, whole))


def test_an_image_that_was_deleted_is_made_again(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(file, out, Painter())
    second = [entry for entry in lines(out / "manifest.jsonl") if entry["line"] == 2]
    (out / str(second[1]["file"])).unlink()
    painter = Painter()
    run(file, out, painter)
    assert painter.asked == [second[0]["prompt_id"]]
    assert len(lines(out / "manifest.jsonl")) == 5


def test_pictures_that_were_being_written_are_cleared_away(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    images = out / "images"
    images.mkdir(parents=True)
    for prompt in read_prompts(file)[0]:
        (images / f".{prompt.id}_0.png.part").write_bytes(b"\x89PNG")
    (out / ".manifest.jsonl.part").write_bytes(b"{")
    with Folder(out):
        assert not list(out.glob("**/.*.part"))
    run(file, out, Painter())
    assert all(path.suffix == ".png" for path in images.iterdir())


@pytest.mark.parametrize(
    "theirs",
    [
        "other/images/.0123456789abcdef_0.png.part",  # of a job that writes to a folder in this one
        "other/.manifest.jsonl.part",
        "images/.download.zip.part",
        "images/.0123456789abcdef_0.png.part.part",
        "images/sub/.0123456789abcdef_0.png.part",
        ".film.mkv.part",
        ".lock",
    ],
)
def test_a_job_removes_nothing_that_it_did_not_begin(theirs: str, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / theirs
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    run(file, tmp_path / "out", Painter())
    assert path.read_text() == "precious"


FOREIGN = ('{"a": "lake"}', "[]", "null", "7", '{"prompt_id": "x"}', '{"prompt_id": 1, "index": [], "of": 1}')


def test_lines_of_a_manifest_that_no_job_wrote_end_no_run_and_stay(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.jsonl").write_text("\n".join(FOREIGN) + "\n")
    assert run(file, out, Painter()).completed == 4
    with (out / "manifest.jsonl").open("a") as manifest:
        manifest.write("\n".join(FOREIGN) + "\n")
    again = Painter()
    run(file, out, again)
    assert again.asked == []
    kept = (out / "manifest.jsonl").read_text().splitlines()
    assert [kept.count(line) for line in FOREIGN] == [2] * len(FOREIGN) and len(kept) == 12 + 5


SECRET = "a secret lake"
LEAKS = [
    f"{SECRET}",
    json.dumps(SECRET),
    json.dumps([SECRET]),
    json.dumps({"prompt": [SECRET]}),
    json.dumps({"prompt": {"text": SECRET}}),
    json.dumps({"prompt": "x", "seed": SECRET}),
    json.dumps({"prompt": "x", "negative_prompt": [SECRET]}),
    json.dumps({"prompt": "x", "height": SECRET}),
    json.dumps({"prompt": "x", "parallel": {"prediction": {"halos": SECRET}}}),
    json.dumps({"prompt": "x", "parallel": {SECRET: 1}}),
    json.dumps({SECRET: 1, "prompt": "x"}),
    json.dumps({"num_images": 2, "negative_prompt": SECRET}),
    f'{{"prompt": "{SECRET}", }}',
    f'{{"prompt": "{SECRET}"',
]


@pytest.mark.parametrize("line", LEAKS)
def test_no_file_but_the_prompts_themselves_holds_text_of_a_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line + "\n" + json.dumps({"prompt": SECRET}) + "\n")

    def refuse(request: GenerationRequest) -> None:
        GenerationRequest.parse({"prompt": [request.prompt]})

    run(path, tmp_path / "out", Painter(refuse))
    errors = lines(tmp_path / "out" / "errors.jsonl")
    assert [error["line"] for error in errors] == [1, 2] and all(error["error"] for error in errors)
    for written in (tmp_path / "out").glob("*.json*"):
        assert SECRET not in written.read_text() and SECRET[:6] not in written.read_text()


@pytest.mark.parametrize("field", GenerationRequest.WITH_IMAGES)
def test_a_path_that_leads_out_of_the_folder_is_refused_by_the_name_of_its_picture(
    field: str, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    entries = [{"name": "canny", "image": "data:"}, {"name": "depth", "image": "../secret.png"}]
    path.write_text(json.dumps({"prompt": "x", field: entries}) + "\n")
    run(path, tmp_path / "out", Painter())
    (error,) = lines(tmp_path / "out" / "errors.jsonl")
    assert error["error"].startswith(f"{field}.1.image lies outside of")


def test_a_prompt_that_fails_is_reported_and_tried_again_by_the_next_run(file: Path, tmp_path: Path) -> None:
    def break_moors(request: GenerationRequest) -> None:
        if request.prompt == "a moor":
            raise GangBroken("three times")

    out = tmp_path / "out"
    work = run(file, out, Painter(break_moors))
    assert (work.completed, work.failed) == (3, 1)
    assert lines(out / "errors.jsonl")[-1] == {
        "line": 7,
        "error": "GangBroken: three times",
        "param": None,
    }
    assert run(file, out, Painter()).completed == 1
    assert [entry["line"] for entry in lines(out / "errors.jsonl")] == [3, 5, 8]


def test_full_queues_are_waited_for(file: Path, tmp_path: Path) -> None:
    refusals = iter([True, True])

    def refuse_twice(_: GenerationRequest) -> None:
        if next(refusals, False):
            raise QueueFull("full", retry_after_s=0.01)

    work = run(file, tmp_path / "out", Painter(refuse_twice))
    assert (work.completed, work.failed) == (4, 0)


def test_a_run_is_not_in_the_way_of_the_one_that_follows_it(file: Path, tmp_path: Path) -> None:
    at_work: set[str] = set()

    def refuse_what_is_under_way(request: GenerationRequest) -> None:
        if request.id in at_work:
            raise InvalidRequest(f"request {request.id!r} is already being worked on", "id")
        at_work.add(request.id)

    killed, painter = Painter(refuse_what_is_under_way), Painter(refuse_what_is_under_way)
    run(file, tmp_path / "killed", killed)
    assert run(file, tmp_path / "out", painter).failed == 0
    assert sorted(painter.asked) == sorted(killed.asked), "the same prompts"


def test_what_passes_is_tried_again_and_not_for_ever(file: Path, tmp_path: Path) -> None:
    downs = iter([True] * 3)

    def be_down(_: GenerationRequest) -> None:
        if next(downs, False):
            raise NotEnoughDevices("no host is up")

    work = run(file, tmp_path / "out", Painter(be_down), in_flight=1)
    assert (work.completed, work.failed) == (4, 0)

    def stay_down(_: GenerationRequest) -> None:
        raise NotEnoughDevices("no host is up")

    painter = Painter(stay_down)
    work = run(file, tmp_path / "other", painter, in_flight=1)
    assert (work.completed, work.failed) == (0, 4)
    assert len(painter.asked) == 4 * MAX_TRIES == len(set(painter.attempts))


def lost_after(count: int) -> Callable[[GenerationRequest], None]:
    asked = itertools.count()

    def trouble(_: GenerationRequest) -> None:
        if next(asked) >= count:
            raise MakerLost("no gang here can serve this any more: worker 0 died")

    return trouble


def test_what_a_lost_host_was_asked_for_is_made_by_the_others(file: Path, tmp_path: Path) -> None:
    good, _ = read_prompts(file)
    waits, lost = threading.Event(), Painter(lost_after(1))

    def wait(_: GenerationRequest) -> None:
        waits.wait(60)

    others = Painter(wait)
    with Folder(tmp_path / "out") as folder:
        work = Run(good, folder, [lost, others], in_flight=1, tell=lambda *_: waits.set())
        work.finish()
    assert (work.completed, work.failed) == (4, 0)
    assert len(lost.asked) == 2, "asked for nothing more once it was lost"
    assert lost.asked[1] in others.asked


def test_what_is_lost_last_is_made_by_hosts_that_had_nothing_left_to_do(file: Path, tmp_path: Path) -> None:
    good, _ = read_prompts(file)
    others, alone = Painter(), threading.Event()

    def be_lost(_: GenerationRequest) -> None:
        alone.wait(60)
        raise MakerLost("worker 0 died")

    def tell(*_: object) -> None:
        if len(others.asked) == 3:
            alone.set()

    with Folder(tmp_path / "out") as folder:
        work = Run(good, folder, [Painter(be_lost), others], in_flight=1, tell=tell)
        work.finish()
    assert (work.completed, work.failed, len(others.asked)) == (4, 0, 4)


def test_a_run_whose_hosts_are_all_lost_ends_and_leaves_the_rest_to_the_next(
    file: Path, tmp_path: Path
) -> None:
    painter = Painter(lost_after(1))
    with Folder(tmp_path / "out") as folder:
        folder.write_summary({"made": 4})  # of another run
    with pytest.raises(NotEnoughDevices, match="worker 0 died; with no host left, prompts not made: 3"):
        run(file, tmp_path / "out", painter, in_flight=1)
    assert len(painter.asked) == 2
    assert not (tmp_path / "out" / "summary.json").exists()
    work = run(file, tmp_path / "out", Painter())
    assert (work.completed, work.failed) == (3, 0)


def test_a_host_of_a_jobs_own_is_lost_once_it_can_form_no_gang() -> None:
    class Broken:
        def __init__(self, sizes: set[int]) -> None:
            self.host = SimpleNamespace(sizes=sizes)

        def generate(self, _: GenerationRequest) -> GenerationResult:
            raise NotEnoughDevices("no gang here can serve this any more: worker 0 died")

    request = GenerationRequest(prompt="a lake")
    with pytest.raises(NotEnoughDevices):
        OwnHost(Broken({1})).generate(request)  # type: ignore[arg-type]
    with pytest.raises(MakerLost, match="worker 0 died"):
        OwnHost(Broken(set())).generate(request)  # type: ignore[arg-type]


def test_what_no_prompt_is_to_blame_for_ends_the_run(file: Path, tmp_path: Path) -> None:
    def fail(_: GenerationRequest) -> None:
        raise ZeroDivisionError

    painter = Painter(fail)
    with pytest.raises(ZeroDivisionError):
        run(file, tmp_path / "out", painter, in_flight=1)
    assert len(painter.asked) == 1


def test_a_service_that_cannot_be_reached_is_asked_again_and_ends_the_run_if_it_is_gone(
    file: Path, tmp_path: Path
) -> None:
    """Routers are replaced, as by `serve deploy` in the middle of a job."""
    away = iter([True] * 3)

    def be_away(_: GenerationRequest) -> None:
        if next(away, False):
            raise ConnectionError("the service broke off")

    work = run(file, tmp_path / "out", Painter(be_away), in_flight=1)
    assert (work.completed, work.failed) == (4, 0)

    def vanish(_: GenerationRequest) -> None:
        raise ConnectionError("the service is gone")

    painter = Painter(vanish)
    with pytest.raises(ConnectionError, match="is gone"):
        run(file, tmp_path / "other", painter, in_flight=1)
    assert len(painter.asked) == MAX_TRIES and len(set(painter.asked)) == 1


def test_a_run_that_cannot_say_how_it_goes_does_not_end_as_if_all_were_made(
    file: Path, tmp_path: Path
) -> None:
    def tell(*_: object) -> None:
        raise SystemExit(1)

    good, _ = read_prompts(file)
    with Folder(tmp_path / "out") as folder, pytest.raises(SystemExit):
        Run(good, folder, [Painter()], in_flight=1, tell=tell).finish()


def test_a_stop_finishes_what_is_under_way_and_a_second_one_cancels_it(file: Path, tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait(_: GenerationRequest) -> None:
        begun.set()
        assert go_on.wait(20)
        if painter.cancelled:
            raise GenerationCancelled("asked to")

    painter = Painter(wait)
    good, _ = read_prompts(file)
    with Folder(tmp_path / "out") as folder:
        for cancels in (0, 1):
            begun.clear()
            go_on.clear()
            work = Run(good, folder, [painter], in_flight=1)
            thread = threading.Thread(target=work.finish)
            thread.start()
            assert begun.wait(20)
            for _ in range(1 + cancels):
                work.stop()
            while len(painter.cancelled) < cancels:
                pass
            go_on.set()
            thread.join(20)
            assert (work.completed, work.failed, work.stopped) == (1 - cancels, 0, True)
    assert len(painter.asked) == 2


def test_a_signal_stops_a_run_also_while_the_main_thread_holds_what_stopping_needs() -> None:
    lock, got = threading.Lock(), SimpleQueue[bool]()
    work = SimpleNamespace(stop=lambda: got.put(lock.acquire(timeout=2)))
    with _signals_stop(work):  # type: ignore[arg-type]
        with lock:
            signal.raise_signal(signal.SIGTERM)
        assert got.get(timeout=20)


def test_every_signal_has_stopped_its_run_when_that_is_over() -> None:
    stopped: list[None] = []
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with _signals_stop(SimpleNamespace(stop=lambda: stopped.append(None))):  # type: ignore[arg-type]
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(kind)
    assert len(stopped) == 2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_whoever_stops_a_run_is_told_once_that_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    log = StringIO()
    monkeypatch.setattr(generate, "notes", type(generate.notes)(file=log))
    with _signals_stop(SimpleNamespace(stop=lambda: None)):  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert log.getvalue() == "stopping; what is under way is finished first, unless you stop it again\n"


def test_two_jobs_cannot_share_a_folder(tmp_path: Path) -> None:
    with Folder(tmp_path), pytest.raises(InvalidRequest, match="another job"), Folder(tmp_path):
        pass


def command(*arguments: str) -> int | str | None:
    """The exit code of the command line, run in this process."""
    with pytest.raises(SystemExit) as end, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["generate", *arguments])
        main()
    return end.value.code


def test_a_ray_job_refuses_to_write_where_ray_deletes(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")
    monkeypatch.chdir(tmp_path)
    assert command(str(file), "--out", "out") == 2
    assert "absolute path" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_bad_lines_alone_start_nothing_and_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text("nothing\n")
    assert command(str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out")) == 1
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (told["prompts"], told["bad_lines"], told["made"]) == (0, 1, 0)


def test_a_folder_that_cannot_be_one_is_a_usage_error(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(str(file), "--out", str(file)) == 2
    assert f"distriray: {file} cannot be written to: Not a directory" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "out")) == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize("gone", [BrokenPipeError(), OSError(ENOSPC, "no space left")])
def test_a_job_makes_every_line_though_nobody_hears_how_it_goes(
    gone: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Gone(StringIO):
        def write(self, _: str) -> int:
            raise gone

    def own_hosts(*_: object, **__: object) -> AbstractContextManager[list[Painter]]:
        return nullcontext([Painter()])

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a lake"}\n{"prompt": "a moor"}\n')
    monkeypatch.setattr(generate, "own_hosts", own_hosts)
    monkeypatch.setattr(generate, "notes", type(generate.notes)(file=Gone()))
    args = (str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out"), "--in-flight", "1")
    assert command(*args) == 0
    assert json.loads(capsys.readouterr().out)["made"] == 2


def test_a_job_that_made_everything_ends_so_though_its_output_is_full(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").touch()
    arguments = [str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out")]
    with open("/dev/full", "w") as full:
        job = [sys.executable, "-m", "distriray.jobs.generate", *arguments]
        done = subprocess.run(job, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_job_says_of_a_line_is_one_line_however_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log, where lines are looked for by their beginnings, is 80 columns wide for rich."""

    def own_hosts(*_: object, **__: object) -> AbstractContextManager[list[Painter]]:
        return nullcontext([Painter(refuse)])

    def refuse(_: GenerationRequest) -> None:
        raise GangBroken(why)

    why, log = "[bold] :smile: " + "a long story " * 20 + "ends", StringIO()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a lake"}\n')
    monkeypatch.setattr(generate, "own_hosts", own_hosts)
    monkeypatch.setattr(generate, "notes", type(generate.notes)(file=log))
    assert command(str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out")) == 1
    assert log.getvalue().strip() == f"line 1: {why}"


def test_what_ray_prints_of_a_worker_that_died_is_not_printed_beside_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def own_hosts(*_: object, **__: object) -> AbstractContextManager[list[Painter]]:
        return nullcontext([Painter(lambda _: print("(raylet) A worker died or was killed"))])

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a lake"}\n')
    monkeypatch.setattr(generate, "own_hosts", own_hosts)
    assert command(str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out")) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["made"] == 1 and "(raylet) A worker died" in told.err


def test_cpus_of_a_ray_that_is_not_started_are_refused(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert command(str(file), "--out", str(tmp_path / "out"), "--cpus", "2") == 2
    assert "--cpus is for a Ray started here, and head:6379 is to be joined" in capsys.readouterr().err


@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_a_disk_that_is_full_is_said_in_a_line_and_loses_nothing(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is written when it is: the list of errors, a picture, the manifest or the summary."""
    files = itertools.count()

    def flush(file: Any) -> None:
        if next(files) == room:
            raise OSError(ENOSPC, "No space left on device")

    def own_hosts(*_: object, **__: object) -> AbstractContextManager[list[Painter]]:
        return nullcontext([Painter()])

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a lake"}\n')
    monkeypatch.setattr(generate, "own_hosts", own_hosts)
    args = (str(tmp_path / "prompts.jsonl"), "--out", str(out := tmp_path / "out"))
    with monkeypatch.context() as full:
        full.setattr("distriray.jobs.folder._flush", flush)
        assert command(*args) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"distriray: {out} cannot be written to: No space left on device; ")
    assert command(*args) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["made_before"] + facts["made"] == 1 and facts["made_before"] == (room >= 2)


def test_hosts_of_a_jobs_own_are_as_a_file_and_then_its_options_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def own_hosts(config: HostConfig, *_: object, **__: object) -> AbstractContextManager[list[Painter]]:
        seen.append(config)
        return nullcontext([Painter()])

    seen: list[HostConfig] = []
    monkeypatch.setattr(generate, "own_hosts", own_hosts)
    prompts, pool = tmp_path / "prompts.jsonl", tmp_path / "pool.yaml"
    prompts.write_text('{"prompt": "a lake"}\n{"prompt": "a moor", "num_inference_steps": 9}\n')
    pool.write_text("model: {name: some/model, quantize: int8}\nworkers: 4\nlimits: {max_steps: 8}\n")
    args = (str(prompts), "--out", str(tmp_path / "out"), "--pool", str(pool))
    assert command(*args, "--model", "other/model") == 1
    (config,) = seen
    assert config.model == ModelSpec(name="other/model"), "the file's fields are of its own model"
    assert (config.workers, config.gang_sizes) == (4, (1,))
    assert json.loads(capsys.readouterr().out)["bad_lines"] == 1  # beyond the file's limit
    pool.write_text("workers: 4\ngang_sizes: [2, 4]\n")
    command(*args, "--workers", "2", "--gang-size", "2")
    assert (seen[-1].workers, seen[-1].gang_sizes) == (2, (2,))
    pool.write_text("workers: 0\n")
    capsys.readouterr()
    assert command(*args) == 2
    assert f"pool {pool}: workers 0: input should be greater" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    ["--workers=2", "--hosts=2", "--gang-size=2", "--device=cpu", "--lora-dir=x", "--pool=x", "--cpus=2"],
)
def test_what_is_of_hosts_of_its_own_is_refused_beside_an_app(
    option: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(str(file), "--out", str(tmp_path / "out"), "--app", "distriray", option) == 2
    name = option.partition("=")[0]
    assert f"{name} is for hosts started here; with --app leave it out" in capsys.readouterr().err


def with_picture(folder: Path, *texts: str, name: str = "prompts.jsonl", **fields: object) -> Path:
    """A file of lines with these images, beside a picture `a.png`."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (64, 96), "red").save(folder / "a.png")
    (folder / name).write_text(
        "".join(json.dumps({"prompt": "a lake", "image": text, **fields}) + "\n" for text in texts)
    )
    return folder / name


def test_pictures_lie_beside_the_prompts_and_are_read_when_it_is_their_turn(tmp_path: Path) -> None:
    file = with_picture(tmp_path / "job", "a.png", "./a.png", strength=0.5)
    (first, second), bad = read_prompts(file)
    assert not bad and second.id == f"{first.id}-2", "a path is no content"
    assert not first.request.pictures, "of thousands of lines they would fill the memory"
    assert first.whole().image == Picture.of(tmp_path / "job" / "a.png") and first.whole().strength == 0.5
    url = first.whole().image.url  # type: ignore[union-attr]
    Image.new("RGB", (64, 96), "blue").save(tmp_path / "job" / "a.png")
    assert read_prompts(file)[0][0].id != first.id, "another picture is another prompt"
    (inline,), _ = read_prompts(with_picture(tmp_path / "job", url))
    assert inline.whole().image == inline.request.image is not None


def test_a_picture_that_leads_out_of_the_folder_or_is_none_makes_a_bad_line(tmp_path: Path) -> None:
    outside = tmp_path / "secret.png"
    Image.new("RGB", (64, 64)).save(outside)
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "link.png").symlink_to(outside)
    (folder / "cut.png").write_bytes(png(Image.effect_noise((64, 64), 90))[:2000])
    (folder / "text.png").write_text("text")
    texts = [
        "../secret.png", str(outside), "link.png", "none.png", "cut.png", "text.png", "", ".", "\0",
        "x" * 5000,
    ]  # fmt: skip
    good, bad = read_prompts(with_picture(folder, *texts, "a.png"))
    assert [prompt.line for prompt in good] == [len(texts) + 1]
    assert [(line.line, line.param) for line in bad] == [(i + 1, "image") for i in range(len(texts))]
    assert all("lies outside" in line.message for line in bad[:3])
    assert "no such file" in bad[3].message and "cut short" in bad[4].message
    assert not [line for line in bad if "secret" in line.message or "none.png" in line.message]


def test_a_picture_that_is_no_text_is_said_to_be_a_path_in_the_file_of_a_job(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "a", "image": ["a.png"]}\n{"prompt": "a", "control": [{"name": "b", "image": 3}]}\n'
    )
    good, bad = read_prompts(tmp_path / "prompts.jsonl")
    assert not good and [line.message for line in bad] == [
        f"{name} is no text; write the path of a picture, or a data: URL"
        for name in ("image", "control.0.image")
    ]


def test_a_picture_that_is_another_when_it_is_its_turn_is_not_drawn_on_as_if_it_were_the_first(
    tmp_path: Path,
) -> None:
    file, painter = with_picture(tmp_path / "job", "a.png"), Painter()
    good, _ = read_prompts(file)
    Image.new("RGB", (64, 96), "blue").save(tmp_path / "job" / "a.png")
    with Folder(tmp_path / "out") as folder:
        Run(good, folder, [painter], in_flight=1).finish()
    (failed,) = lines(tmp_path / "out" / "errors.jsonl")
    assert failed["param"] == "image" and "image has changed since the job began" in str(failed["error"])
    assert not painter.asked and "a.png" not in str(failed)
    assert run(file, tmp_path / "out", painter).completed == 1


def test_a_picture_that_is_gone_when_it_is_its_turn_fails_its_prompt_alone(tmp_path: Path) -> None:
    file, painter = with_picture(tmp_path / "job", "a.png"), Painter()
    file.write_text(file.read_text() + json.dumps({"prompt": "a hill"}) + "\n")
    good, _ = read_prompts(file)
    (tmp_path / "job" / "a.png").unlink()
    with Folder(tmp_path / "out") as folder:
        done = Run(good, folder, [painter], in_flight=1)
        done.finish()
    assert (done.completed, done.failed) == (1, 1)
    (failed,) = lines(tmp_path / "out" / "errors.jsonl")
    assert "image cannot be read" in str(failed) and "a.png" not in str(failed)
