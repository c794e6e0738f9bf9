"""What an image's buffers take is known before there are any, and refused where it is too much."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import cycle, product
from typing import Any

import pytest
import torch
from peft import LoraConfig

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.collective.absent import AbsentPeers
from distriray.config import MIXES, Mix
from distriray.denoise import Denoiser
from distriray.errors import OutOfMemory
from distriray.parallel import engine_of
from distriray.parallel.exchange import exchange as exchanges
from distriray.parallel.exchange.exchange import BUCKET_BYTES
from distriray.parallel.networks.base import Network
from distriray.parallel.networks.controlnet import split
from distriray.parallel.networks.controls import UsedControl
from distriray.parallel.room import Room, buffer_bytes
from distriray.requests import SamplingParams
from tests.models import (
    SHALLOW,
    SHALLOW_SD,
    tiny_controlnet,
    tiny_qwen_image,
    tiny_sd15,
    tiny_sdxl,
    tiny_sdxl_unet,
)
from tests.parameters import pairwise
from tests.unit.parallel.test_mixes import INPUTS, sample
from tests.unit.parallel.transformers import TRANSFORMERS, Shape, draw

MODES: list[dict[str, Any]] = [
    {"exchange": "sync", "attention": "gather"},
    {"exchange": "sync", "attention": "ulysses"},
    {"exchange": "compressed"},
    {"exchange": "displaced"},
    {"exchange": "displaced_attention"},
]
IN_TURN = [(*each, mode) for each, mode in zip(product(TRANSFORMERS, [2, 3, 4]), cycle(MODES), strict=False)]
"""Each family by 2, 3 and 4 ranks, and these in each mode."""
U_NETS = [
    partial(tiny_sdxl, **SHALLOW | {"attention_head_dim": (1, 8)}),
    partial(tiny_sd15, **SHALLOW_SD | {"attention_head_dim": 4}),
]
STALE_STATISTICS = Mix(statistics="stale", halos_width="int8")
"""Of which no step may send a norm's statistics with the rows of its convolution."""
TOLD = "gpu7 has 0.0 GB free beside weights of 1.0 GB"


def watched(network: Network) -> list[Any]:
    """The calls of a network from now on."""
    calls, read = [], network.read

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(read(*args, **kwargs))
        return calls[-1]

    network.read = noted  # type: ignore[method-assign]
    return calls


def told_and_held(
    communicator: Communicator, made: Any, run: Callable[[Any], object], config: ParallelConfig
) -> tuple[int, int]:
    """Bytes of buffers as they are estimated for a rank's gang, and as they are after some steps."""
    network = parallelize(made, communicator, config)
    engine = engine_of(network)
    assert engine is not None
    calls = watched(engine.network)
    for _ in range(2):  # the second image fills the buffers of the first
        run(network)
    held = engine.buffer_bytes
    return engine.buffer_bytes_of(calls[:1], communicator.world_size, config), held


@pytest.mark.parametrize(("name", "ranks", "mode"), IN_TURN)
def test_buffers_of_a_transformer_are_what_was_estimated(name: str, ranks: int, mode: dict[str, Any]) -> None:
    transformer, config = TRANSFORMERS[name], ParallelConfig(warmup_steps=1, cfg_parallel=False, **mode)

    def rank(communicator: Communicator) -> tuple[int, int]:
        made = transformer.make(**transformer.twelve_heads)
        return told_and_held(communicator, made, lambda net: draw(net, transformer, Shape(), 2), config)

    everyone = run_in_lockstep(ranks, rank)
    told = {told for told, _ in everyone}
    assert told == {max(held for _, held in everyone)}


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("flux", 4), ("flux", 5), ("flux3", 3), ("flux3-references", 4), ("flux3-references", 6)],
)
def test_the_rank_that_needs_most_is_among_those_that_an_estimate_looks_at(name: str, ranks: int) -> None:
    transformer = TRANSFORMERS[name]
    config = ParallelConfig(exchange="sync", attention="ulysses", cfg_parallel=False)

    def rank(communicator: Communicator) -> tuple[int, int]:
        made, shape = transformer.make(**transformer.twelve_heads), Shape(text=6, batch=1)
        return told_and_held(communicator, made, lambda net: draw(net, transformer, shape, 1), config)

    everyone = run_in_lockstep(ranks, rank)
    assert {told for told, _ in everyone} == {max(held for _, held in everyone)}


