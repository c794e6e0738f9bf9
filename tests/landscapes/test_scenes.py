"""Scenes, drawings and captions."""

from __future__ import annotations

import numpy as np
import pytest

from distriray.landscapes.captions import caption, label_indices
from distriray.landscapes.draw import draw
from distriray.landscapes.scene import ATTRIBUTES, sample_scene


def scene_with(**wanted: str) -> int:
    return next(
        seed for seed in range(5000) if all(getattr(sample_scene(seed), k) == v for k, v in wanted.items())
    )


def test_a_seed_gives_one_scene_and_one_picture() -> None:
    assert sample_scene(7) == sample_scene(7)
    assert np.array_equal(draw(sample_scene(7), 64, 64), draw(sample_scene(7), 64, 64))
    assert not np.array_equal(draw(sample_scene(7), 64, 64), draw(sample_scene(8), 64, 64))


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 64)])
def test_pictures_have_the_size_asked_for(size: tuple[int, int]) -> None:
    for seed in range(12):
        picture = draw(sample_scene(seed), *size)
        assert picture.shape == (*size, 3) and picture.dtype == np.uint8


def test_a_scene_looks_alike_at_every_size() -> None:
    for seed in range(6):
        small, large = (draw(sample_scene(seed), size, size).astype(float) for size in (128, 256))
        halved = large.reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
        assert np.abs(halved - small).mean() < 4


def test_night_is_darker_than_day() -> None:
    day, night = (draw(sample_scene(scene_with(time=time)), 64, 64).mean() for time in ("day", "night"))
    assert night < 0.6 * day


def test_the_lake_mirrors_the_sky() -> None:
    seed = scene_with(ground="lake", trees="none", clouds="cloudy", time="sunset", mountains="snowy")
    picture = draw(sample_scene(seed), 128, 128).astype(float).mean(axis=2)

    def likeness(horizon: int) -> float:
        above, below = picture[horizon - 30 : horizon - 2][::-1], picture[horizon + 2 : horizon + 30]
        return float(np.corrcoef(above.ravel(), below.ravel())[0, 1])

    assert max(likeness(horizon) for horizon in range(62, 80)) > 0.8


def test_captions_state_only_what_is_true() -> None:
    rng = np.random.default_rng(0)
    for seed in range(200):
        scene = sample_scene(seed)
        _, said = caption(scene, rng)
        assert all(getattr(scene, name) == value for name, value in said.items())
        assert len(label_indices(said)) == len(ATTRIBUTES)


def test_captions_vary_and_leave_things_open() -> None:
    rng = np.random.default_rng(0)
    texts, said = zip(*(caption(sample_scene(3), rng) for _ in range(20)), strict=True)
    assert len(set(texts)) > 15
    assert len({len(labels) for labels in said}) > 2
