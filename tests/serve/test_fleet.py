"""Many replicas: two routers, hosts that come, go and die, and changes while requests run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
import ray
from ray import serve
from ray._private.state import actors
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group

from distriray.errors import DeadlineUnmet, GenerationCancelled, InvalidRequest
from distriray.handle import HandleClient
from distriray.requests import GenerationRequest

from .conftest import APP, Service, idle, until

pytestmark = pytest.mark.ray
Ask = Callable[..., GenerationRequest]


def finished(client: HandleClient, pool: str) -> dict[str, int]:
    hosts = client.fleet().pools[pool].hosts
    return {name: host.outcomes.get("finished", 0) for name, host in hosts.items()}


@contextmanager
def asking(clients: int, request: Callable[[], GenerationRequest]) -> Iterator[list[str]]:
    """Clients that each ask again as soon as they have their picture; yields the ids of what they got.

    No request may fail, and at least one must be answered.
    """
    stop, made = threading.Event(), list[str]()

    def keep_asking() -> None:
        mine = HandleClient.connect(APP)
        while not stop.is_set():
            made.append(mine.generate(request()).id)

    with ThreadPoolExecutor(clients) as pool:
        askers = [pool.submit(keep_asking) for _ in range(clients)]
        try:
            yield made
        finally:
            stop.set()
        for asker in askers:
            asker.result()
    assert made


def test_two_routers_share_two_hosts_evenly(service: Service, client: HandleClient, ask: Ask) -> None:
    assert service.running("Ingress") == 2 and service.running("twins") == 2
    before, handle = finished(client, "twins"), serve.get_app_handle(APP)
    responses = [handle.generate.remote(ask("twins", num_inference_steps=40)) for _ in range(16)]
    assert len({response.result().id for response in responses}) == 16
    shares = [after - before[name] for name, after in finished(client, "twins").items()]
    assert sum(shares) == 16 and min(shares) >= 4


def test_requests_of_a_host_that_dies_are_done_by_another(
    service: Service, client: HandleClient, ask: Ask
) -> None:
    handle = serve.get_app_handle(APP)
    responses = [handle.generate.remote(ask("twins", num_inference_steps=100)) for _ in range(4)]
    until(lambda: all(host.running for host in client.fleet().pools["twins"].hosts.values()))
    victim = next(iter(client.fleet().pools["twins"].hosts))
    ray.kill(ray.get_actor(f"SERVE_REPLICA::{APP}#twins#{victim}", namespace="serve"))
    assert all(response.result().images for response in responses)
    until(lambda: service.running("twins") == 2 and victim not in client.fleet().pools["twins"].hosts)
    assert client.generate(ask("twins")).images


def test_what_is_sent_to_a_host_that_hangs_is_done_by_another(
    service: Service, client: HandleClient, ask: Ask
) -> None:
    victim = next(iter(client.fleet().pools["twins"].hosts))
    replica = ray.get_actor(f"SERVE_REPLICA::{APP}#twins#{victim}", namespace="serve")
    pid = actors(replica._actor_id.hex())["Pid"]
    before = finished(client, "twins")
    os.kill(pid, signal.SIGSTOP)
    try:
        handle = serve.get_app_handle(APP)
        # Ray may cancel what just begins only when it asks again, some seconds later: too late for few steps.
        responses = [handle.generate.remote(ask("twins", num_inference_steps=200)) for _ in range(4)]
        assert all(response.result(timeout_s=60).images for response in responses)
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: len(client.fleet().pools["twins"].hosts) == 2)
    time.sleep(2)  # what it had in its mailbox has begun by now
    until(lambda: all(idle(pool) for pool in client.fleet().pools.values()))
    assert finished(client, "twins").get(victim, before[victim]) == before[victim], "nothing is done twice"


def test_what_routers_that_die_had_asked_for_is_cancelled(
    service: Service, client: HandleClient, ask: Ask
) -> None:
    before = finished(client, "twins")
    long = ask("twins", num_inference_steps=200, height=512, width=512)
    response = serve.get_app_handle(APP).generate.remote(long)
    until(lambda: any(host.running for host in client.fleet().pools["twins"].hosts.values()))
    for actor in actors(actor_state_name="ALIVE").values():
        if actor["Name"].startswith(f"SERVE_REPLICA::{APP}#Ingress#"):
            os.kill(actor["Pid"], signal.SIGKILL)
    with pytest.raises(RayActorError):
        response.result()
    until(partial(can_be_asked, client))
    until(lambda: idle(client.fleet().pools["twins"]))
    assert finished(client, "twins") == before, "nobody waits for it"


def can_be_asked(client: HandleClient) -> bool:
    try:
        return bool(client.fleet())
    except ConnectionError:
        return False


def test_what_waits_for_a_first_host_keeps_its_deadline_and_can_be_cancelled_at_any_router(
    service: Service, client: HandleClient, ask: Ask
) -> None:
    until(lambda: service.running("elastic") == 0)
    began = time.monotonic()
    with pytest.raises(DeadlineUnmet, match="no host"):
        client.generate(ask("elastic", deadline_s=0.5))
    assert time.monotonic() - began < 3
    handle = serve.get_app_handle(APP)
    for n in range(4):
        response = handle.generate.remote(ask("elastic", id=f"sleeper-{n}"))
        until(partial(client.cancel, f"sleeper-{n}"))
        with pytest.raises(RayTaskError) as error:
            response.result(timeout_s=20)
        assert isinstance(error.value.cause, GenerationCancelled)
    assert client.generate(ask("elastic")).images
    until(lambda: service.running("elastic") == 0, 90)


def test_what_a_router_has_that_drains_is_cancelled_by_its_id(
    service: Service, client: HandleClient, ask: Ask
) -> None:
    until(lambda: service.running("elastic") == 0)
    handle = serve.get_app_handle(APP)
    with no_host_starts():
        responses = {
            f"drained-{n}": handle.generate.remote(ask("elastic", id=f"drained-{n}")) for n in range(8)
        }
        time.sleep(1)  # each is at a router by now, where it waits for a host
        service.deploy(routers=1)
        until(lambda: service.running("Ingress", "STOPPING") == 1)
        for name, response in responses.items():
            assert client.cancel(name)
            with pytest.raises(RayTaskError) as error:
                response.result(timeout_s=20)
            assert isinstance(error.value.cause, GenerationCancelled)
    service.deploy()
    until(lambda: service.running("Ingress") == 2)


@contextmanager
def no_host_starts() -> Iterator[None]:
    """Nothing is left to start one on, while the block runs."""
    taken = placement_group([{"CPU": ray.available_resources()["CPU"]}])
    try:
        assert taken.wait(30)
        yield
    finally:
        remove_placement_group(taken)


def test_user_config_changes_running_hosts_and_no_request_fails(
    service: Service, client: HandleClient, ask: Ask
) -> None:
    def workers() -> set[int]:
        hosts = client.fleet().pools["twins"].hosts.values()
        return {worker.pid for host in hosts for worker in host.workers}

    def is_refused() -> bool:
        try:
            client.generate(ask("twins", num_inference_steps=6))
        except InvalidRequest as error:
            return "above the limit of 5" in str(error)
        return False

    until(lambda: len(workers()) == 2)  # after the death above
    before = workers()
    with asking(2, partial(ask, "twins")) as made:
        service.deploy(twins={"limits": {"max_steps": 5}})
        until(is_refused)
        until(service.is_up)
        count = len(made)
        until(lambda: len(made) > count + 4)
        service.deploy()
        until(lambda: not is_refused())
        until(service.is_up)
    assert workers() == before, "a host was started anew"


def test_a_pool_grows_from_nothing_with_its_work_and_back_while_others_stay(
    service: Service, client: HandleClient, ask: Ask
) -> None:
    until(lambda: service.running("elastic") == 0)
    with asking(8, partial(ask, "elastic", num_inference_steps=60)):
        until(lambda: service.running("elastic") == 2, 120)
    until(lambda: service.running("elastic") == 0, 90)
    assert service.running("pair") == 1 and service.running("twins") == 2
    assert not client.fleet().pools["elastic"].hosts
