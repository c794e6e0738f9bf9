"""Tiny diffusion pipelines with seeded random weights: the layouts of SDXL, SD 1.5 and 2.1; no downloads.

Weights are drawn so that every layer matters: normal with variance 1/fan-in, biases and norm gains that
differ from channel to channel. An error of one layer therefore shows in the output.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypeVar

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    ChromaPipeline,
    ChromaTransformer2DModel,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Flux3AutoBlocks,
    Flux3DistilledAutoBlocks,
    Flux3DistilledModularPipeline,
    Flux3ModularPipeline,
    Flux3Transformer2DModel,
    FluxControlNetModel,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImageEditPipeline,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    ModularPipeline,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageControlNetModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImageControlNetModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.loaders import FluxIPAdapterMixin
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    ByT5Tokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlavaProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PaddleOCRVLProcessor,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

Module = TypeVar("Module", bound=torch.nn.Module)

TEXT_WIDTH = 16
IMAGE_WIDTH = 8
"""Of what `tiny_image_encoder` gives."""
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }} {{ message.content }}<|im_end|>{% endfor %}"
    "<|im_start|>assistant"
)
CHAT_OF_PARTS = (
    "{% for message in messages if message.role == 'user' %}"
    "<|im_start|>{{ message.content[0].text }}<|im_end|>{% endfor %}"
)
"""Of contents of several kinds, without what the system says: that is long in letters."""
CHAT_OF_SYSTEM = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content[0].text }}<|im_end|>\n"
    "{% endfor %}"
)
"""Of contents of several kinds, with what the system says."""
NOISE_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Overwrite every parameter with values that depend only on `seed` and the module's layout."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                noise = noise * parameter[0].numel() ** -0.5
            elif name.endswith("weight"):
                noise = 1 + 0.2 * noise
            else:
                noise = 0.2 * noise
            parameter.copy_(noise)


def ready(module: Module, seed: int) -> Module:
    randomize(module, seed)
    return module.eval().requires_grad_(False)


def tiny_sdxl_unet(seed: int = 0, **config: Any) -> UNet2DConditionModel:
    """SDXL's layout: three levels, attention on the lower two, linear projections, text-time embedding."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 2, 4),
        "norm_num_groups": 8,
        "use_linear_projection": True,
        "cross_attention_dim": 2 * TEXT_WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + TEXT_WIDTH,
    }
    return ready(UNet2DConditionModel(**{**settings, **config}), seed)


SHALLOW: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (16, 32),
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (1, 2),
}
"""Two levels of SDXL in place of three: every kind of layer, in half the time."""

SHALLOW_SD: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32),
    "attention_head_dim": 2,
}
"""Two levels of Stable Diffusion in place of four."""


def tiny_sd15_unet(seed: int = 0, **config: Any) -> UNet2DConditionModel:
    """SD 1.5's layout: four levels, attention on the upper three, convolutional projections."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (16, 32, 32, 32),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        "cross_attention_dim": TEXT_WIDTH,
    }
    return ready(UNet2DConditionModel(**{**settings, **config}), seed)


def tiny_controlnet(unet: UNet2DConditionModel, seed: int = 0) -> ControlNetModel:
    """One for that U-Net, whose weights are its own, none of them zero; its picture counts."""
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
    return ready(network, seed)


def tiny_flux_controlnet(seed: int = 0, **config: Any) -> FluxControlNetModel:
    """One for `tiny_flux`, with a block of each kind for three of its own."""
    settings: dict[str, Any] = {
        **STREAMS,
        "num_layers": 2,
        "num_single_layers": 1,
        "pooled_projection_dim": TEXT_WIDTH,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    return ready(FluxControlNetModel(**{**settings, **config}), seed)


def tiny_sd3_controlnet(seed: int = 0, **config: Any) -> SD3ControlNetModel:
    """One for `tiny_sd3`, as those of SD 3 are: its text is the model's, and its summary is zero."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 3 * TEXT_WIDTH,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 2 * TEXT_WIDTH,
        "pos_embed_max_size": 24,
    }
    return ready(SD3ControlNetModel(**{**settings, **config}), seed)


def tiny_qwen_image_controlnet(seed: int = 0, **config: Any) -> QwenImageControlNetModel:
    """One for `tiny_qwen_image`."""
    settings: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }
    return ready(QwenImageControlNetModel(**{**settings, **config}), seed)


