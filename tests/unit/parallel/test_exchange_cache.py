"""Which exchanges are kept, and which go on from their last step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from distriray.parallel.exchange.cache import ExchangeCache, ExchangeKey
from distriray.parallel.exchange.exchange import Exchange


@dataclass
class Kept:
    """An exchange with so many bytes of buffers, which notes what is asked of it."""

    buffer_bytes: int = 10
    broken: bool = False
    asked: str = ""

    def restart(self) -> None:
        self.asked += "restart "

    def abandon(self) -> None:
        self.asked += "abandon "


def key(name: str, gang: str = "gang") -> ExchangeKey:
    return cast(Any, (gang, "config", name))


def cache_of(**kept: Kept) -> ExchangeCache:
    cache = ExchangeCache()
    for name, exchange in kept.items():
        cache.use(key(name), lambda exchange=exchange: cast(Exchange, exchange))
    return cache


def names(cache: ExchangeCache) -> str:
    """Names of those that are kept, in the order of their last use."""
    return " ".join(cast(Any, each)[2] for each in cache._exchanges)


def test_an_exchange_is_made_once_and_moves_behind_all_others_when_it_is_used() -> None:
    cache, again = cache_of(a=Kept(), b=Kept()), Kept()
    assert cache.use(key("a"), lambda: cast(Exchange, again)) is not again
    assert names(cache) == "b a" and cache.nbytes == 20


def test_all_restart_but_those_that_other_images_use() -> None:
    kept = {name: Kept() for name in "abc"}
    cache_of(**kept).restart(but={key("b")})
    assert [each.asked for each in kept.values()] == ["restart ", "", "restart "]


def test_what_was_used_longest_ago_is_dropped_until_the_rest_fits() -> None:
    cache = cache_of(a=Kept(), b=Kept(), c=Kept(), d=Kept())
    cache.use(key("a"), lambda: cast(Exchange, Kept()))
    cache.evict({key("b")}, 25)
    assert names(cache) == "b d a", "b is in use, and of the others c was used longest ago"
    cache.evict((), 30)
    assert names(cache) == "b d a"


def test_those_of_a_gang_that_is_over_go_first_and_whatever_fits() -> None:
    cache = cache_of(a=Kept(), b=Kept(broken=True), c=Kept(), d=Kept(broken=True))
    cache.evict({key("d")}, 20)
    assert names(cache) == "a c d", "one that is in use stays until its image has ended"


def test_those_of_other_gangs_are_dropped() -> None:
    cache = cache_of(a=Kept(), b=Kept())
    cache.use(key("c", "another"), lambda: cast(Exchange, Kept()))
    cache.drop_left(cast(Any, "gang"), cast(Any, "config"))
    assert names(cache) == "a b"


def test_transfers_end_before_buffers_go() -> None:
    kept = {"a": Kept(), "b": Kept(broken=True)}
    cache = cache_of(**kept)
    cache.abandon()
    assert names(cache) == "a" and [each.asked for each in kept.values()] == ["abandon "] * 2
    cache.clear()
    assert names(cache) == "" and kept["a"].asked == "abandon abandon "
