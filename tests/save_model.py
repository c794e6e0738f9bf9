"""Saves a tiny pipeline with random weights as a folder, for every door that takes a model.

python -m tests.save_model flux-dev /tmp/tiny-flux
distriray generate "a lake" --model /tmp/tiny-flux --gang-size 2 --height 128 --width 128
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.models import (
    save,
    tiny_chroma,
    tiny_ernie_image,
    tiny_flux,
    tiny_flux2,
    tiny_flux2_klein,
    tiny_flux3,
    tiny_flux3_distilled,
    tiny_flux_fill,
    tiny_flux_schnell,
    tiny_hunyuan_image,
    tiny_hunyuan_image_distilled,
    tiny_kontext,
    tiny_krea2,
    tiny_krea2_distilled,
    tiny_longcat_image,
    tiny_longcat_image_edit,
    tiny_ovis_image,
    tiny_qwen_image,
    tiny_qwen_image21,
    tiny_qwen_image_edit,
    tiny_qwen_image_edit_plus,
    tiny_sd3,
    tiny_sd15,
    tiny_sd21,
    tiny_sdxl,
    tiny_z_image,
)

MODELS = {
    "chroma": tiny_chroma,
    "ernie-image": tiny_ernie_image,
    "flux-dev": tiny_flux,
    "flux-fill": tiny_flux_fill,
    "flux-kontext": tiny_kontext,
    "flux2-dev": tiny_flux2,
    "flux2-klein": tiny_flux2_klein,
    "flux3": tiny_flux3,
    "flux3-distilled": tiny_flux3_distilled,
    "flux-schnell": tiny_flux_schnell,
    "hunyuan-image": tiny_hunyuan_image,
    "hunyuan-image-distilled": tiny_hunyuan_image_distilled,
    "krea2": tiny_krea2,
    "krea2-distilled": tiny_krea2_distilled,
    "longcat-image": tiny_longcat_image,
    "longcat-image-edit": tiny_longcat_image_edit,
    "ovis-image": tiny_ovis_image,
    "qwen-image": tiny_qwen_image,
    "qwen-image-2.1": tiny_qwen_image21,
    "qwen-image-edit": tiny_qwen_image_edit,
    "qwen-image-edit-plus": tiny_qwen_image_edit_plus,
    "sd15": tiny_sd15,
    "sd21": tiny_sd21,
    "sd3": tiny_sd3,
    "sdxl": tiny_sdxl,
    "z-image": tiny_z_image,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    save(MODELS[arguments.model](), arguments.folder)


if __name__ == "__main__":
    main()
