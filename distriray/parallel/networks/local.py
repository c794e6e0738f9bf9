"""Code of networks that is known to be local: what it computes of some rows needs no others.

A rank has its rows of the picture and no more. Layers that look beyond them are converted, so that they ask
the other ranks; everything else must look at one position at a time. What is not known to do so is named, and
refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from diffusers.models import activations, attention, embeddings
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets import unet_2d_blocks
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from distriray.parallel.layers.bare import given_to_compiler
from distriray.parallel.layers.conv import PatchConv2d, PatchDownsample2D
from distriray.parallel.layers.group_norm import PatchGroupNorm

# Exactly these: a subclass may compute something else.
TOKENWISE = frozenset[type](
    {
        nn.Linear,
        nn.LayerNorm,
        nn.Embedding,
        nn.Dropout,
        nn.Identity,
        nn.SiLU,
        nn.GELU,
        nn.Mish,
        nn.ReLU,
        nn.Sequential,
        nn.ModuleList,
        nn.ModuleDict,
        nn.ParameterList,
        nn.ParameterDict,
        activations.GEGLU,
        activations.GELU,
        activations.ApproximateGELU,
        attention.FeedForward,
        embeddings.Timesteps,
        embeddings.GaussianFourierProjection,
        embeddings.TimestepEmbedding,
    }
)
"""Classes of layers that look at one position, or at no position, whatever network they are in."""
SPATIAL = TOKENWISE | {
    nn.Conv2d,
    PatchConv2d,
    nn.GroupNorm,
    PatchGroupNorm,
    attention.BasicTransformerBlock,
    Attention,
    embeddings.TextTimeEmbedding,
    embeddings.AttentionPooling,
    Downsample2D,
    PatchDownsample2D,
    Upsample2D,
    ResnetBlock2D,
    Transformer2DModel,
    Decoder,
    unet_2d_blocks.DownBlock2D,
    unet_2d_blocks.CrossAttnDownBlock2D,
    unet_2d_blocks.UNetMidBlock2D,
    unet_2d_blocks.UNetMidBlock2DCrossAttn,
    unet_2d_blocks.CrossAttnUpBlock2D,
    unet_2d_blocks.UpBlock2D,
    unet_2d_blocks.UpDecoderBlock2D,
}
# Processors that let each position attend to tokens which every rank has. Some of them are modules.
_CROSS_ATTENTION = {
    f"diffusers.models.attention_processor.{name}"
    for name in (
        "AttnProcessor",
        "AttnProcessor2_0",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
        "FusedAttnProcessor2_0",
        "IPAdapterAttnProcessor",
        "IPAdapterAttnProcessor2_0",
        "IPAdapterXFormersAttnProcessor",
        "CustomDiffusionAttnProcessor",
        "CustomDiffusionAttnProcessor2_0",
        "CustomDiffusionXFormersAttnProcessor",
    )
}
# Of packages that need not be installed, by name.
_ADAPTERS = ("lora", "ia3", "adalora", "loha", "lokr", "oft", "boft", "vera", "hra", "fourierft")
_PACKAGES = (*(f"peft.tuners.{name}." for name in _ADAPTERS), "peft.tuners._buffer_dict")
_NAMED_MODULES = {"peft.utils.other.ModulesToSaveWrapper", "torch._dynamo.eval_frame.OptimizedModule"}
_LINEAR_PACKAGES = ("bitsandbytes.", "torchao.", "optimum.quanto.", "diffusers.quantizers.")
# A DoRA of a convolution convolves by itself; other variants of LoRA look at which token it is.
_LORA_VARIANTS = {"DoraLinearVariant"}
# Hooks that are about weights: where they are, and in which precision.
_HOOKS = {
    "diffusers.hooks.layerwise_casting.LayerwiseCastingHook",
    "diffusers.hooks.layerwise_casting.PeftInputAutocastDisableHook",
    "diffusers.hooks.group_offloading.GroupOffloadingHook",
    "diffusers.hooks.group_offloading.LazyPrefetchGroupOffloadingHook",
    "diffusers.hooks.group_offloading.LayerExecutionTrackerHook",
    "accelerate.hooks.AlignDevicesHook",
    "accelerate.hooks.CpuOffload",
    "accelerate.hooks.LayerwiseCastingHook",
    "torch.nn.utils.spectral_norm.SpectralNorm",
    "torch.nn.utils.weight_norm.WeightNorm",
}
ADVICE = (
    "each rank has only its rows of the picture, and this is not known to look at one position at a time; "
    "if it does, say so: parallelize(..., local=[...])"
)


class LocalCode:
    """Code that is known to be local, or that a user says is.

    Args:
        said: by a user: classes, of modules, attention processors and hooks; functions, that are hooks or
            stand in the place of a layer's forward. All closures of one function are one.

    Raises:
        TypeError: something in `said` is neither a class nor callable.
    """

    def __init__(self, said: Iterable[Any] = ()) -> None:
        said = list(said)
        for code in said:
            if not callable(code):
                raise TypeError(f"local lists classes and functions, not {code!r}")
        self._said = frozenset(map(_identity, said))

    def __or__(self, other: LocalCode) -> LocalCode:
        both = LocalCode()
        both._said = self._said | other._said
        return both

    def __bool__(self) -> bool:
        """Whether a user has said anything."""
        return bool(self._said)

    def says(self, code: Any) -> bool:
        """Whether a user says that a function, an object or its class is local."""
        return _identity(code) in self._said or type(code) in self._said

    def obstacle(self, name: str, module: nn.Module, kinds: frozenset[type] | None = SPATIAL) -> str | None:
        """The part of a layer that is not known to be local, None if all is; its children are not looked at.

        Args:
            kinds: the classes that are known to be local, or are converted; those of networks over feature
                maps unless given. None is all, of a layer that every rank computes whole, though perhaps for
                half of the batch.
        """
        if ".parametrizations" in name:
            return None  # computes weights
        layer, kind = f"layer {name}", _kind(module)
        if not self.says(module):
            if (rounding := _rounding_over_tokens(module)) is not None:
                return f"{layer} {rounding}"
            if _draws_numbers(module):
                return f"layer {name}, a {kind.__name__}, drops numbers at random until eval() is called"
            if kinds is not None and not _is_known(kind, kinds):
                return f"{layer} is a {kind.__name__}"
            for variant in vars(module).get("lora_variant", {}).values():
                if type(variant).__name__ not in _LORA_VARIANTS:
                    return f"{layer} has an adapter with a {type(variant).__name__}"
        return self.obstacle_around(layer, module, vars(module).get("forward")) or self._hook(layer, module)

    def obstacle_around(self, layer: str, module: nn.Module, forward: Any) -> str | None:
        """A replacement of a module's forward, or its class's, or other methods, unless known to be local.

        Args:
            forward: what is called; None is that of the class.
        """
        of_class: Any = _kind(module)
        said = self.says(module) or of_class.forward is nn.Module.forward
        if not said and _is_of_another(of_class, "forward"):
            return f"{of_class.__name__}.forward of {layer} was replaced by {_name(of_class.forward)}"
        for code in _around(module, forward):
            if not self.says(code) and _full_name(type(code)) not in _HOOKS:
                return f"the forward of {layer} was replaced by {_name(code)}"
        kind: Any = type(module)
        for method in vars(module).keys() & _methods(kind):
            if not self.says(vars(module)[method]):
                return f"{method} of {layer} was replaced by {_name(vars(module)[method])}"
        return None

    def attends_locally(self, processor: Any) -> bool:
        """Whether a processor of cross-attention lets each position attend by itself."""
        kind: Any = type(processor)
        known = _full_name(kind) in _CROSS_ATTENTION and not _is_of_another(kind, "__call__")
        return known or self.says(processor)

    def _hook(self, layer: str, module: nn.Module) -> str | None:
        everywhere = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
        for hooks in (module._forward_hooks, module._forward_pre_hooks, *everywhere):
            for hook in hooks.values() if hooks else ():
                if not self.says(hook) and _full_name(type(hook)) not in _HOOKS:
                    return f"{layer} has the forward hook {_name(hook)}"
        return None


def replaced_call(kinds: Iterable[type]) -> str | None:
    """Words of an error for a class of attention processors whose `__call__` others have replaced."""
    for kind in kinds:
        if _is_of_another(kind, "__call__"):
            return f"{kind.__name__}.__call__ was replaced by {_name(kind.__call__)}"
    return None


def _identity(code: Any) -> Any:
    """The identity of a piece of code: a class, the code of a function, or an object's class."""
    while isinstance(code, functools.partial):
        code = code.func
    code = getattr(code, "__func__", code)
    if isinstance(code, type | BuiltinFunctionType):
        return code
    return getattr(code, "__code__", type(code))


