"""Many tokens at once: sliding-window attention over ring and clip, then one write of the ring."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import dropout_seed
from ..operands import Weights
from .eight_bits import decode, quantise_tokens, unit_of
from .launch import constants_of, launch, little_memory
from .pieces import (
    LN2,
    LOG2E,
    accumulators,
    cast,
    dot,
    dot_precision,
    finite_or_zero,
    keep_scale,
    one_more_slot,
)
from .plan import cdiv, invariant_step_plan, steps_plan
from .project import linear as tiled_linear
from .ring_step import uncovered


@triton.jit
def token_in_slot(slots, newest, L: tl.constexpr):
    """The tokens that slots hold, counted from the clip's first one: -1 for the newest."""
    age = newest - slots
    return -1 - tl.where(age < 0, age + L, age)


@triton.jit
def oldest_in_ring(position, begin, L: tl.constexpr):
    """The first of a ring's tokens that tokens from `begin` on see, counted as in `token_in_slot`.

    All later ones are seen as well; 0 or more where none is.
    """
    return tl.maximum(-tl.minimum(position, L).to(tl.int32), begin - L + 1)


@triton.jit
def ring_tile(
    k_ring_ptr, v_ring_ptr, keys, offs_t, offs_d, mask_d, newest, L: tl.constexpr, D: tl.constexpr
):
    """Keys and values of tokens of the ring, who sees them [BLOCK_T, BLOCK_S], their slots, and
    which slots were read [BLOCK_S]: tokens are taken in order, for slots of others cost a tile.
    """
    there = keys < 0
    slots = newest + 1 + keys
    slots = tl.where(slots < 0, slots + L, slots)
    visible = there[None, :] & (keys[None, :] > offs_t[:, None] - L)
    offsets = slots[:, None] * D + offs_d[None, :]
    mask = there[:, None] & mask_d[None, :]
    k = tl.load(k_ring_ptr + offsets, mask=mask, other=0)
    v = tl.load(v_ring_ptr + offsets, mask=mask, other=0)
    return k, v, visible, slots, there


@triton.jit
def clip_tile(
    key_ptr, value_ptr, keys, offs_t, offs_d, mask_d, stride_kt, stride_vt, clip_end,
    L: tl.constexpr,
):  # fmt: skip
    """Keys and values of a clip's tokens, who sees them [BLOCK_T, BLOCK_S], and which were read."""
    there = keys < clip_end
    past = keys[None, :] <= offs_t[:, None]
    visible = there[None, :] & past & (keys[None, :] > offs_t[:, None] - L)
    rows = keys.to(tl.int64)[:, None]
    mask = there[:, None] & mask_d[None, :]
    k = tl.load(key_ptr + rows * stride_kt + offs_d[None, :], mask=mask, other=0)
    v = tl.load(value_ptr + rows * stride_vt + offs_d[None, :], mask=mask, other=0)
    return k, v, visible, there


@triton.jit
def _scale(scale_ptr, tokens, there, codes: tl.constexpr):
    """What the codes of a tile's rows stand for  # [BLOCK_S]"""
    return tl.load(scale_ptr + tokens, mask=there, other=0.0) * unit_of(codes)


