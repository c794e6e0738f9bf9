"""The figure of mixes takes its numbers from the tables that were measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from bench.tradeoff import main, psnr_of, speeds_of

QUALITY = {
    "rows": [
        {"question": "mixes", "patches": "4", "method": method, "PSNR, dB": f"{psnr} ± 1.0"}
        for method, psnr in (
            ("corrected statistics, stale halos, stale keys and values, warm-up 4", 35.5),
            ("displaced, warm-up 4, statistics 0.5", 39.5),
        )
    ]
    + [{"question": "widths", "patches": "4", "method": "displaced, other", "PSNR, dB": "1.0 ± 1.0"}]
}
EXCHANGE = {
    "settings": {"size": 768, "ranks": 2},
    "rows": [
        {"mode": mode, "backend": backend, "faster than one rank": speed}
        for mode, backend, speed in (
            ("one rank", "-", "1.00x"),
            ("unsent", "shm", "1.95x"),
            ("paper", "shm", "1.90x"),
            ("sync", "shm", "1.80x"),
            ("sync", "gloo", "1.20x"),
        )
    ],
}


def test_numbers_are_those_of_the_tables() -> None:
    assert psnr_of(QUALITY, 4) == {"paper": 35.5, "displaced": 39.5}
    assert psnr_of(QUALITY, 8) == {}
    assert speeds_of(EXCHANGE) == {"shm": {"paper": 1.9, "sync": 1.8}, "gloo": {"sync": 1.2}}


def test_the_command_draws_them(tmp_path: Path) -> None:
    for name, content in (("quality", QUALITY), ("exchange", EXCHANGE)):
        (tmp_path / name).write_text(json.dumps(content))
    out = tmp_path / "new" / "mixes.png"
    main([str(tmp_path / "quality"), str(tmp_path / "exchange"), str(out)])
    assert Image.open(out).width > 500


@pytest.mark.parametrize(
    ("quality", "exchange", "says"),
    [(EXCHANGE, EXCHANGE, "no mixes of 4 patches"), (QUALITY, QUALITY, "no step of a mix")],
)
def test_other_tables_are_refused(quality, exchange, says, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    for name, content in (("quality", quality), ("exchange", exchange)):
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        main([str(tmp_path / name) for name in ("quality", "exchange", "mixes.png")])
    assert says in capsys.readouterr().err
