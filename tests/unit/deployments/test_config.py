"""Bad configurations are refused with what to do, and the examples are good ones."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from pydantic import ValidationError

from deployments.app import ASK_AT_ONCE, ingress_options, pool_options
from deployments.config import AppConfig, PoolConfig
from distriray.limits import Limits
from distriray.models import ModelSpec

ROOT = Path(__file__).parents[3]


def config_of(path: str) -> AppConfig:
    applications = yaml.safe_load((ROOT / path).read_text())["applications"]
    assert applications[0]["import_path"] == "deployments.app:build_app"
    return AppConfig.model_validate(applications[0]["args"])


HALVES = {"parallel": {"cfg_parallel": True}}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"pools": []}, "pools lists none"),
        ({"pools": [{"name": "a"}, {"name": "a"}]}, "more than once"),
        ({"pools": [{"name": "a", "min_hosts": 3, "max_hosts": 2}]}, "use at least 3"),
        ({"pools": [{"name": "a", "workers": 2, "gang_sizes": [1, 4]}]}, "exceed the 2 workers"),
        (
            {"pools": [{"name": "a", **HALVES, "workers": 6, "gang_sizes": [1, 3]}]},
            r"\[3\] are odd; use 'auto'",
        ),
        ({"pools": [{"name": "a", "wokers": 2}]}, "wokers"),
        ({"pools": [{"name": "a/b"}]}, "pattern"),
        ({"pools": [{"name": "Ingress"}]}, "the routers' deployment"),
        ({"pools": [{"name": "a", "gang_sizes": []}]}, "do not nest"),
        (
            {"pools": [{"name": "a"}], "limits": {"max_side": 32}},
            "max_side 32 leaves no size.*raise it to 64",
        ),
        (
            {"pools": [{"name": "a", "limits": {"min_side": 512, "max_pixels": 512 * 256}}]},
            "max_pixels 131072 .*raise it to 262144, or lower min_side",
        ),
        ({"pools": [{"name": "a"}], "router": {"min_replicas": 5}}, "use at least 5"),
        ({"pools": [{"name": "a"}], "colour": "red"}, "colour"),
        ({"pools": [{"name": "a", "cpus_per_host": 0}]}, r"(?s)cpus_per_host.*equal to 0\.0001"),
        ({"pools": [{"name": "a", "cpus_per_worker": 1e-5}]}, r"(?s)cpus_per_worker.*equal to 0\.0001"),
    ],
)
def test_a_bad_configuration_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AppConfig.model_validate(args)


def test_a_mistake_in_a_pool_is_not_said_to_be_a_lack_of_pools() -> None:
    with pytest.raises(ValidationError) as refused:
        AppConfig.model_validate({"pools": [{"name": "a", "wokers": 2}]})
    assert [error["loc"] for error in refused.value.errors()] == [("pools", 0, "wokers")]


def test_pools_take_what_they_leave_out_from_the_service() -> None:
    config = AppConfig.model_validate(
        {
            "model": "here/one",
            "limits": {"max_steps": 7},
            "pools": [{"name": "a"}, {"name": "b", "model": "here/two", "limits": {"max_steps": 8}}],
        }
    )
    assert [pool.model.name for pool in config.pools] == ["here/one", "here/two"] == list(config.models)
    assert [pool.limits.max_steps for pool in config.pools] == [7, 8]


@pytest.mark.parametrize(
    "model", [{"name": "here/one", "variant": "fp16"}, ModelSpec(name="here/one", variant="fp16")]
)
@pytest.mark.parametrize("own", [{"quantize": "int8"}, ModelSpec(quantize="int8")])
def test_a_pool_that_sets_a_models_field_and_no_name_has_the_services_model(model: Any, own: Any) -> None:
    pools = [{"name": "a", "model": own}, {"name": "b", "model": {"name": "here/two", "quantize": "int8"}}]
    first, second = AppConfig.model_validate({"model": model, "pools": pools}).pools
    assert first.model == ModelSpec(name="here/one", variant="fp16", quantize="int8")
    assert second.model == ModelSpec(name="here/two", quantize="int8"), "another model has fields of its own"
    (alone,) = AppConfig.model_validate({"model": "here/one", "pools": [{"name": "a", "model": own}]}).pools
    assert alone.model == ModelSpec(name="here/one", quantize="int8")


def test_a_pool_that_sets_one_limit_keeps_the_services_others() -> None:
    for limits in ({"max_side": 1024, "max_steps": 50}, Limits(max_side=1024, max_steps=50)):
        (pool,) = AppConfig.model_validate(
            {"limits": limits, "pools": [{"name": "a", "limits": {"max_steps": 9}}]}
        ).pools
        assert pool.limits == Limits(max_side=1024, max_steps=9)


def test_user_config_opens_no_limit_and_resets_no_setting_that_it_does_not_name() -> None:
    closed = {"max_side": 1024, "max_pixels": 1 << 20}
    parallel = {"exchange": "sync", "prediction": {"halos": 0.25, "statistics": 0.5}}
    pool = PoolConfig.model_validate({"name": "a", "limits": closed, "parallel": parallel})
    changed = pool.changed({"limits": {"max_steps": 50}, "parallel": {"prediction": {"halos": 0.5}}})
    assert changed.limits == Limits(max_side=1024, max_pixels=1 << 20, max_steps=50)
    assert changed.parallel.exchange == "sync"
    assert (changed.parallel.prediction.halos, changed.parallel.prediction.statistics) == (0.5, 0.5)
    with pytest.raises(ValueError, match="max_side"):
        pool.changed({"limits": {"max_side": None}})
    with pytest.raises(ValueError, match="limits"):
        pool.changed({"limits": None})
    with pytest.raises(ValueError, match="halo"):
        pool.changed({"parallel": {"prediction": {"halo": 0.5}}})


def test_user_config_changes_what_hosts_can_change_and_nothing_else() -> None:
    pool = PoolConfig(name="a", workers=2, limits=Limits(max_steps=9))
    changed = pool.changed({"max_queue": 3, "parallel": {"exchange": "sync"}})
    assert (changed.max_queue, changed.parallel.exchange, changed.limits.max_steps) == (3, "sync", 9)
    assert pool.changed({}) == pool
    with pytest.raises(ValueError, match="workers"):
        pool.changed({"workers": 3})
    with pytest.raises(ValueError, match="max_queue"):
        pool.changed({"max_queue": 0})


def test_a_pool_reserves_a_bundle_for_the_host_and_one_for_each_worker() -> None:
    options = pool_options(PoolConfig(name="a", workers=2, device="cuda", strategy="PACK"))
    gpu = {"CPU": 1.0, "GPU": 1.0}
    assert options["placement_group_bundles"] == [{"CPU": 0.1}, gpu, gpu]
    assert options["placement_group_strategy"] == "PACK"
    assert options["num_replicas"] == 1
    scaled = pool_options(PoolConfig(name="a", device="cpu", min_hosts=0, max_hosts=3))
    assert scaled["autoscaling_config"].max_replicas == 3 and "num_replicas" not in scaled


def test_routers_and_hosts_ask_at_once_whether_a_caller_has_died() -> None:
    config = AppConfig.model_validate({"pools": [{"name": "a", "device": "cpu"}]})
    for options in (ingress_options(config), pool_options(config.pools[0])):
        assert options["ray_actor_options"]["runtime_env"] == {"env_vars": ASK_AT_ONCE}


def test_ray_knows_the_settings_by_which_an_actor_asks_at_once() -> None:
    with (
        open(ray._raylet.__file__, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library,
    ):
        for name in ASK_AT_ONCE:
            assert library.find(name.encode()) >= 0, "Ray says nothing of a setting that it does not know"


@pytest.mark.parametrize(
    ("http", "router", "drain_s"),
    [
        ({}, {}, 610.0),
        ({"timeout_s": 1800}, {}, 1810.0),
        ({"timeout_s": None}, {}, 610.0),
        ({"timeout_s": 1800}, {"drain_s": 30}, 30.0),
    ],
)
def test_a_router_that_is_stopped_may_go_on_for_as_long_as_a_request_may_take(
    http: dict[str, Any], router: dict[str, Any], drain_s: float
) -> None:
    config = AppConfig.model_validate({"pools": [{"name": "a"}], "http": http, "router": router})
    assert ingress_options(config)["graceful_shutdown_timeout_s"] == drain_s


def test_the_service_of_the_readme_needs_two_cores() -> None:
    (pool,) = config_of("serve_config.yaml").pools
    bundles = pool_options(pool)["placement_group_bundles"]
    router = config_of("serve_config.yaml").router
    assert pool.workers == 2 and pool.device == "cpu" and pool.policy == "elastic"
    assert sum(bundle["CPU"] for bundle in bundles) * pool.max_hosts + router.cpus <= 2
    assert not any("GPU" in bundle for bundle in bundles)


def test_the_examples_are_four_fixed_pools_and_one_elastic_one() -> None:
    fixed = config_of("docs/examples/four_pools.yaml").pools
    assert [(pool.workers, pool.host.sizes) for pool in fixed] == [(n, (n,)) for n in (1, 2, 4, 8)]
    assert len({pool.model for pool in fixed}) == 1
    (elastic,) = config_of("docs/examples/elastic_pool.yaml").pools
    assert elastic.workers == 8 and elastic.host.sizes == (1, 2, 4, 8) and elastic.policy == "elastic"


def test_defaults_keep_the_limits_so_that_nobody_is_refused_for_what_they_did_not_ask_for() -> None:
    with pytest.raises(ValidationError, match=r"defaults.num_inference_steps 9 is above limits.max_steps 8"):
        PoolConfig(name="a", defaults={"num_inference_steps": 9}, limits={"max_steps": 8})
    with pytest.raises(ValidationError, match=r"defaults.guidance_scale 60"):
        PoolConfig(name="a", defaults={"guidance_scale": 60.0})
    pool = PoolConfig(name="a", defaults={"num_inference_steps": 8}, limits={"max_steps": 8})
    with pytest.raises(ValidationError, match="above limits.max_steps 4"):
        pool.changed({"limits": {"max_steps": 4}})


def test_pools_of_one_model_draw_alike() -> None:
    pools = [{"name": "a", "defaults": {"num_inference_steps": 4}}, {"name": "b"}]
    with pytest.raises(ValidationError, match="pools a and b have one model, .* and other defaults"):
        AppConfig.model_validate({"pools": pools})
    AppConfig.model_validate({"pools": [pools[0], {**pools[1], "model": "some/other"}]})


def test_an_alias_is_another_name_of_a_model_that_is_there() -> None:
    def config(**aliases: str) -> AppConfig:
        return AppConfig.model_validate({"pools": [{"name": "a"}], "aliases": aliases})

    assert config(**{"dall-e-3": "builtin:landscapes"}).models == ("builtin:landscapes",)
    with pytest.raises(ValidationError, match="alias 'dall-e-3' is of 'some/model', which no pool has"):
        config(**{"dall-e-3": "some/model"})
    with pytest.raises(ValidationError, match="is the name of a model itself"):
        config(**{"builtin:landscapes": "builtin:landscapes"})
