"""What of a request its picture does not show as given, in words for whoever asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distriray.denoise.pipelines.base import PipelineSteps, TokenCount
from distriray.requests import SamplingParams
from distriray.steps import guided_steps, is_controlled

_PROMPTS = "prompt", "prompt_2", "prompt_3"
_NEGATIVES = "negative_prompt", "negative_prompt_2", "negative_prompt_3"
STRETCHED = 0.02  # how far an image's proportions may be off without a word


def unused(
    params: SamplingParams, steps: PipelineSteps, num_steps: int, as_drawn: bool = False
) -> Iterator[str]:
    """Warnings of fields that are not used, or not as they are.

    Args:
        params: with nothing left open.
        num_steps: of their image.
        as_drawn: the model is shown the picture that it edits in the size that is drawn (`Editing`).
    """
    assert params.guidance_scale is not None
    is_guided = steps.is_guided(params.guidance_scale)
    if not is_guided:
        asked = {name: getattr(params, name) for name in (*_NEGATIVES, "guidance_rescale")}
        asked["guidance_end"] = params.guidance_end < 1.0
        for name in filter(asked.get, asked):
            yield f"{name} is not used with a guidance_scale of {params.guidance_scale:g}"
    elif not guided_steps(params.guidance_end, num_steps):
        yield f"guidance_end {params.guidance_end:g} leaves none of {num_steps} steps with guidance"
    for each in params.control:
        shares = each.start, each.end
        if each.scale and not any(is_controlled(n, num_steps, *shares) for n in range(num_steps)):
            share = f"from {each.start:g} to {each.end:g}"
            yield f"control {each.name!r} takes part in none of {num_steps} steps, {share}"
    for names in (_PROMPTS, _NEGATIVES) if is_guided else (_PROMPTS,):
        for name, read in _read(params, names, steps).items():
            # Of several encoders the one that takes most: what it does not take, none does.
            most = max(read, key=lambda tokens: tokens.taken - tokens.given)
            if most.taken < most.given:
                yield (
                    f"{name} has {most.given} tokens, and a text encoder takes {most.taken}: the rest is not "
                    "used"
                )
    scaled = params.references[0].image if as_drawn and params.references else params.drawn_on
    if scaled is not None:
        assert params.height is not None and params.width is not None
        width, height = scaled.size
        if abs(width * params.height - height * params.width) > STRETCHED * width * params.height:
            to = f"{params.width}x{params.height}, of other proportions"
            yield f"image of {width}x{height} is stretched to {to}"


def _read(params: SamplingParams, names: Sequence[str], steps: PipelineSteps) -> dict[str, list[TokenCount]]:
    """By name, what of a text is taken by each encoder that reads it.

    Args:
        names: of the text for all encoders, then of those in its place for the second and the third.
    """
    tokens = {name: steps.tokens(text) for name in names if (text := getattr(params, name))}
    read: dict[str, list[TokenCount]] = {}
    for place in range(max(map(len, tokens.values()), default=0)):
        name = names[place] if names[place] in tokens else names[0]
        if name in tokens:
            read.setdefault(name, []).append(tokens[name][place])
    return read
