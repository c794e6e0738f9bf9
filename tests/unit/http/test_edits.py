"""Pictures that are sent: the unmodified `openai` client's edits and variations, and forms by hand."""

from __future__ import annotations

import asyncio
import json
import pickle
from base64 import b64decode
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import ExifTags, Image

from deployments.http.images import EditRequest
from distriray import Client
from distriray.denoise.pipelines.family_terms import chroma_terms, flux2_terms, qwen_image21_terms
from distriray.errors import InvalidRequest
from distriray.events import Finished
from distriray.names import KINDS
from distriray.picture import Picture, png
from distriray.references import Reference
from distriray.requests import SamplingParams
from distriray.wire import VARIATIONS
from tests.unit.http.fake import CARDS, FakeService
from tests.unit.http.malformed import BOUNDARY, EDITS, form, picture

NAMED = sorted(KINDS.keys() & set(SamplingParams.WITH_IMAGES))


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def clear_on_the_left(mode: str = "RGBA") -> bytes:
    """A file of 96x64, red, whose left third is fully transparent."""
    image = Image.new(mode, (96, 64), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    out = BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


LEFT = np.zeros((64, 96), dtype=np.uint8)
LEFT[:, :32] = 255


def asked_mask(service: FakeService) -> Any:
    mask = service.asked[-1].mask_image
    return None if mask is None else np.array(mask.load().convert("L"))


def test_a_picture_is_drawn_on(client: openai.OpenAI, service: FakeService) -> None:
    answer = client.images.edit(
        image=picture(),
        prompt="a lake in winter",
        n=2,
        size="128x64",
        quality="high",
        input_fidelity="high",
        output_format="webp",
        output_compression=80,
        background="opaque",
        user="me",
        extra_body={
            "seed": 7,
            "strength": 0.4,
            "negative_prompt": "12",
            "gang_size": 2,
            "scheduler": "ddim",
        },
    )
    assert answer.data is not None
    drawn = [Image.open(BytesIO(b64decode(image.b64_json or ""))) for image in answer.data]
    assert [(image.format, image.size) for image in drawn] == [("WEBP", (128, 64))] * 2
    asked = service.asked[-1]
    assert asked.image == Picture.of(picture()) and asked.mask_image is None
    assert (asked.strength, asked.seed, asked.num_images, asked.gang_size) == (0.4, 7, 2, 2)
    assert (asked.negative_prompt, asked.scheduler, asked.height, asked.width) == ("12", "ddim", 64, 128)


@pytest.mark.parametrize("as_list", [False, True])
def test_a_mask_is_drawn_anew_where_it_is_transparent(
    client: openai.OpenAI, service: FakeService, as_list: bool
) -> None:
    image: Any = [("lake.png", picture(), "image/png")] if as_list else picture()
    answer = client.images.edit(image=image, mask=clear_on_the_left(), prompt="a hut")
    assert answer.size == "96x64", "by default that of the picture"
    assert np.array_equal(asked_mask(service), LEFT)


def test_without_a_mask_the_part_of_the_picture_is_drawn_anew_that_is_transparent(
    client: openai.OpenAI, service: FakeService
) -> None:
    client.images.edit(image=clear_on_the_left(), prompt="a hut")
    assert np.array_equal(asked_mask(service), LEFT)


def test_edits_stream_events_of_their_own(client: openai.OpenAI) -> None:
    events = client.images.edit(
        image=picture(), prompt="a hut", stream=True, partial_images=2, extra_body={"num_inference_steps": 8}
    )
    *partials, completed = events
    assert [event.type for event in partials] == ["image_edit.partial_image"] * 2
    assert completed.type == "image_edit.completed" and completed.size == "96x64"
    assert Image.open(BytesIO(b64decode(completed.b64_json))).size == (96, 64)
    told = client.images.edit(image=picture(), prompt="a hut", stream=True, extra_body={"progress": True})
    assert [event.type for event in told][0] == "image_edit.progress"


def test_variations_are_drawn_without_a_prompt(client: openai.OpenAI, service: FakeService) -> None:
    answer = client.images.create_variation(image=clear_on_the_left(), n=2, response_format="url")
    assert (
        answer.data is not None and len(answer.data) == 2 and (answer.data[0].url or "").startswith("data:")
    )
    assert service.asked[-1].prompt == "" and service.asked[-1].mask_image is None
    assert service.asked[-1].image is not None


@pytest.mark.parametrize("name", ["mask", "mask_image"])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_mask_for_a_variation_is_refused_with_advice_that_works(
    http: httpx.Client, name: str, as_json: bool
) -> None:
    files = {"image": picture(), name: clear_on_the_left() if name == "mask" else png(Image.fromarray(LEFT))}
    urls = {field: Picture.of(file).url for field, file in files.items()}
    pictures: dict[str, Any] = {"json": urls} if as_json else {"files": files}
    advice = f"variations have no mask; leave {name} out, or send all to {EDITS}, with a prompt"
    assert refused(http.post(VARIATIONS, **pictures)) == (name, advice)
    left_out = {"json": {"image": urls["image"]}} if as_json else {"files": {"image": files["image"]}}
    assert http.post(VARIATIONS, **left_out).status_code == 200
    prompt = {"prompt": "a lake"}
    with_a_prompt = {"json": {**urls, **prompt}} if as_json else {"files": files, "data": prompt}
    assert http.post(EDITS, **with_a_prompt).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"image": [picture()] * 6}, "references", "references names 5 pictures; the limit is 4"),
        ({"mask": picture()}, "mask", "no fully transparent part.* or send mask_image"),
        ({"mask": picture((64, 64), "RGBA")}, "mask", "mask is 64x64 pixels and image 96x64"),
        ({"image": picture((100, 60))}, "image", "100x60 pixels.* multiples of 8.* such as 96x64"),
        ({"image": picture((512, 64))}, "size", "512 is above the limit of 256; it is the image's own"),
        ({"image": picture((5000, 4000), "L")}, "image", "5000x4000 pixels; the limit is 16777216 in all"),
        ({"image": b"no picture"}, "image", "send a PNG, JPEG or WebP file"),
        ({"extra_body": {"strength": 2}}, "strength", "strength 2"),
        ({"background": "transparent"}, "background", "background"),
    ],
)
def test_what_is_wrong_raises_the_right_exception(
    client: openai.OpenAI, fields: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as refused:
        client.images.edit(**{"image": picture(), "prompt": "a lake", **fields})
    assert refused.value.param == param


def test_of_several_images_those_after_the_first_are_references(
    client: openai.OpenAI, http: httpx.Client, service: FakeService
) -> None:
    images = [picture(), *(png(Image.new("RGB", (64, 80), color)) for color in ("red", "blue", "green"))]
    client.images.edit(image=images[:3], prompt="a lake")
    asked = service.asked[-1]
    assert asked.image is not None and asked.image.data == images[0]
    assert [each.image and each.image.data for each in asked.references] == images[1:3]
    files = [("image[]", images[0]), ("image[]", images[1]), ("references.0.image", images[3])]
    answer = http.post(EDITS, data={"prompt": "a lake", "references": "[{}]"}, files=files)
    assert answer.status_code == 200, answer.text
    references = service.asked[-1].references
    assert [each.image and each.image.data for each in references] == [images[1], images[3]]
    answer = http.post(EDITS, data={"prompt": "a lake", "references": "null"}, files=files[:2])
    assert answer.status_code == 200 and len(service.asked[-1].references) == 1, "null is as left out"
    for names in (("image", "image"), ("image", "image[]", "image"), ("mask[]", "mask[]")):
        twice = http.post(EDITS, data={"prompt": "a lake"}, files=[(name, images[0]) for name in names])
        name = names[0].removesuffix("[]")
        param, message = refused(twice)
        assert param == name and message.startswith(f"{name} is there more than once; send one")
    broken = [("image[]", images[0]), ("image[]", images[1][:60])]
    param, message = refused(http.post(EDITS, data={"prompt": "a lake"}, files=broken))
    assert param == "references.0.image" and "damaged" in message


def test_models_of_flow_matching_that_begin_from_pictures_fill_in_what_is_transparent() -> None:
    terms, clear = chroma_terms(lambda _: {}), clear_on_the_left()
    for sent in ({"image": clear}, {"image": picture(), "mask": clear}):
        asked = EditRequest.of_form({"prompt": "a lake", **sent}).generation(CARDS[0], "r")
        settled = terms.settle(asked, (64, 64), 16)
        assert settled.mask_image is not None and settled.strength == 1.0
        assert np.array_equal(np.array(settled.mask_image.load().convert("L")), LEFT)


def test_to_models_that_edit_a_transparent_part_of_the_image_is_no_mask() -> None:
    """Also where whoever read the form did not know yet that the model is one."""
    terms, clear = flux2_terms(lambda _: {}), clear_on_the_left()
    asked = EditRequest.of_form({"prompt": "a lake", "image": clear}).generation(CARDS[0], "r")
    assert asked.mask_image is not None
    settled = terms.settle(pickle.loads(pickle.dumps(asked)), (64, 64), 16)
    assert settled.mask_image is None and [each.image for each in settled.references] == [asked.image]
    sent = EditRequest.of_form({"prompt": "a lake", "image": picture(), "mask": clear})
    with pytest.raises(InvalidRequest, match="mask_image: this model's family fills in no masks here"):
        qwen_image21_terms(lambda _: {}).settle(sent.generation(CARDS[0], "r"), (64, 64), 32)


def test_models_that_edit_fill_in_a_mask_that_is_sent_of_the_first_of_several_images() -> None:
    terms, images = flux2_terms(lambda _: {}), [picture(), png(Image.new("RGB", (64, 80)))]
    form: dict[str, Any] = {"prompt": "a lake", "image": images, "mask": clear_on_the_left()}
    asked = EditRequest.of_form(form).generation(CARDS[0], "r")
    settled = terms.settle(asked, (64, 64), 16)
    assert settled.mask_image is not None and settled.strength == 1.0
    assert np.array_equal(np.array(settled.mask_image.load().convert("L")), LEFT)
    assert [each.image and each.image.data for each in settled.references] == images
    assert settled.drawn_on == Picture.of(images[0]) and (settled.width, settled.height) == (96, 64)


def test_a_form_without_files_where_none_was_chosen_is_as_without_the_field(
    http: httpx.Client, service: FakeService
) -> None:
    parts = form(("prompt", "a lake"), ("image", picture()))
    none = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="mask"; filename=""\r\n\r\n\r\n'.encode()
    headers = {"Content-Type": f'multipart/form-data; boundary="{BOUNDARY}"'}
    answer = http.post(EDITS, content=none + parts, headers=headers)
    assert answer.status_code == 200, answer.text
    assert service.asked[-1].mask_image is None


def test_a_picture_that_lies_on_its_side_is_as_high_as_it_is_shown(
    http: httpx.Client, service: FakeService
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    answer = http.post(EDITS, data={"prompt": "a lake"}, files={"image": picture(kind="JPEG", exif=exif)})
    assert answer.json()["size"] == "64x96"


def test_pictures_in_json_are_told_where_they_are_taken(http: httpx.Client) -> None:
    refused = http.post(
        "/v1/images/generations", json={"prompt": "a lake", "image": Picture.of(picture()).url}
    )
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "image"
    assert "/v1/images/edits" in refused.json()["error"]["message"]


def test_pictures_come_in_json_as_they_do_in_a_form(http: httpx.Client, service: FakeService) -> None:
    fields = {"prompt": "a hut", "strength": 0.5, "seed": 3}
    image, mask = Picture.of(picture()), Picture.of(clear_on_the_left())
    for asked in ({}, {"mask": mask}):
        files = {name: (name, each.data) for name, each in {"image": image, **asked}.items()}
        in_form = http.post(EDITS, data=fields, files=files)
        by_form = service.asked[-1]
        urls = {name: each.url for name, each in {"image": image, **asked}.items()}
        in_json = http.post(EDITS, json={**fields, **urls})
        by_json = service.asked[-1]
        assert in_form.status_code == in_json.status_code == 200
        assert by_json.model_copy(update={"id": by_form.id}) == by_form
    for absent in ({}, {"prompt": None}):
        varied = http.post(VARIATIONS, json={"image": image.url, **absent})
        assert varied.status_code == 200, varied.text
        assert (service.asked[-1].image, service.asked[-1].prompt) == (image, "")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "image"),
        ({"image": None}, "image"),
        ({"image": 3}, "image"),
        ({"image": "lake.png"}, "image"),
        ({"image": "https://example.org/lake.png"}, "image"),
        ({"image": "data:image/png;base64,AAAA"}, "image"),
        ({"image": "data:image/png;base64,%"}, "image"),
        ({"image": {"image_url": "data:"}}, "image"),
        ({"image": Picture.of(picture()).url, "mask": "no"}, "mask"),
        ({"image": Picture.of(picture()).url, "mask": Picture.of(picture()).url}, "mask"),
        ({"image": Picture.of(picture()).url, "strength": "0.5"}, "strength"),
    ],
)
def test_json_without_a_picture_that_can_be_read_is_refused_by_name(
    http: httpx.Client, service: FakeService, fields: dict[str, Any], param: str
) -> None:
    asked = len(service.asked)
    answer = http.post(EDITS, json={"prompt": "a hut", **fields})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    assert "pathlib" not in answer.text, "what Python alone has"
    assert len(service.asked) == asked


