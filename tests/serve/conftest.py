"""One local Ray and one service with three small pools for all tests of this folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from distriray.handle import HandleClient
from distriray.requests import GenerationRequest
from distriray.service import ROUTERS, PoolReport
from tests.adapters import write
from tests.distributed.ranks import free_address
from tests.models import tiny_sdxl

APP = "distriray"
PORT = int(free_address().split(":")[1])  # others may run tests on this machine
HTTP = f"http://127.0.0.1:{PORT}"
ENVIRONMENT = {
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}


class Service:
    """The application under test, deployed as `serve deploy` does it."""

    def __init__(self, models: dict[str, str], lora_dir: str) -> None:
        self.models = models
        tiny = {"device": "cpu", "cpus_per_worker": 0.1, "parallel": {"exchange": "sync"}}
        self.args: dict[str, Any] = {
            "pools": [
                {
                    **tiny,
                    "name": "pair",
                    "model": models["pair"],
                    "workers": 2,
                    "max_queue": 2,
                    "lora_dir": lora_dir,
                },
                {**tiny, "name": "twins", "model": models["twins"], "min_hosts": 2, "max_hosts": 2},
                {
                    **tiny,
                    "name": "elastic",
                    "model": models["elastic"],
                    "min_hosts": 0,
                    "max_hosts": 2,
                    "target_backlog_s": 1.0,
                    "look_back_s": 1.0,
                    "scale_up_after_s": 0.5,
                    "scale_down_after_s": 3.0,
                },
            ],
            "router": {"min_replicas": 2, "max_replicas": 2},
        }

    def deploy(
        self, *others: dict[str, Any], routers: int | None = None, **user_configs: dict[str, Any]
    ) -> None:
        """Apply the configuration, with these `user_config`s of pools, and these other applications.

        Args:
            routers: if not as many as configured; no other replica is replaced for that.
        """
        deployments = [{"name": name, "user_config": live} for name, live in user_configs.items()]
        if routers is not None:
            deployments.append({"name": ROUTERS, "num_replicas": routers, "autoscaling_config": None})
        own = {"name": APP, "route_prefix": "/", "args": self.args, "deployments": deployments}
        applications = [{"import_path": "deployments.app:build_app", **app} for app in (own, *others)]
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": applications}))

    def running(self, deployment: str, state: str = "RUNNING") -> int:
        """How many replicas of a deployment run, or are in another state."""
        states = serve.status().applications[APP].deployments[deployment].replica_states
        return int(states.get(state, 0))

    def is_up(self, application: str = APP) -> bool:
        status = serve.status().applications[application]
        assert status.status != "DEPLOY_FAILED", status
        return bool(status.status == "RUNNING")


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("models")
    tiny_sdxl().save_pretrained(folder / "pair")
    for seed, name in enumerate(("ink", "neon")):
        write(folder / "loras" / f"{name}.safetensors", tiny_sdxl(), seed)
    for name in ("twins", "elastic"):
        (folder / name).symlink_to(folder / "pair")
    patch = pytest.MonkeyPatch()
    for name, value in ENVIRONMENT.items():
        patch.setenv(name, value)
    patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2])]))
    ray.init(address="local", num_cpus=8, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        serve.start(http_options={"port": PORT})
        models = {name: str(folder / name) for name in ("pair", "twins", "elastic")}
        service = Service(models, str(folder / "loras"))
        service.deploy()
        until(service.is_up, 240)
        yield service
        serve.shutdown()
    finally:
        ray.shutdown()
        patch.undo()


@pytest.fixture
def client(service: Service) -> Iterator[HandleClient]:
    """The service, which every test must leave idle."""
    client = HandleClient.connect(APP)
    yield client
    until(lambda: all(idle(pool) for pool in client.fleet().pools.values()))


def idle(pool: PoolReport) -> bool:
    return not any(host.running or host.waiting for host in pool.hosts.values())


def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Wait for `condition`; a test that waits in vain fails."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not so within {timeout_s} s"
        time.sleep(0.05)


@pytest.fixture
def ask(service: Service) -> Callable[..., GenerationRequest]:
    """A small request to a pool, by the pool's name."""

    def make(pool: str = "pair", **fields: Any) -> GenerationRequest:
        small = {"prompt": "a lake", "height": 128, "width": 128, "seed": 7, "num_inference_steps": 4}
        return GenerationRequest.parse({**small, "model": service.models[pool], **fields})

    return make
