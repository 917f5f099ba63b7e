"""Scores of a tile by its threads, not by the matrix unit: fp32, which that unit would round.

What Triton makes of an fp32 `tl.dot` reads the operand that the sum runs along, eight threads at a
time, from one bank of shared memory. Here each thread multiplies what it has of the tile's rows in
registers. A tile is [C, S / 4, GROUPS, 4, 32], so that Triton spreads it like this: a thread has four features of a row side by side, eight lanes 32 of them, the lanes of a warp four rows, and the
warps other features of the same rows. A thread has these of every fourth row, for which it loads a
query once.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROWS = tl.constexpr(4)  # of the lanes of a warp
_LANES = tl.constexpr(8)  # of a row, in which the scores of as many heads are put together
_SPAN = tl.constexpr(32)  # features of a row in these lanes, four in each


@triton.jit
def spread_features(BLOCK_E: tl.constexpr, GROUPS: tl.constexpr):
    """The features of a tile, in order  # [C, 1, GROUPS, 1, 32]"""
    chunk = tl.arange(0, BLOCK_E // (GROUPS * _SPAN))[:, None, None, None, None]
    group = tl.arange(0, GROUPS)[None, None, :, None, None]
    return (chunk * GROUPS + group) * _SPAN + tl.arange(0, _SPAN)[None, None, None, None, :]


@triton.jit
def spread_rows(BLOCK_S: tl.constexpr):
    """The rows of a tile, in order  # [1, S / 4, 1, 4, 1]"""
    quad = tl.arange(0, BLOCK_S // _ROWS)[None, :, None, None, None]
    return quad * _ROWS + tl.arange(0, _ROWS)[None, None, None, :, None]


@triton.jit
def _sum_of_last(x, SIZE: tl.constexpr):
    """Sum over the last axis, of SIZE, which other warps have  # [ROWS]

    By moving halves into the registers of one thread: `tl.sum` would pass them through shared
    memory in an order that has up to 16 threads in one bank.
    """
    if SIZE == 1:
        return tl.reshape(x, (x.numel,))
    else:
        a, b = tl.split(tl.reshape(x, (x.numel // 2, 2)))
        return _sum_of_last(a + b, SIZE // 2)


@triton.jit
def flat(tile):
    """The same tile for a product over its rows  # [S, E]"""
    S: tl.constexpr = tile.shape[1] * tile.shape[3]
    E: tl.constexpr = tile.shape[0] * tile.shape[2] * tile.shape[4]
    return tl.reshape(tl.permute(tile, (1, 3, 0, 2, 4)), (S, E))


@triton.jit
def row_scores(
    query_ptr, stride_qh, stride_qe, first, tile, features, always, H: tl.constexpr,
    E: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Products of the rows with the queries of up to 16 heads from `first` on  # [BLOCK_H, S]

    `always` is true, but must not be known to be when the kernel is compiled: behind a condition
    Triton leaves the loads of the queries, which the first-level cache serves, where they are.
    Outside of one it moves them to before the loop, and then there are too many to keep.
    """
    C: tl.constexpr = tile.shape[0]
    QUADS: tl.constexpr = tile.shape[1]
    GROUPS: tl.constexpr = tile.shape[2]
    S: tl.constexpr = QUADS * _ROWS
    place = tl.arange(0, _LANES)[None, None, None, :]
    features = tl.broadcast_to(features, (C, 1, GROUPS, _ROWS, _SPAN))
    scores = tl.zeros((QUADS, GROUPS, _ROWS, _LANES), ACC)
    more = scores  # of heads for which there is no place left
    if always:
        for h in tl.static_range(H if H < BLOCK_H else BLOCK_H):
            query = tl.load(
                query_ptr + (first + h) * stride_qh + features * stride_qe,
                mask=(features < E) & (first + h < H),
                other=0.0,
            )
            score = tl.sum(tile.to(ACC) * query.to(ACC), axis=0)
            score = tl.reshape(score, (QUADS, GROUPS, _ROWS, _LANES, _SPAN // _LANES))
            score = tl.sum(tl.sum(score, axis=4), axis=3, keep_dims=True)
            if h < _LANES:
                scores = tl.where(place == h, score, scores)
            else:
                more = tl.where(place == h - _LANES, score, more)
    if BLOCK_H > _LANES:
        scores = tl.permute(tl.join(scores, more), (0, 2, 4, 3, 1))
    else:
        scores = tl.permute(scores, (0, 2, 3, 1))
    return tl.trans(tl.reshape(_sum_of_last(scores, GROUPS), (S, BLOCK_H)))
