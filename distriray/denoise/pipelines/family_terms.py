"""The terms of each family, by the configurations of a model: neither torch nor diffusers is loaded here."""

from __future__ import annotations

from dataclasses import replace

from distriray.denoise.pipelines.sizes import Configs
from distriray.denoise.pipelines.terms import BEGINS_FROM_NOISE, Terms
from distriray.references import MOST_PIXELS, Editing
from distriray.steps import SchedulerName

FLUX2_EDITING = Editing(10)
"""As its makers say."""

_NO_IP_ADAPTERS = {"ip_adapters": "IP-Adapters are for Stable Diffusion 1, 2 and XL, and FLUX.1 but for Fill"}
_NO_CONTROL = {
    "control": "ControlNets are for Stable Diffusion (XL, 3), FLUX.1 dev and schnell, Qwen-Image and Z-Image",
    **_NO_IP_ADAPTERS,
}
_NO_CLIP = "this model reads prompts with a language model, not with CLIP"
_NO_SIZES = dict.fromkeys(
    ("original_size", "crops_coords_top_left", "target_size"),
    "Stable Diffusion XL alone is told what photograph a picture was made from",
)
_NO_THIRD = dict.fromkeys(("prompt_3", "negative_prompt_3"), "this model has no third text encoder")
_ONE_PROMPT = {
    **_NO_SIZES,
    **_NO_THIRD,
    **dict.fromkeys(("prompt_2", "negative_prompt_2"), "this model has one text encoder"),
}
_NO_REFERENCES = {
    "references": "this model edits no pictures; FLUX.1 Kontext, FLUX.2, FLUX.3, LongCat-Image-Edit, "
    "Qwen-Image-Edit and Qwen-Image 2.1 do"
}
_NO_GUIDANCE = dict.fromkeys(
    ("guidance_scale", "negative_prompt", "guidance_rescale", "guidance_end"),
    "this model was distilled to do without guidance",
)
_NO_MASKS = {**_NO_CONTROL, "mask_image": "this model's family fills in no masks here"}
_ON_PICTURES = {**_NO_IP_ADAPTERS, **_NO_REFERENCES}
_ON_TEXT_ALONE = {
    **_NO_MASKS,
    **_NO_REFERENCES,
    **dict.fromkeys(("strength", "image"), "this model draws from text alone"),
}
_EDITS = {**_NO_MASKS, "strength": BEGINS_FROM_NOISE}


def unet_terms(config: Configs) -> Terms:
    """Of U-Nets; some take a mask and a picture beside the latents, and need both."""
    lacks = {**(_NO_THIRD if _has(config, "text_encoder_2") else _ONE_PROMPT), **_NO_REFERENCES}
    if config("unet").get("time_cond_proj_dim") is not None:
        lacks["guidance_end"] = "this model takes the scale of guidance as an input, in every step"
    return Terms(
        needs_mask=config("unet")["in_channels"] != config("vae")["latent_channels"],
        lacks=lacks,
    )


def sd3_terms(config: Configs) -> Terms:
    """Of Stable Diffusion 3 and 3.5, as diffusers has them."""
    lacks = {**_NO_SIZES, **_ON_PICTURES}
    if not _has(config, "text_encoder_3"):
        lacks |= _NO_THIRD
    return Terms(28, 7.0, ("dpmpp-2m", "euler", "heun", "unipc"), lacks, rounds_up=True)


def flux_terms(config: Configs) -> Terms:
    """Of FLUX.1: of dev where the network takes the scale of guidance, of schnell where it does not."""
    schedulers: tuple[SchedulerName, ...] = ("dpmpp-2m", "euler", "unipc")
    lacks = {
        "negative_prompt": "FLUX.1 was distilled from guidance, and has no branch for it",
        "guidance_rescale": "FLUX.1 was distilled from guidance, and has no unguided noise to go by",
        "guidance_end": "FLUX.1 was distilled from guidance, and has no branch to leave out",
        "clip_skip": "FLUX.1 takes the last layer's summary of CLIP, and no layer before",
        "negative_prompt_2": "FLUX.1 was distilled from guidance, and has no branch for it",
        **_NO_SIZES,
        **_NO_THIRD,
        **_NO_REFERENCES,
    }
    if config("transformer")["guidance_embeds"]:
        return Terms(28, 3.5, schedulers, lacks, rounds_up=True)
    without = {"guidance_scale": "this model, like FLUX.1-schnell, was distilled to do without guidance"}
    return Terms(4, 0.0, schedulers, {**lacks, **without}, rounds_up=True)


