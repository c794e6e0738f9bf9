"""One picture decoded by several ranks: the claims of the patch-parallel VAE decoder."""

from __future__ import annotations

import functools
import io
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from distriray import Denoiser, ParallelConfig, SamplingParams, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.errors import GangBroken, GangMismatch
from distriray.parallel.layers.conv import PatchConv2d
from tests.models import (
    tiny_flux2,
    tiny_hunyuan_image,
    tiny_qwen_image,
    tiny_qwen_image21,
    tiny_sdxl,
    tiny_vae,
)
from tests.parameters import sweep

Shape = tuple[int, ...]
CHECK = 1280  # bytes to each peer that say what is to be decoded


def latents(shape: Shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def _decode(
    communicator: Communicator, shapes: list[Shape], make: Callable[[], Any] = tiny_sdxl
) -> list[tuple[torch.Tensor, int]]:
    """Each picture, and the bytes that its decoding has sent."""
    pipeline = parallelize(make(), communicator)
    pictures = []
    for shape in shapes:
        sent = communicator.bytes_sent
        pictures.append(
            (pipeline.vae.decode(latents(shape), return_dict=False)[0], communicator.bytes_sent - sent)
        )
    return pictures


@pytest.mark.parametrize("make", [tiny_sdxl, tiny_flux2])
@pytest.mark.parametrize("ranks", sweep([3, 2, 4]))
def test_a_gang_decodes_as_one_device_does(ranks: int, make: Callable[[], Any]) -> None:
    shapes = [(1, 4, 16, 12), (3, 4, 17, 8), (1, 4, ranks, 8)]
    alone = make().vae
    for pictures in run_in_lockstep(ranks, functools.partial(_decode, shapes=shapes, make=make)):
        for shape, (picture, sent) in zip(shapes, pictures, strict=True):
            assert close(picture, alone.decode(latents(shape), return_dict=False)[0]), shape
            assert sent > ranks * CHECK


FRAMES = [tiny_qwen_image, tiny_qwen_image21]
"""Those whose latents have frames."""


@pytest.mark.parametrize("make", [*FRAMES, tiny_hunyuan_image])
@pytest.mark.parametrize("ranks", sweep([3, 2, 4]))
def test_a_gang_decodes_as_one_device_does_with_other_layers(ranks: int, make: Callable[[], Any]) -> None:
    alone = make().vae
    channels = alone.config.get("z_dim") or alone.config.latent_channels
    sides = [(1, (8, 6)), (2, (9, 4)), (1, (ranks, 4))]
    frame = (1,) if make in FRAMES else ()
    shapes = [(batch, channels, *frame, *size) for batch, size in sides]
    for pictures in run_in_lockstep(ranks, functools.partial(_decode, shapes=shapes, make=make)):
        for shape, (picture, sent) in zip(shapes, pictures, strict=True):
            assert close(picture, alone.decode(latents(shape), return_dict=False)[0]), shape
            assert sent > ranks * CHECK


def test_frames_of_a_video_are_decoded_as_on_one_device() -> None:
    """The first frame is a picture; those behind it see what convolutions have kept of frames before."""
    shape = (1, 4, 3, 7, 4)
    expected = tiny_qwen_image().vae.decode(latents(shape), return_dict=False)[0]
    assert expected.shape == (1, 3, 9, 56, 32)
    for ((picture, sent),) in run_in_lockstep(
        3, functools.partial(_decode, shapes=[shape], make=tiny_qwen_image)
    ):
        assert close(picture, expected) and sent > 3 * CHECK


def _changed(communicator: Communicator, make: Callable[[], Any], name: str, change: Any) -> tuple[Any, int]:
    """A picture by a decoder one of whose layers was changed, and the bytes that its decoding has sent."""
    pipeline = parallelize(make(), communicator)
    change(pipeline.vae.decoder.get_submodule(name))
    sent = communicator.bytes_sent
    return pipeline.vae.decode(latents((1, 4, 1, 8, 6)), return_dict=False)[0], communicator.bytes_sent - sent


def brighten(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output + output.mean()


def hook(layer: nn.Module) -> None:
    layer.register_forward_hook(brighten)


def replace(layer: nn.Module) -> None:
    """The forward, by one that an attention block would otherwise lose when it is converted."""
    forward = layer.forward
    layer.forward = lambda x: forward(x) + x.mean()  # type: ignore[method-assign]


def wrap(layer: Any) -> None:
    layer.padding_mode = "circular"


@pytest.mark.parametrize(
    ("name", "change"),
    [("mid_block.attentions.0", hook), ("mid_block.attentions.0", replace), ("conv_in", wrap)],
)
def test_what_a_changed_layer_does_is_not_lost(name: str, change: Any) -> None:
    changed = functools.partial(_changed, make=tiny_qwen_image, name=name, change=change)
    alone, _ = changed(connect("local"))
    for picture, sent in run_in_lockstep(2, changed):
        assert sent == CHECK and torch.equal(picture, alone)


def _sources(communicator: Communicator) -> list[str | None]:
    """Where convolutions of HunyuanImage's decoder have their halo rows from, but for those of one pixel."""
    pipeline = parallelize(tiny_hunyuan_image(), communicator)
    pipeline.vae.decode(latents((1, 16, 8, 6)))
    wide = (
        m for m in pipeline.vae.decoder.modules() if isinstance(m, PatchConv2d) and m.kernel_size != (1, 1)
    )
    return [conv.halos_from for conv in wide]


def test_rows_come_with_the_statistics_of_the_norm_before_them() -> None:
    sources = run_in_lockstep(2, _sources)[0]
    upsampling, first = 4, 1
    assert sources.count(None) == upsampling + first and set(sources) == {None, "norm"}


def test_fewer_rows_than_ranks_are_decoded_by_each_alone() -> None:
    shape = (1, 4, 2, 8)
    ((picture, sent),) = run_in_lockstep(3, functools.partial(_decode, shapes=[shape]))[2]
    assert sent == 2 * CHECK and close(picture, tiny_vae().decode(latents(shape), return_dict=False)[0])


def _whole(communicator: Communicator) -> list[int]:
    """Bytes sent by decoding when told not to, by a preview, and by layers that are not known to be cut."""
    pipeline = parallelize(tiny_sdxl(), communicator, ParallelConfig(parallel_vae=False))
    sent = [communicator.bytes_sent]
    pipeline.vae.decode(latents((1, 4, 16, 8)))
    sent.append(communicator.bytes_sent)
    parallelize(pipeline, communicator)
    denoiser = Denoiser(pipeline)
    state = denoiser.prepare(SamplingParams(prompt="x", seed=0, height=128, width=64, num_inference_steps=2))
    sent.append(communicator.bytes_sent)
    if communicator.rank == 0:
        denoiser.preview(state)
    sent.append(communicator.bytes_sent)
    pipeline.vae.decoder.mid_block.attentions[0].set_processor(Strange())
    pipeline.vae.decode(latents((1, 4, 16, 8)))
    sent.append(communicator.bytes_sent)
    return [sent[1] - sent[0], sent[3] - sent[2], sent[4] - sent[3]]


class Strange:
    """An attention processor that patches do not know."""

    def __call__(self, *args, **kwargs):
        return AttnProcessor2_0()(*args, **kwargs)


def test_one_rank_alone_decodes_what_is_not_for_the_gang() -> None:
    assert run_in_lockstep(2, _whole) == [[0, 0, CHECK]] * 2


def _other_pipelines(communicator: Communicator) -> list[int]:
    """Bytes sent to decode by a pipeline whose U-Net has since been parallelized in another's, or alone."""
    pipeline = parallelize(tiny_sdxl(), communicator)
    fast = type(pipeline)(**{**pipeline.components, "vae": AutoencoderTiny()}, add_watermarker=False)
    sent = []
    for other in (fast, pipeline.unet):
        parallelize(pipeline, communicator)
        parallelize(other, communicator)
        before = communicator.bytes_sent
        if communicator.rank == 0:
            pipeline.vae.decode(latents((1, 4, 16, 8)))
        sent.append(communicator.bytes_sent - before)
    return sent


def test_a_vae_leaves_the_gang_when_its_u_net_joins_one_without_it() -> None:
    assert run_in_lockstep(2, _other_pipelines) == [[0, 0]] * 2


def _modes(communicator: Communicator) -> tuple[str, list[torch.Tensor], bool]:
    """What is logged, pictures out of inference mode and in it, and whether one rank alone has gradients."""
    displaced = ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=False)
    pipeline = parallelize(tiny_sdxl(), communicator, displaced)
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    logging.getLogger("diffusers").addHandler(handler)
    images = []
    for inference in (False, True, False):
        with torch.inference_mode(inference):
            generator = torch.Generator().manual_seed(0)
            size = {"height": 128, "width": 64, "num_inference_steps": 3}
            images.append(pipeline("x", **size, generator=generator, output_type="pt").images.clone())
    parallelize(pipeline, connect("local"))
    picture = pipeline.vae.decode(latents((1, 4, 16, 8)).requires_grad_()).sample
    return heard.getvalue(), images, picture.requires_grad


def test_inference_mode_may_come_and_go_and_nothing_is_logged() -> None:
    for logged, (image, inferred, again), differentiable in run_in_lockstep(2, _modes):
        assert logged == ""
        assert torch.equal(image, inferred) and torch.equal(image, again)
        assert differentiable


def _compiled(communicator: Communicator, make: Callable[[], Any]) -> tuple[torch.Tensor, int]:
    vae = parallelize(make(), communicator).vae
    vae.decode = torch.compile(vae.decode, backend="aot_eager")
    with torch.no_grad():
        picture = vae.decode(latents((1, 4, *((1,) if make in FRAMES else ()), 8, 6)), return_dict=False)[0]
    return picture, communicator.bytes_sent


@pytest.mark.parametrize("make", [tiny_sdxl, tiny_qwen_image])
@pytest.mark.usefixtures("compiler")
def test_a_decode_that_users_compile_decodes_as_one_device_does(make: Callable[[], Any]) -> None:
    expected, _ = _compiled(connect("local"), make)
    for picture, sent in run_in_lockstep(2, functools.partial(_compiled, make=make)):
        assert close(picture, expected) and sent > 2 * CHECK


def _slope(communicator: Communicator) -> torch.Tensor:
    """The gradient of a picture's brightness and of the latents' own size, by the latents."""
    given = latents((1, 4, 8, 8)).requires_grad_()
    picture = parallelize(tiny_sdxl(), communicator).vae.decode(given).sample
    (picture.mean() + 1e-3 * given.square().sum()).backward()
    assert given.grad is not None
    return given.grad


def test_a_gradient_of_the_latents_is_that_of_one_device() -> None:
    alone = _slope(connect("local"))
    for slope in run_in_lockstep(2, _slope):
        assert close(slope, alone)


def _tiled(communicator: Communicator) -> torch.Tensor:
    vae = parallelize(tiny_sdxl(), communicator).vae
    vae.enable_tiling()
    vae.enable_slicing()
    return vae.decode(latents((2, 4, 40, 24)), return_dict=False)[0]


def test_tiles_and_slices_are_decoded_as_on_one_device() -> None:
    alone = tiny_vae()
    alone.enable_tiling()
    alone.enable_slicing()
    assert close(run_in_lockstep(2, _tiled)[1], alone.decode(latents((2, 4, 40, 24)), return_dict=False)[0])


def _different(communicator: Communicator, what: str) -> str:
    pipeline = parallelize(tiny_sdxl(), communicator)
    try:
        if communicator.rank == 0 or what == "latents":
            pipeline.vae.decode(latents((1 + communicator.rank, 4, 16, 8)))
        elif what == "dtype":
            pipeline.vae.double().decode(latents((1, 4, 16, 8)).double())
        elif what == "weights":
            pipeline.vae.decoder.conv_out.bias.data.add_(0.1)
            pipeline.vae.decode(latents((1, 4, 16, 8)))
        elif what == "rows":
            pipeline.vae.decode(latents((1, 4, 1, 8)))
        elif what == "layers":
            pipeline.vae.decoder.mid_block.attentions[0].set_processor(Strange())
            pipeline.vae.decode(latents((1, 4, 16, 8)))
        elif what == "call":
            pipeline("x", height=128, width=64, num_inference_steps=1, output_type="latent")
    except (GangMismatch, GangBroken) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("latents", "GangMismatch: .*batch 1 and 2"),
        ("dtype", "GangMismatch: .*precision of the latents"),
        ("weights", "GangMismatch: .*sum of the weights of the decoder"),
        ("rows", "GangMismatch: .*rows 16 and 1"),
        ("layers", "GangMismatch: .*decoding in patches 1 and 0"),
        ("call", "GangMismatch: .*one is denoising while the other is decoding"),
    ],
)
def test_ranks_that_decode_different_things_are_told_so(what: str, said: str) -> None:
    assert re.match(said, run_in_lockstep(2, functools.partial(_different, what=what))[0])
