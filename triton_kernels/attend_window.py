"""Sliding-window attention over ring and clip that writes no state, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import constants_of, launch, little_memory
from .pieces import LOG2E, accumulators, cast, dot, dot_precision, keep_scale
from .plan import StepsPlan, cdiv, steps_plan
from .ring_step import uncovered
from .ring_steps import (
    clip_tile,
    oldest_in_ring,
    ring_steps_kernel,
    ring_tile,
    token_in_slot,
)


@triton.jit
def _tile_gradients(
    left, right, grad_left, grad_right, visible, lse, shared, scale, slots, rows, seed_ptr, stream,
    head, dropout_p, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Applied weights and gradients of scores of one tile, queries by keys or keys by queries."""
    zeros = tl.zeros((left.shape[0], right.shape[0]), ACC)
    score = dot(left, tl.trans(right), zeros, PRECISION) * scale
    weight = tl.where(visible, tl.exp2(score - lse * tl.full((), LOG2E, ACC)), 0.0)
    grad_weight = dot(grad_left, tl.trans(grad_right), zeros, PRECISION)
    applied = weight
    if seed_ptr is not None:
        keep = keep_scale(seed_ptr, slots, stream, head, rows, dropout_p).to(ACC)
        applied = weight * keep
        grad_weight *= keep
    return applied, weight * (grad_weight + shared)


@triton.jit
def _load_rows(ptr, rows, stride, first, end, offs_d, mask_d):
    """Rows `first` to `end` of one head, zeros elsewhere  # [rows, BLOCK_D]"""
    return tl.load(
        ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :],
        mask=((rows >= first) & (rows < end))[:, None] & mask_d[None, :],
        other=0.0,
    )


