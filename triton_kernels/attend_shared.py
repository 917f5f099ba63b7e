"""The queries of all heads against one tile of keys and values that the heads share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import constants_of, counters, launch, little_memory
from .pieces import (
    LN2,
    LOG2E,
    accumulators,
    cast,
    dot,
    dot_of_part,
    dot_precision,
    finite_or_zero,
    is_last,
    keep_scale,
    merge_parts,
    not_taken,
    one_more_slot,
    product,
    products_in_parts,
    scores_in_parts,
    store_part,
    sum_of_last,
)
from .plan import cdiv, next_power_of_2, shared_backward_plan, shared_plan
from .row_scores import flat, row_scores, spread_features, spread_rows


@triton.jit
def _load_tile(
    ptr, rows, stride_row, columns, stride_column, ROWS, COLUMNS: tl.constexpr
):  # fmt: skip
    """A tile with zeros outside of (ROWS, COLUMNS); None: no row is  # [rows, columns]"""
    within = (columns < COLUMNS)[None, :]
    if ROWS is not None:
        within = (rows < ROWS)[:, None] & within
    return tl.load(
        ptr
        + rows.to(tl.int64)[:, None] * stride_row
        + columns.to(tl.int64)[None, :] * stride_column,
        mask=within,
        other=0.0,
    )


