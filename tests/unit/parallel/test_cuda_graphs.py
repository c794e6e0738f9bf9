"""What graphs of a GPU leave behind of its memory, on an allocator that does with pools what torch's does."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from itertools import count
from typing import Any

import pytest
import torch

from distriray.gang.devices import DEVICES
from distriray.parallel.graphs import CaptureFailed, CudaGraphs, StepGraphs

CPU = torch.device("cpu", 0)


class Allocator:
    """Of a GPU's memory, what pools of graphs have to do with it (c10/cuda/CUDACachingAllocator.cpp), and of
    its default generator whether it answers (ATen/cuda/CUDAGeneratorImpl.cpp).

    Args:
        ends: whether a capture that fails is over for both, as since torch 2.13.

    Attributes:
        uses: graphs of each pool.
        reserved: pools that have memory.
        under_way: the pools that captures are under way in.
        seed: of the device's generator, in memory that every capture writes to, and the first one makes.
        asked: whether the generator takes itself to be in a capture.
        receiving: whether a transfer is under way, for which whoever frees memory would wait.
        spoilt: whether the next capture cannot be ended.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ends: bool = True) -> None:
        self.ends, self.spoilt, self.asked, self.receiving = ends, False, False, False
        self.uses: Counter[int] = Counter()
        self.reserved: set[int] = set()
        self.under_way: list[int] = []
        self.seed: torch.Tensor | None = None
        pools = count(1)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release)
        for name, stand_in in {
            "graph_pool_handle": lambda: next(pools),
            "CUDAGraph": lambda: FakeGraph(self),
            "empty_cache": self.empty_cache,
            "synchronize": self.synchronize,
            "Stream": lambda device: Stream(),
            "current_stream": lambda device: Stream(),
            "stream": lambda stream: nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def begin(self, pool: int) -> None:
        assert self.uses[pool] or pool not in self.reserved, "a pool that has ended"
        self.uses[pool] += 1
        self.reserved.add(pool)
        self.under_way.append(pool)
        self.seed = torch.zeros(1) if self.seed is None else self.seed
        self.seed.fill_(7)
        self.asked = True

    def end(self, device: int, pool: int) -> None:
        if pool not in self.under_way:
            raise RuntimeError("not currently recording to this pool")
        self.under_way.remove(pool)

    def release(self, device: int, pool: int) -> None:
        self.uses[pool] -= 1

    def draw(self) -> None:
        assert not self.asked, "Offset increment outside graph capture encountered unexpectedly."

    def synchronize(self, device: torch.device | None = None) -> None:
        assert not self.under_way, "a device is not waited for while a capture is under way"
        self.receiving = False

    def empty_cache(self) -> None:
        assert not self.under_way, "nothing is given back while a capture is under way"
        assert not self.receiving, "the allocator is locked until the peer has sent"
        self.reserved = {pool for pool in self.reserved if self.uses[pool]}


class FakeGraph:
    def __init__(self, allocator: Allocator) -> None:
        self._allocator, self._pool = allocator, 0

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        self._allocator.begin(pool)
        self._began = pool

    def capture_end(self) -> None:
        spoilt, self._allocator.spoilt = self._allocator.spoilt, False
        if not spoilt or self._allocator.ends:
            self._allocator.end(0, self._began)
            self._allocator.asked = False
        if spoilt:
            raise RuntimeError("operation failed due to a previous error during capture")
        self._pool = self._began

    def replay(self) -> None:
        pass

    def __del__(self) -> None:
        if self._pool:
            self._allocator.release(0, self._pool)


class Stream:
    def wait_stream(self, other: Any) -> None:
        pass


def met_twice(graphs: StepGraphs, forward: Any) -> None:
    for _ in range(2):
        graphs.run(forward.__name__, forward, None, (torch.ones(3),), {})


def doubles(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def spoil(allocator: Allocator, graphs: StepGraphs) -> None:
    """Meet a step twice that cannot be captured."""

    def reads(x: torch.Tensor) -> torch.Tensor:
        if allocator.under_way:
            allocator.spoilt = True
            raise RuntimeError("operation not permitted when stream is capturing")
        return x

    with pytest.raises(CaptureFailed, match="when stream is capturing"):
        met_twice(graphs, reads)


@pytest.mark.parametrize("ends", [False, True])
def test_a_capture_that_failed_keeps_no_memory_from_being_given_back(
    monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    allocator = Allocator(monkeypatch, ends)
    graphs = StepGraphs(CudaGraphs(CPU))
    spoil(allocator, graphs)
    torch.cuda.empty_cache()
    met_twice(graphs, doubles)
    assert graphs._graphs and not allocator.under_way


def test_a_capture_that_failed_keeps_no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch, ends=False)
    maker = CudaGraphs(CPU)
    graphs = StepGraphs(maker)
    met_twice(graphs, doubles)
    spoil(allocator, graphs)
    torch.cuda.empty_cache()
    assert allocator.reserved == {1} and len(graphs) == 1
    graphs.clear()
    maker.let_go()
    torch.cuda.empty_cache()
    assert not allocator.reserved


def test_torch_before_2_8_is_told_by_the_name_that_it_has_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch, ends=False)
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    monkeypatch.setattr(torch._C, "_cuda_endAllocateCurrentStreamToPool", allocator.end, raising=False)
    spoil(allocator, StepGraphs(CudaGraphs(CPU)))
    torch.cuda.empty_cache()


@pytest.mark.parametrize("ends", [False, True])
def test_random_numbers_are_drawn_after_a_capture_that_failed(
    monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    allocator = Allocator(monkeypatch, ends)
    spoil(allocator, StepGraphs(CudaGraphs(CPU)))
    allocator.draw()


def test_memory_of_graphs_is_kept_for_later_ones_until_it_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch)
    maker = CudaGraphs(CPU)
    graphs = StepGraphs(maker)
    torch.cuda.empty_cache()
    assert not allocator.reserved  # before there are graphs
    met_twice(graphs, doubles)
    graphs.clear()
    torch.cuda.empty_cache()
    assert allocator.reserved == {1}
    met_twice(graphs, doubles)
    assert allocator.reserved == {1}
    graphs.clear()
    maker.let_go()
    torch.cuda.empty_cache()
    assert not allocator.reserved
    met_twice(graphs, doubles)
    assert allocator.reserved == {2} and len(graphs) == 1


def test_the_allocator_is_not_locked_until_peers_have_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives for a displaced step is under way while it is captured, or where memory runs out."""
    allocator = Allocator(monkeypatch)
    graphs = StepGraphs(CudaGraphs(CPU))
    graphs.run("doubles", doubles, None, (torch.ones(3),), {})
    allocator.receiving = True
    graphs.run("doubles", doubles, None, (torch.ones(3),), {})
    assert len(graphs) == 1
    allocator.receiving = True
    DEVICES["cuda"].trim()


def test_whether_the_first_capture_is_in_inference_mode_counts_for_no_later_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Allocator(monkeypatch)
    graphs = StepGraphs(CudaGraphs(CPU))
    with torch.inference_mode():
        met_twice(graphs, doubles)
    graphs.clear()
    met_twice(graphs, doubles)
    assert len(graphs) == 1
