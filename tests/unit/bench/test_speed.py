"""Every way is timed once, and its phases add up to the image."""

from argparse import Namespace

import pytest

from bench.speed import PROMPT, Phases, Way, _alone, _by_gang, measure, ways
from distriray.collective import connect
from tests.models import tiny_sdxl


def test_with_split_guidance_two_ranks_have_nothing_to_exchange_and_one_row():
    names = [way.name for way in ways([2], "cpu")]
    assert names.count("gang of 2, guidance split") == 1
    assert len(set(names)) == len(names) == 2 + 4


def test_gangs_are_compared_in_every_mode_split_and_not():
    four = [way for way in ways([1, 2, 4], "cpu") if way.ranks == 4]
    found = {(way.parallel.exchange, way.parallel.cfg_parallel) for way in four}
    assert found == {(mode, split) for mode in ("displaced", "sync", "none") for split in (True, False)}


def test_short_steps_are_compared_where_gangs_wait_for_fresh_values():
    more = {way.name: way.parallel for way in ways([1, 4], "cpu", [2, 3])[len(ways([1, 4], "cpu")) :]}
    whole = ("gang of 1", "gang of 4, sync, guidance split", "gang of 4, sync")
    assert list(more) == [f"{name}, one of {n} steps whole" for name in whole for n in (2, 3)]
    assert [config.cache_interval for config in more.values()] == [2, 3] * 3


def test_diffusers_has_one_row_on_a_gpu():
    assert [way.name for way in ways([1], "cuda")] == ["diffusers", "gang of 1"]


def test_phases_of_a_gang_add_up_to_its_image():
    phases = _by_gang(tiny_sdxl(), connect("local"), Way("gang of 1", 1), size=64, steps=2)
    assert phases.image == pytest.approx(phases.prompt + phases.denoising + phases.decoding)
    assert phases.waiting == 0.0


def test_the_round_that_warms_up_does_the_steps_of_those_that_are_kept(monkeypatch):
    drawn = []

    def draw(pipeline, communicator, way, size, steps):
        drawn.append(steps)
        return Phases(float(len(drawn)))

    monkeypatch.setattr("bench.speed._by_gang", draw)
    monkeypatch.setattr("bench.speed.load_pipeline", lambda *options: None)
    way = Way("gang of 1", 1)
    rounds = measure(connect("local"), [way], Namespace(model="any", rounds=2, steps=10, sizes=[64]))
    assert drawn == [10, 10, 10]
    assert [taken[64, way.name].image for taken in rounds] == [2.0, 3.0]


def test_diffusers_alone_is_given_the_same_prompt():
    pipeline, asked = tiny_sdxl(), []
    original = pipeline.encode_prompt
    pipeline.encode_prompt = lambda prompt, *args, **kwargs: (
        asked.append(prompt) or original(prompt, *args, **kwargs)
    )
    assert _alone(pipeline, 1, size=64, steps=2).image > 0
    assert asked == [PROMPT]
