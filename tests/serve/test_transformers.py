"""Models of flow matching behind HTTP: their own sizes and steps, and what they have nothing for."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from diffusers import Flux2KleinInpaintPipeline
from PIL import Image

from distriray import Client
from distriray.picture import png
from distriray.references import Reference
from tests.models import save, tiny_flux2_klein_distilled, tiny_flux_schnell, tiny_sd3

from .conftest import HTTP, Service, until

pytestmark = pytest.mark.ray

PREFIX = "/flow"
URL = HTTP + PREFIX
MODELS = {"sd3": tiny_sd3, "flux": tiny_flux_schnell, "klein": tiny_flux2_klein_distilled}


@pytest.fixture(scope="module")
def folders(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A service beside the others', with a pool of two workers for each model."""
    folder = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        save(make(), folder / name)
    own: dict[str, Any] = {"device": "cpu", "cpus_per_worker": 0.1, "parallel": {"exchange": "sync"}}
    pools = [{**own, "name": name, "model": str(folder / name), "workers": 2} for name in MODELS]
    service.deploy({"name": "flow", "route_prefix": PREFIX, "args": {"pools": pools}})
    until(lambda: service.is_up("flow"), 240)
    yield {name: folder / name for name in MODELS}
    service.deploy()


def post(folder: Path, **fields: Any) -> httpx.Response:
    body = {"prompt": "a lake", "model": str(folder), "size": "96x144", "seed": 7, **fields}
    return httpx.post(f"{URL}/v1/images/generations", json=body, timeout=120)


def test_a_gang_of_two_draws_what_the_pipelines_draw(folders: dict[str, Path]) -> None:
    """With the steps and the guidance that each model has by itself."""
    for name, call in {"sd3": {}, "flux": {"max_sequence_length": 256, "guidance_scale": 0.0}}.items():
        response = post(folders[name], gang_size=2, response_format="b64_json")
        assert response.status_code == 200, response.text
        drawn = Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"])))
        (expected,) = MODELS[name]()(
            "a lake", height=144, width=96, num_inference_steps=28 if name == "sd3" else 4,
            generator=torch.Generator().manual_seed(7), **call,
        ).images  # fmt: skip
        assert response.json()["gang_size"] == 2
        assert np.abs(np.array(drawn, int) - np.array(expected, int)).max() <= 1


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        (
            "sd3",
            {"scheduler": "ddim"},
            "scheduler ddim is not for this model; use dpmpp-2m, euler, heun, unipc",
        ),
        ("sd3", {"size": "400x144"}, "width 400 is above 384"),
        ("flux", {"guidance_scale": 4.0}, "guidance_scale: this model, like FLUX.1-schnell, was distilled"),
        ("flux", {"negative_prompt": "fog"}, "negative_prompt: FLUX.1 was distilled"),
    ],
)
def test_what_a_model_has_nothing_for_is_the_clients_own_error(
    folders: dict[str, Path], name: str, fields: dict[str, Any], says: str
) -> None:
    response = post(folders[name], **fields)
    error = response.json()["error"]
    assert response.status_code == 400 and says in error["message"]
    assert error["param"] in fields


def test_the_models_say_their_units(folders: dict[str, Path]) -> None:
    cards = {card["id"]: card for card in httpx.get(f"{URL}/v1/models", timeout=30).json()["data"]}
    assert all(cards[str(folder)]["size_unit"] == 16 for folder in folders.values())
    assert cards[str(folders["flux"])]["default_size"] == "1024x1024"


LAKE = Image.radial_gradient("L").resize((160, 96)).convert("RGB")
CHAIR = Image.linear_gradient("L").resize((112, 80)).convert("RGB")
MASK = Image.new("L", LAKE.size)
MASK.paste(255, (48, 32, 112, 96))


def test_a_model_that_edits_fills_in_a_mask_of_the_first_picture_by_every_door(
    folders: dict[str, Path],
) -> None:
    """Which diffusers' own pipeline for it draws likewise."""
    model, call = str(folders["klein"]), {"num_inference_steps": 4, "strength": 0.8}
    holes = LAKE.copy()
    holes.putalpha(MASK.point(lambda level: 255 - level))
    pipeline = Flux2KleinInpaintPipeline.from_pipe(tiny_flux2_klein_distilled())
    (expected,) = pipeline(
        "a lake", image=LAKE, mask_image=MASK, image_reference=CHAIR, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(7), **call,
    ).images  # fmt: skip
    with openai.OpenAI(base_url=f"{URL}/v1", api_key="any", max_retries=0) as asks:
        edit: dict[str, Any] = {"prompt": "a lake", "model": model, "extra_body": {**call, "seed": 7}}
        answer = asks.images.edit(image=[png(LAKE), png(CHAIR)], mask=png(holes), **edit)
        assert answer.data and answer.size == "160x96"
        drawn = [Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or "")))]
        with pytest.raises(openai.BadRequestError, match="this model edits: it begins from noise") as refused:
            asks.images.edit(image=png(holes), **edit)  # whose hole is no mask there
        assert refused.value.param == "strength"
    references = [Reference(image=picture) for picture in (LAKE, CHAIR)]
    with Client(URL) as own:
        for pictures in ({"references": references}, {"image": LAKE, "references": references[1:]}):
            result = own.generate("a lake", model=model, seed=7, mask_image=MASK, **pictures, **call)
            drawn += result.images
    for picture in drawn:
        assert np.abs(np.array(picture, int) - np.array(expected, int)).max() <= 1
    cards = {card["id"]: card for card in httpx.get(f"{URL}/v1/models", timeout=30).json()["data"]}
    assert not {"mask_image", "strength"} & cards[model]["lacks"].keys()
