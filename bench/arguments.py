"""Numbers and names of the command lines; anything else is refused with the option's name."""

from __future__ import annotations

import argparse
import math


def names(text: str) -> tuple[str, ...]:
    """Several, with commas between them."""
    return tuple(name for name in text.split(",") if name)


def real(text: str) -> float:
    """Any but NaN, with which nothing compares."""
    value = float(text)
    if math.isnan(value):
        raise argparse.ArgumentTypeError("must be a number")
    return value


def positive(text: str) -> float:
    """A finite number over 0."""
    value = real(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be over 0 and finite, but is {text}")
    return value


def count(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, but is {text}")
    return value
