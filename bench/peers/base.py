"""What an implementation is to the benchmark."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..grid import Case
from ..problem import Problem

Outputs = Tensor | tuple[Tensor, ...]
Context = Callable[[], AbstractContextManager[object]]


class Ready(NamedTuple):
    """A call that is set up: streams are warm, and the first call takes ``Problem.tokens``.

    Attributes:
        run: makes one call and returns its output for all streams, with the gradient of its tokens
            where the mode has a backward pass.
        context: what has to surround calls; entered once around many.
        why_no_graph: why a replayed CUDA graph would not be the same computation, if so.
        formulation: what it turned out to cache, if it had the choice.
    """

    run: Callable[[], Outputs]
    context: Context = nullcontext
    why_no_graph: str | None = None
    formulation: str | None = None


@dataclass(frozen=True)
class Peer:
    """An implementation.

    Attributes:
        name: unique; ours begin with ``ours``.
        modes: what it can be asked to do.
        setup: makes a Ready from a problem; may raise whatever the implementation raises.
        why_absent: why it cannot run a case here, or None.
        formulation: ``kv`` or ``input``: what it caches.
        copies: how many times the state of keys and values it holds at once, at the most.
    """

    name: str
    modes: tuple[str, ...]
    setup: Callable[[Problem], Ready]
    why_absent: Callable[[Case], str | None] = lambda case: None
    formulation: str = "kv"
    copies: float = 1.0


def not_compiled(compiled: bool) -> str | None:
    """Why nothing runs under ``torch.compile``; None if it does."""
    if not compiled:
        return "compiling is slow: asked for by --compile only"
    found = any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))
    return None if found else "torch.compile finds no C++ compiler"


def missing(package: str) -> str | None:
    """Why an optional package cannot be used; None if it is installed."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed"