def test_an_image_for_which_there_is_no_room_is_refused_with_its_bytes_before_anything_is_sent() -> None:
    transformer, config = TRANSFORMERS["flux"], ParallelConfig(exchange="displaced", warmup_steps=1)

    def rank(communicator: Communicator) -> tuple[int, int]:
        network = parallelize(transformer.make(), communicator, config)
        engine = engine_of(network)
        assert engine is not None
        for _ in range(2):
            draw(network, transformer, Shape(batch=1), 2)
        needed = engine.buffer_bytes
        engine.exchanges.room = Room(needed, TOLD)
        engine.join(communicator, config)
        draw(network, transformer, Shape(batch=1), 2)
        other = Shape(rows=4, batch=1)  # smaller: what was kept of the other shape makes room for it
        draw(network, transformer, other, 2)
        idle = engine.buffer_bytes
        engine.exchanges.room = Room(needed - 1, TOLD)
        sent = communicator.bytes_sent
        with pytest.raises(OutOfMemory, match=rf"0.0 GB of exchange buffers .* 'displaced', where {TOLD}"):
            draw(network, transformer, Shape(batch=1), 2)
        assert communicator.bytes_sent - sent < 3000 and engine.buffer_bytes == idle  # ranks compared inputs
        draw(network, transformer, other, 2)
        return needed, idle

    for needed, idle in run_in_lockstep(3, rank):
        assert idle < needed


@pytest.mark.parametrize("exchange", ["sync", "displaced"])
def test_buffers_of_controlnets_are_counted_where_a_call_names_them(exchange: Any) -> None:
    config = ParallelConfig(exchange=exchange, cfg_parallel=False, warmup_steps=1)
    unet, peers = tiny_sdxl_unet(), AbsentPeers(1, 3, torch.device("cpu"))
    control = tiny_controlnet(unet)
    embed, engine = split(control), engine_of(parallelize(unet, connect("local")))
    assert engine is not None
    network: Any = engine.network
    network.controls = {"edges": control}
    engine.join(peers, config)
    calls, known = watched(network), []
    controls = [UsedControl("edges", control, embed(torch.zeros(1, 3, 160, 96)), 1.0)]
    for named in ([], [], controls, controls):
        with engine.image():
            for step in range(2):
                unet(sample(step), 900.0 - step, **INPUTS, controls=named)
        share = network.share(calls[-1], peers, config)
        known.append(buffer_bytes(network, calls[-1], share, config))
    none, _, one, _ = known
    assert (none < one) == (exchange == "displaced")  # in sync layers borrow the same buffers
    assert engine.buffer_bytes == none + one  # exchanges of both are kept


@pytest.mark.parametrize("lacks", [None, 0, 1])
def test_a_mix_is_chosen_only_where_every_rank_has_room_for_it(lacks: int | None) -> None:
    """`auto` needs what `sync` does, and is refused where there is not even that."""

    def rank(communicator: Communicator) -> list[Any]:
        config = ParallelConfig(max_wait=0.0, cfg_parallel=False)  # the mix that waits least is asked for
        unet: Any = parallelize(tiny_sdxl_unet(), communicator, config)
        engine, drawn = engine_of(unet), list[Any]()
        assert engine is not None
        calls = watched(engine.network)

        def image() -> int:
            with engine.image():
                for step in range(6):
                    unet(sample(step), 900.0 - step, **INPUTS)
                drawn.append(engine.exchange)
                return sum(branch.needed for branch in engine._images.begun)

        image()
        sync, displaced = (
            Room(0, TOLD).needed(engine.network, calls[0], communicator, config, MIXES[name])
            for name in ("sync", "displaced")
        )
        assert sync <= engine.buffer_bytes_of(calls[:1], 2, config) < displaced
        engine.exchanges.room = Room(displaced - (communicator.rank == lacks), TOLD)
        assert image() == (displaced if lacks is None else sync)
        engine.exchanges.room = Room(sync, TOLD)
        image()
        engine.exchanges.room = Room(sync - 1, TOLD)
        with pytest.raises(OutOfMemory, match="which begins with 'sync', where"):
            image()
        return drawn

    chosen = "displaced" if lacks is None else "sync"
    assert run_in_lockstep(2, rank) == [["sync", chosen, "sync"]] * 2


