"""Models that edit what they are shown: the ordinary pipelines' numbers, sizes, limits, in gangs too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from distriray.denoise import Denoiser
from distriray.errors import InvalidRequest
from distriray.gang.admission import admit
from distriray.gang.config import HostConfig
from distriray.limits import Limits
from distriray.picture import Picture
from distriray.references import LOOKED_AT
from distriray.requests import GenerationRequest, SamplingParams
from tests.edits import as_taken, editing_of, references
from tests.likeness import apart
from tests.models import tiny_flux2, tiny_flux3, tiny_qwen_image21
from tests.unit.deployments.test_pool_state import FACTS
from tests.unit.flow_matching.families import MODELS, SMALL, begin
from tests.unit.flow_matching.gangs import SYNC, TALL, Gangs
from tests.unit.flow_matching.ordinary import plain
from tests.unit.test_denoise import PICTURE, SIZE, finish, finish_through_bytes

OLD = Image.radial_gradient("L").resize((128, 80)).convert("RGB")
NEW = PICTURE.resize((72, 96))
EDITED: dict[str, list[Image.Image]] = {
    "flux-kontext": [OLD],
    "flux2-dev": [OLD, NEW],
    "flux2-klein": [OLD],
    "flux2-klein-distilled": [NEW, OLD, NEW],
    "flux3": [OLD, NEW],
    "flux3-distilled": [NEW],
    "longcat-image-edit": [OLD],
    "qwen-image-2.1": [OLD, NEW],
    "qwen-image-edit": [OLD],
    "qwen-image-edit-plus": [NEW, OLD, NEW],
}
"""What each model that edits is shown."""


@pytest.mark.parametrize("edits", EDITED)
def test_what_is_edited_is_the_ordinary_pipelines_bit_for_bit_also_through_bytes(edits: str) -> None:
    pipeline, pictures, call = MODELS[edits](), EDITED[edits], {"num_inference_steps": 3, **SIZE}
    denoiser = Denoiser(pipeline)
    image = as_taken(denoiser, pictures)
    expected = plain(pipeline, [1, 2], image=image, **call)
    state = begin(denoiser, [1, 2], prompt="a lake", references=references(pictures), **call)
    carried = finish_through_bytes(denoiser, state)
    assert torch.equal(finish(denoiser, state), expected)
    assert torch.equal(carried, expected)
    first, *others = pictures
    by_image = begin(denoiser, [1, 2], prompt="a lake", image=first, references=references(others), **call)
    assert torch.equal(finish(denoiser, by_image), expected), "an image is the first of what is edited"
    assert denoiser.decode(by_image) == plain(pipeline, [1, 2], image=image, output_type="pil", **call)
    denoiser.preview(by_image)


@pytest.mark.parametrize("edits", EDITED)
def test_a_gang_in_sync_edits_as_one_device_does_also_if_it_changes_in_the_middle(edits: str) -> None:
    pipeline, pictures, call = MODELS[edits](), EDITED[edits], {**TALL, "num_inference_steps": 4}
    image = as_taken(Denoiser(pipeline), pictures)
    (picture,) = plain(pipeline, [1], image=image, output_type="pil", **call)
    gangs = Gangs(MODELS[edits], **SYNC)
    for sizes in ((2,), (3,), (2, 4, 1, 2)):
        for drawn in gangs.draw(sizes, **call, references=references(pictures)):
            assert apart(drawn.picture, picture) <= 1, sizes


def test_a_host_predicts_what_it_edits_by_the_pixels_that_the_model_is_shown() -> None:
    denoiser = Denoiser(tiny_flux2())
    facts = replace(FACTS, terms=denoiser.terms, size_unit=denoiser.sizes.unit, default_size=(1024, 1024))
    pictures = {"image": Image.new("RGB", (2048, 1024)), "references": references([OLD])}
    asked = GenerationRequest(prompt="x", height=512, width=512, **pictures)
    admitted = admit(asked, HostConfig(), facts)
    ((name, added),) = admitted.view(0.0, None).besides
    assert added == pytest.approx((1448 * 720 + 128 * 80) / 512**2, rel=0.2)
    others = [Image.new("RGB", (side, 1024)) for side in (1000, 1024, 1100, 2000, 3000, 4096)]
    views = [
        admit(asked.model_copy(update={"image": Picture.of(image)}), HostConfig(), facts) for image in others
    ]
    assert {view.view(0.0, None).besides for view in views} == {((name, added),)}, "one case to learn from"
    assert list(admitted.request.pictures) == ["references.0.image", "references.1.image"]
    plain = admit(asked.model_copy(update={"image": None, "references": ()}), HostConfig(), facts)
    assert plain.view(0.0, None).besides == ()


@pytest.mark.parametrize("edits", EDITED)
def test_the_pixels_that_a_model_is_shown_are_those_of_its_tokens(
    edits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # of `small_megapixels`
    denoiser = Denoiser(MODELS[edits]())
    if editing_of(denoiser).keeps:
        pytest.skip("the next test is about it")
    params = SamplingParams(prompt="x", seed=1, height=64, width=64, image=Image.new("RGB", (128, 96)))
    state = denoiser.prepare(params)
    tokens = state.values.get("references", state.values.get("image_cond_hidden_states"))
    settled = denoiser.terms.settle(params, denoiser.sizes.default, denoiser.sizes.unit)
    pixels = editing_of(denoiser).shown_pixels(settled.references, denoiser.sizes.unit, 64 * 64)
    assert tokens is not None and pixels == pytest.approx(tokens.shape[1] * denoiser.sizes.unit**2, rel=0.02)


def test_pictures_that_are_only_looked_at_cost_a_step_little_and_a_gang_no_exchange() -> None:
    kept = editing_of(Denoiser(tiny_qwen_image21()))
    assert kept.keeps and kept.most_exchanged_pixels(3) == 0
    assert kept.shown_pixels(references([OLD, NEW]), 32, 64 * 64) == pytest.approx(
        2 * 2**20 * LOOKED_AT, rel=0.05
    )


def test_of_limits_that_allow_few_references_the_most_pixels_may_be_those_of_a_sole_one() -> None:
    sole = editing_of(Denoiser(tiny_flux3()))
    assert [sole.most_exchanged_pixels(count) / 2**20 for count in (0, 1, 4, 6, 12)] == [0, 4, 4, 6, 10]
    many = editing_of(Denoiser(tiny_flux2()))
    assert [many.most_exchanged_pixels(count) / 2**20 for count in (0, 1, 4, 12)] == [0, 1, 4, 10]


def test_that_a_size_beyond_the_limits_is_the_first_pictures_is_said() -> None:
    denoiser = Denoiser(tiny_flux2())
    facts = replace(FACTS, terms=denoiser.terms, size_unit=denoiser.sizes.unit)
    asked = GenerationRequest(prompt="x", image=Image.new("RGB", (500, 333)))
    config, says = HostConfig(limits=Limits(max_side=256)), "320 is above the limit of 256"
    with pytest.raises(
        InvalidRequest, match=f"{says}; where none is named it goes by the first picture, name a size"
    ):
        admit(asked, config, facts)
    with pytest.raises(InvalidRequest, match=f"{says}$"):
        admit(asked.model_copy(update={"height": 320, "width": 256}), config, facts)
    assert admit(asked.model_copy(update={"height": 256, "width": 256}), config, facts).request.width == 256


def test_pictures_are_refused_by_the_names_that_they_were_sent_with() -> None:
    denoiser = Denoiser(tiny_flux2())
    facts = replace(FACTS, terms=denoiser.terms, size_unit=denoiser.sizes.unit)
    large, narrow, small = (Image.new("RGB", size) for size in ((500, 500), (64, 640), (64, 64)))
    config = HostConfig(limits=Limits(max_image_pixels=499 * 500))
    for picture in (large, narrow):
        for name, fields in (
            ("image", {"image": picture, "references": references([small])}),
            ("references.0.image", {"image": small, "references": references([picture])}),
        ):
            with pytest.raises(InvalidRequest, match=f"^{name} ") as refused:
                admit(GenerationRequest(prompt="x", **fields), config, facts)
            assert refused.value.param == name


OF_16 = {(320, 208): (1264, 832), (327, 215): (1264, 832), (3000, 1500): (1456, 720)}
OF_16_UP = {(320, 208): (1280, 832), (327, 215): (1264, 832), (3000, 1500): (1456, 736)}
OF_32 = {(320, 208): (1280, 832), (327, 215): (1248, 832), (3000, 1500): (1440, 736)}
MEGAPIXEL = {
    "flux-kontext": OF_16,
    "longcat-image-edit": OF_16_UP,
    "qwen-image-2.1": OF_32,
    "qwen-image-edit": OF_32,
    "qwen-image-edit-plus": OF_32,
}
"""What is drawn by those who see a megapixel of whatever they edit, in their multiples of pixels."""


@pytest.mark.parametrize("edits", EDITED)
@pytest.mark.parametrize(
    ("size", "drawn"),
    [((320, 208), (320, 208)), ((327, 215), (320, 208)), ((3000, 1500), (1440, 720))],
)
def test_a_picture_is_by_default_of_the_size_of_what_is_edited_up_to_a_megapixel(
    edits: str, size: tuple[int, int], drawn: tuple[int, int]
) -> None:
    terms, unit = Denoiser(MODELS[edits]()).terms, 16
    if edits in MEGAPIXEL:
        drawn = MEGAPIXEL[edits][size]
    asked = SamplingParams(prompt="x", image=Image.new("RGB", size))
    settled = terms.settle(asked, (1024, 1024), unit)
    assert (settled.width, settled.height) == drawn and settled.image is None
    assert terms.settle(settled, (1024, 1024), unit) == settled, "settled once, it stays"
    named = terms.settle(asked.model_copy(update={"width": 512, "height": 256}), (1024, 1024), unit)
    assert (named.width, named.height) == (512, 256)
    if not editing_of(Denoiser(MODELS[edits]())).needs_references:
        without = terms.settle(SamplingParams(prompt="x"), (1024, 1024), unit)
        assert (without.width, without.height) == (1024, 1024)


@pytest.mark.parametrize(
    ("call", "param", "says"),
    [
        (
            {"image": Image.new("RGB", (63, 64))},
            "image",
            "image is 63x64 pixels; what is edited has sides of 64",
        ),
        (
            {"references": references([OLD.resize((640, 64))])},
            "references.0.image",
            "the longer at most 8 times",
        ),
        ({"references": references([OLD] * 11)}, "references", "are 11 pictures; this .* at most (1|3|10)"),
        ({"image": OLD, "references": references([OLD] * 10)}, "references", "references and image are 11"),
        ({"image": OLD, "strength": 0.5}, "strength", "this model edits: it begins from noise"),
    ],
)
@pytest.mark.parametrize("edits", EDITED)
def test_what_cannot_be_edited_is_refused_by_name(
    edits: str, call: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says) as error:
        begin(Denoiser(MODELS[edits]()), [1], **{**SMALL, **call})
    assert error.value.param == param
