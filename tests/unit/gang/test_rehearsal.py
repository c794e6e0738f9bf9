"""Workers compile before they serve, each by itself, for all that gangs ask of them; then no more."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distriray.adapters import AdapterSpec
from distriray.errors import UnsupportedModel
from distriray.gang.config import HostConfig
from distriray.gang.rehearsal import rehearse
from distriray.parallel import compile_blocks
from tests.adapters import write
from tests.compiling import CountingCompiler
from tests.models import tiny_sdxl

from .runners import Gang

COMPILED, OTHER = 128, 192


def config(*sizes: str, workers: int = 2) -> HostConfig:
    return HostConfig(compile=sizes, workers=workers)


def pictures(gang: Gang, **fields: Any) -> list[np.ndarray]:
    found = [np.asarray(image) for rank in gang.run(seed=3, **fields) for image in rank.images or ()]
    assert found
    return found


def test_gangs_of_what_was_rehearsed_compile_nothing_and_draw_the_same(
    tiny_model: Path, compiler: CountingCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distriray.gang.runner.compile_blocks", partial(compile_blocks, backend=compiler))
    plain, gang = Gang(tiny_model, 2), Gang(tiny_model, 2)
    size = f"{COMPILED}x{COMPILED}"
    rehearse(gang.runners[0], config(size), gang.runners[0].facts())
    of_one = compiler.graphs
    torch.compiler.set_stance("default")
    rehearse(gang.runners[1], config(size), gang.runners[1].facts())
    assert compiler.graphs == of_one > 0, "alike blocks share what is compiled"
    assert not any(runner._engine.buffer_bytes for runner in gang.runners), "of gangs that were never there"
    for link in ("all", "alone"):
        for side in (COMPILED, OTHER):
            fields = {"link": link, "height": side, "width": side}
            torch.compiler.set_stance("fail_on_recompile" if side == COMPILED else "eager_on_recompile")
            ours, theirs = (pictures(each, **fields) for each in (gang, plain))
            assert all(np.array_equal(here, there) for here, there in zip(ours, theirs, strict=True))
    assert compiler.graphs == of_one


def test_blocks_with_adapters_in_them_run_as_they_are(
    tiny_model: Path, tmp_path: Path, compiler: CountingCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distriray.gang.runner.compile_blocks", partial(compile_blocks, backend=compiler))
    write(tmp_path / "ink.safetensors", tiny_sdxl(), 1)
    ink = AdapterSpec(name="ink", source=str(tmp_path / "ink.safetensors"))
    plain, gang = Gang(tiny_model, 1), Gang(tiny_model, 1)
    rehearse(gang.runners[0], config(f"{COMPILED}x{COMPILED}", workers=1), gang.runners[0].facts())
    compiled = compiler.graphs
    drawn = []
    for loras in ((), ({"name": "ink", "scale": 0.8},), ()):
        fields = {"adapters": (ink,), "loras": loras}
        (ours,), (theirs,) = (pictures(each, **fields) for each in (gang, plain))
        assert np.array_equal(ours, theirs)
        drawn.append(ours)
    assert np.array_equal(drawn[0], drawn[2]) and not np.array_equal(drawn[0], drawn[1])
    assert compiler.graphs == compiled


def test_gangs_that_a_picture_is_too_small_for_are_not_rehearsed(
    tiny_model: Path, compiler: CountingCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    (runner,) = Gang(tiny_model, 1).runners
    monkeypatch.setattr("distriray.gang.runner.compile_blocks", partial(compile_blocks, backend=compiler))
    facts, gangs = runner.facts(), list[int]()
    rehearsing = runner.rehearse
    monkeypatch.setattr(
        runner,
        "rehearse",
        lambda params, rank, *rest: (gangs.append(rest[0]), rehearsing(params, rank, *rest)),
    )
    rows = 3 * facts.row_unit
    rehearse(runner, config(f"{COMPILED}x{rows}", workers=4), facts)
    assert gangs == [1, 2, 2]


def test_what_cannot_be_compiled_is_refused_by_name(
    tiny_model: Path, compiler: CountingCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    (runner,) = Gang(tiny_model, 1).runners

    def failing(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        raise OSError("no compiler")

    monkeypatch.setattr("distriray.gang.runner.compile_blocks", partial(compile_blocks, backend=failing))
    with pytest.raises(UnsupportedModel, match="compile 128x129: .*129"):
        rehearse(runner, config("128x129", workers=1), runner.facts())
    with pytest.raises(UnsupportedModel, match="(?s)cannot compile the blocks of .*sdxl here: .*no compiler"):
        rehearse(runner, config("128x128", workers=1), runner.facts())
