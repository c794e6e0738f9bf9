"""ControlNets of FLUX.1, Stable Diffusion 3 and Qwen-Image: as diffusers draws with them, and in gangs."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import (
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetPipeline,
    FluxMultiControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageMultiControlNetModel,
    StableDiffusion3ControlNetPipeline,
    ZImageControlNetPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.controls import Control, ControlNetSpec
from distriray.denoise import Denoiser, DenoiseState
from distriray.errors import GangMismatch, InvalidRequest, OutOfMemory, UnusableControlNet
from distriray.parallel import engine_of
from distriray.parallel.networks.controls import UsedControl
from distriray.parallel.networks.families.flux import FluxControl
from distriray.parallel.networks.token_control import TokenControl
from distriray.parallel.room import Room
from distriray.requests import SamplingParams
from tests.models import (
    tiny_flux,
    tiny_flux_controlnet,
    tiny_flux_schnell,
    tiny_qwen_image,
    tiny_qwen_image_controlnet,
    tiny_sd3,
    tiny_sd3_controlnet,
    tiny_z_image,
    tiny_z_image_controlnet,
)
from tests.parameters import pairwise, sweep
from tests.regroup import drawn, drawn_in_turn
from tests.unit.parallel.recorded import RecordedGraphs
from tests.unit.test_control import BOTH, NAMES, ONE, Named, picture
from tests.unit.test_control import params as params_of

HINT = {"conditioning_embedding_channels": 4, "patch_size": 2, "num_single_layers": 0}
WITHOUT_TEXT = {
    "joint_attention_dim": None,
    "use_pos_embed": False,
    "force_zeros_for_pooled_projection": False,
}
UNION = {"num_mode": 3}
MODES = {"canny": 0, "depth": 2}


@dataclass(frozen=True)
class Model:
    """A model, a maker of ControlNets for it, and diffusers' pipeline of both.

    Attributes:
        guidance: what that pipeline calls the scale of guidance, and others of its arguments.
        union: whether it is one ControlNet for all kinds of pictures.
    """

    make: Callable[[], Any]
    control: Callable[[int], Any]
    kind: Any
    guidance: dict[str, Any]
    union: bool = False

    def theirs(self, *named: Named, images: int = 1, **given: Any) -> torch.Tensor:
        """Latents by diffusers, as its pipeline has them."""
        networks = [self.control(1 + NAMES.index(name)) for name, _ in named]
        options = [options for _, options in named]
        pipeline = self.kind(
            **self.make().components, controlnet=networks if len(networks) > 1 else networks[0]
        )
        named_ones = inspect.signature(type(pipeline).__call__).parameters
        pipeline.set_progress_bar_config(disable=True)
        listed = {
            "control_image": [picture(name) for name, _ in named],
            "controlnet_conditioning_scale": [each.get("scale", 1.0) for each in options],
            "control_guidance_start": [each.get("start", 0.0) for each in options],
            "control_guidance_end": [each.get("end", 1.0) for each in options],
        }
        if self.union:
            listed["control_mode"] = [MODES[name] for name, _ in named]
        of_one = listed if len(networks) > 1 else {name: values[0] for name, values in listed.items()}
        of_one = {name: value for name, value in of_one.items() if name in named_ones}
        defaults = {"num_inference_steps": 4, "height": 128, "width": 64, **self.guidance}
        with certain(pipeline):
            latents: torch.Tensor = pipeline(
                prompt="a lake", num_images_per_prompt=images, output_type="latent", **of_one,
                generator=[torch.Generator().manual_seed(3 + index) for index in range(images)],
                **{**defaults, **given},
            ).images  # fmt: skip
        return latents


@contextmanager
def certain(pipeline: Any) -> Iterator[None]:
    """Stable Diffusion 3 alone: let the VAE have no doubt about a picture.

    diffusers draws it by torch's default generator there, so that no seed would make it the same.
    """
    encode = pipeline.vae.encode
    if isinstance(pipeline, StableDiffusion3ControlNetPipeline):

        def encoded(pixels: torch.Tensor) -> Any:
            mode = encode(pixels).latent_dist.mode
            return SimpleNamespace(latent_dist=SimpleNamespace(sample=mode))

        pipeline.vae.encode = encoded
    yield
    pipeline.vae.encode = encode


def _of_one(pipeline: Any, multi: Any, **parts: Any) -> Any:
    """One network, which is given several pictures; of Qwen-Image diffusers adds up no others."""
    networks = parts.pop("controlnet")
    return pipeline(**parts, controlnet=multi(networks[:1]) if isinstance(networks, list) else networks)


MODELS: dict[str, Model] = {
    "flux": Model(tiny_flux, tiny_flux_controlnet, FluxControlNetPipeline, {"guidance_scale": 3.5}),
    "flux-hint": Model(
        tiny_flux, partial(tiny_flux_controlnet, **HINT), FluxControlNetPipeline, {"guidance_scale": 3.5}
    ),
    "flux-union": Model(
        tiny_flux,
        lambda seed: tiny_flux_controlnet(**UNION),
        partial(_of_one, FluxControlNetPipeline, FluxMultiControlNetModel),
        {"guidance_scale": 3.5},
        union=True,
    ),
    "sd3": Model(tiny_sd3, tiny_sd3_controlnet, StableDiffusion3ControlNetPipeline, {"guidance_scale": 3.5}),
    "sd35": Model(
        tiny_sd3,
        partial(tiny_sd3_controlnet, **WITHOUT_TEXT),
        StableDiffusion3ControlNetPipeline,
        {"guidance_scale": 3.5},
    ),
    "qwen": Model(
        tiny_qwen_image,
        lambda seed: tiny_qwen_image_controlnet(),
        partial(_of_one, QwenImageControlNetPipeline, QwenImageMultiControlNetModel),
        {"true_cfg_scale": 3.5, "negative_prompt": " "},
    ),
}


Z_IMAGE = Model(tiny_z_image, tiny_z_image_controlnet, ZImageControlNetPipeline, {"guidance_scale": 3.5})
REFINED = {
    "control_in_dim": 6,
    "add_control_noise_refiner": "control_noise_refiner",
    "control_refiner_layers_places": [0],
}
MODELS |= {
    "z-image": Z_IMAGE,
    "z-image-2": replace(Z_IMAGE, control=partial(tiny_z_image_controlnet, **REFINED)),
}


def made(model: str) -> Any:
    return MODELS[model].make()


def save(model: str, folder: Path) -> None:
    """ControlNets of a model."""
    for seed, name in enumerate(NAMES):
        MODELS[model].control(seed + 1).save_pretrained(folder / model / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controls")
    for model in MODELS:
        save(model, folder)
    return folder


def params(*named: Named, **fields: Any) -> SamplingParams:
    """`test_control.params`, with guidance."""
    return params_of(*named, **{"guidance_scale": 3.5, **fields})


def denoiser_of(pipeline: Any, folder: Path) -> Denoiser:
    """Of the models, `folder` has the ControlNets of one; those of a union are one in memory."""
    denoiser, union = Denoiser(pipeline), MODELS[folder.name].union
    for name in NAMES:
        source = folder / (NAMES[0] if union else name)
        mode = MODES[name] if union else None
        denoiser.controls.load(ControlNetSpec(name=name, source=str(source), mode=mode))
    assert len(set(denoiser.controls.networks.values())) == (1 if union else 2)
    return denoiser


def ours(model: str, folder: Path, *named: Named, **fields: Any) -> tuple[torch.Tensor, np.ndarray]:
    """Latents as diffusers' pipeline has them, and the first picture."""
    pipeline = MODELS[model].make()
    denoiser = denoiser_of(pipeline, folder / model)
    state = denoiser.prepare(params(*named, **fields))
    image = drawn(denoiser, state)
    if hasattr(pipeline, "_pack_latents"):
        return pipeline._pack_latents(state.latents, *state.latents.shape), image
    return state.latents, image


