"""Adapters by request: what diffusers makes of them, for one request and for no other."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from safetensors.torch import save_file

from distriray import ParallelConfig, parallelize
from distriray.adapters import LOOK_S, AdapterSpec, Catalogue, Lora
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.denoise import Denoiser, DenoiseState
from distriray.errors import (
    AdapterNotFound,
    DistrirayError,
    GangMismatch,
    InvalidRequest,
    UnusableAdapter,
)
from distriray.models import ModelSpec
from distriray.requests import SamplingParams
from distriray.weights import place
from tests.adapters import Weights, random_weights, write
from tests.edits import shown
from tests.models import (
    SHALLOW,
    tiny_chroma,
    tiny_ernie_image,
    tiny_flux,
    tiny_flux2,
    tiny_flux2_klein,
    tiny_flux3,
    tiny_flux_fill,
    tiny_krea2,
    tiny_qwen_image,
    tiny_qwen_image21,
    tiny_sd3,
    tiny_sd15,
    tiny_sdxl,
    tiny_z_image,
)
from tests.parameters import sweep

MODELS: dict[str, Callable[[], Any]] = {
    "sdxl": partial(tiny_sdxl, **SHALLOW),
    "sd15": tiny_sd15,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "flux-fill": tiny_flux_fill,
    "qwen-image": tiny_qwen_image,
    "qwen-image-2.1": tiny_qwen_image21,
    "chroma": tiny_chroma,
    "ernie-image": tiny_ernie_image,
    "flux2": tiny_flux2,
    "flux2-klein": tiny_flux2_klein,
    "flux3": tiny_flux3,
    "krea2": tiny_krea2,
    "z-image": tiny_z_image,
}
SMALL = {"prompt": "a lake", "height": 64, "width": 64, "num_inference_steps": 2, "seed": 1}
BOTH = [("ink", 0.8), ("neon", -0.5)]
Named = list[tuple[str, float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of adapters for the tiny SDXL; that of `ink` is of the text encoders too."""
    folder = tmp_path_factory.mktemp("adapters")
    pipeline = MODELS["sdxl"]()
    write(folder / "ink.safetensors", pipeline, 1, text=True)
    write(folder / "neon.safetensors", pipeline, 2)
    return folder


def denoiser_of(pipeline: Any, folder: Path, **options: Any) -> Denoiser:
    denoiser = Denoiser(pipeline, **options)
    denoiser.adapters.learn(Catalogue("", folder=folder).specs.values())
    return denoiser


def begin(denoiser: Denoiser, *named: tuple[str, float], **fields: Any) -> DenoiseState:
    loras = [Lora(name=name, scale=scale) for name, scale in named]
    return denoiser.prepare(SamplingParams(**shown(denoiser, **{**SMALL, **fields, "loras": loras})))


def draw(denoiser: Denoiser, *named: tuple[str, float], **fields: Any) -> torch.Tensor:
    state = begin(denoiser, *named, **fields)
    while not state.done:
        denoiser.step(state)
    return state.latents


@pytest.mark.parametrize("model", sweep(MODELS, first=2))
def test_an_adapter_is_what_diffusers_makes_of_it(model: str, tmp_path: Path) -> None:
    text = model in ("sdxl", "sd15", "flux")
    for seed, name in enumerate(("ink", "neon")):
        write(tmp_path / f"{name}.safetensors", MODELS[model](), seed, text=text and name == "ink")
    plain, own = Denoiser(MODELS[model]()), denoiser_of(MODELS[model](), tmp_path)
    assert torch.equal(draw(own), draw(plain))
    for named in ([BOTH[0]], [BOTH[1]], BOTH):
        pipeline = MODELS[model]()
        for name, _ in named:
            pipeline.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
        pipeline.set_adapters([name for name, _ in named], [scale for _, scale in named])
        drawn = draw(own, *named)
        assert torch.equal(drawn, draw(Denoiser(pipeline)))
        assert not torch.allclose(drawn, draw(plain), atol=1e-2)
    assert torch.equal(draw(own), draw(plain))
    assert torch.equal(draw(own, ("ink", 0.0)), draw(plain))


