"""IP-Adapters by request: what diffusers makes of them, by one device and by gangs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    StableDiffusionXLControlNetPipeline,
)
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file

from distriray import ParallelConfig, parallelize
from distriray.adapters import AdapterSpec
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.controls import Control, ControlNetSpec
from distriray.denoise import Denoiser, DenoiseState
from distriray.errors import InvalidRequest, IPAdapterNotFound, UnusableIPAdapter
from distriray.ip_adapters import IPAdapter, IPAdapterSpec
from distriray.parallel import engine_of
from distriray.parallel.networks.registry import denoising_module
from distriray.requests import SamplingParams
from tests.models import (
    SHALLOW,
    SHALLOW_SD,
    WITHOUT_UNET,
    save_ip_adapter,
    tiny_controlnet,
    tiny_flux,
    tiny_flux_fill,
    tiny_flux_ip_adapter,
    tiny_image_encoder,
    tiny_ip_adapter,
    tiny_sd15,
    tiny_sd21,
    tiny_sdxl,
)
from tests.parameters import pairwise, sweep
from tests.regroup import drawn, drawn_in_turn
from tests.unit.parallel.recorded import RecordedGraphs

UNETS: dict[str, Callable[[], Any]] = {
    "sdxl": partial(tiny_sdxl, **SHALLOW),
    "sd15": partial(tiny_sd15, **SHALLOW_SD),
}
MODELS: dict[str, Callable[[], Any]] = {**UNETS, "flux": tiny_flux}
EVERY = {**MODELS, "sd21": partial(tiny_sd21, **SHALLOW_SD)}
KINDS: dict[str, Literal["plain", "plus", "full"]] = {"style": "plain", "face": "plus", "whole": "full"}
"""The IP-Adapters of these tests, and how each reads its picture; all those of FLUX.1 do so plainly."""
Named = tuple[str, float]
ONE: list[Named] = [("style", 0.7)]
FACE: list[Named] = [("face", 1.5)]
WHOLE: list[Named] = [("whole", 0.9)]
BOTH: list[Named] = [("face", 0.8), ("style", -0.6)]
WITHOUT = [*(make for make in WITHOUT_UNET if make is not tiny_flux), tiny_flux_fill]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ip-adapters")
    for model, make in EVERY.items():
        for name in KINDS:
            save_ip_adapter(folder / model, weights_of(make(), name), name)
    return folder


def weights_of(pipeline: Any, name: str) -> dict[str, Any]:
    if is_flux(pipeline):
        return tiny_flux_ip_adapter(pipeline.transformer, seed=len(name))
    return tiny_ip_adapter(pipeline.unet, seed=len(name), kind=KINDS[name])


def is_flux(pipeline: Any) -> bool:
    return type(pipeline).__name__.startswith("Flux")


def spec(folder: Path, name: str, **options: Any) -> IPAdapterSpec:
    return IPAdapterSpec(name=name, source=str(folder), file=f"{name}.safetensors", **options)


def picture(name: str) -> Image.Image:
    """Another for each name."""
    noise = np.random.default_rng(len(name)).integers(0, 256, (9, 7, 3))
    return Image.fromarray(noise.astype(np.uint8)).resize((96, 128), Image.Resampling.NEAREST)


def params(*named: Named, **fields: Any) -> SamplingParams:
    asked = tuple(IPAdapter(name=name, image=picture(name), scale=scale) for name, scale in named)
    given = {"height": 128, "width": 64, "num_inference_steps": 4, "seed": 3, **fields}
    return SamplingParams(**{"prompt": "a lake", "ip_adapters": asked, **given})


def denoiser_of(pipeline: Any, folder: Path, names: Sequence[str] = tuple(KINDS)) -> Denoiser:
    denoiser = Denoiser(pipeline)
    for name in names:
        denoiser.ip_adapters.load(spec(folder, name))
    return denoiser


def alone(model: str, folder: Path, *named: Named, **fields: Any) -> np.ndarray:
    denoiser = denoiser_of(EVERY[model](), folder / model)
    return drawn(denoiser, denoiser.prepare(params(*named, **fields)))


def by_diffusers(pipeline: Any, named: Sequence[Named], **given: Any) -> np.ndarray:
    """What diffusers' own pipeline draws with those, by its own loader and encoder."""
    pipeline.register_modules(image_encoder=tiny_image_encoder())
    if named:
        weights = [weights_of(pipeline, name) for name, _ in named]
        names, scales = [""] * len(named), [scale for _, scale in named]
        pipeline.load_ip_adapter(weights, subfolder=names, weight_name=names)
        pipeline.set_ip_adapter_scale(scales if len(scales) > 1 else scales[0])
        given["ip_adapter_image"] = [picture(name) for name, _ in named]
        if is_flux(pipeline):  # some of its pipelines make one negative picture, however many IP-Adapters
            given["negative_ip_adapter_image"] = given["ip_adapter_image"]
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        prompt="a lake",
        height=128,
        width=64,
        generator=[torch.Generator().manual_seed(3)],
        **{"num_inference_steps": 4, **given},
    ).images[0]
    return np.asarray(image, dtype=int)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("model", EVERY)