def tiny_z_image_controlnet(seed: int = 0, **config: Any) -> ZImageControlNetModel:
    """One for `tiny_z_image`, which adds to the first and the last of its layers."""
    settings: dict[str, Any] = {
        "control_layers_places": [0, 1],
        "control_in_dim": 4,
        "dim": 32,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
    }
    return ready(ZImageControlNetModel(**{**settings, **config}), seed)


def tiny_image_encoder(seed: int = 0) -> CLIPVisionModelWithProjection:
    """Of pictures of 30 by 30 pixels, in four patches."""
    config = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        projection_dim=IMAGE_WIDTH,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=30,
        patch_size=15,
    )
    return ready(CLIPVisionModelWithProjection(config), seed)


def tiny_ip_adapter(
    unet: UNet2DConditionModel, seed: int = 0, kind: Literal["plain", "plus", "full"] = "plain"
) -> dict[str, Any]:
    """One for that U-Net and `tiny_image_encoder`, as `load_ip_adapter` takes it.

    "Plus" has attention of its own, of 16 queries: as many as a rank of two has pixels at the lowest level.
    "Full" attends to each of the image encoder's tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def weights(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    width, text_width = 64, unet.config.cross_attention_dim
    attentions = [name for name in unet.attn_processors if "attn2" in name]
    layers = {
        f"{2 * i + 1}.{projection}.weight": weights(
            unet.get_submodule(name.removesuffix(".processor")).inner_dim, text_width
        )
        for i, name in enumerate(attentions)
        for projection in ("to_k_ip", "to_v_ip")
    }
    if kind == "full":
        tokens = {
            "proj.0.weight": weights(IMAGE_WIDTH, IMAGE_WIDTH),
            "proj.0.bias": torch.zeros(IMAGE_WIDTH),
            "proj.2.weight": weights(text_width, IMAGE_WIDTH),
            "proj.2.bias": torch.zeros(text_width),
            "proj.3.weight": torch.ones(text_width),
            "proj.3.bias": torch.zeros(text_width),
        }
        return {"image_proj": tokens, "ip_adapter": layers}
    if kind == "plain":
        tokens = {
            "proj.weight": weights(4 * text_width, IMAGE_WIDTH),
            "proj.bias": torch.zeros(4 * text_width),
            "norm.weight": torch.ones(text_width),
            "norm.bias": torch.zeros(text_width),
        }
        return {"image_proj": tokens, "ip_adapter": layers}
    tokens = {"latents": weights(1, 16, width)}
    for name, inner, outer in (("proj_in", IMAGE_WIDTH, width), ("proj_out", width, text_width)):
        tokens |= {f"{name}.weight": weights(outer, inner), f"{name}.bias": torch.zeros(outer)}
    norms = {"norm_out": text_width}
    for i in range(4):
        norms |= {f"layers.{i}.{norm}": width for norm in ("0.norm1", "0.norm2", "1.0")}
        tokens |= {
            f"layers.{i}.0.to_q.weight": weights(width, width),
            f"layers.{i}.0.to_kv.weight": weights(2 * width, width),
            f"layers.{i}.0.to_out.weight": weights(width, width),
            f"layers.{i}.1.1.weight": weights(4 * width, width),
            f"layers.{i}.1.3.weight": weights(width, 4 * width),
        }
    for name, size in norms.items():
        tokens |= {f"{name}.weight": torch.ones(size), f"{name}.bias": torch.zeros(size)}
    return {"image_proj": tokens, "ip_adapter": layers}


def tiny_flux_ip_adapter(transformer: FluxTransformer2DModel, seed: int = 0) -> dict[str, Any]:
    """One for that transformer and `tiny_image_encoder`, as `load_ip_adapter` takes it."""
    generator = torch.Generator().manual_seed(seed)
    width = transformer.config.joint_attention_dim

    def linear(name: str, outer: int, inner: int) -> dict[str, torch.Tensor]:
        weight = torch.randn((outer, inner), generator=generator) * inner**-0.5
        return {f"{name}.weight": weight, f"{name}.bias": torch.randn(outer, generator=generator)}

    layers: dict[str, torch.Tensor] = {}
    for index in range(len(transformer.transformer_blocks)):
        for projection in ("to_k_ip", "to_v_ip"):
            layers |= linear(f"{index}.{projection}", transformer.inner_dim, width)
    norm = {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    return {"image_proj": {**linear("proj", 4 * width, IMAGE_WIDTH), **norm}, "ip_adapter": layers}


def save_ip_adapter(folder: Path, weights: dict[str, Any], name: str = "ip-adapter") -> None:
    """As `<name>.safetensors`, with `tiny_image_encoder` beside it."""
    tensors = {f"{part}.{key}": value for part, own in weights.items() for key, value in own.items()}
    tiny_image_encoder().save_pretrained(folder / "image_encoder")
    save_file(tensors, folder / f"{name}.safetensors")


STREAMS: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
}
"""What FLUX and its like have in common: blocks of two streams, then blocks of one."""


def tiny_flux_transformer(seed: int = 0, **config: Any) -> FluxTransformer2DModel:
    """FLUX.1's layout: blocks of two streams, blocks of one, embedded guidance."""
    settings: dict[str, Any] = {
        **STREAMS,
        "pooled_projection_dim": TEXT_WIDTH,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    return ready(FluxTransformer2DModel(**{**settings, **config}), seed)


def tiny_prompted_flux_transformer(seed: int = 0, **config: Any) -> FluxTransformer2DModel:
    """FLUX.1's with two IP-Adapters in it."""
    transformer = tiny_flux_transformer(seed, **config)
    weights = [tiny_flux_ip_adapter(transformer, seed + each) for each in (1, 2)]
    FluxIPAdapterMixin.load_ip_adapter(SimpleNamespace(transformer=transformer), weights, ["", ""])
    for block in transformer.transformer_blocks:
        block.attn.processor.scale = [0.7, -0.4]
    return transformer


def tiny_longcat_image_transformer(seed: int = 0, **config: Any) -> LongCatImageTransformer2DModel:
    """LongCat-Image's layout: that of FLUX.1, without pooled embeddings."""
    settings: dict[str, Any] = {
        **STREAMS,
        "pooled_projection_dim": TEXT_WIDTH,
        "axes_dims_rope": [4, 6, 6],
    }
    return ready(LongCatImageTransformer2DModel(**{**settings, **config}), seed)


def tiny_ovis_image_transformer(seed: int = 0, **config: Any) -> OvisImageTransformer2DModel:
    """Ovis-Image's layout: that of FLUX.1, with gated feed-forwards."""
    settings: dict[str, Any] = {
        **STREAMS,
        "out_channels": 16,
        "axes_dims_rope": (4, 6, 6),
    }
    return ready(OvisImageTransformer2DModel(**{**settings, **config}), seed)


def tiny_hunyuan_image_transformer(seed: int = 0, **config: Any) -> HunyuanImageTransformer2DModel:
    """HunyuanImage's layout: blocks of two streams, blocks of one, padded text and what of it is quoted."""
    settings: dict[str, Any] = {
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "text_embed_dim": TEXT_WIDTH,
        "text_embed_2_dim": TEXT_WIDTH,
        "rope_axes_dim": (8, 8),
    }
    return ready(HunyuanImageTransformer2DModel(**{**settings, **config}), seed)


def tiny_krea2_transformer(seed: int = 0, **config: Any) -> Krea2Transformer2DModel:
    """Krea 2's layout: one stream, texts refined before they join it, two query heads for each of keys."""
    settings: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "timestep_embed_dim": 32,
        "text_hidden_dim": TEXT_WIDTH,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 48,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 6, 6),
    }
    return ready(Krea2Transformer2DModel(**{**settings, **config}), seed)