@pytest.mark.parametrize("named", [ONE, BOTH], ids=["one", "both"])
@pytest.mark.parametrize("model", MODELS)
def test_a_request_is_drawn_as_diffusers_draws_it(model: str, named: list[Named], folder: Path) -> None:
    """Stable Diffusion 3's encodes a picture for each branch of guidance at once, which rounds otherwise."""
    if model.startswith("z-image") and len(named) > 1:
        pytest.skip("diffusers' pipeline takes one ControlNet, from the first step to the last")
    latents, image = ours(model, folder, *named)
    torch.testing.assert_close(
        latents, MODELS[model].theirs(*named), rtol=0, atol=1e-4 if model.startswith("sd3") else 0
    )
    assert np.abs(image - ours(model, folder)[1]).max() > 10


def test_each_picture_of_a_request_is_its_seeds_alone(folder: Path) -> None:
    for model in ("flux", "qwen"):
        both = MODELS[model].theirs(*ONE, images=2)
        latents, _ = ours(model, folder, *ONE, num_images=2)
        torch.testing.assert_close(latents, both, rtol=0, atol=1e-5)
        torch.testing.assert_close(latents[:1], ours(model, folder, *ONE)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_a_picture_is_drawn_on_as_diffusers_draws_on_it(masked: bool, folder: Path) -> None:
    def kind(image_encoder: Any, feature_extractor: Any, **parts: Any) -> Any:
        return (FluxControlNetInpaintPipeline if masked else FluxControlNetImg2ImgPipeline)(**parts)

    below, mask = Image.effect_noise((64, 128), 90).convert("RGB"), Image.new("L", (64, 128))
    mask.paste(255, (0, 0, 32, 128))
    pictures = {"image": below, **({"mask_image": mask} if masked else {})}
    model = Model(tiny_flux, tiny_flux_controlnet, kind, {"guidance_scale": 3.5, "strength": 0.5})
    named = ("canny", {"scale": 0.7, "start": 0.25, "end": 0.75})
    theirs = model.theirs(named, num_inference_steps=8, **pictures)
    latents, _ = ours("flux", folder, named, num_inference_steps=8, strength=0.5, **pictures)
    assert torch.equal(latents, theirs)


@pytest.mark.parametrize("model", sweep(["qwen", "flux", "sd3"]))
def test_half_precision_is_drawn_as_diffusers_draws_it(
    model: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what its arithmetic on a picture's latents is in float32."""
    whole, half = MODELS[model], torch.bfloat16
    made = replace(
        whole, make=lambda: whole.make().to(half), control=lambda seed: whole.control(seed).to(half)
    )
    monkeypatch.setitem(MODELS, model, made)
    assert torch.equal(ours(model, folder, *ONE)[0], made.theirs(*ONE))


def test_layers_that_see_the_picture_alone_have_the_dtype_of_the_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not that of the VAE, which they do without."""

    def drawn_with(vae: torch.dtype) -> torch.Tensor:
        pipeline = tiny_flux().to(torch.bfloat16)
        pipeline.vae.to(vae)
        monkeypatch.setitem(MODELS, "flux-hint", replace(MODELS["flux-hint"], make=lambda: pipeline))
        return ours("flux-hint", folder, *ONE)[0]

    assert torch.equal(drawn_with(torch.float32), drawn_with(torch.bfloat16))


def test_a_picture_for_which_a_controlnet_has_no_positions_is_refused(tmp_path: Path) -> None:
    tiny_sd3_controlnet(pos_embed_max_size=6).save_pretrained(tmp_path)
    denoiser = Denoiser(tiny_sd3())
    denoiser.controls.load(ControlNetSpec(name="canny", source=str(tmp_path)))
    with pytest.raises(InvalidRequest, match="height 128 is above 96, the largest that a ControlNet"):
        denoiser.prepare(params(*ONE))
    assert denoiser.prepare(params(*ONE, height=96)).height == 96


def test_what_several_controlnets_add_to_many_blocks_is_in_memory_once() -> None:
    transformer, network = tiny_flux().transformer, tiny_flux_controlnet(num_layers=1, num_single_layers=1)
    given = defaultdict(lambda: torch.zeros(1, 4, 16))
    controls = [UsedControl(name, network, torch.zeros(1, 4, 16), 1.0) for name in NAMES]
    of_each = {name: ([torch.full((1,), float(at))], None) for at, name in enumerate(NAMES, 1)}
    added = FluxControl.residuals_of(transformer, controls, given, lambda name, given: of_each[name])
    first, *others = added["controlnet_block_samples"]
    assert others and all(other is first for other in others) and first == 3


def by_gangs(
    model: str, folder: Path, sizes: Sequence[int], named: list[Named], config: dict[str, Any], **fields: Any
) -> list[np.ndarray]:
    load = partial(denoiser_of, folder=folder / model)
    return drawn_in_turn(MODELS[model].make, load, params(*named, **fields), sizes, config)


@pytest.mark.parametrize(
    ("model", "attention", "sizes"),
    sweep(pairwise(list(MODELS), ["gather", "ulysses"], [(2,), (2, 1)]), first=3)
    + sweep(
        [
            ("flux", "gather", (3,)),
            ("z-image", "gather", (3,)),
            ("z-image-2", "gather", (3, 1)),
            ("sd35", "auto", (4,)),
            ("qwen", "gather", (3, 2)),
        ],
        first=0,
    ),
)
def test_sync_mode_equals_one_device(model: str, attention: str, sizes: Sequence[int], folder: Path) -> None:
    """Also of two pictures, with and without guidance, and where a gang's bytes go on in another."""
    ended = {} if model.startswith("flux") else {"guidance_end": 0.5}
    for named, fields in ((ONE, {"num_images": 2}), (BOTH, ended)):
        _, expected = ours(model, folder, *named, **fields)
        for image in by_gangs(
            model, folder, sizes, named, {"exchange": "sync", "attention": attention}, **fields
        ):
            assert np.abs(image - expected).max() <= 1


@pytest.mark.parametrize("model", sweep(["qwen", "sd3", "z-image", "sd35"], first=3))
def test_guidance_is_shared_by_halves_too(model: str, folder: Path) -> None:
    for image in by_gangs(model, folder, (4,), BOTH, {"exchange": "sync", "cfg_parallel": True}):
        assert np.abs(image - ours(model, folder, *BOTH)[1]).max() <= 1


@pytest.mark.parametrize("model", sweep(["qwen", "flux", "sd3", "z-image-2"]))
def test_displaced_steps_stay_near_one_device_and_need_the_control(model: str, folder: Path) -> None:
    """Also where a ControlNet begins or ends on the way, with which the layers of a step change."""
    fields = {"num_inference_steps": 12}
    config = {"exchange": "displaced", "warmup_steps": 1, "cfg_parallel": False}
    for named in (ONE, BOTH):
        (_, expected), (_, without) = ours(model, folder, *named, **fields), ours(model, folder, **fields)
        first, *others = by_gangs(model, folder, (2,), named, config, **fields)
        assert all((image == first).all() for image in others)
        assert np.abs(first - expected).mean() < np.abs(without - expected).mean() / 2


@pytest.mark.parametrize("halves", [False, True])
def test_each_rank_runs_a_controlnet_on_its_own_tokens(
    halves: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once, though each branch of guidance has a call of its own; of two ranks a half has all tokens."""
    seen, output = [], TokenControl.output

    def noted(*args: Any) -> Any:
        added = output(*args)
        seen.append([tokens.shape[1] for tokens in added])
        return added

    def one_step(communicator: Communicator) -> int:
        config = ParallelConfig(exchange="sync", cfg_parallel=halves)
        pipeline = parallelize(tiny_qwen_image(), communicator, config)
        denoiser = denoiser_of(pipeline, folder / "qwen")
        denoiser.step(state := denoiser.prepare(params(*ONE)))
        return state.latents.shape[2] * state.latents.shape[3] // 4

    monkeypatch.setattr(TokenControl, "output", noted)
    (tokens,) = set(run_in_lockstep(2, one_step))
    assert seen == [[tokens if halves else tokens // 2] * 2] * 2


def test_text_of_a_union_is_dealt_with_the_token_of_its_mode(folder: Path) -> None:
    """Among three ranks, of which two have another number of tokens than without it."""
    _, expected = ours("flux-union", folder, *BOTH)
    for image in by_gangs("flux-union", folder, (3,), BOTH, {"exchange": "sync"}):
        assert np.abs(image - expected).max() <= 1


def whole(model: str, exchange: str, named: list[Named], communicator: Communicator) -> torch.Tensor:
    """Latents by diffusers' own pipeline, which was made patch-parallel."""

    def kind(**parts: Any) -> Any:
        return parallelize(MODELS[model].kind(**parts), communicator, ParallelConfig(exchange=exchange))

    return replace(MODELS[model], kind=kind).theirs(*named)


@pytest.mark.parametrize("model", MODELS)
def test_pipelines_of_users_add_residuals_that_each_rank_has_whole(model: str) -> None:
    named = ONE if model.startswith("z-image") else BOTH
    expected = MODELS[model].theirs(*named)
    for latents in run_in_lockstep(2, partial(whole, model, "sync", named)):
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)


def test_ranks_with_other_pictures_are_told(folder: Path) -> None:
    def one_step(communicator: Communicator) -> None:
        denoiser = denoiser_of(parallelize(tiny_flux(), communicator), folder / "flux")
        name = NAMES[communicator.rank]
        control = (Control(name="canny", image=picture(name)),)
        denoiser.step(denoiser.prepare(params().model_copy(update={"control": control})))

    with pytest.raises(GangMismatch, match="pictures of ControlNets"):
        run_in_lockstep(2, one_step)


def test_what_does_not_fit_is_refused_by_name_when_it_is_loaded(tmp_path: Path) -> None:
    def refused(make: Callable[[], Any], network: Any, mode: int | None = None) -> str:
        network.save_pretrained(tmp_path)
        denoiser = Denoiser(make())
        with pytest.raises(UnusableControlNet) as error:
            denoiser.controls.load(ControlNetSpec(name="x", source=str(tmp_path), mode=mode))
        assert not denoiser.controls.networks
        return str(error.value)

    assert "those of this model are FluxControlNetModel" in refused(tiny_flux, tiny_sd3_controlnet())
    assert "its in_channels is 64, and that of the model 16" in refused(
        tiny_flux, tiny_flux_controlnet(in_channels=64)
    )
    assert "takes a guidance scale" in refused(tiny_flux_schnell, tiny_flux_controlnet())
    assert "a union of 3 kinds" in refused(tiny_flux, tiny_flux_controlnet(**UNION))
    assert "a union of 3 kinds" in refused(tiny_flux, tiny_flux_controlnet(**UNION), 3)
    assert "has no mode 1" in refused(tiny_flux, tiny_flux_controlnet(), 1)
    assert "of 1 by 1 with 4 channels" in refused(
        tiny_flux, tiny_flux_controlnet(**{**HINT, "patch_size": 1})
    )
    assert "caption_projection_dim" in refused(tiny_sd3, tiny_sd3_controlnet(caption_projection_dim=48))
    assert "takes a mask" in refused(tiny_sd3, tiny_sd3_controlnet(extra_conditioning_channels=1))
    assert "joint_attention_dim" in refused(tiny_sd3, tiny_sd3_controlnet(joint_attention_dim=32))
    assert "adds to layer 2, and the model has 2" in refused(
        tiny_z_image, tiny_z_image_controlnet(control_layers_places=[0, 2])
    )
    twice = {**REFINED, "add_control_noise_refiner": "control_layers"}
    assert "look at the image alone first" in refused(tiny_z_image, tiny_z_image_controlnet(**twice))
    assert "have 3 channels, and latents 4" in refused(
        tiny_z_image, tiny_z_image_controlnet(control_in_dim=3)
    )
    assert "takes a mask" in refused(tiny_qwen_image, tiny_qwen_image_controlnet(extra_condition_channels=4))


def test_a_state_goes_on_only_with_the_mode_that_it_was_begun_with(folder: Path) -> None:
    blob = denoiser_of(tiny_flux(), folder / "flux-union").prepare(params(*ONE)).to_bytes()
    other = Denoiser(tiny_flux())
    other.controls.load(ControlNetSpec(name="canny", source=str(folder / "flux-union" / "canny"), mode=1))
    with pytest.raises(UnusableControlNet, match="'canny' has other weights"):
        other.adapt(DenoiseState.from_bytes(blob))


def test_the_first_call_that_is_asked_for_is_of_this_request(folder: Path) -> None:
    """And not of the ControlNets of whichever was drawn before, whose buffers would be counted."""
    denoiser = denoiser_of(parallelize(tiny_flux(), connect("local")), folder / "flux")
    drawn(denoiser, denoiser.prepare(params(*ONE)))
    assert [call.besides for call in denoiser.calls(params())] == [None]
    assert [call.besides for call in denoiser.calls(params(*ONE))] == [("canny",)]


@pytest.mark.parametrize(
    ("model", "halves"), [*((model, False) for model in MODELS), ("qwen", True), ("sd3", True)]
)
def test_buffers_of_controlnets_are_estimated_to_the_byte(model: str, halves: bool, folder: Path) -> None:
    config = ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=halves)
    ranks = 4 if halves else 2

    def buffers(communicator: Communicator) -> tuple[int, int]:
        denoiser = denoiser_of(parallelize(MODELS[model].make(), communicator, config), folder / model)
        engine = engine_of(denoiser._pipeline)
        assert engine is not None
        estimated = engine.buffer_bytes_of(denoiser.calls(params(*ONE)), ranks, config)
        for _ in range(2):  # the second image fills the buffers of the first
            drawn(denoiser, denoiser.prepare(params(*ONE)))
        return estimated, engine.buffer_bytes

    estimates, held = zip(*run_in_lockstep(ranks, buffers), strict=True)
    assert {*estimates} == {max(held)}


@pytest.mark.parametrize(
    ("model", "ranks", "halves"),
    [*((model, ranks, False) for model in MODELS for ranks in (1, 2)), ("qwen", 2, True), ("qwen", 4, True)],
)
def test_steps_with_control_are_graphs_where_no_branch_waits_for_another(
    model: str, ranks: int, halves: bool, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With any picture, and bit for bit what is launched; Z-Image's asks the device."""
    auto: Literal["auto"] = "auto"
    config = ParallelConfig(exchange="displaced", warmup_steps=2, cfg_parallel=auto if halves else False)
    requests = [
        params(*ONE),
        params(*ONE, seed=4),
        params(),
        params(*ONE, seed=5),
        params(*ONE, guidance_scale=1.0),
    ]

    def rank(
        maker: RecordedGraphs | None, communicator: Communicator
    ) -> tuple[list[torch.Tensor], list[int]]:
        pipeline = parallelize(MODELS[model].make(), communicator, config)
        denoiser, engine, latents, replays = (
            denoiser_of(pipeline, folder / model),
            engine_of(pipeline),
            [],
            [],
        )
        assert engine is not None
        engine.capture_with(maker)
        for index, each in enumerate(requests):
            if index == 1:
                shown = each.control[0].model_copy(update={"image": picture("depth")})
                each = each.model_copy(update={"control": (shown,)})
            drawn(denoiser, state := denoiser.prepare(each))
            latents.append(state.latents)
            replays.append(0 if maker is None else sum(graph.replays for graph in maker.made))
        return latents, replays

    launched = run_in_lockstep(ranks, partial(rank, None))
    captured = run_in_lockstep(ranks, lambda communicator: rank(RecordedGraphs(), communicator))
    for (ours, replays), (theirs, _) in zip(captured, launched, strict=True):
        assert all(map(torch.equal, ours, theirs))
        _, with_another, without, last, without_guidance = replays
        if model in ("z-image", "z-image-2") or model == "qwen" and not halves:
            assert with_another == 0 < without == last
        else:
            assert 0 < with_another < without < last
        assert (last < without_guidance) == (not model.startswith("z-image"))
    assert ("asks the device" in caplog.text) == model.startswith("z-image")


def test_halves_tell_prompts_apart_by_which_controlnets_go(folder: Path) -> None:
    """ControlNets run with the prompt in both halves, though the text of one is the same every time."""
    config = ParallelConfig(exchange="compressed", cfg_parallel=True)
    prompts = [
        "a lake",
        "a lake with many boats and fog",
        "a lake",
        "a lake with many boats and fog",
        "a lake",
    ]

    def rank(maker: RecordedGraphs | None, communicator: Communicator) -> tuple[list[torch.Tensor], bool]:
        denoiser = denoiser_of(parallelize(tiny_qwen_image(), communicator, config), folder / "qwen")
        engine, latents, estimates = engine_of(denoiser._pipeline), [], []
        assert engine is not None
        engine.capture_with(maker)
        engine.exchanges.room = Room(2**40, "told")
        for prompt in prompts:
            request = params(*ONE).model_copy(update={"prompt": prompt})
            drawn(denoiser, state := denoiser.prepare(request))
            latents.append(state.latents)
            calls = denoiser.calls(request)
            half = engine.network.deal(calls, communicator, config)
            assert half is not None
            needed = engine.exchanges.room.needed(engine.network, half, communicator, config)
            fresh = Room(2**40, "told").needed(engine.network, half, communicator, config)
            estimates.append(needed == fresh)
        return latents, all(estimates)

    launched = run_in_lockstep(4, partial(rank, None))
    captured = run_in_lockstep(4, lambda communicator: rank(RecordedGraphs(), communicator))
    for (ours, estimated), (theirs, _) in zip(captured, launched, strict=True):
        assert all(map(torch.equal, ours, theirs))
        assert estimated


def test_room_is_looked_at_anew_where_a_controlnet_begins(folder: Path) -> None:
    """Buffers that are not in use make room for its own, or it is refused with their bytes."""
    config = ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=False)

    def steps(communicator: Communicator) -> tuple[list[bool], int]:
        denoiser = denoiser_of(parallelize(tiny_qwen_image(), communicator, config), folder / "qwen")
        engine = engine_of(denoiser._pipeline)
        assert engine is not None
        alone, needed = (
            engine.buffer_bytes_of(denoiser.calls(params(*named)), 2, config) for named in ([], ONE)
        )
        within = []
        for room in (needed, alone):
            engine.exchanges.room = Room(room, "gpu7 is small")
            state = denoiser.prepare(params(("canny", {"start": 0.5})))
            with nullcontext() if room == needed else pytest.raises(OutOfMemory, match="where gpu7 is small"):
                while not state.done:
                    denoiser.step(state)
                    within.append(engine.buffer_bytes <= room)
        return within, state.step

    assert run_in_lockstep(2, steps) == [([True] * 6, 2)] * 2


def test_all_ranks_leave_a_step_with_a_controlnet_for_which_one_has_no_room(folder: Path) -> None:
    """None waits for the one that refuses it, which alone knows why; and all can go on without."""
    config = ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=False)

    def steps(communicator: Communicator) -> tuple[type[BaseException], int]:
        denoiser = denoiser_of(parallelize(tiny_qwen_image(), communicator, config), folder / "qwen")
        engine = engine_of(denoiser._pipeline)
        assert engine is not None
        if communicator.rank == 1:
            room = engine.buffer_bytes_of(denoiser.calls(params()), 2, config)
            engine.exchanges.room = Room(room, "gpu7 is small")
        state = denoiser.prepare(params(("canny", {"start": 0.5})))
        with pytest.raises((OutOfMemory, GangMismatch)) as raised:
            while not state.done:
                denoiser.step(state)
        drawn(denoiser, other := denoiser.prepare(params()))
        assert other.done
        return raised.type, state.step

    assert run_in_lockstep(2, steps) == [(GangMismatch, 2), (OutOfMemory, 2)]


