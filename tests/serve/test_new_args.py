"""A service that is described anew while requests run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from distriray.handle import HandleClient
from distriray.requests import GenerationRequest

from .conftest import Service, until
from .test_fleet import asking

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_new_args_replace_every_host_and_no_request_fails(
    service: Service, client: HandleClient, ask: Callable[..., GenerationRequest]
) -> None:
    def hosts() -> set[str]:
        pools = client.fleet().pools
        return {name for pool in ("pair", "twins") for name in pools[pool].hosts}

    until(lambda: len(hosts()) == 3)
    for aliases in ({"other": service.models["pair"]}, {}):
        before = hosts()
        with asking(2, partial(ask, "twins")), asking(1, partial(ask, "pair")):
            service.args["aliases"] = aliases
            service.deploy()
            until(lambda: len(hosts()) == 3 and not hosts() & before and service.is_up(), 300)  # noqa: B023