def tiny_ernie_image_transformer(seed: int = 0, **config: Any) -> ErnieImageTransformer2DModel:
    """ERNIE-Image's layout: one stream, tokens along the first dimension, one modulation for all blocks."""
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_layers": 3,
        "ffn_hidden_size": 64,
        "in_channels": 16,
        "out_channels": 16,
        "text_in_dim": TEXT_WIDTH,
        "rope_axes_dim": (4, 6, 6),
    }
    return ready(ErnieImageTransformer2DModel(**{**settings, **config}), seed)


def tiny_chroma_transformer(seed: int = 0, **config: Any) -> ChromaTransformer2DModel:
    """Chroma's layout: that of FLUX.1, whose modulation comes from one network for all blocks."""
    settings: dict[str, Any] = {
        **STREAMS,
        "axes_dims_rope": (4, 6, 6),
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 32,
        "approximator_layers": 1,
    }
    return ready(ChromaTransformer2DModel(**{**settings, **config}), seed)


def tiny_flux2_transformer(seed: int = 0, **config: Any) -> Flux2Transformer2DModel:
    """FLUX.2's layout."""
    settings: dict[str, Any] = {
        **STREAMS,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    return ready(Flux2Transformer2DModel(**{**settings, **config}), seed)


def tiny_flux3_transformer(seed: int = 0, **config: Any) -> Flux3Transformer2DModel:
    """FLUX.3's layout: blocks for each of image, references and text, and then for all of them."""
    settings: dict[str, Any] = {
        **STREAMS,
        "cond_in_channels": 16,
        "timestep_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    return ready(Flux3Transformer2DModel(**{**settings, **config}), seed)


def tiny_sd3_transformer(seed: int = 0, **config: Any) -> SD3Transformer2DModel:
    """SD 3.5's layout: normalized queries and keys, a first block that attends to the image once more."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 2 * TEXT_WIDTH,
        "pos_embed_max_size": 24,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return ready(SD3Transformer2DModel(**{**settings, **config}), seed)


def tiny_qwen_image_transformer(seed: int = 0, **config: Any) -> QwenImageTransformer2DModel:
    """Qwen-Image's layout."""
    settings: dict[str, Any] = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }
    return ready(QwenImageTransformer2DModel(**{**settings, **config}), seed)


def tiny_qwen_image21_transformer(seed: int = 0, **config: Any) -> QwenImage21Transformer2DModel:
    """Qwen-Image 2.1's layout: one stream, of which the text looks at what is before it."""
    settings: dict[str, Any] = {
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "context_in_dim": TEXT_WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }
    return ready(QwenImage21Transformer2DModel(**{**settings, **config}), seed)


def tiny_z_image_transformer(seed: int = 0, **config: Any) -> ZImageTransformer2DModel:
    """Z-Image's layout: the image and the text are refined by themselves first."""
    settings: dict[str, Any] = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": TEXT_WIDTH,
        "axes_dims": [4, 6, 6],
        "axes_lens": [160, 64, 64],
    }
    return ready(ZImageTransformer2DModel(**{**settings, **config}), seed)


