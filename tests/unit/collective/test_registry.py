"""Backends by name and by device."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from distriray.collective import BACKENDS, backends_of, connect, registry
from distriray.collective.registry import Backend
from distriray.collective.rendezvous import Rendezvous
from distriray.errors import BackendUnavailable


def test_the_backends_follow_from_the_device_and_the_number_of_ranks() -> None:
    assert {backends_of(device, 1)[0] for device in ("cpu", "cuda", "cuda:3", "mps")} == {"local"}
    assert backends_of("cpu", 2) == ["shm", "gloo"]
    assert [backends_of(device, 2) for device in ("cuda", "cuda:3")] == [["nccl"]] * 2


def test_a_device_that_no_backend_serves_is_refused_with_what_there_is() -> None:
    with pytest.raises(
        ValueError, match="mps tensors among 2 ranks: 'local' is for one rank, not 2; 'shm' moves CPU tensors"
    ):
        backends_of("mps", 2)


def test_a_backend_that_cannot_names_one_that_can() -> None:
    with pytest.raises(ValueError, match="'gloo' moves CPU tensors, not cuda; use 'nccl'"):
        connect("gloo", world_size=2, device="cuda")
    with pytest.raises(ValueError, match="'nccl' moves CUDA tensors, not cpu; use 'shm' or 'gloo'"):
        connect("nccl", world_size=2, device="cpu")
    with pytest.raises(ValueError, match="'local' is for one rank, not 2; use 'shm' or 'gloo'"):
        connect("local", world_size=2)


def test_a_new_backend_is_one_module_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[Rendezvous] = []
    monkeypatch.setitem(
        sys.modules, "pigeons", SimpleNamespace(join=lambda rendezvous: joined.append(rendezvous))
    )
    monkeypatch.setattr(registry, "BACKENDS", {**BACKENDS, "pigeon": Backend("pigeons", device="xpu")})
    assert backends_of("xpu", 2) == ["pigeon"]
    connect("pigeon", rank=1, world_size=2, timeout_s=3.0, name="coop", address="loft:1")
    [rendezvous] = joined
    assert (rendezvous.rank, rendezvous.world_size, str(rendezvous.device)) == (1, 2, "xpu")
    assert (rendezvous.timeout_s, rendezvous.name, rendezvous.address) == (3.0, "coop", "loft:1")
    with pytest.raises(ValueError, match="there are 'local', 'shm', 'gloo', 'nccl' and 'pigeon'"):
        connect("carrier")


def test_of_two_that_fit_the_second_takes_over_where_the_first_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def grounded(rendezvous: Rendezvous) -> None:
        raise BackendUnavailable("the pigeons of gang 'coop' have no wind")

    joined: list[Rendezvous] = []
    monkeypatch.setitem(sys.modules, "pigeons", SimpleNamespace(join=grounded))
    monkeypatch.setitem(sys.modules, "snails", SimpleNamespace(join=joined.append))
    two = {"pigeon": Backend("pigeons", device="xpu"), "snail": Backend("snails", device="xpu")}
    monkeypatch.setattr(registry, "BACKENDS", two)
    for rank in (0, 1):
        connect(rank=rank, world_size=2, device="xpu")
    assert [rendezvous.rank for rendezvous in joined] == [0, 1]
    [said] = caplog.records  # by rank 0 alone
    assert said.getMessage() == "the pigeons of gang 'coop' have no wind; it uses 'snail'"
    with pytest.raises(BackendUnavailable, match="no wind"):
        connect("pigeon", rank=0, world_size=2)


def test_a_backend_is_imported_when_it_is_first_used() -> None:
    program = """if True:
        import sys
        from distriray.collective import BACKENDS, connect
        loaded = [name for name, backend in BACKENDS.items() if backend.module in sys.modules]
        connect("local")
        print(loaded, BACKENDS["local"].module in sys.modules, BACKENDS["nccl"].module in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[] True False\n", done.stderr
