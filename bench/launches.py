"""Launches and bytes of a step on a GPU, counted without one: `python -m bench.launches [--model flux]`.

A step of a published network, in the dtype that it is used in, runs on torch's meta device, which knows
shapes and computes nothing. Counted are the operations that launch something on a GPU, and the bytes that
they read and write: for diffusers alone, and for one rank of a gang in each mode of the exchange, kernel by
kernel; and what that rank sends. Attention counts as one launch, and what has kernels of its own
(`distriray.parallel.kernels.fused`) as these. Beside them stands one rank of diffusers' own context
parallelism, by Ulysses, where the network has a plan for it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import ContextParallelConfig
from diffusers.utils import logging
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bench.arguments import add_json, side
from bench.exchange import SETTLING
from bench.projection.peers import NotedPeers
from bench.published import PUBLISHED, Published, random_network
from bench.report import Report
from distriray import ParallelConfig, parallelize
from distriray.arguments import at_least
from distriray.config import WHOLE_AT_FIRST, AttentionMode, ExchangeMode
from distriray.parallel import engine as engines
from distriray.parallel import engine_of, gather
from distriray.parallel.engine import Engine
from distriray.parallel.exchange import extrapolation, reconstructions
from distriray.parallel.kernels import fused
from distriray.parallel.layers import group_norm
from distriray.parallel.partition import dealt_heads
from distriray.parallel.schedules import Moment, Schedules

COLUMNS = (
    "size",
    "share of",
    "guidance",
    "exchange",
    "attention",
    "launches",
    "of diffusers",
    "GB moved",
    "of none",
    "exchanges",
    "messages",
    "MB sent",
    "MB of buffers",
)
NAMES: tuple[ExchangeMode, ...] = ("displaced", "displaced_attention", "compressed", "sync")
SHORT: Sequence[tuple[ExchangeMode, AttentionMode]] = [("sync", "auto")]
"""How all short steps are shared."""
RANK = 1
"""Whose part is counted: of three patches and more it has peers on both sides, as the slowest have."""
OVERWRITES = {"copy_", "fill_", "zero_"}
"""Operations that do not read what they write to."""


@dataclass
class Count:
    """Launches of a step, and the bytes that they move."""

    launches: int = 0
    nbytes: int = 0

    def add(self, *moved: Any) -> None:
        """One launch that reads or writes these tensors."""
        self.launches += 1
        tensors = [leaf for leaf in pytree.tree_leaves(moved) if isinstance(leaf, torch.Tensor)]
        self.nbytes += sum(_distinct_bytes(tensor) for tensor in tensors)


def _distinct_bytes(tensor: torch.Tensor) -> int:
    """Bytes of its elements, each once however often it is repeated."""
    lengths = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(lengths) * tensor.element_size()


class Counting(TorchDispatchMode):
    """Counts operations on the way to the device."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self._count = count

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        collective = func.namespace == "_c10d_functional"
        if not (collective or func.is_view or "empty" in name or name in ("_unsafe_view", "lift_fresh")):
            in_place = name.endswith("_")
            read = args[1:] if name in OVERWRITES else args
            named = {key: value for key, value in (kwargs or {}).items() if key != "out"}
            self._count.add(read, named, args[0] if in_place else output)
        return output


