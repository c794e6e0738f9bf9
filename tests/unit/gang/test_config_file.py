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
