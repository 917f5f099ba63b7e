"""Which GPUs the kernels are for, and what a program may have there.

Where CUDA has not begun, as with fake tensors on a machine without a GPU, nothing is known of the
device, and it is taken for one on which all kernels run.
"""

from __future__ import annotations

from typing import Any

import torch

from .tracing import constant_while_compiling

_OLDEST = (8, 0)
# Bytes of shared memory. Of compute capability 8.6, 8.9 and 12 are GPUs where a program may have no
# more than 99 KiB; on all others from 8.0 on it may have at least 163.
_ROOMY = 163 << 10


@constant_while_compiling
def why_unfit(device: torch.device) -> str | None:
    """Why no kernel runs on this CUDA device; None if they do."""
    if torch.version.hip is not None:
        return "the kernels are for GPUs of NVIDIA"
    if torch.cuda.is_initialized() and torch.cuda.get_device_capability(device) < _OLDEST:
        return "the device is older than compute capability 8.0"
    return None


@constant_while_compiling
def has_little_memory(device: torch.device) -> bool:
    """Whether a program may have no more than 99 KiB of shared memory on this CUDA device."""
    if not torch.cuda.is_initialized():
        return False
    properties: Any = torch.cuda.get_device_properties(device)
    return bool(properties.shared_memory_per_block_optin < _ROOMY)
