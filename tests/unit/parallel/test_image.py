"""Which image a call is a step of: what is not known to go on begins anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, UNet2DConditionModel
from peft import LoraConfig

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.errors import UnsupportedModel
from distriray.parallel import Image, engine_of
from distriray.parallel.engine import Engine
from distriray.parallel.networks.base import Call
from distriray.parallel.schedules import Schedules
from tests.cases import Case, call
from tests.models import SHALLOW, tiny_sdxl, tiny_sdxl_unet
from tests.parameters import sweep

SYNC = ParallelConfig(exchange="sync", cfg_parallel=False)
DISPLACED = ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=False)
TEXT = torch.randn((1, 9, 32), generator=torch.Generator().manual_seed(9))
ADDED = {"text_embeds": torch.ones((1, 16)), "time_ids": torch.ones((1, 6))}


def picture(seed: int, columns: int = 8) -> torch.Tensor:
    return torch.randn((1, 4, 16, columns), generator=torch.Generator().manual_seed(seed))


def engine(module: Any) -> Engine:
    found = engine_of(module)
    assert found is not None
    return found


def noise(
    unet: UNet2DConditionModel,
    sample: torch.Tensor,
    timestep: Any,
    text: torch.Tensor = TEXT,
    **inputs: Any,
) -> torch.Tensor:
    return unet(sample, timestep, text, added_cond_kwargs=ADDED, **inputs).sample


def watched(unet: UNet2DConditionModel, communicator: Communicator, config: ParallelConfig) -> Any:
    """A parallelized pipeline whose scheduler has nothing to do with the calls of its network."""
    pipeline = tiny_sdxl()
    pipeline.unet = unet
    return parallelize(pipeline, communicator, config)


def counted(module: Any) -> list[bool]:
    """Whether each further call of a network is synchronous."""
    synchronous: list[bool] = []
    module.register_forward_hook(lambda *_: synchronous.append(engine(module).statistics.synchronous))
    return synchronous


# The rule


def begun(timesteps: list[Any], texts: list[torch.Tensor] | None = None, said: bool = False) -> list[bool]:
    """Which of the calls begin anew."""
    image, schedules, fresh = Image(lambda _: None, lambda _: None), Schedules(), []
    for timestep, text in zip(timesteps, texts or [TEXT] * len(timesteps), strict=True):
        branch = image.branch(Call(TEXT, timestep, text), schedules.read(timestep), said)
        fresh.append(branch.fresh_start)
        branch.fresh_start = False
    return fresh


T = torch.tensor([900, 700, 700, 500, 300])


def test_the_next_element_of_the_same_schedule_goes_on() -> None:
    assert begun(list(T)) == [True, False, False, False, False]
    assert begun([*T[:2], *T[:2]]) == [True, False, True, False]
    assert begun([*T[2:], *T[:3]]) == [True, False, False, True, False, False]


def test_other_timesteps_are_not_known_to_go_on() -> None:
    assert begun([900, 800, 700]) == [True] * 3
    assert begun([torch.tensor(900), torch.tensor(800)]) == [True] * 2
    assert begun([T[0], T.clone()[1]]) == [True] * 2
    assert begun([T[0], T[2]]) == [True] * 2
    assert begun([T[:2], T[1:3]]) == [True] * 2


def test_other_text_is_another_image() -> None:
    assert begun([*T[:3]], [TEXT, TEXT.clone(), 2 * TEXT]) == [True, False, True]
    changed = TEXT.clone()
    image, schedules = Image(lambda _: None, lambda _: None), Schedules()
    image.branch(Call(TEXT, T[0], changed), schedules.read(T[0]), False).fresh_start = False
    changed += 1  # in place
    assert image.branch(Call(TEXT, T[1], changed), schedules.read(T[1]), False).fresh_start


def test_a_timestep_that_was_taken_twice_has_no_known_successor() -> None:
    assert begun([T[0], T[0], T[1], T[1], T[3]]) == [True] * 5
    assert begun([T[0], T[0], T[1], T[2]]) == [True, True, True, False]
    assert begun([T[0], T[1], T[1], T[2], T[3]]) == [True, False, True, True, False]


def test_what_is_said_to_be_an_image_goes_on_but_for_an_element_that_is_taken_again() -> None:
    assert begun([900, 800, 850, 800], said=True) == [True, False, False, False]
    assert begun([*T[:2], T[1], T[3], T[4]], said=True) == [True, False, True, True, False]
    assert begun([900, 800], [TEXT, 2 * TEXT], said=True) == [True, False]


def test_numbers_of_texts_are_not_compared_where_the_timestep_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("compared"))
    assert begun([T[1], T[0]], [TEXT, TEXT.clone()]) == [True, True]
    assert begun([*T[:2]], [TEXT, TEXT]) == [True, False]


# Pictures of one step, frame after frame


def frames(
    unet: UNet2DConditionModel, between: Callable[[int], None] = lambda frame: None
) -> list[torch.Tensor]:
    scheduler = LCMScheduler()
    scheduler.set_timesteps(1)
    made = []
    for frame in range(6):
        between(frame)
        made.append(noise(unet, picture(frame), scheduler.timesteps[0]))
    return made


def test_frames_of_one_step_are_made_each_by_itself_whatever_is_watched() -> None:
    wanted = frames(tiny_sdxl_unet(3))

    def rank(communicator: Communicator) -> list[torch.Tensor]:
        config = ParallelConfig(exchange="displaced", warmup_steps=0, cfg_parallel=False)
        pipeline = watched(tiny_sdxl_unet(3), communicator, config)
        return frames(pipeline.unet)

    for made in run_in_lockstep(2, rank):
        for ours, theirs in zip(made, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def with_lora() -> UNet2DConditionModel:
    unet = tiny_sdxl_unet(**SHALLOW)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"]), "style")
    for index, (name, parameter) in enumerate(unet.named_parameters()):
        if "lora" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) / 4
    return unet


def rescaled(unet: UNet2DConditionModel, frame: int) -> None:
    if frame in (2, 4):
        unet.set_adapters(["style"], [0.5 / frame])
    if frame == 5:
        unet.disable_adapters()


def written(unet: UNet2DConditionModel, frame: int) -> None:
    """Other weights in the same memory."""
    if frame == 3:
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(0.3)


@pytest.mark.parametrize("change", [rescaled, written])
@pytest.mark.parametrize("said", sweep([False, True]))
def test_text_is_read_with_the_adapters_of_now(
    change: Callable[[UNet2DConditionModel, int], None], said: bool
) -> None:
    """Between images, and in the middle of one."""
    alone = with_lora()
    wanted = frames(alone, lambda frame: change(alone, frame))

    def rank(communicator: Communicator) -> list[torch.Tensor]:
        pipeline = watched(with_lora(), communicator, SYNC)
        unet = pipeline.unet
        if not said:
            return frames(unet, lambda frame: change(unet, frame))
        made = []
        with engine(unet).image():
            for frame in range(6):
                change(unet, frame)
                made.append(noise(unet, picture(frame), 999))
        return made

    if said:
        other = with_lora()
        wanted = []
        for frame in range(6):
            change(other, frame)
            wanted.append(noise(other, picture(frame), 999))
    for made in run_in_lockstep(2, rank):
        for ours, theirs in zip(made, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


def test_a_scale_that_is_changed_within_the_object_that_was_given_counts() -> None:
    """As callbacks change `pipe.cross_attention_kwargs`."""

    def draw(unet: UNet2DConditionModel) -> torch.Tensor:
        given = {"scale": 0.2}
        made = []
        for step, timestep in enumerate(torch.tensor([900, 600, 300])):
            given["scale"] = 0.2 + 0.4 * step
            made.append(noise(unet, picture(0), timestep, cross_attention_kwargs=given))
        return torch.stack(made)

    def rank(communicator: Communicator) -> torch.Tensor:
        return draw(watched(with_lora(), communicator, SYNC).unet)

    wanted = draw(with_lora())
    for made in run_in_lockstep(2, rank):
        torch.testing.assert_close(made, wanted, atol=2e-4, rtol=0)


def test_another_text_within_an_image_is_read() -> None:
    texts = [TEXT, TEXT, 2 * TEXT, 3 * TEXT]
    alone = tiny_sdxl_unet()
    wanted = [noise(alone, picture(0), 900 - step, text) for step, text in enumerate(texts)]

    def rank(communicator: Communicator) -> list[torch.Tensor]:
        unet = parallelize(tiny_sdxl_unet(), communicator, SYNC)
        with engine(unet).image():
            return [noise(unet, picture(0), 900 - step, text) for step, text in enumerate(texts)]

    for made in run_in_lockstep(2, rank):
        for ours, theirs in zip(made, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


# What goes on, and what does not


def test_pipelines_go_on_whichever_scheduler_they_have() -> None:
    def rank(communicator: Communicator) -> list[bool]:
        pipeline = parallelize(tiny_sdxl(), communicator, DISPLACED)
        synchronous = counted(pipeline.unet)
        for scheduler in ("ddim", "euler", "heun"):
            for _ in range(2):
                call(pipeline, Case(steps=3, height=128, width=64, guidance=1.0, scheduler=scheduler))
        other = type(pipeline)(**{**pipeline.components, "scheduler": DDIMScheduler(**DDIM)})
        other.set_progress_bar_config(disable=True)
        call(other, Case(steps=3, height=128, width=64, guidance=1.0))
        return synchronous

    three, five = [True, False, False], [True] + 4 * [False]
    assert run_in_lockstep(2, rank)[0] == 4 * three + 2 * five + three


DDIM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_own_loops_go_on_where_it_is_known_or_said() -> None:
    def rank(communicator: Communicator) -> list[bool]:
        unet = parallelize(tiny_sdxl_unet(), communicator, DISPLACED)
        synchronous, timesteps = counted(unet), torch.tensor([900, 600, 300])
        for timestep in timesteps:
            noise(unet, picture(0), timestep)
        for timestep in timesteps.tolist():
            noise(unet, picture(0), timestep)
        for _ in range(2):
            with engine(unet).image():
                for timestep in timesteps.tolist():
                    noise(unet, picture(0), timestep)
        return synchronous

    three = [True, False, False]
    assert run_in_lockstep(2, rank)[0] == [*three, True, True, True, *three, *three]


# Several regions of one picture in turn

TILES = [picture(1), picture(2), picture(3, columns=12)]


def in_turn(unet: UNet2DConditionModel, images: list[Any] | None) -> list[list[torch.Tensor]]:
    """What the network says of each tile in each step."""
    said: list[list[torch.Tensor]] = [[] for _ in TILES]
    for timestep in torch.tensor([900, 600, 300]):
        for index, tile in enumerate(TILES):
            if images is None:
                said[index].append(noise(unet, tile, timestep))
            else:
                with images[index]:
                    said[index].append(noise(unet, tile, timestep))
    return said


def test_regions_in_turn_read_nothing_of_each_other() -> None:
    wanted = in_turn(tiny_sdxl_unet(), None)

    def rank(communicator: Communicator) -> list[list[torch.Tensor]]:
        config = ParallelConfig(exchange="displaced", warmup_steps=0, cfg_parallel=False)
        pipeline = watched(tiny_sdxl_unet(), communicator, config)
        return in_turn(pipeline.unet, None)

    for said in run_in_lockstep(2, rank):
        for ours, theirs in zip(said, wanted, strict=True):
            torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-4, rtol=0)


def test_regions_that_are_images_go_on_each_from_its_own_last_step() -> None:
    def rank(
        communicator: Communicator,
    ) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]], list[bool]]:
        unet = parallelize(tiny_sdxl_unet(), communicator, DISPLACED)
        synchronous = counted(unet)
        together = in_turn(unet, [engine(unet).image() for _ in TILES])
        alone = []
        for tile in TILES:
            with engine(unet).image():
                alone.append([noise(unet, tile, timestep) for timestep in (900, 600, 300)])
        return together, alone, synchronous

    for together, alone, synchronous in run_in_lockstep(2, rank):
        for ours, theirs in zip(together, alone, strict=True):
            assert torch.equal(torch.stack(ours), torch.stack(theirs))
        assert synchronous[:9] == [True] * 3 + [False] * 6


# Images, as objects


def test_images_one_after_the_other_share_buffers_and_those_in_turn_do_not() -> None:
    def rank(communicator: Communicator) -> list[int]:
        unet = parallelize(tiny_sdxl_unet(), communicator, DISPLACED)
        found = []
        for _ in range(3):
            with engine(unet).image():
                for timestep in (900, 600):
                    noise(unet, picture(0), timestep)
            found.append(engine(unet).buffer_bytes)
        images = [engine(unet).image() for _ in range(2)]
        for timestep in (900, 600):
            for image in images:
                with image:
                    noise(unet, picture(0), timestep)
        return [*found, engine(unet).buffer_bytes]

    first, second, third, both = run_in_lockstep(2, rank)[0]
    assert first <= second == third and both > 1.5 * third


def test_an_image_is_entered_once_at_a_time() -> None:
    unet = parallelize(tiny_sdxl_unet(), connect("local"))
    with (image := engine(unet).image()), pytest.raises(RuntimeError, match="was entered before"), image:
        pass


def test_a_wish_to_yield_ends_with_its_image_although_another_one_lives() -> None:
    unet = parallelize(tiny_sdxl_unet(), connect("local"))
    first, second = engine(unet).image(), engine(unet).image()
    with first:
        engine(unet).ask_yield()
        noise(unet, picture(0), 900)
    assert engine(unet).yielding
    with second:
        assert not engine(unet).yielding


@pytest.mark.parametrize("interrupts", ["join", "fail", "start"])
def test_an_image_that_was_interrupted_begins_anew(interrupts: str) -> None:
    def rank(communicator: Communicator) -> list[bool]:
        unet = parallelize(tiny_sdxl_unet(), communicator, DISPLACED)
        synchronous = counted(unet)
        with engine(unet).image():
            for step in range(6):
                if step == 3 and interrupts == "join":
                    parallelize(unet, communicator, DISPLACED)
                elif step == 3 and interrupts == "start":
                    engine(unet).start_image()
                elif step == 3:
                    engine(unet).ask_cancel()
                    with pytest.raises(Exception, match="asked for it"):
                        noise(unet, picture(0), 900 - step)
                noise(unet, picture(0), 900 - step)
        return synchronous

    assert run_in_lockstep(2, rank)[0] == [True, False, False] * 2


def test_a_step_that_was_refused_is_nothing_to_go_on_from() -> None:
    def rank(communicator: Communicator) -> list[bool]:
        unet = parallelize(tiny_sdxl_unet(), communicator, DISPLACED)
        synchronous = counted(unet)
        for index, timestep in enumerate(T):
            if index == 2:
                hook = unet.mid_block.register_forward_hook(lambda *_: None)
                with pytest.raises(UnsupportedModel):
                    noise(unet, picture(0), timestep)
                hook.remove()
                continue
            noise(unet, picture(0), timestep)
        return synchronous

    assert run_in_lockstep(2, rank)[0] == [True, False, True, False]
