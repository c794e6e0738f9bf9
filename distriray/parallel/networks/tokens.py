"""Diffusion transformers: networks over the tokens of an image and of its text.

A rank has some tokens of both. Only attention looks beyond them; everything else is the same for every token.
The network's own forward runs on whole inputs, with hooks that cut what goes into its blocks, and gather what
comes out of its last layer, before that is an image again.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.embeddings import (
    CombinedTimestepGuidanceTextProjEmbeddings,
    CombinedTimestepTextProjEmbeddings,
    PixArtAlphaTextProjection,
)
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, RMSNorm
from torch import nn

from distriray.errors import UnsupportedModel
from distriray.parallel.agreement import Compared, tensors_in
from distriray.parallel.context import PatchContext
from distriray.parallel.exchange.own import Computed
from distriray.parallel.exchange.step import Step
from distriray.parallel.layers.attending import attend_to_all, of_queries
from distriray.parallel.layers.tokens import Tokens
from distriray.parallel.networks.base import Call, Collect, Network, check_scale_alone
from distriray.parallel.networks.beside import Beside, CutControl
from distriray.parallel.networks.controls import Residuals
from distriray.parallel.networks.likeness import likeness_of
from distriray.parallel.networks.local import ADVICE, TOKENWISE, LocalCode, replaced_call
from distriray.parallel.networks.plan import Attention, Blocks, Cut, Cutter, Plan, key_mask
from distriray.parallel.partition import TokenPartition
from distriray.parallel.share import Share

LAYERS = TOKENWISE | {
    nn.RMSNorm,
    RMSNorm,
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    CombinedTimestepTextProjEmbeddings,
    CombinedTimestepGuidanceTextProjEmbeddings,
    PixArtAlphaTextProjection,
}
"""Layers that several families have. Exactly these: a subclass may compute something else."""

BACKENDS = {
    AttentionBackendName.NATIVE,
    AttentionBackendName._NATIVE_CUDNN,
    AttentionBackendName._NATIVE_EFFICIENT,
    AttentionBackendName._NATIVE_FLASH,
    AttentionBackendName._NATIVE_MATH,
}
"""Ways to attend that are known to take more keys than queries."""


class Heads(NamedTuple):
    """Heads of a layer of attention: how many of queries, and of keys and values, and channels of each."""

    queries: int
    keys: int
    channels: int


class TokenNetwork(Network):
    """A transformer whose blocks attend to the tokens of all ranks.

    Guidance comes as halves of a batch, as calls that `cache_context` names the branches of, or embedded.

    Args:
        module, local: as of `Network`.
        tokens: what its attention processors look up; its own unless given.

    Attributes:
        plan: of the family.
        layers: the classes of layers that the family has, besides `LAYERS`.
        names: the arguments that are latents, timestep and prompt embeddings.
        control: the family's ControlNets; None where it has none that are cut into patches with it.
    """

    kinds = frozenset({"keys_values"})
    plan: Plan
    layers: ClassVar[frozenset[type]]
    names: ClassVar[tuple[str, str, str]] = ("hidden_states", "timestep", "encoder_hidden_states")
    control: ClassVar[type[CutControl] | None] = None

    def __init__(self, module: Any, local: LocalCode | None = None, tokens: Tokens | None = None) -> None:
        self._tokens = tokens or Tokens()
        self._beside = Beside(self.control, self._tokens)
        self._branch: str | None = None
        self._is_short = False
        self._shared: tuple[Share, Collect]
        self._attending: dict[str, Any] = {}
        self._key_heads: set[int] | None = None
        self._cuts: list[tuple[nn.Module, Mapping[str | int, Cut]]] = []
        signature = inspect.signature(self.kind.forward)
        self._signature = signature.replace(parameters=list(signature.parameters.values())[1:])
        super().__init__(module, local)

    @property
    def row_unit(self) -> int:
        unit: int = self.module.config.patch_size
        return unit

    def image_tokens(self, sample: torch.Tensor) -> int:
        """Number of tokens that the network makes of `sample`, unless the pipeline has made them."""
        if sample.ndim == 3:
            return sample.shape[1]
        return (sample.shape[2] // self.row_unit) * (sample.shape[3] // self.row_unit)

    def replace_forward(self, forward: Callable[..., Any]) -> None:
        super().replace_forward(forward)
        self.forward = self._compute
        if "cache_context" not in vars(self.module):  # some classes have none of their own
            own = getattr(self.module, "cache_context", nullcontext)
            self.module.cache_context = partial(_in_branch, self, own)

    @contextmanager
    def in_branch(self, name: str, context: AbstractContextManager[None]) -> Iterator[None]:
        """Let calls be those of a guidance branch, within `context`, for as long as this lasts."""
        before, self._branch = self._branch, name
        try:
            with context:
                yield
        finally:
            self._branch = before

    def check(self) -> None:
        module, kind = self.module, type(self.module)
        if kind is not self.kind and not self.local.says(module):
            raise UnsupportedModel(f"{kind.__name__} is a subclass of {self.kind.__name__}: {ADVICE}")
        for name, attention, planned in self._attentions():
            processor = getattr(attention, "processor", None)
            if processor is None:
                raise UnsupportedModel(f"{name} is a {type(attention).__name__}, which has no processor")
            if self.local.says(processor):
                continue
            if type(processor) not in planned.kinds:
                known = " and ".join(kind.__name__ for kind in (planned.replaces, *planned.others))
                raise UnsupportedModel(
                    f"{name} uses {type(processor).__name__}; known is {known}: undo IP-Adapters, fused "
                    "projections, PAG and the like first"
                )
            replaced = replaced_call((planned.replaces, *planned.others))
            if replaced is not None and planned.processor is not None:
                raise UnsupportedModel(f"{name}: {replaced}, which ranks would pass by; undo that")
            if getattr(attention, "fused_projections", False):
                raise UnsupportedModel(f"{name} has fused projections; call unfuse_qkv_projections()")
            _check_backend(processor)
        if getattr(module, "_cache_config", None) is not None:
            raise UnsupportedModel(
                f"{type(module._cache_config).__name__}: a cache decides on each rank which blocks to skip; "
                "call disable_cache()"
            )
        if getattr(module, "_parallel_config", None) is not None:
            raise UnsupportedModel(f"{kind.__name__} is spread over devices by diffusers' enable_parallelism")

    def convert(self, context: PatchContext) -> bool:
        self.check()
        self._check_layers()
        context.caches_text = not self.local
        self._cuts = [
            (module, cuts) for pattern, cuts in self.plan.cuts.items() for _, module in self._modules(pattern)
        ]
        self._attending, self._key_heads = {}, None
        converted = False
        for name, attention, planned in self._attentions():
            before = attention.processor
            if self.local.says(before):
                continue
            kind = planned.kinds[type(before)]
            if kind is None:
                continue
            if getattr(before, "context", None) is not context:
                arguments = () if planned.sequence is None else (self._tokens, planned.sequence)
                processor = kind(context, *arguments)
                for set_before in getattr(kind, "kept", ()):
                    if getattr(before, set_before, None) is not None:
                        setattr(processor, set_before, getattr(before, set_before))
                attention.processor = processor
                converted |= type(before) not in planned.others  # these exchange what the layer did before
            if planned.sequence is not None:
                self._attending[name] = attention.processor
        return self._beside.convert(self.controls, self.local, context) | converted

    def read(self, *args: Any, residuals: Residuals | None = None, **kwargs: Any) -> Call:
        """A call of the network's own forward, and of ControlNets on the same tokens before it.

        Args:
            args, kwargs: as its class has them.
            residuals: of ControlNets among `controls`.

        Raises:
            UnsupportedModel: an input that the plan does not know, or a way to attend that is not known.
        """
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        known = {*self.names, "return_dict", *self.plan.inputs, *self.plan.residuals, self.plan.kwargs}
        for name in arguments.keys() - known:
            default, given = self._signature.parameters[name].default, arguments[name]
            if given is not None and (default is None or given != default):
                raise UnsupportedModel(f"{name}, which is not cut into patches")
        scale = self.scale_of(arguments)
        check_scale_alone(self.plan.kwargs, scale)
        latents, timestep, text = (arguments[name] for name in self.names)
        if text is None:
            raise UnsupportedModel(f"a call without {self.names[-1]}")
        _check_backend(None)
        for processor in self._attending.values():
            _check_backend(processor)
        sample, embeddings = self.sample_of(latents), self.text_of(text)
        call = Call(sample, timestep, embeddings, scale, self._branch, arguments)
        if residuals is None:
            return call
        given = [name for name in self.plan.residuals if arguments[name] is not None]
        if given:
            raise UnsupportedModel(f"{given[0]} beside ControlNets that are cut into patches")
        return self._beside.read(call, residuals, self.controls)

    def scale_of(self, arguments: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """What attention processors are given in a call, by name, where a LoRA's scale is all that works."""
        given: Mapping[str, Any] | None = None if self.plan.kwargs is None else arguments[self.plan.kwargs]
        return given

    def sample_of(self, latents: Any) -> torch.Tensor:
        """Latents as they were given as one tensor: (batch, tokens, channels), or with rows and columns."""
        sample: torch.Tensor = latents
        return sample

    def text_of(self, text: Any) -> torch.Tensor:
        """Prompt embeddings as they were given as one tensor, (batch, tokens, channels)."""
        embeddings: torch.Tensor = text
        return embeddings

    def apart(self, calls: Sequence[Call]) -> Sequence[Call]:
        return self._beside.apart(calls)

    def partition(self, call: Call, patches: int) -> TokenPartition:
        text = call.text.shape[1] if self._cuts_text else 0
        return TokenPartition.of(self.image_tokens(call.sample), text, patches)

    def take_mask(self, arguments: dict[str, Any], partition: TokenPartition) -> torch.Tensor | None:
        """The `Tokens.key_mask` of a call with these arguments of the network.

        What only attention of all tokens could use is taken out of them.
        """
        mask = None if self.plan.mask is None else arguments[self.plan.mask]
        return None if mask is None else key_mask(mask, partition)

    def heads(self, attention: Any) -> Heads:
        """The heads of a layer of attention."""
        return Heads(attention.heads, attention.heads, attention.inner_dim // attention.heads)

    @property
    def key_heads(self) -> Set[int]:
        if self._key_heads is None:
            attending = (layer for _, layer, planned in self._attentions() if planned.sequence is not None)
            self._key_heads = {self.heads(layer).keys for layer in attending}
        return self._key_heads | self._beside.key_heads

    def dry_run(self, call: Call, share: Share, step: Step) -> None:
        self._beside.dry_run(call, share, step)
        rank = share.communicator.rank
        for name, layer, planned in self._attentions():
            if planned.sequence is None or (call.short and not self._blocks.are_short(name)):
                continue
            tokens = share.tokens.of_sequence(planned.sequence)
            if not any(tokens):
                continue  # nor is it called in a step
            queries, keys, channels = self.heads(layer)
            own = torch.empty(share.images, tokens[rank], dtype=call.sample.dtype, device="meta")
            query, key = (own[..., None, None].expand(-1, -1, n, channels) for n in (queries, keys))
            attend_to_all(step, query, Computed(key.flatten(2), key.flatten(2)), tokens, of_queries)

    def beside(self, call: Call) -> Sequence[nn.Module]:
        return self._beside.run_in(call)

    def may_be_short(self, call: Call) -> bool:
        added = (call.arguments[name] for name in self.plan.residuals)
        return super().may_be_short(call) and all(each is None for each in added)

    @property
    def has_short_steps(self) -> bool:
        return self.plan.blocks is not None

    @contextmanager
    def reusing(self, added: torch.Tensor | None) -> Iterator[Callable[[], torch.Tensor]]:
        blocks, of = self._blocks, dict[str, torch.Tensor]()

        def of_first(module: nn.Module, inputs: Any, output: Any) -> None:
            of["first"] = output if isinstance(output, torch.Tensor) else output[blocks.output]

        def of_all(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            of["all"] = inputs[0]
            return None if added is None else (inputs[0] + added, *inputs[1:])

        with ExitStack() as during:
            if added is not None:
                during.enter_context(self._first_block_alone())
            first, after = map(self.module.get_submodule, (blocks.first, blocks.after))
            during.enter_context(first.register_forward_hook(of_first))
            during.enter_context(after.register_forward_pre_hook(of_all))
            yield lambda: of["all"] - of["first"][:, -of["all"].shape[1] :]

    @contextmanager
    def _first_block_alone(self) -> Iterator[None]:
        """Let the module have no other block."""
        lists: dict[str, Any] = {name: self.module.get_submodule(name) for name in self._blocks.lists}
        try:
            for name, whole in lists.items():
                self._put(name, _Shortened(whole, 1 if name == self._blocks.lists[0] else 0))
            self._is_short = True
            yield
        finally:
            self._is_short = False
            for name, whole in lists.items():
                self._put(name, whole)

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, own = name.rpartition(".")
        setattr(self.module.get_submodule(parent), own, module)

    @property
    def _blocks(self) -> Blocks:
        assert self.plan.blocks is not None, "ControlNets alone do without"
        return self.plan.blocks

    def switches(self) -> Hashable:
        return _AttentionBackendRegistry.get_active_backend()[0]

    def compared(self, call: Call) -> Compared:
        given, inputs = call.arguments, self.plan.inputs
        added = [tensor for name in self.plan.residuals for tensor in tensors_in(given[name])]
        return likeness_of(self.module, call, self._beside.of(call)).plus(
            numbers={"number of ControlNet residuals": len(added)},
            near={
                "ControlNet residuals": added,
                **{i.name: tensors_in(given[key]) for key, i in inputs.items() if i.compared == "near"},
            },
            equal={i.name: tensors_in(given[key]) for key, i in inputs.items() if i.compared == "equal"},
            texts={i.name: repr(given[key]) for key, i in inputs.items() if i.compared == "plain"},
        )

    def compute(self, call: Call, share: Share, collect: Collect) -> Any:
        unbatched = {key for key, each in self.plan.inputs.items() if not each.batched}
        arguments = {
            name: value if name in unbatched else share.cut(value) for name, value in call.arguments.items()
        }
        self._beside.as_inputs(call, arguments, share)
        self._shared = share, collect
        return self.forward(**arguments)

    def _compute(self, **arguments: Any) -> Any:
        """The module's own forward, of whole tokens: what a graph stands for, so nothing else is cut before.

        Args:
            arguments: of this rank's part of the batch.
        """
        share, collect = self._shared
        assert self.replaced is not None
        added = self._beside.added(self.module, arguments, share)
        with self.cutting(share, arguments) as cut, ExitStack() as hooks:
            last = self.module.get_submodule(self.plan.gather)
            hooks.enter_context(last.register_forward_hook(partial(self._gather, collect, share.exchanges)))
            return self.replaced(**{**cut, **added})

    @contextmanager
    def cutting(self, share: Share, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Let the module's own forward see this rank's tokens, as the plan has it.

        Args:
            arguments: of it, of this rank's part of the batch.

        Yields:
            Those that it is to be given.
        """
        self._tokens.begin(share.tokens, self.take_mask(arguments, share.tokens))
        cutter = Cutter(share.tokens, share.communicator.rank)
        for name in self.plan.residuals:
            whole = arguments[name]
            arguments[name] = None if whole is None else [cutter.image(name, each) for each in whole]
        with ExitStack() as hooks:
            for module, cuts in self._cuts:
                if module is self.module:
                    arguments = cutter.cut(cuts, arguments)
                    continue
                for hook in cutter.hooks(module, cuts):
                    hooks.enter_context(hook)
            yield arguments

    def _gather(
        self, collect: Collect, exchanges: bool, module: nn.Module, inputs: Any, output: torch.Tensor
    ) -> torch.Tensor:
        """The tokens of all ranks and of the whole batch, where `output` are this rank's."""
        self.check_entered(exchanges)
        return collect(output[:, None])[:, 0]

    def check_entered(self, exchanges: bool) -> None:
        """Raise `UnsupportedModel` unless each layer of attention has exchanged once in this step."""
        for name, processor in self._attending.items():
            if self._is_short and not self._blocks.are_short(name):
                continue
            times = self._tokens.entered[processor]
            if times != 1 and exchanges and any(self._tokens.of(processor.sequence)):
                raise UnsupportedModel(f"{name} was called {times} times in a step, not once")

    def _check_layers(self) -> None:
        """Raise `UnsupportedModel` where something is not known to look at one token at a time."""
        module, kinds = self.module, LAYERS | self.layers
        ours = LocalCode([_in_branch])
        around = (self.local | ours).obstacle_around(type(module).__name__, module, self.replaced)
        if around is not None:
            raise UnsupportedModel(f"{around}: {ADVICE}")
        attentions = {name for name, _, _ in self._attentions()}
        for name, layer in module.named_modules():
            if layer is module:
                continue  # its hooks see the whole picture
            whole = any(f"{name}.".startswith(f"{each}.") for each in self.plan.whole)
            is_attention = hasattr(layer, "processor") and not whole
            if is_attention and name not in attentions and not self.local.says(layer):
                raise UnsupportedModel(f"layer {name} is attention that {self.kind.__name__} does not have")
            obstacle = self.local.obstacle(name, layer, None if whole else kinds)
            if obstacle is not None:
                raise UnsupportedModel(f"{obstacle}: {ADVICE}")

    @property
    def _cuts_text(self) -> bool:
        return any(stream == "text" for cuts in self.plan.cuts.values() for stream, _ in cuts.values())

    def _modules(self, pattern: str) -> Iterator[tuple[str, nn.Module]]:
        """The modules that a pattern of the plan stands for."""
        expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        return ((name, module) for name, module in self.module.named_modules() if expression.fullmatch(name))

    def _attentions(self) -> Iterator[tuple[str, Any, Attention]]:
        """The network's attention, by name, with what the plan says of it."""
        for pattern, planned in self.plan.attention.items():
            for name, module in self._modules(pattern):
                yield name, module, planned


class _Shortened(nn.ModuleList):
    """The first blocks of a list, which says that it has all: some networks number modulations by that."""

    def __init__(self, blocks: nn.ModuleList, first: int) -> None:
        self._left_out = 0
        super().__init__(blocks[:first])
        self._left_out = len(blocks) - first

    def __len__(self) -> int:
        return super().__len__() + self._left_out


def _in_branch(
    network: TokenNetwork,
    cache_context: Callable[..., AbstractContextManager[None]],
    name: str,
    **kwargs: Any,
) -> AbstractContextManager[None]:
    """diffusers' `cache_context`, which names the branch of guidance to the engine too."""
    return network.in_branch(name, cache_context(name, **kwargs))


def _check_backend(processor: Any) -> None:
    """Raise `UnsupportedModel` where a processor, or all if it is None, has an unknown way to attend."""
    if getattr(processor, "_parallel_config", None) is not None:
        raise UnsupportedModel("attention is spread over devices by diffusers' enable_parallelism")
    if processor is None:
        backend, _ = _AttentionBackendRegistry.get_active_backend()
    else:
        backend = getattr(processor, "_attention_backend", None)
    if backend is not None and AttentionBackendName(backend) not in BACKENDS:
        known = ", ".join(sorted(each.value for each in BACKENDS))
        raise UnsupportedModel(
            f"attention backend {AttentionBackendName(backend).value}; those that are known with patches are "
            f"torch's own: {known}"
        )