def test_alphas_of_other_trainers_and_diffusers_own_scale_count(tmp_path: Path) -> None:
    pipeline = MODELS["sdxl"]()
    weights = random_weights(pipeline, 1, layers=["to_q"])
    kohya = {"lora_A": "lora_down", "lora_B": "lora_up"}
    foreign = {}
    for name, weight in weights.items():
        layer, factor, _ = name.rsplit(".", 2)
        stem = "lora_unet_" + layer.removeprefix("unet.").replace(".", "_")
        foreign[f"{stem}.{kohya[factor]}.weight"] = weight
        foreign[f"{stem}.alpha"] = torch.tensor(0.5)
    save_file(foreign, tmp_path / "kohya.safetensors")
    layers = {name.removeprefix("unet."): weight for name, weight in weights.items()}
    config = {"r": 2, "lora_alpha": 0.5, "target_modules": ["to_q"], "peft_type": "LORA"}
    pipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=config, weight_name="own.safetensors"
    )
    save_file(weights, tmp_path / "bare.safetensors")
    denoiser = denoiser_of(pipeline, tmp_path)
    a_quarter = draw(denoiser, ("bare", 0.25))
    assert not torch.allclose(a_quarter, draw(denoiser, ("bare", 1.0)), atol=1e-2)
    assert torch.equal(draw(denoiser, ("kohya", 1.0)), a_quarter)
    assert torch.equal(draw(denoiser, ("own", 1.0)), a_quarter)


def described(path: Path, pipeline: Any, text: str | None = None, **said: Any) -> None:
    """An adapter of the text encoders, with what PEFT's configuration of it says."""
    weights = random_weights(pipeline, 1, layers=["to_q"], text=True)
    parts = {name.partition(".")[0] for name in weights}
    config = {f"{part}.{name}": value for part in parts for name, value in said.items()}
    about = json.dumps(config) if text is None else text
    save_file(weights, path, metadata={LORA_ADAPTER_METADATA_KEY: about})


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which is not read"),
        ({"modules_to_save": ["to_q"]}, "modules_to_save"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"alpha_pattern": {r"((\w|_)+\.?)+!": 1}}, "which is no layer's name"),
        ({"alpha_pattern": [1]}, "is no mapping"),
        ({"lora_alpha": float("inf")}, "which is no number"),
        ({"lora_alpha": "8"}, "which is no number"),
        ({"text": "[" * 100_000}, "nested too deeply"),
    ],
)
def test_an_adapter_cannot_say_what_is_to_be_done_to_a_model(
    said: dict[str, Any], why: str, tmp_path: Path
) -> None:
    described(tmp_path / "bad.safetensors", MODELS["sdxl"](), **said)
    denoiser = denoiser_of(MODELS["sdxl"](), tmp_path)
    with pytest.raises(UnusableAdapter, match=why):
        draw(denoiser, ("bad", 1.0))
    assert torch.equal(draw(denoiser), draw(Denoiser(MODELS["sdxl"]())))


def test_weights_say_their_ranks_and_layers_and_their_file_the_alphas(tmp_path: Path) -> None:
    pipeline = MODELS["sdxl"]()
    plain = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "q_proj", "v_proj"]}
    whole = LoraConfig(**plain, init_lora_weights="gaussian", lora_dropout=0.1).to_dict()
    described(tmp_path / "plain.safetensors", pipeline, **plain)
    described(tmp_path / "whole.safetensors", pipeline, **{**whole, "target_modules": ["to_q"]})
    odd = {"r": 10**12, "rank_pattern": {"(.*)*!": 1}, "target_modules": "(.*)*!"}
    described(tmp_path / "odd.safetensors", pipeline, **{**plain, **odd})
    half = {"alpha_pattern": {"to_q": 1, "v_proj": 1, "q_proj": 1}, "lora_alpha": 100}
    described(tmp_path / "half.safetensors", pipeline, **{**plain, **half})
    described(tmp_path / "root.safetensors", pipeline, **{**plain, "lora_alpha": 3.5, "use_rslora": True})
    denoiser = denoiser_of(pipeline, tmp_path)
    drawn = draw(denoiser, ("plain", 1.0))
    assert torch.equal(draw(denoiser, ("whole", 1.0)), drawn)
    assert torch.equal(draw(denoiser, ("odd", 1.0)), drawn)
    assert torch.equal(draw(denoiser, ("half", 2.0)), drawn)
    theirs = MODELS["sdxl"]()
    theirs.load_lora_weights(tmp_path, weight_name="root.safetensors")
    assert torch.equal(draw(denoiser, ("root", 1.0)), draw(Denoiser(theirs)))


