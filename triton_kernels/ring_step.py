"""One step of continual attention: projections, ring write and attention over the ring."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import dropout_seed
from ..operands import RepeatedStep, Weights
from .eight_bits import CODES, decode, decode_words, factor_of, quantise
from .launch import MOST_REGISTERS, counters, launch, little_memory, record, relaunch
from .pieces import (
    LOG2E,
    accumulators,
    cast,
    dot,
    dot_precision,
    finite_or_zero,
    is_last,
    keep_scale,
    not_taken,
    one_more_score,
    product,
    start_after_previous_launch,
)
from .plan import (
    MAX_ELEMENTS,
    MAX_HEAD_DIM,
    ONE_LAUNCH,
    StepPlan,
    cdiv,
    invariant_step_plan,
    next_power_of_2,
    step_plan,
)
from .project import ADVANCED, PROJECTED, project, project_rows


@triton.jit
def _project_head(
    x_ptr, stride_xe, weight_ptr, bias_ptr, head,
    K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, USE_DOT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """This head's rows of weight @ x + bias  # [BLOCK_D]"""
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    rows = head * D + offs_d
    if USE_DOT:  # the token as the only one of 16 rows: its blocks are then copied ahead as well
        offs_n = tl.arange(0, 16)
        projected = project_rows(x_ptr, 0, stride_xe, weight_ptr, bias_ptr, offs_n, offs_n == 0,
                                 rows, mask_d, K, 16, BLOCK_D, BLOCK_K, STAGES, PRECISION,
                                 ACC)  # fmt: skip
        projected = tl.sum(tl.where((offs_n == 0)[:, None], projected, 0.0), axis=0)
        # Moves nothing, but layouts end here: otherwise Triton brings the tiles of the ring into
        # that of the projection, through shared memory and with eight barriers a tile.
        projected = tl.gather(projected, offs_d, 0)
    else:
        bias = tl.zeros((BLOCK_D,), ACC)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + rows, mask=mask_d, other=0.0).to(ACC)
        offs_k = tl.arange(0, BLOCK_K)
        acc = tl.zeros((BLOCK_D, BLOCK_K), ACC)
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            mask_k = k + offs_k < K
            weight = tl.load(
                weight_ptr + rows[:, None] * K + (k + offs_k)[None, :],
                mask=mask_d[:, None] & mask_k[None, :],
                other=0.0,
            )  # [BLOCK_D, BLOCK_K]
            x = tl.load(x_ptr + (k + offs_k).to(tl.int64) * stride_xe, mask=mask_k, other=0.0)
            acc += x.to(ACC)[None, :] * weight.to(ACC)
        projected = tl.sum(acc, axis=1) + bias
    return tl.where(mask_d, projected, 0.0)  # whose padding is NaN if the token is not finite


