"""Which dtype a computation takes, and in which it accumulates."""

from __future__ import annotations

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast asks for on such a device; None where it is off."""
    # Under torch.compile the older of the supported torches cannot ask; all but meta have autocast.
    if torch.compiler.is_compiling():
        casts = device_type != "meta"
    else:
        casts = torch.amp.is_autocast_available(device_type)
    return current_autocast_dtype(device_type) if casts else None


def current_autocast_dtype(device_type: str) -> torch.dtype | None:
    """The same on a device of a type that has autocast: to ask that costs as much again."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of the softmax: at least fp32."""
    return torch.promote_types(dtype, torch.float32)
