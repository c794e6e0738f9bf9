"""Joining a Ray cluster that is there, or is not."""

from __future__ import annotations

import ctypes
import re
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distriray import cluster


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:{free}",
        "localhost:{free}",
        "127.0.0.1:65536",
        "no.such.host.invalid:6379",
        "no..host:6379",
        "[::1]:{free}",
    ],
)
def test_a_cluster_that_does_not_answer_is_said_to_be_none_without_asking_ray(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.ray, "init", pytest.fail)
    with socket.socket() as bound:  # and nobody listens
        bound.bind(("127.0.0.1", 0))
        address = address.format(free=bound.getsockname()[1])
        with pytest.raises(ConnectionError, match=f"no Ray cluster answers at {re.escape(address)}: "):
            cluster.join(address)
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConnectionError, match=f"no Ray cluster answers at {re.escape(address)}: "):
            cluster.join("auto")


def test_an_address_that_a_dead_cluster_left_behind_is_named_with_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster.ray, "init", pytest.fail)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    monkeypatch.setattr("ray._common.utils.get_default_ray_temp_dir", lambda: str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        left = f"127.0.0.1:{bound.getsockname()[1]}"
        (file := tmp_path / "ray_current_cluster").write_text(left)
        with pytest.raises(ConnectionError, match=f"no Ray cluster answers at {left}, which {file} names "):
            cluster.join("auto")


@pytest.mark.parametrize("address", ["auto", "local", "ray://127.0.0.1:1", "{listens}"])
def test_what_may_be_one_is_ray_s_to_join(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[str] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "get_ray_address_from_environment", lambda *_: "a.name.of.somebody.s")
    monkeypatch.setattr(cluster.ray, "init", lambda place, **_: joined.append(place))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = address.format(listens=f"127.0.0.1:{server.getsockname()[1]}")
        cluster.join(address)
    assert joined == [address]


@pytest.mark.parametrize("former", [signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler])
def test_a_sigterm_means_what_it_meant_before_ray_was_begun(former: Any) -> None:
    def of_ray(number: int, _: object) -> None:
        sys.exit(number)

    before = signal.signal(signal.SIGTERM, former)
    try:
        with cluster.own_sigterm():
            signal.signal(signal.SIGTERM, of_ray)
        assert signal.getsignal(signal.SIGTERM) is (of_ray if former is signal.SIG_DFL else former)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_sigterm_means_what_it_meant_before_once_ray_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes the handler away from the process, and Python does not know."""
    heard: list[int] = []
    no_handler = partial(ctypes.CDLL(None).signal, signal.SIGTERM, None)
    monkeypatch.setattr(cluster.ray, "shutdown", no_handler)
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        cluster.leave()
        handled = int(re.search(r"SigCgt:\s*(\w+)", Path("/proc/self/status").read_text())[1], 16)  # type: ignore[index]
        assert handled >> (signal.SIGTERM - 1) & 1
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


HEARS = "import signal; print(signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ()))"


@pytest.mark.distributed
def test_what_is_started_deaf_hears_no_sigterm_and_the_program_hears_its_own_afterwards() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with cluster.deaf_to_sigterm():
            deaf = subprocess.check_output([sys.executable, "-c", HEARS], text=True)
            signal.raise_signal(signal.SIGTERM)
            assert not heard
        assert heard == [signal.SIGTERM]
        hears = subprocess.check_output([sys.executable, "-c", HEARS], text=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (deaf, hears) == ("False\n", "True\n")