def flux_fill_terms(config: Configs) -> Terms:
    """Of FLUX.1 Fill, as its makers use it."""
    terms = replace(flux_terms(config), num_inference_steps=50, guidance_scale=30.0)
    lacks = {**terms.lacks, **_NO_CONTROL}
    return replace(terms, schedulers=("euler",), lacks=lacks, needs_mask=True)


def flux_kontext_terms(config: Configs) -> Terms:
    """Of FLUX.1 Kontext, as diffusers has it."""
    return replace(_editing(flux_terms(config), Editing(1, megapixel_unit=16)), schedulers=("euler",))


def flux2_terms(config: Configs) -> Terms:
    """Of FLUX.2 dev, as diffusers has it."""
    lacks = {
        "negative_prompt": "FLUX.2 dev was distilled from guidance, and has no branch for it",
        "guidance_rescale": "FLUX.2 dev was distilled from guidance, and has no unguided noise to go by",
        "guidance_end": "FLUX.2 dev was distilled from guidance, and has no branch to leave out",
        "clip_skip": _NO_CLIP,
        **_ONE_PROMPT,
        **_NO_CONTROL,
    }
    return Terms(50, 4.0, ("euler",), lacks, rounds_up=True, editing=FLUX2_EDITING)


def flux2_klein_terms(config: Configs) -> Terms:
    """Of FLUX.2 klein: of the base, and of the one that was distilled, which says so of itself."""
    lacks = {
        "guidance_rescale": "FLUX.2's guidance has no unguided noise to go by",
        "clip_skip": _NO_CLIP,
        **_ONE_PROMPT,
        **_NO_CONTROL,
    }
    terms = Terms(50, 4.0, ("euler",), lacks, rounds_up=True, editing=FLUX2_EDITING)
    if not config("").get("is_distilled", False):
        return terms
    lacks = {**_NO_GUIDANCE, **lacks}
    return replace(terms, num_inference_steps=4, guidance_scale=1.0, lacks=lacks)


def flux3_terms(config: Configs) -> Terms:
    """Of FLUX.3: of the base, and of the one that was distilled, whose network takes where a step goes to."""
    lacks = {"clip_skip": _NO_CLIP, **_ONE_PROMPT, **_EDITS}
    if not config("transformer")["flow_map"]:
        terms = Terms(50, 3.5, ("euler",), lacks)
    else:
        terms = Terms(16, 1.0, ("euler",), {**lacks, **_NO_GUIDANCE})
    return replace(terms, editing=Editing(10, sole_pixels=4 * MOST_PIXELS))


def chroma_terms(config: Configs) -> Terms:
    """Of Chroma, as diffusers has it."""
    lacks = {
        "guidance_rescale": "Chroma's guidance has no unguided noise to go by",
        "clip_skip": _NO_CLIP,
        **_ONE_PROMPT,
        **_ON_PICTURES,
        **_NO_CONTROL,
    }
    return Terms(35, 5.0, ("euler",), lacks, rounds_up=True)


def qwen_image_terms(config: Configs) -> Terms:
    """Of Qwen-Image, as diffusers has it."""
    lacks = {
        "guidance_rescale": "Qwen-Image keeps the length of each token's prediction by itself",
        "clip_skip": _NO_CLIP,
        **_ONE_PROMPT,
        **_ON_PICTURES,
    }
    return Terms(50, 4.0, ("euler",), lacks, rounds_up=True)


def qwen_image_edit_terms(config: Configs) -> Terms:
    """Of Qwen-Image-Edit, as diffusers has it."""
    return _editing(qwen_image_terms(config), Editing(1, megapixel_unit=32, needs_references=True))


def qwen_image_edit_plus_terms(config: Configs) -> Terms:
    """Of Qwen-Image-Edit 2509 and later ones, as their makers use them."""
    editing = Editing(3, megapixel_unit=32, needs_references=True)
    return replace(_editing(qwen_image_terms(config), editing), num_inference_steps=40)


def qwen_image21_terms(config: Configs) -> Terms:
    """Of Qwen-Image 2.1, as diffusers has it; some models say the noise levels of all steps."""
    lacks = {
        "guidance_rescale": "Qwen-Image 2.1's guidance has no unguided noise to go by",
        "clip_skip": _NO_CLIP,
        **_ONE_PROMPT,
        **_EDITS,
    }
    editing = Editing(3, megapixel_unit=32, keeps=True, sees_transparency=True)
    sigmas = config("").get("sample_sigmas")
    terms = Terms(40, 1.0, ("euler",), lacks, editing=editing)
    return terms if sigmas is None else replace(terms, num_inference_steps=len(sigmas), fixes_steps=True)


