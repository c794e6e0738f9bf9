"""Every field of SamplingParams arrives at the denoiser, by whichever door its request came in."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic.fields import FieldInfo

from distriray import AsyncClient, Client, HandleClient
from distriray.adapters import Lora
from distriray.cli import app
from distriray.config import ParallelConfig
from distriray.controls import Control
from distriray.denoise.pipelines.terms import Terms
from distriray.errors import InvalidRequest
from distriray.events import Event, Finished
from distriray.gang.admission import admit
from distriray.gang.config import HostConfig
from distriray.gang.messages import SegmentOrder, WorkerFacts
from distriray.gang.rank_segment import RankSegment
from distriray.ip_adapters import IPAdapter
from distriray.jobs.folder import Folder
from distriray.jobs.prompts import read_prompts
from distriray.jobs.run import Run
from distriray.names import KINDS, NAME
from distriray.picture import Picture
from distriray.references import Reference
from distriray.requests import MAX_SEEDS, Defaults, GenerationRequest, SamplingParams
from distriray.results import GenerationResult
from distriray.steps import StepCount
from distriray.wire import OF_PICTURES
from tests.unit.http.fake import LIMITS, FakeService, result_of

Fields = dict[str, Any]

# What the service of these tests allows; a field that is not here may be whatever its type says.
WITHIN_LIMITS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.text(min_size=1, max_size=30),
    "height": st.integers(8, 16).map(lambda units: 8 * units),
    "width": st.integers(8, 16).map(lambda units: 8 * units),
    "num_inference_steps": st.integers(2, LIMITS.max_steps),
    "guidance_scale": st.floats(0.0, LIMITS.max_guidance_scale),
    "num_images": st.integers(1, 3),
    "clip_skip": st.integers(0, LIMITS.max_clip_skip),
    "seed": st.integers(0, MAX_SEEDS - 3),  # the last image has a seed too
    "image": st.sampled_from([Picture.of(Image.new("RGB", (40, 24), color)) for color in ("red", "blue")]),
    "mask_image": st.sampled_from([Picture.of(Image.new("L", (40, 24), level)) for level in (9, 255)]),
    "strength": st.floats(0.5, 1.0),  # some of two steps
    **dict.fromkeys(
        ("prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3"), st.text(min_size=1, max_size=30)
    ),
    **dict.fromkeys(("original_size", "target_size"), st.sampled_from(["1x1", "640x480", "99999x8"])),
    "crops_coords_top_left": st.sampled_from(["0,0", "16,99999"]),
    "control": st.lists(
        st.builds(
            Control,
            name=st.from_regex(NAME, fullmatch=True).map(str.strip),
            image=st.sampled_from(
                [Picture.of(Image.new("RGB", (24, 8), color)) for color in ("red", "blue")]
            ),
            scale=st.sampled_from([-1.5, 0.25, 2.0]),
            start=st.sampled_from([0.0, 0.25]),
            end=st.sampled_from([0.5, 1.0]),
        ),
        max_size=LIMITS.max_controls,
        unique_by=lambda control: control.name,
    ).map(tuple),
    "ip_adapters": st.lists(
        st.builds(
            IPAdapter,
            name=st.from_regex(NAME, fullmatch=True).map(str.strip),
            image=st.sampled_from([Picture.of(Image.new("RGB", (9, 5), color)) for color in ("red", "blue")]),
            scale=st.sampled_from([-1.5, 0.25, 2.0]),
        ),
        max_size=LIMITS.max_ip_adapters,
        unique_by=lambda each: each.name,
    ).map(tuple),
    "references": st.lists(
        st.builds(
            Reference,
            image=st.sampled_from([Picture.of(Image.new("RGB", (7, 8), color)) for color in ("red", "blue")]),
        ),
        max_size=LIMITS.max_references,
    ).map(tuple),
    "loras": st.lists(
        st.builds(Lora, name=st.from_regex(NAME, fullmatch=True).map(str.strip)),
        max_size=LIMITS.max_loras,
        unique_by=lambda lora: lora.name,
    ).map(tuple),
}


def values(annotation: Any, constraints: list[Any]) -> st.SearchStrategy[Any]:
    """Values of a field's type other than None, which is always a default."""
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return st.one_of([values(kind, constraints) for kind in kinds])
    if get_origin(annotation) is Annotated:
        kind, *more = get_args(annotation)
        inner = [c for each in more for c in (each.metadata if isinstance(each, FieldInfo) else [each])]
        return values(kind, [*constraints, *inner])
    return st.from_type(Annotated[annotation, *constraints] if constraints else annotation)


