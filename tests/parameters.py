"""Cases of parametrized tests: few combinations in place of all, and first ones in place of many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations of one value of each factor; any two values of two factors meet in one of them."""

    def meetings(choice: tuple[int, ...]) -> set[tuple[Any, Any]]:
        return set(combinations(enumerate(choice), 2))

    choices = list(product(*(range(len(factor)) for factor in factors)))
    missing = set().union(*map(meetings, choices))
    chosen = []
    while missing:
        chosen.append(max(choices, key=lambda choice: len(meetings(choice) & missing)))
        missing -= meetings(chosen[-1])
    return [tuple(factor[at] for factor, at in zip(factors, choice, strict=True)) for choice in chosen]


def sweep(cases: Iterable[Any], first: int = 1) -> list[Any]:
    """Those cases; `make check` runs the `first` of them, `make test` all."""
    return [
        case
        if index < first
        else pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.sweep)
        for index, case in enumerate(cases)
    ]