class Collectives(TorchDispatchMode):
    """Notes the bytes that one rank of several sends to each other one, collective by collective."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.sent: list[int] = []
        self._ranks = ranks

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            self.sent.append(args[0].nbytes // self._ranks)
        elif func is torch.ops._c10d_functional.all_gather_into_tensor.default:
            self.sent.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


@dataclass
class Kernel:
    """Stands for a kernel of Triton: a launch is counted, and nothing runs."""

    count: Count
    moved: Callable[[tuple[Any, ...]], Any]

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **constants: self.count.add(self.moved(args))


@dataclass
class Unread(gather.HeaderOnItsWay):
    """A header that says nothing, since the meta device has no values."""

    communicator: Any
    values: torch.Tensor
    said: gather.Header = field(default=gather.Header(gather.NO_FLAGS, math.inf))

    def read(self) -> gather.Header:
        return self.said


@contextmanager
def counting() -> Iterator[Count]:
    """Count everything that is done within, on the meta device."""
    count = Count()
    with standing_in(count), Counting(count):
        yield count


@contextmanager
def standing_in(count: Count) -> Iterator[None]:
    """Let steps go through on the meta device, where what stands in for kernels counts their launches."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
        output = torch.empty_like(query)  # in its layout, as torch's kernels do
        count.add(query, key, value, output)
        return output

    with ExitStack() as patches:
        for owner, name, stand_in in (
            (F, "scaled_dot_product_attention", attend),
            (gather, "HeaderOnItsWay", Unread),
            (engines, "check_same_image", lambda *_: None),
            (Schedules, "read", lambda *_: Moment(0.0)),
            (group_norm, "kernels_of", lambda device_type: fused),
            (reconstructions, "kernels_of", lambda device_type: fused),
            (extrapolation, "kernels_of", lambda device_type: fused),
            (fused.group_norm, "_part_moments", Kernel(count, lambda args: args[:2])),
            (fused.group_norm, "_merge_parts", Kernel(count, lambda args: args[:2])),
            (fused.group_norm, "_normalize", Kernel(count, _normalized)),
            (fused.few_bits, "_encode", Kernel(count, lambda args: (*args[:3], args[1]))),
            (fused.few_bits, "_decode", Kernel(count, lambda args: (*args[:3], args[1]))),
            (fused.fit, "_add", Kernel(count, lambda args: args[:5])),
            (fused.fit, "_extrapolate", Kernel(count, lambda args: (*args[:5], *args[1:3]))),
        ):
            patches.enter_context(patch.object(owner, name, stand_in))
        yield


def _normalized(args: tuple[Any, ...]) -> list[Any]:
    """What the kernel of a norm moves; where there are no rows around the input, that stands for them."""
    input, above, below, *others = args[:8]
    return [input, *(rows for rows in (above, below) if rows is not input), *others]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=PUBLISHED, default="sdxl")
    parser.add_argument("--sizes", type=side, nargs="+", default=[1024, 2048, 3840], help="pixels of a side")
    parser.add_argument("--ranks", type=at_least(2), nargs="+", default=[2, 4, 8])
    parser.add_argument(
        "--short",
        action="store_true",
        help="a short step of a transformer in place of a whole one, as cache_interval has them",
    )
    add_json(parser)
    arguments = parser.parse_args()
    logging.set_verbosity_error()  # diffusers warns of a cast that it has no objection to
    model = PUBLISHED[arguments.model]
    if arguments.short and model.spatial:
        parser.error(f"--short is for transformers, which {model.name} is not")
    dtype = str(model.dtype).removeprefix("torch.")
    report = Report(
        f"bench.launches: {model.name} in {dtype}, counted on the meta device",
        COLUMNS,
        seed=0,
        settings=vars(arguments),
    )
    for size in arguments.sizes:
        alone = alone_of(model, size)
        report.add(*cells(size, "diffusers", "together", "-", "-", alone, alone, None), "-", "-", "-", "-")
        for ranks, split in product(arguments.ranks, (True, False)):
            if split and (not model.splits or ranks % 2):
                continue
            least: Count | None = None
            patches = ranks // 2 if split else ranks
            for exchange, attention in SHORT if arguments.short else ways(model, patches):
                count, peers, buffers = share(
                    model, size, ranks, split, exchange, attention, short=arguments.short
                )
                least = least or count
                sent = [moment.sent for moment, _ in peers.marks if moment.kind == "launch"]
                guidance = "split" if split else "together"
                report.add(
                    *cells(size, f"a gang of {ranks}", guidance, exchange, attention, count, alone, least),
                    str(len(sent)),
                    str(sum(map(len, sent))),
                    f"{sum(sum(bytes_.values()) for bytes_ in sent) / 1e6:.0f}",
                    f"{buffers / 1e6:.0f}",
                )
            theirs = None if split or arguments.short else by_diffusers(model, size, ranks)
            if theirs is not None:
                count, to_each = theirs
                report.add(
                    *cells(size, f"diffusers on {ranks}", "together", "-", "ulysses", count, alone, least),
                    str(len(to_each)),
                    str(len(to_each) * (ranks - 1)),
                    f"{sum(to_each) * (ranks - 1) / 1e6:.0f}",
                    "-",
                )
    report.publish(arguments.json)