def others(name: str, field: FieldInfo) -> st.SearchStrategy[Any]:
    """Values of a field that differ from its default."""
    drawn = WITHIN_LIMITS[name] if name in WITHIN_LIMITS else values(field.annotation, field.metadata)
    return drawn.filter(lambda value: value != field.default)


every_field = st.fixed_dictionaries(
    {name: others(name, f) for name, f in SamplingParams.model_fields.items()}
)


class Denoiser:
    """Keeps what it is asked to prepare."""

    def prepare(self, params: SamplingParams) -> Any:
        self.prepared = params
        return SimpleNamespace(step=0)


def at_the_denoiser(request: GenerationRequest, defaults: Defaults | None = None) -> Fields:
    """The fields that a worker's denoiser is given, after its host admitted the request."""
    facts = WorkerFacts(
        pid=1, device="cpu", device_name="cpu", model="m", default_size=(64, 96), size_unit=8,
        row_unit=16, cuts_vae=False, load_s=0.0, memory=1, own_steps=StepCount(), guides=True,
    )  # fmt: skip
    admitted = admit(request, HostConfig(limits=LIMITS, defaults=defaults or Defaults()), facts).request
    order = SegmentOrder(
        serial=1,
        job=1,
        request=admitted.without_pictures(),
        step=0,
        communicator="alone",
        rank=0,
        parallel=ParallelConfig(),
    )
    denoiser, absent = Denoiser(), cast(Any, None)
    segment = RankSegment(order, absent, absent, cast(Any, denoiser), absent, {}, absent)
    segment._take(None, admitted.pictures)
    return {name: getattr(denoiser.prepared, name) for name in SamplingParams.model_fields}


def changed(fields: Fields) -> None:
    """A field that is added must be drawn here, and be drawn as something else."""
    assert fields.keys() == SamplingParams.model_fields.keys()
    assert all(fields[name] != field.default for name, field in SamplingParams.model_fields.items())


