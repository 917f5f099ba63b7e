"""Triton kernels and their launchers, one file per operation; importing this needs Triton."""

from __future__ import annotations

from typing import Any

from . import attend_shared as _attend_shared
from . import attend_window as _attend_window
from . import input_step as _input_step
from . import ring_step as _ring_step
from . import ring_steps as _ring_steps

__all__ = [
    "attend_shared",
    "attend_shared_backward",
    "attend_shared_full",
    "attend_shared_full_backward",
    "attend_shared_query_backward",
    "attend_window",
    "attend_window_backward",
    "bind_ring_step_",
    "input_step_",
    "ring_step_",
    "ring_steps_",
    "why_not",
]

_MODULES = {
    "input_step_": _input_step,
    "ring_step_": _ring_step,
    "ring_steps_": _ring_steps,
    "attend_shared": _attend_shared,
    "attend_shared_backward": _attend_shared,
    "attend_shared_full": _attend_shared,
    "attend_shared_full_backward": _attend_shared,
    "attend_shared_query_backward": _attend_shared,
    "attend_window": _attend_window,
    "attend_window_backward": _attend_window,
}

bind_ring_step_ = _ring_step.bind_ring_step_
input_step_ = _input_step.input_step_
ring_step_ = _ring_step.ring_step_
ring_steps_ = _ring_steps.ring_steps_
attend_shared = _attend_shared.attend_shared
attend_shared_backward = _attend_shared.attend_shared_backward
attend_shared_full = _attend_shared.attend_shared_full
attend_shared_full_backward = _attend_shared.attend_shared_full_backward
attend_shared_query_backward = _attend_shared.attend_shared_query_backward
attend_window = _attend_window.attend_window
attend_window_backward = _attend_window.attend_window_backward


def why_not(name: str, *args: Any) -> str | None:
    """None if the kernels cover a call of the operator `name` with `args`, else the reason."""
    module = _MODULES.get(name)
    return f"there is no kernel for {name}" if module is None else module.why_not(name, *args)
