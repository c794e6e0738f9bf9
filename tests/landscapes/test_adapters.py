"""The adapters that ship, the styles that they were trained on, and their training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from distriray.adapters import Lora, built_in
from distriray.denoise import Denoiser
from distriray.landscapes import ADAPTERS_DIR, MODEL_DIR
from distriray.landscapes.draw import draw
from distriray.landscapes.scene import sample_scene
from distriray.landscapes.training import adapters
from distriray.landscapes.training.dataset import Bucket
from distriray.landscapes.training.styles import STYLES
from distriray.requests import SamplingParams

SPECS = built_in("builtin:landscapes")


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    denoiser = Denoiser(StableDiffusionXLPipeline.from_pretrained(MODEL_DIR, dtype=torch.float32))
    denoiser.adapters.learn(SPECS)
    return denoiser


def picture(denoiser: Denoiser, *names: str) -> np.ndarray:
    state = denoiser.prepare(
        SamplingParams(
            prompt="a meadow in summer, blue sky",
            seed=3,
            height=128,
            width=128,
            num_inference_steps=8,
            guidance_scale=4.0,
            loras=tuple(Lora(name=name) for name in names),
        )
    )
    while not state.done:
        denoiser.step(state)
    return np.asarray(denoiser.decode(state)[0]).astype(float)


def colourful(pixels: np.ndarray) -> float:
    """How far apart the colours of a pixel are, on average."""
    return float((pixels.max(axis=2) - pixels.min(axis=2)).mean())


def test_two_ship_in_less_than_two_megabytes() -> None:
    assert [spec.name for spec in SPECS] == sorted(STYLES)
    assert sum(spec.locate().stat().st_size for spec in SPECS) < 2_000_000
    assert not built_in("some/model") and ADAPTERS_DIR.is_dir()


def test_what_ships_shows_its_style_and_leaves_the_model_as_it_is(denoiser: Denoiser) -> None:
    plain, ink, neon = picture(denoiser), picture(denoiser, "ink"), picture(denoiser, "neon")
    assert colourful(ink) < 0.6 * colourful(plain), "ink on paper has little colour"
    assert neon.mean() < 0.7 * plain.mean(), "it is night"
    red, green, blue = neon.mean(axis=(0, 1))
    assert blue > green and red > 0.6 * green
    both = picture(denoiser, "ink", "neon")
    assert min(np.abs(both - each).mean() for each in (plain, ink, neon)) > 5
    assert np.array_equal(picture(denoiser), plain)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [(96, 128), (256, 256)])
def test_a_style_is_of_any_size_and_always_the_same(style: str, size: tuple[int, int]) -> None:
    pixels = draw(sample_scene(7), *size)
    styled = STYLES[style](pixels)
    assert styled.shape == pixels.shape and styled.dtype == np.uint8
    assert np.array_equal(STYLES[style](pixels), styled)
    assert np.abs(styled.astype(int) - pixels.astype(int)).mean() > 20


def test_a_style_looks_alike_at_every_size() -> None:
    small, large = (STYLES["ink"](draw(sample_scene(7), side, side)) for side in (128, 256))
    halved = large.reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - small).mean() < 12


@pytest.mark.slow
def test_training_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "BUCKETS", (Bucket(128, 128, 4, 0), Bucket(192, 192, 2, 100)))

    def run(steps: int) -> dict[str, Any]:
        folders = ["--out", str(tmp_path), "--to", str(tmp_path / "made")]
        adapters.train(adapters.parse(["ink", "--steps", str(steps), "--batch", "1", *folders]))
        return load_file(tmp_path / "made" / "ink.safetensors")

    first = run(2)
    assert torch.load(tmp_path / "adapters" / "ink" / "adapter.pt")["step"] == 2
    again, more = run(2), run(3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], more[name]) for name in first)
