"""The U-Net of Stable Diffusion: `UNet2DConditionModel`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from peft.tuners.lora import LoraLayer
from torch import nn

from distriray.errors import UnsupportedModel
from distriray.parallel.agreement import Compared, tensors_in
from distriray.parallel.context import PatchContext
from distriray.parallel.exchange.step import Step
from distriray.parallel.layers.attention import (
    CachedCrossAttention,
    PatchSelfAttention,
    check_plain_attention,
)
from distriray.parallel.layers.bare import adapters_in_use
from distriray.parallel.layers.conv import pads_by_hand, patch_downsample
from distriray.parallel.networks.base import Call, Collect, Network, check_scale_alone
from distriray.parallel.networks.controlnet import residuals_of
from distriray.parallel.networks.controls import UsedControl, check_cut
from distriray.parallel.networks.likeness import likeness_of, signs_of
from distriray.parallel.networks.local import ADVICE, replaced_call
from distriray.parallel.networks.spatial import (
    SELF_ATTENTION,
    adapted_convolutions,
    adapter_of,
    convert_conv_or_norm,
    dry_run_layers,
    has_own_forward,
    is_foreign,
    spare_messages,
    takes_whole,
)
from distriray.parallel.partition import Partition
from distriray.parallel.share import Share

BLOCKS = {
    DownBlock2D,
    CrossAttnDownBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    CrossAttnUpBlock2D,
    UpBlock2D,
}
ADDED_EMBEDDINGS = {None, "text", "text_time"}
# How the inputs that are neither sample, timestep nor text are cut.
BY_ROWS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)
BY_BATCH = ("class_labels", "timestep_cond", "added_cond_kwargs", "encoder_attention_mask")


class UNet(Network):
    """A `UNet2DConditionModel` with Stable Diffusion's blocks: both guidance branches come in one call."""

    kind = UNet2DConditionModel
    displacement_measured = True
    _text_layers: Sequence[nn.Module] = ()
    _adapted: Sequence[LoraLayer] = ()
    _key_heads: Set[int] | None = None

    def replace_forward(self, forward: Callable[..., Any]) -> None:
        super().replace_forward(forward)
        self.forward = self._compute

    @property
    def row_unit(self) -> int:
        return 2**self._levels

    @property
    def _levels(self) -> int:
        return len(self.module.down_blocks) - 1

    def check(self) -> None:
        unet = self.module
        if type(unet) is not UNet2DConditionModel and not self.local.says(unet):
            raise UnsupportedModel(f"{type(unet).__name__} is a subclass of UNet2DConditionModel: {ADVICE}")
        middle = [unet.mid_block] if unet.mid_block is not None else []
        blocks = [*unet.down_blocks, *middle, *unet.up_blocks]
        kinds = {type(block) for block in blocks if not self.local.says(block)}
        if kinds - BLOCKS:
            foreign, known = (
                ", ".join(sorted(kind.__name__ for kind in some)) for some in (kinds - BLOCKS, BLOCKS)
            )
            raise UnsupportedModel(f"U-Net blocks {foreign}; supported are exactly {known}")
        if unet.config.addition_embed_type not in ADDED_EMBEDDINGS:
            raise UnsupportedModel(
                f"addition_embed_type {unet.config.addition_embed_type!r}; supported are text, text_time"
            )
        for name, module in unet.named_modules():
            if type(module).__name__ in ("GatedSelfAttentionDense", "DualTransformer2DModel"):
                raise UnsupportedModel(f"layer {name} is a {type(module).__name__} (GLIGEN, dual attention)")

    def convert(self, context: PatchContext) -> bool:
        self._check_layers()
        context.caches_text = not self.local  # what a user brings may hand other texts to some layers
        converted, self._key_heads = False, None
        for name, module in self._image_layers():
            if self.local.says(module):
                continue
            if isinstance(module, Attention):
                converted |= self._convert_attention(name, module, context)
            else:
                converted |= convert_conv_or_norm(module, context)
        for _, module in self._image_layers():
            if pads_by_hand(module):
                vars(module).pop("forward", None)
                patch_downsample(module)
        for network in self._networks().values():
            spare_messages(network)
        self._adapted = [conv for each in self._networks().values() for conv in adapted_convolutions(each)]
        self._text_layers = [
            layer
            for _, module in self._image_layers()
            if isinstance(module, Attention) and module.is_cross_attention
            for projection in (module.to_k, module.to_v)
            for layer in projection.modules()
        ]
        return converted

    def text_weights(self) -> Hashable:
        return signs_of(self._text_layers)

    def adapters_that_exchange(self) -> Hashable:
        return tuple(map(adapters_in_use, self._adapted))

    def read(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        down_block_additional_residuals: tuple[torch.Tensor, ...] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        down_intrablock_additional_residuals: list[torch.Tensor] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
        controls: Sequence[UsedControl] = (),
        image_prompts: Sequence[str] = (),
    ) -> Call:
        """A call of `UNet2DConditionModel.forward`, and of ControlNets on the same rows before it.

        Args:
            sample: latents, (batch, channels, rows, columns).
            encoder_hidden_states: prompt embeddings, (batch, tokens, channels).
            controls: ControlNets among `controls`, whose residuals are added up.
            image_prompts: IP-Adapters that are in the network for this image and not for others.
        """
        if attention_mask is not None:
            raise UnsupportedModel(
                "attention_mask is over the tokens of the whole image and is not cut into patches"
            )
        check_scale_alone("cross_attention_kwargs", cross_attention_kwargs)
        check_cut(controls, self.controls)
        if controls and (down_block_additional_residuals, mid_block_additional_residual) != (None, None):
            raise UnsupportedModel("residuals of a ControlNet beside ControlNets that are cut into patches")
        arguments = {
            "timestep": timestep,
            "class_labels": class_labels,
            "timestep_cond": timestep_cond,
            "cross_attention_kwargs": cross_attention_kwargs,
            "added_cond_kwargs": added_cond_kwargs,
            "down_block_additional_residuals": down_block_additional_residuals,
            "mid_block_additional_residual": mid_block_additional_residual,
            "down_intrablock_additional_residuals": down_intrablock_additional_residuals,
            "encoder_attention_mask": encoder_attention_mask,
            "return_dict": return_dict,
            "controls": controls,
        }
        call = Call(
            sample,
            timestep,
            encoder_hidden_states,
            cross_attention_kwargs,
            arguments=arguments,
            besides=tuple(control.name for control in controls) or None,
        )
        return call.with_image_prompts(image_prompts)

    def beside(self, call: Call) -> Sequence[nn.Module]:
        return [control.network for control in call.arguments["controls"]]

    def partition(self, call: Call, patches: int) -> Partition:
        _, _, height, width = call.sample.shape
        return Partition(height, width, self._levels, patches)

    @property
    def key_heads(self) -> Set[int]:
        if self._key_heads is None:
            self._key_heads = {
                module.heads
                for _, module in self._image_layers()
                if isinstance(module, Attention) and not module.is_cross_attention
                if not (self.local.says(module) or self.local.says(module.processor))
            }
        return self._key_heads

    def dry_run(self, call: Call, share: Share, step: Step) -> None:
        used = {"", *(f"{control.name}." for control in call.arguments["controls"])}
        for first in used & self._networks().keys():
            dry_run_layers(self._networks()[first], call.sample.dtype, share, step)

    def compared(self, call: Call) -> Compared:
        given, added = call.arguments, call.arguments["added_cond_kwargs"] or {}
        residuals = {
            "ControlNet residuals": tensors_in(given["down_block_additional_residuals"]),
            "ControlNet residuals of the middle": tensors_in(given["mid_block_additional_residual"]),
            "T2I-Adapter residuals": tensors_in(given["down_intrablock_additional_residuals"]),
            "image prompts": tensors_in(added.get("image_embeds")),
        }
        return likeness_of(self.module, call, given["controls"]).plus(
            numbers={f"number of {name}": len(some) for name, some in residuals.items()},
            near={"pooled prompt embeddings": added.get("text_embeds"), **residuals},
            equal={
                "size conditions": added.get("time_ids"),
                "guidance scale embedding": given["timestep_cond"],
                "class labels": given["class_labels"],
                "text mask": given["encoder_attention_mask"],
            },
            texts={"further conditions": " ".join(sorted(added))},
        )

    def compute(
        self, call: Call, share: Share, collect: Collect
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        arguments = call.arguments
        timestep, text = (
            share.cut(_on_device(arguments["timestep"], call.sample.device)),
            share.cut(call.text),
        )
        by_batch = {name: share.cut(arguments[name]) for name in BY_BATCH}
        by_rows = {name: share.cut_rows(arguments[name]) for name in BY_ROWS}
        (rows,) = self.forward(
            self._sample(self.module, call, share),
            timestep,
            text,
            {
                control.name: (
                    self._sample(control.network, call, share),
                    share.cut_rows(control.picture),
                    control.scale,
                )
                for control in arguments["controls"]
            },
            cross_attention_kwargs=arguments["cross_attention_kwargs"],
            **by_batch,
            **by_rows,
            return_dict=False,
        )
        noise = collect(rows)
        return UNet2DConditionOutput(sample=noise) if arguments["return_dict"] else (noise,)

    def _compute(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        controls: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]],
        **arguments: Any,
    ) -> Any:
        """The module's own forward, after its ControlNets: what a graph stands for.

        Args:
            controls: of each its sample, its picture and its scale, by its name.
        """
        assert self.replaced is not None
        if controls:
            of = {self.controls[name]: own for name, (own, _, _) in controls.items()}
            asked = [
                UsedControl(name, self.controls[name], picture, scale)
                for name, (_, picture, scale) in controls.items()
            ]
            arguments |= residuals_of(asked, of.__getitem__, timestep, text, arguments["added_cond_kwargs"])
        return self.replaced(sample, timestep, text, **arguments)

    @staticmethod
    def _sample(network: nn.Module, call: Call, share: Share) -> torch.Tensor:
        """The sample as a network is given it: this rank's rows, or all if its first layer cuts them."""
        whole = share.exchanges and takes_whole(network)
        return share.cut(call.sample) if whole else share.cut_rows(call.sample)

    def _networks(self) -> dict[str, nn.Module]:
        """The U-Net and the ControlNets, by what the names of their layers begin with."""
        return {"": self.module, **{f"{name}.": control for name, control in self.controls.items()}}

    def _image_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Layers that see the image, by name: not those that make tokens of image prompts on every rank."""
        for first, network in self._networks().items():
            for name, module in network.named_modules():
                if not name.startswith("encoder_hid_proj"):
                    yield f"{first}{name}", module

    def _check_layers(self) -> None:
        """Raise `UnsupportedModel` where a layer looks at the image in a way that is not known to be cut."""
        unet, local, networks = self.module, self.local, list(self._networks().values())
        around = local.obstacle_around(type(unet).__name__, unet, self.replaced)
        if around is not None:
            raise UnsupportedModel(f"{around}: {ADVICE}")
        for name, module in self._image_layers():
            if module in networks:
                continue  # its hooks see the whole picture
            if is_foreign(module) and not local.says(module):
                raise UnsupportedModel(
                    f"layer {name}, {type(module).__name__}({module.extra_repr()}), is not cut into patches"
                    f"{adapter_of(module)}"
                )
            obstacle = local.obstacle(name, module)
            if obstacle is not None:
                raise UnsupportedModel(f"{obstacle}: {ADVICE}")
            if has_own_forward(module):
                raise UnsupportedModel(
                    f"a hook holds the forward of layer {name}: call enable_layerwise_casting, "
                    "enable_group_offload and the like after the first image"
                )
        for name, block in unet.up_blocks.named_children():
            if getattr(block, "s1", None):
                raise UnsupportedModel(
                    f"up block {name} uses FreeU, a filter over the whole image; call disable_freeu()"
                )

    def _convert_attention(self, name: str, attn: Attention, context: PatchContext) -> bool:
        processor = attn.processor
        if self.local.says(processor):
            return False
        replaced = replaced_call((AttnProcessor, AttnProcessor2_0))
        if replaced is not None:
            raise UnsupportedModel(f"{name}: {replaced}, which ranks would pass by; undo that")
        check_plain_attention(name, attn)
        if isinstance(processor, CachedCrossAttention | PatchSelfAttention) and processor.context is context:
            return False
        if not attn.is_cross_attention:
            _check_self_attention(name, attn)
            attn.processor = PatchSelfAttention(context)
        elif type(processor) in (AttnProcessor, AttnProcessor2_0, CachedCrossAttention):
            attn.processor = CachedCrossAttention(context)
        elif self.local.attends_locally(processor):
            # To tokens of text or an image prompt, which are on every rank; only the default is cached.
            return False
        else:
            raise UnsupportedModel(f"{name} uses {type(processor).__name__}: {ADVICE}")
        return True


def _on_device(timestep: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """A timestep where the network computes. A single one of the host's is filled in: a copy stops a GPU."""
    if not isinstance(timestep, torch.Tensor):
        dtype = torch.float64 if isinstance(timestep, float) else torch.int64
        return torch.full((), timestep, dtype=dtype, device=device)
    if timestep.device.type == "cpu" and timestep.numel() == 1:
        return torch.full(timestep.shape, timestep.item(), dtype=timestep.dtype, device=device)
    return timestep


def _check_self_attention(name: str, attn: Attention) -> None:
    if type(attn.processor) not in SELF_ATTENTION:
        raise UnsupportedModel(
            f"{name} uses {type(attn.processor).__name__}; patch parallelism brings its own self-attention: "
            "undo attention slicing, xFormers, PAG or fused projections first"
        )