def tiny_pixart_transformer(seed: int = 0, **config: Any) -> PixArtTransformer2DModel:
    """PixArt's layout: cross-attention to the text, and twice as many channels out as in."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "cross_attention_dim": 24,
        "caption_channels": TEXT_WIDTH,
        "use_additional_conditions": True,
    }
    return ready(PixArtTransformer2DModel(**{**settings, **config}), seed)


def tiny_vae(seed: int = 0, **config: Any) -> AutoencoderKL:
    """Eight pixels to a latent row, as in Stable Diffusion."""
    settings: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 128,
        "scaling_factor": 0.13025,
        "force_upcast": False,
    }
    return ready(AutoencoderKL(**{**settings, **config}), seed)


def tiny_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """One token a byte, no merges."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad_token, model_max_length=77)


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_sdxl(
    seed: int = 0, *, force_zeros: bool = True, latent_channels: int = 4, **unet: Any
) -> StableDiffusionXLPipeline:
    """A whole SDXL pipeline in float32 on the CPU; `unet` overrides entries of the U-Net's config."""
    unet = {"in_channels": latent_channels, "out_channels": latent_channels, **unet}
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(seed, latent_channels=latent_channels),
        text_encoder=ready(CLIPTextModel(text_config(tokenizer)), seed + 1),
        text_encoder_2=ready(CLIPTextModelWithProjection(text_config(tokenizer_2)), seed + 2),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=tiny_sdxl_unet(seed + 3, **unet),
        scheduler=EulerDiscreteScheduler(**NOISE_SCHEDULE),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sd15(seed: int = 0, **unet: Any) -> StableDiffusionPipeline:
    """A whole SD 1.5 pipeline in float32 on the CPU; `unet` overrides entries of the U-Net's config."""
    scheduler = DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    return _tiny_sd(seed, tiny_tokenizer(), tiny_sd15_unet(seed + 3, **unet), scheduler)


def tiny_sd21(seed: int = 0, **unet: Any) -> StableDiffusionPipeline:
    """A whole SD 2.1 pipeline, which predicts velocity: linear projections, more heads where it is deeper."""
    layout = {"attention_head_dim": (2, 4, 4, 4), "use_linear_projection": True}
    scheduler = DDIMScheduler(
        **NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"
    )
    tokenizer = tiny_tokenizer(pad_token="!")
    return _tiny_sd(seed, tokenizer, tiny_sd15_unet(seed + 3, **{**layout, **unet}), scheduler)


