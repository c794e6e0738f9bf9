"""What `cluster/` holds agrees with KubeRay, Ray, Prometheus' text format and our own configuration."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private import ray_constants
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from deployments.config import AppConfig, PoolConfig
from distriray.gang.metrics import METRICS, TAGS, Name
from tests.unit.cluster_schema import RAY_SERVICE

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SERVICES = ["cpu", "sdxl"]
DRAINING = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
RAY = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


@cache
def service(name: str) -> dict[str, Any]:
    (document,) = yaml.safe_load_all((CLUSTER / "kuberay" / f"{name}.yaml").read_text())
    return document


def app_of(serve_config: str) -> AppConfig:
    """The application that a Serve configuration describes, checked by Serve first and then by us."""
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(serve_config)).applications
    assert application.import_path == "deployments.app:build_app" and application.name == "distriray"
    return AppConfig.model_validate(application.args)


def pools_of(name: str) -> tuple[PoolConfig, ...]:
    return app_of(service(name)["spec"]["serveConfigV2"]).pools


def groups_of(name: str) -> list[dict[str, Any]]:
    return service(name)["spec"]["rayClusterConfig"]["workerGroupSpecs"]


@pytest.mark.parametrize("name", SERVICES)
def test_manifests_are_what_the_operator_takes(name: str) -> None:
    jsonschema.validate(service(name), RAY_SERVICE)


def test_the_schema_finds_a_misspelt_field() -> None:
    wrong = json.loads(json.dumps(service("cpu")).replace("minReplicas", "minReplica"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, RAY_SERVICE)


@pytest.mark.parametrize("name", SERVICES)
def test_every_manifest_runs_the_ray_that_was_tested(name: str) -> None:
    assert RAY is not None
    assert service(name)["spec"]["rayClusterConfig"]["rayVersion"] == RAY[1]
    assert f"ARG RAY={RAY[1]}\n" in (CLUSTER / "Dockerfile").read_text()


def test_rays_own_ports_are_for_who_has_the_token() -> None:
    for name in SERVICES:
        assert service(name)["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    machines = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in machines


@pytest.mark.parametrize("name", SERVICES)
def test_a_pod_has_room_for_a_host_and_a_router_and_the_cluster_for_all_hosts(name: str) -> None:
    (pool,), (group,) = pools_of(name), groups_of(name)
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    cpus = pool.cpus_per_host + pool.workers * pool.cpus_per_worker
    assert cpus + 0.1 <= float(limits["cpu"])
    assert limits.get("nvidia.com/gpu", 0) == (pool.workers if pool.device == "cuda" else 0)
    assert group["minReplicas"] <= pool.max_hosts == group["maxReplicas"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_pod_has_the_keys_and_every_volume_it_mounts(name: str) -> None:
    config = service(name)["spec"]["rayClusterConfig"]
    for template in [config["headGroupSpec"]["template"], *(group["template"] for group in groups_of(name))]:
        (container,) = template["spec"]["containers"]
        assert "DISTRIRAY_API_KEYS" in {variable["name"] for variable in container["env"]}
        volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes


@pytest.mark.parametrize("name", SERVICES)
def test_pods_outlast_the_requests_they_serve(name: str) -> None:
    app, (group,) = app_of(service(name)["spec"]["serveConfigV2"]), groups_of(name)
    longest = max(app.drain_s, *(pool.drain_s for pool in app.pools))
    spec = group["template"]["spec"]
    variables = {each["name"]: each.get("value") for each in spec["containers"][0]["env"]}
    rays = float(variables[DRAINING])  # which by itself ends a node 30 s after its SIGTERM
    assert longest < rays < spec["terminationGracePeriodSeconds"]


def test_ray_reads_how_long_a_node_may_drain() -> None:
    assert hasattr(ray_constants, DRAINING)


@pytest.mark.parametrize("name", SERVICES)
def test_a_request_is_given_up_by_the_service_and_not_by_serve_whose_answer_clients_send_again(
    name: str,
) -> None:
    options = yaml.safe_load(service(name)["spec"]["serveConfigV2"])["http_options"]
    assert "request_timeout_s" not in options


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("serve_config.yaml", "builtin:landscapes"),
        ("docs/examples/elastic_pool.yaml", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("docs/examples/four_pools.yaml", "stabilityai/stable-diffusion-xl-base-1.0"),
    ],
)
def test_every_example_of_a_service_is_one_that_we_can_build(path: str, model: str) -> None:
    assert app_of((ROOT / path).read_text()).models == (model,)


def test_ray_up_takes_the_machines() -> None:
    config = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    (kind,) = prepared["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(config["provider"]["worker_ips"])


EXPORTED = {f"ray_{name.value}": (spec.kind, {*TAGS, *spec.tags}) for name, spec in METRICS.items()}
SERIES = re.compile(r"(ray_\w+?)(_bucket|_sum|_count)?(?:\{([^}]*)\})?(?=[\s\[),]|$)")


def queries() -> dict[str, str]:
    alerts = yaml.safe_load((CLUSTER / "monitoring" / "alerts.yaml").read_text())
    panels = json.loads((CLUSTER / "monitoring" / "grafana.json").read_text())["panels"]
    return {rule["alert"]: rule["expr"] for group in alerts["groups"] for rule in group["rules"]} | {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in panels
        for target in panel["targets"]
    }


@pytest.mark.parametrize("what", queries())
def test_every_query_asks_for_what_hosts_export(what: str) -> None:
    query = queries()[what]
    assert query.count("(") == query.count(")")
    tags = set()
    for name, part, selector in SERIES.findall(query):
        assert name in EXPORTED, name
        kind, own = EXPORTED[name]
        assert bool(part) == (kind == "histogram")
        assert set(re.findall(r"(\w+)=", selector)) <= own
        tags |= own | ({"le"} if part == "_bucket" else set())
    assert tags
    for by in re.findall(r"by \(([^)]*)\)", query):
        assert set(by.split(", ")) <= tags


def test_the_dashboard_shows_every_metric() -> None:
    shown = {name for query in queries().values() for name, *_ in SERIES.findall(query)}
    assert shown == EXPORTED.keys()


def test_the_documentation_names_every_metric() -> None:
    text = (ROOT / "docs" / "deployment.md").read_text()
    assert set(re.findall(r"`(distriray_\w+)`", text)) == {name.value for name in Name}
