"""Guidance branches that have calls of their own, of which each half of a gang makes one."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import pytest
import torch

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.errors import GangMismatch, InvalidRequest, OutOfMemory
from distriray.parallel import engine_of
from distriray.parallel.engine import Engine
from distriray.parallel.room import Room
from tests.parameters import pairwise
from tests.unit.parallel.recorded import RecordedGraphs
from tests.unit.parallel.transformers import TRANSFORMERS, Shape, Transformer, error

CPU = torch.device("cpu")
AUTO: Literal["auto"] = "auto"
FAMILIES = sorted(TRANSFORMERS.keys() - {"z-image"})  # whose network takes and gives lists of pictures
LENGTHS = {"cond": 7, "uncond": 4}
STEPS = 4


def arguments(
    transformer: Transformer,
    latents: torch.Tensor | None,
    sigma: float,
    batch: int = 2,
    device: torch.device = CPU,
) -> dict[str, dict[str, Any]]:
    """Of one step, by branch: other texts of other lengths."""
    given: dict[str, dict[str, Any]] = {}
    for branch, length in LENGTHS.items():

        def note(branch: str = branch, **call: Any) -> list[torch.Tensor]:
            given[branch] = call
            return [call["hidden_states"]]

        inputs = transformer.inputs_on(device, Shape(text=length, batch=batch))
        if latents is not None:
            inputs["hidden_states"] = latents
        timestep = torch.full((batch,), sigma * transformer.scale, device=device)
        transformer.predict(note, timestep, inputs)
        del given[branch]["return_dict"]
        for name, value in given[branch].items():
            if name.startswith(("encoder_hidden_states", "text_bth")) and value.is_floating_point():
                given[branch][name] = value + 0.1 * length
    return given


def drawn(
    network: Any, transformer: Transformer, apart: bool, batch: int = 2, steps: int = STEPS
) -> list[torch.Tensor]:
    """Latents after each step, with guidance, by a call for each branch or by one for both."""
    latents, found, engine = None, [], engine_of(network)
    with engine.image() if engine is not None else torch.no_grad():
        for step in range(steps):
            given = arguments(transformer, latents, 1 - step / steps, batch, network.device)
            before = given["cond"]["hidden_states"]
            if apart:
                outputs = [network(**call, return_dict=False)[0] for call in given.values()]
            else:  # what is the same may be given once
                shared = {"hidden_states": before} if step % 2 else {}
                own = {
                    name: {key: value for key, value in call.items() if key not in shared}
                    for name, call in given.items()
                }
                outputs = network(branches=own, **shared)
            size = before.shape[1]
            conditional, without = (output[:, -size:] if output.ndim == 3 else output for output in outputs)
            if conditional.shape != before.shape:  # variances that nobody asks for
                conditional, without = conditional[:, :size], without[:, :size]
            latents = before - (without + 2.0 * (conditional - without)) / steps
            found.append(latents)
    return found


def alone(name: str, batch: int = 2) -> list[torch.Tensor]:
    transformer = TRANSFORMERS[name]
    with torch.no_grad():
        return drawn(transformer.make(), transformer, apart=True, batch=batch)


def in_gang(communicator: Communicator, name: str, **config: Any) -> tuple[Any, Engine]:
    network = parallelize(TRANSFORMERS[name].make(), communicator, ParallelConfig(**config))
    engine = engine_of(network)
    assert engine is not None
    return network, engine


@pytest.mark.parametrize(("name", "ranks", "halves"), pairwise(FAMILIES, [1, 2, 3, 4], [True, False]))
def test_both_branches_of_any_family_are_one_devices(name: str, ranks: int, halves: bool) -> None:
    def rank(communicator: Communicator) -> tuple[list[torch.Tensor], int]:
        network, engine = in_gang(communicator, name, exchange="sync", cfg_parallel=AUTO if halves else False)
        return drawn(network, TRANSFORMERS[name], apart=False), engine.statistics.waits

    everyone, expected = run_in_lockstep(ranks, rank), alone(name)
    for latents, waits in everyone:
        assert all(map(torch.equal, latents, everyone[0][0]))
        assert max(map(error, latents, expected)) < 1e-5
        assert (waits > 1) == (ranks == 3 or ranks > 1 and not halves or ranks == 4)


@pytest.mark.parametrize("name", ["qwen-image", "hunyuan-image"])
def test_a_half_calls_its_network_once_a_step_and_sends_half_as_much(name: str) -> None:
    def rank(halves: Any, communicator: Communicator) -> tuple[int, int]:
        network, engine = in_gang(communicator, name, exchange="sync", cfg_parallel=halves)
        calls, compute = [], engine.network.compute

        def counted(*args: Any) -> Any:
            calls.append(args)
            return compute(*args)

        engine.network.compute = counted  # type: ignore[method-assign]
        drawn(network, TRANSFORMERS[name], apart=False)
        return len(calls), communicator.bytes_sent

    (calls, sent), (calls_in_turn, sent_in_turn) = (
        run_in_lockstep(4, partial(rank, halves))[0] for halves in (True, False)
    )
    assert (calls, calls_in_turn) == (STEPS, 2 * STEPS)
    assert sent < 0.75 * sent_in_turn  # keys and values of two thirds as many tokens to one peer of three


def test_old_values_are_of_a_ranks_own_branch() -> None:
    def rank(communicator: Communicator) -> tuple[list[torch.Tensor], list[bool]]:
        network, engine = in_gang(
            communicator, "qwen-image", exchange="displaced", warmup_steps=1, cfg_parallel=AUTO
        )
        synchronous: list[bool] = []
        network.register_forward_hook(lambda *_: synchronous.append(engine.statistics.synchronous))
        return drawn(network, TRANSFORMERS["qwen-image"], apart=False), synchronous

    expected = alone("qwen-image")
    for latents, synchronous in run_in_lockstep(4, rank):
        assert synchronous == [True, False, False, False]
        assert error(latents[0], expected[0]) < 1e-5 < error(latents[-1], expected[-1]) < 0.3


def test_a_step_without_guidance_begins_anew_on_all_ranks() -> None:
    """As the last ones of an image, where guidance ends."""
    transformer = TRANSFORMERS["qwen-image"]

    def rank(communicator: Communicator) -> list[bool]:
        network, engine = in_gang(
            communicator, "qwen-image", exchange="displaced", warmup_steps=1, cfg_parallel=AUTO
        )
        synchronous = []
        with engine.image():
            for step in range(6):
                given = arguments(transformer, None, 1 - step / 6)
                if step in (2, 3):
                    del given["uncond"]
                assert len(network(branches=given)) == len(given)
                synchronous.append(engine.statistics.synchronous)
        return synchronous

    assert run_in_lockstep(4, rank) == [[True, False] * 3] * 4


@pytest.mark.parametrize("branch", LENGTHS)
def test_a_rank_with_another_text_of_either_branch_is_named_on_all(branch: str) -> None:
    """Also of the branch that its half does not compute."""
    transformer = TRANSFORMERS["qwen-image"]

    def rank(communicator: Communicator) -> None:
        network, _ = in_gang(communicator, "qwen-image", exchange="sync")
        given = arguments(transformer, None, 1.0)
        if communicator.rank == 1:
            given[branch]["encoder_hidden_states"] = given[branch]["encoder_hidden_states"] + 1
        with pytest.raises(GangMismatch, match="rank 0 and rank 1 .* sum of the prompt embeddings"):
            network(branches=given)

    run_in_lockstep(4, rank)


def test_a_rank_without_the_second_branch_is_named_on_all() -> None:
    """Before anything of a size that depends on it is sent."""
    transformer = TRANSFORMERS["qwen-image"]

    def rank(communicator: Communicator) -> None:
        network, _ = in_gang(communicator, "qwen-image", exchange="sync")
        given = arguments(transformer, None, 1.0)
        if communicator.rank == 1:
            del given["uncond"]
        with pytest.raises(GangMismatch, match="rank 0 and rank 1 .* calls made at once 2 and 1"):
            network(branches=given)

    run_in_lockstep(4, rank)


@pytest.mark.parametrize("branch", LENGTHS)
def test_another_text_of_either_branch_is_another_image_on_all_ranks(branch: str) -> None:
    """Where nobody says which calls are of one image, both halves see the texts of both."""
    transformer, schedule = TRANSFORMERS["qwen-image"], torch.linspace(1.0, 0.25, 4)
    texts = {name: call["encoder_hidden_states"] for name, call in arguments(transformer, None, 1.0).items()}
    edited = {**texts, branch: texts[branch] + 1}

    def rank(communicator: Communicator) -> list[bool]:
        network, engine = in_gang(communicator, "qwen-image", exchange="displaced", warmup_steps=1)
        synchronous = []
        for step, timestep in enumerate(schedule):
            given = arguments(transformer, None, float(timestep))
            for name, text in (texts if step < 2 else edited).items():
                given[name] |= {"encoder_hidden_states": text, "timestep": timestep.expand(2)}
            network(branches=given)
            synchronous.append(engine.statistics.synchronous)
        return synchronous

    assert run_in_lockstep(4, rank) == [[True, False] * 2] * 4


def test_what_one_half_has_no_room_for_is_refused_by_both() -> None:
    transformer, config = TRANSFORMERS["qwen-image"], {"exchange": "displaced", "warmup_steps": 1}

    def rank(communicator: Communicator) -> int:
        network, engine = in_gang(communicator, "qwen-image", cfg_parallel=True, **config)
        given, read = arguments(transformer, None, 1.0), engine.network.read
        calls = [read(**call, return_dict=False) for call in given.values()]
        needed = engine.buffer_bytes_of(calls, communicator.world_size, engine.config)
        for room in (needed - 1, needed, needed):  # the second image fills the buffers of the first
            engine.exchanges.room = Room(room, "told")
            with engine.image():
                if room < needed:
                    with pytest.raises(OutOfMemory, match="exchange buffers"):
                        network(branches=given)
                    continue
                for _ in range(3):
                    network(branches=given)
        assert engine.buffer_bytes <= needed
        return engine.buffer_bytes - needed

    assert 0 in run_in_lockstep(4, rank)  # of the branch with more text


def test_steps_after_guidance_that_have_no_room_are_refused_by_all_ranks() -> None:
    """Halves of two ranks exchange nothing, and afterwards all share the image."""
    transformer = TRANSFORMERS["qwen-image"]

    def rank(communicator: Communicator) -> None:
        network, engine = in_gang(communicator, "qwen-image", exchange="displaced", warmup_steps=1)
        engine.exchanges.room, given = Room(0, "told"), arguments(transformer, None, 1.0, batch=1)
        with engine.image():
            network(branches=given)
            del given["uncond"]
            with pytest.raises(OutOfMemory, match="exchange buffers"):
                network(branches=given)

    run_in_lockstep(2, rank)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_what_is_predicted_may_be_lists_of_pictures(ranks: int) -> None:
    """As of Z-Image, whose network takes lists too."""
    transformer, timestep = TRANSFORMERS["z-image"], torch.full((2,), 0.5)
    inputs = transformer.inputs_on(CPU, Shape())
    images, text = list(inputs["hidden_states"][:, :, None]), inputs["cap_feats"]
    own = {"cond": {"cap_feats": text}, "uncond": {"cap_feats": [each[:4] for each in text]}}

    def rank(communicator: Communicator) -> list[Any]:
        network, _ = in_gang(communicator, "z-image", exchange="sync")
        return network(branches=own, x=images, t=timestep)  # type: ignore[no-any-return]

    with torch.no_grad():
        network = transformer.make()
        expected = [network(images, timestep, **call, return_dict=False)[0] for call in own.values()]
    for predicted in run_in_lockstep(ranks, rank):
        for theirs, ours in zip(expected, predicted, strict=True):
            torch.testing.assert_close([*ours], theirs, rtol=0, atol=1e-5)


def test_a_gang_that_cannot_be_halved_says_so() -> None:
    transformer = TRANSFORMERS["qwen-image"]

    def rank(communicator: Communicator) -> None:
        network, _ = in_gang(communicator, "qwen-image", cfg_parallel=True)
        given = arguments(transformer, None, 1.0, batch=1)
        assert len(network(branches=given)) == 2
        del given["uncond"]
        with pytest.raises(InvalidRequest, match="it is a batch of 1"):
            network(branches=given)

    run_in_lockstep(2, rank)
    with pytest.raises(InvalidRequest, match="3 ranks; use 'auto'"):
        run_in_lockstep(3, rank)


@pytest.mark.parametrize("exchange", ["sync", "displaced"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["qwen-image", "hunyuan-image", "chroma"])
def test_captured_steps_draw_the_same_bit_for_bit(name: str, ranks: int, exchange: Any) -> None:
    def rank(communicator: Communicator) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
        network, engine = in_gang(communicator, name, exchange=exchange, warmup_steps=1)
        maker = RecordedGraphs()
        engine.capture_with(maker)
        found = [latents for _ in range(2) for latents in drawn(network, TRANSFORMERS[name], apart=False)]
        assert engine.graphs.obstacle is None
        engine.capture_with(None)
        wanted = drawn(network, TRANSFORMERS[name], apart=False)
        return found, wanted * 2, sum(graph.replays for graph in maker.made)

    for found, wanted, replays in run_in_lockstep(ranks, rank):
        assert all(map(torch.equal, found, wanted))
        assert replays > 2 * STEPS


def test_one_device_computes_each_branch_in_turn_and_keeps_the_form() -> None:
    network, _ = in_gang(connect("local"), "sd3", exchange="sync")
    assert max(map(error, drawn(network, TRANSFORMERS["sd3"], apart=False), alone("sd3"))) < 1e-6
