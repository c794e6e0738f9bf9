"""Qwen-Image 2.1 in gangs: kept keys and values, condition images, padded text, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage21 import (
    QwenImage21AttnProcessor,
    QwenImage21FlexAttnProcessor,
    QwenImage21KVCache,
)
from peft import LoraConfig
from torch.utils._pytree import tree_map_only

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.collective.absent import AbsentPeers
from distriray.errors import GangMismatch, InvalidRequest, UnsupportedModel
from distriray.parallel import engine_of, graphs
from distriray.parallel.engine import Engine
from distriray.parallel.networks.families import qwen_image21
from tests.models import TEXT_WIDTH, tiny_qwen_image21_transformer
from tests.parameters import pairwise
from tests.unit.parallel.recorded import RecordedGraphs
from tests.unit.parallel.stand_in import DEVICE, StandIn
from tests.unit.parallel.transformers import error, noise

STEPS = 3
LAYERS = 3
BRANCHES = "cond", "uncond"
CLOSE = 1e-6
"""Of the largest value, after as many steps: a call of the network differs by less than 3e-7."""


@dataclass(frozen=True)
class Scene:
    """What is drawn: its sizes in tokens.

    Attributes:
        image: rows and columns.
        conditions: those of condition images, which stand within the text one behind the other.
        padded: tokens at the end of the last image's text that are padding.
        text: tokens of the text before the condition images and behind them, of each branch.
        said: which text it is.
    """

    image: tuple[int, int] = (6, 6)
    conditions: tuple[tuple[int, int], ...] = ()
    padded: int = 0
    text: tuple[tuple[int, int], tuple[int, int]] = field(default=((3, 4), (2, 2)))
    said: int = 5

    def inputs(self, branch: int, batch: int) -> dict[str, Any]:
        """What the network is called with but for latents and timestep."""
        slots = sum(rows * columns // 4 for rows, columns in self.conditions)
        before, behind = self.text[branch]
        length = before + slots + behind
        position = torch.arange(length + self.image[0] * self.image[1] // 4)
        mask = (position >= before) & (position < before + slots) | (position >= length)
        inputs = {
            "encoder_hidden_states": noise(self.said + branch, batch, length, TEXT_WIDTH),
            "img_shapes": [[*((1, *size) for size in self.conditions), (1, *self.image)]] * batch,
            "img_mask": mask.expand(batch, -1),
        }
        if self.padded:
            valid = torch.ones(batch, length, dtype=torch.bool)
            valid[-1, length - self.padded :] = False
            inputs["encoder_hidden_states_mask"] = valid
        return inputs

    def latents(self, batch: int) -> torch.Tensor:
        return noise(1, batch, self.image[0] * self.image[1], 16)

    def references(self, batch: int) -> torch.Tensor:
        """Latents of the condition images."""
        return noise(2, batch, sum(rows * columns for rows, columns in self.conditions), 16)


PLAIN, PADDED = Scene(), Scene(image=(6, 10), padded=2)
EDIT = Scene(conditions=((4, 2), (2, 6)))
PADDED_EDIT = Scene(conditions=((2, 2), (4, 4)), padded=1)
SCENES = [PLAIN, PADDED, EDIT, PADDED_EDIT]


def draw(
    network: Any, scene: Scene, keeps: bool, batch: int = 2, steps: int = STEPS, at_step: int = 0
) -> list[torch.Tensor]:
    """The latents after each step, with a call for each branch, as the pipeline makes them.

    `at_step` is where a gang goes on with the image of another one.
    """
    latents, references, drawn = scene.latents(batch), scene.references(batch), []
    latents, references = latents.to(network.device), references.to(network.device)
    caches = [QwenImage21KVCache(LAYERS) if keeps else None for _ in BRANCHES]
    inputs = [scene.inputs(index, batch) for index in range(len(BRANCHES))]
    inputs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(network.device), inputs)
    engine = engine_of(network)
    with nullcontext() if engine is None else engine.image(at_step):
        for step in range(steps):
            said = []
            for name, cache, given in zip(BRANCHES, caches, inputs, strict=True):
                with network.cache_context(name):
                    predicted = network(
                        hidden_states=torch.cat([references, latents], 1),
                        timestep=latents.new_full((batch,), 1 - step / steps),
                        kv_cache=cache,
                        kv_cache_mode=None if cache is None else "cached" if step else "extract",
                        return_dict=False,
                        **given,
                    )[0]
                said.append(predicted[:, -latents.shape[1] :])
            latents = latents - (said[1] + 2.0 * (said[0] - said[1])) / steps
            drawn.append(latents)
    return drawn


def gang(
    ranks: int, scene: Scene, keeps: bool, made: dict[str, Any] | None = None, **config: Any
) -> list[torch.Tensor]:
    """The same of rank 0, after checking that all ranks have it."""
    config = {"exchange": "sync", "cfg_parallel": False, **config}

    def rank(communicator: Communicator) -> list[torch.Tensor]:
        network = tiny_qwen_image21_transformer(**(made or {}))
        return draw(parallelize(network, communicator, ParallelConfig(**config)), scene, keeps)

    everyone = run_in_lockstep(ranks, rank)
    for latents in everyone[1:]:
        assert all(map(torch.equal, latents, everyone[0]))
    return everyone[0]


def furthest(these: list[torch.Tensor], those: list[torch.Tensor]) -> float:
    return max(map(error, these, those))


@pytest.mark.parametrize(
    ("scene", "keeps", "ranks", "attention"),
    pairwise(SCENES, [False, True], [2, 3, 5], ["gather", "ulysses"]),
)
def test_sync_is_one_device_with_and_without_kept_keys_and_values(
    scene: Scene, keeps: bool, ranks: int, attention: Any
) -> None:
    heads = {"num_attention_heads": 30}
    expected = draw(tiny_qwen_image21_transformer(**heads), scene, keeps)
    assert furthest(gang(ranks, scene, keeps, heads, attention=attention), expected) < CLOSE


@pytest.mark.parametrize("scene", SCENES)
def test_a_call_is_within_rounding_of_one_device(scene: Scene) -> None:
    (expected,) = draw(tiny_qwen_image21_transformer(), scene, False, steps=1)

    def rank(communicator: Communicator) -> torch.Tensor:
        config = ParallelConfig(exchange="sync", cfg_parallel=False)
        network = parallelize(tiny_qwen_image21_transformer(), communicator, config)
        return draw(network, scene, True, steps=1)[0]

    for ours in run_in_lockstep(3, rank):
        assert error(ours, expected) < 3e-7


@pytest.mark.parametrize("scene", [PADDED, EDIT])
def test_a_prefix_that_goes_by_the_timestep_is_computed_in_each_step(scene: Scene) -> None:
    made = {"causal_condition": False}
    expected = draw(tiny_qwen_image21_transformer(**made), scene, False)
    assert furthest(expected, draw(tiny_qwen_image21_transformer(), scene, False)) > 1e-3
    assert furthest(gang(3, scene, False, made), expected) < CLOSE


@pytest.mark.parametrize(
    ("scene", "other"),
    [(PLAIN, Scene(padded=2)), (EDIT, Scene(conditions=EDIT.conditions[::-1]))],
)
def test_what_is_padded_and_how_condition_images_lie_counts(scene: Scene, other: Scene) -> None:
    network = tiny_qwen_image21_transformer()
    assert furthest(draw(network, scene, True), draw(network, other, True)) > 1e-3


@pytest.mark.parametrize("exchange", ["displaced", "compressed", "none"])
def test_other_modes_keep_keys_and_values_too(exchange: Any) -> None:
    """To what they draw without: the prefix is each rank's own."""
    kept, anew = (gang(3, PADDED_EDIT, keeps, exchange=exchange, warmup_steps=1) for keeps in (True, False))
    assert furthest(kept, anew) < CLOSE
    expected = draw(tiny_qwen_image21_transformer(), PADDED_EDIT, True)
    assert error(kept[-1], expected[-1]) < 0.5
    if exchange != "none":
        assert error(kept[0], expected[0]) < CLOSE < error(kept[-1], expected[-1])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("scene", [PADDED, EDIT])