def test_what_is_known_of_a_shape_is_known_of_each_rank() -> None:
    transformer, config = TRANSFORMERS["sd3"], ParallelConfig(exchange="sync", attention="ulysses")
    network = parallelize(transformer.make(**transformer.twelve_heads), connect("local"), config)
    engine, room = engine_of(network), Room(0, TOLD)
    assert engine is not None
    calls = watched(engine.network)
    draw(network, transformer, Shape(batch=1), 1)
    ranks = [AbsentPeers(rank, 3, torch.device("meta")) for rank in range(3)]
    shares = (engine.network.share(calls[0], rank, config) for rank in ranks)
    own = [buffer_bytes(engine.network, calls[0], share, config) for share in shares]
    assert len(set(own)) > 1
    assert [room.needed(engine.network, calls[0], rank, config) for rank in ranks] == own


def draw_some(unet: Any) -> None:
    engine = engine_of(unet)
    assert engine is not None
    with engine.image():
        for step in range(2):
            unet(sample(step), 900.0 - step, **INPUTS)


def adapt(network: Any, *layers: str) -> Any:
    torch.manual_seed(0)  # of the adapter
    network.add_adapter(LoraConfig(r=2, target_modules=list(layers)))
    return network


def adapted_unet() -> Any:
    return adapt(tiny_sdxl_unet(**SHALLOW), "conv1", "conv", "conv_shortcut", "to_k")


@pytest.mark.parametrize(
    ("exchange", "in_use"), [("displaced", True), ("displaced", False), (STALE_STATISTICS, True)], ids=str
)
def test_buffers_of_adapted_convolutions_are_what_was_estimated(exchange: Any, in_use: bool) -> None:
    config = ParallelConfig(exchange=exchange, warmup_steps=1, cfg_parallel=False)

    def rank(communicator: Communicator) -> tuple[int, int]:
        unet = adapted_unet()
        if not in_use:
            unet.disable_adapters()
        return told_and_held(communicator, unet, draw_some, config)

    everyone = run_in_lockstep(3, rank)
    assert {told for told, _ in everyone} == {max(held for _, held in everyone)}


def test_what_is_known_of_a_shape_is_known_by_the_adapters_in_use() -> None:
    config, peers = ParallelConfig(exchange="displaced"), AbsentPeers(1, 3, torch.device("meta"))
    unet, room = adapted_unet(), Room(0, TOLD)
    engine = engine_of(parallelize(unet, connect("local"), config))
    assert engine is not None
    calls = watched(engine.network)
    unet(sample(0), 900.0, **INPUTS)
    needed = partial(room.needed, engine.network, calls[0], peers, config)
    adapted = needed()
    unet.disable_adapters()
    assert needed() < adapted
    unet.enable_adapters()
    assert needed() == adapted


def test_what_is_known_of_a_shape_is_known_by_the_adapters_of_controlnets() -> None:
    config, peers = ParallelConfig(exchange="displaced"), AbsentPeers(1, 3, torch.device("meta"))
    unet, room = tiny_sdxl_unet(), Room(0, TOLD)
    control = tiny_controlnet(unet)
    embed, engine = split(adapt(control, "conv")), engine_of(parallelize(unet, connect("local"), config))
    assert engine is not None
    network: Any = engine.network
    network.controls = {"edges": control}
    calls = watched(network)
    controls = [UsedControl("edges", control, embed(torch.zeros(1, 3, 160, 96)), 1.0)]
    unet(sample(0), 900.0, **INPUTS, controls=controls)
    needed = partial(room.needed, network, calls[0], peers, config)
    adapted = needed()
    control.disable_adapters()
    assert needed() < adapted


