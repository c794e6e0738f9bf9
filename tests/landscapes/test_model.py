"""The models' folders: complete, small, loadable without this package, and obedient to the prompt."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline, UNet2DConditionModel
from torch.nn import functional

from deployments.models import sizes_of
from distriray.landscapes import MODEL_DIR, MODELS
from distriray.landscapes.checker import agreement, load_checker
from distriray.landscapes.draw import draw
from distriray.landscapes.scene import HELD_OUT_SEED, sample_scene
from distriray.models import ModelSpec

if TYPE_CHECKING:
    from distriray.landscapes.training.denoising import Lesson

LOADING = """
import sys, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
image = pipeline("a lake at night", height=128, width=128, num_inference_steps=2, output_type="np").images
assert image.shape == (1, 128, 128, 3), image.shape
assert not any(name.split(".")[0] == "distriray" for name in sys.modules)
"""


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon came with torch 2.9")


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest) -> Path:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def pipeline(folder: Path):  # noqa: ANN201
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, distriray.landscapes; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.distributed
def test_the_folder_loads_in_a_process_without_distriray(folder: Path) -> None:
    subprocess.run([sys.executable, "-c", LOADING, str(folder)], check=True, cwd="/")


def test_the_folder_is_at_most_40_megabytes_in_half_precision(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 40e6
    from safetensors import safe_open

    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            dtypes = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        assert dtypes <= {"F16", "I64"}, path


def test_what_is_drawn_by_default_is_what_was_trained_most() -> None:
    sizes = {name: sizes_of(ModelSpec(name=f"builtin:{name}")) for name in MODELS}
    assert {name: size and size.default for name, size in sizes.items()} == {
        "landscapes": (512, 512),
        "landscapes-sd3": (256, 256),
    }


def test_the_autoencoder_restores_held_out_scenes(pipeline) -> None:  # noqa: ANN001
    from distriray.landscapes.evaluate import reconstruction

    assert reconstruction(pipeline.vae, count=4) >= 29.0


def test_the_encoder_is_one_linear_map_of_each_patch(pipeline) -> None:  # noqa: ANN001
    from distriray.landscapes.training.denoising import encode_pictures

    picture = draw(sample_scene(HELD_OUT_SEED), 128, 128)[None]
    inputs = torch.from_numpy(picture).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(inputs).latent_dist.mean * pipeline.vae.config.scaling_factor
    assert (encode_pictures(pipeline.vae, picture).float() - latents).abs().max() < 0.05


@pytest.mark.slow
def test_training_weighs_an_error_as_the_picture_shows_it(pipeline) -> None:  # noqa: ANN001
    from distriray.landscapes.training.codec import patch_code
    from distriray.landscapes.training.denoising import encode_pictures, picture_weights

    pictures = np.stack([draw(sample_scene(HELD_OUT_SEED + index), 256, 256) for index in range(8)])
    weights = picture_weights(pipeline.vae, encode_pictures(pipeline.vae, pictures))
    # The encoder's channels are orthogonal: a linear decoder would return an error by the inverse kernel.
    linear = patch_code(pipeline.vae)[0].square().sum(dim=(1, 2, 3)).reciprocal()
    assert weights.mean().item() == pytest.approx(1)
    assert (weights / (linear / linear.mean())).log2().abs().max() < 1.5
    assert weights.max() > 10 * weights.min()


@needs_muon
def test_training_steps_change_every_weight_and_resume() -> None:
    from distriray.landscapes.training.common import MuonAndAdamW

    def build() -> tuple[torch.nn.Module, MuonAndAdamW]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 8, 3), torch.nn.GroupNorm(2, 8)
        )
        return model, MuonAndAdamW(model, outer=("0",))

    def step(model: torch.nn.Module, optimizer: MuonAndAdamW, seed: int) -> None:
        model.zero_grad()
        model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))).pow(3).sum().backward()
        optimizer.step(1e-2)

    model, optimizer = build()
    before = [weight.detach().clone() for weight in model.parameters()]
    step(model, optimizer, 0)
    assert all((old != new).any() for old, new in zip(before, model.parameters(), strict=True))
    resumed, its_optimizer = build()
    resumed.load_state_dict(model.state_dict())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in ((model, optimizer), (resumed, its_optimizer)):
        step(*each, 1)
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="view"):  # a copy would be trained in its place
        MuonAndAdamW(build()[0].to(memory_format=torch.channels_last), outer=("0",))


def test_every_size_has_its_share_of_the_training() -> None:
    from distriray.landscapes.training.dataset import BUCKETS
    from distriray.landscapes.training.denoising import SHARES

    assert SHARES.keys() == {bucket.name for bucket in BUCKETS}
    assert sum(SHARES.values()) == pytest.approx(1)
    seeds = sorted((bucket.first_seed, bucket.first_seed + bucket.count) for bucket in BUCKETS)
    assert all(end <= start for (_, end), (start, _) in pairwise(seeds)), "two sizes share scenes"


def test_a_training_takes_the_sizes_that_it_is_told_and_keeps_the_latents_of_those_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from distriray.landscapes.training import dataset, denoising

    buckets = (dataset.Bucket(256, 256, 2, 0), dataset.Bucket(256, 384, 2, 2_000_000))
    monkeypatch.setattr(dataset, "BUCKETS", buckets)
    monkeypatch.setattr(dataset, "SMALLEST", dataset.Bucket(128, 128, 3, 10_000_000))
    monkeypatch.setattr(denoising, "picture_weights", lambda _vae, latents: latents.mean())
    monkeypatch.setattr("sys.argv", ["dataset", "--out", str(tmp_path), "--sizes", "128x128", "256x256"])
    dataset.main()
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["128x128", "256x256"]
    shutil.copytree(MODEL_DIR / "vae", tmp_path / "vae")
    words = ["--pictures", str(tmp_path), "--out", str(tmp_path), "--shares"]
    kept = []
    for shares in ("128x128=3", "128x128=3,256x256=1"):
        arguments = denoising.parse(None, [*words, shares])
        denoising.cache_latents(arguments, [dataset.by_name()[name] for name in arguments.shares])
        kept.append(torch.load(tmp_path / "latents.pt"))
    assert arguments.shares == {"128x128": 3.0, "256x256": 1.0}
    first, then = (each["latents"] for each in kept)
    assert list(first) == ["128x128"] and first["128x128"].shape == (3, 8, 16, 16)
    assert torch.equal(then["128x128"], first["128x128"]) and then["256x256"].shape == (2, 8, 32, 32)
    assert torch.equal(kept[0]["weights"], kept[1]["weights"])


def test_sizes_that_there_are_no_pictures_of_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from distriray.landscapes.training.denoising import parse

    for words, says in (
        ("64x64=1", "no pictures of 64x64; there are 256x256"),
        ("128x128", "invalid"),
        ("128x128=0", "'0' is no positive number"),
    ):
        with pytest.raises(SystemExit):
            parse(None, ["--shares", words])
        assert says in capsys.readouterr().err


def trained(
    lesson: type[Lesson], monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of three steps of training on two small sizes: at once, and interrupted after the first."""
    from distriray.landscapes.training import dataset, denoising

    buckets = (dataset.Bucket(256, 256, 4, 0), dataset.Bucket(256, 384, 2, 2_000_000))
    monkeypatch.setattr(dataset, "BUCKETS", buckets)
    monkeypatch.setattr(denoising, "SHARES", {"256x256": 0.5, "256x384": 0.5})
    for bucket in buckets:
        dataset.render(bucket, folder, 1)

    def run(name: str, *steps: int) -> dict[str, torch.Tensor]:
        out = folder / name
        shutil.copytree(MODEL_DIR, out)
        for step in steps:
            words = f"--pictures {folder} --out {out} --steps {step} --batch 2"
            denoising.train(denoising.parse(None, [*words.split(), *options]), lesson)
        weights: dict[str, torch.Tensor] = torch.load(out / f"{lesson.name}.pt")["average"]
        return weights

    return run("whole", 3), run("halved", 1, 3)