def test_requests_that_take_turns_do_not_touch_each_other(folder: Path) -> None:
    sets: list[Named] = [[], BOTH[:1], BOTH[1:], BOTH, BOTH[::-1]]
    alone = [draw(denoiser_of(MODELS["sdxl"](), folder), *named) for named in sets]
    assert not any(torch.equal(one, other) for one, other in pairwise(alone[:4]))
    denoiser = denoiser_of(MODELS["sdxl"](), folder)
    states = [begin(denoiser, *named) for named in sets]
    for _ in range(2):
        for state in states:
            denoiser.step(state)
    assert all(torch.equal(state.latents, own) for state, own in zip(states, alone, strict=True))
    pictures = [denoiser.decode(state)[0].tobytes() for state in states]
    plain = Denoiser(MODELS["sdxl"]())
    untouched = begin(plain)
    while not untouched.done:
        plain.step(untouched)
    assert pictures[0] == plain.decode(untouched)[0].tobytes()


def test_a_state_keeps_its_adapters_as_bytes_and_goes_on_with_them_elsewhere(folder: Path) -> None:
    denoiser, other = (denoiser_of(MODELS["sdxl"](), folder) for _ in range(2))
    draw(other, BOTH[1])
    state = begin(denoiser, *BOTH)
    assert [(name, scale) for name, scale, _ in state.adapters] == BOTH
    denoiser.step(state)
    moved = DenoiseState.from_bytes(state.to_bytes())
    assert moved.adapters == state.adapters
    other.adapt(moved)
    assert other.adapters.held == ("ink", "neon")
    other.step(moved)
    assert torch.equal(moved.latents, draw(denoiser, *BOTH))
    stranger = Denoiser(MODELS["sdxl"]())
    with pytest.raises(UnusableAdapter, match="'ink'"):
        stranger.adapt(moved)


def test_what_was_not_used_for_longest_makes_room_within_the_bound(tmp_path: Path) -> None:
    names = [f"style-{index}" for index in range(20)]
    pipeline = MODELS["sdxl"]()
    for seed, name in enumerate(names):
        write(tmp_path / f"{name}.safetensors", pipeline, seed, layers=["to_q", "conv1"])
    size = sum(
        weight.nbytes for weight in random_weights(MODELS["sdxl"](), 0, layers=["to_q", "conv1"]).values()
    )
    denoiser = denoiser_of(pipeline, tmp_path, most_adapter_bytes=3 * size)
    own = {name: begin(denoiser, (name, 1.0)) for name in names}
    held = [
        weight for name, weight in pipeline.unet.named_parameters() if "lora_A" in name or "lora_B" in name
    ]
    assert sum(weight.nbytes for weight in held) == denoiser.adapters.nbytes == 3 * size
    assert denoiser.adapters.held == tuple(names[-3:])
    counts = denoiser.adapters.counts
    assert (counts.hits, counts.loads, counts.evictions) == (0, 20, 17)
    begin(denoiser, (names[-3], 1.0))
    assert denoiser.adapters.held == (names[-2], names[-1], names[-3])
    assert denoiser.adapters.counts.hits == 1
    denoiser.step(own[names[0]])  # it was dropped, and is read again
    assert denoiser.adapters.held == (names[-1], names[-3], names[0])
    with pytest.raises(InvalidRequest, match=f"take {4 * size} bytes together, and {3 * size} are") as error:
        begin(denoiser, *((name, 1.0) for name in names[:4]))
    assert error.value.param == "loras"
    plain = draw(Denoiser(MODELS["sdxl"]()))
    assert torch.equal(draw(denoiser), plain)


