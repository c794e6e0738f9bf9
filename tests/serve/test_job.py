"""A job that leaves the pictures to a running service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from distriray.handle import HandleClient
from distriray.jobs.folder import Folder
from distriray.jobs.makers import running_app
from distriray.jobs.prompts import read_prompts
from distriray.jobs.run import Run
from distriray.requests import GenerationRequest

from .conftest import APP, Service, until

pytestmark = pytest.mark.ray


def test_a_job_waits_where_the_queues_are_full_and_reports_what_the_service_refuses(
    client: HandleClient, ask: Callable[..., GenerationRequest], tmp_path: Path
) -> None:
    small = ask(num_inference_steps=2).model_dump(exclude={"id"}, mode="json")
    lines = [json.dumps({**small, "seed": seed}) for seed in range(12)]
    lines.insert(4, json.dumps({**small, "model": "nobody/knows"}))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    prompts, bad = read_prompts(tmp_path / "prompts.jsonl")
    assert len(prompts) == 13 and not bad
    with running_app(APP, address=None) as makers, Folder(tmp_path / "out") as folder:
        folder.begin(prompts, bad)
        run = Run(prompts, folder, makers, in_flight=8)  # its pool lends two gangs and lets two wait
        run.finish()
    assert (run.completed, run.failed) == (12, 1)
    (error,) = map(json.loads, (tmp_path / "out" / "errors.jsonl").read_text().splitlines())
    assert error["line"] == 5 and error["error"].startswith("ModelNotFound")
    assert len(list((tmp_path / "out" / "images").iterdir())) == 12


def test_a_job_that_is_killed_and_started_again_at_once_makes_everything(
    service: Service, client: HandleClient, ask: Callable[..., GenerationRequest], tmp_path: Path
) -> None:
    slow = ask(num_inference_steps=150).model_dump(exclude={"id"}, mode="json", exclude_none=True)
    lines = [json.dumps({**slow, "seed": seed}) for seed in range(4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    arguments = [str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out"), "--app", APP]
    command = [sys.executable, "-m", "distriray.jobs.generate", *arguments]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    job = subprocess.Popen(command, env=environment)
    asked = service.models["pair"]

    def under_way() -> set[str]:
        hosts = [
            h for pool in client.fleet().pools.values() if pool.model == asked for h in pool.hosts.values()
        ]
        return {request.id for host in hosts for request in host.running + host.waiting}

    until(lambda: len(under_way()) >= 3)
    first = under_way()
    job.kill()
    job.wait()
    again = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    until(lambda: not first & under_way(), 20)
    told, _ = again.communicate(timeout=120)
    assert json.loads(told)["failed"] == 0 and json.loads(told)["made"] + json.loads(told)["made_before"] == 4


def test_an_application_that_is_not_there_is_named(client: HandleClient) -> None:
    with pytest.raises(ConnectionError, match="nothing-here"), running_app("nothing-here", address=None):
        pass