def hunyuan_image_terms(config: Configs) -> Terms:
    """Of HunyuanImage, as diffusers has it; of the one that was distilled as its makers use it."""
    lacks = {
        "clip_skip": _NO_CLIP,
        **_ONE_PROMPT,
        **dict.fromkeys(
            ("prompt_2", "negative_prompt_2"),
            "this model's second text encoder reads what the prompt quotes",
        ),
        **_ON_TEXT_ALONE,
    }
    network = config("transformer")
    steps = 8 if network["use_meanflow"] else 50
    if network["guidance_embeds"]:
        without = {name: why for name, why in _NO_GUIDANCE.items() if name != "guidance_scale"}
        return Terms(steps, 3.25, ("euler",), {**lacks, **without}, rounds_up=True)
    if not _has(config, "guider"):
        return Terms(steps, 1.0, ("euler",), {**lacks, **_NO_GUIDANCE}, rounds_up=True)
    scale = config("guider")["guidance_scale"]
    return Terms(steps, scale, ("euler",), lacks, rounds_up=True)


def ovis_image_terms(config: Configs) -> Terms:
    """Of Ovis-Image, as diffusers has it."""
    return Terms(50, 5.0, ("euler",), _of_text_alone("Ovis-Image's guidance has no unguided noise to go by"))


def longcat_image_terms(config: Configs) -> Terms:
    """Of LongCat-Image, as diffusers has it."""
    lacks = _of_text_alone("LongCat-Image bounds the length of each token's prediction by itself")
    return Terms(50, 4.5, ("euler",), lacks)


def longcat_image_edit_terms(config: Configs) -> Terms:
    """Of LongCat-Image-Edit, as diffusers has it."""
    lacks = {
        "guidance_rescale": "LongCat-Image-Edit's guidance has no unguided noise to go by",
        "clip_skip": _NO_CLIP,
        **_ONE_PROMPT,
        **_NO_CONTROL,
    }
    editing = Editing(1, megapixel_unit=16, rounds_up=True, as_drawn=True, needs_references=True)
    return Terms(50, 4.5, ("euler",), lacks, rounds_up=True, editing=editing)


def krea2_terms(config: Configs) -> Terms:
    """Of Krea 2 and of the one that was distilled, as their makers use them."""
    lacks = _of_text_alone("Krea 2's guidance has no unguided noise to go by")
    if config("").get("is_distilled", False):
        return Terms(8, 0.0, ("euler",), {**_NO_GUIDANCE, **lacks}, unguided=0.0)
    return Terms(28, 4.5, ("euler",), lacks, unguided=0.0)


def ernie_image_terms(config: Configs) -> Terms:
    """Of ERNIE-Image, as diffusers has it."""
    return Terms(50, 4.0, ("euler",), _of_text_alone("ERNIE-Image's guidance has no unguided noise to go by"))


def z_image_terms(config: Configs) -> Terms:
    """Of Z-Image-Turbo, as its makers use it; nothing in a folder tells the one that was not distilled."""
    lacks = {
        "guidance_rescale": "Z-Image's guidance has no unguided noise to go by",
        "clip_skip": _NO_CLIP,
        **_ONE_PROMPT,
        **_ON_PICTURES,
    }
    return Terms(9, 0.0, ("euler",), lacks, unguided=0.0, rounds_up=True)


def _of_text_alone(no_rescale: str) -> dict[str, str]:
    """What a model lacks that reads one prompt with a language model and draws from nothing else.

    Args:
        no_rescale: why its guidance is not rescaled.
    """
    return {"guidance_rescale": no_rescale, "clip_skip": _NO_CLIP, **_ONE_PROMPT, **_ON_TEXT_ALONE}


def _editing(terms: Terms, editing: Editing) -> Terms:
    """Of a model that edits, where the terms are those of one of its family that begins from pictures."""
    lacks = {name: why for name, why in terms.lacks.items() if name != "references"}
    return replace(terms, lacks={**lacks, "control": _NO_CONTROL["control"]}, editing=editing)


def _has(config: Configs, part: str) -> bool:
    """Whether a pipeline has a part: the two names of its class are None of one that was left out."""
    return any(config("").get(part) or ())