def _without(weights: Weights, end: str) -> None:
    del weights[next(name for name in weights if name.endswith(end))]


def _put(weights: Weights, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    name = next(name for name in weights if part in name)
    weights[name] = change(weights[name])


def _rename(weights: Weights, old: str, new: str) -> None:
    for name in [name for name in weights if old in name]:
        weights[name.replace(old, new)] = weights.pop(name)


def _cut(part: str, *place: slice) -> Callable[[Weights], Any]:
    return lambda weights: _put(weights, part, lambda tensor: tensor[place].clone())


def _of_rank_0(weights: Weights) -> None:
    _put(weights, "to_q.lora_A", lambda tensor: tensor[:0].clone())
    _put(weights, "to_q.lora_B", lambda tensor: tensor[:, :0].clone())


def _with(name: str, *shape: int) -> Callable[[Weights], Any]:
    return lambda weights: weights.update({name: torch.ones(shape)})


ALL, ONE = slice(None), slice(1)
WRONG: dict[str, tuple[Callable[[Weights], Any], str]] = {
    "a layer that is not there": (lambda w: _rename(w, "mid_block", "end_block"), "end_block.* is no layer"),
    "of another width": (_cut("to_q.lora_A", ALL, slice(5)), "to_q is 2x5, and the layer takes 2x"),
    "of two ranks": (_cut("to_k.lora_B", ALL, ONE), r"to_k is \d+x1, and the layer takes"),
    "of rank 0": (_of_rank_0, "to_q is 0x"),
    "a convolution of 1x1": (_cut("conv1.lora_A", ALL, ALL, ONE, ONE), "conv1 is 2x.*x1x1, and"),
    "half a pair": (lambda w: _without(w, "to_v.lora_B.weight"), "to_v has no lora_B"),
    "NaN": (lambda w: _put(w, "to_q.lora_B", lambda t: t * float("nan")), "infinities or NaN"),
    "infinities": (lambda w: _put(w, "conv1", lambda t: t / 0.0), "infinities or NaN"),
    "whole numbers": (lambda w: _put(w, "to_q", lambda t: t.int()), "is int32, and no float"),
    "a part that is not there": (lambda w: _rename(w, "unet.", "transformer."), "is for no part of it"),
    "DoRA": (_with("unet.mid_block.dora_scale", 2), "is of a DoRA"),
    "a bias": (_with("unet.conv_in.lora_B.bias", 16), "conv_in.lora_B.bias is no weight"),
    "nothing": (lambda w: w.clear(), "has no weights"),
    "of a norm": (_with("unet.conv_norm_out.lora_A.weight", 2, 16), "is a GroupNorm, which"),
}


@pytest.fixture(scope="module")
def checked(folder: Path) -> Denoiser:
    denoiser = denoiser_of(MODELS["sdxl"](), folder)
    draw(denoiser, BOTH[1])
    return denoiser


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused_by_name_and_leaves_nothing_behind(
    checked: Denoiser, tmp_path: Path, what: str
) -> None:
    change, says = WRONG[what]
    path = write(tmp_path / "bad.safetensors", MODELS["sdxl"](), 3, change)
    names = set(checked._pipeline.unet.state_dict())
    checked.adapters.learn([AdapterSpec(name="bad", source=str(path))])
    with pytest.raises(UnusableAdapter, match=f"^adapter 'bad' does not fit the model: .*{says}"):
        begin(checked, BOTH[1], ("bad", 1.0))
    assert set(checked._pipeline.unet.state_dict()) == names
    assert checked.adapters.held == ("neon",)
    with pytest.raises(UnusableAdapter):
        checked.adapters.check(checked.adapters.known["bad"])


def test_one_for_text_encoders_that_stay_on_the_host_is_refused(folder: Path) -> None:
    pipeline = MODELS["sdxl"]()
    place(pipeline, torch.device("cpu"), offload_text=True)
    denoiser = denoiser_of(pipeline, folder)
    with pytest.raises(UnusableAdapter, match="it changes the text_encoder, which offload_text keeps"):
        begin(denoiser, ("ink", 1.0))
    assert not torch.equal(draw(denoiser, ("neon", 1.0)), draw(denoiser))  # that one is of the U-Net alone


def test_one_for_text_encoders_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    def of_two(weights: Weights) -> None:
        for name in [name for name in weights if name.startswith("text_encoder.")]:
            weights[name.replace("text_encoder.", "text_encoder_2.")] = weights[name].clone()

    write(tmp_path / "ink.safetensors", tiny_sd15(), 1, of_two, layers=["to_q"], text=True)
    denoiser = denoiser_of(tiny_sd15(), tmp_path)
    with pytest.raises(UnusableAdapter, match="text_encoder_2.* is for no part of it; it has unet, text_enc"):
        draw(denoiser, ("ink", 1.0))


def test_one_that_fails_as_it_is_put_into_the_network_is_taken_out_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = denoiser_of(MODELS["sdxl"](), folder)
    plain = draw(denoiser)
    expected = draw(denoiser, BOTH[1])

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("size mismatch\nof something")

    monkeypatch.setattr("distriray.denoise.adapters._load_lora_into_text_encoder", fails)  # after the U-Net
    with pytest.raises(UnusableAdapter, match="^adapter 'ink' cannot be loaded: size mismatch$"):
        draw(denoiser, *BOTH)
    assert denoiser.adapters.held == ("neon",)
    assert torch.equal(draw(denoiser), plain) and torch.equal(draw(denoiser, BOTH[1]), expected)
    monkeypatch.undo()
    assert torch.equal(draw(denoiser, *BOTH), draw(denoiser_of(MODELS["sdxl"](), folder), *BOTH))


def test_files_that_are_none_and_families_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    denoiser = Denoiser(MODELS["sdxl"]())
    good = write(tmp_path / "good.safetensors", MODELS["sdxl"](), 1, layers=["to_q"])
    (tmp_path / "torn.safetensors").write_bytes(good.read_bytes()[:-9])
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save({}, tmp_path / "pickle.bin")
    for source, families, says in (
        ("torn.safetensors", (), "torn.safetensors cannot be read"),
        ("text.safetensors", (), "cannot be read"),
        ("pickle.bin", (), "is no .safetensors file; others are not read"),
        ("gone.safetensors", (), "there is no file .*/gone.safetensors"),
        ("good.safetensors", ("StableDiffusion3", "Flux"), "is for StableDiffusion3, Flux; the model is"),
    ):
        spec = AdapterSpec(name="x", source=str(tmp_path / source), families=families)
        with pytest.raises(UnusableAdapter, match=f"^adapter 'x'.*{says}"):
            denoiser.adapters.check(spec)
    denoiser.adapters.check(AdapterSpec(name="x", source=str(good), families=("StableDiffusionXL",)))
    with pytest.raises(UnusableAdapter, match="neither a .safetensors file nor a Hugging Face id"):
        AdapterSpec(name="x", source="no/such/folder").locate()
    huge = Denoiser(MODELS["sdxl"](), most_adapter_bytes=good.stat().st_size // 5)
    with pytest.raises(UnusableAdapter, match="lora_cache_bytes"):
        huge.adapters.check(AdapterSpec(name="x", source=str(good)))


def test_two_names_of_the_same_weights_count_together(tmp_path: Path) -> None:
    for name in ("ink", "copy"):
        write(tmp_path / f"{name}.safetensors", MODELS["sdxl"](), 1)
    denoiser = denoiser_of(MODELS["sdxl"](), tmp_path)
    once = draw(denoiser_of(MODELS["sdxl"](), tmp_path), ("ink", 0.75))
    for _ in ("loaded", "held"):
        assert torch.equal(draw(denoiser, ("ink", 0.5), ("copy", 0.25)), once)


def test_a_file_that_is_replaced_is_read_anew_and_not_mixed_with_what_it_was(tmp_path: Path) -> None:
    path = write(tmp_path / "ink.safetensors", MODELS["sdxl"](), 1)
    denoiser = denoiser_of(MODELS["sdxl"](), tmp_path)
    state = begin(denoiser, ("ink", 1.0))
    denoiser.step(state)
    before = draw(denoiser, ("ink", 1.0))
    write(path, MODELS["sdxl"](), 2)
    os.utime(path, ns=(1, 1))
    after = draw(denoiser, ("ink", 1.0))
    assert not torch.allclose(after, before, atol=1e-2)
    moved = DenoiseState.from_bytes(state.to_bytes())
    denoiser.step(state)  # the former weights are still held
    assert torch.equal(state.latents, before)
    other = denoiser_of(MODELS["sdxl"](), tmp_path)
    with pytest.raises(UnusableAdapter, match="'ink' was replaced while a request was drawn with it"):
        other.adapt(moved)


def test_the_hub_is_asked_once_for_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(spec: ModelSpec, local: Path, files: Sequence[str]) -> Path:
        asked.append(f"{spec.name}@{spec.revision}: {', '.join(files)}")
        return tmp_path

    monkeypatch.setattr("distriray.adapters.download", download)
    write(tmp_path / "pixels.safetensors", MODELS["sdxl"](), 1, layers=["to_q"])
    spec = AdapterSpec(name="px", source="some/pixels", file="pixels.safetensors", revision="v1")
    denoiser = Denoiser(MODELS["sdxl"]())
    denoiser.adapters.learn([spec])
    for _ in range(3):
        begin(denoiser, ("px", 1.0))
    assert asked == ["some/pixels@v1: pixels.safetensors"]
    with pytest.raises(UnusableAdapter, match="pixels has no pytorch_lora_weights.safetensors; set `file`"):
        AdapterSpec(name="px", source="some/pixels").locate()


def test_an_unknown_name_is_told_the_known_ones(folder: Path) -> None:
    with pytest.raises(AdapterNotFound, match="^no adapter 'oil'; there is 'ink', 'neon'$"):
        draw(denoiser_of(MODELS["sdxl"](), folder), ("ink", 1.0), ("oil", 1.0))
    with pytest.raises(AdapterNotFound, match="there is none here"):
        draw(Denoiser(MODELS["sdxl"]()), ("oil", 1.0))


# Gangs


def _steps(
    communicator: Communicator,
    blob: bytes,
    until: int,
    folder: Path,
    config: ParallelConfig,
    before: list[Named],
    make: Callable[[], Any],
) -> tuple[bytes, torch.Tensor, bytes]:
    """The state after that step, on ranks that have drawn with other adapters before, each with its own."""
    gang = connect("local") if communicator.world_size == 1 else communicator
    pipeline = parallelize(make(), connect("local"), config)
    denoiser = denoiser_of(pipeline, folder)
    if named := before[communicator.rank]:
        draw(denoiser, *named, num_inference_steps=2)
    parallelize(pipeline, gang, config)
    state = DenoiseState.from_bytes(blob)
    denoiser.adapt(state)
    while state.step < until:
        denoiser.step(state)
    denoiser.settle(state)
    return state.to_bytes(), state.latents, denoiser.decode(state)[0].tobytes()


def by_gangs(
    folder: Path, sizes: Sequence[int], named: Named, make: Callable[[], Any], **config: Any
) -> list[tuple[bytes, torch.Tensor, bytes]]:
    state = begin(denoiser_of(make(), folder), *named, height=128, num_inference_steps=4)
    blob, before = state.to_bytes(), [[], BOTH[1:], BOTH[:1], BOTH]
    for index, size in enumerate(sizes, 1):
        until = state.num_steps * index // len(sizes)
        steps = partial(
            _steps, blob=blob, until=until, folder=folder, config=ParallelConfig(**config), before=before,
            make=make,
        )  # fmt: skip
        ranks = run_in_lockstep(size, steps)
        blob = ranks[0][0]
    return ranks


def apart(one: bytes, other: bytes) -> int:
    values = [torch.frombuffer(bytearray(each), dtype=torch.uint8).int() for each in (one, other)]
    return int((values[0] - values[1]).abs().max())


def test_two_pipelines_in_threads_load_one_after_the_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loading, most = UNet2DConditionModel.load_lora_adapter, list[int](), list[int]()

    def slowly(unet: Any, *args: Any, **options: Any) -> None:
        loading.append(1)
        most.append(len(loading))
        time.sleep(0.1)
        load(unet, *args, **options)
        loading.pop()

    monkeypatch.setattr(UNet2DConditionModel, "load_lora_adapter", slowly)
    denoisers = [denoiser_of(MODELS["sdxl"](), folder) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        one, other = pool.map(lambda denoiser: draw(denoiser, *BOTH), denoisers)
    assert most == [1] * 4 and torch.equal(one, other)


@pytest.mark.parametrize(
    ("sizes", "named"), sweep([([2], BOTH), ([2, 1, 2], BOTH[:1]), ([2, 1, 2], BOTH), ([4], BOTH)], first=2)
)
def test_a_gang_draws_one_devices_picture_whatever_its_ranks_held_before(
    folder: Path, sizes: list[int], named: Named
) -> None:
    make = MODELS["sdxl"]
    denoiser = denoiser_of(make(), folder)
    state = begin(denoiser, *named, height=128, num_inference_steps=4)
    while not state.done:
        denoiser.step(state)
    picture = denoiser.decode(state)[0].tobytes()
    for _, _, drawn in by_gangs(folder, sizes, named, make, exchange="sync", cfg_parallel=False):
        assert apart(drawn, picture) <= 1


def test_transformers_with_adapters_are_cut_to_tokens_as_they_are_without(tmp_path: Path) -> None:
    for make in (tiny_flux, tiny_sd3):
        write(tmp_path / "ink.safetensors", make(), 1)
        named = [("ink", 0.8)]
        denoiser = denoiser_of(make(), tmp_path)
        state = begin(denoiser, *named, height=128, num_inference_steps=4)
        while not state.done:
            denoiser.step(state)
        gang = by_gangs_without_history(tmp_path, named, make)
        assert all(apart(drawn, denoiser.decode(state)[0].tobytes()) <= 1 for _, _, drawn in gang)


def by_gangs_without_history(
    folder: Path, named: Named, make: Callable[[], Any]
) -> list[tuple[bytes, torch.Tensor, bytes]]:
    blob = begin(denoiser_of(make(), folder), *named, height=128, num_inference_steps=4).to_bytes()
    steps = partial(
        _steps, blob=blob, until=4, folder=folder, before=[[], []], make=make,
        config=ParallelConfig(exchange="sync", cfg_parallel=False),
    )  # fmt: skip
    return run_in_lockstep(2, steps)


def test_displaced_steps_are_the_same_whatever_ranks_held_before(folder: Path) -> None:
    make = MODELS["sdxl"]
    ranks = by_gangs(folder, (2,), BOTH, make, exchange="displaced", warmup_steps=1, cfg_parallel=False)
    state = begin(denoiser_of(make(), folder), *BOTH, height=128, num_inference_steps=4)
    steps = partial(
        _steps, blob=state.to_bytes(), until=4, folder=folder, before=[[], []], make=make,
        config=ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=False),
    )  # fmt: skip
    for one, other in zip(ranks, run_in_lockstep(2, steps), strict=True):
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("wrong", ["weights", "scale", "order", "none"])
def test_ranks_with_other_adapters_are_told_so(folder: Path, tmp_path: Path, wrong: str) -> None:
    """As where a file was replaced between two ranks' looks at it."""
    other = tmp_path / "other"
    write(other / "ink.safetensors", MODELS["sdxl"](), 5)
    write(other / "neon.safetensors", MODELS["sdxl"](), 2)
    named: Named = {"scale": [("ink", 0.7), BOTH[1]], "order": BOTH[::-1], "none": []}.get(wrong, BOTH)

    def rank(communicator: Communicator) -> str | None:
        mine = communicator.rank == 0
        pipeline = parallelize(MODELS["sdxl"](), communicator, ParallelConfig(exchange="sync"))
        at = other if wrong == "weights" and not mine else folder
        state = begin(
            denoiser := denoiser_of(pipeline, at), *(BOTH if mine else named), prompt="", height=128
        )
        try:
            denoiser.step(state)
        except GangMismatch as error:
            return str(error)
        return None

    for message in run_in_lockstep(2, rank):
        assert message is not None and ("adapters" in message or "prompt" in message)


# What there is


def test_a_catalogue_lists_what_is_configured_and_what_a_folder_has_now(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listed = [AdapterSpec(name="oil", source="some/oil"), AdapterSpec(name="neon", source="some/neon")]
    catalogue = Catalogue("some/model", listed, tmp_path)
    assert catalogue.names == ("neon", "oil")
    edition = catalogue.edition
    for name in ("ink.safetensors", "neon.safetensors", "ink.bin", ".hidden.safetensors", "a b.safetensors"):
        (tmp_path / name).touch()
    (found,) = catalogue.find([Lora(name="ink")])  # at once, though it was looked at a moment ago
    assert found.source == str(tmp_path / "ink.safetensors")
    assert catalogue.names == ("ink", "neon", "oil") and catalogue.edition == edition + 1
    assert catalogue.specs["neon"].source == "some/neon"
    (tmp_path / "ink.safetensors").unlink()
    catalogue._looked_s -= LOOK_S
    assert catalogue.names == ("neon", "oil")
    with pytest.raises(AdapterNotFound, match="no adapter 'ink'; there is 'neon', 'oil'"):
        catalogue.find([Lora(name="ink")])
    assert not caplog.records
    assert Catalogue("some/model", folder=tmp_path / "nowhere").names == ()
    assert f"there is no folder of adapters {tmp_path / 'nowhere'}" in caplog.text


@pytest.mark.parametrize(
    "name", ["", "../ink", "/etc/passwd", "a/b", "..", "a\\b", "ink\n", "x" * 101, "~ink"]
)
def test_what_is_a_path_is_no_name(name: str) -> None:
    with pytest.raises(InvalidRequest, match="loras"):
        SamplingParams(prompt="x", loras=[{"name": name}])


def test_a_request_names_an_adapter_once(folder: Path) -> None:
    denoiser = denoiser_of(MODELS["sdxl"](), folder)
    with pytest.raises(InvalidRequest, match="loras names 'ink' more than once") as error:
        begin(denoiser, ("ink", 1.0), ("neon", 1.0), ("ink", 0.5))
    assert error.value.param == "loras"
    with pytest.raises(InvalidRequest, match="loras names 'ink' more than once"):
        Catalogue("", folder=folder).find((Lora(name="ink"), Lora(name="ink", scale=0.5)))


def test_a_request_names_an_adapter_with_a_finite_scale() -> None:
    for loras, param, says in (
        ([{"name": "ink", "scale": float("nan")}], "loras.0.scale", "loras"),
        ([{"name": "ink"}, {"name": "ink", "scale": 10.5}], "loras.1.scale", "less than or equal to 10"),
        ([{"name": "ink", "path": "/x"}], "loras.0.path", "there is no field"),
        ("ink", "loras", "loras"),
    ):
        with pytest.raises(DistrirayError, match=says) as error:
            SamplingParams(prompt="x", loras=loras)
        assert getattr(error.value, "param", None) == param