@needs_muon
@pytest.mark.slow
def test_the_unets_training_resumes_exactly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from distriray.landscapes.training.unet import UNetLesson

    whole, halved = trained(UNetLesson, monkeypatch, tmp_path, "--initial", str(MODEL_DIR / "unet"))
    before = UNet2DConditionModel.from_pretrained(MODEL_DIR / "unet").state_dict()
    for name, weights in whole.items():
        assert torch.equal(weights, halved[name]), name
        assert not torch.equal(weights, before[name]), name


def test_one_token_stands_for_all_that_are_zero() -> None:
    from distriray.landscapes.training.transformer import T5_TOKENS, TRANSFORMER_CONFIG, OneForAllZeros

    torch.manual_seed(0)
    network = SD3Transformer2DModel(**{**TRANSFORMER_CONFIG, "num_layers": 2}).eval()
    text, width = torch.randn(2, 5, network.config.joint_attention_dim), network.config.pooled_projection_dim
    given = {
        "hidden_states": torch.randn(2, 8, 8, 12),
        "timestep": torch.tensor([900.0, 100.0]),
        "pooled_projections": torch.randn(2, width),
        "return_dict": False,
    }
    with torch.no_grad():
        (all_,) = network(encoder_hidden_states=functional.pad(text, (0, 0, 0, T5_TOKENS)), **given)
        (without,) = network(encoder_hidden_states=text, **given)
        network.set_attn_processor(OneForAllZeros())
        (one,) = network(encoder_hidden_states=functional.pad(text, (0, 0, 0, 1)), **given)
    assert (one - all_).abs().max() <= 1e-5 * all_.abs().max() < (without - all_).abs().max()