def _kind(module: nn.Module) -> Any:
    """The class of a module, without what `torch.nn.utils.parametrize` does to the weights of linear ones."""
    kind = type(module)
    return nn.Linear if parametrize.is_parametrized(module) and kind.__base__ is nn.Linear else kind


@functools.cache
def _is_known(kind: Any, kinds: frozenset[type]) -> bool:
    """Whether modules of a class look at one position at a time, or are converted."""
    name = _full_name(kind)
    if kind in kinds or name in _NAMED_MODULES or name in _CROSS_ATTENTION:
        return True
    quantized = issubclass(kind, nn.Linear) and kind.__module__.startswith(_LINEAR_PACKAGES)
    return quantized or kind.__module__.startswith(_PACKAGES)


@functools.cache
def _methods(kind: Any) -> frozenset[str]:
    """The methods that a class of modules adds to `nn.Module`'s, and those that call its forward."""
    added = {
        name
        for base in kind.__mro__
        if not issubclass(nn.Module, base)
        for name, value in vars(base).items()
        if isinstance(value, FunctionType | staticmethod | classmethod) and not hasattr(nn.Module, name)
    }
    return frozenset(added | {"_call_impl", "_wrapped_call_impl"})


def _rounding_over_tokens(module: nn.Module) -> str | None:
    """How a quantized layer may round a token's input by what others are; None where it is known not to."""
    if not isinstance(module, nn.Linear):
        return None
    threshold: float = getattr(vars(module).get("state"), "threshold", 0)  # bitsandbytes, LLM.int8()
    if threshold > 0:
        return f"finds outliers over all tokens; llm_int8_threshold={threshold:g} is to be 0"
    weight = module._parameters.get("weight")
    rounded = getattr(weight, "act_quant_kwargs", None)  # torchao, since 0.13
    granularity = type(getattr(rounded, "granularity", None)).__name__
    if rounded is not None and granularity not in ("PerRow", "PerToken"):
        return f"rounds its input by a {granularity}; only weights, or inputs by the row, are to be rounded"
    if getattr(weight, "input_quant_func", None) is not None:  # torchao before that
        return "rounds its input; only weights are to be rounded"
    return None


