"""IP-Adapters of requests on their way through a host and its workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from torch.distributed import HashStore

from distriray.errors import UnusableIPAdapter
from distriray.gang.messages import SegmentEnd
from distriray.gang.runner import SegmentRunner
from distriray.ip_adapters import IPAdapterSpec
from distriray.models import ModelSpec
from tests.models import (
    save_ip_adapter,
    tiny_flux,
    tiny_flux_ip_adapter,
    tiny_ip_adapter,
    tiny_sd15,
    tiny_sdxl,
)

from .runners import Gang, endings

LIKE = Image.effect_noise((128, 128), 90)
ASKED: dict[str, Any] = {"ip_adapters": [{"name": "style", "image": LIKE, "scale": 0.8}]}


def runner_of(model: Path, *specs: IPAdapterSpec) -> SegmentRunner:
    named = ModelSpec(name=str(model))
    return SegmentRunner(named, torch.device("cpu"), HashStore(), timeout_s=10.0, ip_adapters=specs)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_worker_loads_what_is_listed_and_a_gang_draws_with_it(
    family: str, tiny_model: Path, tmp_path: Path
) -> None:
    model, weights = tiny_model, tiny_ip_adapter(tiny_sdxl().unet, 1)
    if family == "flux":
        (flux := tiny_flux()).save_pretrained(model := tmp_path / "flux")
        weights = tiny_flux_ip_adapter(flux.transformer, 1)
    save_ip_adapter(tmp_path, weights)
    style = IPAdapterSpec(name="style", source=str(tmp_path))
    assert runner_of(model, style)._denoiser.ip_adapters._loaded.keys() == {"style"}
    gang = Gang(model, 2)
    for runner in gang.runners:
        runner._denoiser.ip_adapters.load(style)

    def picture(**fields: Any) -> Image.Image:
        outcomes = gang.run(num_inference_steps=3, **fields)
        assert endings(outcomes) == [SegmentEnd.DONE] * 2
        (image,) = outcomes[0].images or ()
        return image

    plain, taking_after = picture(), picture(**ASKED)
    assert ImageChops.difference(plain, taking_after).getbbox()
    assert picture() == plain and picture(**ASKED) == taking_after
    zero = [{**ASKED["ip_adapters"][0], "scale": 0.0}]
    assert picture(ip_adapters=zero) == plain


def test_a_worker_does_not_start_with_one_that_does_not_fit(tiny_model: Path, tmp_path: Path) -> None:
    save_ip_adapter(tmp_path, tiny_ip_adapter(tiny_sd15().unet))
    with pytest.raises(UnusableIPAdapter, match="'style' cannot be used: .* and the model's"):
        runner_of(tiny_model, IPAdapterSpec(name="style", source=str(tmp_path)))
