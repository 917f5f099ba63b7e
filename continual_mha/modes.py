"""What surrounds a call: which forward ``module(...)`` means, and which streams advance."""

from __future__ import annotations

import sys
from abc import ABCMeta
from typing import Any

import torch
from torch import Tensor

from .surroundings import Block, Surrounding

CALL_MODES = ("forward", "forward_steps", "forward_step")


def checked_mode(mode: Any) -> str:
    """The name of a call mode given as name, number, or the tensor that ``continual`` uses for it.

    Raises:
        ValueError: there is no such mode.
    """
    name = mode.lower() if isinstance(mode, str) else mode
    if isinstance(mode, (int, torch.Tensor)) and 0 <= int(mode) < len(CALL_MODES):
        name = CALL_MODES[int(mode)]
    if name not in CALL_MODES:
        raise ValueError(f"call_mode must be one of {', '.join(CALL_MODES)}, but got {mode!r}")
    return str(name)


# That of the innermost `call_mode` block. Compiled calls ask for a global anew: what is a class's,
# torch 2.10 takes for constant.
_surrounding: str | None = None


class call_mode:  # noqa: N801  (a function to its users, as in `continual`)
    """Inside ``with call_mode("forward_step"):``, calling any module of this package makes a step.

    Those of ``continual``, its containers among them, follow the block of the same name that is
    theirs, and so do those of this package inside it.

    In every thread, as in ``continual``: where several run, set ``module.call_mode`` instead.

    Raises:
        ValueError: there is no such mode.
    """

    def __init__(self, mode: Any) -> None:
        self.mode = checked_mode(mode)
        self._before: list[str | None] = []  # as often as the block is entered

    def __enter__(self) -> None:
        global _surrounding
        self._before.append(_surrounding)
        _surrounding = self.mode

    def __exit__(self, *exc_info: object) -> None:
        global _surrounding
        _surrounding = self._before.pop()


def surrounding_mode() -> str | None:
    """The mode of the innermost ``call_mode`` block, ours or that of an imported ``continual``."""
    if _surrounding is not None:
        return _surrounding
    upstream = getattr(sys.modules.get("continual.module"), "call_mode", None)
    if upstream is None or upstream.prev is None:
        return None
    return checked_mode(upstream.cur)


def make_known_upstream(kind: type) -> None:
    """Let an imported ``continual`` take modules of this class for its own, as they are.

    Its own are counted by ``ptflops``, which looks for the very class.
    """
    base = getattr(sys.modules.get("continual.module"), "CoModule", None)
    if isinstance(base, ABCMeta):
        base.register(kind)
    counted = getattr(sys.modules.get("ptflops.pytorch_ops"), "MODULES_MAPPING", None)
    if isinstance(counted, dict):
        counted[kind] = _count_for_ptflops


def _count_for_ptflops(module: Any, args: object, output: object) -> None:
    module.__flops__ += module.flops()


_active: Surrounding[Tensor | None] = Surrounding("active", None)


class active_streams(Block[Tensor | None]):  # noqa: N801  (a function to its users)
    """Inside ``with active_streams(mask):``, steps of any module advance these streams only.

    For models whose inner modules cannot be handed the ``active`` of ``forward_step``;
    ``forward_steps``, which moves all streams, raises a RuntimeError there. Other threads and
    asynchronous tasks see nothing of it, but for compiled modules: ``torch.compile`` cannot read
    what is a thread's own, so that only one at a time may use those inside such a block, which
    begins outside of them.

    Args:
        active: bool ``(N,)`` on the state's device; None for all.
    """

    def __init__(self, active: Tensor | None) -> None:
        super().__init__(_active, active)


def surrounding_active(compiling: bool) -> Tensor | None:
    """The mask of the innermost ``active_streams`` block, or None, for a call that is compiling."""
    return _active.last if compiling else _active.get()