class OfCanny(VaeImageProcessor):
    """The pixels that stabilityai gives its canny for Stable Diffusion 3.5 large."""

    def preprocess(self, image: Any, *size: Any, **named: Any) -> torch.Tensor:
        pixels = VaeImageProcessor(do_normalize=False).preprocess(image, *size, **named)
        return pixels * 255 * 0.5 + 0.5


def test_pixels_are_of_the_range_that_its_makers_give_it(folder: Path) -> None:
    def kind(**parts: Any) -> Any:
        pipeline = StableDiffusion3ControlNetPipeline(**parts)
        pipeline.image_processor = OfCanny()
        return pipeline

    theirs = replace(MODELS["sd35"], kind=kind).theirs(*ONE)
    denoiser, source = Denoiser(tiny_sd3()), str(folder / "sd35" / "canny")
    denoiser.controls.load(ControlNetSpec(name="canny", source=source, pixel_range=(0.5, 128.0)))
    denoiser.controls.load(ControlNetSpec(name="depth", source=source))
    drawn(denoiser, state := denoiser.prepare(params(*ONE)))
    torch.testing.assert_close(state.latents, theirs, rtol=0, atol=1e-4)
    drawn(denoiser, other := denoiser.prepare(params(("depth", {"scale": 0.7}), seed=3)))
    assert not torch.allclose(other.latents, theirs, atol=0.1), "a picture's, not the file's"