def _tiny_sd(
    seed: int, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel, scheduler: DDIMScheduler
) -> StableDiffusionPipeline:
    vae = tiny_vae(seed, scaling_factor=0.18215, latent_channels=unet.config.out_channels)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=ready(CLIPTextModel(text_config(tokenizer)), seed + 1),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_safety_checker() -> dict[str, Any]:
    """`safety_checker` and `feature_extractor` of a pipeline, with one concept, which nothing is near to."""
    vision = {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 8,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
    ready(checker.vision_model, seed=7)
    ready(checker.visual_projection, seed=8)
    for thresholds in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        thresholds.data.fill_(2.0)  # of a cosine
    extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return {"safety_checker": checker.eval(), "feature_extractor": extractor}


def tiny_t5(seed: int, tokenizer: Any, width: int) -> T5EncoderModel:
    """T5's encoder for the tokens of another tokenizer, since its own needs a vocabulary."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2
    )
    return ready(T5EncoderModel(config), seed)


def tiny_flux_schnell(seed: int = 0) -> FluxPipeline:
    """A whole FLUX.1-schnell pipeline."""
    pipeline = tiny_flux(seed, guidance_embeds=False)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return pipeline


def tiny_flux(seed: int = 0, **transformer: Any) -> FluxPipeline:
    """A whole FLUX.1-dev pipeline; `transformer` overrides entries of the transformer's config."""
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(seed + 1, shift_factor=0.0),
        text_encoder=ready(CLIPTextModel(text_config(tokenizer)), seed + 2),
        tokenizer=tokenizer,
        text_encoder_2=tiny_t5(seed + 3, tokenizer_2, TEXT_WIDTH),
        tokenizer_2=tokenizer_2,
        transformer=tiny_flux_transformer(seed, **transformer),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_chroma(seed: int = 0) -> ChromaPipeline:
    """A whole Chroma pipeline."""
    tokenizer = tiny_tokenizer()
    pipeline = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(seed + 1, shift_factor=0.0),
        text_encoder=tiny_t5(seed + 2, tokenizer, TEXT_WIDTH),
        tokenizer=tokenizer,
        transformer=tiny_chroma_transformer(seed),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sd3(seed: int = 0, t5: bool = False, channels: int = 16) -> StableDiffusion3Pipeline:
    """A whole Stable Diffusion 3.5 pipeline, without T5 unless asked for.

    diffusers' own pipeline fills in masks with latents of 16 channels alone.
    """
    width = 3 * TEXT_WIDTH
    tokenizers = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
    encoders = (
        ready(CLIPTextModelWithProjection(text_config(tokenizer)), seed + 2 + index)
        for index, tokenizer in enumerate(tokenizers)
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=tiny_sd3_transformer(
            seed, joint_attention_dim=width, in_channels=channels, out_channels=channels
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(seed + 1, shift_factor=0.0, latent_channels=channels),
        text_encoder=next(encoders),
        tokenizer=tokenizers[0],
        text_encoder_2=next(encoders),
        tokenizer_2=tokenizers[1],
        text_encoder_3=tiny_t5(seed + 4, tokenizers[0], width) if t5 else None,
        tokenizer_3=tokenizers[0] if t5 else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_flux_fill(seed: int = 0) -> FluxFillPipeline:
    """A whole FLUX.1 Fill pipeline: each token has the latents of a picture beside its own, and a mask."""
    mask = (2 * 8) ** 2  # the pixels of a token
    pipeline = FluxFillPipeline.from_pipe(tiny_flux(seed, in_channels=2 * 16 + mask, out_channels=16))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_kontext(seed: int = 0) -> FluxKontextPipeline:
    """A whole FLUX.1 Kontext pipeline: the network sees tokens of another picture behind those of its own."""
    pipeline = FluxKontextPipeline(**tiny_flux(seed).components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_flux2(seed: int = 0) -> Flux2Pipeline:
    """A whole FLUX.2-dev pipeline, with a tokenizer where a processor of pictures needs torchvision."""
    tokenizer = tiny_qwen_tokenizer()
    tokenizer.chat_template = CHAT_OF_PARTS
    pipeline = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_flux2_vae(seed + 1),
        text_encoder=tiny_mistral(seed + 2, tokenizer),
        tokenizer=tokenizer,
        transformer=tiny_flux2_transformer(seed, joint_attention_dim=3 * TEXT_WIDTH),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_flux2_klein(seed: int = 0, is_distilled: bool = False) -> Flux2KleinPipeline:
    """A whole FLUX.2-klein pipeline, of the base unless distilled."""
    tokenizer = tiny_qwen_tokenizer()
    tokenizer.chat_template = CHAT
    text_encoder = ready(Qwen3ForCausalLM(tiny_qwen3_config(tokenizer, num_hidden_layers=28)), seed + 2)
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_flux2_vae(seed + 1),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=tiny_flux2_transformer(seed, joint_attention_dim=3 * TEXT_WIDTH, guidance_embeds=False),
        is_distilled=is_distilled,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_flux2_klein_distilled(seed: int = 0) -> Flux2KleinPipeline:
    return tiny_flux2_klein(seed, is_distilled=True)


def tiny_mistral(seed: int, tokenizer: Qwen2Tokenizer) -> Mistral3ForConditionalGeneration:
    """The language model that FLUX.2 dev reads prompts with."""
    text = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=31,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    vision = PixtralVisionConfig(
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=8,
    )
    return ready(
        Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)), seed
    )


def tiny_flux3(seed: int = 0) -> Flux3ModularPipeline:
    """A whole pipeline of FLUX.3's base, which takes prompts as they are."""
    return _tiny_flux3(Flux3AutoBlocks(), seed)


def tiny_flux3_distilled(seed: int = 0) -> Flux3DistilledModularPipeline:
    """The same of the one that was distilled to few steps without guidance."""
    return _tiny_flux3(Flux3DistilledAutoBlocks(), seed, flow_map=True)


def _tiny_flux3(blocks: Any, seed: int, **transformer: Any) -> Any:
    blocks.sub_blocks.pop("prompt_upsampler")
    pipeline = blocks.init_pipeline()
    tokenizer = tiny_qwen_tokenizer()
    pipeline.update_components(
        vae=tiny_flux2_vae(seed + 1),
        text_encoder=tiny_qwen3_vl(seed + 2, tokenizer, 33),
        # One that holds a tokenizer too; Qwen3-VL's needs torchvision.
        tokenizer=LlavaProcessor(CLIPImageProcessor(), tokenizer, chat_template=CHAT),
        transformer=tiny_flux3_transformer(seed, joint_attention_dim=8 * TEXT_WIDTH, **transformer),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(pipeline: Any, folder: Path) -> None:
    """Save a pipeline; a modular one with where its components are now."""
    modular = {"overwrite_modular_index": True} if isinstance(pipeline, ModularPipeline) else {}
    pipeline.save_pretrained(str(folder), **modular)


def tiny_qwen3_vl(seed: int, tokenizer: Qwen2Tokenizer, layers: int) -> Qwen3VLForConditionalGeneration:
    """The language model that FLUX.3 and Qwen-Image 2.1 read prompts with."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }
    vision = {
        "depth": 1,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_WIDTH,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
        "num_position_embeddings": 4,
        "deepstack_visual_indexes": [],
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=getattr(tokenizer, "image_token_id", len(tokenizer)),
    )
    return ready(Qwen3VLForConditionalGeneration(config), seed)


def tiny_flux2_vae(seed: int) -> AutoencoderKLFlux2:
    """One whose latents are normalized by what it has seen."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=128,
    )
    generator = torch.Generator().manual_seed(seed)
    vae.bn.running_mean.normal_(generator=generator)
    vae.bn.running_var.uniform_(0.5, 2.0, generator=generator)
    return ready(vae, seed)


def tiny_longcat_image(seed: int = 0) -> LongCatImagePipeline:
    """A LongCat-Image pipeline, of 16 latent channels, as it expects."""
    tokenizer = tiny_qwen_tokenizer()
    pipeline = LongCatImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(seed + 1, shift_factor=0.0, latent_channels=16),
        text_encoder=tiny_qwen_vl(seed + 2, tokenizer),
        tokenizer=tokenizer,
        text_processor=None,
        transformer=tiny_longcat_image_transformer(seed, in_channels=64),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_longcat_image_edit(seed: int = 0) -> LongCatImageEditPipeline:
    """A LongCat-Image-Edit pipeline, with a processor as that of `tiny_qwen_image_edit`."""
    names = {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    tokenizer = tiny_qwen_tokenizer(image_token="<|image_pad|>", **names)
    pipeline = LongCatImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(seed + 1, shift_factor=0.1, latent_channels=16),
        text_encoder=tiny_qwen_vl(seed + 2, tokenizer),
        tokenizer=tokenizer,
        text_processor=PaddleOCRVLProcessor(Qwen2VLImageProcessorPil(), tokenizer),
        transformer=tiny_longcat_image_transformer(seed, in_channels=64),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_ovis_image(seed: int = 0) -> OvisImagePipeline:
    """A whole Ovis-Image pipeline."""
    tokenizer = tiny_qwen_tokenizer()
    tokenizer.chat_template = CHAT
    pipeline = OvisImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(seed + 1, shift_factor=0.0),
        text_encoder=ready(Qwen3Model(tiny_qwen3_config(tokenizer, num_hidden_layers=2)), seed + 2),
        tokenizer=tokenizer,
        transformer=tiny_ovis_image_transformer(seed),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_hunyuan_image(seed: int = 0) -> HunyuanImagePipeline:
    """A whole HunyuanImage pipeline, with a guider for prompts that quote and one for others."""
    guider = AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1)
    return _tiny_hunyuan_image(seed, guider, guider.new(adaptive_projected_guidance_start_step=2))


def tiny_hunyuan_image_distilled(seed: int = 0) -> HunyuanImagePipeline:
    """One whose network takes the scale of guidance, and the timestep that a step goes to."""
    return _tiny_hunyuan_image(seed, guidance_embeds=True, use_meanflow=True)


def _tiny_hunyuan_image(
    seed: int, guider: Any = None, ocr_guider: Any = None, **transformer: Any
) -> HunyuanImagePipeline:
    tokenizer, letters = tiny_qwen_tokenizer(), ByT5Tokenizer()
    pipeline = HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=tiny_hunyuan_image_vae(seed + 1),
        text_encoder=tiny_qwen_vl(seed + 2, tokenizer, layers=2),
        tokenizer=tokenizer,
        text_encoder_2=tiny_t5(seed + 3, letters, TEXT_WIDTH),
        tokenizer_2=letters,
        transformer=tiny_hunyuan_image_transformer(seed, **transformer),
        guider=guider,
        ocr_guider=ocr_guider,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_hunyuan_image_vae(seed: int = 0) -> AutoencoderKLHunyuanImage:
    """A VAE of 16 pixels to a row of latents, where the published one has 32."""
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        block_out_channels=(32, 32, 32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=16,
        sample_size=64,
        scaling_factor=0.75,
    )
    return ready(vae, seed)


def tiny_krea2(seed: int = 0, is_distilled: bool = False) -> Krea2Pipeline:
    """A whole Krea 2 pipeline, of the base unless distilled."""
    tokenizer = tiny_qwen_tokenizer()
    pipeline = Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=tiny_qwen_vae(seed + 1),
        text_encoder=tiny_qwen3_vl(seed + 2, tokenizer, 3).model,
        tokenizer=tokenizer,
        transformer=tiny_krea2_transformer(seed),
        text_encoder_select_layers=(1, 2, 3),
        is_distilled=is_distilled,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_krea2_distilled(seed: int = 0) -> Krea2Pipeline:
    return tiny_krea2(seed, is_distilled=True)


def tiny_ernie_image(seed: int = 0) -> ErnieImagePipeline:
    """A whole ERNIE-Image pipeline, without what writes prompts anew."""
    tokenizer = tiny_qwen_tokenizer()
    pipeline = ErnieImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_flux2_vae(seed + 1),
        text_encoder=tiny_mistral(seed + 2, tokenizer).model,
        tokenizer=tokenizer,
        transformer=tiny_ernie_image_transformer(seed),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_qwen_vae(seed: int = 0) -> AutoencoderKLQwenImage:
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.0, 2.0, 1.5, 0.8],
    )
    return ready(vae, seed)