@pytest.mark.parametrize("named", [ONE, FACE, WHOLE, BOTH], ids=["one", "plus", "full", "both"])
def test_a_request_is_drawn_as_diffusers_draws_it(
    model: str, named: list[Named], scale: float, folder: Path
) -> None:
    theirs = by_diffusers(EVERY[model](), named, guidance_scale=scale)
    ours = alone(model, folder, *named, guidance_scale=scale)
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours - alone(model, folder, guidance_scale=scale)).max() > 10


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_a_picture_is_drawn_on_as_diffusers_draws_on_it(model: str, masked: bool, folder: Path) -> None:
    below = Image.effect_noise((64, 128), 90).convert("RGB")
    mask = Image.new("L", (64, 128))
    mask.paste(255, (0, 0, 32, 128))
    given = {"image": below, "strength": 0.5, **({"mask_image": mask} if masked else {})}
    more = {"guidance_scale": 4.0, "num_inference_steps": 8}
    kind = AutoPipelineForInpainting if masked else AutoPipelineForImage2Image
    theirs = by_diffusers(kind.from_pipe(MODELS[model]()), BOTH, **given, **more)
    assert np.abs(alone(model, folder, *BOTH, **given, **more) - theirs).max() <= 1


def by_gangs(
    model: str, folder: Path, sizes: Sequence[int], named: list[Named], config: dict[str, Any], **fields: Any
) -> list[np.ndarray]:
    load = partial(denoiser_of, folder=folder / model)
    return drawn_in_turn(MODELS[model], load, params(*named, **fields), sizes, config)


@pytest.mark.parametrize(
    ("model", "cfg_parallel", "sizes"),
    sweep(pairwise(list(MODELS), [False, "auto"], [(2,), (4,), (2, 1, 4)]), first=2),
)
def test_sync_mode_equals_one_device(
    model: str, cfg_parallel: Any, sizes: Sequence[int], folder: Path
) -> None:
    ended = {"guidance_scale": 4.0, **({"guidance_end": 0.5} if model in UNETS else {})}
    for named, fields in ((ONE, {"guidance_scale": 1.0}), (BOTH, {"num_images": 2}), (BOTH, ended)):
        expected = alone(model, folder, *named, **fields)
        config = {"exchange": "sync", "cfg_parallel": cfg_parallel}
        for image in by_gangs(model, folder, sizes, named, config, **fields):
            assert np.abs(image - expected).max() <= 1


@pytest.mark.parametrize("model", MODELS)
def test_displaced_steps_stay_near_one_device_and_need_the_picture(model: str, folder: Path) -> None:
    fields = {"num_inference_steps": 12}
    config = {"exchange": "displaced", "warmup_steps": 1, "cfg_parallel": False}
    expected, without = alone(model, folder, *FACE, **fields), alone(model, folder, **fields)
    first, *others = by_gangs(model, folder, (2,), FACE, config, **fields)
    assert all((image == first).all() for image in others)
    assert np.abs(first - expected).mean() < np.abs(without - expected).mean() / 2


