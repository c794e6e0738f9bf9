"""Numbers that a command line cannot work with are refused by it."""

from __future__ import annotations

import argparse

import pytest

from distriray.arguments import at_least, non_negative_number, positive_number


@pytest.mark.parametrize(("text", "says"), [("2", "2 is too few; use 3 or more"), ("x", "'x' is no integer")])
def test_numbers_that_are_too_few_are_refused(text: str, says: str) -> None:
    assert at_least(3)("3") == 3
    with pytest.raises(argparse.ArgumentTypeError, match=says):
        at_least(3)(text)


@pytest.mark.parametrize("text", ["0", "-0.5", "nan", "inf", "x", ""])
def test_numbers_of_which_nothing_comes_are_refused(text: str) -> None:
    assert positive_number("0.5") == 0.5
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is no positive number"):
        positive_number(text)


@pytest.mark.parametrize("text", ["-0.5", "nan", "inf", "x"])
def test_numbers_below_nothing_are_refused(text: str) -> None:
    assert non_negative_number("0") == 0.0
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is no number of 0 or more"):
        non_negative_number(text)