@settings(max_examples=25)
@given(fields=every_field)
def test_every_field_arrives_by_http(url: str, service: FakeService, fields: Fields) -> None:
    changed(fields)
    own = {"height", "width", "num_images"}  # which are `size` and `n`, as at OpenAI
    body = {name: value for name, value in as_json(fields).items() if name not in own}
    body |= {"n": fields["num_images"], "size": f"{fields['width']}x{fields['height']}"}
    files = {name: body.pop(name).data for name in SamplingParams.FILES}
    form = {**body, "loras": json.dumps(body["loras"])}
    for name in SamplingParams.WITH_IMAGES:
        named = [{k: v for k, v in each.items() if k != "image"} for each in body[name]]
        files |= {f"{name}.{i}.image": each.image.data for i, each in enumerate(fields[name])}
        form[name] = json.dumps(named)
    answer = httpx.post(f"{url}/v1/images/edits", data=form, files=files)
    assert answer.status_code == 200, answer.text
    assert at_the_denoiser(service.asked[-1]) == fields
    del body["strength"]
    answer = httpx.post(f"{url}/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    without = dict.fromkeys(OF_PICTURES)
    assert at_the_denoiser(service.asked[-1]) == {**fields, **without}


@settings(max_examples=15)
@given(fields=every_field)
def test_every_field_arrives_by_the_clients(url: str, service: FakeService, fields: Fields) -> None:
    async def draw() -> GenerationResult:
        async with AsyncClient(url) as client:
            return await client.generate(GenerationRequest(**fields))

    with Client(url) as client:
        client.generate(GenerationRequest(**fields))
        assert at_the_denoiser(service.asked[-1]) == fields
        one = {**fields, "num_images": 1}  # which is all that a stream makes
        list(client.stream(GenerationRequest(**one)))
        assert at_the_denoiser(service.asked[-1]) == one
    asyncio.run(draw())
    assert at_the_denoiser(service.asked[-1]) == fields


def answer_of_a_handle(result: GenerationResult) -> Any:
    taken = Future[None]()
    taken.set_result(None)
    return SimpleNamespace(result=lambda: result, _replica_result_future=taken)


@given(fields=every_field)
def test_every_field_arrives_by_a_handle(fields: Fields) -> None:
    def remote(request: GenerationRequest, driver: str | None = None) -> Any:
        asked.append(request)
        return answer_of_a_handle(result_of(request.model_copy(update={"model": "m"})))

    asked: list[GenerationRequest] = []
    client = HandleClient(SimpleNamespace(generate=SimpleNamespace(remote=remote)))
    client.generate(fields["prompt"], **{name: v for name, v in fields.items() if name != "prompt"})
    client.generate(GenerationRequest(**fields))
    assert [at_the_denoiser(request) for request in asked] == [fields, fields]


class Recorder:
    """A host, or whoever else makes pictures for a script."""

    def __init__(self) -> None:
        self.asked: list[GenerationRequest] = []

    def generate(self, request: GenerationRequest) -> GenerationResult:
        self.asked.append(request)
        return result_of(request.settled(64, 96).model_copy(update={"model": "m"}))

    def stream(self, request: GenerationRequest) -> Iterator[Event]:
        yield Finished(request.id, self.generate(request))

    def cancel(self, request_id: str) -> None:
        raise AssertionError


@settings(max_examples=25)
@given(fields=every_field)
def test_every_field_arrives_by_a_line_of_a_job(
    tmp_path_factory: pytest.TempPathFactory, fields: Fields
) -> None:
    folder, maker = tmp_path_factory.mktemp("job"), Recorder()
    line = {**as_json(fields), **{name: path.name for name, path in written(fields, folder).items()}}
    for name in SamplingParams.WITH_IMAGES:
        for index, each in enumerate(line[name]):
            each["image"] = line.pop(f"{name}.{index}.image")
    (folder / "prompts.jsonl").write_text(json.dumps(line) + "\n")
    good, bad = read_prompts(folder / "prompts.jsonl", limits=LIMITS)
    assert not bad
    with Folder(folder / "out") as out:
        Run(good, out, [maker], in_flight=1).finish()
    assert [at_the_denoiser(request) for request in maker.asked] == [fields]


def written(fields: Fields, folder: Path) -> dict[str, Path]:
    """The files of the pictures among those fields."""
    paths = {name: folder / f"{name}.png" for name in SamplingParams.FILES}
    for name, path in paths.items():
        path.write_bytes(fields[name].data)
    for name in SamplingParams.WITH_IMAGES:
        for index, each in enumerate(fields[name]):
            paths[f"{name}.{index}.image"] = folder / f"{name}-{index}.png"
            paths[f"{name}.{index}.image"].write_bytes(each.image.data)
    return paths


def options(fields: Fields) -> list[str]:
    """The command line of those fields; a prompt may begin with a dash."""
    lists = ("loras", *SamplingParams.WITH_IMAGES)
    own = {name: value for name, value in fields.items() if name.split(".")[0] not in ("prompt", *lists)}
    named = [f"--{name.replace('_', '-')}={value}" for name, value in own.items()]
    loras = [f"--lora={lora.name}={lora.scale}" for lora in fields["loras"]]
    controls = [
        f"--control={c.name}={fields[f'control.{i}.image']}@{c.scale},{c.start},{c.end}"
        for i, c in enumerate(fields["control"])
    ]
    ip_adapters = [
        f"--ip-adapter={each.name}={fields[f'ip_adapters.{i}.image']}@{each.scale}"
        for i, each in enumerate(fields["ip_adapters"])
    ]
    references = [f"--reference={fields[f'references.{i}.image']}" for i in range(len(fields["references"]))]
    return [*named, *loras, *controls, *ip_adapters, *references, "--", fields["prompt"]]


def as_json(fields: Fields) -> Fields:
    lists = {
        name: [each.model_dump() for each in fields[name]] for name in ("loras", *SamplingParams.WITH_IMAGES)
    }
    return {**fields, **lists}


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=every_field)
def test_every_field_arrives_by_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fields: Fields
) -> None:
    @contextmanager
    def open_host(config: HostConfig, **_: Any) -> Iterator[Recorder]:
        yield host

    host = Recorder()
    monkeypatch.setattr("distriray.gang.open_host", open_host, raising=False)
    given = options({**fields, **written(fields, tmp_path)})
    listed = {
        KINDS[field].option: [{"name": each.name, "source": "some/one"} for each in fields[field]]
        for field in KINDS.keys() - {"loras"}
    }
    (pool := tmp_path / "pool.yaml").write_text(json.dumps(listed))
    app(["generate", f"--out={tmp_path / 'out.png'}", f"--pool={pool}", *given], standalone_mode=False)
    assert [at_the_denoiser(request) for request in host.asked] == [fields]