@pytest.mark.parametrize("model", UNETS)
def test_guidance_that_ends_leaves_the_picture_of_the_conditional_branch(model: str, folder: Path) -> None:
    """A state's embeddings are of both branches; the last steps take the conditional one alone."""
    ended = {"guidance_scale": 4.0, "guidance_end": 0.5}
    pipeline = MODELS[model]()

    def end(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipeline._guidance_scale = 1.0
            values = {name: value.chunk(2)[-1] for name, value in values.items() if name != "latents"}
            image_embeds = pipeline.unet.encoder_hid_proj.forward
            pipeline.unet.encoder_hid_proj.forward = lambda given: image_embeds(
                [each.chunk(2)[1] for each in given]
            )
        return values

    names = ["prompt_embeds", *(["add_text_embeds", "add_time_ids"] if model == "sdxl" else [])]
    theirs = by_diffusers(
        pipeline,
        BOTH,
        guidance_scale=4.0,
        callback_on_step_end=end,
        callback_on_step_end_tensor_inputs=names,
    )
    assert np.abs(alone(model, folder, *BOTH, **ended) - theirs).max() <= 1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("parallel", [False, True])
def test_a_request_without_has_the_bytes_of_a_model_without(model: str, parallel: bool, folder: Path) -> None:
    def draw(names: Sequence[str]) -> list[bytes]:
        """A request without IP-Adapters, before and after another with those."""
        pipeline = MODELS[model]()
        denoiser = denoiser_of(
            parallelize(pipeline, connect("local")) if parallel else pipeline, folder / model, names
        )
        states = []
        for named in ((), [(name, 2.0) for name in names], [("face", 0.0)] if names else ()):
            drawn(denoiser, state := denoiser.prepare(params(*named)))
            states.append(state.latents.numpy().tobytes())
        return states

    (before, between, after), plain = draw(tuple(KINDS)), draw(())
    assert before == after == plain[0] and between != before


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_the_network_without_any_is_the_one_that_it_was(model: str, parallel: bool, folder: Path) -> None:
    pipeline = MODELS[model]()
    plain = Denoiser(parallelize(pipeline, connect("local")) if parallel else pipeline)
    drawn(plain, plain.prepare(params()))

    def parts() -> list[Any]:
        network = denoising_module(pipeline)
        held = [
            (name, id(layer), id(getattr(layer, "processor", None)), sorted(vars(layer)))
            for name, layer in network.named_modules()
        ]
        place = getattr(network.config, "encoder_hid_dim_type", None)
        return [held, getattr(network, "encoder_hid_proj", None), place, sorted(network.state_dict())]

    before = parts()
    denoiser = denoiser_of(pipeline, folder / model)
    assert parts() == before
    drawn(denoiser, denoiser.prepare(params(*BOTH)))
    assert parts() != before
    denoiser.adapt(denoiser.prepare(params()))
    assert parts() == before


def _in_turns(communicator: Communicator, folder: Path, model: str, mode: str) -> list[bytes]:
    """A request without, by itself and then beside two with other ones, step by step in turns."""
    config = ParallelConfig(exchange=mode, warmup_steps=1, cfg_parallel=False)
    denoiser = denoiser_of(parallelize(MODELS[model](), communicator, config), folder / model)
    asked = [params(num_inference_steps=6), params(*ONE, num_inference_steps=6), params(*BOTH, seed=9)]
    by_themselves = [denoiser.prepare(each) for each in asked]
    for state in by_themselves:
        drawn(denoiser, state)
    states = [denoiser.prepare(each) for each in asked]
    denoiser.step(states[1])
    denoiser.step(states[2])
    drawn(denoiser, states[0])
    for state in states[1:]:
        drawn(denoiser, state)
    pairs = zip(by_themselves, states, strict=True)
    if mode == "sync":  # after an interruption the first step of a displaced one is synchronous
        assert all((one.latents - other.latents).abs().max() < 1e-4 for one, other in pairs)
    return [by_themselves[0].latents.numpy().tobytes(), states[0].latents.numpy().tobytes()]


@pytest.mark.parametrize("mode", ["sync", "displaced"])
@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_requests_in_turns_do_not_disturb_each_other(model: str, mode: str, folder: Path) -> None:
    for before, after in run_in_lockstep(2, partial(_in_turns, folder=folder, model=model, mode=mode)):
        assert before == after


def test_a_text_that_was_read_beside_a_picture_is_read_anew_without_it(folder: Path) -> None:
    """What layers have cached of the text before is not that of this one."""
    denoiser = denoiser_of(parallelize(MODELS["sdxl"](), connect("local")), folder / "sdxl")
    drawn(denoiser, denoiser.prepare(params()))
    drawn(denoiser, denoiser.prepare(params(*ONE, prompt="a hill")))
    after = drawn(denoiser, denoiser.prepare(params(prompt="a hill")))
    assert np.abs(after - alone("sdxl", folder, prompt="a hill")).max() <= 1


@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_steps_with_one_leave_the_graphs_of_others_alone(model: str, folder: Path) -> None:
    pipeline = parallelize(MODELS[model](), connect("local"))
    denoiser, maker, engine = denoiser_of(pipeline, folder / model), RecordedGraphs(), engine_of(pipeline)
    assert engine is not None
    engine.capture_with(maker)

    def draw(*named: Named) -> tuple[DenoiseState, int, int]:
        """The state, the graphs that were made for it, and how often any was replayed."""
        made, replays = len(maker.made), sum(graph.replays for graph in maker.made)
        drawn(denoiser, state := denoiser.prepare(params(*named)))
        return state, len(maker.made) - made, sum(graph.replays for graph in maker.made) - replays

    first, _, before = [draw() for _ in range(4)][-1]  # a kind of step is captured when it comes again
    assert before >= first.num_steps
    assert draw(*BOTH)[1:] == (0, 0)
    again, *after = draw()
    assert after == [0, before]
    assert torch.equal(again.latents, first.latents)


def _with_others(
    communicator: Communicator, folder: Path, asked: SamplingParams, adapter: Path
) -> np.ndarray:
    gang = connect("local") if communicator.world_size == 1 else communicator
    pipeline = parallelize(MODELS["sdxl"](), gang, ParallelConfig(exchange="sync", cfg_parallel=False))
    denoiser = denoiser_of(pipeline, folder / "sdxl")
    denoiser.controls.load(ControlNetSpec(name="canny", source=str(adapter.parent / "canny")))
    denoiser.adapters.learn([AdapterSpec(name="ink", source=str(adapter))])
    drawn(denoiser, denoiser.prepare(params(*FACE, prompt="before")))  # so that the adapter comes beside it
    return drawn(denoiser, denoiser.prepare(asked))


@pytest.mark.parametrize("other", ["loras", "control"])
def test_loras_and_control_beside_are_what_diffusers_draws(other: str, folder: Path, tmp_path: Path) -> None:
    make = MODELS["sdxl"]
    tiny_controlnet(make().unet, 5).save_pretrained(tmp_path / "canny")
    name = next(name for name, _ in make().unet.named_modules() if name.endswith("attn2.to_k"))
    layer = make().unet.get_submodule(name)
    generator = torch.Generator().manual_seed(8)
    factors = {
        f"unet.{name}.lora_A.weight": torch.randn((2, layer.in_features), generator=generator),
        f"unet.{name}.lora_B.weight": torch.randn((layer.out_features, 2), generator=generator),
    }
    save_file(factors, adapter := tmp_path / "ink.safetensors")
    if other == "loras":
        pipeline, given = make(), {}
        pipeline.load_lora_weights(factors)
        fields: dict[str, Any] = {"loras": [{"name": "ink"}]}
    else:
        network = tiny_controlnet(make().unet, 5)
        pipeline = StableDiffusionXLControlNetPipeline(**make().components, controlnet=network)
        given = {"image": picture("edges"), "controlnet_conditioning_scale": 0.7}
        fields = {"control": (Control(name="canny", image=picture("edges"), scale=0.7),)}
    theirs = by_diffusers(pipeline, FACE, **given)
    asked = params(*FACE, **fields)
    for size in (1, 2):
        ranks = run_in_lockstep(size, partial(_with_others, folder=folder, asked=asked, adapter=adapter))
        for image in ranks:
            assert np.abs(image - theirs).max() <= 1
    assert np.abs(theirs - alone("sdxl", folder, *FACE)).max() > 1


def test_an_unknown_name_is_told_the_known_ones(folder: Path) -> None:
    denoiser = denoiser_of(MODELS["sdxl"](), folder / "sdxl")
    asked = IPAdapter(name="pose", image=picture("style"))
    with pytest.raises(IPAdapterNotFound, match="no IP-Adapter 'pose'; there is 'face', 'style', 'whole'"):
        denoiser.prepare(SamplingParams(prompt="a lake", ip_adapters=(asked,), seed=1))
    with pytest.raises(InvalidRequest, match="ip_adapters names 'style' more than once"):
        denoiser.prepare(params(*ONE, *ONE))
    with pytest.raises(IPAdapterNotFound, match="there is none here"):
        Denoiser(MODELS["sdxl"]()).prepare(params(*ONE))


@pytest.mark.parametrize("make", WITHOUT)
def test_families_that_have_none_refuse_it_by_name(make: Callable[[], Any], folder: Path) -> None:
    denoiser = Denoiser(make())
    with pytest.raises(UnusableIPAdapter, match="which draws with none here"):
        denoiser.ip_adapters.load(spec(folder / "sdxl", "style"))
    with pytest.raises(InvalidRequest, match="ip_adapters: IP-Adapters are for Stable Diffusion") as refused:
        denoiser.prepare(params(*ONE))
    assert refused.value.param == "ip_adapters"


def test_what_does_not_fit_is_refused_by_name_when_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    pipeline = MODELS["sdxl"]()
    denoiser = denoiser_of(pipeline, folder / "sdxl", ["style"])
    expected = alone("sdxl", folder)

    def refused(name: str, source: Path = tmp_path, **options: Any) -> str:
        with pytest.raises(UnusableIPAdapter, match=f"IP-Adapter '{name}'") as error:
            denoiser.ip_adapters.load(spec(source, name, **options))
        assert denoiser.ip_adapters._loaded.keys() == {"style"}
        assert (drawn(denoiser, denoiser.prepare(params())) == expected).all()
        return str(error.value)

    def changed(name: str, /, *, without: str = "", **more: torch.Tensor) -> None:
        weights = load_file(folder / "sdxl" / "style.safetensors")
        kept = {key: value for key, value in weights.items() if key != without}
        save_file({**kept, **more}, tmp_path / f"{name}.safetensors")

    tiny_image_encoder().save_pretrained(tmp_path / "image_encoder")
    assert "its ip_adapter.1.to_k_ip.weight is" in refused("style", folder / "sd15").replace("'style'", "")
    assert "there is no" in refused("nothing")
    assert "is for StableDiffusion;" in refused("face", folder / "sdxl", families=("StableDiffusion",))
    assert "there is no" in refused("face", folder / "sdxl", image_encoder="elsewhere")
    (tmp_path / "broken.safetensors").write_bytes(b"none")
    assert "cannot be used" in refused("broken")
    changed("short", without="ip_adapter.3.to_v_ip.weight")
    assert "ip_adapter.3.to_v_ip.weight is not there" in refused("short")
    changed("long", **{"ip_adapter.99.to_k_ip.weight": torch.ones(2)})
    assert "ip_adapter.99.to_k_ip.weight is 2, and the model's not there" in refused("long")
    changed("faceid", **{"ip_adapter.0.to_k_lora.down.weight": torch.ones(2)})
    assert "a LoRA within" in refused("faceid")
    changed("other", **{"unet.conv_in.weight": torch.ones(2)})
    assert "unet.conv_in.weight is of no IP-Adapter" in refused("other")
    changed("nan", **{"image_proj.proj.bias": torch.full((4,), torch.nan)})
    assert "image_proj.proj.bias is float32, or not finite" in refused("nan")
    changed("wide", **{"image_proj.proj.weight": torch.ones((128, 9))})
    assert "cannot be used" in refused("wide")
    changed("half", without="image_proj.norm.weight")
    assert "cannot be used" in refused("half")
    norms = {f"image_proj.norm.{name}": torch.ones(7) for name in ("weight", "bias")}
    projection = {"image_proj.proj.weight": torch.ones((28, 8)), "image_proj.proj.bias": torch.ones(28)}
    changed("narrow", **norms, **projection)
    assert "its image_proj gives tokens of 7, and the model's have" in refused("narrow")
    shutil.copytree(tmp_path / "image_encoder", tmp_path / "part")
    network = load_file(whole := tmp_path / "part" / "model.safetensors")
    del network["visual_projection.weight"]
    save_file(network, whole, {"format": "pt"})
    assert "has no visual_projection.weight" in refused(
        "style", folder / "sdxl", image_encoder=str(tmp_path / "part")
    )


def test_files_are_found_as_diffusers_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(model: Any, local: Path, files: Sequence[str]) -> Path:
        asked.append((model.name, model.revision, *files))
        return tmp_path

    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr("distriray.ip_adapters.download", download)
    for encoder in ("models/image_encoder", "sdxl_models/image_encoder"):
        (tmp_path / encoder).mkdir(parents=True)
        (tmp_path / encoder / "config.json").touch()
    file = "sdxl_models/one.safetensors"
    (tmp_path / file).touch()
    for source, encoder, found in (
        (str(tmp_path), "image_encoder", "sdxl_models/image_encoder"),
        (str(tmp_path), "models/image_encoder", "models/image_encoder"),
        (str(tmp_path / file), "image_encoder", "sdxl_models/image_encoder"),
        ("h94/IP-Adapter", "models/image_encoder", "models/image_encoder"),
    ):
        one = IPAdapterSpec(name="one", source=source, file=file, image_encoder=encoder, revision="main")
        assert one.locate() == (tmp_path / file, tmp_path / found)
    ((name, revision, *files),) = asked
    assert (name, revision, files[:2]) == (
        "h94/IP-Adapter",
        "main",
        [file, "models/image_encoder/config.json"],
    )
    own = {"source": str(tmp_path / file), "revision": "main"}
    (tmp_path / "config.json").touch()
    one = IPAdapterSpec(name="one", image_encoder="openai/clip-vit-large-patch14", **own)
    assert one.locate() == (tmp_path / file, tmp_path)
    assert asked[1:] == [
        ("openai/clip-vit-large-patch14", None, "config.json", "*.safetensors", "*.safetensors.index.json")
    ]
    monkeypatch.setenv("HOME", str(tmp_path))
    for encoder in ("~/models/image_encoder", str(tmp_path / "models/image_encoder")):
        one = IPAdapterSpec(name="one", image_encoder=encoder, **own)
        assert one.locate().image_encoder == tmp_path / "models/image_encoder"
    for nothing in ("image_encodr", "/models/image_encoder", "openai/clip/vision", "./models"):
        one = IPAdapterSpec(name="one", image_encoder=nothing, **own)
        with pytest.raises(UnusableIPAdapter, match=f"IP-Adapter 'one': there is no .*{nothing.strip('./')}"):
            one.locate()
    assert len(asked) == 2
    with pytest.raises(ValueError, match="file"):
        IPAdapterSpec(name="one", source="h94/IP-Adapter", file="models/one.bin")


def test_an_image_encoder_that_nobody_has_is_said_with_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(name: str, **_: object) -> str:
        raise LocalEntryNotFoundError(f"no {name}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    one = IPAdapterSpec(name="one", source=str(tmp_path), image_encoder="models/image_encodr")
    with pytest.raises(UnusableIPAdapter, match="'one': no model 'models/image_encodr': looked for"):
        one.locate()


@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_a_state_goes_on_only_where_its_ip_adapters_are(model: str, folder: Path, tmp_path: Path) -> None:
    make = MODELS[model]
    blob = denoiser_of(make(), folder / model).prepare(params(*ONE)).to_bytes()
    save_ip_adapter(tmp_path, weights_of(make(), "face"), "style")
    for denoiser, why in (
        (Denoiser(make()), "'style', .* is not here"),
        (denoiser_of(make(), tmp_path, ["style"]), "'style' has other weights"),
    ):
        with pytest.raises(UnusableIPAdapter, match=why):
            denoiser.adapt(DenoiseState.from_bytes(blob))


def test_the_state_has_what_the_encoder_saw_and_no_picture(folder: Path) -> None:
    state = denoiser_of(MODELS["sdxl"](), folder / "sdxl").prepare(params(*BOTH, num_images=2))
    shapes = {n: tuple(v.shape) for n, v in state.values.items() if n.startswith("ip_adapter_embeds")}
    assert shapes == {"ip_adapter_embeds_0": (2, 1, 5, 8), "ip_adapter_embeds_1": (2, 1, 8)}


@pytest.mark.parametrize("size", [(7000, 9), (8, 7001)])
def test_of_a_long_strip_the_encoder_gets_but_the_middle(size: tuple[int, int], folder: Path) -> None:
    """Scaled whole, until its short side is the encoder's, a small file would take all memory."""
    denoiser = denoiser_of(MODELS["sdxl"](), folder / "sdxl", ["style"])
    encoder, sizes = denoiser.ip_adapters._loaded["style"].encoder, list[tuple[int, int]]()
    extract = encoder.feature_extractor

    def seen(image: Image.Image, **options: Any) -> Any:
        sizes.append(image.size)
        return extract(image, **options)

    encoder.feature_extractor = seen

    def embeds(ends: str, middle: str) -> torch.Tensor:
        strip, (width, height) = Image.new("RGB", size, ends), (min(side, 60) for side in size)
        strip.paste(
            Image.new("RGB", (width, height), middle), ((size[0] - width) // 2, (size[1] - height) // 2)
        )
        asked = (IPAdapter(name="style", image=strip),)
        return denoiser.prepare(params(ip_adapters=asked)).values["ip_adapter_embeds_0"]

    first = embeds("red", "blue")
    assert torch.equal(first, embeds("white", "blue")) and not torch.equal(first, embeds("red", "white"))
    assert len(sizes) == 3 and all(max(each) <= 5 * min(each) for each in sizes)


@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_it_is_loaded_in_the_dtype_of_the_model(model: str, folder: Path) -> None:
    pipeline = MODELS[model]().to(torch.bfloat16)
    denoiser = denoiser_of(pipeline, folder / model)
    state = denoiser.prepare(params(*BOTH))
    assert {state.values[f"ip_adapter_embeds_{i}"].dtype for i in range(2)} == {torch.bfloat16}
    denoiser.step(state)
    assert {each.dtype for each in denoising_module(pipeline).parameters()} == {torch.bfloat16}


def test_pictures_leave_a_request_and_come_back() -> None:
    request = params(*BOTH, control=(Control(name="canny", image=picture("edges")),))
    assert list(request.pictures) == ["control.0.image", "ip_adapters.0.image", "ip_adapters.1.image"]
    without = request.without_pictures()
    assert not without.pictures and [each.name for each in without.ip_adapters] == ["face", "style"]
    assert without.with_pictures(request.pictures) == request


@pytest.mark.parametrize("field", SamplingParams.WITH_IMAGES)
@pytest.mark.parametrize("image", [b"none", "painting.png", Path("nowhere.png"), None])
def test_a_picture_in_a_list_is_refused_by_its_place(field: str, image: Any) -> None:
    """And not as the `image` that a request may have besides."""
    names = [{"name": "one"}, {"name": "other"}] if field != "references" else [{}, {}]
    pictures = picture("one"), image
    entries = [{**name, "image": each} for name, each in zip(names, pictures, strict=True)]
    place = f"{field}.1.image"
    with pytest.raises(InvalidRequest, match=f"^{place} ") as refused:
        SamplingParams(prompt="a lake", image=picture("below"), **{field: entries})
    assert refused.value.param == place and refused.value.unquoted.startswith(f"{place} ")
