"""Hosts of a command, as a file and the command's options say."""

from __future__ import annotations

from pathlib import Path

import pytest

from distriray.errors import InvalidRequest
from distriray.gang.config_file import read_config

NONE_GIVEN = {"model": {"name": None, "dtype": None}, "parallel": {"exchange": None}}


@pytest.mark.parametrize("text", ["model: [some/model]", "parallel: sync", "loras: {}"])
def test_options_that_nobody_gave_hide_nothing_of_a_file(text: str, tmp_path: Path) -> None:
    pool = tmp_path / "pool.yaml"
    pool.write_text(text)
    with pytest.raises(InvalidRequest, match=f"pool {pool}: {text.partition(':')[0]} "):
        read_config(pool, NONE_GIVEN)


@pytest.mark.parametrize("source", ["~nobody.of.that.name/ink", "x" * 300])
def test_a_path_that_cannot_be_looked_at_is_left_as_it_is(source: str, tmp_path: Path) -> None:
    pool = tmp_path / "pool.yaml"
    pool.write_text(f"loras:\n- {{name: ink, source: {source}}}\n")
    assert read_config(pool, NONE_GIVEN).loras[0].source == source


@pytest.mark.parametrize(
    ("own", "named", "expected"),
    [
        ("{name: a/b, revision: v2, quantize: int8}", "a/b", ("v2", "int8", "float16")),
        ("{name: a/b, revision: v2, quantize: int8}", None, ("v2", "int8", "float16")),
        ("{name: a/b, revision: v2, quantize: int8, variant: fp16}", "c/d", (None, None, "float16")),
        ("{quantize: int8}", "builtin:landscapes", (None, "int8", "float16")),
        ("{quantize: int8}", "c/d", (None, None, "float16")),
        ("a/b", "c/d", (None, None, "float16")),
    ],
)
def test_another_model_than_the_files_has_none_of_its_fields(
    own: str, named: str | None, expected: tuple[str | None, ...], tmp_path: Path
) -> None:
    pool = tmp_path / "pool.yaml"
    pool.write_text(f"model: {own}\nworkers: 4\n")
    config = read_config(pool, {"model": {"name": named, "dtype": "float16"}})
    model = config.model
    assert (model.revision, model.quantize, model.dtype) == expected and model.variant is None
    assert config.workers == 4 and named in (None, model.name)
