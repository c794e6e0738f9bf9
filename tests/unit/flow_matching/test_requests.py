"""What may be asked of each family: a field decides the picture, or is refused by its name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from distriray.denoise import Denoiser
from distriray.errors import InvalidRequest
from distriray.gang.admission import admit
from distriray.gang.config import HostConfig
from distriray.requests import GenerationRequest, SamplingParams
from tests.edits import shown
from tests.unit.deployments.test_pool_state import FACTS
from tests.unit.flow_matching.families import SMALL, begin, skip_unless_it_begins_from_pictures
from tests.unit.test_denoise import MASK, OF_AN_IMAGE, OF_THE_NETWORK, OTHERS, PICTURE, finish, refuses


@pytest.mark.parametrize("field", OF_THE_NETWORK)
def test_every_field_decides_the_picture_or_is_refused_by_name(denoiser: Denoiser, field: str) -> None:
    plain = {**shown(denoiser, **SMALL), "seed": 1, **OF_AN_IMAGE.get(field, {})}
    if field in ("negative_prompt", "guidance_end") and denoiser.guides:
        plain["guidance_scale"] = denoiser.terms.unguided + 2
    other = {**OTHERS, "height": 96, "width": 128, "scheduler": "unipc", "guidance_scale": 2.0}[field]
    if field == "scheduler" and len(denoiser.terms.schedulers) == 1:
        pytest.skip("there is one alone")
    if field == "strength":
        skip_unless_it_begins_from_pictures(denoiser._pipeline)
    if field in denoiser.terms.lacks:
        refuses(denoiser, plain, field)
        return
    replaced = {"image"} if field == "references" else set()  # some edit one picture alone
    kept = {name: value for name, value in plain.items() if name not in replaced}
    usual, changed = (
        finish(denoiser, denoiser.prepare(SamplingParams(**fields)))
        for fields in (plain, {**kept, field: other})
    )
    assert usual.shape != changed.shape or not torch.allclose(usual, changed, rtol=1e-3, atol=1e-3)


def test_a_scale_that_would_guide_is_refused_where_nothing_does(denoiser: Denoiser) -> None:
    if "guidance_scale" not in denoiser.terms.lacks:
        pytest.skip("it has a scale")
    scale = denoiser.terms.unguided
    begin(denoiser, [1], **SMALL, guidance_scale=scale)
    with pytest.raises(InvalidRequest, match="^guidance_scale: .*; leave it out$"):
        begin(denoiser, [1], **SMALL, guidance_scale=scale + 0.5)


@pytest.mark.parametrize(
    ("call", "param", "says"),
    [
        ({"height": 72}, "height", "height 72 is not a multiple of (16; use 64 or 80|32; use 64 or 96)"),
        ({"scheduler": "ddim"}, "scheduler", r"scheduler ddim is not for this model; use .*euler"),
        ({"scheduler": "lcm"}, "scheduler", "scheduler lcm is not for this model"),
        (
            {"image": PICTURE, "mask_image": MASK, "scheduler": "unipc"},
            "scheduler",
            "unipc (cannot begin from an im|is not for)",
        ),
        ({"image": PICTURE, "scheduler": "unipc"}, "scheduler", "unipc (cannot begin from an im|is not for)"),
        ({"image": PICTURE, "strength": 1e-20}, "strength", "leaves none to do"),
        ({"seed": None}, "seed", "there is no seed yet"),
    ],
)
def test_bad_input_names_its_field(denoiser: Denoiser, call: dict[str, Any], param: str, says: str) -> None:
    if "image" in call and param != "mask_image":
        skip_unless_it_begins_from_pictures(denoiser._pipeline)
    with pytest.raises(InvalidRequest, match=says) as error:
        begin(denoiser, [1], **{**SMALL, **call})
    assert error.value.param == param


def test_the_edge_knows_what_a_model_lacks_and_what_it_draws_by_default(denoiser: Denoiser) -> None:
    """A router and a host refuse before a worker has heard of the request."""
    facts = replace(FACTS, terms=denoiser.terms, size_unit=denoiser.sizes.unit)
    asked = shown(denoiser, prompt="a lake")
    request = admit(GenerationRequest(**asked), HostConfig(workers=1), facts).request
    assert request.num_inference_steps == denoiser.terms.num_inference_steps
    assert request.guidance_scale == denoiser.terms.guidance_scale
    for field, value in [("scheduler", "ddim"), *((name, OTHERS[name]) for name in denoiser.terms.lacks)]:
        with pytest.raises(InvalidRequest, match=field) as error:
            admit(GenerationRequest(**{**asked, field: value}), HostConfig(workers=1), facts)
        assert error.value.param == field
