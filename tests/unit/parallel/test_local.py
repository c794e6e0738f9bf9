"""What is not known to work on some rows alone is refused by name, unless a user says that it does."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig
from torch import nn

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.errors import UnsupportedModel
from distriray.parallel import engine_of
from distriray.parallel.context import PatchContext
from distriray.parallel.networks.families.unet import UNet
from distriray.parallel.networks.local import LocalCode
from distriray.parallel.networks.vae import can_be_cut
from tests.models import randomize, tiny_sd15_unet, tiny_sdxl_unet, tiny_vae
from tests.parameters import sweep

SYNC = ParallelConfig(exchange="sync", cfg_parallel=False)
MIDDLE = "mid_block.attentions.0.transformer_blocks.0"
Change = Callable[[UNet2DConditionModel], Any]


def noise(unet: UNet2DConditionModel, **inputs: Any) -> torch.Tensor:
    """What the network says of one image, (1, 4, 24, 8)."""
    generator = torch.Generator().manual_seed(1)
    added = {"text_embeds": torch.ones((1, 16)), "time_ids": torch.ones((1, 6))}
    sample, text = (torch.randn(shape, generator=generator) for shape in ((1, 4, 24, 8), (1, 9, 32)))
    return unet(sample, 500, text, added_cond_kwargs=added, **inputs).sample


def resnet(unet: UNet2DConditionModel) -> ResnetBlock2D:
    return unet.down_blocks[0].resnets[0]


def transformer(unet: UNet2DConditionModel) -> BasicTransformerBlock:
    return unet.mid_block.attentions[0].transformer_blocks[0]


def less_its_mean(layer: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output - output.mean((2, 3), keepdim=True)


def gate(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0].tanh(), *inputs[1:])


def adaptive(block: nn.Module, *inputs: Any) -> torch.Tensor:
    out = type(block).forward(block, *inputs)
    return out - out.mean((2, 3), keepdim=True)


class MergingBlock(BasicTransformerBlock):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(hidden_states.flip(1), *args, **kwargs).flip(1)


class OwnResnet(ResnetBlock2D):
    pass


class OwnLinear(nn.Linear):
    pass


class Regional(AttnProcessor2_0):
    """Lets the upper half of the picture attend to the first tokens, the lower half to the others."""

    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, text: Any = None, *args: Any
    ) -> torch.Tensor:
        return hidden_states


def recast(unet: UNet2DConditionModel, layer: nn.Module, kind: type[nn.Module]) -> None:
    layer.__class__ = kind


def drop(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    transformer(unet).attn1.to_out[1].p = 0.1
    return unet


def adapt_and_drop(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], lora_dropout=0.1))
    return unet


class Linear8bitLt(nn.Linear):
    """A stand-in for that of a package which needs a GPU."""

    __module__ = "bitsandbytes.nn.modules"
    forward = types.FunctionType(nn.Linear.forward.__code__, {"__name__": __module__, "F": F})


class PerTensor:
    """A stand-in for torchao's."""


class PerRow:
    """Another."""


def find_outliers(unet: UNet2DConditionModel, threshold: float = 6.0) -> None:
    projection = transformer(unet).attn1.to_q
    recast(unet, projection, Linear8bitLt)
    projection.state = types.SimpleNamespace(threshold=threshold)


def round_inputs(unet: UNet2DConditionModel, **how: Any) -> None:
    for name, value in how.items():
        setattr(transformer(unet).attn1.to_q.weight, name, value)