def test_a_path_in_a_form_is_no_file(http: httpx.Client) -> None:
    """As curl sends it where the @ was forgotten."""
    for name in ("image", "mask", "mask_image"):
        files = [("prompt", (None, "a lake")), (name, (None, "lake.png"))]
        param, message = refused(http.post(EDITS, files=files))
        assert param == name and message == f"{name} is sent as text; send it as a file, or as a data: URL"


def test_the_clients_send_a_request_with_pictures_as_a_form(url: str, service: FakeService) -> None:
    mask = Image.fromarray(LEFT)
    with Client(url) as own:
        fields: dict[str, Any] = {"image": picture(), "mask_image": mask, "strength": 0.5, "seed": 3}
        result = own.generate("a hut", **fields)
        assert (result.width, result.height) == (96, 64) and np.array_equal(asked_mask(service), LEFT)
        *events, finished = own.stream("a hut", previews=1, **fields)
        assert isinstance(finished, Finished) and len(events) > 3


def test_the_clients_ask_for_a_picture_without_a_mask_as_a_handle_does(
    url: str, service: FakeService
) -> None:
    """Neither is its transparent part one, nor does it need a prompt."""
    image = Picture.of(clear_on_the_left())
    with Client(url) as own:
        own.generate("a hut", image=image, strength=0.5)
        list(own.stream("", image=image, references=({"image": picture()},)))
    first, second = service.asked[-2:]
    assert first.image == second.image == image and first.mask_image is second.mask_image is None
    assert (first.prompt, first.strength, second.prompt, len(second.references)) == ("a hut", 0.5, "", 1)


