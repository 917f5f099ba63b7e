"""Triton kernels and their launchers, one file per operation; importing this needs Triton."""

from __future__ import annotations

from typing import Any

from . import attend_shared as _attend_shared
from . import attend_window as _attend_window
from . import input_step as _input_step
from . import ring_step as _ring_step
from . import ring_steps as _ring_steps
from .attend_shared import attend_shared, attend_shared_full
from .attend_shared_backward import (
    attend_shared_backward,
    attend_shared_full_backward,
    attend_shared_query_backward,
)
from .attend_window import attend_window, attend_window_backward
from .input_step import input_step_
from .ring_step import bind_ring_step_, ring_step_
from .ring_steps import ring_steps_

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

# By operator: whose `why_not` tells whether it is covered, and how many gradients of results stand
# before the arguments that it asks for.
_MODULES: dict[str, tuple[Any, int]] = {
    "input_step_": (_input_step, 0),
    "ring_step_": (_ring_step, 0),
    "ring_steps_": (_ring_steps, 0),
    "attend_shared": (_attend_shared, 0),
    "attend_shared_backward": (_attend_shared, 2),
    "attend_shared_full": (_attend_shared, 0),
    "attend_shared_full_backward": (_attend_shared, 4),
    "attend_shared_query_backward": (_attend_shared, 4),
    "attend_window": (_attend_window, 0),
    "attend_window_backward": (_attend_window, 2),
}


def why_not(name: str, *args: Any) -> str | None:
    """None if the kernels cover a call of the operator `name` with `args`, else the reason."""
    if name not in _MODULES:
        return f"there is no kernel for {name}"
    module, gradients = _MODULES[name]
    reason: str | None = module.why_not(*args[gradients:])
    return reason
