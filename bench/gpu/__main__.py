"""Everything that a machine with an NVIDIA GPU shows, in stages: `python -m bench.gpu`, or `make gpu`.

One GPU is enough. Each stage ends within ten minutes, and what it measured is in a file when it ends; a stage
that fails does not keep later ones from running. `--dry` runs the same commands on a CPU, on something tiny.
The last stage needs Ray, and none needs a network.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("docs/measurements/gpu")


@dataclass(frozen=True)
class Stage:
    """One command of `python -m`.

    Attributes:
        arguments: on a GPU; `{out}` is the folder of the measurements.
        dry: on a CPU.
    """

    title: str
    arguments: str
    dry: str
    limit_s: float = 600.0


TESTS = {
    "kernels and of stops": "tests/unit",
    "captured steps, of segments and of a host": "tests/gpu",
    "NCCL": "tests/distributed",
}
STAGES = (
    *(
        Stage(
            f"tests of {what}",
            # Files that want what is missing here, such as Ray, keep none of the others' tests from running.
            f"pytest -m gpu --continue-on-collection-errors {folder}",
            f"pytest -m gpu {folder} --collect-only -q",
        )
        for what, folder in TESTS.items()
    ),
    Stage(
        "shares of a step of SDXL",
        "bench.gpu.shares --json {out}/shares.json",
        "bench.gpu.shares --device cpu --steps 1 --ranks 1 2 --json {out}/shares.json",
    ),
    Stage(
        "shares of a step of SDXL, compiled",
        "bench.gpu.shares --compiled --sizes 1024 --json {out}/shares-compiled.json",
        "bench.gpu.shares --compiled --device cpu --steps 1 --ranks 1 2 --json {out}/shares-compiled.json",
    ),
    Stage(
        "shares of a step of SDXL in mixes that wait for fresh values",
        "bench.gpu.shares --sizes 1024 2048 --ranks 8 --exchange displaced_attention compressed sync "
        "--json {out}/mixes.json",
        "bench.gpu.shares --device cpu --steps 1 --ranks 2 --exchange compressed --json {out}/mixes.json",
    ),
    *(
        Stage(
            f"shares of a step of {name}, compiled too",
            f"{shares} --short --compiled --sizes 1024 2048 --steps 4 --json {{out}}/{model}.json",
            f"{shares} --short --compiled --device cpu --steps 1 --ranks 1 2 --json {{out}}/{model}.json",
        )
        for name, model in (("FLUX.1", "flux"), ("Qwen-Image", "qwen-image"), ("Z-Image", "z-image"))
        for shares in [f"bench.gpu.shares --model {model}"]
    ),
    Stage(
        "projection at 1024 and 2048",
        "bench.projection --device cuda --sizes 1024 2048 --json {out}/projection.json",
        "bench.projection --sizes 128 --steps 2 --rounds 1 --ranks 1 2 --json {out}/projection.json",
    ),
    Stage(
        "projection at 3840",
        "bench.projection --device cuda --sizes 3840 --rounds 1 --json {out}/projection-3840.json",
        "bench.projection --sizes 192 --steps 2 --rounds 1 --ranks 1 --json {out}/projection-3840.json",
    ),
    Stage(
        "quality",
        "bench.quality --device cuda --minutes 8 --work runs/quality-gpu --json {out}/quality.json",
        "bench.quality --quick --count 2 --work {out}/quality --json {out}/quality.json",
    ),
    Stage(
        "a wait and a halo by memory that peers map",
        "bench.gpu.one_sided --json {out}/one-sided.json",
        "bench.gpu.one_sided --device cpu --rounds 2 --exchanges 5 --json {out}/one-sided.json",
    ),
    Stage(
        "the service, and a worker killed",
        "bench.gpu.serve --out {out}/serve.json",
        "bench.gpu.serve --device cpu --out {out}/serve.json",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = "; ".join(f"{number} {stage.title}" for number, stage in enumerate(STAGES, 1))
    parser.add_argument("--stage", type=int, nargs="+", choices=range(1, len(STAGES) + 1), help=names)
    parser.add_argument("--dry", action="store_true", help="on a CPU")
    parser.add_argument("--out", type=Path, help=f"default {FOLDER}; out/gpu for a dry run")
    arguments = parser.parse_args()
    out = arguments.out or (Path("out/gpu") if arguments.dry else FOLDER)
    out.mkdir(parents=True, exist_ok=True)
    failed = [
        number
        for number in arguments.stage or range(1, len(STAGES) + 1)
        if not done(number, STAGES[number - 1], out, dry=arguments.dry)
    ]
    if failed:
        raise SystemExit(f"stages {failed} failed")


def done(number: int, stage: Stage, out: Path, *, dry: bool) -> bool:
    """Run a stage; whether it ended well, and in time."""
    module, *rest = (stage.dry if dry else stage.arguments).format(out=out).split()
    print(f"== stage {number}: {stage.title}: python -m {' '.join((module, *rest))}", flush=True)
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", module, *rest], start_new_session=True)
    try:
        code = process.wait(stage.limit_s)
        outcome = "done" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        code, outcome = 1, f"cut off after {stage.limit_s:g} s"
    finally:
        # Ranks too, that it has started and left: they would keep the GPU from the stages that follow.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    print(f"== stage {number}: {outcome}, {time.monotonic() - began:.0f} s", flush=True)
    return code == 0


if __name__ == "__main__":
    # A stage is in a session of its own: whoever ends this has to have ended that too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main()
