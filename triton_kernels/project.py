"""Linear map of a few tokens, spread over the rows of the weight so that it fills the chip."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import constants_of, launch
from .pieces import (
    accumulators,
    cast,
    dot,
    dot_precision,
    features_at_once,
    products_in_parts,
    start_after_previous_launch,
    sum_of_parts,
)
from .plan import StepPlan, cdiv

_WARPS = 4


@triton.jit
def project_rows(
    x_ptr, stride_xn, stride_xk, weight_ptr, bias_ptr, offs_n, mask_n, offs_o, mask_o,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """Rows of x times rows of the weight, plus bias  # [BLOCK_N, BLOCK_O]

    The warps divide the features into PARTS, so that fewer products wait for one another.
    """
    offs_k = tl.arange(0, BLOCK_K)
    if PARTS > 1:
        acc = tl.zeros((PARTS, BLOCK_N, BLOCK_O), ACC)
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_O), ACC)
    bias = tl.zeros((BLOCK_O,), ACC)
    if bias_ptr is not None:  # ahead of the loop, behind which it would be a round trip more
        bias = tl.load(bias_ptr + offs_o, mask=mask_o, other=0.0).to(ACC)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        mask_k = k + offs_k < K
        x = tl.load(
            x_ptr + offs_n[:, None] * stride_xn + (k + offs_k).to(tl.int64)[None, :] * stride_xk,
            mask=mask_n[:, None] & mask_k[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_K]
        weight = tl.load(
            weight_ptr + offs_o.to(tl.int64)[:, None] * K + (k + offs_k)[None, :],
            mask=mask_o[:, None] & mask_k[None, :],
            other=0.0,
        )  # [BLOCK_O, BLOCK_K]
        if PARTS > 1:
            acc = products_in_parts(x, weight, acc, PRECISION)
        else:
            acc = dot(x, tl.trans(weight), acc, PRECISION)
    if PARTS > 1:
        acc = sum_of_parts(acc)
    return acc + bias[None, :]


@triton.jit
def _project_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, position_ptr, active_ptr,
    N, OUTPUTS, stride_xn, stride_xk, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_O output features of BLOCK_N tokens; the first also advances positions.

    Reads BLOCK_O * K weights once for all its tokens. BLOCK_O is small, so that the weights, which
    are nearly all the bytes, are spread over as many programs as the chip has multiprocessors.
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_n = offs_n < N
    mask_o = offs_o < OUTPUTS
    start_after_previous_launch(PDL)
    mask_p = offs_n < tl.where(tl.program_id(1) == 0, N, 0)
    position = offs_n
    step = tl.full((BLOCK_N,), 1, tl.int64)
    if position_ptr is not None:  # ahead of the loop, and so of its barriers: all threads read it
        position = tl.load(position_ptr + offs_n, mask=mask_p, other=0)
        if active_ptr is not None:
            step = tl.load(active_ptr + offs_n, mask=mask_p, other=0).to(tl.int64)
    acc = project_rows(x_ptr, stride_xn, stride_xk, weight_ptr, bias_ptr, offs_n, mask_n, offs_o,
                       mask_o, K, BLOCK_N, BLOCK_O, BLOCK_K, STAGES, PRECISION, ACC,
                       PARTS)  # fmt: skip
    tl.store(
        out_ptr + offs_n[:, None] * OUTPUTS + offs_o[None, :],
        cast(acc, out_ptr.dtype.element_ty),
        mask=mask_n[:, None] & mask_o[None, :],
    )
    if position_ptr is not None:
        tl.store(position_ptr + offs_n, position + step, mask=mask_p)


# Of the kernel's arguments, those that differ from step to step: token and output, and the mask.
PROJECTED, ADVANCED = (0, 3), (5,)


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: StepPlan,
    position: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """`x` (N, K) times `weight` (O, K) transposed, plus `bias` (O,): a new (N, O) tensor.

    If `position` (N,) is given it is advanced in place by one, or by `active` (N,).
    """
    tokens, (outputs, features) = x.shape[0], weight.shape
    out = x.new_empty((tokens, outputs))
    _, acc = accumulators(x.dtype)
    args = (x, weight, bias, out, position, active, tokens, outputs, *x.stride())
    block_k = features_at_once(features, x.element_size(), 8 * 1024 // plan.block_n)
    stages = 3 if x.element_size() == 2 else 4
    # 16 tokens and outputs are one product of the matrix unit, which every warp would repeat.
    alone = x.element_size() == 2 and plan.block_n == plan.block_o == 16
    parts = min(_WARPS, block_k // 16) if alone else 1
    constants = constants_of(
        features, plan.block_n, plan.block_o, block_k, stages, parts, plan.pdl, dot_precision(), acc
    )
    grid = (cdiv(tokens, plan.block_n), cdiv(outputs, plan.block_o), 1)
    launch(_project_kernel, grid, args, constants, num_warps=_WARPS, pdl=plan.pdl)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: StepPlan) -> Tensor:
    """`project` for `x` (..., K): a new (..., O) tensor."""
    rows = x.reshape(-1, x.shape[-1])
    return project(rows, weight, bias, plan).view(*x.shape[:-1], weight.shape[0])
