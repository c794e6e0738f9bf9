"""A job on a real host, killed half-way and started again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

BAD = {
    5: "not JSON",
    17: '{"prompt": "x", "height": 500}',
    30: '{"prompt": "x", "num_inference_steps": 9999}',
}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """40 prompts, some of them equal, and 3 bad lines between them."""
    good = iter(
        json.dumps({"prompt": f"a lake {i % 30}", "height": 64, "width": 64, "num_inference_steps": 8})
        for i in range(40)
    )
    lines = [BAD[number] if number in BAD else next(good) for number in range(1, 44)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def start(prompts: Path, out: Path, model: Path) -> subprocess.Popen[str]:
    arguments = [str(prompts), "--out", str(out), "--model", str(model), "--device", "cpu", "--cpus", "2"]
    return subprocess.Popen(
        [sys.executable, "-m", "distriray.jobs.generate", *arguments], stdout=subprocess.PIPE, text=True
    )


def manifest(out: Path) -> list[dict[str, object]]:
    path = out / "manifest.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for(count: int, out: Path, job: subprocess.Popen[str]) -> None:
    while len(manifest(out)) < count:
        assert job.poll() is None
        time.sleep(0.005)


def test_a_job_killed_half_way_makes_every_good_prompt_exactly_once(
    prompts: Path, tmp_path: Path, tiny_model: Path
) -> None:
    out = tmp_path / "out"
    first = start(prompts, out, tiny_model)
    wait_for(20, out, first)
    first.kill()
    first.wait()
    before = manifest(out)
    assert 20 <= len(before) < 40
    written = {entry["file"]: (out / str(entry["file"])).stat().st_mtime_ns for entry in before}

    second = start(prompts, out, tiny_model)
    told, _ = second.communicate(timeout=200)
    summary = json.loads(told)
    after = manifest(out)
    assert second.returncode == 1  # three lines could not be made
    assert summary == json.loads((out / "summary.json").read_text())
    assert (summary["prompts"], summary["bad_lines"], summary["failed"]) == (40, 3, 0)
    assert (summary["made_before"], summary["made"]) == (len(before), 40 - len(before))
    assert after[: len(before)] == before
    assert sorted(int(str(entry["line"])) for entry in after) == sorted({*range(1, 44)} - set(BAD))
    files = {str(path.relative_to(out)) for path in (out / "images").iterdir()}
    assert len(files) == 40 and files == {entry["file"] for entry in after}
    assert all((out / name).stat().st_mtime_ns == when for name, when in written.items())
    for name in files:
        with Image.open(out / name) as image:
            image.load()
            assert image.size == (64, 64)
    errors = [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]
    assert [error["line"] for error in errors] == sorted(BAD)


@pytest.mark.parametrize("everybody", [False, True], ids=["the job", "with all that it started"])
def test_a_job_that_is_terminated_finishes_what_is_under_way(
    prompts: Path, tmp_path: Path, tiny_model: Path, everybody: bool
) -> None:
    out = tmp_path / "out"
    job = start(prompts, out, tiny_model)
    wait_for(5, out, job)
    process = psutil.Process(job.pid)
    for each in (process, *(process.children(recursive=True) if everybody else ())):  # as systemd does
        each.send_signal(signal.SIGTERM)
    told, _ = job.communicate(timeout=60)
    summary = json.loads(told)
    assert job.returncode == 130 and summary["stopped"] and summary["failed"] == 0
    assert 5 <= summary["made"] == len(manifest(out)) < 40
    assert not list(out.glob("**/.*.part"))


SUBMIT = """
import sys, time, ray
from distriray.gang import reaper
from ray.job_submission import JobStatus, JobSubmissionClient
folder, *arguments = sys.argv[1:]
context = ray.init(address="local", num_cpus=2, include_dashboard=True, log_to_driver=False)
watcher = reaper.start()
try:
    client = JobSubmissionClient(f"http://{context.dashboard_url}")
    entrypoint = " ".join([sys.executable, "-m", "distriray.jobs.generate", *arguments])
    job = client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": folder})
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.2)
    print(client.get_job_status(job).value, client.get_job_logs(job), sep="\\n")
finally:
    ray.shutdown()
    watcher.communicate()
"""


def submit(folder: Path, *arguments: str) -> list[str]:
    """A Ray job with `folder` as its working directory; its final status and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", SUBMIT, str(folder), *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.usefixtures("workers_of_their_own")
def test_a_submitted_job_draws_on_the_cluster_it_was_submitted_to(tmp_path: Path, tiny_model: Path) -> None:
    folder, out = tmp_path / "upload", tmp_path / "out"
    folder.mkdir()
    prompt = {"prompt": "a lake", "height": 64, "width": 64, "num_inference_steps": 2}
    (folder / "prompts.jsonl").write_text(json.dumps(prompt) + "\n")
    hosts = ["--model", str(tiny_model), "--device", "cpu"]
    status, *told = submit(folder, "prompts.jsonl", "--out", str(out), *hosts)
    assert status == "SUCCEEDED", told
    assert len(manifest(out)) == 1