def test_what_is_known_of_a_shape_is_forgotten_where_an_adapter_is_replaced_by_another_of_its_name() -> None:
    config, peers = ParallelConfig(exchange="displaced"), AbsentPeers(1, 3, torch.device("meta"))
    unet: Any = tiny_sdxl_unet()
    engine = engine_of(parallelize(unet, connect("local"), config))
    assert engine is not None
    room = engine.exchanges.room = Room(10**9, TOLD)
    calls, known = watched(engine.network), []
    for layer in ("downsamplers.0.conv", "upsamplers.0.conv"):  # there are as many of both
        draw_some(adapt(unet, layer))
        share = engine.network.share(calls[-1], peers, config)
        known.append(buffer_bytes(engine.network, calls[-1], share, config))
        assert room.needed(engine.network, calls[-1], peers, config) == known[-1]
        unet.unload_lora()
    assert known[0] != known[1]


@pytest.mark.parametrize("exchange", ["sync", "displaced"])
def test_layers_of_one_shape_share_a_buffer_whatever_memory_formats_their_inputs_have(exchange: Any) -> None:
    config = ParallelConfig(exchange=exchange, warmup_steps=1, cfg_parallel=False)

    def rank(communicator: Communicator) -> tuple[int, int]:
        unet: Any = tiny_sdxl_unet(**SHALLOW).to(memory_format=torch.channels_last)
        return told_and_held(communicator, unet, draw_some, config)

    everyone = run_in_lockstep(2, rank)
    assert {told for told, _ in everyone} == {max(held for _, held in everyone)}


def test_buffers_of_branches_that_have_calls_of_their_own_count_together() -> None:
    def rank(communicator: Communicator) -> list[bool]:
        config = ParallelConfig(exchange="displaced", cfg_parallel=False)
        pipeline = parallelize(tiny_qwen_image(), communicator, config)
        denoiser, engine = Denoiser(pipeline), engine_of(pipeline)
        assert engine is not None
        asked = SamplingParams(prompt="a lake", seed=1, height=64, width=64, num_inference_steps=2)
        calls = denoiser.calls(asked)
        assert len(calls) == 2
        state, fits = denoiser.prepare(asked), []
        needed = engine.buffer_bytes_of(calls, communicator.world_size, engine.config)
        for nbytes in (needed - 1, needed):
            engine.exchanges.room = Room(nbytes, TOLD)
            with nullcontext() if nbytes == needed else pytest.raises(OutOfMemory):
                denoiser.step(state)
            fits.append(state.step == 1)
        assert needed > engine.buffer_bytes > needed / 2
        return fits

    assert run_in_lockstep(2, rank) == [[False, True]] * 2


@pytest.mark.parametrize(
    ("make", "mode", "ranks", "split", "bucket_bytes"),
    pairwise(U_NETS, MODES, [2, 3, 4], [False, True], [BUCKET_BYTES, 256]),
)
def test_buffers_of_a_unet_are_what_was_estimated(
    make: Callable[[], Any],
    mode: dict[str, Any],
    ranks: int,
    split: bool,
    bucket_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exchanges, "BUCKET_BYTES", bucket_bytes)
    config = ParallelConfig(warmup_steps=1, cfg_parallel="auto" if split else False, **mode)

    def rank(communicator: Communicator) -> tuple[int, int]:
        def run(pipeline: Any) -> None:
            size = {"height": 208, "width": 72, "num_inference_steps": 2, "output_type": "latent"}
            pipeline("a lake", generator=torch.Generator().manual_seed(7), **size)

        return told_and_held(communicator, make(), run, config)

    everyone = run_in_lockstep(ranks, rank)
    (told,) = {told for told, _ in everyone}
    assert told == max(held for _, held in everyone)