@pytest.mark.slow
@needs_muon
def test_the_transformers_training_resumes_exactly_and_is_exported_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from distriray.denoise import Denoiser
    from distriray.landscapes.training.export import assemble_sd3, export
    from distriray.landscapes.training.transformer import TransformerLesson
    from distriray.models import load_pipeline
    from distriray.requests import SamplingParams

    whole, halved = trained(TransformerLesson, monkeypatch, tmp_path)
    assert all(torch.equal(weights, halved[name]) for name, weights in whole.items())

    export(assemble_sd3(tmp_path / "whole"), tmp_path / "model")
    assert sum(file.stat().st_size for file in (tmp_path / "model").rglob("*")) < 40e6
    plain = StableDiffusion3Pipeline.from_pretrained(tmp_path / "model")  # by diffusers alone
    call = {"height": 128, "width": 128, "num_inference_steps": 2, "guidance_scale": 4.0}
    expected = plain(
        "a lake", generator=torch.Generator().manual_seed(1), output_type="latent", **call
    ).images
    denoiser = Denoiser(load_pipeline(ModelSpec(name=str(tmp_path / "model")), "cpu"))
    state = denoiser.prepare(SamplingParams(prompt="a lake", seed=1, **call))
    while not state.done:
        denoiser.step(state)
    assert torch.equal(state.latents, expected)


def test_training_counts_nearly_clean_latents_less() -> None:
    from distriray.landscapes.training.unet import velocity_loss

    velocity, target = torch.ones(2, 2, 4, 4), torch.zeros(2, 2, 4, 4)
    weights = torch.tensor([1.5, 0.5])
    assert velocity_loss(velocity, target, torch.tensor([0.0, 0.8]), weights).item() == pytest.approx(1.0)
    assert velocity_loss(velocity, target, torch.tensor([0.9, 0.9]), weights).item() == pytest.approx(0.5)