@triton.jit
def _attend_tile(
    q, k, v, k_scale, v_scale, visible, keys, offs_t, m_i, l_i, acc, factor, scale, seed_ptr,
    stream, head, dropout_p, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Online softmax over one tile of keys: k, v [BLOCK_S, BLOCK_D], visible [BLOCK_T, BLOCK_S].

    The scales of codes, [BLOCK_S], go into scores and weights: into these over the largest one
    seen, `factor`, so that no weight underflows; `acc` has that factor taken out. On the matrix
    unit numbers that are not finite reach queries that do not see them, whose weight of zero does
    not help; codes do not, and nothing does where a single query has a tile to itself.
    """
    if k_scale is not None:
        k = decode(k, q.dtype)
        v = decode(v, q.dtype)
    if q.shape[0] == 1:
        scores = tl.sum(q.to(ACC) * k.to(ACC), axis=1)[None, :] * scale
    else:
        scores = tl.zeros((q.shape[0], k.shape[0]), ACC)
        scores = dot(q, tl.trans(k), scores, PRECISION) * scale
    if k_scale is not None:
        scores *= k_scale.to(ACC)[None, :]
    scores = tl.where(visible, scores, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(scores, axis=1))
    shift = finite_or_zero(m_new)
    alpha = tl.exp2(m_i - shift)
    weight = tl.exp2(scores - shift[:, None])
    l_i = l_i * alpha + tl.sum(weight, axis=1)
    if seed_ptr is not None:
        slots, rows = keys[None, :], offs_t[:, None]
        weight *= keep_scale(seed_ptr, slots, stream, head, rows, dropout_p).to(ACC)
    if v_scale is not None:
        finite = v_scale < float("inf")
        larger = tl.maximum(factor, tl.max(tl.where(finite, v_scale, 0.0), axis=0))
        divisor = tl.where(larger > 0.0, larger, 1.0)
        share = tl.where(finite, v_scale / divisor, float("nan"))
        weight = tl.where(visible, weight * share.to(ACC)[None, :], 0.0)
        alpha *= (factor / divisor).to(ACC)
        factor = larger
    acc *= alpha[:, None]
    if q.shape[0] == 1:
        acc += tl.sum(tl.trans(weight) * v.to(ACC), axis=0)[None, :]
    else:
        acc = dot(cast(weight, q.dtype), v, acc, PRECISION)
    return m_new, l_i, acc, factor


@triton.jit
def _load_query(
    query_ptr, q_ring_ptr, position, stride_qt, T, offs_t, offs_d, mask_d, stream, head,
    R: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The queries asked at the tokens `offs_t`  # [BLOCK_T, BLOCK_D]

    With a delay of R - 1 such a query is that of an earlier token, of this clip or of the ring.
    """
    DELAY: tl.constexpr = R - 1 if R > 0 else 0
    source = offs_t - DELAY
    q = tl.load(
        query_ptr + source.to(tl.int64)[:, None] * stride_qt + offs_d[None, :],
        mask=((source >= 0) & (offs_t < T))[:, None] & mask_d[None, :],
        other=0.0,
    )
    if R > 0:
        slot = (position + offs_t + 1) % R
        waiting = tl.load(
            q_ring_ptr + (stream * R + slot)[:, None] * E + (head * D + offs_d)[None, :],
            mask=((source < 0) & (offs_t < T))[:, None] & mask_d[None, :],
            other=0.0,
        )
        q = tl.where((source < 0)[:, None], waiting, q)
    return q


@triton.jit
def _attend_block(
    query_ptr, key_ptr, value_ptr, key_scale_ptr, value_scale_ptr, bias_k_ptr, bias_v_ptr,
    k_ring_ptr, v_ring_ptr, k_scale_ptr, v_scale_ptr, q_ring_ptr, sink_ptr, seed_ptr, out_ptr,
    lse_ptr, position, stride_qt, stride_kt, stride_vt, T, first, begin, stream, head, dropout_p,
    H: tl.constexpr, D: tl.constexpr, L: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, ADD_ZERO_ATTN: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The outputs of BLOCK_T tokens, from token `begin` on, and whether they were stored.

    They are not if something that is not finite may have reached too many of them; that of a single
    token is always. The pointers are those of one head of one stream, but for outputs and sink.
    """
    E: tl.constexpr = H * D
    offs_t = begin + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    q = _load_query(
        query_ptr, q_ring_ptr, position, stride_qt, T, offs_t, offs_d, mask_d, stream, head, R, E, D
    )
    CODES: tl.constexpr = k_ring_ptr.dtype.element_ty
    offs_s = tl.arange(0, BLOCK_S)
    scale = tl.full((), SCALE * LOG2E, ACC)
    rows = stream * (T - first) + offs_t - first
    m_i = tl.full((BLOCK_T,), float("-inf"), ACC)
    l_i = tl.zeros((BLOCK_T,), ACC)
    if ADD_ZERO_ATTN or sink_ptr is not None:  # a key without a value, seen before all others
        m_i = tl.zeros((BLOCK_T,), ACC)
        l_i = tl.full((BLOCK_T,), 1.0, ACC)
    if sink_ptr is not None:
        m_i = tl.load(sink_ptr + rows * H + head, mask=offs_t < T, other=0.0).to(ACC)
        m_i *= tl.full((), LOG2E, ACC)
    acc = tl.zeros((BLOCK_T, BLOCK_D), ACC)
    factor = tl.full((), 0.0, tl.float32)
    newest = ((position + L - 1) % L).to(tl.int32)
    oldest = oldest_in_ring(position, begin, L)
    for start in tl.range(oldest, 0, BLOCK_S, num_stages=STAGES):
        keys = start + offs_s
        k, v, visible, slots, there = ring_tile(
            k_ring_ptr, v_ring_ptr, keys, offs_t, offs_d, mask_d, newest, L, D
        )
        k_scale = None
        v_scale = None
        if k_scale_ptr is not None:
            k_scale = _scale(k_scale_ptr, slots, there, CODES)
            v_scale = _scale(v_scale_ptr, slots, there, CODES)
        m_i, l_i, acc, factor = _attend_tile(
            q, k, v, k_scale, v_scale, visible, keys + L, offs_t, m_i, l_i, acc, factor, scale,
            seed_ptr, stream, head, dropout_p, PRECISION, ACC,
        )  # fmt: skip
    clip_end = tl.minimum(begin + BLOCK_T, T)
    for start in tl.range(tl.maximum(begin - L + 1, 0), clip_end, BLOCK_S, num_stages=STAGES):
        keys = start + offs_s
        k, v, visible, there = clip_tile(
            key_ptr, value_ptr, keys, offs_t, offs_d, mask_d, stride_kt, stride_vt, clip_end, L
        )
        k_scale = None
        v_scale = None
        if key_scale_ptr is not None:
            k_scale = _scale(key_scale_ptr, keys, there, CODES)
            v_scale = _scale(value_scale_ptr, keys, there, CODES)
        m_i, l_i, acc, factor = _attend_tile(
            q, k, v, k_scale, v_scale, visible, keys + L, offs_t, m_i, l_i, acc, factor, scale,
            seed_ptr, stream, head, dropout_p, PRECISION, ACC,
        )  # fmt: skip
    if k_scale_ptr is not None:
        acc *= factor.to(ACC)
    trusted = True
    mask_t = offs_t < T
    if BLOCK_T > 1 and k_scale_ptr is None:
        trusted = tl.sum(tl.abs(acc)) < float("inf")
        mask_t = offs_t < tl.where(trusted, T, 0)

    if bias_k_ptr is not None:
        k_bias = tl.load(bias_k_ptr + head * D + offs_d, mask=mask_d, other=0.0).to(ACC)
        v_bias = tl.load(bias_v_ptr + head * D + offs_d, mask=mask_d, other=0.0).to(ACC)
        score = tl.sum(q.to(ACC) * k_bias[None, :], axis=1) * scale
        keep = tl.full((), 1.0, ACC)
        if seed_ptr is not None:
            keep = keep_scale(seed_ptr, L + T, stream, head, offs_t, dropout_p).to(ACC)
        m_i, l_i, _, acc, weight = one_more_slot(m_i, l_i, 0.0, acc, score, keep)
        acc += weight[:, None] * v_bias[None, :]
    if lse_ptr is not None:
        lse = m_i * tl.full((), LN2, ACC) + tl.log(l_i)
        tl.store(lse_ptr + rows * H + head, lse, mask=mask_t)
    tl.store(
        out_ptr + rows[:, None] * E + (head * D + offs_d)[None, :],
        cast(acc / l_i[:, None], out_ptr.dtype.element_ty),
        mask=mask_t[:, None] & mask_d[None, :],
    )
    return trusted


@triton.jit
def ring_steps_kernel(
    query_ptr, key_ptr, value_ptr, key_scale_ptr, value_scale_ptr, bias_k_ptr, bias_v_ptr,
    k_ring_ptr, v_ring_ptr, k_scale_ptr, v_scale_ptr, q_ring_ptr, position_ptr, sink_ptr, seed_ptr,
    out_ptr, lse_ptr, stride_qn, stride_qt, stride_kn, stride_kt, stride_vn, stride_vt, T, first,
    dropout_p,
    H: tl.constexpr, D: tl.constexpr, L: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ONE: tl.constexpr,
    ADD_ZERO_ATTN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One program: the outputs of BLOCK_T tokens of one head of one stream.

    Reads those slots of the ring and tokens of the clip that its tokens see: about
    2 * D * (L + BLOCK_T) elements. BLOCK_T rows share every key, which makes the products matter
    more than the bytes, so the blocks are those of the matrix unit. Slots without a value come as
    the score of `sink_ptr`, and what a backward needs goes to `lse_ptr`, where they are given. Keys
    and values may be codes, of ring and clip alike, whose scales stand in `*_scale_ptr`. Tokens
    that something not finite may have reached in vain are computed again one by one: slow, but
    little for those whose numbers are finite.
    """
    blocks = tl.cdiv(T - first, BLOCK_T)
    program = tl.program_id(0)
    block = program % blocks
    head = program // blocks % H
    stream = (program // (blocks * H)).to(tl.int64)
    begin = first + block * BLOCK_T
    position = tl.load(position_ptr + stream)
    query_ptr += stream * stride_qn + head * D
    key_ptr += stream * stride_kn + head * D
    value_ptr += stream * stride_vn + head * D
    k_ring_ptr += (stream * H + head) * (L * D)
    v_ring_ptr += (stream * H + head) * (L * D)
    if k_scale_ptr is not None:
        key_scale_ptr += (stream * H + head) * T
        value_scale_ptr += (stream * H + head) * T
        k_scale_ptr += (stream * H + head) * L
        v_scale_ptr += (stream * H + head) * L
    stored = _attend_block(
        query_ptr, key_ptr, value_ptr, key_scale_ptr, value_scale_ptr, bias_k_ptr, bias_v_ptr,
        k_ring_ptr, v_ring_ptr, k_scale_ptr, v_scale_ptr, q_ring_ptr, sink_ptr, seed_ptr, out_ptr,
        lse_ptr, position, stride_qt, stride_kt, stride_vt, T, first, begin, stream, head,
        dropout_p, H, D, L, R, BLOCK_T, BLOCK_S, BLOCK_D, ADD_ZERO_ATTN, STAGES, PRECISION, SCALE,
        ACC,
    )  # fmt: skip
    if k_scale_ptr is None:
        end = tl.where(stored, begin, tl.minimum(begin + BLOCK_T, T))
        for t in range(begin, end):
            _attend_block(
                query_ptr, key_ptr, value_ptr, None, None, bias_k_ptr, bias_v_ptr, k_ring_ptr,
                v_ring_ptr, None, None, q_ring_ptr, sink_ptr, seed_ptr, out_ptr, lse_ptr, position,
                stride_qt, stride_kt, stride_vt, T, first, t, stream, head, dropout_p, H, D, L, R,
                1, BLOCK_ONE, BLOCK_D, ADD_ZERO_ATTN, 1, PRECISION, SCALE, ACC,
            )  # fmt: skip


# What one program of it copies.
WRITE_TOKENS = 16
WRITE_FEATURES = 128


@triton.jit
def _write_rings_kernel(
    query_ptr, key_ptr, value_ptr, key_scale_ptr, value_scale_ptr, k_ring_ptr, v_ring_ptr,
    k_scale_ptr, v_scale_ptr, q_ring_ptr, position_ptr, stride_qn, stride_qt, stride_kn, stride_kt,
    stride_vn, stride_vt, T,
    H: tl.constexpr, D: tl.constexpr, L: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T of the last tokens of one stream, BLOCK_E features, into their slots.

    Reads and writes 2 * BLOCK_T * BLOCK_E elements, 3 where queries wait; a plain copy. Whoever
    copies the first feature of a head copies its scales too.
    """
    E: tl.constexpr = H * D
    kept = tl.minimum(T, L if L > R else R)
    blocks = tl.cdiv(kept, BLOCK_T)
    stream = (tl.program_id(0) // blocks).to(tl.int64)
    offs_t = T - kept + tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    position = tl.load(position_ptr + stream)
    rows = offs_t.to(tl.int64)[:, None]
    mask = (offs_t < T)[:, None] & (offs_e < E)[None, :]
    mask_ring = mask & (offs_t >= T - L)[:, None]
    slot = (position + offs_t) % L
    to = ((stream * H + offs_e // D)[None, :] * L + slot[:, None]) * D + (offs_e % D)[None, :]
    key = tl.load(key_ptr + stream * stride_kn + rows * stride_kt + offs_e[None, :], mask_ring)
    value = tl.load(value_ptr + stream * stride_vn + rows * stride_vt + offs_e[None, :], mask_ring)
    tl.store(k_ring_ptr + to, key, mask_ring)
    tl.store(v_ring_ptr + to, value, mask_ring)
    if k_scale_ptr is not None:
        mask_head = mask_ring & (offs_e % D == 0)[None, :]
        row = (stream * H + offs_e // D)[None, :]
        token = row * T + rows
        to = row * L + slot[:, None]
        tl.store(k_scale_ptr + to, tl.load(key_scale_ptr + token, mask_head), mask_head)
        tl.store(v_scale_ptr + to, tl.load(value_scale_ptr + token, mask_head), mask_head)
    if R > 0:
        mask_wait = mask & (offs_t >= T - R)[:, None]
        to = (stream * R + (position + offs_t) % R)[:, None] * E + offs_e[None, :]
        query_ptr += stream * stride_qn
        query = tl.load(query_ptr + rows * stride_qt + offs_e[None, :], mask_wait)
        tl.store(q_ring_ptr + to, query, mask_wait)


def why_not(*args: Any) -> str | None:
    """None if this module covers a call of `ring_steps_`, else the reason why not."""
    return uncovered(*args[:14], position=args[14], scales=args[19:21])


def ring_steps_(
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
    first: int,
    add_zero_attn: bool,
    dropout_p: float,
    update: bool,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """T steps of N streams at once: the outputs (N, T - first, E) of the tokens from `first` on.

    Shapes: `query` (N, T, E), `key` (N, T, Ek), `value` (N, T, Ev), any strides; the others as in
    `ring_step_`; `k_scale` and `v_scale` (N, H, L, 1) fp32 if the rings are of 8 bits. If `update`,
    the last tokens are written into the rings and `position` advances by T. Covered: what `why_not`
    answers None to.
    """
    (N, H, L, D), T, R = k_ring.shape, query.shape[1], q_ring.shape[1]
    E = H * D
    linear = F.linear
    if batch_invariant:
        linear = partial(tiled_linear, plan=invariant_step_plan(E, H, L, query.element_size()))
    weights = Weights(in_proj_weight, k_proj_weight, v_proj_weight, in_proj_bias,
                      out_proj_weight, out_proj_bias, bias_k, bias_v)  # fmt: skip
    query, key, value = weights.project((query, key, value), linear)
    key_scale = value_scale = None
    if k_scale is not None:
        key, key_scale = quantise_tokens(key, H, k_ring.dtype)
        value, value_scale = quantise_tokens(value, H, v_ring.dtype)
    clip, rings = (key, value, key_scale, value_scale), (k_ring, v_ring, k_scale, v_scale)
    sizes = (T - first, D, query.element_size())
    little = little_memory(query)
    plan = steps_plan(*sizes, dropout_p > 0.0, codes=k_scale is not None, little=little)
    out = query.new_empty((N, T - first, E))
    _, acc = accumulators(query.dtype)
    strides = (*query.stride()[:2], *key.stride()[:2], *value.stride()[:2])
    args = (
        query, *clip, bias_k, bias_v, *rings, q_ring, position, None,
        dropout_seed(dropout_p, query.device), out, None, *strides, T, first, dropout_p,
    )  # fmt: skip
    constants = constants_of(
        H, D, L, R, plan.block_t, plan.block_s, plan.block_d, plan.block_one, bool(add_zero_attn),
        plan.stages, dot_precision(plan.whole), D**-0.5, acc,
    )  # fmt: skip
    programs = N * H * cdiv(T - first, plan.block_t)
    launch(ring_steps_kernel, (programs, 1, 1), args, constants, num_warps=plan.num_warps)
    out = linear(out, out_proj_weight, out_proj_bias)
    if update and T:  # last: until then the tokens have not been taken, whatever fails
        blocks = cdiv(min(T, max(L, R)), WRITE_TOKENS)
        args = (query, *clip, *rings, q_ring, position, *strides, T)
        constants = constants_of(H, D, L, R, WRITE_TOKENS, WRITE_FEATURES)
        grid = (N * blocks, cdiv(E, WRITE_FEATURES), 1)
        launch(_write_rings_kernel, grid, args, constants, num_warps=4)
        position.add_(T)
    return out