@triton.jit
def _products(
    query_ptr, other_ptr, key_ptr, offs_h, offs_s, stride_qh, stride_qe, stride_oh, stride_oe,
    stride_ks, stride_ke, S, H: tl.constexpr, EK: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Products of a tile with the queries and, of the same load, others  # 2 [BLOCK_S, BLOCK_H]"""
    offs_e = tl.arange(0, BLOCK_E)
    scores = tl.zeros((BLOCK_S, BLOCK_H), ACC)
    others = tl.zeros((BLOCK_S, BLOCK_H), ACC)
    for e in range(0, EK, BLOCK_E):
        query = _load_tile(query_ptr, offs_h, stride_qh, e + offs_e, stride_qe, H, EK)
        key = _load_tile(key_ptr, offs_s, stride_ks, e + offs_e, stride_ke, S, EK)
        scores = dot_of_part(key, tl.trans(query), scores, PRECISION)
        if other_ptr is not None:
            other = _load_tile(other_ptr, offs_h, stride_oh, e + offs_e, stride_oe, H, EK)
            others = dot_of_part(key, tl.trans(other), others, PRECISION)
    return scores, others


@triton.jit
def _scores(
    query_ptr, key_ptr, mask_ptr, offs_h, offs_s,
    stride_qh, stride_qe, stride_ks, stride_ke, stride_mh, stride_ms, S,
    H: tl.constexpr, EK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Scores of a tile, transposed, and -inf behind its end  # [BLOCK_S, BLOCK_H]"""
    scores, _ = _products(
        query_ptr, None, key_ptr, offs_h, offs_s, stride_qh, stride_qe, 0, 0, stride_ks, stride_ke,
        S, H, EK, BLOCK_H, BLOCK_S, BLOCK_E, PRECISION, ACC,
    )  # fmt: skip
    heads, slots = offs_h[None, :], offs_s[:, None]
    return _masked(scores, mask_ptr, heads, slots, stride_mh, stride_ms, S, H, ACC)


@triton.jit
def _masked(
    scores, mask_ptr, heads, slots, stride_mh, stride_ms, S, H: tl.constexpr, ACC: tl.constexpr
):
    """Scores plus the mask's, and -inf behind the window's end; `heads` and `slots` span them."""
    if mask_ptr is not None:
        scores += tl.load(
            mask_ptr + slots.to(tl.int64) * stride_ms + heads.to(tl.int64) * stride_mh,
            mask=(slots < S) & (heads < H),
            other=0.0,
        ).to(ACC)
    return tl.where(slots < S, scores, float("-inf"))


@triton.jit
def _attend_shared_kernel(
    query_ptr, key_ptr, value_ptr, mask_ptr, sink_ptr, seed_ptr, out_ptr, lse_ptr, kept_ptr,
    partial_ptr, ml_ptr, counter_ptr,
    stride_qn, stride_qh, stride_qe, stride_kn, stride_ks, stride_ke, stride_vn, stride_vs,
    stride_ve, stride_mn, stride_mh, stride_ms, S, dropout_p,
    H: tl.constexpr, EK: tl.constexpr, EV: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr,
    ONE_TILE: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_V value features of BLOCK_H heads over one part of a stream's window.

    Reads its part of key and value once; with ONE_TILE they are one tensor and BLOCK_V spans it,
    so that both products use one load. That tile is the right operand of both: where it is the left
    one of either, Triton copies no tile ahead.
    """
    V_BLOCKS: tl.constexpr = (EV + BLOCK_V - 1) // BLOCK_V
    BLOCKS: tl.constexpr = V_BLOCKS * ((H + BLOCK_H - 1) // BLOCK_H)
    program = tl.program_id(0)
    split = program % SPLITS
    block = program // SPLITS % BLOCKS
    v_block = block % V_BLOCKS
    first = block // V_BLOCKS * BLOCK_H
    stream = (program // (SPLITS * BLOCKS)).to(tl.int64)
    query_ptr += stream * stride_qn
    key_ptr += stream * stride_kn
    value_ptr += stream * stride_vn
    if mask_ptr is not None:
        mask_ptr += stream * stride_mn
    in_block = tl.arange(0, BLOCK_H)
    offs_h = first + in_block
    offs_v = v_block * BLOCK_V + tl.arange(0, BLOCK_V)
    log2e = tl.full((), LOG2E, ACC)
    ln2 = tl.full((), LN2, ACC)

    m_i = tl.full((BLOCK_H,), float("-inf"), ACC)
    l_i = tl.zeros((BLOCK_H,), ACC)
    kept_i = tl.zeros((BLOCK_H,), ACC)  # of l_i, after dropout
    acc = tl.zeros((BLOCK_H, BLOCK_V), ACC)
    part = tl.cdiv(tl.cdiv(S, SPLITS), BLOCK_S) * BLOCK_S
    end = tl.minimum(split * part + part, S)
    if GROUPS > 0:
        features = spread_features(BLOCK_V, GROUPS)
        in_tile = spread_rows(BLOCK_S)
    elif ONE_TILE:
        query = _load_tile(query_ptr, offs_h, stride_qh, offs_v, stride_qe, H, EK)
    for start in tl.range(split * part, end, BLOCK_S, num_stages=STAGES):
        offs_s = start + tl.arange(0, BLOCK_S)
        if ONE_TILE:
            if GROUPS > 0:
                at = start + in_tile
                value = tl.load(
                    key_ptr + at.to(tl.int64) * stride_ks + features,
                    mask=(at < S) & (features < EK),
                    other=0.0,
                )
                scores = row_scores(query_ptr, stride_qh, first, value, features, start < end,
                                    H, EK, BLOCK_H, BLOCK_S, BLOCK_V, GROUPS, ACC)  # fmt: skip
                value = flat(value, BLOCK_S, BLOCK_V)
            else:
                value = _load_tile(key_ptr, offs_s, stride_ks, offs_v, stride_ke, S, EK)
                scores = scores_in_parts(query, value, PARTS, PRECISION, ACC)
            scores = _masked(
                scores, mask_ptr, offs_h[:, None], offs_s[None, :], stride_mh, stride_ms, S, H, ACC
            )
        else:
            scores = _scores(
                query_ptr, key_ptr, mask_ptr, offs_h, offs_s, stride_qh, stride_qe, stride_ks,
                stride_ke, stride_mh, stride_ms, S, H, EK, BLOCK_H, BLOCK_S, BLOCK_E, PRECISION,
                ACC,
            )  # fmt: skip
            scores = tl.trans(scores)
            value = _load_tile(value_ptr, offs_s, stride_vs, offs_v, stride_ve, S, EV)
        scores *= log2e
        m_new = tl.maximum(m_i, tl.max(scores, axis=1))
        shift = finite_or_zero(m_new)
        alpha = tl.exp2(m_i - shift)
        weight = tl.exp2(scores - shift[:, None])
        m_i = m_new
        l_i = l_i * alpha + tl.sum(weight, axis=1)
        if seed_ptr is not None:
            slots, heads = offs_s[None, :], offs_h[:, None]
            keep = keep_scale(seed_ptr, slots, stream, heads, 0, dropout_p).to(ACC)
            weight = product(weight, keep)
            kept_i = kept_i * alpha + tl.sum(weight, axis=1)
        weight = cast(weight, value_ptr.dtype.element_ty)
        acc = dot(weight, value, acc * alpha[:, None], PRECISION)

    if sink_ptr is not None:  # noqa: SIM102 (one is known at compile time, one is not)
        if split == 0:
            sink = tl.load(sink_ptr + stream * H + offs_h, mask=offs_h < H, other=0.0).to(ACC)
            m_i, l_i, kept_i, acc, _ = one_more_slot(m_i, l_i, kept_i, acc, sink * log2e, 0.0)

    out_offsets = offs_h[:, None] * EV + offs_v[None, :]
    mask_out = (offs_h < H)[:, None] & (offs_v < EV)[None, :]
    out_ptr += stream * (H * EV)
    if SPLITS == 1:
        tl.store(
            out_ptr + out_offsets, cast(acc / l_i[:, None], out_ptr.dtype.element_ty), mask_out
        )
        if v_block == 0:
            tl.store(lse_ptr + stream * H + offs_h, m_i * ln2 + tl.log(l_i), mask=offs_h < H)
            if seed_ptr is not None:
                tl.store(kept_ptr + stream * H + offs_h, kept_i / l_i, mask=offs_h < H)
    else:
        partial_ptr += stream * SPLITS * (H * EV)
        ml_ptr += (stream * BLOCKS + block) * (SPLITS * 3 * BLOCK_H)
        store_part(partial_ptr, ml_ptr, split, m_i, l_i, kept_i, acc, out_offsets, mask_out,
                   in_block, H * EV, seed_ptr is not None, BLOCK_H)  # fmt: skip
        if is_last(counter_ptr + stream * BLOCKS + block, SPLITS):
            top, total, kept, acc = merge_parts(
                partial_ptr, ml_ptr, out_offsets, mask_out, in_block, SPLITS, H * EV,
                seed_ptr is not None, BLOCK_H, BLOCK_V, ACC,
            )  # fmt: skip
            out = cast(acc / total[:, None], out_ptr.dtype.element_ty)
            tl.store(out_ptr + out_offsets, out, mask_out)
            if v_block == 0:
                tl.store(lse_ptr + stream * H + offs_h, top * ln2 + tl.log(total), mask=offs_h < H)
                if seed_ptr is not None:
                    tl.store(kept_ptr + stream * H + offs_h, kept / total, mask=offs_h < H)


@triton.jit
def _shared_weights_kernel(
    query_ptr, key_ptr, mask_ptr, lse_ptr, seed_ptr, grad_ptr, out_ptr,
    stride_qn, stride_qh, stride_qe, stride_kn, stride_ks, stride_ke, stride_mn, stride_mh,
    stride_ms, S, TILES, dropout_p,
    H: tl.constexpr, EK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: the weights of one tile of BLOCK_S slots of one stream, out of the saved lse.

    Reads the tile's keys and writes the average over the heads; or, given that average's gradient,
    for each head its product with the weights, summed over the tile. Blocks as in the backward.
    """
    program = tl.program_id(0)
    tile = program % TILES
    stream = (program // TILES).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    offs_s = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_h = offs_h < H
    if mask_ptr is not None:
        mask_ptr += stream * stride_mn
    scores = _scores(
        query_ptr + stream * stride_qn, key_ptr + stream * stride_kn, mask_ptr, offs_h, offs_s,
        stride_qh, stride_qe, stride_ks, stride_ke, stride_mh, stride_ms, S, H, EK, BLOCK_H,
        BLOCK_S, BLOCK_E, PRECISION, ACC,
    )  # fmt: skip
    lse = tl.load(lse_ptr + stream * H + offs_h, mask=mask_h, other=0.0)
    weight = tl.exp2((scores - lse[None, :]) * tl.full((), LOG2E, ACC))
    if seed_ptr is not None:
        keep = keep_scale(seed_ptr, offs_s[:, None], stream, offs_h[None, :], 0, dropout_p).to(ACC)
        weight = product(weight, keep)
    if grad_ptr is None:
        average = tl.sum(tl.where(mask_h[None, :], weight, 0.0), axis=1) / H
        tl.store(out_ptr + stream * S + offs_s, average, mask=offs_s < S)
    else:
        grad = tl.load(grad_ptr + stream * S + offs_s, mask=offs_s < S, other=0.0).to(ACC) / H
        total = tl.sum(product(weight, grad[:, None]), axis=0)
        tl.store(out_ptr + program.to(tl.int64) * H + offs_h, total, mask=mask_h)


@triton.jit
def _shared_gradient_kernel(
    grad_out_ptr, grad_lse_ptr, out_ptr, lse_ptr, shared_ptr, stride_gn, stride_gh, stride_ge,
    H: tl.constexpr, EV: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One program: for each head of one stream, what all scores get through the normalisation.

    That is the gradient of `lse` less the inner product of the output and its gradient. A kernel of
    its own, since every program of the backward needs it, which multiplies the same tiles of that
    gradient: of a tile that matrix units and threads both read, Triton's pipeline keeps a buffer
    too few, and copies the next one over it while the unit may still be reading.
    """
    stream = tl.program_id(0).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    row = stream * H + offs_h
    mask_h = offs_h < H
    shared = tl.zeros((BLOCK_H,), ACC)
    for e in range(0, EV, BLOCK_E):
        columns = e + tl.arange(0, BLOCK_E)
        grad_out = _load_tile(
            grad_out_ptr + stream * stride_gn, offs_h, stride_gh, columns, stride_ge, H, EV
        )
        out = _load_tile(out_ptr + stream * (H * EV), offs_h, EV, columns, 1, H, EV)
        shared -= tl.sum(product(grad_out.to(ACC), out.to(ACC)), axis=1)
    if grad_lse_ptr is not None:
        shared += tl.load(grad_lse_ptr + row, mask=mask_h, other=0.0).to(ACC)
    lse = tl.load(lse_ptr + row, mask=mask_h, other=0.0)
    shared = tl.where(lse == float("-inf"), 0.0, shared)  # where a mask hides everything
    tl.store(shared_ptr + row, shared, mask=mask_h)


@triton.jit
def _of_heads(ptr, stream, heads, H: tl.constexpr, ACC: tl.constexpr):
    """A number for each head of a stream  # like heads"""
    return tl.load(ptr + stream * H + heads, mask=heads < H, other=0.0).to(ACC)


@triton.jit
def _score_gradients(
    scores, grad_weight, heads, slots, stream, lse, shared, grad_kept_ptr, grad_average_ptr,
    mask_ptr, seed_ptr, stride_mh, stride_ms, S, dropout_p, H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile's scores, and the weights that were applied.

    `grad_weight`: the products of its values and the output's gradient; `heads` and `slots` span
    the tile; `lse` and `shared` are those of the heads.
    """
    scores = _masked(scores, mask_ptr, heads, slots, stride_mh, stride_ms, S, H, ACC)
    weight = tl.exp2((scores - finite_or_zero(lse)) * tl.full((), LOG2E, ACC))
    if grad_average_ptr is not None:
        at = grad_average_ptr + stream * S + slots
        grad_weight += tl.load(at, mask=slots < S, other=0.0).to(ACC) / H
    if grad_kept_ptr is not None:
        grad_weight += _of_heads(grad_kept_ptr, stream, heads, H, ACC)
    applied = weight
    if seed_ptr is not None:
        keep = keep_scale(seed_ptr, slots, stream, heads, 0, dropout_p).to(ACC)
        applied = weight * keep
        grad_weight *= keep
    return weight * (grad_weight + shared), applied


@triton.jit
def _sink_gradient(
    sink_ptr, grad_sink_ptr, stream, heads, lse, shared, H: tl.constexpr, ACC: tl.constexpr
):
    """Write the gradients of a stream's extra scores."""
    sink = _of_heads(sink_ptr, stream, heads, H, ACC)
    grad_sink = tl.exp2((sink - lse) * tl.full((), LOG2E, ACC)) * shared
    tl.store(grad_sink_ptr + stream * H + heads, grad_sink, mask=heads < H)


@triton.jit
def _attend_shared_backward_kernel(
    grad_out_ptr, shared_ptr, grad_kept_ptr, grad_average_ptr, query_ptr, key_ptr, value_ptr,
    mask_ptr, sink_ptr, seed_ptr, lse_ptr, grad_query_ptr, grad_key_ptr, grad_value_ptr,
    grad_sink_ptr, stride_gn, stride_gh, stride_ge, stride_qn, stride_qh, stride_qe,
    stride_kn, stride_ks, stride_ke, stride_vn, stride_vs, stride_ve, stride_mn, stride_mh,
    stride_ms, S, TILES, dropout_p,
    H: tl.constexpr, EK: tl.constexpr, EV: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: one tile of BLOCK_S slots of one stream, all heads and features.

    Reads the tile's keys and values twice, the second time out of the cache, and writes their
    gradients and the tile's part of the query's gradient. Features come in blocks of BLOCK_E, so
    that no accumulator spans the embedding; only the tile's weights stay in registers.
    """
    program = tl.program_id(0)
    tile = program % TILES
    stream = (program // TILES).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    offs_s = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_e = tl.arange(0, BLOCK_E)
    mask_h = offs_h < H
    grad_out_ptr += stream * stride_gn
    query_ptr += stream * stride_qn
    key_ptr += stream * stride_kn
    if mask_ptr is not None:
        mask_ptr += stream * stride_mn

    scores, grad_weight = _products(
        query_ptr, grad_out_ptr if value_ptr is None else None, key_ptr, offs_h, offs_s, stride_qh,
        stride_qe, stride_gh, stride_ge, stride_ks, stride_ke, S, H, EK, BLOCK_H, BLOCK_S, BLOCK_E,
        PRECISION, ACC,
    )  # fmt: skip
    if value_ptr is not None:
        grad_weight, _ = _products(
            grad_out_ptr, None, value_ptr + stream * stride_vn, offs_h, offs_s, stride_gh,
            stride_ge, 0, 0, stride_vs, stride_ve, S, H, EV, BLOCK_H, BLOCK_S, BLOCK_E, PRECISION,
            ACC,
        )  # fmt: skip
    heads = offs_h[None, :]
    lse = _of_heads(lse_ptr, stream, heads, H, ACC)
    shared = _of_heads(shared_ptr, stream, heads, H, ACC)
    grad_score, applied = _score_gradients(
        scores, grad_weight, heads, offs_s[:, None], stream, lse, shared, grad_kept_ptr,
        grad_average_ptr, mask_ptr, seed_ptr, stride_mh, stride_ms, S, dropout_p, H, ACC,
    )  # fmt: skip
    dtype = key_ptr.dtype.element_ty
    grad_score, applied = cast(grad_score, dtype), cast(applied, dtype)  # [BLOCK_S, BLOCK_H]
    if sink_ptr is not None:  # noqa: SIM102 (one is known at compile time, one is not)
        if tile == 0:
            _sink_gradient(sink_ptr, grad_sink_ptr, stream, heads, lse, shared, H, ACC)

    grad_query_ptr += program.to(tl.int64) * (H * EK)
    for e in range(0, EK, BLOCK_E):
        columns = e + offs_e
        mask_e = columns < EK
        query = _load_tile(query_ptr, offs_h, stride_qh, columns, stride_qe, H, EK)
        key = _load_tile(key_ptr, offs_s, stride_ks, columns, stride_ke, S, EK)
        if grad_key_ptr is not None:
            grad_key = dot(grad_score, query, tl.zeros((BLOCK_S, BLOCK_E), ACC), PRECISION)
            if value_ptr is None:
                grad_out = _load_tile(grad_out_ptr, offs_h, stride_gh, columns, stride_ge, H, EK)
                grad_key = dot(applied, grad_out, grad_key, PRECISION)
            tl.store(
                grad_key_ptr + (stream * S + offs_s)[:, None] * EK + columns[None, :],
                cast(grad_key, dtype),
                mask=(offs_s < S)[:, None] & mask_e[None, :],
            )
        grad_query = dot(tl.trans(key), grad_score, tl.zeros((BLOCK_E, BLOCK_H), ACC), PRECISION)
        tl.store(
            grad_query_ptr + offs_h[None, :] * EK + columns[:, None],
            cast(grad_query, grad_query_ptr.dtype.element_ty),
            mask=mask_h[None, :] & mask_e[:, None],
        )
    if grad_value_ptr is not None:
        for e in range(0, EV, BLOCK_E):
            columns = e + offs_e
            grad_out = _load_tile(grad_out_ptr, offs_h, stride_gh, columns, stride_ge, H, EV)
            grad_value = dot(applied, grad_out, tl.zeros((BLOCK_S, BLOCK_E), ACC), PRECISION)
            tl.store(
                grad_value_ptr + (stream * S + offs_s)[:, None] * EV + columns[None, :],
                cast(grad_value, dtype),
                mask=(offs_s < S)[:, None] & (columns < EV)[None, :],
            )


@triton.jit
def _both(
    query_ptr, grad_out_ptr, columns, stride_qh, stride_qe, stride_gh, stride_ge,
    H: tl.constexpr, E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A stream's queries and, below, the output's gradient  # [2 BLOCK_H, columns]"""
    rows = tl.arange(0, 2 * BLOCK_H)
    return tl.where(
        (rows < BLOCK_H)[:, None],
        _load_tile(query_ptr, rows % BLOCK_H, stride_qh, columns, stride_qe, H, E),
        _load_tile(grad_out_ptr, rows % BLOCK_H, stride_gh, columns, stride_ge, H, E),
    )


@triton.jit
def _store_tile(ptr, tile, rows, columns, ROWS, COLUMNS: tl.constexpr):
    """Write what of a tile is within (ROWS, COLUMNS), contiguous."""
    tl.store(
        ptr + rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :],
        cast(tile, ptr.dtype.element_ty),
        mask=(rows < ROWS)[:, None] & (columns < COLUMNS)[None, :],
    )


@triton.jit
def _one_tile_backward_kernel(
    grad_out_ptr, shared_ptr, grad_kept_ptr, grad_average_ptr, query_ptr, key_ptr, mask_ptr,
    sink_ptr, seed_ptr, lse_ptr, grad_query_ptr, grad_key_ptr, grad_sink_ptr,
    stride_gn, stride_gh, stride_ge, stride_qn, stride_qh, stride_qe, stride_kn, stride_ks,
    stride_ke, stride_mn, stride_mh, stride_ms, S, SPLITS, dropout_p,
    H: tl.constexpr, E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One program: one part of a stream's window in tiles of BLOCK_S slots, all heads and features.

    For one tensor that is key and value. A tile is loaded once, as in the forward, and its gradient
    written once. Queries and the output's gradient are the rows of one operand, so that one product
    gives scores and the weights' gradients, and one the tile's. The former has few numbers, each a
    sum over all features: in PARTS of these, the warps divide its work instead of repeating it.
    Tiles come in two halves, so that registers hold the gradient of one of them.
    """
    program = tl.program_id(0)
    split = program % SPLITS
    stream = (program // SPLITS).to(tl.int64)
    grad_out_ptr += stream * stride_gn
    query_ptr += stream * stride_qn
    key_ptr += stream * stride_kn
    if mask_ptr is not None:
        mask_ptr += stream * stride_mn
    heads = tl.arange(0, BLOCK_H)[:, None]
    lse = _of_heads(lse_ptr, stream, heads, H, ACC)
    shared = _of_heads(shared_ptr, stream, heads, H, ACC)
    low = tl.arange(0, BLOCK_E // 2)
    high = BLOCK_E // 2 + low
    both_low = _both(
        query_ptr, grad_out_ptr, low, stride_qh, stride_qe, stride_gh, stride_ge, H, E, BLOCK_H
    )
    both_high = _both(
        query_ptr, grad_out_ptr, high, stride_qh, stride_qe, stride_gh, stride_ge, H, E, BLOCK_H
    )
    acc_low = tl.zeros((2 * BLOCK_H, BLOCK_E // 2), ACC)
    acc_high = tl.zeros((2 * BLOCK_H, BLOCK_E // 2), ACC)
    if grad_key_ptr is not None:
        grad_key_ptr += stream * S * E
    part = tl.cdiv(tl.cdiv(S, SPLITS), BLOCK_S) * BLOCK_S
    end = tl.minimum(split * part + part, S)
    for start in tl.range(split * part, end, BLOCK_S, num_stages=STAGES):
        offs_s = start + tl.arange(0, BLOCK_S)
        there = tl.minimum(offs_s, S - 1)  # whose weights are zero; fewer registers than a mask
        tile_low = _load_tile(key_ptr, there, stride_ks, low, stride_ke, None, E)
        tile_high = _load_tile(key_ptr, there, stride_ks, high, stride_ke, None, E)
        products = tl.zeros((PARTS, 2 * BLOCK_H, BLOCK_S), ACC)
        products = products_in_parts(both_low, tile_low, products, PRECISION)
        products = products_in_parts(both_high, tile_high, products, PRECISION)
        products = sum_of_last(tl.permute(products, (1, 2, 0)), PARTS)
        products = tl.permute(tl.reshape(products, (2, BLOCK_H, BLOCK_S)), (1, 2, 0))
        scores, grad_weight = tl.split(products)
        grad_score, applied = _score_gradients(
            scores, grad_weight, heads, offs_s[None, :], stream, lse, shared, grad_kept_ptr,
            grad_average_ptr, mask_ptr, seed_ptr, stride_mh, stride_ms, S, dropout_p, H, ACC,
        )  # fmt: skip
        weights = tl.permute(tl.join(grad_score, applied), (2, 0, 1))
        weights = cast(tl.reshape(weights, (2 * BLOCK_H, BLOCK_S)), key_ptr.dtype.element_ty)
        acc_low = dot(weights, tile_low, acc_low, PRECISION)
        acc_high = dot(weights, tile_high, acc_high, PRECISION)
        if grad_key_ptr is not None:
            weights = tl.trans(weights)
            none = tl.zeros((BLOCK_S, BLOCK_E // 2), ACC)
            grad_key = dot(weights, both_low, none, PRECISION)
            _store_tile(grad_key_ptr, grad_key, offs_s, low, S, E)
            grad_key = dot(weights, both_high, none, PRECISION)
            _store_tile(grad_key_ptr, grad_key, offs_s, high, S, E)
    grad_query_ptr += program.to(tl.int64) * (H * E)
    rows = tl.arange(0, 2 * BLOCK_H)
    _store_tile(grad_query_ptr, acc_low, rows, low, H, E)
    _store_tile(grad_query_ptr, acc_high, rows, high, H, E)
    if sink_ptr is not None:  # noqa: SIM102 (one is known at compile time, one is not)
        if split == 0:
            _sink_gradient(sink_ptr, grad_sink_ptr, stream, heads, lse, shared, H, ACC)


@triton.jit
def _rows_backward_kernel(
    grad_out_ptr, shared_ptr, grad_kept_ptr, grad_average_ptr, query_ptr, key_ptr, mask_ptr,
    sink_ptr, seed_ptr, lse_ptr, grad_query_ptr, grad_key_ptr, grad_sink_ptr, weights_ptr,
    stride_gn, stride_gh, stride_ge, stride_qn, stride_qh, stride_qe, stride_kn, stride_ks,
    stride_ke, stride_mn, stride_mh, stride_ms, S, SPLITS, dropout_p,
    H: tl.constexpr, E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The same with `row_scores`; features lie side by side, and BLOCK_V spans them.

    Beside a tile registers hold no part of its gradient. So each slot's gradients of scores and
    applied weights are stored, and when all tiles are read, the gradients of 2 BLOCK_S slots and
    BLOCK_E features at a time are made from those.
    """
    program = tl.program_id(0)
    split = program % SPLITS
    stream = (program // SPLITS).to(tl.int64)
    grad_out_ptr += stream * stride_gn
    query_ptr += stream * stride_qn
    key_ptr += stream * stride_kn
    if grad_key_ptr is not None:
        grad_key_ptr += stream * S * E
        weights_ptr += stream * S * (2 * BLOCK_H)
    if mask_ptr is not None:
        mask_ptr += stream * stride_mn
    rows = tl.arange(0, BLOCK_H)
    heads = rows[:, None]
    lse = _of_heads(lse_ptr, stream, heads, H, ACC)
    shared = _of_heads(shared_ptr, stream, heads, H, ACC)
    kinds = tl.arange(0, 2 * BLOCK_H)
    features = spread_features(BLOCK_V, GROUPS)
    in_tile = spread_rows(BLOCK_S)
    acc = tl.zeros((BLOCK_H, BLOCK_V), ACC)
    part = tl.cdiv(tl.cdiv(S, SPLITS), BLOCK_S) * BLOCK_S
    first = split * part
    end = tl.minimum(first + part, S)
    for start in tl.range(first, end, BLOCK_S, num_stages=STAGES):
        offs_s = start + tl.arange(0, BLOCK_S)
        there = tl.minimum(start + in_tile, S - 1).to(tl.int64)
        tile = tl.load(key_ptr + there * stride_ks + features, mask=features < E, other=0.0)
        scores = row_scores(query_ptr, stride_qh, 0, tile, features, start < end,
                            H, E, BLOCK_H, BLOCK_S, BLOCK_V, GROUPS, ACC)  # fmt: skip
        grad_weight = row_scores(grad_out_ptr, stride_gh, 0, tile, features, start < end,
                                 H, E, BLOCK_H, BLOCK_S, BLOCK_V, GROUPS, ACC)  # fmt: skip
        grad_score, applied = _score_gradients(
            scores, grad_weight, heads, offs_s[None, :], stream, lse, shared, grad_kept_ptr,
            grad_average_ptr, mask_ptr, seed_ptr, stride_mh, stride_ms, S, dropout_p, H, ACC,
        )  # fmt: skip
        acc = dot(grad_score, flat(tile, BLOCK_S, BLOCK_V), acc, PRECISION)
        if grad_key_ptr is not None:
            weights = tl.permute(tl.join(grad_score, applied), (1, 2, 0))
            weights = tl.reshape(weights, (BLOCK_S, 2 * BLOCK_H))
            _store_tile(weights_ptr, weights, offs_s, kinds, S, 2 * BLOCK_H)
    grad_query_ptr += program.to(tl.int64) * (H * E)
    _store_tile(grad_query_ptr, acc, rows, tl.arange(0, BLOCK_V), H, E)
    if sink_ptr is not None:  # noqa: SIM102 (one is known at compile time, one is not)
        if split == 0:
            _sink_gradient(sink_ptr, grad_sink_ptr, stream, heads, lse, shared, H, ACC)
    if grad_key_ptr is not None:
        tl.debug_barrier()  # the weights come from other threads
        BLOCKS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
        for block in range(tl.cdiv(end - first, 2 * BLOCK_S) * BLOCKS):
            offs_s = first + block // BLOCKS * (2 * BLOCK_S) + tl.arange(0, 2 * BLOCK_S)
            columns = block % BLOCKS * BLOCK_E + tl.arange(0, BLOCK_E)
            weights = _load_tile(weights_ptr, offs_s, 2 * BLOCK_H, kinds, 1, end, 2 * BLOCK_H)
            both = _both(
                query_ptr, grad_out_ptr, columns, stride_qh, stride_qe, stride_gh, stride_ge, H, E,
                BLOCK_H,
            )  # fmt: skip
            grad_key = dot(weights, both, tl.zeros((2 * BLOCK_S, BLOCK_E), ACC), PRECISION)
            _store_tile(grad_key_ptr, grad_key, offs_s, columns, end, E)


MAX_HEADS = 64


def why_not(query: Tensor, key: Tensor, value: Tensor | None, *rest: Any) -> str | None:
    """None if this module covers a call with these arguments, else the reason why not."""
    refused = not_taken(query)
    if refused is not None:
        return refused
    if key.dtype != query.dtype or (value is not None and value.dtype != query.dtype):
        return "query, key and value differ in dtype"
    if query.shape[1] > MAX_HEADS:
        return f"{query.shape[1]} heads are over {MAX_HEADS}"
    if key.shape[1] == 0:
        return "the window is empty"
    return None


def _mask_strides(mask: Tensor | None, N: int, H: int, S: int) -> tuple[int, int, int]:
    if mask is None:
        return 0, 0, 0
    stride_n, stride_h, stride_s = mask.expand(N, H, S).stride()
    return stride_n, stride_h, stride_s


def _side_by_side(*tensors: Tensor) -> Iterator[Tensor]:
    """The same with features that lie side by side."""
    return (x if x.stride(2) == 1 else x.contiguous() for x in tensors)


def attend_shared(
    query: Tensor, key: Tensor, value: Tensor | None, mask: Tensor | None, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of `query` (N, H, Ek), already scaled, over `key` (N, S, Ek), `value` (N, S, Ev).

    A `value` of None is the key, for which one load serves both where it fits on chip.
    `mask`, broadcastable to (N, H, S), is added to the scores; `sink` (N, H) is one more score
    without a value. Returns the output (N, H, Ev) and, in at least fp32, the logarithm of the
    softmax's denominator (N, H). All strides are free. Covered: what `why_not` answers None to.
    """
    return _attend(query, key, value, mask, sink, None, 0.0)[:2]


def attend_shared_full(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    sink: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `attend_shared`, with dropout by `seed` (1,) int64, and with the weights on request.

    Returns two more tensors in at least fp32, without elements where not asked for: given a seed,
    what dropout left of the weights' sum (N, H); and the applied weights' average over heads
    (N, S), which a second launch computes from the logarithm of the denominator.
    """
    out, lse, kept = _attend(query, key, value, mask, sink, seed, dropout_p)
    kept = lse.new_empty(0) if kept is None else kept
    if need_weights:
        average = _weights(query, key, mask, lse, seed, dropout_p, None)
    else:
        average = lse.new_empty(0)
    return out, lse, kept, average


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    sink: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The first launch of `attend_shared_full`, and its results."""
    (N, H, EK), S = query.shape, key.shape[1]
    EV = EK if value is None else value.shape[2]
    wide, acc = accumulators(query.dtype)
    sizes = (N, H, S, EK, EV, query.element_size(), value is None)
    plan = shared_plan(*sizes, dropout=seed is not None, little=little_memory(query))
    if plan.by_rows:
        query, key = _side_by_side(query, key)
    value = key if value is None else value
    out = query.new_empty((N, H, EV))
    lse = query.new_empty((N, H), dtype=wide)
    kept = None if seed is None else query.new_empty((N, H), dtype=wide)
    groups = N * cdiv(EV, plan.block_v) * cdiv(H, plan.block_h)
    partial = ml = counter = None
    if plan.splits > 1:
        partial = query.new_empty((N, plan.splits, H, EV), dtype=wide)
        ml = query.new_empty((groups, plan.splits, 3, plan.block_h), dtype=wide)
        counter = counters(query, groups)
    sink = None if sink is None else sink.contiguous()
    args = (
        query, key, value, mask, sink, seed, out, lse, kept, partial, ml,
        counter, *query.stride(), *key.stride(), *value.stride(), *_mask_strides(mask, N, H, S), S,
        dropout_p,
    )  # fmt: skip
    constants = constants_of(
        H, EK, EV, plan.splits, plan.block_h, plan.block_s, plan.block_e, plan.block_v,
        plan.one_tile, plan.groups, plan.parts, plan.stages, dot_precision(plan.by_rows), acc,
    )  # fmt: skip
    launch(
        _attend_shared_kernel,
        (groups * plan.splits, 1, 1),
        args,
        constants,
        num_warps=plan.num_warps,
        registers=plan.registers,
    )
    return out, lse, kept


def _weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    grad: Tensor | None,
) -> Tensor:
    """The average of the weights (N, S), or the products with its gradient (N, tiles, H)."""
    (N, H, EK), S = query.shape, key.shape[1]
    wide, acc = accumulators(query.dtype)
    plan = shared_backward_plan(N, H, S, EK, query.element_size())
    tiles = cdiv(S, plan.block_s)
    shape = (N, S) if grad is None else (N, tiles, H)
    out = torch.empty(shape, dtype=wide, device=query.device)
    args = (
        query, key, mask, lse, seed, grad, out, *query.stride(), *key.stride(),
        *_mask_strides(mask, N, H, S), S, tiles, dropout_p,
    )  # fmt: skip
    constants = constants_of(H, EK, plan.block_h, plan.block_s, plan.block_e, dot_precision(), acc)
    launch(_shared_weights_kernel, (N * tiles, 1, 1), args, constants, num_warps=plan.num_warps)
    return out


def attend_shared_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attend_shared` by query, key, value and sink, each contiguous.

    Takes the gradients of both results, the arguments and the results; the weights are computed
    anew from `lse`. The last gradient has no elements where `sink` is None.
    """
    return attend_shared_full_backward(
        grad_out, grad_lse, None, None, query, key, value, mask, sink, None, out, lse, lse, 0.0
    )


def attend_shared_full_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_kept: Tensor | None,
    grad_average: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    sink: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    dropout_p: float,
    *,
    tiles: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attend_shared_full`, as `attend_shared_backward` gives them.

    Takes the gradients of its results, None for one of zeros. What is dropped is drawn anew.
    Without `tiles` those of key and value are not computed, and have no elements.
    """
    (N, H, EK), S = query.shape, key.shape[1]
    EV = EK if value is None else value.shape[2]
    wide, acc = accumulators(query.dtype)
    sizes = (N, H, S, EK, query.element_size(), value is None)
    plan = shared_backward_plan(*sizes, little=little_memory(query))
    parts = plan.splits if plan.one_tile else cdiv(S, plan.block_s)
    if plan.by_rows:
        query, key, grad_out = _side_by_side(query, key, grad_out)
    lse = lse.contiguous()
    if grad_kept is not None:
        grad_kept = grad_kept.contiguous()
        grad_lse = -grad_kept * kept if grad_lse is None else grad_lse - grad_kept * kept
    if grad_average is not None:
        grad_average = grad_average.contiguous()
        products = _weights(query, key, mask, lse, seed, dropout_p, grad_average).sum(1)
        grad_lse = -products if grad_lse is None else grad_lse - products
    shared = lse.new_empty((N, H))
    args: tuple = (
        grad_out, None if grad_lse is None else grad_lse.contiguous(), out.contiguous(), lse,
        shared, *grad_out.stride(),
    )  # fmt: skip
    block_e = min(next_power_of_2(EV), 4096 // plan.block_h)
    constants = constants_of(H, EV, plan.block_h, block_e, acc)
    launch(_shared_gradient_kernel, (N, 1, 1), args, constants, num_warps=4)
    grad_key = query.new_empty((N, S, EK)) if tiles else None
    grad_value = query.new_empty((N, S, EV)) if tiles and value is not None else None
    grad_query = query.new_empty((N, parts, H, EK), dtype=query.dtype if parts == 1 else wide)
    grad_sink = lse.new_empty((0,) if sink is None else (N, H))
    sink = None if sink is None else sink.contiguous()
    given = (grad_out, shared, grad_kept, grad_average, query, key)
    strides = (*grad_out.stride(), *query.stride(), *key.stride())
    last = (*_mask_strides(mask, N, H, S), S, parts, dropout_p)
    if plan.by_rows:
        kernel: Any = _rows_backward_kernel
        shape = (N, S, 2 * plan.block_h)
        weights = lse.new_empty(shape) if tiles else None
        args = (
            *given, mask, sink, seed, lse, grad_query, grad_key, grad_sink, weights, *strides,
            *last,
        )  # fmt: skip
        constants = constants_of(
            H, EK, plan.block_h, plan.block_s, plan.block_e, plan.block_v, plan.groups,
            plan.stages, dot_precision(plan.by_rows), acc,
        )  # fmt: skip
    elif plan.one_tile:
        kernel = _one_tile_backward_kernel
        args = (
            *given, mask, sink, seed, lse, grad_query, grad_key, grad_sink, *strides, *last,
        )  # fmt: skip
        constants = constants_of(
            H, EK, plan.block_h, plan.block_s, plan.block_e, plan.parts, plan.stages,
            dot_precision(), acc,
        )  # fmt: skip
    else:
        kernel = _attend_shared_backward_kernel
        args = (
            *given, value, mask, sink, seed, lse, grad_query, grad_key, grad_value, grad_sink,
            *strides, *(key if value is None else value).stride(), *last,
        )  # fmt: skip
        constants = constants_of(
            H, EK, EV, plan.block_h, plan.block_s, plan.block_e, dot_precision(), acc,
        )  # fmt: skip
    launch(kernel, (N * parts, 1, 1), args, constants, num_warps=plan.num_warps)
    grad_query = grad_query[:, 0] if parts == 1 else grad_query.sum(1).to(query.dtype)
    of_key, of_value = (query.new_empty((0,)) if x is None else x for x in (grad_key, grad_value))
    return grad_query, of_key, of_value, grad_sink


def attend_shared_query_backward(*args: Any) -> tuple[Tensor, Tensor]:
    """Gradients of query and sink alone, of what `attend_shared_full_backward` takes."""
    grad_query, _, _, grad_sink = attend_shared_full_backward(*args, tiles=False)
    return grad_query, grad_sink
