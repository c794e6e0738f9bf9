"""Handles: pictures, errors as themselves, and a gang that is free when nobody waits any more."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image, ImageChops
from ray import serve

from distriray.errors import DeadlineUnmet, GenerationCancelled, InvalidRequest, ModelNotFound, QueueFull
from distriray.events import Finished, Preview, Queued, Started, Step
from distriray.handle import HandleClient
from distriray.requests import GenerationRequest

from .conftest import APP, Service, until

pytestmark = pytest.mark.ray
Ask = Callable[..., GenerationRequest]


def running(client: HandleClient, pool: str = "pair") -> list[Any]:
    return [request for host in client.fleet().pools[pool].hosts.values() for request in host.running]


def outcomes(client: HandleClient, pool: str = "pair") -> Counter[str]:
    totals: Counter[str] = Counter()
    for host in client.fleet().pools[pool].hosts.values():
        totals.update(host.outcomes)
    return totals


def test_a_handle_makes_the_same_picture_every_time(client: HandleClient, ask: Ask) -> None:
    first = serve.get_app_handle(APP).generate.remote(ask(num_images=2)).result()
    second = client.generate(ask(num_images=2))
    assert [image.size for image in first.images] == [(128, 128)] * 2
    assert first.seeds == second.seeds == [7, 8]
    for one, other in zip(first.images, second.images, strict=True):
        assert ImageChops.difference(one, other).getbbox() is None


def test_clients_connect_while_serve_builds_the_application_anew_and_where_it_failed_to(
    service: Service, client: HandleClient, ask: Ask
) -> None:
    good = service.args
    service.args = {**good, "pools": []}
    try:
        service.deploy()
        assert serve.status().applications[APP].status == "DEPLOYING"
        assert HandleClient.connect(APP).generate(ask()).images
        until(lambda: serve.status().applications[APP].status == "DEPLOY_FAILED")
        assert HandleClient.connect(APP).generate(ask()).images
    finally:
        service.args = good
        service.deploy()
        until(service.is_up)


def test_an_application_that_is_not_there_is_not_connected_to(client: HandleClient) -> None:
    with pytest.raises(ConnectionError, match="'nothing-here' is not on this cluster"):
        HandleClient.connect("nothing-here")


def test_a_handle_streams_what_happens(client: HandleClient, ask: Ask) -> None:
    events = list(client.stream(ask(num_inference_steps=30, previews=2)))
    kinds = [type(event) for event in events]
    assert kinds[:2] == [Queued, Started] and kinds[-1] is Finished
    previews = [event for event in events if isinstance(event, Preview)]
    assert [preview.index for preview in previews] == [0, 1]
    assert all(isinstance(preview.image, Image.Image) for preview in previews)


def test_without_a_model_the_first_one_draws(client: HandleClient, ask: Ask) -> None:
    result = client.generate("a lake", height=128, width=128, num_inference_steps=2)
    assert result.model == ask("pair").model == client.models()[0].id


def test_errors_cross_the_handle_as_themselves(client: HandleClient, ask: Ask) -> None:
    with pytest.raises(ModelNotFound, match="nobody/knows"):
        client.generate(ask(model="nobody/knows"))
    with pytest.raises(InvalidRequest, match="above the limit") as refused:
        client.generate(ask(num_inference_steps=10_000))
    assert refused.value.param == "num_inference_steps"
    with pytest.raises(InvalidRequest, match="gang_size 3"):
        list(client.stream(ask(gang_size=3)))


def test_a_deadline_that_cannot_be_met_is_refused_with_the_time_that_could_be(
    client: HandleClient, ask: Ask
) -> None:
    for _ in range(3):  # else nothing is known of its speed, and nobody is refused
        client.generate(ask())
    before = outcomes(client)
    with pytest.raises(DeadlineUnmet) as refused:
        client.generate(ask(num_inference_steps=200, deadline_s=0.001))
    assert refused.value.possible_s is not None and refused.value.possible_s > 0.001
    assert outcomes(client) == before  # no host heard of it
    assert client.generate(ask(deadline_s=600.0)).images


def test_cancelling_a_response_frees_the_gang(client: HandleClient, ask: Ask) -> None:
    response = serve.get_app_handle(APP).generate.remote(ask(num_inference_steps=200, gang_size=2))
    until(lambda: any(request.step >= 2 for request in running(client)))
    cancelled = outcomes(client)["cancelled"]
    response.cancel()
    until(lambda: outcomes(client)["cancelled"] == cancelled + 1)
    assert not running(client)
    assert client.generate(ask(gang_size=2)).gang_size == 2


def test_leaving_a_stream_frees_the_gang(client: HandleClient, ask: Ask) -> None:
    cancelled = outcomes(client)["cancelled"]
    stream = client.stream(ask(num_inference_steps=200, gang_size=2))
    assert any(isinstance(event, Step) for event in stream)
    stream.close()
    until(lambda: outcomes(client)["cancelled"] == cancelled + 1)
    assert not running(client)


def test_a_cancelled_coroutine_cancels_its_request(client: HandleClient, ask: Ask) -> None:
    cancelled = outcomes(client)["cancelled"]

    async def scene() -> None:
        task = asyncio.ensure_future(client.agenerate(ask(num_inference_steps=200)))
        await asyncio.to_thread(until, lambda: running(client))
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(scene())
    until(lambda: outcomes(client)["cancelled"] == cancelled + 1)


def test_a_request_is_cancelled_by_its_id(client: HandleClient, ask: Ask) -> None:
    response = serve.get_app_handle(APP).generate.remote(ask(id="by-id", num_inference_steps=200))
    until(lambda: running(client))
    assert client.cancel("by-id")
    with pytest.raises(GenerationCancelled, match="by-id"):
        response.result()
    assert not client.cancel("by-id")


def test_a_full_queue_refuses_at_once_and_says_when_to_retry(client: HandleClient, ask: Ask) -> None:
    handle = serve.get_app_handle(APP)
    first = handle.generate.remote(ask(num_inference_steps=200, gang_size=2))
    until(lambda: running(client))
    waiting = [handle.generate.remote(ask(gang_size=2)) for _ in range(2)]
    until(lambda: sum(len(host.waiting) for host in client.fleet().pools["pair"].hosts.values()) == 2)
    for _ in range(4):  # whichever router it is
        with pytest.raises(QueueFull) as refused:
            client.generate(ask(gang_size=2))
        assert refused.value.retry_after_s > 0
    assert running(client), "the refusals waited for the first request"
    for response in (first, *waiting):
        assert response.result().images