CHANGES: dict[str, tuple[Change, str]] = {
    "hook on a block": (
        lambda unet: resnet(unet).register_forward_hook(less_its_mean),
        r"layer down_blocks.0.resnets.0 has the forward hook .*less_its_mean",
    ),
    "hook before a block": (
        lambda unet: unet.mid_block.register_forward_pre_hook(gate),
        "mid_block has .*gate",
    ),
    "hook on attention": (
        lambda unet: transformer(unet).attn1.register_forward_hook(less_its_mean),
        r"transformer_blocks.0.attn1 has the forward hook",
    ),
    "hook on a convolution": (
        lambda unet: unet.conv_in.register_forward_hook(less_its_mean),
        "layer conv_in has",
    ),
    "hook on a linear layer": (
        lambda unet: transformer(unet).attn2.to_q.register_forward_hook(less_its_mean),
        r"attn2.to_q has the forward hook",
    ),
    "forward of a block": (
        lambda unet: setattr(resnet(unet), "forward", types.MethodType(adaptive, resnet(unet))),
        r"forward of layer down_blocks.0.resnets.0 was replaced by .*adaptive",
    ),
    "forward by a partial": (
        lambda unet: setattr(resnet(unet), "forward", functools.partial(adaptive, resnet(unet))),
        r"forward of layer down_blocks.0.resnets.0 was replaced by .*adaptive",
    ),
    "forward of attention": (
        lambda unet: setattr(transformer(unet).attn1, "forward", functools.partial(adaptive, unet)),
        r"forward of layer .*attn1 was replaced",
    ),
    "class of a block set": (lambda unet: recast(unet, transformer(unet), MergingBlock), "is a MergingBlock"),
    "subclass of a block": (lambda unet: recast(unet, resnet(unet), OwnResnet), "resnets.0 is a OwnResnet"),
    "subclass of a linear layer": (
        lambda unet: recast(unet, transformer(unet).attn2.to_q, OwnLinear),
        "a OwnLinear",
    ),
    "method of a block": (
        lambda unet: setattr(transformer(unet).attn1, "prepare_attention_mask", less_its_mean),
        "prepare_attention_mask of layer .*attn1 was replaced",
    ),
    "processor of cross-attention": (
        lambda unet: transformer(unet).attn2.set_processor(Regional()),
        r"attn2 uses Regional",
    ),
    "processors of all": (lambda unet: unet.set_attn_processor(Regional()), r"uses Regional"),
    "group norm as a function": (
        lambda unet: setattr(
            unet, "extra", tiny_sdxl_unet().mid_block.resnets[0].time_emb_proj.__class__.__base__()
        ),
        "layer extra is a Module",
    ),
    "DoRA of a convolution": (
        lambda unet: unet.add_adapter(LoraConfig(r=2, target_modules=["conv1"], use_dora=True)),
        "conv1 has an adapter with a DoraConv2dVariant",
    ),
    "scale of attention": (
        lambda unet: setattr(transformer(unet).attn1, "scale", 0.1),
        "attn1 has a scale of 0.1",
    ),
    "scale of cross-attention": (
        lambda unet: setattr(transformer(unet).attn2, "scale", 0.1),
        "attn2 has a scale of 0.1",
    ),
    "normalized text": (
        lambda unet: setattr(transformer(unet).attn2, "norm_cross", nn.LayerNorm(32)),
        "attn2 has a norm_cross",
    ),
    "outliers over all tokens": (
        find_outliers,
        "attn1.to_q finds outliers over all tokens; llm_int8_threshold=6 is to be 0",
    ),
    "inputs rounded alike": (
        lambda unet: round_inputs(unet, act_quant_kwargs=types.SimpleNamespace(granularity=PerTensor())),
        "attn1.to_q rounds its input by a PerTensor",
    ),
    "inputs rounded by a function": (
        lambda unet: round_inputs(unet, input_quant_func=less_its_mean),
        "attn1.to_q rounds its input; only weights are",
    ),
    "dropout in training": (
        lambda unet: drop(unet).train(),
        "attn1.to_out.1, a Dropout, drops numbers at random until eval",
    ),
    "an adapter's dropout in training": (
        lambda unet: adapt_and_drop(unet).train(),
        "to_q.lora_dropout.default, a Dropout, drops numbers at random",
    ),
}


