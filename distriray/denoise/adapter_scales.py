"""What a file says of how much its weights count: numbers are taken from it, and no instructions.

diffusers hands all that a file says to PEFT, which follows it: other weights of the model are changed for
good (`init_lora_weights`), memory is taken for any rank, and names of layers are any regular expressions.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

_NUMBERS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_OF_TRAINING = (
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
)
"""Of PEFT's `LoraConfig`, what means nothing to weights that are there."""
_UNUSED = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal", "eva")}
"""Values that do not change a model, besides those that are false."""
_DEFAULT_ALPHA = 8
_NAME = re.compile(r"[\w.]+")


def alphas_said(
    metadata: Mapping[str, Any], part: str, ranks: Mapping[str, int]
) -> tuple[Mapping[str, float], bool]:
    """The alphas of the layers of one part, and whether they are over the roots of ranks.

    Args:
        metadata: as the file has it, of all parts.
        ranks: of the weights, by layer.

    Raises:
        ValueError: it asks for more than scales, or has none that are numbers.
    """
    given = {
        name.removeprefix(f"{part}."): value
        for name, value in metadata.items()
        if name.startswith(f"{part}.")
    }
    for name, value in given.items():
        known = name in _NUMBERS or name in _OF_TRAINING
        if value and not known and value not in _UNUSED.get(name, ()):
            raise ValueError(f"its {part}.{name} is {str(value)[:60]!r}, which is not read")
    alphas = _alphas(given, part, ranks) if given else ranks
    return alphas, bool(given.get("use_rslora"))


def scales_of(
    part: str, ranks: Mapping[str, int], alphas: Mapping[str, float], over_roots: bool = False
) -> dict[str, Any]:
    """What diffusers is told of one part of an adapter: ranks, alphas and names of its layers.

    Left to itself it gives many layers the alpha that most have, of those by which kohya's trainers say one
    for each.

    Args:
        alphas: by layer; of those that have none it is the rank.
        over_roots: they are over the roots of ranks.
    """
    told = {
        **_most_common(ranks, "r", "rank_pattern"),
        **_most_common({**ranks, **alphas}, "lora_alpha", "alpha_pattern"),
        "use_rslora": over_roots,
        "target_modules": list(ranks),
    }
    return {f"{part}.{name}": value for name, value in told.items()}


def _alphas(given: Mapping[str, Any], part: str, ranks: Mapping[str, int]) -> dict[str, float]:
    """By layer: of the first name that it has or ends with, as PEFT looks it up."""
    common, named = given.get("lora_alpha", _DEFAULT_ALPHA), given.get("alpha_pattern") or {}
    if not isinstance(named, dict):
        raise ValueError(f"its {part}.alpha_pattern is no mapping")
    if odd := [name for name in named if not _NAME.fullmatch(name)]:
        raise ValueError(f"its {part}.alpha_pattern has {odd[0][:60]!r}, which is no layer's name")
    for alpha in (common, *named.values()):
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise ValueError(f"its {part} has an alpha of {str(alpha)[:60]!r}, which is no number")
    return {
        layer: next((named[name] for name in named if f".{layer}".endswith(f".{name}")), common)
        for layer in ranks
    }


def _most_common(values: Mapping[str, float], common: str, others: str) -> dict[str, Any]:
    most = Counter(values.values()).most_common(1)[0][0]
    return {
        common: most,
        others: {f"^{re.escape(layer)}": value for layer, value in values.items() if value != most},
    }