def test_halves_of_a_gang_keep_those_of_their_images(scene: Scene, ranks: int) -> None:
    expected = draw(tiny_qwen_image21_transformer(), scene, True)
    assert furthest(gang(ranks, scene, True, cfg_parallel=True), expected) < CLOSE


def call(network: Any, mode: str, cache: Any, batch: int = 2) -> torch.Tensor:
    predicted: torch.Tensor = network(
        hidden_states=PLAIN.latents(batch),
        timestep=torch.full((batch,), 0.5),
        kv_cache=cache,
        kv_cache_mode=mode,
        return_dict=False,
        **PLAIN.inputs(0, batch),
    )[0]
    return predicted


def test_what_one_gang_kept_another_goes_on_with() -> None:
    network, cache = tiny_qwen_image21_transformer(), QwenImage21KVCache(LAYERS)
    call(network, "extract", cache)
    expected = call(network, "cached", cache)

    def rank(communicator: Communicator) -> None:
        network, cache = tiny_qwen_image21_transformer(), QwenImage21KVCache(LAYERS)
        for halves in (False, True, False):
            config = ParallelConfig(exchange="sync", cfg_parallel=halves)
            parallelize(network, communicator, config)
            if cache.get_layer(0).k is None:
                call(network, "extract", cache)
            assert error(call(network, "cached", cache), expected) < CLOSE

    run_in_lockstep(4, rank)


