"""Calls that are interrupted wherever Python would let a signal in."""

from __future__ import annotations

import contextlib
import dis
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, ModuleType
from typing import Any, TypeVar

T = TypeVar("T")
# Of the standard library, what calls of ours go through in Python.
_LIBRARY = (contextlib, threading)
# After these instructions Python looks for signals.
_LOOKS = ("RESUME", "CALL", "JUMP_BACKWARD")
# What follows a call whose result is returned out of a `with` block: a signal would come in the
# block, what a tracer raises here comes behind it.
_LEAVES = "SWAP"


class Interruption(BaseException):
    """Stands for a signal."""


def interrupted(call: Callable[[], Any], at: int, *modules: ModuleType) -> Interruption | None:
    """Run `call`, interrupted the `at`-th time that a signal could come in code of `modules`.

    What it raised, if that was before its end.
    """
    files = {module.__file__ for module in (*modules, *_LIBRARY)}
    left, last = at, dict[FrameType, str]()

    def trace(frame: FrameType, kind: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = True
        if kind == "opcode":
            before, now = last.get(frame, ""), dis.opname[frame.f_code.co_code[frame.f_lasti]]
            last[frame] = now
            left -= before.startswith(_LOOKS) and now != _LEAVES
            if left == 0:
                left = -1
                raise Interruption
        return trace

    tracing = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # or Python 3.12 tells no opcodes of the first frames
    sys.settrace(trace)
    try:
        call()
    except Interruption as error:
        return error
    finally:
        sys.settrace(tracing)
        last.clear()  # of frames, which only the collector of garbage would free
    return None


def interruptions(
    prepare: Callable[[], T], call: Callable[[T], Any], *modules: ModuleType
) -> Iterator[tuple[T, list[Interruption]]]:
    """For k = 1, 2, ...: what `prepare` made, after `call` of it was interrupted the k-th time.

    With it comes what was raised, for as long as it is in the list.
    """
    for at in range(1, 2000):
        subject = prepare()
        error = interrupted(lambda: call(subject), at, *modules)  # noqa: B023
        if error is None:
            assert at > 5
            return
        kept = [error]
        del error
        yield subject, kept
    raise AssertionError("it never ran to its end")