@pytest.mark.parametrize(("change", "name"), CHANGES.values(), ids=CHANGES)
def test_what_is_not_known_to_be_local_is_refused_by_name(change: Change, name: str) -> None:
    before, between = tiny_sdxl_unet(), tiny_sdxl_unet()
    change(before)
    with pytest.raises(UnsupportedModel, match=name):
        noise(parallelize(before, connect("local"), SYNC))
    noise(parallelize(between, connect("local"), SYNC))
    change(between)
    with pytest.raises(UnsupportedModel, match=name):
        noise(between)


def test_quantized_layers_that_round_each_token_by_itself_are_known() -> None:
    unet, row = parallelize(tiny_sdxl_unet(), connect("local"), SYNC), PerRow()
    find_outliers(unet, threshold=0.0)
    round_inputs(unet, act_quant_kwargs=types.SimpleNamespace(granularity=row))
    torch.testing.assert_close(noise(unet), noise(tiny_sdxl_unet()), atol=1e-4, rtol=0)


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A class of diffusers' whose forward is another."""
    forward = ResnetBlock2D.forward

    @functools.wraps(forward)
    def other(self: ResnetBlock2D, *args: Any, **kwargs: Any) -> torch.Tensor:
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ResnetBlock2D, "forward", other)
        yield


def test_a_class_whose_forward_was_replaced_is_refused(patched: None) -> None:
    unet = parallelize(tiny_sdxl_unet(), connect("local"), SYNC)
    with pytest.raises(UnsupportedModel, match="ResnetBlock2D.forward of layer .* was replaced"):
        noise(unet)
    assert not can_be_cut(tiny_vae().decoder)