def test_what_a_half_kept_is_not_taken_for_the_whole() -> None:
    def rank(communicator: Communicator) -> None:
        network, cache = tiny_qwen_image21_transformer(), QwenImage21KVCache(LAYERS)
        parallelize(network, communicator, ParallelConfig(exchange="sync", cfg_parallel=True))
        call(network, "extract", cache)
        parallelize(network, communicator, ParallelConfig(exchange="sync", cfg_parallel=False))
        call(network, "cached", cache)

    with pytest.raises(InvalidRequest, match="kv_cache of 1 images, where this rank .* 0 to 2 of 2; make it"):
        run_in_lockstep(2, rank)


def test_a_cache_of_other_images_is_refused() -> None:
    network, cache = (
        parallelize(tiny_qwen_image21_transformer(), connect("local")),
        QwenImage21KVCache(LAYERS),
    )
    call(network, "extract", cache, batch=1)
    with pytest.raises(InvalidRequest, match="kv_cache of 1 images"):
        call(network, "cached", cache)


def test_ranks_that_kept_something_else_are_told_so() -> None:
    def rank(communicator: Communicator) -> None:
        network, cache = tiny_qwen_image21_transformer(), QwenImage21KVCache(LAYERS)
        call(network, "extract", cache)
        kept = cache.get_layer(1).k
        assert kept is not None
        kept += communicator.rank
        parallelize(network, communicator, ParallelConfig(exchange="sync", cfg_parallel=False))
        call(network, "cached", cache)

    with pytest.raises(GangMismatch, match="kept keys and values"):
        run_in_lockstep(2, rank)


def test_a_step_sends_nothing_of_the_prefix() -> None:
    def rank(communicator: Communicator, scene: Scene) -> int:
        network = parallelize(tiny_qwen_image21_transformer(), communicator, ParallelConfig(exchange="sync"))
        draw(network, scene, False, batch=1)
        engine = engine_of(network)
        assert engine is not None
        return engine.statistics.bytes_sent

    without, longer = (
        run_in_lockstep(2, lambda communicator, scene=scene: rank(communicator, scene))
        for scene in (PLAIN, Scene(conditions=((4, 4),), text=((9, 3), (8, 8))))
    )
    assert without == longer


def test_what_is_returned_is_of_the_images_tokens_alone_in_a_gang_of_one_too() -> None:
    network, cache = tiny_qwen_image21_transformer(), QwenImage21KVCache(LAYERS)
    expected = call(network, "extract", cache)
    parallelize(network, connect("local"))
    ours = call(network, "extract", QwenImage21KVCache(LAYERS))
    assert ours.shape[1] == 36 < expected.shape[1] and torch.equal(ours, expected[:, -36:])


def flex(network: Any) -> None:
    network.set_attn_processor(QwenImage21FlexAttnProcessor())


def flex_in_one(network: Any) -> None:
    network.transformer_blocks[1].attn.set_processor(QwenImage21FlexAttnProcessor())


@pytest.mark.parametrize(("change", "block"), [(flex, 0), (flex_in_one, 1)])
def test_flex_attention_is_refused_with_what_to_do(change: Callable[[Any], None], block: int) -> None:
    network = tiny_qwen_image21_transformer()
    change(network)
    advice = r"set_attn_processor\(QwenImage21AttnProcessor\(\)\)"
    with pytest.raises(UnsupportedModel, match=f"transformer_blocks.{block}.attn uses .*Flex.*{advice}"):
        parallelize(network, connect("local"))
    network.set_attn_processor(QwenImage21AttnProcessor())
    parallelize(network, connect("local"))