@triton.jit
def _window_query_gradient_kernel(
    grad_out_ptr, grad_lse_ptr, query_ptr, key_ptr, value_ptr, k_ring_ptr, v_ring_ptr,
    position_ptr, sink_ptr, seed_ptr, out_ptr, lse_ptr, grad_query_ptr, grad_sink_ptr, shared_ptr,
    stride_qn, stride_qt, stride_kn, stride_kt, stride_vn, stride_vt, T, first, dropout_p,
    H: tl.constexpr, D: tl.constexpr, L: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_T queries of one head of one stream.

    Reads the keys and values that they see, as the forward does, and writes besides what every
    score of a query loses to the normalisation, for the gradients of keys and values.
    """
    E: tl.constexpr = H * D
    blocks = tl.cdiv(T - first, BLOCK_T)
    program = tl.program_id(0)
    head = program // blocks % H
    stream = (program // (blocks * H)).to(tl.int64)
    begin = first + program % blocks * BLOCK_T
    offs_t = begin + tl.arange(0, BLOCK_T)
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    mask_t = offs_t < T
    mask_d = offs_d < D
    position = tl.load(position_ptr + stream)
    scale = tl.full((), SCALE * LOG2E, ACC)
    query_ptr += stream * stride_qn + head * D
    key_ptr += stream * stride_kn + head * D
    value_ptr += stream * stride_vn + head * D
    k_ring_ptr += (stream * H + head) * (L * D)
    v_ring_ptr += (stream * H + head) * (L * D)
    base = (stream * (T - first) - first) * E + head * D  # of token 0, were it among the outputs
    q = _load_rows(query_ptr, offs_t, stride_qt, first, T, offs_d, mask_d)
    grad_out = _load_rows(grad_out_ptr + base, offs_t, E, first, T, offs_d, mask_d)
    out = _load_rows(out_ptr + base, offs_t, E, first, T, offs_d, mask_d)
    at = (stream * (T - first) + offs_t - first) * H + head
    lse = tl.load(lse_ptr + at, mask=mask_t, other=0.0)
    shared = -tl.sum(grad_out.to(ACC) * out.to(ACC), axis=1)
    if grad_lse_ptr is not None:
        shared += tl.load(grad_lse_ptr + at, mask=mask_t, other=0.0).to(ACC)
    tl.store(shared_ptr + at, shared, mask=mask_t)
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + at, mask=mask_t, other=0.0).to(ACC)
        grad_sink = tl.exp2((sink - lse) * tl.full((), LOG2E, ACC)) * shared
        tl.store(grad_sink_ptr + at, grad_sink, mask=mask_t)

    grad_q = tl.zeros((BLOCK_T, BLOCK_D), ACC)
    newest = ((position + L - 1) % L).to(tl.int32)
    oldest = oldest_in_ring(position, begin, L)
    for start in tl.range(oldest, 0, BLOCK_S, num_stages=STAGES):
        keys = start + offs_s
        k, v, visible, _, _ = ring_tile(
            k_ring_ptr, v_ring_ptr, keys, offs_t, offs_d, mask_d, newest, L, D
        )
        _, grad_score = _tile_gradients(
            q, k, grad_out, v, visible, lse[:, None], shared[:, None], scale,
            (keys + L)[None, :], offs_t[:, None], seed_ptr, stream, head, dropout_p, PRECISION, ACC,
        )  # fmt: skip
        grad_q = dot(cast(grad_score, k.dtype), k, grad_q, PRECISION)
    clip_end = tl.minimum(begin + BLOCK_T, T)
    for start in tl.range(tl.maximum(begin - L + 1, 0), clip_end, BLOCK_S, num_stages=STAGES):
        keys = start + offs_s
        k, v, visible, _ = clip_tile(
            key_ptr, value_ptr, keys, offs_t, offs_d, mask_d, stride_kt, stride_vt, clip_end, L
        )
        _, grad_score = _tile_gradients(
            q, k, grad_out, v, visible, lse[:, None], shared[:, None], scale,
            (keys + L)[None, :], offs_t[:, None], seed_ptr, stream, head, dropout_p, PRECISION, ACC,
        )  # fmt: skip
        grad_q = dot(cast(grad_score, k.dtype), k, grad_q, PRECISION)
    rows = stream * T + offs_t
    tl.store(
        grad_query_ptr + rows[:, None] * E + (head * D + offs_d)[None, :],
        cast(grad_q * SCALE, grad_query_ptr.dtype.element_ty),
        mask=mask_t[:, None] & mask_d[None, :],
    )


@triton.jit
def _window_key_gradient_kernel(
    grad_out_ptr, query_ptr, key_ptr, value_ptr, k_ring_ptr, v_ring_ptr, position_ptr, seed_ptr,
    lse_ptr, shared_ptr, grad_key_ptr, grad_value_ptr, grad_k_ring_ptr, grad_v_ring_ptr,
    stride_qn, stride_qt, stride_kn, stride_kt, stride_vn, stride_vt, T, first, dropout_p,
    H: tl.constexpr, D: tl.constexpr, L: tl.constexpr, RINGS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: gradients of BLOCK_S keys and values, of the ring if RINGS or of the clip.

    Reads the queries that see them and the gradients of their outputs; each gradient is written by
    the one program that owns it, so that nothing is added up between programs.
    """
    E: tl.constexpr = H * D
    blocks = tl.cdiv(T, BLOCK_S)
    ring_blocks = 0
    if RINGS:
        ring_blocks = (L + BLOCK_S - 1) // BLOCK_S
    program = tl.program_id(0)
    block = program % (blocks + ring_blocks)
    head = program // (blocks + ring_blocks) % H
    stream = (program // ((blocks + ring_blocks) * H)).to(tl.int64)
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    position = tl.load(position_ptr + stream)
    scale = tl.full((), SCALE * LOG2E, ACC)
    query_ptr += stream * stride_qn + head * D
    in_ring = block < ring_blocks
    # Whichever of the two this block is not, none of its rows is there.
    slots = block * BLOCK_S + offs_s
    keys = (block - ring_blocks) * BLOCK_S + offs_s
    in_clip = (keys >= 0) & (keys < T)
    clip_rows = keys.to(tl.int64)[:, None]
    k = tl.load(
        key_ptr + stream * stride_kn + head * D + clip_rows * stride_kt + offs_d[None, :],
        mask=in_clip[:, None] & mask_d[None, :], other=0.0,
    )  # fmt: skip
    v = tl.load(
        value_ptr + stream * stride_vn + head * D + clip_rows * stride_vt + offs_d[None, :],
        mask=in_clip[:, None] & mask_d[None, :], other=0.0,
    )  # fmt: skip
    there = in_clip
    begin = tl.maximum(first, (block - ring_blocks) * BLOCK_S)
    end = tl.minimum(T, (block - ring_blocks + 1) * BLOCK_S - 1 + L)
    ring_offsets = (stream * H + head) * (L * D) + slots[:, None] * D + offs_d[None, :]
    if RINGS:  # noqa: SIM102 (one is known at compile time, one is not)
        if in_ring:
            newest = ((position + L - 1) % L).to(tl.int32)
            keys = token_in_slot(slots, newest, L)
            seen = tl.minimum(position, L - 1).to(tl.int32)  # no query sees the token before them
            there = (slots < L) & (keys >= -seen)
            mask = there[:, None] & mask_d[None, :]
            k = tl.load(k_ring_ptr + ring_offsets, mask=mask, other=0.0)
            v = tl.load(v_ring_ptr + ring_offsets, mask=mask, other=0.0)
            begin = first
            end = tl.minimum(T, tl.max(tl.where(there, keys, -L), axis=0) + L)

    grad_k = tl.zeros((BLOCK_S, BLOCK_D), ACC)
    grad_v = tl.zeros((BLOCK_S, BLOCK_D), ACC)
    base = (stream * (T - first) - first) * E + head * D  # of token 0, were it among the outputs
    for start in tl.range(begin, end, BLOCK_T, num_stages=STAGES):
        offs_t = start + tl.arange(0, BLOCK_T)
        q = _load_rows(query_ptr, offs_t, stride_qt, first, T, offs_d, mask_d)
        grad_out = _load_rows(grad_out_ptr + base, offs_t, E, first, T, offs_d, mask_d)
        at = (stream * (T - first) + offs_t - first) * H + head
        lse = tl.load(lse_ptr + at, mask=offs_t < T, other=0.0)
        shared = tl.load(shared_ptr + at, mask=offs_t < T, other=0.0)
        sees = (keys[:, None] <= offs_t[None, :]) & (keys[:, None] > offs_t[None, :] - L)
        visible = there[:, None] & sees & (offs_t < T)[None, :]
        applied, grad_score = _tile_gradients(
            k, q, v, grad_out, visible, lse[None, :], shared[None, :], scale,
            (keys + L)[:, None], offs_t[None, :], seed_ptr, stream, head, dropout_p, PRECISION, ACC,
        )  # fmt: skip
        grad_k = dot(cast(grad_score, q.dtype), q, grad_k, PRECISION)
        grad_v = dot(cast(applied, q.dtype), grad_out, grad_v, PRECISION)

    dtype = grad_key_ptr.dtype.element_ty
    grad_k = cast(grad_k * SCALE, dtype)
    grad_v = cast(grad_v, dtype)
    clip_offsets = (stream * T + clip_rows) * E + (head * D + offs_d)[None, :]
    mask = in_clip[:, None] & mask_d[None, :]
    tl.store(grad_key_ptr + clip_offsets, grad_k, mask=mask)
    tl.store(grad_value_ptr + clip_offsets, grad_v, mask=mask)
    if RINGS:
        mask = (slots < tl.where(in_ring, L, 0))[:, None] & mask_d[None, :]
        tl.store(grad_k_ring_ptr + ring_offsets, grad_k, mask=mask)
        tl.store(grad_v_ring_ptr + ring_offsets, grad_v, mask=mask)


def why_not(*args: Any) -> str | None:
    """None if this module covers a call with these arguments, else the reason why not."""
    query, key, value, k_ring, v_ring, position = args[:6]
    rings = (k_ring, v_ring, query.new_empty(0))
    return uncovered(query, key, value, *rings, position=position)


def _packed(x: Tensor) -> Tensor:
    """`x` (N, T, H, D) with the features of a token side by side."""
    packed = x.stride(3) == 1 and x.stride(2) == x.shape[3]
    return x if packed else x.contiguous()


def _constants(plan: StepsPlan, dtype: torch.dtype) -> tuple:
    _, acc = accumulators(dtype)
    return plan.block_t, plan.block_s, plan.block_d, plan.stages, dot_precision(plan.whole), acc


def attend_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    position: Tensor,
    sink: Tensor | None,
    seed: Tensor | None,
    first: int,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Attention of the queries from `first` on over the last L of the ring's and clip's tokens.

    Shapes: `query`, `key`, `value` (N, T, H, D), any strides; `k_ring`, `v_ring` (N, H, L, D);
    `position` (N,); `sink` (N, T - first, H), one more score without a value; `seed` (1,) int64 of
    the dropout. Returns the output (N, T - first, H, D) and, in at least fp32, the logarithm of the
    softmax's denominator (N, T - first, H). Covered: what `why_not` answers None to.
    """
    (N, T, H, D), L = query.shape, k_ring.shape[2]
    query, key, value = _packed(query), _packed(key), _packed(value)
    little = little_memory(query)
    plan = steps_plan(T - first, D, query.element_size(), seed is not None, little=little)
    out = query.new_empty((N, T - first, H, D))
    wide, _ = accumulators(query.dtype)
    lse = torch.empty((N, T - first, H), dtype=wide, device=query.device)
    args = (
        query, key, value, None, None, None, None, k_ring, v_ring, None, None, None, position,
        None if sink is None else sink.contiguous(), seed, out, lse, *query.stride()[:2],
        *key.stride()[:2], *value.stride()[:2], T, first, dropout_p,
    )  # fmt: skip
    block_t, block_s, block_d, stages, precision, acc = _constants(plan, query.dtype)
    constants = constants_of(
        H, D, L, 0, block_t, block_s, block_d, plan.block_one, False, stages, precision, D**-0.5,
        acc,
    )  # fmt: skip
    programs = N * H * cdiv(T - first, block_t)
    launch(ring_steps_kernel, (programs, 1, 1), args, constants, num_warps=plan.num_warps)
    return out, lse


def attend_window_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    position: Tensor,
    sink: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    first: int,
    dropout_p: float,
    rings: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attend_window` by query, key, value, both rings and sink, each contiguous.

    Those of the rings have no elements unless `rings`, that of the sink none where there is none.
    """
    (N, T, H, D), L = query.shape, k_ring.shape[2]
    query, key, value = _packed(query), _packed(key), _packed(value)
    sizes = (T - first, D, query.element_size())
    plan = steps_plan(*sizes, seed is not None, backward=True, little=little_memory(query))
    block_t, block_s, block_d, stages, precision, acc = _constants(plan, query.dtype)
    shape = (N, T, H, D)
    grad_query = query.new_zeros(shape) if first else query.new_empty(shape)
    grad_key, grad_value = query.new_empty(shape), query.new_empty(shape)
    grad_k_ring, grad_v_ring = (query.new_empty(k_ring.shape if rings else 0) for _ in range(2))
    grad_sink = torch.empty_like(lse) if sink is not None else lse.new_empty(0)
    shared = torch.empty_like(lse)
    grad_out, lse = grad_out.contiguous(), lse.contiguous()
    strides = (*query.stride()[:2], *key.stride()[:2], *value.stride()[:2])
    args = (
        grad_out, None if grad_lse is None else grad_lse.contiguous(), query, key, value, k_ring,
        v_ring, position, None if sink is None else sink.contiguous(), seed, out.contiguous(), lse,
        grad_query, grad_sink, shared, *strides, T, first, dropout_p,
    )  # fmt: skip
    constants = constants_of(
        H, D, L, block_t, block_s, block_d, stages, precision, D**-0.5, acc
    )  # fmt: skip
    programs = N * H * cdiv(T - first, block_t)
    launch(
        _window_query_gradient_kernel, (programs, 1, 1), args, constants, num_warps=plan.num_warps
    )
    args = (
        grad_out, query, key, value, k_ring, v_ring, position, seed, lse, shared, grad_key,
        grad_value, grad_k_ring, grad_v_ring, *strides, T, first, dropout_p,
    )  # fmt: skip
    constants = constants_of(
        H, D, L, rings, plan.key_t, plan.key_s, block_d, stages, precision, D**-0.5, acc
    )
    blocks = cdiv(T, plan.key_s) + (cdiv(L, plan.key_s) if rings else 0)
    launch(
        _window_key_gradient_kernel, (N * H * blocks, 1, 1), args, constants,
        num_warps=plan.num_warps,
    )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_k_ring, grad_v_ring, grad_sink
