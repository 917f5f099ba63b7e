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
    scores_in_parts,
    store_part,
)
from .plan import cdiv, shared_backward_plan, shared_plan
from .row_scores import flat, row_scores, spread_features, spread_rows


@triton.jit
def load_tile(
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
def products_of_tile(
    query_ptr, other_ptr, key_ptr, offs_h, offs_s, stride_qh, stride_qe, stride_oh, stride_oe,
    stride_ks, stride_ke, S, H: tl.constexpr, EK: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Products of a tile with the queries and, of the same load, others  # 2 [BLOCK_S, BLOCK_H]"""
    offs_e = tl.arange(0, BLOCK_E)
    scores = tl.zeros((BLOCK_S, BLOCK_H), ACC)
    others = tl.zeros((BLOCK_S, BLOCK_H), ACC)
    for e in range(0, EK, BLOCK_E):
        query = load_tile(query_ptr, offs_h, stride_qh, e + offs_e, stride_qe, H, EK)
        key = load_tile(key_ptr, offs_s, stride_ks, e + offs_e, stride_ke, S, EK)
        scores = dot_of_part(key, tl.trans(query), scores, PRECISION)
        if other_ptr is not None:
            other = load_tile(other_ptr, offs_h, stride_oh, e + offs_e, stride_oe, H, EK)
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
    scores, _ = products_of_tile(
        query_ptr, None, key_ptr, offs_h, offs_s, stride_qh, stride_qe, 0, 0, stride_ks, stride_ke,
        S, H, EK, BLOCK_H, BLOCK_S, BLOCK_E, PRECISION, ACC,
    )  # fmt: skip
    heads, slots = offs_h[None, :], offs_s[:, None]
    return with_mask(scores, mask_ptr, heads, slots, stride_mh, stride_ms, S, H, ACC)


@triton.jit
def with_mask(
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
        query = load_tile(query_ptr, offs_h, stride_qh, offs_v, stride_qe, H, EK)
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
                value = load_tile(key_ptr, offs_s, stride_ks, offs_v, stride_ke, S, EK)
                scores = scores_in_parts(query, value, PARTS, PRECISION, ACC)
            scores = with_mask(
                scores, mask_ptr, offs_h[:, None], offs_s[None, :], stride_mh, stride_ms, S, H, ACC
            )
        else:
            scores = _scores(
                query_ptr, key_ptr, mask_ptr, offs_h, offs_s, stride_qh, stride_qe, stride_ks,
                stride_ke, stride_mh, stride_ms, S, H, EK, BLOCK_H, BLOCK_S, BLOCK_E, PRECISION,
                ACC,
            )  # fmt: skip
            scores = tl.trans(scores)
            value = load_tile(value_ptr, offs_s, stride_vs, offs_v, stride_ve, S, EV)
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


def mask_strides(mask: Tensor | None, N: int, H: int, S: int) -> tuple[int, int, int]:
    if mask is None:
        return 0, 0, 0
    stride_n, stride_h, stride_s = mask.expand(N, H, S).stride()
    return stride_n, stride_h, stride_s


def side_by_side(*tensors: Tensor) -> Iterator[Tensor]:
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
        average = weights_by_lse(query, key, mask, lse, seed, dropout_p, None)
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
        query, key = side_by_side(query, key)
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
        counter, *query.stride(), *key.stride(), *value.stride(), *mask_strides(mask, N, H, S), S,
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


def weights_by_lse(
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
        *mask_strides(mask, N, H, S), S, tiles, dropout_p,
    )  # fmt: skip
    constants = constants_of(H, EK, plan.block_h, plan.block_s, plan.block_e, dot_precision(), acc)
    launch(_shared_weights_kernel, (N * tiles, 1, 1), args, constants, num_warps=plan.num_warps)
    return out