def captured(communicator: Communicator, **config: Any) -> tuple[Any, Engine, RecordedGraphs]:
    """A network, in a gang that captures its steps."""
    network = parallelize(tiny_qwen_image21_transformer(), communicator, ParallelConfig(**config))
    engine, maker = engine_of(network), RecordedGraphs()
    assert engine is not None
    engine.capture_with(maker)
    return network, engine, maker


@pytest.mark.parametrize(
    ("scene", "ranks", "exchange"),
    [(PLAIN, 1, "sync"), (PADDED, 2, "sync"), (EDIT, 3, "displaced"), (PADDED_EDIT, 2, "none")],
)
def test_steps_whose_prefix_is_kept_are_captured(scene: Scene, ranks: int, exchange: Any) -> None:
    config = {"exchange": exchange, "warmup_steps": 1, "cfg_parallel": False}

    def rank(communicator: Communicator) -> None:
        network, engine, maker = captured(communicator, **config)
        found = [draw(network, scene, True, steps=5) for _ in range(2)]
        assert engine.graphs.obstacle is None
        replays = [graph.replays for graph in maker.made]
        assert sum(replays) > 4 * len(BRANCHES)
        engine.capture_with(None)
        for latents in found:
            assert all(map(torch.equal, latents, draw(network, scene, True, steps=5)))

    run_in_lockstep(ranks, rank)


@pytest.mark.parametrize("at_step", [0, 20])
@pytest.mark.parametrize(
    ("scene", "ranks", "exchange"),
    [(PLAIN, 1, "sync"), (EDIT, 1, "sync"), (PADDED_EDIT, 2, "sync"), (EDIT, 3, "displaced")],
)
def test_short_steps_take_the_kept_keys_and_values_of_the_first_block(
    scene: Scene, ranks: int, exchange: Any, at_step: int
) -> None:
    config = {"exchange": exchange, "warmup_steps": 1, "cfg_parallel": False, "cache_interval": 2}

    def rank(communicator: Communicator) -> None:
        network, engine, _ = captured(communicator, **config)
        found = [draw(network, scene, True, steps=8, at_step=at_step) for _ in range(2)]
        assert engine.graphs.obstacle is None
        engine.capture_with(None)
        launched = draw(network, scene, True, steps=8, at_step=at_step)
        for latents in found:
            assert all(map(torch.equal, latents, launched))
        if exchange == "sync" and not at_step:  # a cache is filled in a whole step, and the next one is too
            assert furthest(launched, draw(network, scene, False, steps=8)) < CLOSE

    run_in_lockstep(ranks, rank)


def test_graphs_of_kept_prefixes_outlive_an_image() -> None:
    """Though positions of the network are in a new list then."""
    network, engine, maker = captured(connect("local"))
    made = []
    for _ in range(3):
        draw(network, EDIT, True, steps=5)
        made.append(len(maker.made))
    assert 0 < made[0] == made[1] == made[2]


@pytest.mark.parametrize(
    ("scene", "ranks", "split"), [(EDIT, 1, False), (PADDED_EDIT, 2, False), (EDIT, 2, True)]
)
def test_a_kept_prefix_that_is_large_is_read_where_it_is(
    monkeypatch: pytest.MonkeyPatch, scene: Scene, ranks: int, split: bool
) -> None:
    """By graphs of its own: images whose prefixes are of one size, and not in one place, each get theirs."""
    monkeypatch.setattr(qwen_image21, "MOST_COPIED", 1000)
    other = replace(scene, said=20)

    def rank(communicator: Communicator) -> None:
        network, engine, maker = captured(communicator, exchange="sync", cfg_parallel=split)
        found, made = [], []
        for each in (scene, other, scene):
            found.append(draw(network, each, True, steps=5))
            made.append(len(maker.made))
        assert engine.graphs.obstacle is None
        assert 0 < made[0] < made[1] < made[2] and all(graph.replays for graph in maker.made)
        engine.capture_with(None)
        for each, latents in zip((scene, other, scene), found, strict=True):
            assert all(map(torch.equal, latents, draw(network, each, True, steps=5)))

    run_in_lockstep(ranks, rank)


