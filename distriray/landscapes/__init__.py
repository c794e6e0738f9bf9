"""The built-in text-to-image model: landscapes drawn by code, captions and evaluation; `training` makes it.

`MODEL_DIR` is an ordinary diffusers folder; `StableDiffusionXLPipeline.from_pretrained(MODEL_DIR)` loads it.
`ADAPTERS_DIR` has adapters of it, which `load_lora_weights` loads.
Importing this package imports neither torch nor diffusers.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
ADAPTERS_DIR: Path = Path(__file__).parent / "adapters"

__all__ = ["ADAPTERS_DIR", "MODEL_DIR"]
