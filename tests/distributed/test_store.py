"""A gang's store listens where it was told to, and strangers who lack its key write beside it."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore

from distriray.collective import connect, open_store, serve_store
from distriray.collective.store import StoreAddress
from distriray.errors import GangBroken, GangMismatch
from tests.distributed.ranks import free_address

pytestmark = pytest.mark.distributed


def answers(host: str, port: int) -> bool:
    """Whether something accepts connections there."""
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def stranger(address: str) -> TCPStore:
    """A connection to the store at `address` by a process that does not know its key."""
    place = StoreAddress.parse(address)
    return TCPStore(place.host, place.port, timeout=timedelta(seconds=2), wait_for_workers=False)


def test_a_store_is_served_on_its_address_alone() -> None:
    served = serve_store("127.0.0.1")
    port = StoreAddress.parse(served.address).port
    assert answers("127.0.0.1", port)
    assert not answers("127.0.0.2", port)
    assert not answers("::1", port)


def test_rank_0_serves_its_store_on_its_address_alone() -> None:
    address = free_address().replace("127.0.0.1", "127.0.0.2")
    communicator = connect("gloo", address=address)
    port = StoreAddress.parse(address).port
    assert answers("127.0.0.2", port)
    assert not answers("127.0.0.1", port)
    communicator.close()
    assert not answers("127.0.0.2", port)


def test_generations_share_a_server_that_ends_with_the_last() -> None:
    address = free_address()
    port = StoreAddress.parse(address).port
    old = connect("gloo", address=address, name="old")
    new = connect("gloo", address=address, name="new")
    old.close()
    assert answers("127.0.0.1", port)
    new.close()
    assert not answers("127.0.0.1", port)


@pytest.mark.parametrize("served", ["by serve_store", "by rank 0"])
def test_what_is_written_without_the_key_does_not_reach_the_gang(served: str) -> None:
    if served == "by serve_store":
        server: Any = serve_store("127.0.0.1")
        address = server.address
    else:
        address = f"{free_address()}/a key of the ranks"
        server = connect("gloo", address=address, name="somebody else's")
    name = "gang"
    for store in (stranger(address), PrefixStore("a guess", stranger(address))):
        gang = PrefixStore(name, store)
        gang.set("world size", "7")
        gang.set("rank 0", "1")
    communicator = connect("gloo", address=address, name=name)
    communicator.exchange({}, {}).wait()
    communicator.close()
    with pytest.raises(GangMismatch):  # the claim is not empty: what is written with the key does
        PrefixStore("next", open_store(address)).set("world size", "7")
        connect("gloo", address=address, name="next")


def test_keys_are_new_each_time_and_stay_out_of_messages() -> None:
    first, second = serve_store("127.0.0.1"), serve_store("127.0.0.1")
    keys = [StoreAddress.parse(served.address).key for served in (first, second)]
    assert keys[0] != keys[1] and all(len(key) >= 20 for key in keys)
    address = f"{free_address()}/{keys[0]}"
    with pytest.raises(GangBroken, match="no store answers") as failure:
        open_store(address, timeout_s=0.3)
    shown = f"{failure.value} {failure.value.__cause__} {first!r} {StoreAddress.parse(address)!r}"
    assert keys[0] not in shown


def test_the_address_of_a_served_store_opens_it() -> None:
    served = serve_store("127.0.0.1")
    served.store.set("greeting", "hello")
    assert open_store(served.address).get("greeting") == b"hello"


def test_a_host_that_is_another_machines_is_refused_with_the_reason() -> None:
    with pytest.raises(OSError):
        serve_store("203.0.113.1")
    with pytest.raises(
        GangBroken, match=r"203.0.113.1:29400, and this machine cannot serve one there \(Cannot"
    ):
        connect("gloo", address="203.0.113.1:29400", timeout_s=0.5)


@pytest.mark.parametrize(
    ("text", "host", "port", "key"),
    [
        ("node:1", "node", 1, ""),
        ("[::1]:29400", "::1", 29400, ""),
        ("10.0.0.7:80/a/b", "10.0.0.7", 80, "a/b"),
    ],
)
def test_addresses_are_read_and_written(text: str, host: str, port: int, key: str) -> None:
    address = StoreAddress.parse(text)
    assert (address.host, address.port, address.key) == (host, port, key)
    assert address.text == text
    assert str(address) == text.partition("/")[0]


@pytest.mark.parametrize("text", ["node", "node:", ":1", "node:x", "node/secret:1"])
def test_other_addresses_are_refused_without_their_key(text: str) -> None:
    with pytest.raises(ValueError, match="is not 'host:port'") as failure:
        StoreAddress.parse(text)
    assert "secret" not in str(failure.value)