def _draws_numbers(module: nn.Module) -> bool:
    """Whether it is dropout in training, for which each rank would draw numbers of its own rows."""
    rate = vars(module).get("p")
    return module.training and isinstance(rate, float) and 0 < rate < 1


def _is_of_another(kind: type, method: str) -> bool:
    """Whether a method was written in another package than the class that has it, or that inherits it."""
    owner = next(each for each in kind.__mro__ if method in vars(each))
    origin = _origin(vars(owner)[method])
    return origin is not None and origin.partition(".")[0] != owner.__module__.partition(".")[0]


def _around(module: nn.Module, forward: Any) -> Iterator[Any]:
    """Whatever runs when a module's forward is called, besides that of its class."""
    while forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        function = getattr(forward, "func", forward)  # of a partial
        origin = _origin(function) or ""
        if origin == "diffusers.hooks.hooks":
            registry = vars(module)["_diffusers_hook"]
            yield from registry.hooks.values()
            first = registry._fn_refs[0]
            forward = first.forward if first.original_forward is None else first.original_forward
        elif origin == "accelerate.hooks":
            yield from getattr(vars(module)["_hf_hook"], "hooks", (vars(module)["_hf_hook"],))
            forward = vars(module)["_old_forward"]
        elif isinstance(forward, functools.partial) and not forward.args and not forward.keywords:
            forward = function
        elif given_to_compiler(function) is not function:
            forward = given_to_compiler(function)
        elif isinstance(forward, MethodType) and isinstance(forward.__self__, nn.Module) and _calls(forward):
            return  # of a module within this one, which is looked at by itself
        else:
            yield forward
            return


def _calls(method: MethodType) -> bool:
    return method.__func__ in (nn.Module.__call__, nn.Module._call_impl, nn.Module._wrapped_call_impl)


def _origin(function: Any) -> str | None:
    """The module that a function was written in; None of what is not written in Python."""
    found: str | None = getattr(function, "__globals__", {}).get("__name__")
    return found


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _name(code: Any) -> str:
    while isinstance(code, functools.partial):
        code = code.func
    kind: Callable[..., Any] = code if hasattr(code, "__qualname__") else type(code)
    return f"{kind.__module__}.{kind.__qualname__}"
