"""The gradients of ``attend_shared``: of queries, of the tile that the heads share, of the sink."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .attend_shared import (
    load_tile,
    mask_strides,
    products_of_tile,
    side_by_side,
    weights_by_lse,
    with_mask,
)
from .launch import constants_of, launch, little_memory
from .pieces import (
    LOG2E,
    accumulators,
    cast,
    dot,
    dot_precision,
    finite_or_zero,
    keep_scale,
    product,
    products_in_parts,
    sum_of_last,
)
from .plan import cdiv, next_power_of_2, shared_backward_plan
from .row_scores import flat, row_scores, spread_features, spread_rows


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
        grad_out = load_tile(
            grad_out_ptr + stream * stride_gn, offs_h, stride_gh, columns, stride_ge, H, EV
        )
        out = load_tile(out_ptr + stream * (H * EV), offs_h, EV, columns, 1, H, EV)
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
    scores = with_mask(scores, mask_ptr, heads, slots, stride_mh, stride_ms, S, H, ACC)
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

    scores, grad_weight = products_of_tile(
        query_ptr, grad_out_ptr if value_ptr is None else None, key_ptr, offs_h, offs_s, stride_qh,
        stride_qe, stride_gh, stride_ge, stride_ks, stride_ke, S, H, EK, BLOCK_H, BLOCK_S, BLOCK_E,
        PRECISION, ACC,
    )  # fmt: skip
    if value_ptr is not None:
        grad_weight, _ = products_of_tile(
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
        query = load_tile(query_ptr, offs_h, stride_qh, columns, stride_qe, H, EK)
        key = load_tile(key_ptr, offs_s, stride_ks, columns, stride_ke, S, EK)
        if grad_key_ptr is not None:
            grad_key = dot(grad_score, query, tl.zeros((BLOCK_S, BLOCK_E), ACC), PRECISION)
            if value_ptr is None:
                grad_out = load_tile(grad_out_ptr, offs_h, stride_gh, columns, stride_ge, H, EK)
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
            grad_out = load_tile(grad_out_ptr, offs_h, stride_gh, columns, stride_ge, H, EV)
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
        load_tile(query_ptr, rows % BLOCK_H, stride_qh, columns, stride_qe, H, E),
        load_tile(grad_out_ptr, rows % BLOCK_H, stride_gh, columns, stride_ge, H, E),
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
        tile_low = load_tile(key_ptr, there, stride_ks, low, stride_ke, None, E)
        tile_high = load_tile(key_ptr, there, stride_ks, high, stride_ke, None, E)
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
            weights = load_tile(weights_ptr, offs_s, 2 * BLOCK_H, kinds, 1, end, 2 * BLOCK_H)
            both = _both(
                query_ptr, grad_out_ptr, columns, stride_qh, stride_qe, stride_gh, stride_ge, H, E,
                BLOCK_H,
            )  # fmt: skip
            grad_key = dot(weights, both, tl.zeros((2 * BLOCK_S, BLOCK_E), ACC), PRECISION)
            _store_tile(grad_key_ptr, grad_key, offs_s, columns, end, E)


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
        query, key, grad_out = side_by_side(query, key, grad_out)
    lse = lse.contiguous()
    if grad_kept is not None:
        grad_kept = grad_kept.contiguous()
        grad_lse = -grad_kept * kept if grad_lse is None else grad_lse - grad_kept * kept
    if grad_average is not None:
        grad_average = grad_average.contiguous()
        products = weights_by_lse(query, key, mask, lse, seed, dropout_p, grad_average).sum(1)
        grad_lse = -products if grad_lse is None else grad_lse - products
    shared = _shared_gradient(grad_out, grad_lse, out, lse, plan.block_h)
    grad_key = query.new_empty((N, S, EK)) if tiles else None
    grad_value = query.new_empty((N, S, EV)) if tiles and value is not None else None
    grad_query = query.new_empty((N, parts, H, EK), dtype=query.dtype if parts == 1 else wide)
    grad_sink = lse.new_empty((0,) if sink is None else (N, H))
    sink = None if sink is None else sink.contiguous()
    given = (grad_out, shared, grad_kept, grad_average, query, key)
    strides = (*grad_out.stride(), *query.stride(), *key.stride())
    last = (*mask_strides(mask, N, H, S), S, parts, dropout_p)
    if plan.by_rows:
        kernel: Any = _rows_backward_kernel
        shape = (N, S, 2 * plan.block_h)
        weights = lse.new_empty(shape) if tiles else None
        args: tuple = (
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


def _shared_gradient(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, block_h: int
) -> Tensor:
    """What all scores of a head get through the normalisation (N, H); `lse` is contiguous."""
    (N, H), EV = lse.shape, out.shape[2]
    _, acc = accumulators(out.dtype)
    shared = lse.new_empty((N, H))
    args = (
        grad_out, None if grad_lse is None else grad_lse.contiguous(), out.contiguous(), lse,
        shared, *grad_out.stride(),
    )  # fmt: skip
    constants = constants_of(H, EV, block_h, min(next_power_of_2(EV), 4096 // block_h), acc)
    launch(_shared_gradient_kernel, (N, 1, 1), args, constants, num_warps=4)
    return shared


def attend_shared_query_backward(*args: Any) -> tuple[Tensor, Tensor]:
    """Gradients of query and sink alone, of what `attend_shared_full_backward` takes."""
    grad_query, _, _, grad_sink = attend_shared_full_backward(*args, tiles=False)
    return grad_query, grad_sink