@triton.jit
def _head_part(
    x_ptr, stride_xe, head, D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The head's part of a token that is projected already  # [BLOCK_D]"""
    offs_d = tl.arange(0, BLOCK_D)
    offsets = (head * D + offs_d).to(tl.int64) * stride_xe
    return tl.load(x_ptr + offsets, mask=offs_d < D, other=0.0).to(ACC)


@triton.jit
def _token_part(
    x_ptr, stride_xe, weight_ptr, bias_ptr, head, PROJECT: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, USE_DOT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The head's part of the token's projection, computed here or read where it lies already."""
    if PROJECT:
        return _project_head(x_ptr, stride_xe, weight_ptr, bias_ptr, head, K, D, BLOCK_D, BLOCK_K,
                             STAGES, USE_DOT, PRECISION, ACC)  # fmt: skip
    else:
        return _head_part(x_ptr, stride_xe, head, D, BLOCK_D, ACC)


@triton.jit
def _add_slot(m, l_sum, acc, score, keep, value):
    """Online softmax over one more slot: a score and its value, or a column of scores and rows."""
    m, l_sum, alpha, weight = one_more_score(m, l_sum, score)
    return m, l_sum, acc * alpha + weight * keep * value


@triton.jit
def _inner(a, b):
    """The inner product of two vectors, or of each pair of rows  # scalar, or [N, 1]"""
    AXIS: tl.constexpr = len(a.shape) - 1
    return tl.sum(product(a, b), axis=AXIS, keep_dims=AXIS == 1)


@triton.jit
def _add_extra_slots(
    m, l_sum, acc, q, bias_k_ptr, bias_v_ptr, seed_ptr, stream, head, slot, head_d, mask_d,
    dropout_p, ADD_ZERO_ATTN: tl.constexpr, ACC: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Online softmax over the slots that every window has: the bias, known to dropout as `slot`."""
    if bias_k_ptr is not None:
        k_bias = tl.load(bias_k_ptr + head_d, mask=mask_d, other=0.0).to(ACC)
        v_bias = tl.load(bias_v_ptr + head_d, mask=mask_d, other=0.0).to(ACC)
        keep = tl.full((), 1.0, ACC)
        if seed_ptr is not None:
            keep = keep_scale(seed_ptr, slot, stream, head, 0, dropout_p).to(ACC)
        score = _inner(q, k_bias) * tl.full((), SCALE * LOG2E, ACC)
        m, l_sum, acc = _add_slot(m, l_sum, acc, score, keep, v_bias)
    if ADD_ZERO_ATTN:
        nothing = tl.full((), 0.0, ACC)
        m, l_sum, acc = _add_slot(m, l_sum, acc, nothing, nothing, nothing)
    return m, l_sum, acc


@triton.jit
def _load_ring(
    ring_ptr, rows, valid, D: tl.constexpr, BLOCK_D: tl.constexpr, PER_LOAD: tl.constexpr
):
    """Rows of rings as they lie, of PER_LOAD numbers each; invalid rows are not read."""
    if PER_LOAD == 4:
        ring_ptr = ring_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    offs_d = tl.arange(0, BLOCK_D // PER_LOAD)
    WIDTH: tl.constexpr = D // PER_LOAD
    return tl.load(
        ring_ptr + rows[:, None] * WIDTH + offs_d[None, :],
        mask=valid[:, None] & (offs_d < WIDTH)[None, :],
        other=0,
    )


@triton.jit
def _load_scales(scale_ptr, rows, valid):
    """The scales of these rows of a ring of 8 bits; invalid rows are not read."""
    return tl.load(scale_ptr + rows, mask=valid, other=0.0)


@triton.jit
def _numbers(tile, dtype: tl.constexpr, PER_LOAD: tl.constexpr, ACC: tl.constexpr):
    """A tile of `_load_ring` as numbers over their scales."""
    if PER_LOAD == 4:
        return decode_words(tile, dtype).to(ACC)
    elif dtype.is_int():
        return decode(tile, ACC).to(ACC)
    else:
        return tile.to(ACC)


@triton.jit
def _no_slots(GROUPS: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """Online softmaxes that have seen nothing."""
    m_i = tl.full((GROUPS,), float("-inf"), ACC)
    return m_i, tl.zeros((GROUPS,), ACC), tl.zeros((GROUPS, BLOCK_D), ACC)


@triton.jit
def _attend_ring(
    q, k_next, v_next, k_scale_next, v_scale_next, k_ring_ptr, v_ring_ptr, k_scale_ptr, v_scale_ptr,
    seed_ptr, stream, head, first_row, slots, end, new_slot, begin, stop, m_i, l_i, acc, dropout_p,
    ROWS: tl.constexpr, FOLD: tl.constexpr, D: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr, PER_LOAD: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Go on with online softmaxes over the slots that a tile passes in steps of BLOCK_L.

    Queries are (1, BLOCK_D) or one for every row; so are `first_row` of a row's ring, its `end`,
    and the slot that is left out. The first tile is loaded already, whatever its slots hold.
    ROWS / FOLD rows each have a softmax of their own, and share it with FOLD - 1 others that the
    same threads hold, so that a sum is rescaled once for all of them.
    """
    GROUPS: tl.constexpr = ROWS // FOLD
    scale = tl.full((), SCALE * LOG2E, ACC)
    # No exchange between threads in the loop but those that share a row.
    valid = (slots < end) & (slots != new_slot)
    if v_scale_ptr is None:  # what is not finite would make NaN of a weight of zero
        v_next = tl.where(valid[:, None], v_next, 0)
    else:
        v_scale_next = tl.where(valid, v_scale_next, 0.0)
    for _ in range(begin, stop, BLOCK_L):
        k = _numbers(k_next, k_ring_ptr.dtype.element_ty, PER_LOAD, ACC)
        v = _numbers(v_next, v_ring_ptr.dtype.element_ty, PER_LOAD, ACC)
        score = tl.sum(product(k, q, ROWS * BLOCK_D < 1024), axis=1) * scale
        if k_scale_ptr is not None:
            score *= factor_of(k_scale_next, k_ring_ptr.dtype.element_ty).to(ACC)
            v_factor = factor_of(v_scale_next, v_ring_ptr.dtype.element_ty).to(ACC)
        score = tl.where(valid, score, float("-inf"))
        now_slots = slots
        slots += BLOCK_L
        valid = (slots < end) & (slots != new_slot)
        k_next = _load_ring(k_ring_ptr, first_row + slots, valid, D, BLOCK_D, PER_LOAD)
        v_next = _load_ring(v_ring_ptr, first_row + slots, valid, D, BLOCK_D, PER_LOAD)
        if k_scale_ptr is not None:
            k_scale_next = _load_scales(k_scale_ptr, first_row + slots, valid)
            v_scale_next = _load_scales(v_scale_ptr, first_row + slots, valid)
        score = tl.reshape(score, (FOLD, GROUPS))
        m_new = tl.maximum(m_i, tl.max(score, axis=0))
        shift = finite_or_zero(m_new)
        alpha = tl.exp2(m_i - shift)
        weight = tl.exp2(score - shift[None, :])
        m_i = m_new
        l_i = l_i * alpha + tl.sum(weight, axis=0)
        weight = tl.reshape(weight, (ROWS,))
        if seed_ptr is not None:
            weight *= keep_scale(seed_ptr, now_slots, stream, head, 0, dropout_p).to(ACC)
        if k_scale_ptr is not None:
            weight *= v_factor
        found = tl.sum(tl.reshape(weight[:, None] * v, (FOLD, GROUPS, BLOCK_D)), axis=0)
        acc = acc * alpha[:, None] + found
    return m_i, l_i, acc


@triton.jit
def _hold(
    x, ring_ptr, scale_ptr, row, there, offs_d, mask_d, dtype: tl.constexpr, D: tl.constexpr,
    UPDATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The new token's key or value as the ring will hold it; written to that row if UPDATE.

    `there` says of several rows which of them are; None of a single one, which is.
    """
    held = cast(x, dtype)
    if scale_ptr is not None:
        held, scale = quantise(held, ring_ptr.dtype.element_ty)
        if len(x.shape) > 1:
            scale = tl.expand_dims(scale, 1)
        if UPDATE:
            tl.store(scale_ptr + row, scale, mask=there)
    if UPDATE:
        mask = mask_d
        if there is not None:
            mask &= there
        tl.store(ring_ptr + row * D + offs_d, held, mask=mask)
    if scale_ptr is not None:
        return decode(held, ACC).to(ACC) * factor_of(scale, ring_ptr.dtype.element_ty).to(ACC)
    else:
        return held.to(ACC)


# Rows that a merging program reads at once, of 1024 numbers: four for each of its threads.
MERGED_ROWS = tl.constexpr(16)


@triton.jit
def _merge_parts(
    partial_ptr, ml_ptr, bias_ptr, out_ptr, limit, HEADS: tl.constexpr, SPLITS: tl.constexpr,
    WIDTH: tl.constexpr, E: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out = sum over heads and splits of partial, weighted by the share in the head's softmax.

    The order of the sum is that of the parts, whoever finished last: the same bits in every run.
    Without `ml_ptr` every part has all of its head. Of WIDTH numbers, rows of E that share a bias,
    the first `limit` are there. Where BLOCK_W has a column of 16 bytes for every thread, each adds
    up its own; of rows that lie in several warps the sums meet in one bank of shared memory.
    """
    HEADS_AT_ONCE: tl.constexpr = tl.constexpr(min(BLOCK_H, max(MERGED_ROWS // BLOCK_S, 1)))
    ROWS: tl.constexpr = HEADS_AT_ONCE * BLOCK_S
    offs_s = tl.arange(0, BLOCK_S)[None, :]
    offs_w = tl.arange(0, BLOCK_W)
    for w in range(0, WIDTH, BLOCK_W):
        mask_w = w + offs_w < limit
        out = tl.zeros((BLOCK_W,), ACC)
        if bias_ptr is not None:
            out = tl.load(bias_ptr + (w + offs_w) % E, mask=mask_w, other=0.0).to(ACC)
        for first in tl.static_range(0, BLOCK_H, HEADS_AT_ONCE):
            # All that a block needs is asked for at once: the rows do not wait for their shares.
            head = first + tl.arange(0, HEADS_AT_ONCE)[:, None]
            part = head * SPLITS + offs_s
            there = (offs_s < SPLITS) & (head < HEADS)
            row, row_there = tl.reshape(part, (ROWS,)), tl.reshape(there, (ROWS,))
            rows = tl.load(
                partial_ptr + row[:, None] * WIDTH + (w + offs_w)[None, :],
                mask=row_there[:, None] & mask_w[None, :],
                other=0.0,
                cache_modifier=".cg",
            )  # [ROWS, BLOCK_W]
            if ml_ptr is not None:
                # Without it the assembler asks for the shares first, and for some of the rows and
                # the bias when those have come, in the same registers.
                tl.debug_barrier()
                m = tl.load(
                    ml_ptr + part * 2, mask=there, other=float("-inf"), cache_modifier=".cg"
                )
                l_sum = tl.load(ml_ptr + part * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
                weight = l_sum * tl.exp2(m - finite_or_zero(tl.max(m, axis=1))[:, None])
                share = tl.where(there, weight / tl.sum(weight, axis=1)[:, None], 0.0)
                rows = product(rows, tl.reshape(share, (ROWS,))[:, None])
            out += tl.sum(rows, axis=0)
        tl.store(out_ptr + w + offs_w, cast(out, out_ptr.dtype.element_ty), mask=mask_w)


@triton.jit
def _project_out(
    o, there, weight_ptr, partial_ptr, head, dtype: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr, USE_DOT: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """partial = this head's columns of weight @ o; of many o [16, BLOCK_D] for those `there`."""
    MANY: tl.constexpr = len(o.shape) == 2
    offs_d = tl.arange(0, BLOCK_D)
    offs_e = tl.arange(0, BLOCK_E)
    if MANY:
        tokens = cast(o, dtype)
        row_ptr = partial_ptr + tl.arange(0, 16)[:, None] * E
    elif USE_DOT:
        tokens = tl.broadcast_to(cast(o, dtype)[None, :], (16, BLOCK_D))
    for e in tl.range(0, E, BLOCK_E, num_stages=STAGES):
        mask_e = e + offs_e < E
        weight = tl.load(
            weight_ptr + (e + offs_e)[:, None] * E + (head * D + offs_d)[None, :],
            mask=mask_e[:, None] & (offs_d < D)[None, :],
            other=0.0,
        )  # [BLOCK_E, BLOCK_D]
        if MANY:
            rows = dot(tokens, tl.trans(weight), tl.zeros((16, BLOCK_E), ACC), PRECISION)
            tl.store(row_ptr + (e + offs_e)[None, :], rows, there[:, None] & mask_e[None, :])
        elif USE_DOT:
            rows = dot(tokens, tl.trans(weight), tl.zeros((16, BLOCK_E), ACC), PRECISION)
            first = tl.arange(0, 16) == 0
            contribution = tl.sum(tl.where(first[:, None], rows, 0.0), axis=0)
        else:
            contribution = tl.sum(weight.to(ACC) * o[None, :], axis=1)
        if not MANY:
            tl.store(partial_ptr + e + offs_e, contribution, mask=mask_e)


@triton.jit
def _ring_step_kernel(
    query_ptr, key_ptr, value_ptr, q_weight_ptr, k_weight_ptr, v_weight_ptr, in_bias_ptr,
    o_weight_ptr, o_bias_ptr, bias_k_ptr, bias_v_ptr, k_ring_ptr, v_ring_ptr, k_scale_ptr,
    v_scale_ptr, q_ring_ptr, position_ptr, active_ptr, seed_ptr, out_ptr, partial_ptr, counter_ptr,
    stride_qn, stride_qe, stride_kn, stride_ke, stride_vn, stride_ve, dropout_p,
    E: tl.constexpr, EK: tl.constexpr, EV: tl.constexpr, H: tl.constexpr, L: tl.constexpr,
    R: tl.constexpr, SPLITS: tl.constexpr, SPREAD: tl.constexpr, FOLD: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, PER_LOAD: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr, PROJECT: tl.constexpr, STAGES: tl.constexpr, USE_DOT: tl.constexpr,
    ADD_ZERO_ATTN: tl.constexpr, UPDATE: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr, PRECISION: tl.constexpr,
    SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: one part of the window of one head of one stream; the last one also merges.

    Reads its part of the ring once, 2 * D * L / SPLITS elements, and with PROJECT its head's rows
    of the weights; writes one slot of k, v (and q). BLOCK_L * BLOCK_D is as much as the threads
    can hold twice in registers, so that the next tile is in flight while this one is used. Rings of
    8 bits are read as they are: a key's scale multiplies its score, a value's its weight.
    """
    # With SPREAD the new token's key and value have programs of their own, behind those of the
    # ring: no program then waits for more than two of the four projections.
    ROLES: tl.constexpr = SPLITS + 2 if SPREAD else SPLITS
    KEY_ROLE: tl.constexpr = SPLITS if SPREAD else 0
    VALUE_ROLE: tl.constexpr = SPLITS + 1 if SPREAD else 0
    D: tl.constexpr = E // H
    program = tl.program_id(0)
    role = program % ROLES
    head = program // ROLES % H
    stream = (program // (ROLES * H)).to(tl.int64)
    start_after_previous_launch(PDL)

    position = tl.load(position_ptr + stream)
    advance = tl.full((), 1, tl.int64)
    if active_ptr is not None:
        advance = tl.load(active_ptr + stream).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    head_d = head * D + offs_d
    k_ring_ptr += (stream * H + head) * (L * D)
    v_ring_ptr += (stream * H + head) * (L * D)
    if k_scale_ptr is not None:
        k_scale_ptr += (stream * H + head) * L
        v_scale_ptr += (stream * H + head) * L
    query_ptr += stream * stride_qn
    scale = tl.full((), SCALE * LOG2E, ACC)

    # The new token's own slot is left out of the ring: its key and value come from registers. The
    # first tile does not wait for the position; what of it is not there is left out below.
    PART: tl.constexpr = ((L + SPLITS - 1) // SPLITS + BLOCK_L - 1) // BLOCK_L * BLOCK_L
    begin = role * PART
    slots = begin + tl.arange(0, BLOCK_L)
    k_next = _load_ring(k_ring_ptr, slots, slots < L, D, BLOCK_D, PER_LOAD)
    v_next = _load_ring(v_ring_ptr, slots, slots < L, D, BLOCK_D, PER_LOAD)
    k_scale_next = k_scale_ptr  # None where there is no scale
    v_scale_next = v_scale_ptr
    if k_scale_ptr is not None:
        k_scale_next = _load_scales(k_scale_ptr, slots, slots < L)
        v_scale_next = _load_scales(v_scale_ptr, slots, slots < L)
    if not PROJECT:
        tl.debug_barrier()  # without it the assembler asks for some of the tile later

    dtype = out_ptr.dtype.element_ty
    q = tl.zeros((BLOCK_D,), ACC)
    if R > 0:
        q_ring_ptr += stream * R * E
        if UPDATE:  # noqa: SIM102 (one is known at compile time, one is not)
            if role == KEY_ROLE:
                q = _token_part(query_ptr, stride_qe, q_weight_ptr, in_bias_ptr, head, PROJECT, E,
                                D, BLOCK_D, BLOCK_K, STAGES, USE_DOT, PRECISION, ACC)  # fmt: skip
                tl.store(q_ring_ptr + position % R * E + head_d, cast(q, dtype), mask=mask_d)
        q = tl.load(q_ring_ptr + (position + 1) % R * E + head_d, mask=mask_d, other=0.0).to(ACC)
    elif role <= KEY_ROLE or not SPREAD:
        q = _token_part(query_ptr, stride_qe, q_weight_ptr, in_bias_ptr, head, PROJECT, E, D,
                        BLOCK_D, BLOCK_K, STAGES, USE_DOT, PRECISION, ACC)  # fmt: skip

    new_slot = (position % L).to(tl.int32)
    end = tl.minimum(begin + PART, tl.minimum(position, L - 1).to(tl.int32) + 1)
    GROUPS: tl.constexpr = BLOCK_L // FOLD
    m_i, l_i, acc = _no_slots(GROUPS, BLOCK_D, ACC)
    stop = end
    if not PROJECT:
        # The first softmax begins with the new token, which is asked for with the first tile, and
        # whose score is computed while that is under way.
        k_new = _head_part(key_ptr + stream * stride_kn, stride_ke, head, D, BLOCK_D, ACC)
        v_new = _head_part(value_ptr + stream * stride_vn, stride_ve, head, D, BLOCK_D, ACC)
        if role == 0:
            k_new = _hold(k_new, k_ring_ptr, k_scale_ptr, new_slot, None, offs_d, mask_d, dtype, D,
                          UPDATE, ACC)  # fmt: skip
            v_new = _hold(v_new, v_ring_ptr, v_scale_ptr, new_slot, None, offs_d, mask_d, dtype, D,
                          UPDATE, ACC)  # fmt: skip
            if seed_ptr is not None:
                v_new *= keep_scale(seed_ptr, new_slot, stream, head, 0, dropout_p).to(ACC)
            is_first = tl.arange(0, GROUPS) == 0
            m_i = tl.where(is_first, _inner(q, k_new) * scale, m_i)
            l_i = tl.where(is_first, 1.0, l_i)
            acc = tl.where(is_first[:, None], v_new[None, :], acc)
        # Once at least: with a way around the loop the assembler would ask for the first tile at
        # its head, where the position is known.
        stop = tl.maximum(end, begin + 1)
    m_i, l_i, acc = _attend_ring(
        q[None, :], k_next, v_next, k_scale_next, v_scale_next, k_ring_ptr, v_ring_ptr, k_scale_ptr,
        v_scale_ptr, seed_ptr, stream, head, 0, slots, end, new_slot, begin, stop, m_i, l_i, acc,
        dropout_p, BLOCK_L, FOLD, D, BLOCK_L, BLOCK_D, PER_LOAD, SCALE, ACC,
    )  # fmt: skip
    m = tl.max(m_i, axis=0)
    row_scale = tl.exp2(m_i - finite_or_zero(m))
    l_sum = tl.sum(product(l_i, row_scale), axis=0)
    acc = tl.sum(product(acc, row_scale[:, None]), axis=0)

    if PROJECT:
        keep = tl.full((), 1.0, ACC)
        v_new = tl.zeros((BLOCK_D,), ACC)
        if role == VALUE_ROLE:
            v_part_ptr = v_weight_ptr
            if v_weight_ptr is None:
                v_part_ptr = q_weight_ptr + 2 * E * E
            v_bias_ptr = in_bias_ptr
            if in_bias_ptr is not None:
                v_bias_ptr = in_bias_ptr + 2 * E
            v_new = _project_head(value_ptr + stream * stride_vn, stride_ve, v_part_ptr, v_bias_ptr,
                                  head, EV, D, BLOCK_D, BLOCK_K, STAGES, USE_DOT, PRECISION,
                                  ACC)  # fmt: skip
            v_new = _hold(v_new, v_ring_ptr, v_scale_ptr, new_slot, None, offs_d, mask_d, dtype, D,
                          UPDATE, ACC)  # fmt: skip
            if seed_ptr is not None:
                keep = keep_scale(seed_ptr, new_slot, stream, head, 0, dropout_p).to(ACC)
            if SPREAD:
                acc = v_new * keep
                l_sum = tl.full((), 1.0, ACC)
        if role == KEY_ROLE:
            k_part_ptr = k_weight_ptr
            if k_weight_ptr is None:
                k_part_ptr = q_weight_ptr + E * E
            k_bias_ptr = in_bias_ptr
            if in_bias_ptr is not None:
                k_bias_ptr = in_bias_ptr + E
            k_new = _project_head(key_ptr + stream * stride_kn, stride_ke, k_part_ptr, k_bias_ptr,
                                  head, EK, D, BLOCK_D, BLOCK_K, STAGES, USE_DOT, PRECISION,
                                  ACC)  # fmt: skip
            k_new = _hold(k_new, k_ring_ptr, k_scale_ptr, new_slot, None, offs_d, mask_d, dtype, D,
                          UPDATE, ACC)  # fmt: skip
            score = _inner(q, k_new) * scale
            if SPREAD:
                m = score
                l_sum = tl.full((), 1.0, ACC)
            else:
                m, l_sum, acc = _add_slot(m, l_sum, acc, score, keep, v_new)
    if role == 0:
        m, l_sum, acc = _add_extra_slots(
            m, l_sum, acc, q, bias_k_ptr, bias_v_ptr, seed_ptr, stream, head, new_slot * 0 + L,
            head_d, mask_d, dropout_p, ADD_ZERO_ATTN, ACC, SCALE,
        )  # fmt: skip

    # A part without a valid slot has l = 0 and weighs nothing; its output must not be 0 / 0.
    acc = acc / l_sum
    if ROLES > 1:
        acc = tl.where(l_sum == 0.0, 0.0, acc)

    if BLOCK_E > 0:
        # This head's share of every output feature; the last program of the stream adds them up.
        # The new token is one part, whose score and whose value come from two programs.
        PARTS: tl.constexpr = SPLITS + 1 if SPREAD else SPLITS
        part = head * PARTS + tl.minimum(role, PARTS - 1)
        partial_ptr += stream * (H * PARTS * (E + 4))
        ml_ptr = partial_ptr + H * PARTS * E
        if role != KEY_ROLE or not SPREAD:
            _project_out(acc, True, o_weight_ptr, partial_ptr + part * E, head, dtype, E, D,
                         BLOCK_D, BLOCK_E, STAGES, USE_DOT, PRECISION, ACC)  # fmt: skip
        if role != VALUE_ROLE or not SPREAD:
            tl.store(ml_ptr + part * 2, m)
            tl.store(ml_ptr + part * 2 + 1, l_sum)
        if is_last(counter_ptr + stream, H * ROLES):
            _merge_parts(partial_ptr, ml_ptr, o_bias_ptr, out_ptr + stream * E, E, H, PARTS, E, E,
                         BLOCK_M, BLOCK_H, BLOCK_S, ACC)  # fmt: skip
            if UPDATE:
                tl.store(position_ptr + stream, position + advance)
    elif SPLITS > 1:
        group = stream * H + head
        partial_ptr += group * (SPLITS * (D + 4))
        ml_ptr = partial_ptr + SPLITS * D
        tl.store(partial_ptr + role * D + offs_d, acc, mask=mask_d)
        tl.store(ml_ptr + role * 2, m)
        tl.store(ml_ptr + role * 2 + 1, l_sum)
        if is_last(counter_ptr + group, SPLITS):
            _merge_parts(partial_ptr, ml_ptr, None, out_ptr + group * D, D, 1, SPLITS, D, D,
                         BLOCK_D, 1, BLOCK_S, ACC)  # fmt: skip
    else:
        tl.store(out_ptr + (stream * H + head) * D + offs_d, cast(acc, dtype), mask=mask_d)


@triton.jit
def _project_group(
    x_ptr, stride_xn, stride_xe, weight_ptr, bias_ptr, head, first, N,
    K: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """This head's rows of weight @ x + bias for each stream of a group  # [GROUP, BLOCK_D]"""
    offs_n = tl.arange(0, 16)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    projected = project_rows(
        x_ptr, stride_xn, stride_xe, weight_ptr, bias_ptr, first + offs_n,
        (offs_n < GROUP) & (first + offs_n < N), head * D + offs_d, mask_d, K, 16, BLOCK_D, BLOCK_K,
        STAGES, PRECISION, ACC,
    )  # fmt: skip
    projected = tl.where(mask_d[None, :], projected, 0.0)
    COPIES: tl.constexpr = 16 // GROUP
    if COPIES > 1:  # the matrix unit wants 16 rows; those of no stream hold the bias
        chosen = (tl.arange(0, COPIES) == 0)[:, None, None]
        copies = tl.reshape(projected, (COPIES, GROUP, BLOCK_D))
        projected = tl.sum(tl.where(chosen, copies, 0.0), axis=0)
    return projected


@triton.jit
def _by_row(x, GROUP: tl.constexpr, BLOCK_L: tl.constexpr):
    """One number per stream, or per slot as (1, BLOCK_L), for every row of a group's tile."""
    return tl.reshape(tl.broadcast_to(x, (GROUP, BLOCK_L)), (GROUP * BLOCK_L,))


@triton.jit
def _group_step_kernel(
    query_ptr, key_ptr, value_ptr, q_weight_ptr, k_weight_ptr, v_weight_ptr, in_bias_ptr,
    o_weight_ptr, o_bias_ptr, bias_k_ptr, bias_v_ptr, k_ring_ptr, v_ring_ptr, k_scale_ptr,
    v_scale_ptr, q_ring_ptr, position_ptr, active_ptr, seed_ptr, out_ptr, partial_ptr, counter_ptr,
    stride_qn, stride_qe, stride_kn, stride_ke, stride_vn, stride_ve, dropout_p, N,
    E: tl.constexpr, EK: tl.constexpr, EV: tl.constexpr, H: tl.constexpr, L: tl.constexpr,
    R: tl.constexpr, GROUP: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    PER_LOAD: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr,
    ADD_ZERO_ATTN: tl.constexpr, UPDATE: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: one head of GROUP streams, all four projections included; the last one merges.

    Reads its head's weights once, 4 * E * D elements, and the group's rings, 2 * GROUP * L * D.
    A tile is BLOCK_L slots of every stream, so that nothing is done one stream after the other.
    """
    D: tl.constexpr = E // H
    ROWS: tl.constexpr = GROUP * BLOCK_L
    head = tl.program_id(0) % H
    group = tl.program_id(0) // H
    first = group.to(tl.int64) * GROUP
    streams = first + tl.arange(0, GROUP)
    there = streams < N
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = there[:, None] & (offs_d < D)
    head_d = head * D + offs_d

    position = tl.load(position_ptr + streams, mask=there, other=0)
    advance = tl.full((GROUP,), 1, tl.int64)
    if active_ptr is not None:
        advance = tl.load(active_ptr + streams, mask=there, other=0).to(tl.int64)
    first_row = (streams * H + head) * L
    slots = _by_row(tl.arange(0, BLOCK_L)[None, :], GROUP, BLOCK_L)
    row_of = _by_row(first_row[:, None], GROUP, BLOCK_L)
    # The first tile does not wait for the positions; what of it is not there is left out below.
    held = _by_row(tl.where(there, L, 0)[:, None], GROUP, BLOCK_L) > slots
    k_next = _load_ring(k_ring_ptr, row_of + slots, held, D, BLOCK_D, PER_LOAD)
    v_next = _load_ring(v_ring_ptr, row_of + slots, held, D, BLOCK_D, PER_LOAD)
    k_scale_next = k_scale_ptr  # None where there is no scale
    v_scale_next = v_scale_ptr
    if k_scale_ptr is not None:
        k_scale_next = _load_scales(k_scale_ptr, row_of + slots, held)
        v_scale_next = _load_scales(v_scale_ptr, row_of + slots, held)

    dtype = out_ptr.dtype.element_ty
    k_part_ptr = k_weight_ptr
    v_part_ptr = v_weight_ptr
    if k_weight_ptr is None:
        k_part_ptr = q_weight_ptr + E * E
    if v_weight_ptr is None:
        v_part_ptr = q_weight_ptr + 2 * E * E
    k_bias_ptr = in_bias_ptr
    v_bias_ptr = in_bias_ptr
    if in_bias_ptr is not None:
        k_bias_ptr = in_bias_ptr + E
        v_bias_ptr = in_bias_ptr + 2 * E
    if R == 0 or UPDATE:
        q = _project_group(query_ptr, stride_qn, stride_qe, q_weight_ptr, in_bias_ptr, head, first,
                           N, E, D, GROUP, BLOCK_D, BLOCK_K, STAGES, PRECISION, ACC)  # fmt: skip
    if R > 0:
        if UPDATE:
            waiting = (streams * R + position % R)[:, None] * E
            tl.store(q_ring_ptr + waiting + head_d, cast(q, dtype), mask=mask)
        due = (streams * R + (position + 1) % R)[:, None] * E
        q = tl.load(q_ring_ptr + due + head_d, mask=mask, other=0.0).to(ACC)
    k_new = _project_group(key_ptr, stride_kn, stride_ke, k_part_ptr, k_bias_ptr, head, first, N,
                           EK, D, GROUP, BLOCK_D, BLOCK_K, STAGES, PRECISION, ACC)  # fmt: skip
    v_new = _project_group(value_ptr, stride_vn, stride_ve, v_part_ptr, v_bias_ptr, head, first, N,
                           EV, D, GROUP, BLOCK_D, BLOCK_K, STAGES, PRECISION, ACC)  # fmt: skip

    q_of = tl.reshape(tl.broadcast_to(q[:, None, :], (GROUP, BLOCK_L, BLOCK_D)), (ROWS, BLOCK_D))
    stream_of = _by_row(streams[:, None], GROUP, BLOCK_L)
    new_slot = (position % L).to(tl.int32)
    end = tl.where(there, tl.minimum(position, L - 1).to(tl.int32) + 1, 0)
    end_of = _by_row(end[:, None], GROUP, BLOCK_L)
    new_of = _by_row(new_slot[:, None], GROUP, BLOCK_L)
    m_i, l_i, acc = _no_slots(ROWS, BLOCK_D, ACC)
    m_i, l_i, acc = _attend_ring(
        q_of, k_next, v_next, k_scale_next, v_scale_next, k_ring_ptr, v_ring_ptr, k_scale_ptr,
        v_scale_ptr, seed_ptr, stream_of, head, row_of, slots, end_of, new_of, 0,
        tl.max(end, axis=0), m_i, l_i, acc, dropout_p, ROWS, 1, D, BLOCK_L, BLOCK_D, PER_LOAD,
        SCALE, ACC,
    )  # fmt: skip
    m_i = tl.reshape(m_i, (GROUP, BLOCK_L))
    m = tl.max(m_i, axis=1, keep_dims=True)
    row_scale = tl.exp2(m_i - finite_or_zero(m))
    l_sum = tl.sum(product(tl.reshape(l_i, (GROUP, BLOCK_L)), row_scale), axis=1, keep_dims=True)
    acc = tl.reshape(acc, (GROUP, BLOCK_L, BLOCK_D))
    acc = tl.sum(product(acc, row_scale[:, :, None]), axis=1)

    new_row = (first_row + new_slot)[:, None]
    k_new = _hold(k_new, k_ring_ptr, k_scale_ptr, new_row, there[:, None], offs_d, mask, dtype, D,
                  UPDATE, ACC)  # fmt: skip
    v_new = _hold(v_new, v_ring_ptr, v_scale_ptr, new_row, there[:, None], offs_d, mask, dtype, D,
                  UPDATE, ACC)  # fmt: skip
    slot = new_slot[:, None]
    keep = tl.full((), 1.0, ACC)
    if seed_ptr is not None:
        keep = keep_scale(seed_ptr, slot, streams[:, None], head, 0, dropout_p).to(ACC)
    score = _inner(q, k_new) * tl.full((), SCALE * LOG2E, ACC)
    m, l_sum, acc = _add_slot(m, l_sum, acc, score, keep, v_new)
    m, l_sum, acc = _add_extra_slots(
        m, l_sum, acc, q, bias_k_ptr, bias_v_ptr, seed_ptr, streams[:, None], head, slot * 0 + L,
        head_d, offs_d < D, dropout_p, ADD_ZERO_ATTN, ACC, SCALE,
    )  # fmt: skip

    # This head's share of every output feature; the last program of the group adds them up.
    COPIES: tl.constexpr = 16 // GROUP
    found = tl.broadcast_to((acc / l_sum)[None, :, :], (COPIES, GROUP, BLOCK_D))
    offs_n = tl.arange(0, 16)
    partial_ptr += first * (H * E)
    _project_out(tl.reshape(found, (16, BLOCK_D)), (offs_n < GROUP) & (first + offs_n < N),
                 o_weight_ptr, partial_ptr + head * (GROUP * E), head, dtype, E, D, BLOCK_D,
                 BLOCK_E, STAGES, True, PRECISION, ACC)  # fmt: skip
    if is_last(counter_ptr + group, H):
        # Anew, for kept so long it spills.
        position = tl.load(position_ptr + streams, mask=there, other=0, cache_modifier=".cg")
        limit = tl.minimum(N - first, GROUP) * E
        _merge_parts(partial_ptr, None, o_bias_ptr, out_ptr + first * E, limit, H, 1, GROUP * E, E,
                     BLOCK_M, BLOCK_H, 1, ACC)  # fmt: skip
        if UPDATE:
            tl.debug_barrier()  # all threads have read it
            tl.store(position_ptr + streams, position + advance, mask=there)


def uncovered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *others: Tensor | None,
    position: Tensor,
    scales: tuple[Tensor | None, ...] = (),
) -> str | None:
    """What the ring kernels ask of tensors; the last three of `others` are the rings.

    With `scales`, those of keys and values hold codes.
    """
    refused = not_taken(query)
    if refused is not None:
        return refused
    *weights, k_ring, v_ring, q_ring = [tensor for tensor in others if tensor is not None]
    given = [key, value, *weights, q_ring]
    held = [scale for scale in scales if scale is not None]
    if not held:
        given += [k_ring, v_ring]
    elif k_ring.dtype not in CODES or v_ring.dtype != k_ring.dtype:
        return f"no kernel for rings of {k_ring.dtype} and {v_ring.dtype} with scales"
    if any(tensor.dtype != query.dtype for tensor in given):
        return "query, weights and rings differ in dtype"
    held += [k_ring, v_ring, position]
    if not all(tensor.is_contiguous() for tensor in (*given[2:], *held)):
        return "a weight or the state is not contiguous"
    if k_ring.shape[2] * k_ring.shape[3] >= MAX_ELEMENTS:
        return f"a head's ring of {MAX_ELEMENTS} numbers or more"
    if k_ring.shape[3] > MAX_HEAD_DIM:
        return f"head_dim {k_ring.shape[3]} is over {MAX_HEAD_DIM}"
    return None


def why_not(*args: Any) -> str | None:
    """None if this module covers a call of `ring_step_`, else the reason why not."""
    k_ring, v_ring, scales = args[11], args[12], args[19:21]
    refused = uncovered(*args[:14], position=args[14], scales=scales)
    of_codes = any(scale is not None for scale in scales)
    if refused is None and of_codes and (k_ring.data_ptr() | v_ring.data_ptr()) % 4:
        return "a ring of 8 bits does not start at a multiple of 4 bytes"
    if refused is None and args[13].shape[1] == 1:
        return "a ring of one query, which would be read while it is written"
    return refused


def ring_step_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    in_proj_weight: Tensor,
    k_proj_weight: Tensor | None,
    v_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    k_ring: Tensor,
    v_ring: Tensor,
    q_ring: Tensor,
    position: Tensor,
    active: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    update: bool,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    batch_invariant: bool = False,
    plan: StepPlan | None = None,
) -> Tensor:
    """One step of N streams: the output (N, E); writes the rings and `position` if `update`.

    Shapes: `query` (N, E), `key` (N, Ek), `value` (N, Ev), any strides; `in_proj_weight` (3E, E),
    or (E, E) where `k_proj_weight` (E, Ek) and `v_proj_weight` (E, Ev) are given; `k_ring`,
    `v_ring` (N, H, L, D); `q_ring` (N, R, E); `position` (N,) int64; `active` (N,) bool;
    `k_scale`, `v_scale` (N, H, L, 1) fp32 if the rings are of 8 bits.
    Covered: what `why_not` answers None to. `batch_invariant` or `plan` overrides the table.
    """
    widths = (key.shape[1], value.shape[1])
    options = (bool(add_zero_attn), bool(update), batch_invariant)
    active = active.contiguous() if update and active is not None else None
    ready = _ready(k_ring, q_ring, *widths, *options, plan)
    plan = ready.plan
    fused = plan.path in ONE_LAUNCH

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return project(x, weight, bias, plan) if plan.path == "chain" else F.linear(x, weight, bias)

    if not fused:
        given = Weights(in_proj_weight, k_proj_weight, v_proj_weight, in_proj_bias,
                        out_proj_weight, out_proj_bias, bias_k, bias_v)  # fmt: skip
        query, key, value = given.project((query, key, value), linear)
    weights: tuple = (in_proj_weight, k_proj_weight, v_proj_weight, in_proj_bias, out_proj_weight,
                      out_proj_bias) if fused else (None,) * 6  # fmt: skip
    out, *scratch = _outputs(query, ready)
    args = (
        query, key, value, *weights, bias_k, bias_v, k_ring, v_ring, k_scale, v_scale, q_ring,
        position, active, dropout_seed(dropout_p, query.device), out, *scratch,
        *query.stride(), *key.stride(), *value.stride(), dropout_p, *ready.streams,
    )  # fmt: skip
    kernel = _group_step_kernel if plan.path == "group" else _ring_step_kernel
    launch(
        kernel, ready.grid, args, ready.constants, num_warps=plan.num_warps, pdl=plan.pdl,
        registers=MOST_REGISTERS if plan.path == "fused" else None,
    )  # fmt: skip
    if fused:
        return out
    if plan.path == "chain":
        advance = (position, active) if update else ()
        return project(out, out_proj_weight, out_proj_bias, plan, *advance)
    out = F.linear(out, out_proj_weight, out_proj_bias)
    if update:  # last: until then the step has not happened, whatever fails
        position.add_(1 if active is None else active)
    return out


# Of the kernels' arguments, those that differ from step to step.
_TOKENS, _ACTIVE, _OUT, _SCRATCH = (0, 1, 2), (17,), (19,), (20, 21)


def bind_ring_step_(anew: RepeatedStep, *args: Any) -> RepeatedStep | None:
    """`ring_step_` for steps after one that took `args`, with other tokens, given once where they
    are one tensor.

    In a small step the host's time decides, and most of it went into finding out what is as it was
    in the step before. Where it is not, `anew` takes the step. None where a product is left to a
    library, or what is needed has not been compiled.
    """
    query, key, value = args[:3]
    active, dropout_p, update = args[15], args[17], args[18]
    batch_invariant = len(args) > 21 and args[21]
    apart = (query,) if query is key and key is value else (query, key, value)
    options = (args[16], update, batch_invariant)
    ready = _ready(args[11], args[13], key.shape[1], value.shape[1], *options)
    chain = ready.plan.path == "chain"
    if ready.plan.path == "gemm" or dropout_p > 0.0 or not update:
        return None
    if chain and (args[4] is not None or len(apart) == 3):  # three products
        return None
    with record() as launches:
        ring_step_(*args)
    masked = active is not None
    vary = [_TOKENS + masked * _ACTIVE + _OUT + bool(ready.groups) * _SCRATCH]
    if chain:
        vary = [PROJECTED, *vary, PROJECTED + masked * ADVANCED]
    again: list[Any] = [relaunch(*pair) for pair in zip(launches, vary, strict=True)]
    if None in again:
        return None
    project_in, attend, project_out = again if chain else (None, *again, None)
    strides = [x.stride() for x in apart]

    def repeat(apart: Sequence[Tensor], *mask: Tensor) -> Tensor | None:
        """The output, or None; before the last launch the step can be begun again."""
        token = apart[0]
        tokens = apart if len(apart) == 3 else (token, token, token)
        if project_in is not None:
            projected = token.new_empty((token.shape[0], 3 * token.shape[1]))
            if not project_in(token, projected):
                return None
            tokens = projected.chunk(3, dim=-1)
        out, *scratch = _outputs(token, ready)
        if not attend(*tokens, *mask, out, *(x for x in scratch if x is not None)):
            return None
        if project_out is None:
            return out
        projected = torch.empty_like(out)
        return projected if project_out(out, projected, *mask) else None

    def run(*given: Any) -> Tensor:
        *apart, active = given
        same = [x.stride() for x in apart] == strides and (active is not None) == masked
        packed = active is None or active.is_contiguous()
        out = None
        if same and packed and ready.precision == dot_precision():
            out = repeat(apart) if active is None else repeat(apart, active)
        return anew(*given) if out is None else out

    return run


def _ready(
    k_ring: Tensor,
    q_ring: Tensor,
    kdim: int,
    vdim: int,
    add_zero_attn: bool,
    update: bool,
    batch_invariant: bool,
    plan: StepPlan | None = None,
) -> _Prepared:
    """How a step with these rings, token widths and options runs."""
    N, H, L, D = k_ring.shape
    dtype, slot = q_ring.dtype, k_ring.element_size()
    if batch_invariant:
        plan = invariant_step_plan(H * D, H, L, dtype.itemsize, slot)
    options = (add_zero_attn, update, dot_precision(), little_memory(k_ring), plan)
    return _prepare(N, H * D, kdim, vdim, H, L, q_ring.shape[1], dtype, slot, *options)


def _outputs(query: Tensor, ready: _Prepared) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Memory for the output and for results that programs merge, and the counter that they use."""
    out = query.new_empty(query.shape)
    if not ready.groups:
        return out, None, None
    partial = torch.empty(ready.scratch, dtype=ready.acc, device=query.device)
    return out, partial, counters(query, ready.groups)


class _Prepared(NamedTuple):
    """All of a launch of a kernel of the step that does not change from step to step."""

    plan: StepPlan
    precision: str
    grid: tuple[int, int, int]
    constants: tuple
    groups: int  # of programs that merge their results
    scratch: int
    acc: torch.dtype
    streams: tuple[int, ...]  # their number, where the kernel asks for it


@lru_cache(maxsize=1024)
def _prepare(
    N: int, E: int, EK: int, EV: int, H: int, L: int, R: int, dtype: torch.dtype, slot: int,
    add_zero_attn: bool, update: bool, precision: str, little: bool, plan: StepPlan | None,
) -> _Prepared:  # fmt: skip
    plan = plan or step_plan(N, E, H, L, dtype.itemsize, slot_itemsize=slot, little=little)
    fused, grouped = plan.path == "fused", plan.path == "group"
    block_h, block_s = next_power_of_2(H), next_power_of_2(plan.merged)
    wide, acc = accumulators(dtype)
    per_load = 4 if slot == 1 and E // H % 4 == 0 else 1  # codes that are loaded as one word
    sizes = (E, EK, EV, H, L, R)
    tile = (plan.block_l, plan.block_d, per_load, plan.block_k)
    # Rows of a tile that the same threads hold, where they load 16 bytes at a time.
    held = plan.block_l * plan.block_d * slot // (16 * 32 * plan.num_warps)
    fold = max(1, min(held, plan.block_l))
    # The kernel's own products of fp32 are of one token, which needs no matrix unit.
    of_one = precision if precision == "tf32" else "ieee"
    ends = (of_one, (E // H) ** -0.5, acc)
    block_m = 1024 * MERGED_ROWS.value // max(block_s, MERGED_ROWS.value)
    if grouped:
        constants: tuple = (
            *sizes, plan.group, *tile, plan.block_e, plan.stages, add_zero_attn, update, block_h,
            block_m, *ends,
        )  # fmt: skip
    else:
        constants = (
            *sizes, plan.splits, plan.spread, fold, *tile, plan.block_e if fused else 0, fused,
            plan.stages, dtype.itemsize == 2 or of_one == "tf32", add_zero_attn, update, block_h,
            block_s, block_m, plan.pdl, *ends,
        )  # fmt: skip
    groups = cdiv(N, plan.group)
    width = E if grouped else (E if fused else E // H) + 4  # of a part: its vector, padded m and l
    merges = fused or grouped or plan.splits > 1
    return _Prepared(
        plan=plan,
        precision=precision,
        grid=(plan.programs(N, H), 1, 1),
        constants=constants,
        groups=(groups if fused or grouped else N * H) if merges else 0,
        scratch=groups * plan.group * H * plan.merged * width,
        acc=wide,
        streams=(N,) if grouped else (),
    )
