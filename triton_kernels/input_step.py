"""One step over a ring of inputs: the query rows of all heads against the stream's own tokens."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import dropout_seed
from .eight_bits import CODES, decode, encode, scale_of, unit_of
from .launch import constants_of, counters, launch, little_memory
from .pieces import (
    LOG2E,
    accumulators,
    cast,
    dot,
    dot_precision,
    features_at_once,
    finite_or_zero,
    is_last,
    keep_scale,
    merge_parts,
    not_taken,
    one_more_slot,
    product,
    scores_in_parts,
    store_part,
)
from .plan import (
    INVARIANT_FEATURES,
    INVARIANT_TOKENS,
    MAX_ELEMENTS,
    InputPlan,
    cdiv,
    input_plan,
    input_step_covers,
    invariant_input_plan,
    invariant_step_plan,
)
from .project import linear as tiled_linear
from .row_scores import flat, row_scores, spread_features, spread_rows


@triton.jit
def _load_query(query_ptr, stride_qh, offs_h, offs_e, H: tl.constexpr, E: tl.constexpr):
    """Moved queries, zero where there are none  # [BLOCK_H, BLOCK_E]"""
    return tl.load(
        query_ptr + offs_h[:, None] * stride_qh + offs_e[None, :],
        mask=(offs_h < H)[:, None] & (offs_e < E)[None, :],
        other=0.0,
    )


@triton.jit
def _rows(x_ring_ptr, beside_ptr, slots, new_slot, E: tl.constexpr, UNIT: tl.constexpr):
    """Where the tokens of these slots begin, seen from a ring; the new one at `beside_ptr` if any.

    All begin at multiples of UNIT numbers, which the compiler could not see of a difference.
    """
    if beside_ptr is None:
        return slots * E
    else:
        BYTES: tl.constexpr = x_ring_ptr.dtype.element_ty.primitive_bitwidth // 8
        apart = (beside_ptr.to(tl.int64) - x_ring_ptr.to(tl.int64)) // BYTES
        rows = tl.where(slots == new_slot, apart, slots.to(tl.int64) * E)
        return tl.multiple_of(rows, [UNIT] * len(rows.shape))


@triton.jit
def _load_tile(x_ring_ptr, rows, valid, offs_e, E: tl.constexpr):
    """Tokens of a ring; other slots are not read.  # [BLOCK_S, BLOCK_E]"""
    return tl.load(
        x_ring_ptr + rows[:, None] + offs_e[None, :],
        mask=valid[:, None] & (offs_e < E)[None, :],
        other=0,
    )