@pytest.mark.parametrize("kind", [AttnProcessor, AttnProcessor2_0])
def test_a_class_of_processors_whose_call_was_replaced_is_refused(
    kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, call = parallelize(tiny_sdxl_unet(), connect("local"), SYNC), kind.__call__
    noise(unet)

    def half(self: Any, attn: Attention, *args: Any, **kwargs: Any) -> Any:
        return 0.5 * call(self, attn, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", half)
    with pytest.raises(UnsupportedModel, match=rf"{kind.__name__}.__call__ was replaced by .*half, which"):
        noise(unet)
    assert not can_be_cut(tiny_vae().decoder)


def test_a_forward_is_its_classs_own_where_it_is_inherited_from_another_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Mine(TimestepEmbedding):
        """A class of a user's that changes nothing."""

    layer = Mine(4, 8)
    assert LocalCode().obstacle("time", layer, None) is None
    monkeypatch.setattr(TimestepEmbedding, "forward", lambda self, sample: sample)
    assert "Mine.forward of layer time was replaced by" in str(LocalCode().obstacle("time", layer, None))


def test_hooks_of_all_modules_are_refused() -> None:
    unet = parallelize(tiny_sdxl_unet(), connect("local"), SYNC)
    with (
        nn.modules.module.register_module_forward_hook(less_its_mean),
        pytest.raises(UnsupportedModel, match="has the forward hook .*less_its_mean"),
    ):
        noise(unet)


class OwnUNet(UNet2DConditionModel):
    pass


def test_a_subclass_of_the_network_is_refused_when_parallelized() -> None:
    unet = tiny_sdxl_unet()
    unet.__class__ = OwnUNet
    with pytest.raises(UnsupportedModel, match="OwnUNet is a subclass of UNet2DConditionModel"):
        parallelize(unet, connect("local"))
    parallelize(unet, connect("local"), local=[OwnUNet])
    unet = tiny_sdxl_unet()
    unet.mid_block.__class__ = type("UNetMidBlock2DCrossAttn", (type(unet.mid_block),), {})
    with pytest.raises(UnsupportedModel, match="blocks UNetMidBlock2DCrossAttn; supported are exactly"):
        parallelize(unet, connect("local"))


def test_a_forward_of_the_network_that_stood_there_before_sees_rows_and_is_refused() -> None:
    unet = tiny_sdxl_unet()
    unet.forward = functools.partial(less_its_mean, unet)
    with pytest.raises(
        UnsupportedModel, match="forward of UNet2DConditionModel was replaced by .*less_its_mean"
    ):
        noise(parallelize(unet, connect("local"), SYNC))


@pytest.mark.parametrize("before", [True, False])
def test_a_forward_of_the_networks_class_is_refused_whenever_it_was_replaced(
    before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As methods that skip some steps are installed: it sees rows, or is passed by."""
    forward = UNet2DConditionModel.forward

    def dim(unet: UNet2DConditionModel, *args: Any, **others: Any) -> torch.Tensor:
        return less_its_mean(unet, (), forward(unet, *args, **others)[0])

    unet = tiny_sdxl_unet()
    if not before:
        noise(parallelize(unet, connect("local"), SYNC))
    monkeypatch.setattr(UNet2DConditionModel, "forward", dim)
    with pytest.raises(UnsupportedModel, match=r"UNet2DConditionModel.forward of .* was replaced by .*dim"):
        noise(parallelize(unet, connect("local"), SYNC))


def test_hooks_on_the_network_itself_see_the_whole_picture() -> None:
    def rank(communicator: Communicator) -> torch.Tensor:
        unet = tiny_sdxl_unet()
        unet.register_forward_hook(lambda unet, inputs, output: less_its_mean(unet, inputs, output.sample))
        return unet_noise(parallelize(unet, communicator, SYNC))

    def unet_noise(unet: UNet2DConditionModel) -> torch.Tensor:
        added = {"text_embeds": torch.ones((1, 16)), "time_ids": torch.ones((1, 6))}
        return unet(torch.ones((1, 4, 24, 8)), 500, torch.ones((1, 9, 32)), added_cond_kwargs=added)

    alone = rank(connect("local"))
    for together in run_in_lockstep(2, rank):
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


class LocalProcessor(AttnProcessor2_0):
    """Adds itself to what a position gets of the text."""

    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        out: torch.Tensor = super().__call__(attn, hidden_states, *args, **kwargs)
        return out + hidden_states


class LocalNorm(nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Pointwise(nn.Conv2d):
    pass


def doubled(block: nn.Module) -> Callable[..., torch.Tensor]:
    def forward(*inputs: Any) -> torch.Tensor:
        return 2 * type(block).forward(block, *inputs)

    return forward


def bring_local_code(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    unet.mid_block.register_forward_pre_hook(gate)
    for block in (resnet(unet), unet.up_blocks[0].resnets[0]):
        block.forward = doubled(block)
    transformer(unet).attn2.set_processor(LocalProcessor())
    transformer(unet).norm2.__class__ = LocalNorm
    unet.up_blocks[2].resnets[0].conv_shortcut.__class__ = Pointwise
    return unet


LOCAL = [gate, doubled(nn.Identity()), LocalProcessor, LocalNorm, Pointwise]


def test_code_that_a_user_says_is_local_is_run_and_equals_one_device() -> None:
    alone = noise(bring_local_code(tiny_sdxl_unet()))
    assert not torch.allclose(alone, noise(tiny_sdxl_unet()), atol=1e-2)

    def rank(communicator: Communicator) -> torch.Tensor:
        unet = parallelize(bring_local_code(tiny_sdxl_unet()), communicator, SYNC, local=LOCAL)
        parallelize(unet, communicator, SYNC)  # what was said is remembered
        return noise(unet)

    for together in run_in_lockstep(2, rank):
        torch.testing.assert_close(together, alone, atol=2e-4, rtol=0)


@pytest.mark.parametrize("missing", range(len(LOCAL)))
def test_each_piece_of_code_has_to_be_said(missing: int) -> None:
    said = [code for index, code in enumerate(LOCAL) if index != missing]
    unet = parallelize(bring_local_code(tiny_sdxl_unet()), connect("local"), SYNC, local=said)
    with pytest.raises(UnsupportedModel):
        noise(unet)


def test_what_is_said_has_to_be_code() -> None:
    with pytest.raises(TypeError, match="classes and functions, not 'gate'"):
        parallelize(tiny_sdxl_unet(), connect("local"), local=["gate"])


def test_a_vae_with_code_of_others_is_decoded_whole() -> None:
    for change in (
        lambda decoder: decoder.mid_block.register_forward_hook(less_its_mean),
        lambda decoder: setattr(decoder.up_blocks[0], "forward", functools.partial(adaptive, decoder)),
        lambda decoder: recast(decoder, decoder.up_blocks[0].resnets[0], OwnResnet),
        lambda decoder: setattr(decoder.mid_block.attentions[0], "scale", 0.1),
    ):
        decoder = tiny_vae().decoder
        assert can_be_cut(decoder)
        change(decoder)
        assert not can_be_cut(decoder)


# In the middle of an image


def step_through(unet: UNet2DConditionModel, change: Callable[[], Any], refused: str) -> None:
    """Two steps of an image, a change, and a step that is refused."""
    added = {"text_embeds": torch.ones((1, 16)), "time_ids": torch.ones((1, 6))}
    text = torch.ones((1, 9, 32))

    def step(timestep: int) -> None:
        unet(torch.ones((1, 4, 24, 8)), timestep, text, added_cond_kwargs=added)

    engine = engine_of(unet)
    assert engine is not None
    with engine.image():
        step(900)
        step(800)
        change()
        with pytest.raises(UnsupportedModel, match=refused):
            step(700)


@pytest.mark.parametrize("change", ["hook on a block", "forward of a block", "processor of cross-attention"])
def test_what_joins_in_the_middle_of_an_image_is_refused_too(change: str) -> None:
    unet = parallelize(tiny_sdxl_unet(), connect("local"), SYNC)
    step_through(unet, lambda: CHANGES[change][0](unet), CHANGES[change][1])


@pytest.mark.parametrize(
    ("layer", "switch", "value", "refused"),
    [
        ("up_blocks.0", "s1", 0.9, "up block 0 uses FreeU"),
        ("conv_in", "padding_mode", "circular", "layer conv_in, PatchConv2d.*padding_mode=circular"),
        (f"{MIDDLE}.attn1", "scale", 0.1, "attn1 has a scale of 0.1"),
        (f"{MIDDLE}.attn1", "residual_connection", True, "attn1 is not the attention"),
        (f"{MIDDLE}.attn2", "rescale_output_factor", 2.0, "attn2 is not the attention"),
        (f"{MIDDLE}.attn1.to_out.1", "training", True, "attn1.to_out.1, a Dropout, drops"),
    ],
)
def test_a_switch_that_is_turned_in_the_middle_of_an_image_is_refused_too(
    layer: str, switch: str, value: Any, refused: str
) -> None:
    unet = drop(parallelize(tiny_sdxl_unet(), connect("local"), SYNC))
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    unet.disable_freeu()  # what it has set stays there
    step_through(unet, lambda: setattr(unet.get_submodule(layer), switch, value), refused)


def test_a_hook_of_all_modules_that_comes_in_the_middle_of_an_image_is_refused_too() -> None:
    unet, hooks = parallelize(tiny_sdxl_unet(), connect("local"), SYNC), []
    register = nn.modules.module.register_module_forward_hook
    try:
        step_through(unet, lambda: hooks.append(register(less_its_mean)), "forward hook .*less_its_mean")
    finally:
        for hook in hooks:
            hook.remove()


# What is known


def cast(unet: UNet2DConditionModel) -> None:
    unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


def offload(unet: UNet2DConditionModel) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for layer in (unet.mid_block, resnet(unet), unet):
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))


def offload_all(unet: UNet2DConditionModel) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for layer in unet.modules():
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))


def checkpoint(unet: UNet2DConditionModel) -> None:
    unet.enable_gradient_checkpointing()


def chunk(unet: UNet2DConditionModel) -> None:
    transformer(unet).set_chunk_feed_forward(1, 1)


def parametrize(unet: UNet2DConditionModel) -> None:
    nn.utils.parametrizations.weight_norm(transformer(unet).attn1.to_k)


def adapt(unet: UNet2DConditionModel) -> None:
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_out.0"], use_dora=True), "dora")
    unet.add_adapter(LoraConfig(r=2, target_modules=["conv1", "to_q"], init_lora_weights=False), "lora")
    randomize(unet, 3)
    unet.set_adapters(["dora", "lora"])


@pytest.mark.parametrize("make", sweep([tiny_sdxl_unet, lambda: tiny_sd15_unet(cross_attention_dim=32)]))
@pytest.mark.parametrize("change", [cast, offload, offload_all, checkpoint, chunk, parametrize, adapt])
def test_code_that_is_about_weights_is_known(
    change: Change, make: Callable[[], UNet2DConditionModel]
) -> None:
    alone = make()
    change(alone)
    wanted = noise(alone)

    def rank(communicator: Communicator) -> torch.Tensor:
        unet = parallelize(make(), communicator, SYNC)
        noise(unet)  # casting comes after the first image
        change(unet)
        return noise(unet)

    for found in run_in_lockstep(2, rank):
        assert F.mse_loss(found, wanted).sqrt() <= 1e-3 * wanted.std()


def remembered(forward: Callable[..., Any]) -> Callable[..., Any]:
    def remembering(*inputs: Any, **options: Any) -> Any:
        return forward(*inputs, **options)

    return remembering


def remember(unet: UNet2DConditionModel) -> None:
    """As caches of features do it: around blocks and what they are made of."""
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        layers = [
            layer
            for name in ("resnets", "attentions", "downsamplers", "upsamplers")
            for layer in getattr(block, name, None) or ()
        ]
        for module in (block, *layers):
            module.forward = remembered(module.forward)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("make", [tiny_sdxl_unet, lambda: tiny_sd15_unet(cross_attention_dim=32)])
def test_forwards_that_are_said_to_be_local_may_be_replaced_before_the_first_image_and_after(
    make: Callable[[], UNet2DConditionModel], before: bool
) -> None:
    wanted = noise(make())

    def rank(communicator: Communicator) -> torch.Tensor:
        unet = make()
        if before:
            remember(unet)
        unet = parallelize(unet, communicator, SYNC, local=[remembered(unet.forward)])
        noise(unet)
        if not before:
            remember(unet)
        return noise(unet)

    for found in run_in_lockstep(2, rank):
        assert F.mse_loss(found, wanted).sqrt() <= 1e-3 * wanted.std()


def attend_to_an_image_too(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    processor = IPAdapterAttnProcessor2_0(32, 32, num_tokens=(4,))
    randomize(processor, 5)
    transformer(unet).attn2.set_processor(processor)
    return unet


def test_processors_that_are_modules_are_known() -> None:
    text, image = torch.ones((1, 9, 32)), torch.ones((1, 1, 4, 32))
    attn = transformer(attend_to_an_image_too(tiny_sdxl_unet())).attn2
    wanted = attn(torch.ones((1, 6, 32)), (text, [image]))
    unet = parallelize(attend_to_an_image_too(tiny_sdxl_unet()), connect("local"), SYNC)
    UNet(unet).convert(PatchContext())
    found = transformer(unet).attn2(torch.ones((1, 6, 32)), (text, [image]))
    assert torch.equal(found, wanted)


@pytest.mark.sweep
def test_a_compiled_block_is_known() -> None:
    unet = parallelize(tiny_sdxl_unet(), connect("local"), SYNC)
    unet.mid_block.attentions[0] = torch.compile(unet.mid_block.attentions[0], backend="eager")
    resnet(unet).forward = torch.compile(resnet(unet).forward, backend="eager")
    unet.up_blocks[0].resnets[0].compile(backend="eager")
    torch.testing.assert_close(noise(unet), noise(tiny_sdxl_unet()), atol=1e-4, rtol=0)
