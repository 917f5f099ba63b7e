"""A progress bar where there is tqdm, and plain lines where there is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

try:
    from tqdm import tqdm
except ImportError:  # a GPU machine where nothing may be installed
    tqdm = None

T = TypeVar("T")


def bar(items: Iterable[T], unit: str) -> Iterator[T]:
    """``items``, shown as they go by."""
    return iter(items if tqdm is None else tqdm(items, unit=unit, smoothing=0))


def say(line: str) -> None:
    """Print a line without disturbing the bar."""
    if tqdm is None:
        print(line, flush=True)
    else:
        tqdm.write(line)