@pytest.mark.parametrize(("most", "copies"), [(2**20, 2 * len(BRANCHES) * LAYERS), (1000, 0)])
def test_a_graph_has_no_copy_of_what_it_reads_where_it_is(
    monkeypatch: pytest.MonkeyPatch, most: int, copies: int
) -> None:
    copied, own = [], graphs._copied

    def watched(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tuple(tensor.shape))
        return own(tensor)

    monkeypatch.setattr(graphs, "_copied", watched)
    monkeypatch.setattr(qwen_image21, "MOST_COPIED", most)
    network, _, maker = captured(connect("local"))
    draw(network, EDIT, True, steps=5)
    heads = network.config.num_attention_heads, network.config.attention_head_dim
    assert maker.made and sum(shape[2:] == heads for shape in copied) == copies, copied


@pytest.mark.parametrize("scene", SCENES)
def test_a_step_whose_prefix_is_kept_stops_no_device(scene: Scene) -> None:
    network, cache = tiny_qwen_image21_transformer(), QwenImage21KVCache(LAYERS)
    with StandIn() as device, torch.no_grad():
        device.take(network)
        parallelize(network, AbsentPeers(0, 2, DEVICE), ParallelConfig(cfg_parallel=False))
        given = {
            name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
            for name, value in scene.inputs(0, 2).items()
        }
        tokens = torch.cat([scene.references(2), scene.latents(2)], 1).to(DEVICE)
        engine, counted = engine_of(network), []
        assert engine is not None
        compute = engine.network.compute

        def watched(call: Any, share: Any, collect: Any) -> Any:
            device.stops.clear()
            counted.append(device.stops)

            def apart(part: torch.Tensor) -> torch.Tensor:
                """A gather is between graphs."""
                counted[-1], whole = list(device.stops), collect(part)
                return whole

            return compute(call, share, apart)

        engine.network.compute = watched  # type: ignore[method-assign]
        with engine.image():
            for step in range(4):
                timestep = torch.full((2,), 1 - step / 4).to(DEVICE)
                mode = "cached" if step else "extract"
                network(tokens, timestep=timestep, kv_cache=cache, kv_cache_mode=mode, **given)
    assert counted[0] and counted[1] and not any(counted[2:]), counted


def test_the_scale_of_adapters_is_of_steps_whose_prefix_is_kept_too() -> None:
    def drawn(parallel: bool, scale: float) -> torch.Tensor:
        network, cache = tiny_qwen_image21_transformer(), QwenImage21KVCache(LAYERS)
        network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "img_in"], init_lora_weights=False))
        torch.manual_seed(3)
        for name, weight in network.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.5)
        if parallel:
            parallelize(network, connect("local"))
        given = {"hidden_states": PLAIN.latents(2), "timestep": torch.full((2,), 0.5), **PLAIN.inputs(0, 2)}
        given |= {"kv_cache": cache, "attention_kwargs": {"scale": scale}, "return_dict": False}
        network(kv_cache_mode="extract", **given)
        predicted: torch.Tensor = network(kv_cache_mode="cached", **given)[0]
        return predicted

    assert torch.equal(drawn(True, 0.5), drawn(False, 0.5))
    assert error(drawn(True, 0.5), drawn(True, 1.0)) > 1e-3


def test_a_mask_that_is_another_is_looked_at_anew() -> None:
    network, cache = tiny_qwen_image21_transformer(), QwenImage21KVCache(LAYERS)
    parallelize(network, connect("local"))
    given = {"hidden_states": PLAIN.latents(2), "timestep": torch.full((2,), 0.5)}
    network(kv_cache=cache, kv_cache_mode="extract", **given, **PLAIN.inputs(0, 2))
    for scene in (PLAIN, Scene(padded=1), Scene(padded=2), PLAIN):
        call = {**given, **scene.inputs(0, 2), "kv_cache": cache, "kv_cache_mode": "cached"}
        assert torch.equal(network(**call).sample, tiny_qwen_image21_transformer()(**call).sample)


def test_what_stands_in_the_place_of_the_forward_is_called_with_a_kept_prefix_too() -> None:
    network, cache = tiny_qwen_image21_transformer(), QwenImage21KVCache(LAYERS)
    own, modes = network.forward, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        modes.append(kwargs["kv_cache_mode"])
        return own(*args, **kwargs)

    network.forward = watched
    parallelize(network, connect("local"), local=[watched])
    for mode in ("extract", "cached"):
        call(network, mode, cache)
    assert modes == ["extract", "cached"]