def test_the_critic_pulls_as_hard_as_it_may_and_no_harder() -> None:
    from distriray.landscapes.training.decoder import Critic, picture_gradient
    from distriray.landscapes.training.vae import reconstruction_loss

    torch.manual_seed(0)
    drawn, decoded, critic = torch.rand(2, 3, 64, 48), torch.rand(2, 3, 64, 48).requires_grad_(), Critic()
    (exact,) = torch.autograd.grad(reconstruction_loss(decoded, drawn), decoded)
    alone, _ = picture_gradient(critic, drawn, decoded, share=0)
    judged, _ = picture_gradient(critic, drawn, decoded, share=0.5)
    assert torch.equal(alone, exact)
    assert 0.1 * exact.norm() < (judged - exact).norm() <= 1.001 * exact.norm()

    with torch.no_grad():
        moved = decoded - (judged - exact)
        (before, seen_before), (after, seen_after), (_, expected) = (
            critic(decoded),
            critic(moved),
            critic(drawn),
        )
    assert after.mean() > before.mean()
    far, near = (
        sum((one - other).abs().mean() for one, other in zip(seen, expected, strict=True))
        for seen in (seen_before, seen_after)
    )
    assert near < far


@needs_muon
@pytest.mark.slow
def test_the_decoders_training_resumes_exactly_and_leaves_the_encoder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from distriray.landscapes.training import dataset, decoder

    buckets = (dataset.Bucket(256, 256, 4, 0), dataset.Bucket(512, 512, 2, 1_000_000))
    monkeypatch.setattr(dataset, "BUCKETS", buckets)
    monkeypatch.setattr(decoder, "CHUNK", 2)
    monkeypatch.setattr(decoder, "held_out_psnr", lambda *_: 0.0)  # printed only, and slow
    for bucket in buckets:
        dataset.render(bucket, tmp_path, 1)

    def run(name: str, *steps: int) -> dict[str, torch.Tensor]:
        out = tmp_path / name
        shutil.copytree(MODEL_DIR, out)
        unet = UNet2DConditionModel.from_pretrained(out / "unet")
        torch.save({"average": unet.state_dict()}, out / "unet.pt")
        for step in steps:
            (out / "rough" / "256x256-00002.pt").unlink(missing_ok=True)  # as if stopped while it made them
            options = f"--pictures {tmp_path} --out {out} --steps {step} --alone 1"
            decoder.train(decoder.parse(f"{options} --batch 4 --rough 8 --strength 0.09".split()))
        saved = AutoencoderKL.from_pretrained(out / "vae").state_dict()
        average = torch.load(out / "decoder.pt")["average"]
        assert all(torch.equal(weights, average[part]) for part, weights in saved.items())
        return saved

    whole, halved = run("whole", 3), run("halved", 1, 3)
    before = AutoencoderKL.from_pretrained(MODEL_DIR / "vae").state_dict()
    for name, weights in whole.items():
        assert torch.equal(weights, halved[name]), name
        assert torch.equal(weights, before[name]) != name.startswith("decoder."), name


def test_an_unknown_word_changes_no_stated_attribute(pipeline) -> None:  # noqa: ANN001
    others = dict.fromkeys({"prompt_2", "prompt_3"} & signature(pipeline.encode_prompt).parameters.keys())

    def pooled(text: str) -> torch.Tensor:
        return pipeline.encode_prompt(text, **others, device="cpu", num_images_per_prompt=1)[2]

    base = pooled("a lake at night, the moon on the left, snowy mountains")
    unknown = pooled("a lake at night, the moon on the left, qwzxv snowy mountains")
    other = pooled("a desert at noon, the sun on the right, no mountains")
    assert (base - unknown).norm() < 0.5 * (base - other).norm()


def test_the_checker_reads_drawings() -> None:
    checker = load_checker()
    right = []
    for seed in range(HELD_OUT_SEED + 50, HELD_OUT_SEED + 90):
        scene = sample_scene(seed)
        truth = {name: value for name, value in vars(scene).items() if name != "seed" and value is not None}
        right += agreement(truth, checker.read(draw(scene)[None])[0]).values()
    assert np.mean(right) >= 0.95


def test_the_model_follows_the_time_of_day(pipeline) -> None:  # noqa: ANN001
    from distriray.landscapes.evaluate import generate

    prompts = {"day": "a meadow at noon", "sunset": "a lake at sunset", "night": "a desert at night, stars"}
    pictures = generate(pipeline, list(prompts.values()), 256, steps=8, guidance=4.0, seed=0)
    assert [labels["time"] for labels in load_checker().read(pictures)] == list(prompts)