def ways(model: Published, patches: int) -> Sequence[tuple[ExchangeMode, AttentionMode]]:
    """What is compared among that many patches.

    Every mix, and heads dealt where they can be; and as by default, where that deals them in some layers.
    """
    # Without group norms and convolutions, `displaced_attention` is `displaced`.
    names = [name for name in NAMES if model.spatial or name != "displaced_attention"]
    compared: list[tuple[ExchangeMode, AttentionMode]] = [(name, "gather") for name in ("none", *names)]
    if 1 < patches <= min(model.heads):
        compared.append(("sync", "ulysses"))
    if len({dealt_heads("auto", heads, patches) is None for heads in model.heads}) > 1:
        compared.append(("sync", "auto"))
    return compared


def cells(
    size: int,
    of: str,
    guidance: str,
    exchange: str,
    attention: str,
    count: Count,
    alone: Count,
    least: Count | None,
) -> tuple[str, ...]:
    """The part of a row that is about what the device does."""
    return (
        f"{size}x{size}",
        of,
        guidance,
        exchange,
        attention,
        str(count.launches),
        f"{count.launches / alone.launches:.2f}x",
        f"{count.nbytes / 1e9:.1f}",
        "-" if least is None else f"{count.nbytes / least.nbytes:.2f}x",
    )


def on_meta(model: Published, size: int) -> tuple[Any, dict[str, Any]]:
    """The network without values, and what a step calls it with but for the timestep."""
    network = random_network(model.make, torch.device("meta"), model.dtype)
    return network, model.inputs_of(network, size)


def alone_of(model: Published, size: int) -> Count:
    """A step by diffusers."""
    network, inputs = on_meta(model, size)
    with torch.no_grad(), counting() as count:
        model.call(network, model.timestep_on("meta", 900.0), inputs)
    return count


def by_diffusers(model: Published, size: int, ranks: int) -> tuple[Count, list[int]] | None:
    """One rank's part of a step by diffusers' own context parallelism; None where it has no plan.

    Returns:
        Its launches, but for collectives, and the bytes that each of these sends to each peer.
    """
    network, inputs = on_meta(model, size)
    if network._cp_plan is None or any(heads % ranks for heads in model.heads):
        return None
    dist.init_process_group("fake", rank=ranks // 2, world_size=ranks, store=FakeStore())
    try:
        spread_by_diffusers(network, ranks)
        with torch.no_grad(), counting() as count, Collectives(ranks) as collectives:
            model.call(network, model.timestep_on("meta", 900.0), {**inputs, "return_dict": False})
    finally:
        dist.destroy_process_group()
    return count, collectives.sent


def spread_by_diffusers(network: Any, ranks: int) -> Any:
    """A network whose attention diffusers spreads over the ranks of torch's process group, by Ulysses."""
    with patch.object(torch.accelerator, "device_count", lambda: 1):  # it asks, wherever the network is
        network.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
    return network


def in_gang(
    model: Published,
    size: int,
    ranks: int,
    split: bool,
    exchange: ExchangeMode,
    attention: AttentionMode,
    short: bool = False,
) -> tuple[Any, dict[str, Any], Engine, NotedPeers]:
    """The network of one rank, what a step calls it with, its engine, and its peers, which are absent."""
    (network, inputs), device = on_meta(model, size), torch.device("meta")
    peers = NotedPeers(RANK, ranks, device)
    peers.fills = False
    parallelizing = import_module("distriray.parallel.parallelize")  # which the function of that name hides
    with patch.object(parallelizing, "_share_random_state", lambda communicator: None):
        config = ParallelConfig(
            exchange=exchange,
            attention=attention,
            warmup_steps=1,
            cache_interval=2 if short else 1,
            cfg_parallel=split,
            cuda_graphs=False,
        )
        parallelize(network, peers, config)
    engine = engine_of(network)
    assert engine is not None
    return network, inputs, engine, peers


def share(
    model: Published,
    size: int,
    ranks: int,
    split: bool,
    exchange: ExchangeMode,
    attention: AttentionMode = "gather",
    short: bool = False,
) -> tuple[Count, NotedPeers, int]:
    """One rank's part of a step of an image that has settled: its count, its peers, its buffers' bytes."""
    network, inputs, engine, peers = in_gang(model, size, ranks, split, exchange, attention, short)
    with engine.image():
        for step in range(WHOLE_AT_FIRST + 1 if short else SETTLING + 1):
            engine.announce_more()
            peers.begin_step()
            with counting() as count:
                model.call(network, model.timestep_on("meta", 900.0 - step), inputs)
    return count, peers, engine.buffer_bytes


if __name__ == "__main__":
    main()