@triton.jit
def _attend_part(
    query_ptr, stride_qh, beside_ptr, x_ring_ptr, x_scale_ptr, seed_ptr, stream, first, begin, end,
    new_slot, dropout_p, dtype: tl.constexpr,
    H: tl.constexpr, E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr,
    STAGES: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Online softmax over the slots `begin .. end - 1` of a ring.

    The new token is read from its slot, or where `beside_ptr` says; of codes it is left out.
    A tile is the right operand of both products; where it is the left one of either, Triton copies
    no tile ahead. Of tokens STAGES - 1 tiles are under way into shared memory, of codes
    one into registers. The scales go into the weights over the largest one seen, so that no weight
    underflows; the sum has that factor taken out.
    """
    offs_e = tl.arange(0, BLOCK_E)
    offs_h = first + tl.arange(0, BLOCK_H)
    scale = tl.full((), SCALE * LOG2E, ACC)
    if GROUPS == 0:
        query = _load_query(query_ptr, stride_qh, offs_h, offs_e, H, E)
    else:
        features = spread_features(BLOCK_E, GROUPS)
        in_tile = spread_rows(BLOCK_S)
    m_i = tl.full((BLOCK_H,), float("-inf"), ACC)
    l_i = tl.zeros((BLOCK_H,), ACC)
    kept_i = tl.zeros((BLOCK_H,), ACC)  # of l_i, after dropout
    acc = tl.zeros((BLOCK_H, BLOCK_E), ACC)
    factor = tl.full((), 0.0, tl.float32)
    if x_scale_ptr is not None:
        slots = begin + tl.arange(0, BLOCK_S)
        valid = (slots < end) & (slots != new_slot)
        next_codes = _load_tile(x_ring_ptr, slots * E, valid, offs_e, E)
    for start in tl.range(begin, end, BLOCK_S, num_stages=STAGES):
        slots = start + tl.arange(0, BLOCK_S)
        valid = slots < end
        if x_scale_ptr is not None:
            valid &= slots != new_slot
        if GROUPS > 0:
            at = start + in_tile
            rows = _rows(x_ring_ptr, beside_ptr, at, new_slot, E, UNIT)
            mask = (at < end) & (features < E)
            tile = tl.load(x_ring_ptr + rows + features, mask=mask, other=0.0)
        elif x_scale_ptr is None:
            rows = _rows(x_ring_ptr, beside_ptr, slots, new_slot, E, UNIT)
            tile = _load_tile(x_ring_ptr, rows, valid, offs_e, E)
        else:
            tile = decode(next_codes, dtype)
            by_slot = tl.load(x_scale_ptr + slots, mask=valid, other=0.0)
            by_slot *= unit_of(x_ring_ptr.dtype.element_ty)
        if GROUPS > 0:
            scores = row_scores(query_ptr, stride_qh, first, tile, features, start < end, H, E,
                                BLOCK_H, BLOCK_S, BLOCK_E, GROUPS, ACC)  # fmt: skip
            tile = flat(tile, BLOCK_S, BLOCK_E)
        else:
            scores = scores_in_parts(query, tile, PARTS, PRECISION, ACC)
        scores *= scale
        if x_scale_ptr is not None:
            scores *= by_slot.to(ACC)[None, :]
            after = slots + BLOCK_S
            there = (after < end) & (after != new_slot)
            next_codes = _load_tile(x_ring_ptr, after * E, there, offs_e, E)
        scores = tl.where(valid[None, :], scores, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(scores, axis=1))
        shift = finite_or_zero(m_new)
        alpha = tl.exp2(m_i - shift)
        weight = tl.exp2(scores - shift[:, None])
        m_i = m_new
        l_i = l_i * alpha + tl.sum(weight, axis=1)
        if seed_ptr is not None:
            at, heads = slots[None, :], offs_h[:, None]
            keep = keep_scale(seed_ptr, at, stream, heads, 0, dropout_p).to(ACC)
            weight = product(weight, keep)
            kept_i = kept_i * alpha + tl.sum(weight, axis=1)
        if x_scale_ptr is not None:
            larger = tl.maximum(factor, tl.max(by_slot, axis=0))
            divisor = tl.where(larger > 0.0, larger, 1.0)
            weight *= (by_slot / divisor).to(ACC)[None, :]
            alpha *= (factor / divisor).to(ACC)
            factor = larger
        acc = dot(cast(weight, dtype), tile, acc * alpha[:, None], PRECISION)
    if x_scale_ptr is not None:
        acc *= factor.to(ACC)
    if seed_ptr is None:
        kept_i = l_i
    return m_i, l_i, kept_i, acc


@triton.jit
def _add_token(
    query_ptr, stride_qh, token_ptr, x_ring_ptr, x_scale_ptr, seed_ptr, stream, offs_h, new_slot,
    dropout_p, m, l_sum, kept, acc, write, H: tl.constexpr, E: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_Q: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The new token as a ring of codes will hold it; stored there if `write`.

    Its scores need no matrix unit, but as many queries in registers as BLOCK_Q features have.
    """
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    codes: tl.constexpr = x_ring_ptr.dtype.element_ty
    token = tl.load(token_ptr + offs_e, mask=mask_e, other=0.0)
    size = scale_of(token, codes)
    token = encode(token, size, codes)
    tl.store(x_scale_ptr + new_slot, size, mask=write)
    tl.store(x_ring_ptr + new_slot * E + offs_e, token, mask=offs_e < tl.where(write, E, 0))
    token = (decode(token, tl.float32) * (size * unit_of(codes))).to(ACC)
    products = tl.zeros((BLOCK_H, BLOCK_Q), ACC)
    for q in range(0, E, BLOCK_Q):
        offs_q = q + tl.arange(0, BLOCK_Q)
        query = _load_query(query_ptr, stride_qh, offs_h, offs_q, H, E)
        part = tl.load(token_ptr + offs_q, mask=offs_q < E, other=0.0)
        part = decode(encode(part, size, codes), tl.float32) * (size * unit_of(codes))
        products += query.to(ACC) * part.to(ACC)[None, :]
    score = tl.sum(products, axis=1) * tl.full((), SCALE * LOG2E, ACC)
    keep = tl.full((BLOCK_H,), 1.0, ACC)
    if seed_ptr is not None:
        keep = keep_scale(seed_ptr, new_slot, stream, offs_h, 0, dropout_p).to(ACC)
    m, l_sum, kept, acc, weight = one_more_slot(m, l_sum, kept, acc, score, keep)
    return m, l_sum, kept + weight, acc + weight[:, None] * token[None, :]


@triton.jit
def _store_token(
    token_ptr, x_ring_ptr, new_slot, write, E: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """The new token to its slot, if `write`; it is asked for before that is known."""
    offs_e = tl.arange(0, BLOCK_E)
    token = tl.load(token_ptr + offs_e, mask=offs_e < E, other=0.0)
    tl.store(x_ring_ptr + new_slot * E + offs_e, token, mask=offs_e < tl.where(write, E, 0))


@triton.jit
def _finish(
    m, l_sum, kept, acc, extra_ptr, seed_ptr, out_ptr, rows, share_ptr, on_bias_ptr, stream,
    offs_h, dropout_p, H: tl.constexpr, E: tl.constexpr, L: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr, HAS_BIAS_SLOT: tl.constexpr, ADD_ZERO_ATTN: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Add the extra slots' scores, normalise, and store what a stream's heads found in `rows`."""
    offs_e = tl.arange(0, BLOCK_E)
    mask_h = offs_h < H
    log2e = tl.full((), LOG2E, ACC)
    EXTRA: tl.constexpr = HAS_BIAS_SLOT + ADD_ZERO_ATTN
    one = tl.full((BLOCK_H,), 1.0, ACC)
    if EXTRA > 0:
        extra_ptr += (stream * H + offs_h) * EXTRA
    if HAS_BIAS_SLOT:
        bias_score = tl.load(extra_ptr, mask=mask_h, other=0.0) * log2e
        m, l_sum, kept, acc, _ = one_more_slot(m, l_sum, kept, acc, bias_score, one)
    if ADD_ZERO_ATTN:
        score = tl.load(extra_ptr + HAS_BIAS_SLOT, mask=mask_h, other=0.0) * log2e
        m, l_sum, kept, acc, _ = one_more_slot(m, l_sum, kept, acc, score, one)
    tl.store(
        out_ptr + rows[:, None] * E + offs_e[None, :],
        cast(acc / l_sum[:, None], out_ptr.dtype.element_ty),
        mask=mask_h[:, None] & (offs_e < E)[None, :],
    )
    if share_ptr is not None:
        tl.store(share_ptr + stream * H + offs_h, kept / l_sum, mask=mask_h)
    if HAS_BIAS_SLOT:
        weight = tl.exp2(bias_score - finite_or_zero(m))
        if seed_ptr is not None:
            weight *= keep_scale(seed_ptr, L, stream, offs_h, 0, dropout_p).to(ACC)
        tl.store(on_bias_ptr + stream * H + offs_h, weight / l_sum, mask=mask_h)


@triton.jit
def _advance(position_ptr, active_ptr, stream, position, UPDATE: tl.constexpr):
    if UPDATE:
        step = tl.full((), 1, tl.int64)
        if active_ptr is not None:
            step = tl.load(active_ptr + stream).to(tl.int64)
        tl.store(position_ptr + stream, position + step)


@triton.jit
def _input_step_kernel(
    query_ptr, token_ptr, x_ring_ptr, x_scale_ptr, position_ptr, active_ptr, seed_ptr, extra_ptr,
    out_ptr, share_ptr, on_bias_ptr, partial_ptr, ml_ptr, counter_ptr, N, stride_tn, dropout_p,
    H: tl.constexpr, E: tl.constexpr, L: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    GROUPS: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr,
    HAS_BIAS_SLOT: tl.constexpr, ADD_ZERO_ATTN: tl.constexpr, UPDATE: tl.constexpr,
    STAGES: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H heads of one stream over one part of its window.

    Reads its part of the ring once, L * E elements per stream, and the moved queries (H, N, E);
    writes as many mixed inputs. A tile spans all features, so that one load serves both products.
    Where accumulators of all heads would not fit into registers, the blocks of heads are programs
    side by side, which read the ring at the same time: once from memory, then from the cache.
    """
    H_BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    program = tl.program_id(0)
    h_block = program % H_BLOCKS
    split = program // H_BLOCKS % SPLITS
    stream = (program // (H_BLOCKS * SPLITS)).to(tl.int64)
    offs_h = h_block * BLOCK_H + tl.arange(0, BLOCK_H)
    dtype = out_ptr.dtype.element_ty
    position = tl.load(position_ptr + stream)
    new_slot = (position % L).to(tl.int32)
    end = tl.minimum(position + 1, L).to(tl.int32)
    query_ptr += stream * E
    x_ring_ptr += stream * (L * E)
    if x_scale_ptr is not None:
        x_scale_ptr += stream * L
    stride_h = tl.cast(N, tl.int64) * E
    PART: tl.constexpr = ((L + SPLITS - 1) // SPLITS + BLOCK_S - 1) // BLOCK_S * BLOCK_S
    token_ptr += stream * stride_tn
    beside_ptr = token_ptr
    if UPDATE and x_scale_ptr is None:
        owns_slot = (new_slot // PART == split) & (h_block == 0)
        _store_token(token_ptr, x_ring_ptr, new_slot, owns_slot, E, BLOCK_E)
        if H_BLOCKS == 1:  # otherwise programs that do not wait for the store need the token, too
            tl.debug_barrier()  # of the program's threads: one reads what others stored
            beside_ptr = None
    m, l_sum, kept, acc = _attend_part(
        query_ptr, stride_h, beside_ptr, x_ring_ptr, x_scale_ptr, seed_ptr, stream,
        h_block * BLOCK_H, split * PART, tl.minimum(split * PART + PART, end), new_slot, dropout_p,
        dtype, H, E, BLOCK_H, BLOCK_S, BLOCK_E, GROUPS, PARTS, UNIT, STAGES, SCALE, PRECISION, ACC,
    )  # fmt: skip
    if x_scale_ptr is not None:  # noqa: SIM102 (one is known at compile time, one is not)
        if split == 0:
            m, l_sum, kept, acc = _add_token(
                query_ptr, stride_h, token_ptr, x_ring_ptr, x_scale_ptr, seed_ptr, stream, offs_h,
                new_slot, dropout_p, m, l_sum, kept, acc, UPDATE and h_block == 0, H, E, BLOCK_H,
                BLOCK_E, BLOCK_Q, SCALE, ACC,
            )  # fmt: skip
    rows = offs_h.to(tl.int64) * N + stream
    if SPLITS == 1:
        _finish(m, l_sum, kept, acc, extra_ptr, seed_ptr, out_ptr, rows, share_ptr,
                on_bias_ptr, stream, offs_h, dropout_p, H, E, L, BLOCK_H, BLOCK_E, HAS_BIAS_SLOT,
                ADD_ZERO_ATTN, ACC)  # fmt: skip
        _advance(position_ptr, active_ptr, stream, position, UPDATE and H_BLOCKS == 1)
    else:
        in_block = tl.arange(0, BLOCK_H)
        offs_e = tl.arange(0, BLOCK_E)
        offsets = offs_h[:, None] * E + offs_e[None, :]
        mask = (offs_h < H)[:, None] & (offs_e < E)[None, :]
        partial_ptr += stream * (SPLITS * H * E)
        group = stream * H_BLOCKS + h_block
        ml_ptr += group * (SPLITS * 3 * BLOCK_H)
        store_part(partial_ptr, ml_ptr, split, m, l_sum, kept, acc, offsets, mask, in_block, H * E,
                   True, BLOCK_H)  # fmt: skip
        if is_last(counter_ptr + group, SPLITS):
            top, l_sum, kept, acc = merge_parts(
                partial_ptr, ml_ptr, offsets, mask, in_block, SPLITS, H * E, True, BLOCK_H, BLOCK_E,
                ACC,
            )  # fmt: skip
            _finish(top, l_sum, kept, acc, extra_ptr, seed_ptr, out_ptr, rows, share_ptr,
                    on_bias_ptr, stream, offs_h, dropout_p, H, E, L, BLOCK_H, BLOCK_E,
                    HAS_BIAS_SLOT, ADD_ZERO_ATTN, ACC)  # fmt: skip
            _advance(position_ptr, active_ptr, stream, position, UPDATE and H_BLOCKS == 1)


@triton.jit
def _input_group_kernel(
    query_ptr, k_weight_ptr, v_weight_ptr, v_bias_ptr, bias_v_ptr, token_ptr, x_ring_ptr,
    x_scale_ptr, position_ptr, active_ptr, seed_ptr, extra_ptr, scratch_ptr, share_ptr, on_bias_ptr,
    out_ptr, N, stride_tn, dropout_p,
    H: tl.constexpr, E: tl.constexpr, L: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
    UNIT: tl.constexpr, HAS_BIAS_SLOT: tl.constexpr, ADD_ZERO_ATTN: tl.constexpr,
    UPDATE: tl.constexpr, STAGES: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N streams from their queries (N, E) to their heads' outputs (N, E).

    Per stream it reads L * E elements of the ring; the weights, 2 * E * E elements from the
    second-level cache, are shared by the group. Moved queries and mixed inputs pass through a
    scratch of BLOCK_N * H * E elements that only this program uses, while it is hot.
    """
    D: tl.constexpr = E // H
    program = tl.program_id(0)
    first = program.to(tl.int64) * BLOCK_N
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_c = tl.arange(0, BLOCK_C)
    offs_h = tl.arange(0, BLOCK_H)
    mask_n = first + offs_n < N
    mask_d = offs_d < D
    dtype = out_ptr.dtype.element_ty
    scratch_ptr += first * (H * E)
    rows = (first + offs_n)[:, None] * E
    for h in range(H):
        query = tl.load(
            query_ptr + rows + (h * D + offs_d)[None, :],
            mask=mask_n[:, None] & mask_d[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_D]
        for c in range(0, E, BLOCK_C):
            mask_c = c + offs_c < E
            weight = tl.load(
                k_weight_ptr + (h * D + offs_d)[:, None] * E + (c + offs_c)[None, :],
                mask=mask_d[:, None] & mask_c[None, :],
                other=0.0,
            )  # [BLOCK_D, BLOCK_C]
            moved = dot(query, weight, tl.zeros((BLOCK_N, BLOCK_C), ACC), PRECISION)
            tl.store(
                scratch_ptr + (offs_n[:, None] * H + h) * E + (c + offs_c)[None, :],
                cast(moved, dtype),
                mask=mask_n[:, None] & mask_c[None, :],
            )
    for n in range(tl.minimum(N - first, BLOCK_N).to(tl.int32)):
        stream = first + n
        position = tl.load(position_ptr + stream)
        new_slot = (position % L).to(tl.int32)
        ring_ptr = x_ring_ptr + stream * (L * E)
        scale_ptr = x_scale_ptr
        if x_scale_ptr is not None:
            scale_ptr = x_scale_ptr + stream * L
        rows_ptr = scratch_ptr + n * (H * E)
        now_ptr = token_ptr + stream * stride_tn
        beside_ptr = now_ptr
        if UPDATE and x_scale_ptr is None:
            _store_token(now_ptr, ring_ptr, new_slot, True, E, BLOCK_E)
            beside_ptr = None
        tl.debug_barrier()  # of the program's threads: one reads what others stored
        m, l_sum, kept, acc = _attend_part(
            rows_ptr, E, beside_ptr, ring_ptr, scale_ptr, seed_ptr, stream, 0, 0,
            tl.minimum(position + 1, L).to(tl.int32), new_slot, dropout_p, dtype, H, E, BLOCK_H,
            BLOCK_S, BLOCK_E, GROUPS, PARTS, UNIT, STAGES, SCALE, PRECISION, ACC,
        )  # fmt: skip
        if x_scale_ptr is not None:
            m, l_sum, kept, acc = _add_token(
                rows_ptr, E, now_ptr, ring_ptr, scale_ptr, seed_ptr, stream, offs_h, new_slot,
                dropout_p, m, l_sum, kept, acc, UPDATE, H, E, BLOCK_H, BLOCK_E, BLOCK_Q, SCALE, ACC,
            )  # fmt: skip
        tl.debug_barrier()  # all have read the queries that the results overwrite
        _finish(m, l_sum, kept, acc, extra_ptr, seed_ptr, rows_ptr, offs_h, share_ptr, on_bias_ptr,
                stream, offs_h, dropout_p, H, E, L, BLOCK_H, BLOCK_E, HAS_BIAS_SLOT,
                ADD_ZERO_ATTN, ACC)  # fmt: skip
        _advance(position_ptr, active_ptr, stream, position, UPDATE)
    tl.debug_barrier()
    for h in range(H):
        found = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        for c in range(0, E, BLOCK_C):
            mask_c = c + offs_c < E
            mixed = tl.load(
                scratch_ptr + (offs_n[:, None] * H + h) * E + (c + offs_c)[None, :],
                mask=mask_n[:, None] & mask_c[None, :],
                other=0.0,
            )  # [BLOCK_N, BLOCK_C]
            weight = tl.load(
                v_weight_ptr + (h * D + offs_d)[:, None] * E + (c + offs_c)[None, :],
                mask=mask_d[:, None] & mask_c[None, :],
                other=0.0,
            )  # [BLOCK_D, BLOCK_C]
            found = dot(mixed, tl.trans(weight), found, PRECISION)
        if v_bias_ptr is not None:
            bias = tl.load(v_bias_ptr + h * D + offs_d, mask=mask_d, other=0.0).to(ACC)[None, :]
            if share_ptr is not None:
                share = tl.load(share_ptr + (first + offs_n) * H + h, mask=mask_n, other=0.0)
                bias = bias * share[:, None]
            found += bias
        if HAS_BIAS_SLOT:
            on_bias = tl.load(on_bias_ptr + (first + offs_n) * H + h, mask=mask_n, other=0.0)
            value = tl.load(bias_v_ptr + h * D + offs_d, mask=mask_d, other=0.0).to(ACC)
            found += on_bias[:, None] * value[None, :]
        tl.store(
            out_ptr + rows + (h * D + offs_d)[None, :],
            cast(found, dtype),
            mask=mask_n[:, None] & mask_d[None, :],
        )


@triton.jit
def _asked_kernel(
    x_ring_ptr, x_scale_ptr, position_ptr, out_ptr,
    E: tl.constexpr, L: tl.constexpr, DELAY: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program: the token that came DELAY steps before the new one; zeros if none did."""
    stream = tl.program_id(0).to(tl.int64)
    at = tl.load(position_ptr + stream) - DELAY
    row = stream * L + (at + L) % L
    offs_e = tl.arange(0, BLOCK_E)
    there = offs_e < tl.where(at >= 0, E, 0)
    token = tl.load(x_ring_ptr + row * E + offs_e, mask=there, other=0)
    if x_scale_ptr is not None:
        scale = tl.load(x_scale_ptr + row, mask=at >= 0, other=0.0)
        scale *= unit_of(x_ring_ptr.dtype.element_ty)
        token = decode(token, tl.float32) * scale
    tl.store(out_ptr + stream * E + offs_e, cast(token, out_ptr.dtype.element_ty), offs_e < E)


@triton.jit
def _by_head_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, N, stride_xn, stride_xh, stride_xk, stride_wh, stride_wo,
    stride_wk, stride_on, stride_oh, stride_oo,
    OUTPUTS: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_O outputs of one head for BLOCK_N streams.

    Reads BLOCK_O * K weights once for all its streams. The blocks do not depend on how many streams
    there are, and so neither do the bits of a stream.
    """
    head = tl.program_id(2)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask_o = offs_o < OUTPUTS
    x_ptr += head.to(tl.int64) * stride_xh
    weight_ptr += head.to(tl.int64) * stride_wh
    acc = tl.zeros((BLOCK_N, BLOCK_O), ACC)
    for k in range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        x = tl.load(
            x_ptr + offs_n[:, None] * stride_xn + (k + offs_k)[None, :] * stride_xk,
            mask=mask_n[:, None] & mask_k[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_K]
        weight = tl.load(
            weight_ptr + offs_o[None, :] * stride_wo + (k + offs_k)[:, None] * stride_wk,
            mask=mask_o[None, :] & mask_k[:, None],
            other=0.0,
        )  # [BLOCK_K, BLOCK_O]
        acc = dot(x, weight, acc, PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + head * OUTPUTS + offs_o, mask=mask_o, other=0.0).to(ACC)[None, :]
    tl.store(
        out_ptr + head.to(tl.int64) * stride_oh + offs_n[:, None] * stride_on
        + offs_o[None, :] * stride_oo,
        cast(acc, out_ptr.dtype.element_ty),
        mask=mask_n[:, None] & mask_o[None, :],
    )  # fmt: skip


def by_head(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write `x` (N, H, K) times each head's `weight` (H, O, K), plus `bias` (H, O), to `out`.

    `out` (N, H, O) is returned; its strides are free, as are those of `x` and `weight`. A stream's
    bits depend on that stream alone.
    """
    N, H, K = x.shape
    _, acc = accumulators(x.dtype)
    args = (x, weight, bias, out, N, *x.stride(), *weight.stride(), *out.stride())
    block_k = features_at_once(K, x.element_size(), 128)
    constants = constants_of(
        out.shape[2], K, INVARIANT_TOKENS, INVARIANT_FEATURES, block_k, dot_precision(), acc
    )
    blocks = cdiv(out.shape[2], INVARIANT_FEATURES)
    grid = (cdiv(N, INVARIANT_TOKENS), blocks, H)
    launch(_by_head_kernel, grid, args, constants, num_warps=4)
    return out


def why_not(
    query: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    x_ring: Tensor,
    position: Tensor,
    *rest: Any,
) -> str | None:
    """None if this module covers a call of `input_step_`, else the reason why not."""
    refused = not_taken(query)
    if refused is not None:
        return refused
    weights = (in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, bias_k, bias_v)
    given = [tensor for tensor in weights if tensor is not None]
    scale = rest[6] if len(rest) > 6 else None
    kept = query.dtype if scale is None else x_ring.dtype
    if any(x.dtype != query.dtype for x in given) or x_ring.dtype != kept:
        return "query, weights and ring differ in dtype"
    if scale is not None and x_ring.dtype not in CODES:
        return f"no kernel for a ring of {x_ring.dtype}"
    held = (x_ring, position) if scale is None else (x_ring, position, scale)
    if not all(x.is_contiguous() for x in (*given, *held)):
        return "a weight or the state is not contiguous"
    if x_ring.shape[1] * x_ring.shape[2] >= MAX_ELEMENTS:
        return f"a stream's ring of {MAX_ELEMENTS} numbers or more"
    sizes = (x_ring.shape[2], query.element_size())
    return input_step_covers(*sizes, little=little_memory(query))


def input_step_(
    query: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    x_ring: Tensor,
    position: Tensor,
    num_heads: int,
    delay: int,
    active: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    update: bool,
    x_scale: Tensor | None = None,
    batch_invariant: bool = False,
    plan: InputPlan | None = None,
) -> Tensor:
    """One step of N streams: the output (N, E); writes the ring and `position` if `update`.

    Shapes: `query` (N, E), any strides; `in_proj_weight` (3E, E); `x_ring` (N, L, E); `x_scale`
    (N, L, 1) fp32 if the ring is of 8 bits; `position` (N,) int64; `active` (N,) bool.
    Covered: what `why_not` answers None to. `batch_invariant` or `plan` overrides the table.
    """
    N, L, E = x_ring.shape
    shape = (E, num_heads, L, query.element_size())
    linear, little = F.linear, little_memory(query)
    if batch_invariant:
        plan = invariant_input_plan(*shape, x_scale is not None, little=little)
        linear = functools.partial(tiled_linear, plan=invariant_step_plan(*shape))
    plan = plan or input_plan(N, *shape, x_scale is not None, little=little)
    query = query if query.stride(1) == 1 else query.contiguous()
    active = active.contiguous() if update and active is not None else None
    q_weight, k_weight, v_weight = in_proj_weight.chunk(3)
    q_bias, k_bias, v_bias = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    asked = query
    if delay:
        asked = query.new_empty((N, E))
        constants = constants_of(E, L, delay, plan.block_e)
        args: tuple = (x_ring, x_scale, position, asked)
        launch(_asked_kernel, (N, 1, 1), args, constants, num_warps=4)
    q = linear(asked, q_weight, q_bias)
    wide, acc = accumulators(query.dtype)
    queries = q.view(N, num_heads, E // num_heads)
    extra = _extra_scores(queries, k_bias, bias_k, add_zero_attn, wide, batch_invariant)
    share = on_bias = None
    if extra is not None or dropout_p > 0.0:
        share = torch.empty((N, num_heads), dtype=wide, device=query.device)
    if bias_k is not None:
        on_bias = torch.empty((N, num_heads), dtype=wide, device=query.device)
    seed = dropout_seed(dropout_p, query.device)
    state = (x_ring, x_scale, position, active, seed, extra)
    # Decoded, a tile leaves no registers for two parts of each number; nor a wide one shared memory
    # for copies in the order of the matrix unit.
    precision = dot_precision(plan.by_rows or x_scale is not None)
    if little and x_scale is not None and query.element_size() > 2 and plan.block_e >= 1024:
        precision = "ieee"
    options = (bias_k is not None, bool(add_zero_attn), bool(update), plan.stages,
               (E // num_heads) ** -0.5, precision, acc)  # fmt: skip
    unit = 1
    # Where not every program that needs the new token stores it, it is read beside the ring.
    if x_scale is None and not (update and num_heads <= plan.block_h):
        query, unit = _beside(query, x_ring)
    sizes = (plan.block_q, plan.block_h, plan.block_s, plan.block_e, plan.groups, plan.parts, unit)
    if plan.path == "fused":
        scratch, out = query.new_empty((N, num_heads, E)), query.new_empty((N, E))
        args = (q, k_weight, v_weight, v_bias, bias_v, query, *state, scratch, share, on_bias, out,
                N, query.stride(0), dropout_p)  # fmt: skip
        blocks = (plan.block_n, plan.block_d, plan.block_c)
        constants = constants_of(num_heads, E, L, *blocks, *sizes, *options)
        grid = (cdiv(N, plan.block_n), 1, 1)
        launch(_input_group_kernel, grid, args, constants, num_warps=plan.num_warps)
        return linear(out, out_proj_weight, out_proj_bias)
    moved, mixed = (query.new_empty((num_heads, N, E)) for _ in range(2))
    k_weight, v_weight = (x.view(num_heads, -1, E) for x in (k_weight, v_weight))
    if batch_invariant:
        by_head(queries, k_weight.transpose(1, 2), None, moved.transpose(0, 1))
    else:
        torch.bmm(queries.transpose(0, 1), k_weight, out=moved)
    partial = ml = counter = None
    groups = N * cdiv(num_heads, plan.block_h)
    if plan.splits > 1:
        partial = torch.empty((N, plan.splits, num_heads, E), dtype=wide, device=query.device)
        ml = torch.empty((groups, plan.splits, 3, plan.block_h), dtype=wide, device=query.device)
        counter = counters(query, groups)
    args = (moved, query, *state, mixed, share, on_bias, partial, ml, counter, N, query.stride(0),
            dropout_p)  # fmt: skip
    constants = constants_of(num_heads, E, L, plan.splits, *sizes, *options)
    grid = (groups * plan.splits, 1, 1)
    launch(
        _input_step_kernel, grid, args, constants, num_warps=plan.num_warps,
        registers=plan.registers,
    )  # fmt: skip
    out = query.new_empty((N, num_heads, E // num_heads))
    alone = v_bias if share is None else None  # one rounding less than adding it to the product
    if batch_invariant:
        by_head(mixed.transpose(0, 1), v_weight, alone, out)
    elif alone is not None:
        alone = alone.view(num_heads, 1, -1)
        torch.baddbmm(alone, mixed, v_weight.transpose(1, 2), out=out.transpose(0, 1))
    else:
        torch.bmm(mixed, v_weight.transpose(1, 2), out=out.transpose(0, 1))
    if v_bias is not None and share is not None:
        out += v_bias.view(num_heads, -1) * share.unsqueeze(-1)
    if on_bias is not None and bias_v is not None:
        out += bias_v.view(num_heads, -1) * on_bias.unsqueeze(-1)
    out = linear(out.view(N, E), out_proj_weight, out_proj_bias)
    if update and groups > N:  # no program of a stream knows when the others have read it
        position.add_(1 if active is None else active)
    return out


def _beside(token: Tensor, x_ring: Tensor) -> tuple[Tensor, int]:
    """The token where it can be read as rows of the ring are, and by how many numbers at once."""
    packed = 16 // token.element_size()
    if token.shape[1] % packed or x_ring.data_ptr() % 16:
        return token, 1
    if token.data_ptr() % 16 or token.stride(0) % packed:
        token = token.clone(memory_format=torch.contiguous_format)
    return token, packed


def _extra_scores(
    q: Tensor,
    k_bias: Tensor | None,
    bias_k: Tensor | None,
    add_zero_attn: bool,
    wide: torch.dtype,
    batch_invariant: bool,
) -> Tensor | None:
    """Scores (N, H, X) of the slots that `add_bias_kv` and `add_zero_attn` add, or None.

    They lack what the key's bias would give to all others, which the moved queries leave out.
    """
    if bias_k is None and not add_zero_attn:
        return None
    q = q.to(wide) * q.shape[2] ** -0.5

    def scores_of(key: Tensor) -> Tensor:
        key = key.view(q.shape[1:])
        if not batch_invariant:
            return (q * key).sum(-1)
        return by_head(q, key.unsqueeze(1).to(wide), None, q.new_empty((*q.shape[:2], 1)))[..., 0]

    scores = []
    if bias_k is not None:
        scores.append(scores_of(bias_k))
    if add_zero_attn:
        scores.append(q.new_zeros(q.shape[:2]))
    extra = torch.stack(scores, -1)
    return extra if k_bias is None else extra - scores_of(k_bias).unsqueeze(-1)
