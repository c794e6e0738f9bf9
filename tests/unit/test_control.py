"""ControlNets by request: what diffusers makes of them, by one device and cut into patches."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.controls import Control, ControlNetSpec
from distriray.denoise import Denoiser, DenoiseState
from distriray.errors import ControlNetNotFound, InvalidRequest, UnusableControlNet, UnusableIPAdapter
from distriray.ip_adapters import IPAdapterSpec
from distriray.parallel import engine_of
from distriray.parallel.networks.controlnet import residuals_of
from distriray.parallel.networks.families import unet
from distriray.requests import SamplingParams
from tests.models import (
    SHALLOW,
    SHALLOW_SD,
    WITHOUT_UNET,
    tiny_chroma,
    tiny_controlnet,
    tiny_flux,
    tiny_flux_fill,
    tiny_kontext,
    tiny_qwen_image,
    tiny_sd3,
    tiny_sd15,
    tiny_sdxl,
    tiny_z_image,
)
from tests.parameters import pairwise, sweep
from tests.regroup import drawn, drawn_in_turn
from tests.unit.parallel.recorded import RecordedGraphs

MODELS: dict[str, tuple[Callable[[], Any], Any]] = {
    "sdxl": (partial(tiny_sdxl, **SHALLOW), StableDiffusionXLControlNetPipeline),
    "sd15": (partial(tiny_sd15, **SHALLOW_SD), StableDiffusionControlNetPipeline),
}
NAMES = "canny", "depth"
WITHOUT_CONTROL = [
    *(make for make in WITHOUT_UNET if make not in (tiny_flux, tiny_qwen_image, tiny_sd3, tiny_z_image)),
    tiny_chroma,
    tiny_flux_fill,
    tiny_kontext,
]
Named = tuple[str, dict[str, Any]]
ONE: list[Named] = [("canny", {"scale": 0.7})]
BOTH: list[Named] = [("canny", {"scale": 0.7, "start": 0.25}), ("depth", {"scale": -0.4, "end": 0.5})]


def made(model: str) -> Any:
    return MODELS[model][0]()


def save(model: str, folder: Path) -> None:
    """ControlNets of a model."""
    for seed, name in enumerate(NAMES):
        tiny_controlnet(made(model).unet, seed + 1).save_pretrained(folder / model / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controls")
    for model in MODELS:
        save(model, folder)
    return folder


def picture(name: str) -> Image.Image:
    """Another for each name, with edges."""
    noise = np.random.default_rng(NAMES.index(name)).integers(0, 2, (9, 7, 3)) * 255
    return Image.fromarray(noise.astype(np.uint8)).resize((96, 128), Image.Resampling.NEAREST)


def params(*named: Named, **fields: Any) -> SamplingParams:
    control = tuple(Control(name=name, image=picture(name), **options) for name, options in named)
    given = {"height": 128, "width": 64, "num_inference_steps": 4, "seed": 3, **fields}
    return SamplingParams(prompt="a lake", control=control, **given)


def denoiser_of(pipeline: Any, folder: Path) -> Denoiser:
    denoiser = Denoiser(pipeline)
    for name in NAMES:
        denoiser.controls.load(ControlNetSpec(name=name, source=str(folder / name)))
    return denoiser


def alone(model: str, folder: Path, *named: Named, **fields: Any) -> np.ndarray:
    denoiser = denoiser_of(MODELS[model][0](), folder / model)
    return drawn(denoiser, denoiser.prepare(params(*named, **fields)))


def test_one_that_takes_part_in_no_step_is_said_to(folder: Path) -> None:
    denoiser = denoiser_of(made("sd15"), folder / "sd15")
    brief = "canny", {"start": 0.3, "end": 0.45}
    state = denoiser.prepare(params(brief, ("depth", {"end": 0.25})))
    assert state.warnings == ("control 'canny' takes part in none of 4 steps, from 0.3 to 0.45",)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("named", [ONE, BOTH], ids=["one", "both"])
def test_a_request_is_drawn_as_diffusers_draws_it(
    model: str, named: list[Named], scale: float, folder: Path
) -> None:
    make, kind = MODELS[model]
    own = make()
    networks = [tiny_controlnet(own.unet, NAMES.index(name) + 1) for name, _ in named]
    options = [options for _, options in named]
    pipeline = kind(**own.components, controlnet=networks if len(networks) > 1 else networks[0])
    pipeline.set_progress_bar_config(disable=True)
    pictures = [picture(name) for name, _ in named]
    listed = {
        "image": pictures,
        "controlnet_conditioning_scale": [each.get("scale", 1.0) for each in options],
        "control_guidance_start": [each.get("start", 0.0) for each in options],
        "control_guidance_end": [each.get("end", 1.0) for each in options],
    }
    given = listed if len(networks) > 1 else {name: values[0] for name, values in listed.items()}
    theirs = pipeline(
        prompt="a lake", height=128, width=64, num_inference_steps=4, guidance_scale=scale,
        generator=[torch.Generator().manual_seed(3)], **given,
    ).images[0]  # fmt: skip
    ours = alone(model, folder, *named, guidance_scale=scale)
    assert np.abs(ours - np.asarray(theirs, dtype=int)).max() <= 1
    assert np.abs(ours - alone(model, folder, guidance_scale=scale)).max() > 10


ON_PICTURES = {
    ("sdxl", False): StableDiffusionXLControlNetImg2ImgPipeline,
    ("sdxl", True): StableDiffusionXLControlNetInpaintPipeline,
    ("sd15", False): StableDiffusionControlNetImg2ImgPipeline,
    ("sd15", True): StableDiffusionControlNetInpaintPipeline,
}


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize(("model", "masked"), ON_PICTURES)
def test_a_picture_is_drawn_on_as_diffusers_draws_on_it(
    model: str, masked: bool, channels: int, tmp_path: Path
) -> None:
    """Shares are of the steps that are done; of a network for masks, a ControlNet takes the latents alone."""
    if channels == 9 and not masked:
        pytest.skip("a network for masks needs one")
    more = {**(SHALLOW if model == "sdxl" else SHALLOW_SD), "in_channels": channels}
    own = (tiny_sdxl if model == "sdxl" else tiny_sd15)(**more)
    plain = MODELS[model][0]().unet
    for name in NAMES:
        tiny_controlnet(plain, 1 + NAMES.index(name)).save_pretrained(tmp_path / name)
    pipeline = ON_PICTURES[model, masked](**own.components, controlnet=tiny_controlnet(plain, 1))
    pipeline.set_progress_bar_config(disable=True)
    below = Image.effect_noise((64, 128), 90).convert("RGB")
    mask = Image.new("L", (64, 128))
    mask.paste(255, (0, 0, 32, 128))
    theirs = pipeline(
        prompt="a lake", image=below, control_image=picture("canny"), strength=0.5, guidance_scale=4.0,
        height=128, width=64, num_inference_steps=8, generator=[torch.Generator().manual_seed(3)],
        controlnet_conditioning_scale=0.7, control_guidance_start=0.25, control_guidance_end=0.75,
        **({"mask_image": mask} if masked else {}),
    ).images[0]  # fmt: skip
    denoiser = denoiser_of(own, tmp_path)
    given = {"image": below, "strength": 0.5, **({"mask_image": mask} if masked else {})}
    named = ("canny", {"scale": 0.7, "start": 0.25, "end": 0.75})
    state = denoiser.prepare(params(named, guidance_scale=4.0, num_inference_steps=8, **given))
    assert np.abs(drawn(denoiser, state) - np.asarray(theirs, dtype=int)).max() <= 1


def by_gangs(
    model: str, folder: Path, sizes: Sequence[int], named: list[Named], config: dict[str, Any], **fields: Any
) -> list[np.ndarray]:
    load = partial(denoiser_of, folder=folder / model)
    return drawn_in_turn(MODELS[model][0], load, params(*named, **fields), sizes, config)


@pytest.mark.parametrize(
    ("model", "cfg_parallel", "sizes"),
    sweep(pairwise(list(MODELS), [False, "auto"], [(2,), (4,), (2, 1, 4)]), first=2),
)
def test_sync_mode_equals_one_device(
    model: str, cfg_parallel: Any, sizes: Sequence[int], folder: Path
) -> None:
    ended = {"guidance_scale": 4.0, "guidance_end": 0.5}
    for named, fields in ((ONE, {"guidance_scale": 1.0}), (BOTH, {"num_images": 2}), (BOTH, ended)):
        expected = alone(model, folder, *named, **fields)
        config = {"exchange": "sync", "cfg_parallel": cfg_parallel}
        for image in by_gangs(model, folder, sizes, named, config, **fields):
            assert np.abs(image - expected).max() <= 1


@pytest.mark.parametrize("model", sweep(MODELS))
def test_heads_of_controlnets_are_dealt_with_those_of_their_network(model: str, folder: Path) -> None:
    config = {"exchange": "sync", "attention": "ulysses", "cfg_parallel": False}
    for image in by_gangs(model, folder, (2,), BOTH, config):
        assert np.abs(image - alone(model, folder, *BOTH)).max() <= 1


@pytest.mark.parametrize("model", MODELS)
def test_displaced_steps_stay_near_one_device_and_need_the_control(model: str, folder: Path) -> None:
    """Also where a ControlNet begins or ends on the way, with which the layers of a step change."""
    fields = {"num_inference_steps": 12}
    config = {"exchange": "displaced", "warmup_steps": 1, "cfg_parallel": False}
    for named in (ONE, BOTH):
        expected, without = alone(model, folder, *named, **fields), alone(model, folder, **fields)
        first, *others = by_gangs(model, folder, (2,), named, config, **fields)
        assert all((image == first).all() for image in others)
        assert np.abs(first - expected).mean() < np.abs(without - expected).mean() / 2


def test_one_that_begins_late_reads_the_text_of_its_own_image(folder: Path) -> None:
    denoiser = denoiser_of(parallelize(MODELS["sdxl"][0](), connect("local")), folder / "sdxl")
    late = "canny", {"start": 0.5}
    drawn(denoiser, denoiser.prepare(params(("canny", {"scale": 4.0}))))
    after = drawn(denoiser, denoiser.prepare(params(late).model_copy(update={"prompt": "a hill"})))
    fresh = denoiser_of(MODELS["sdxl"][0](), folder / "sdxl")
    expected = drawn(fresh, fresh.prepare(params(late).model_copy(update={"prompt": "a hill"})))
    assert np.abs(after - expected).max() <= 1


def _in_turns(communicator: Communicator, folder: Path, mode: str) -> tuple[bytes, bytes]:
    """A request without control, by itself and then beside one with it, step by step in turns."""
    make = MODELS["sdxl"][0]
    pipeline = parallelize(
        make(), communicator, ParallelConfig(exchange=mode, warmup_steps=1, cfg_parallel=False)
    )
    denoiser = denoiser_of(pipeline, folder / "sdxl")
    drawn(denoiser, before := denoiser.prepare(params(num_inference_steps=6)))
    plain = denoiser.prepare(params(num_inference_steps=6))
    other = denoiser.prepare(params(*BOTH, num_inference_steps=6, seed=9))
    denoiser.step(other)
    drawn(denoiser, plain)
    denoiser.step(other)
    drawn(denoiser, again := denoiser.prepare(params(num_inference_steps=6)))
    assert torch.equal(again.latents, plain.latents)
    drawn(denoiser, other)
    return before.latents.numpy().tobytes(), plain.latents.numpy().tobytes()


@pytest.mark.parametrize("mode", ["sync", "displaced"])
def test_a_request_without_control_is_untouched_by_its_neighbours(mode: str, folder: Path) -> None:
    for before, plain in run_in_lockstep(2, partial(_in_turns, folder=folder, mode=mode)):
        assert before == plain


def test_each_rank_runs_a_controlnet_on_its_own_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def residuals(*args: Any) -> dict[str, Any]:
        given = residuals_of(*args)
        seen.append([part.shape[2] for part in given["down_block_additional_residuals"]])
        return given

    def one_step(communicator: Communicator) -> int:
        pipeline = parallelize(MODELS["sdxl"][0](), communicator, ParallelConfig(cfg_parallel=False))
        denoiser = denoiser_of(pipeline, folder / "sdxl")
        denoiser.step(state := denoiser.prepare(params(*ONE)))
        return state.latents.shape[2]

    monkeypatch.setattr(unet, "residuals_of", residuals)
    (rows,) = set(run_in_lockstep(4, one_step))
    assert {of_rank[0] for of_rank in seen} == {rows // 4}
    assert {of_rank[-1] for of_rank in seen} == {rows // 8}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_steps_with_control_are_graphs(model: str, ranks: int, folder: Path) -> None:
    """With any picture, and bit for bit what is launched; those of requests without control are kept."""
    config = ParallelConfig(exchange="displaced", warmup_steps=2, cfg_parallel=False)

    def rank(
        maker: RecordedGraphs | None, communicator: Communicator
    ) -> tuple[list[torch.Tensor], list[Any]]:
        pipeline = parallelize(MODELS[model][0](), communicator, config)
        denoiser, engine, latents = denoiser_of(pipeline, folder / model), engine_of(pipeline), []
        assert engine is not None
        engine.capture_with(maker)
        counts = []
        for index, named in enumerate((ONE, [], [], ONE, [], ONE, [], ONE, [])):
            request = params(*named, seed=index)
            if index == 3:
                shown = request.control[0].model_copy(update={"image": picture("depth")})
                request = request.model_copy(update={"control": (shown,)})
            drawn(denoiser, state := denoiser.prepare(request))
            latents.append(state.latents)
            if maker is not None:
                counts.append((len(maker.made), sum(graph.replays for graph in maker.made)))
        return latents, counts

    launched = run_in_lockstep(ranks, partial(rank, None))
    captured = run_in_lockstep(ranks, lambda communicator: rank(RecordedGraphs(), communicator))
    for (ours, counts), (theirs, _) in zip(captured, launched, strict=True):
        assert all(map(torch.equal, ours, theirs))
        made, replays = zip(*counts, strict=True)
        assert sorted({0, *replays}) == [0, *replays]
        assert made[-1] == made[-3], "neither makes the other be captured again"


def test_an_unknown_name_is_told_the_known_ones(folder: Path) -> None:
    denoiser = denoiser_of(MODELS["sdxl"][0](), folder / "sdxl")
    asked = Control(name="pose", image=picture("canny"))
    with pytest.raises(ControlNetNotFound, match="no ControlNet 'pose'; there is 'canny', 'depth'"):
        denoiser.prepare(SamplingParams(prompt="a lake", control=(asked,), seed=1))
    with pytest.raises(InvalidRequest, match="control names 'canny' more than once"):
        denoiser.prepare(params(*ONE, *ONE))
    with pytest.raises(ControlNetNotFound, match="there is none here"):
        Denoiser(MODELS["sdxl"][0]()).prepare(params(*ONE))


@pytest.mark.parametrize("make", WITHOUT_CONTROL)
def test_families_that_have_none_refuse_it_by_name(make: Callable[[], Any], folder: Path) -> None:
    denoiser = Denoiser(make())
    with pytest.raises(UnusableControlNet, match="which draws with none here"):
        denoiser.controls.load(ControlNetSpec(name="canny", source=str(folder / "sdxl" / "canny")))
    with pytest.raises(
        InvalidRequest, match="control: ControlNets are for Stable Diffusion .*FLUX.1"
    ) as refused:
        denoiser.prepare(params(*ONE))
    assert refused.value.param == "control"


def test_what_does_not_fit_is_refused_by_name_when_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    denoiser = Denoiser(MODELS["sdxl"][0]())

    def refused(source: Path, **options: Any) -> str:
        with pytest.raises(UnusableControlNet) as error:
            denoiser.controls.load(ControlNetSpec(name="x", source=str(source), **options))
        assert not denoiser.controls.networks
        return str(error.value)

    assert "cross_attention_dim" in refused(folder / "sd15" / "canny")
    assert "there is no" in refused(tmp_path / "nothing.safetensors")
    assert "is for StableDiffusion;" in refused(folder / "sdxl" / "canny", families=("StableDiffusion",))
    broken = tmp_path / "broken"
    tiny_controlnet(MODELS["sdxl"][0]().unet).save_pretrained(broken)
    (broken / "diffusion_pytorch_model.safetensors").write_bytes(b"none")
    assert "cannot be used" in refused(broken)
    pooled = tmp_path / "pooled"
    network = tiny_controlnet(MODELS["sdxl"][0]().unet)
    network.register_to_config(global_pool_conditions=True)
    network.save_pretrained(pooled)
    assert "global_pool_conditions" in refused(pooled)


def test_names_of_one_file_share_its_weights(folder: Path) -> None:
    """Each with its picture, as two of the same weights would."""
    twins, source = Denoiser(MODELS["sdxl"][0]()), str(folder / "sdxl" / "canny")
    for name in NAMES:
        twins.controls.load(ControlNetSpec(name=name, source=source))
    assert len(set(twins.controls.networks.values())) == 1
    state = twins.prepare(params(*BOTH))
    apart = denoiser_of(MODELS["sdxl"][0](), folder / "sdxl")
    apart.controls.load(ControlNetSpec(name="depth", source=str(shutil.copytree(source, folder / "copy"))))
    assert (drawn(twins, state) == drawn(apart, apart.prepare(params(*BOTH)))).all()


def test_a_state_goes_on_only_where_its_controlnets_are(folder: Path) -> None:
    make = MODELS["sdxl"][0]
    blob = denoiser_of(make(), folder / "sdxl").prepare(params(*ONE)).to_bytes()
    other = Denoiser(make())
    other.controls.load(ControlNetSpec(name="canny", source=str(folder / "sdxl" / "depth")))
    for denoiser, why in (
        (Denoiser(make()), "'canny', .* is not here"),
        (other, "'canny' has other weights"),
    ):
        with pytest.raises(UnusableControlNet, match=why):
            denoiser.adapt(DenoiseState.from_bytes(blob))


def test_a_damaged_picture_is_named() -> None:
    with pytest.raises(ValueError, match="image cannot be read"):
        SamplingParams.model_validate({"prompt": "a lake", "control": [{"name": "canny", "image": b"none"}]})


def test_pictures_of_control_leave_a_request_and_come_back() -> None:
    request = params(*BOTH)
    assert list(request.pictures) == ["control.0.image", "control.1.image"]
    without = request.without_pictures()
    assert not without.pictures and [each.name for each in without.control] == list(NAMES)
    assert without.with_pictures(request.pictures) == request


@pytest.mark.parametrize(
    ("spec", "error"), [(ControlNetSpec, UnusableControlNet), (IPAdapterSpec, UnusableIPAdapter)]
)
@pytest.mark.parametrize("source", ["/no/such/folder", "no/such/folder"])
def test_a_folder_that_is_not_there_is_no_id_of_a_strange_form(spec: Any, error: Any, source: str) -> None:
    with pytest.raises(
        error, match="'x': there is no folder /.*no/such/folder, and .* is not a Hugging Face id"
    ):
        spec(name="x", source=source).locate()


def test_nobody_can_ask_for_control_without_its_picture(folder: Path) -> None:
    with pytest.raises(ValueError, match="image is a NoneType"):
        Control(name="canny", image=None)
    described = Control.model_json_schema()
    assert described["properties"]["image"]["type"] == "string" and "image" in described["required"]
    denoiser = denoiser_of(MODELS["sdxl"][0](), folder / "sdxl")
    with pytest.raises(InvalidRequest, match="control.0.image is a NoneType"):
        denoiser.prepare(params(*ONE).without_pictures())
