"""One image as prepare, step x n, decode, with everything it is between two steps in one state."""

from distriray.denoise.denoiser import Denoiser
from distriray.denoise.schedulers import SCHEDULERS
from distriray.denoise.state import DenoiseState

__all__ = ["SCHEDULERS", "DenoiseState", "Denoiser"]