@pytest.mark.parametrize("given", [{}, {"num_inference_steps": 25, "guidance_scale": 5.0}])
def test_what_is_left_open_at_a_door_is_drawn_by_the_pools_defaults_and_what_is_given_as_given(
    url: str, service: FakeService, tmp_path: Path, given: Fields
) -> None:
    """Also where the value given is that of a request by itself."""

    def remote(request: GenerationRequest, driver: str | None = None) -> Any:
        asked.append(request)
        return answer_of_a_handle(result_of(request.settled(64, 96).model_copy(update={"model": "m"})))

    asked: list[GenerationRequest] = []
    httpx.post(f"{url}/v1/images/generations", json={"prompt": "a lake", **given}).raise_for_status()
    asked.append(service.asked[-1])
    with Client(url) as client:
        client.generate("a lake", **given)
        asked.append(service.asked[-1])
        client.generate(GenerationRequest(prompt="a lake", **given).seeded())
        asked.append(service.asked[-1])
        list(client.stream("a lake", **given))
        asked.append(service.asked[-1])
    HandleClient(SimpleNamespace(generate=SimpleNamespace(remote=remote))).generate("a lake", **given)
    asked.append(pickle.loads(pickle.dumps(asked[-1])))
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "a lake", **given}))
    asked += [prompt.request for prompt in read_prompts(file)[0]]
    assert len(asked) == 7
    turbo = Defaults(num_inference_steps=4, guidance_scale=0.0, scheduler="euler")
    for request in asked:
        drawn = at_the_denoiser(request, turbo)
        expected = {**turbo.model_dump(), **given}
        assert {name: drawn[name] for name in expected} == expected


def test_a_limit_is_of_what_is_drawn_and_of_nothing_else() -> None:
    few = LIMITS.model_copy(update={"max_steps": 8})
    few.check(GenerationRequest(prompt="x"))
    with pytest.raises(InvalidRequest, match="num_inference_steps 25 is above the limit of 8"):
        few.check(Terms().settle(GenerationRequest(prompt="x"), (64, 64), 8))
    few.check(Terms().settle(GenerationRequest(prompt="x"), (64, 64), 8, Defaults(num_inference_steps=8)))