def tiny_qwen_image(seed: int = 0) -> QwenImagePipeline:
    """A whole Qwen-Image pipeline."""
    tokenizer = tiny_qwen_tokenizer()
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=tiny_qwen_vae(seed + 1),
        text_encoder=tiny_qwen_vl(seed + 2, tokenizer),
        tokenizer=tokenizer,
        transformer=tiny_qwen_image_transformer(seed),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_qwen_image_edit(seed: int = 0) -> QwenImageEditPipeline:
    """A whole Qwen-Image-Edit pipeline."""
    return _tiny_qwen_image_edit(QwenImageEditPipeline, seed)


def tiny_qwen_image_edit_plus(seed: int = 0) -> QwenImageEditPlusPipeline:
    """A whole pipeline as that of Qwen-Image-Edit 2511: what is edited is modulated as without noise."""
    return _tiny_qwen_image_edit(QwenImageEditPlusPipeline, seed, zero_cond_t=True)


def _tiny_qwen_image_edit(kind: type, seed: int, **transformer: Any) -> Any:
    """With another processor of the same pictures and texts, where that of videos needs torchvision."""
    tokenizer = tiny_qwen_tokenizer(image_token="<|image_pad|>")
    pipeline = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=tiny_qwen_vae(seed + 1),
        text_encoder=tiny_qwen_vl(seed + 2, tokenizer),
        tokenizer=tokenizer,
        processor=PaddleOCRVLProcessor(Qwen2VLImageProcessorPil(), tokenizer),
        transformer=tiny_qwen_image_transformer(seed, **transformer),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_qwen_tokenizer(*special: str, **named: str) -> Qwen2Tokenizer:
    """One token a byte, no merges; and those special ones, which it may have by a name."""
    ordinary = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*ordinary, *special, *named.values()]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens=named or list(special))


