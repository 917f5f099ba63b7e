"""A GPU lost to its process: by an error that no later call survives, or by a call without end.

Whoever measures keeps a row that says what lost the device, and ends with the code ``LOST``. Run
again with ``--resume``, it does without that and goes on.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

Row = dict[str, Any]
LOST = 75  # the exit code
REASON = "the device was lost"
PATIENCE = 60.0  # seconds, compilation included


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
        keep: takes all rows, before the process ends because the block does not.

    Raises:
        DeviceLostError: it left no device.
    """

    def give_up() -> None:
        keep([*found, row_of(f"{REASON}: still running after {PATIENCE:.0f} s")])
        leave()

    timer = threading.Timer(PATIENCE, give_up)
    timer.daemon = True
    if device.type == "cuda":
        timer.start()
    try:
        yield
    except Exception as error:  # whatever a third party raises is its result
        reason = why_lost(device)
        found.append(row_of(reason or line_of(error)))
        if reason is not None:
            raise DeviceLostError(reason) from error
    finally:
        timer.cancel()
