"""What requests name of a pool's list, with a picture each, on its way through a host."""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

import pytest
from PIL import Image
from pydantic import ValidationError

from distriray.errors import ControlNetNotFound, DistrirayError, InvalidRequest, IPAdapterNotFound
from distriray.gang.config import HostConfig
from distriray.gang.messages import StopSignal
from distriray.names import MOST_LOADED
from distriray.picture import png

from .fleet import FakeHost
from .test_dispatcher import Script, at, begins_again_when_all_who_hold_it_die, do, opened

PICTURE = Image.effect_noise((128, 128), 90)
LONG = 400


class Named(NamedTuple):
    """A field of requests, and the one of a configuration that lists what it names."""

    field: str
    option: str
    word: str
    unknown: type[DistrirayError]

    def listed(self, *names: str) -> dict[str, Any]:
        return {self.option: [{"name": name, "source": "some/one"} for name in names]}

    def asked(self, *names: str) -> dict[str, Any]:
        return {self.field: [{"name": name, "image": PICTURE} for name in names]}


NAMED = pytest.mark.parametrize(
    "named",
    [
        Named("control", "controls", "ControlNet", ControlNetNotFound),
        Named("ip_adapters", "ip_adapters", "IP-Adapter", IPAdapterNotFound),
    ],
    ids=lambda named: named.field,
)


@NAMED
def test_pictures_are_put_once_and_are_in_no_order(named: Named) -> None:
    async def scene() -> None:
        policy = Script([(0, 1), (0, 1, 2, 3)], every=LONG)
        async with FakeHost(4, policy, **named.listed("one"), **opened()) as host:
            job = host.accept(num_inference_steps=60, **named.asked("one"))
            given = job.pictures
            assert [*given] == [f"{named.field}.0.image"]
            assert len(pickle.dumps((job.request, job.view()))) < len(png(PICTURE)) / 2
            await at(job, 10)
            policy.at = 1
            job.yield_() and host.dispatcher._stop(job, StopSignal.YIELD)
            result = await job.ended
            assert [len(segment.workers) for segment in result.segments] == [2, 4]
            told = [pictures for worker in host.fleet.launched for _, pictures in worker.pictures]
            assert host.fleet.shared == 1 and told.count(given) == 2 and told.count(None) == 4
            assert not job.pictures, "nobody has them any more"

    do(scene())


@NAMED
def test_when_all_who_hold_a_state_die_its_request_begins_again_with_them(named: Named) -> None:
    async def scene() -> None:
        async with FakeHost(1, **named.listed("one"), **opened()) as host:
            await begins_again_when_all_who_hold_it_die(host, **named.asked("one"))

    do(scene())


@NAMED
def test_an_unknown_name_is_refused_at_once_with_those_that_there_are(named: Named) -> None:
    async def scene() -> None:
        async with FakeHost(1, **named.listed("one")) as host:
            with pytest.raises(named.unknown, match=f"no {named.word} 'other'; there is 'one'"):
                host.accept(**named.asked("other"))
            with pytest.raises(InvalidRequest, match=f"{named.field} names 'one' more than once"):
                host.accept(**named.asked("one", "one"))
        async with FakeHost(1, **named.listed("one"), limits={f"max_{named.option}": 0}) as host:
            with pytest.raises(InvalidRequest, match=f"{named.field} names 1 {named.word}; the limit is 0"):
                host.accept(**named.asked("one"))

    do(scene())


@NAMED
def test_a_pool_lists_each_name_once_and_not_too_many(named: Named) -> None:
    with pytest.raises(ValidationError, match="'one'. are there more than once"):
        HostConfig(**named.listed("one", "one"))
    with pytest.raises(ValidationError, match="at most 16"):
        HostConfig(**named.listed(*(f"n{i}" for i in range(MOST_LOADED + 1))))