def test_a_mask_of_the_first_of_the_references_is_sent_as_one_of_an_image(
    url: str, service: FakeService
) -> None:
    first, second = Picture.of(picture()), Picture.of(png(Image.new("RGB", (64, 80))))
    references = tuple(Reference(image=each) for each in (first, second))
    with Client(url) as own:
        own.generate("a hut", references=references, mask_image=Image.fromarray(LEFT), strength=0.5)
    asked = service.asked[-1]
    assert asked.image == first and [each.image for each in asked.references] == [second]
    assert np.array_equal(asked_mask(service), LEFT) and asked.strength == 0.5


def test_the_log_has_no_picture(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    http.post(EDITS, data={"prompt": "a lake"}, files={"image": picture()}).raise_for_status()
    assert all(len(record.getMessage()) < 400 for record in caplog.records)


CANNY = {"name": "canny", "scale": 0.5}


def refused(answer: httpx.Response) -> tuple[str, str]:
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    return error["param"], error["message"]


@pytest.mark.parametrize("field", NAMED)
def test_listed_pictures_come_in_json_and_as_files_of_a_form(
    field: str, url: str, service: FakeService
) -> None:
    edges = Picture.of(picture())
    body = {"prompt": "a lake", field: [{**CANNY, "image": edges.url}]}
    assert httpx.post(f"{url}/v1/images/generations", json=body).status_code == 200
    (entry,) = getattr(service.asked[-1], field)
    assert (entry.name, entry.scale, entry.image) == ("canny", 0.5, edges)
    files = {"image": picture(), f"{field}.0.image": edges.data}
    form = {"prompt": "a lake", field: json.dumps([CANNY])}
    assert httpx.post(f"{url}{EDITS}", data=form, files=files).status_code == 200
    assert getattr(service.asked[-1], field) == (entry,)


@pytest.mark.parametrize("field", NAMED)
def test_a_form_has_as_many_listed_pictures_as_a_service_allows(field: str) -> None:
    entries = json.dumps([{**CANNY, "name": f"canny-{i}"} for i in range(11)])
    files = {f"{field}.{i}.image": picture() for i in range(11)}
    asked = EditRequest.of_form({"prompt": "a lake", "image": picture(), field: entries, **files})
    assert [each.image for each in getattr(asked, field)] == [Picture.of(picture())] * 11


@pytest.mark.parametrize("field", NAMED)
def test_listed_pictures_that_are_none_are_refused_by_name(
    field: str, url: str, service: FakeService
) -> None:
    asked, whole = len(service.asked), png(Image.effect_noise((96, 64), 90))
    for image in (whole[: len(whole) // 2], whole[: 2 * len(whole) // 3]):
        body = {"prompt": "a lake", field: [{**CANNY, "image": Picture.of(whole).url}]}
        body[field].append({"name": "depth", "image": replace(Picture.of(whole), data=image).url})
        param, message = refused(httpx.post(f"{url}/v1/images/generations", json=body))
        assert param == f"{field}.1.image" and "damaged" in message
    form = {"prompt": "a lake", field: json.dumps([CANNY])}
    for name, entries in (
        (f"{field}.1.image", form[field]),
        (f"{field}.0.image", "[]"),
        (f"{field}.0.image", "x"),
    ):
        files = {"image": whole, name: whole}
        param, message = refused(httpx.post(f"{url}{EDITS}", data={**form, field: entries}, files=files))
        assert param == name and "no entry" in message
    param, message = refused(httpx.post(f"{url}{EDITS}", data=form, files={"image": whole}))
    assert param == f"{field}.0.image"
    assert len(service.asked) == asked


@pytest.mark.parametrize("field", ["control", "ip_adapters", "references"])
def test_no_picture_is_decoded_of_more_than_a_service_allows(
    field: str, url: str, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, asked, edges = [], len(service.asked), Picture.of(picture()).url
    monkeypatch.setattr(Picture, "load", lambda self, name: decoded.append(name))
    entries = [{"image": edges} if field == "references" else {**CANNY, "image": edges}] * 5
    body = {"prompt": "a lake", field: entries}
    param, message = refused(httpx.post(f"{url}/v1/images/generations", json=body))
    assert param == field and "the limit is 4" in message
    assert not decoded and len(service.asked) == asked


@pytest.mark.parametrize("field", ["control", "ip_adapters", "references"])
def test_lists_are_bounded_before_their_pictures_are_read(field: str, url: str) -> None:
    unread = {"image": "data:image/png;base64,"} | ({} if field == "references" else CANNY)
    read = unread | {"image": Picture.of(picture()).url}
    body = {"prompt": "a lake", field: [read] * 101 + [unread]}
    param, message = refused(httpx.post(f"{url}/v1/images/generations", json=body))
    assert param == field and "no request may list over 100" in message


def test_a_text_of_very_many_values_is_refused_before_each_is_found_wrong(url: str) -> None:
    form = {"prompt": "a lake" + "," * 20_000, "loras": f"[1{',1' * 20_000}]"}
    answer = httpx.post(f"{url}{EDITS}", data=form, files={"image": picture()})
    assert refused(answer) == ("loras", "loras has over 10000 commas, and no request needs so many")


def test_files_of_a_form_are_looked_at_beside_the_loop(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of_form = EditRequest.of_form
    looked: list[bool] = []

    def noted(form: Any) -> EditRequest:
        with suppress(RuntimeError):  # there is no loop
            looked.append(asyncio.get_running_loop().is_running())
        return of_form(form)

    monkeypatch.setattr(EditRequest, "of_form", noted)
    httpx.post(f"{url}{EDITS}", data={"prompt": "a lake"}, files={"image": picture()}).raise_for_status()
    assert not looked
