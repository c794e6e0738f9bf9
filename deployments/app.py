"""From a configuration to a Serve application: `serve run` with `import_path: deployments.app:build_app`."""

import time
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from deployments.autoscaling import QueuedWork
from deployments.config import AppConfig, PoolConfig
from deployments.ingress import Ingress
from deployments.pool import Pool
from deployments.request_router import ToNamedHost
from distriray.gang.devices import worker_resources
from distriray.gang.placement import resolve_device
from distriray.service import ROUTERS

REQUESTS_PER_REPLICA = 4096  # hosts bound their queues themselves; Serve's bound must never come first

# Where a caller has died an actor ends its calls one after another, and does nothing else while Ray finds out
# for each that nobody takes its result: by default it asks after a second.
ASK_AT_ONCE = {
    "RAY_core_worker_rpc_server_reconnect_timeout_base_s": "0",
    "RAY_grpc_client_check_connection_status_interval_milliseconds": "10",
}


def build_app(args: AppConfig) -> Application:
    """The service that `args` describe: one deployment a pool, and the router in front of them."""
    pools = [pool.model_copy(update={"device": resolve_device(pool.host)}) for pool in args.pools]
    args = args.model_copy(update={"pools": tuple(pools)})
    hosts = {pool.name: serve.deployment(Pool).options(**pool_options(pool)).bind(pool) for pool in pools}
    return serve.deployment(Ingress).options(**ingress_options(args)).bind(args, hosts, int(time.time()))


def ingress_options(args: AppConfig) -> dict[str, Any]:
    """Serve's options for the deployment of the routers."""
    router = args.router
    return {
        "name": ROUTERS,
        "autoscaling_config": AutoscalingConfig(
            min_replicas=router.min_replicas,
            max_replicas=router.max_replicas,
            target_ongoing_requests=router.target_requests,
        ),
        "max_ongoing_requests": REQUESTS_PER_REPLICA,
        "ray_actor_options": {"num_cpus": router.cpus, "runtime_env": {"env_vars": ASK_AT_ONCE}},
        "graceful_shutdown_timeout_s": args.drain_s,
    }


def pool_options(pool: PoolConfig) -> dict[str, Any]:
    """Serve's options for the deployment of a pool, whose device must not be `auto`."""
    worker = worker_resources(pool.device, pool.cpus_per_worker)
    options: dict[str, Any] = {
        "name": pool.name,
        "ray_actor_options": {"num_cpus": pool.cpus_per_host, "runtime_env": {"env_vars": ASK_AT_ONCE}},
        "placement_group_bundles": [{"CPU": pool.cpus_per_host}] + [worker] * pool.workers,
        "placement_group_strategy": pool.strategy,
        "max_ongoing_requests": REQUESTS_PER_REPLICA,
        "graceful_shutdown_timeout_s": pool.drain_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": pool.health_period_s,
        "request_router_config": RequestRouterConfig(request_router_class=ToNamedHost),
        "user_config": {},
    }
    if pool.min_hosts == pool.max_hosts:
        return {**options, "num_replicas": pool.min_hosts}
    scaling = AutoscalingConfig(
        min_replicas=pool.min_hosts,
        max_replicas=pool.max_hosts,
        look_back_period_s=pool.look_back_s,
        upscale_delay_s=pool.scale_up_after_s,
        downscale_delay_s=pool.scale_down_after_s,
        policy={"policy_function": QueuedWork, "policy_kwargs": {"target_s": pool.target_backlog_s}},
    )
    return {**options, "autoscaling_config": scaling}
