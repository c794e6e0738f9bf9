"""The built-in text-to-image model: landscapes drawn by code, captions and evaluation; `training` makes it.

`MODEL_DIR` is an ordinary diffusers folder; `StableDiffusionXLPipeline.from_pretrained(MODEL_DIR)` loads it.
Importing this package imports neither torch nor diffusers.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"

__all__ = ["MODEL_DIR"]
