"""A Triton kernel that reads memory as fast as it comes, to measure bandwidth against."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _read(x_ptr, sums_ptr, per_program, BLOCK: tl.constexpr):
    """One program sums `per_program` consecutive blocks of float32 and writes one number."""
    program = tl.program_id(0).to(tl.int64)
    offs = program * per_program * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    acc = tl.zeros([BLOCK], tl.float32)
    for block in range(per_program):
        acc += tl.load(x_ptr + offs + block * BLOCK)
    tl.store(sums_ptr + program, tl.sum(acc, 0))


def reader(x: Tensor) -> Callable[[], object]:
    """A call that reads all of ``x``: float32, contiguous, a power of two elements from 4096 on."""
    blocks = x.numel() // _BLOCK
    per_program = max(1, min(16, blocks // 1024))  # first fill the chip, then lengthen the loop
    sums = torch.empty(blocks // per_program, dtype=torch.float32, device=x.device)

    def run() -> object:
        _read[(blocks // per_program,)](x, sums, per_program, BLOCK=_BLOCK)
        return sums

    return run
