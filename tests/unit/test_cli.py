"""The command line says what is wrong before it starts anything."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SAYS_WHAT_IT_LOADED = """
import sys
from distriray.cli import main
try:
    main()
finally:
    print(sorted({"diffusers", "ray", "torch"} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--scheduler", "eulr"], "scheduler 'eulr': input should be 'ddim', "),
        (["--steps", "two"], "num_inference_steps 'two': input should be a valid integer"),
        (
            ["--num-inference-steps", "0"],
            "num_inference_steps '0': input should be greater than or equal to 1",
        ),
        (["--height", "500"], "height 500 is not a multiple of 8; use 496 or 504"),
        (["--guidance-rescale", "2"], "guidance_rescale '2': input should be less than or equal to 1"),
    ],
)
def test_a_wrong_value_is_named_before_ray_or_a_model_is_loaded(arguments: list[str], says: str) -> None:
    command = [sys.executable, "-c", SAYS_WHAT_IT_LOADED, "generate", "a lake", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"distriray: {says}")
    assert done.stdout.strip() == "[]"


def test_defaults_are_those_of_a_request() -> None:
    command, wide = (
        [sys.executable, "-m", "distriray", "generate", "--help"],
        {**os.environ, "COLUMNS": "200"},
    )
    shown = subprocess.run(command, capture_output=True, text=True, env=wide, check=True).stdout
    assert "--num-inference-steps" in shown and "[default: 0.0]" in shown
    assert "the model's own number by default" in shown