def tiny_qwen_image21_vae(seed: int = 0) -> AutoencoderKLQwenImage21:
    vae = AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=16,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1 * channel for channel in range(16)],
        latents_std=[1.0 + 0.1 * channel for channel in range(16)],
    )
    return ready(vae, seed)


def tiny_qwen_image21(seed: int = 0, sample_sigmas: list[float] | None = None) -> QwenImage21Pipeline:
    """A whole Qwen-Image 2.1 pipeline, with another processor of the same pictures and texts.

    Its own has one of videos too, which needs torchvision.
    """
    tokenizer = tiny_qwen_tokenizer(image_token="<|image_pad|>")
    pictures = Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 32**2, "longest_edge": 2048**2})
    processor = PaddleOCRVLProcessor(pictures, tokenizer, chat_template=CHAT_OF_SYSTEM)
    pipeline = QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_qwen_image21_vae(seed + 1),
        text_encoder=tiny_qwen3_vl(seed + 2, tokenizer, 2),
        processor=processor,
        transformer=tiny_qwen_image21_transformer(seed),
        sample_sigmas=sample_sigmas,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_qwen_vl(seed: int, tokenizer: Qwen2Tokenizer, layers: int = 1) -> Qwen2_5_VLForConditionalGeneration:
    """The language model that Qwen-Image and HunyuanImage read prompts with."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "depth": 1,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_WIDTH,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=getattr(tokenizer, "image_token_id", len(tokenizer)),
    )
    return ready(Qwen2_5_VLForConditionalGeneration(config), seed)


def tiny_pixart(seed: int = 0) -> PixArtSigmaPipeline:
    """A PixArt-sigma pipeline without a text encoder."""
    transformer = tiny_pixart_transformer(seed, use_additional_conditions=False)
    return _without_text_encoder(
        PixArtSigmaPipeline, tiny_vae(seed), transformer, DPMSolverMultistepScheduler()
    )


def tiny_z_image(seed: int = 0) -> ZImagePipeline:
    """A whole Z-Image pipeline."""
    tokenizer = tiny_qwen_tokenizer()
    tokenizer.chat_template = CHAT
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(seed + 1, shift_factor=0.0),
        text_encoder=ready(Qwen3Model(tiny_qwen3_config(tokenizer, num_hidden_layers=2)), seed + 2),
        tokenizer=tokenizer,
        transformer=tiny_z_image_transformer(seed),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_qwen3_config(tokenizer: Qwen2Tokenizer, num_hidden_layers: int) -> Qwen3Config:
    """Of the language models that Z-Image and FLUX.2 klein read prompts with."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=tokenizer.eos_token_id,
    )


def _without_text_encoder(kind: Any, vae: Any, transformer: Any, scheduler: Any) -> Any:
    pipeline = kind(
        scheduler=scheduler, vae=ready(vae, 1), text_encoder=None, tokenizer=None, transformer=transformer
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


WITHOUT_UNET = (
    tiny_ernie_image,
    tiny_flux,
    tiny_flux2,
    tiny_flux2_klein,
    tiny_qwen_image,
    tiny_qwen_image21,
    tiny_sd3,
    tiny_z_image,
)
"""Pipelines of families that ControlNets and IP-Adapters are not for here."""
