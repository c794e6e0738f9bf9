"""The built-in models: landscapes drawn by code, captions and evaluation; `training` makes them.

`MODELS` are diffusers folders by name: `StableDiffusionXLPipeline.from_pretrained(MODEL_DIR)` loads the
first, and the other, of a small transformer, is for `StableDiffusion3Pipeline`.
`ADAPTERS_DIR` has adapters of the first, which `load_lora_weights` loads.
Importing this package imports neither torch nor diffusers.
"""

from pathlib import Path

_HERE = Path(__file__).parent
MODEL_DIR: Path = _HERE / "model"
MODELS: dict[str, Path] = {"landscapes": MODEL_DIR, "landscapes-sd3": _HERE / "model-sd3"}
ADAPTERS_DIR: Path = _HERE / "adapters"

__all__ = ["ADAPTERS_DIR", "MODELS", "MODEL_DIR"]
