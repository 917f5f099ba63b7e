"""A GPU lost to its process: by an error that no later call survives, or by a call without end.

Whoever measures keeps a row that says what lost the device, and ends with the code ``LOST``. Run
again with ``--resume``, it does without that and goes on.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import torch

Row = dict[str, Any]
LOST = 75  # the exit code
REASON = "the device was lost"
PATIENCE = 60.0  # seconds, less those that compilers take
MOST = 300.0  # seconds with them
_LOOKS = 20  # at what runs, while patience lasts
# Module and function that stand on the stack while a kernel is compiled, and not while it runs.
_COMPILERS = {("triton.compiler.compiler", "compile"), ("torch._dynamo.convert_frame", "_compile")}


class DeviceLostError(RuntimeError):
    """No later call of this process will work on the device."""


def why_lost(device: torch.device) -> str | None:
    """Why nothing works on ``device`` any more; None if it does."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return f"{REASON}: {line_of(error)}"
    return None


def line_of(error: BaseException) -> str:
    """The first line of an error, at a bearable length."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def leave() -> NoReturn:
    """End this process with ``LOST``, and nothing that could wait for the device or abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(LOST)


def is_compiling() -> bool:
    """Whether a thread of this process is in a compiler, Triton's or torch's."""
    for frame in sys._current_frames().values():  # gradients have threads of their own
        each: FrameType | None = frame
        while each is not None:
            if (each.f_globals.get("__name__"), each.f_code.co_name) in _COMPILERS:
                return True
            each = each.f_back
    return False


def _watch(ended: threading.Event, give_up: Callable[[float], None]) -> None:
    """Call ``give_up`` with the seconds that have passed, if patience ends before ``ended``."""
    look = PATIENCE / _LOOKS
    began, left = time.monotonic(), PATIENCE
    while left > 0.0 and time.monotonic() - began < MOST:
        if ended.wait(look):
            return
        left -= 0.0 if is_compiling() else look
    give_up(time.monotonic() - began)


@contextmanager
def failing_alone(
    device: torch.device,
    found: list[Row],
    row_of: Callable[[str], Row],
    keep: Callable[[list[Row]], None],
) -> Iterator[None]:
    """What fails in the block leaves a row, and the device to the others.

    Args:
        found: rows, to which that of a failure is added.
        row_of: the row for a reason.
        keep: takes all rows, before the process ends because the block does not. What it compiles
            takes none of its time.

    Raises:
        DeviceLostError: it left no device.
    """

    def give_up(seconds: float) -> None:
        keep([*found, row_of(f"{REASON}: still running after {seconds:.0f} s")])
        leave()

    ended = threading.Event()
    if device.type == "cuda":
        threading.Thread(target=_watch, args=(ended, give_up), daemon=True).start()
    try:
        yield
    except Exception as error:  # whatever a third party raises is its result
        reason = why_lost(device)
        found.append(row_of(reason or line_of(error)))
        if reason is not None:
            raise DeviceLostError(reason) from error
    finally:
        ended.set()
