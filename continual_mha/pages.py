"""Large pages of memory, for what every step reads from one end to the other."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

from .tracing import is_opaque

_PAGE = 2 << 20  # bytes, on x86 and mostly on Arm
_LEAST = 4 * _PAGE
_MADV_HUGEPAGE = 14  # Linux: asm-generic/mman-common.h


def zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.zeros``, on Linux in large pages if it is on a CPU and has many bytes.

    From pages of 4 KB memory comes slower, for each has to be looked up. Where the system gives
    large ones to those who ask, PyTorch asks only if ``THP_MEM_ALLOC_ENABLE`` is in the
    environment. It is no more than advice: what the system makes of it changes no number.
    """
    x = torch.empty(size, dtype=dtype, device=device)
    if sys.platform == "linux" and x.is_cpu and not is_opaque(x) and x.nbytes >= _LEAST:
        begin = -(-x.data_ptr() // _PAGE) * _PAGE  # of the pages that lie within
        end = (x.data_ptr() + x.nbytes) // _PAGE * _PAGE
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE
        )
    return x.zero_()
