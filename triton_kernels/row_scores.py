"""Scores of a tile by its threads, not by the matrix unit: fp32 as it is, not in parts.

What Triton makes of such a `tl.dot` reads the operand that the sum runs along, eight threads at a
time, from one bank of shared memory. Here each thread multiplies what it has of the tile's rows in
registers. A tile is [C, S / 4, GROUPS, 4, 32]: a thread has four features of a row side by side,
eight lanes 32 of them, the lanes of a warp four rows, and the warps other features of the same
rows. A thread has these of every fourth row, for which it loads a query once.

Triton gives the last axis to lanes, then the one before it, and so on to lanes and warps until
there are none left. Up to version 3.6 it goes on with the first axis instead, so there the first
four stand in reverse order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces import product, sum_of_last

_ROWS = tl.constexpr(4)  # of the lanes of a warp
_LANES = tl.constexpr(8)  # of a row, in which the scores of as many heads are put together
_SPAN = tl.constexpr(32)  # features of a row in these lanes, four in each
_REVERSED = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))


@triton.jit
def spread_features(BLOCK_E: tl.constexpr, GROUPS: tl.constexpr):
    """The features of a tile, in order  # [C, 1, GROUPS, 1, 32]"""
    chunk = tl.arange(0, BLOCK_E // (GROUPS * _SPAN))
    group = tl.arange(0, GROUPS)
    if _REVERSED:
        span = chunk[None, None, None, :, None] * GROUPS + group[None, :, None, None, None]
    else:
        span = chunk[:, None, None, None, None] * GROUPS + group[None, None, :, None, None]
    return span * _SPAN + tl.arange(0, _SPAN)[None, None, None, None, :]


@triton.jit
def spread_rows(BLOCK_S: tl.constexpr):
    """The rows of a tile, in order  # [1, S / 4, 1, 4, 1]"""
    quad = tl.arange(0, BLOCK_S // _ROWS) * _ROWS
    row = tl.arange(0, _ROWS)
    if _REVERSED:
        return quad[None, None, :, None, None] + row[:, None, None, None, None]
    else:
        return quad[None, :, None, None, None] + row[None, None, None, :, None]


@triton.jit
def flat(tile, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr):
    """The same tile for a product over its rows  # [S, E]"""
    if _REVERSED:
        tile = tl.permute(tile, (2, 0, 3, 1, 4))
    else:
        tile = tl.permute(tile, (1, 3, 0, 2, 4))
    return tl.reshape(tile, (BLOCK_S, BLOCK_E))


@triton.jit
def row_scores(
    query_ptr, stride_qh, first, tile, features, always, H: tl.constexpr, E: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, GROUPS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Products of the rows with the queries of BLOCK_H = 8 heads from `first` on  # [BLOCK_H, S]

    `always` is true, but must not be known to be when the kernel is compiled: behind a condition
    Triton leaves the loads of the queries, which the first-level cache serves, where they are.
    Outside of one it moves them to before the loop, and then there are too many to keep.
    """
    CHUNKS: tl.constexpr = BLOCK_E // (GROUPS * _SPAN)
    QUADS: tl.constexpr = BLOCK_S // _ROWS
    FIRST: tl.constexpr = _ROWS if _REVERSED else QUADS
    THIRD: tl.constexpr = QUADS if _REVERSED else _ROWS
    # A thread's products of a row are added up at once, and so are fused with their sum.
    SUMMED: tl.constexpr = CHUNKS * _SPAN // _LANES
    if _REVERSED:
        features = tl.broadcast_to(features, (_ROWS, GROUPS, 1, CHUNKS, _SPAN))
    else:
        features = tl.broadcast_to(features, (CHUNKS, 1, GROUPS, _ROWS, _SPAN))
    scores = tl.zeros((FIRST, GROUPS, THIRD, _LANES), ACC)
    place = tl.arange(0, _LANES)[None, None, None, :]
    if always:
        for h in tl.static_range(H if H < BLOCK_H else BLOCK_H):
            if H > BLOCK_H:
                there = features < tl.where(first + h < H, E, 0)
            else:
                there = features < E
            row_ptr = query_ptr + (first + h) * tl.cast(stride_qh, tl.int64)
            query = tl.load(row_ptr + features, mask=there, other=0.0)
            # Of rows that it may not read by 16 bytes, a thread can have one product of a chunk.
            score = product(tile.to(ACC), query.to(ACC), CHUNKS == 1)
            if _REVERSED:
                score = tl.permute(score, (0, 1, 2, 4, 3))
            else:
                score = tl.permute(score, (1, 2, 3, 4, 0))
            score = tl.sum(tl.reshape(score, (FIRST, GROUPS, THIRD, _LANES, SUMMED)), axis=4)
            scores = tl.where(place == h, tl.sum(score, axis=3, keep_dims=True), scores)
    if _REVERSED:
        scores = tl.permute(scores, (2, 0, 3, 1))
    else:
        scores = tl.permute(scores, (0, 2, 3, 1))
    return tl.trans(tl.reshape(sum_of_last(scores, GROUPS), (BLOCK_S, BLOCK_H)))
