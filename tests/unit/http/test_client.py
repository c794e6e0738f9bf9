"""distriray's own clients say and hear over HTTP what a handle would."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from httpx_sse import ServerSentEvent
from PIL import Image

from deployments.http import HttpConfig
from deployments.http.answers import error_frame
from deployments.http.errors import ANSWERS, refusal_of
from distriray import AsyncClient, Client, errors
from distriray.client import KEY_VARIABLE
from distriray.config import ParallelConfig
from distriray.errors import (
    DeadlineUnmet,
    DistrirayError,
    GangBroken,
    InvalidRequest,
    NotAllowed,
    QueueFull,
    TooLong,
)
from distriray.events import Event, Finished, Preview, Queued, Regrouped, Repaired, Started, Step
from distriray.limits import Limits
from distriray.requests import Defaults, GenerationRequest
from distriray.results import GenerationResult
from distriray.service import ModelCard
from distriray.wire import Code, decode_event
from tests.unit.conftest import serving
from tests.unit.http.fake import CARDS, FakeService, result_of

REQUEST = GenerationRequest(
    prompt="a lake",
    model="some/other",
    negative_prompt="houses",
    height=96,
    width=64,
    num_inference_steps=9,
    guidance_scale=2.5,
    guidance_rescale=0.5,
    seed=3,
    num_images=2,
    scheduler="ddim",
    gang_size=1,
    exchange="compressed",
    deadline_s=60.0,
)


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def same(one: GenerationResult, other: GenerationResult) -> bool:
    assert [image.tobytes() for image in one.images] == [image.tobytes() for image in other.images]
    return one.summary() == other.summary()


def test_every_field_arrives_and_the_whole_result_comes_back(client: Client, service: FakeService) -> None:
    result = client.generate(REQUEST)
    asked = service.asked[-1]
    assert asked.id.startswith(REQUEST.id)
    assert asked.model_dump(exclude={"id"}) == REQUEST.model_dump(exclude={"id"})
    assert same(result, result_of(asked))


def test_what_is_not_used_is_said_in_answers_and_streams(client: Client) -> None:
    said = ["prompt is long", "negative_prompt is long"]
    fields = {"negative_prompt": "a long no", "num_inference_steps": 1}
    assert client.generate("a long lake", **fields).warnings == said
    *_, end = client.stream("a long lake", **fields)
    assert isinstance(end, Finished) and end.result.warnings == said
    assert client.generate("a lake").warnings == []


def test_a_prompt_alone_means_the_defaults(client: Client, service: FakeService) -> None:
    result = client.generate("a lake", seed=5)
    unset = {"id", "seed", "model"}
    assert service.asked[-1].model_dump(exclude=unset) == GenerationRequest(prompt="a lake").model_dump(
        exclude=unset
    )
    assert (result.model, result.height, result.width, result.seeds) == (CARDS[0].id, 64, 96, [5])


def test_the_async_client_gets_the_same(url: str, client: Client) -> None:
    async def ask() -> tuple[GenerationResult, list[type[Event]]]:
        async with AsyncClient(url) as other:
            result, *_ = await asyncio.gather(*(other.generate("a lake", seed=5) for _ in range(3)))
            events = [type(event) async for event in other.stream("a lake", num_inference_steps=2)]
            assert [card.id for card in await other.models()] == [card.id for card in CARDS]
            assert (await other.fleet()).pools.keys() == {"pool"}
        return result, events

    result, events = asyncio.run(ask())
    assert events == [Queued, Started, Step, Step, Finished]
    for image, expected in zip(result.images, client.generate("a lake", seed=5).images, strict=True):
        assert image.tobytes() == expected.tobytes()


def test_a_stream_tells_everything_and_ends_with_the_result(client: Client, service: FakeService) -> None:
    events = list(client.stream("a lake", num_inference_steps=3, previews=1, seed=1))
    name = service.asked[-1].id
    assert events[:2] == [Queued(name, 0, 0.0), Started(name, (0, 1))]
    assert [event for event in events if isinstance(event, Step)] == [
        Step(name, step, 3, 2, 0.1) for step in (1, 2, 3)
    ]
    preview = next(event for event in events if isinstance(event, Preview))
    assert (preview.request_id, preview.step, preview.index) == (name, 2, 0)
    assert preview.image.tobytes() == Image.new("RGB", (8, 12), (2, 0, 0)).tobytes()
    assert isinstance(events[-1], Finished)
    assert same(events[-1].result, result_of(service.asked[-1].settled(64, 96)))


class Eventful(FakeService):
    async def stream(self, request: GenerationRequest, give_up_s: float | None = None):  # type: ignore[no-untyped-def]
        yield Started(request.id, (0, 1))
        yield Repaired(request.id, (1,), 3)
        yield Regrouped(request.id, (0, 2), 4)
        raise GangBroken("three gangs broke")


def test_changes_of_the_gang_and_the_failure_after_them_are_heard() -> None:
    with serving(Eventful()) as url, Client(url) as client:
        heard: list[Event] = []
        with pytest.raises(GangBroken, match="three gangs broke"):
            heard.extend(event for event in client.stream("a lake"))
        events = client.stream("a lake")
        name = next(events).request_id
        assert [next(events), next(events)] == [Repaired(name, (1,), 3), Regrouped(name, (0, 2), 4)]
        events.close()


def test_models_and_fleet_are_those_of_a_handle(client: Client, service: FakeService) -> None:
    assert client.models() == CARDS
    assert client.fleet() == asyncio.run(service.fleet())


def test_all_of_a_card_goes_through() -> None:
    card = ModelCard(
        id="studio",
        created=3,
        owned_by="somebody",
        default_size=(64, 128),
        size_unit=16,
        limits=Limits(max_steps=7),
        gang_sizes=(1, 2),
        lacks={"prompt_3": "no"},
        defaults=Defaults(num_inference_steps=5),
        loras=("ink",),
        controls=("canny",),
        ip_adapters=("style",),
        alias_of="some/other",
    )
    defaults = {name: field.default for name, field in ModelCard.model_fields.items()}
    assert all(getattr(card, name) != default for name, default in defaults.items()), "say one that is not"
    service = FakeService()
    service.models = lambda: [card]  # type: ignore[method-assign]
    with serving(service) as url, Client(url) as client:
        assert client.models() == [card]


DETAILS: dict[type, tuple[object, ...]] = {
    InvalidRequest: ("num_images",),
    QueueFull: (7.0,),
    DeadlineUnmet: (12.5,),
    TooLong: (12.5,),
}
"""What errors say beside their message."""


def kind_of_its_code(kind: type[DistrirayError]) -> type[DistrirayError]:
    """The error itself; where it has no code of its own, the base whose code it has."""
    return next(base for base in kind.__mro__ if "code" in vars(base))


def test_every_error_with_a_code_has_its_own_and_a_line_that_answers_it() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and "code" in vars(kind)]
    assert len(kinds) > 12 and len({kind.code for kind in kinds} | set(Code)) == len(kinds) + len(Code)
    assert {kind_of_its_code(kind) for kind in ANSWERS} == set(kinds) <= ANSWERS.keys()


@pytest.mark.parametrize("kind", ANSWERS, ids=lambda kind: kind.__name__)
def test_errors_arrive_as_themselves(
    kind: type[DistrirayError], client: Client, service: FakeService
) -> None:
    error = kind("words", *DETAILS.get(kind, ()))
    service.refusal = error
    try:
        for ask in (client.generate, lambda prompt: next(client.stream(prompt))):
            with pytest.raises(DistrirayError) as raised:
                ask("a lake")  # type: ignore[operator]
            assert type(raised.value) is kind_of_its_code(kind)
            assert (str(raised.value), vars(raised.value)) == (str(error), vars(error))
    finally:
        service.refusal = None


@pytest.mark.parametrize("kind", ANSWERS, ids=lambda kind: kind.__name__)
def test_errors_in_the_middle_of_a_stream_arrive_as_themselves(kind: type[DistrirayError]) -> None:
    frame = error_frame(refusal_of(kind("words"))).decode()
    with pytest.raises(DistrirayError, match="words") as raised:
        decode_event(ServerSentEvent(data=frame.partition("data: ")[2]))
    assert type(raised.value) is kind_of_its_code(kind)


def test_a_time_limit_of_the_service_is_a_timeout() -> None:
    config = HttpConfig(keys_env="NO_SUCH_VARIABLE", timeout_s=0.2)
    service = FakeService(pace_s=0.5)
    with serving(service, config) as url, Client(url) as client, pytest.raises(TimeoutError):
        client.generate("a lake")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"priority": 1}, "priority"),
        ({"parallel": ParallelConfig(exchange="sync")}, "parallel"),
        ({"height": 64}, "height"),
        ({"id": "a b"}, "id"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 51}, "num_inference_steps"),
        ({"num_images": 5}, "num_images"),
        ({"height": 32, "width": 64}, "height"),
        ({"previews": 2}, "previews"),
        ({"stepz": 3}, "stepz"),
        ({"scheduler": "eulr"}, "scheduler"),
        ({"gang_size": 3}, "gang_size"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: Client, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        client.generate("a lake", **fields)
    assert raised.value.param == param


def test_a_request_comes_alone(client: Client) -> None:
    with pytest.raises(TypeError, match="seed"):
        client.generate(REQUEST, seed=4)
    with pytest.raises(TypeError, match="prompt was given twice"):
        client.generate("a lake", prompt="a castle")


def test_a_stream_makes_one_image(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="num_images 2"):
        next(client.stream("a lake", num_images=2))


def test_a_stream_that_was_heard_to_its_end_is_no_client_that_left(caplog: pytest.LogCaptureFixture) -> None:
    class Lingering(FakeService):
        async def stream(self, request: GenerationRequest, give_up_s: float | None = None):  # type: ignore[no-untyped-def]
            async for event in super().stream(request, give_up_s):
                yield event
            await asyncio.sleep(0.05)
            self.ended.append("over")

    service = Lingering()
    with caplog.at_level("INFO", "ray.serve"), serving(service) as url, Client(url) as client:
        for _ in range(3):
            assert isinstance(list(client.stream("a lake"))[-1], Finished)
    assert service.ended == ["finished", "over"] * 3 and "client_left" not in caplog.text


def test_more_requests_than_a_pool_of_connections_has_are_all_sent() -> None:
    async def ask(url: str) -> None:
        async with AsyncClient(url) as client:
            tasks = [asyncio.create_task(client.generate("a lake")) for _ in range(110)]
            end = time.monotonic() + 30
            while len(service.asked) < 110 and time.monotonic() < end:
                await asyncio.sleep(0.05)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    service = FakeService(pace_s=10.0)
    with serving(service) as url:
        asyncio.run(ask(url))
    assert len(service.asked) == 110


def test_the_key_is_given_or_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text("right\nschlüssel\n")
    config = HttpConfig(keys_env="NO_SUCH_VARIABLE", keys_file=tmp_path / "keys")
    with serving(FakeService(), config) as url:
        for key in (None, "wrong"):
            with Client(url, key) as client, pytest.raises(NotAllowed):
                client.models()
        for key in ("right", "schlüssel"):
            with Client(url, key) as client:
                assert client.models() == CARDS
        monkeypatch.setenv(KEY_VARIABLE, "right")
        with Client(url) as client:
            assert client.models() == CARDS


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("key", ["secret\n", "sec\nret", " secret"])
def test_a_key_that_no_header_carries_is_refused_and_not_repeated(
    kind: type, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotAllowed, match="^api_key has") as refused:
        kind("http://localhost:8000", key)
    assert "ret" not in str(refused.value)
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(NotAllowed, match=f"^the environment variable {KEY_VARIABLE} has"):
        kind("http://localhost:8000")


def test_leaving_a_stream_stops_the_service() -> None:
    service = FakeService(pace_s=0.05)
    with serving(service) as url:
        with Client(url) as client:
            events = client.stream("a lake", num_inference_steps=50)
            next(event for event in events if isinstance(event, Step))
            events.close()
        _until_ended(service)
    assert service.ended == ["cancelled"]


def test_a_cancelled_coroutine_stops_the_service() -> None:
    service = FakeService(pace_s=0.05)

    async def leave(url: str) -> None:
        async with AsyncClient(url) as client:
            task = asyncio.create_task(client.generate("a lake", num_inference_steps=50))
            while not service.asked:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with serving(service) as url:
        asyncio.run(leave(url))
        _until_ended(service)
    assert service.ended == ["cancelled"]


def _until_ended(service: FakeService) -> None:
    end = time.monotonic() + 10
    while not service.ended and time.monotonic() < end:
        time.sleep(0.01)


def test_a_service_that_is_not_there_or_breaks_off_is_a_connection_error() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(ConnectionError, match="127.0.0.1:9"):
        client.generate("a lake")
    with serving(FakeService(pace_s=30)) as url:
        client = Client(url)
        events = client.stream("a lake")
        assert isinstance(next(events), Queued)
    with client, pytest.raises(ConnectionError):
        list(events)


@pytest.mark.parametrize(
    ("status", "error"),
    [(200, DistrirayError), (404, DistrirayError), (500, ConnectionError), (502, ConnectionError)],
)
def test_an_answer_that_is_not_the_services_is_quoted(
    monkeypatch: pytest.MonkeyPatch, status: int, error: type[Exception]
) -> None:
    """Serve's proxy answers 500 for a router that died over a request, others before it 502 to 504."""
    proxy = httpx.MockTransport(lambda _: httpx.Response(status, text="<h1>Log in"))
    client = Client("http://service")
    monkeypatch.setattr(client, "_http", httpx.Client(base_url="http://service", transport=proxy))
    with client:
        for ask in (client.models, client.fleet, lambda: client.generate("a lake")):
            with pytest.raises(error, match=rf"{status}.*Log in"):
                ask()  # type: ignore[operator]


def test_a_url_with_a_path_is_suspected(url: str) -> None:
    with Client(f"{url}/v1") as client, pytest.raises(DistrirayError, match="without a path"):
        client.models()
