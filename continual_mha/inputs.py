"""One query over the inputs themselves: over a clip, and step by step over a ring of tokens.

Plain PyTorch, as ``reference.py``, which has the same over keys and values. The mathematics is in
docs/formulations.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import extra_slots
from .operands import Options, Rings, Tokens, Weights
from .precision import wide
from .products import linear, matmul, multiply
from .quantized import QuantizedRing, as_kept, shape_of
from .reference import (
    Put,
    filled,
    last_positions,
    put,
    put_,
    put_slots_,
    ring_steps,
    saved_slots,
    shared_scores,
    split_heads,
    take,
    token_before,
)


class Inputs(NamedTuple):
    """The parts of a state of inputs that an operator sees."""

    x: Any  # (N, L, E), a tensor or a QuantizedRing
    position: Tensor  # (N,)


class Mix(NamedTuple):
    """What a mixing of a clip's inputs gives; ``on_extra`` and ``attn`` are as in ``_Attended``.

    Attributes:
        inputs: their weighted sums, ``(N, H, Ev)``.
        share: the sum of the clip's weights, ``(N, H, 1)``; None for 1.
    """

    inputs: Tensor
    share: Tensor | None
    on_extra: Tensor | None
    attn: Tensor | None


# Moved queries (N, H, Ek), keys (N, S, Ek), values (N, S, Ev), mask, scores of the extra slots,
# dropout, whether the weights are asked for, and `blank` of `attend_clip`.
Mixing = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float, bool, bool], Mix]


class _Attended(NamedTuple):
    """What a query got from a clip.

    Attributes:
        heads: ``(N, H, D)``, the extra slots aside.
        on_extra: weights of the extra slots, ``(N, H, X)``, or None.
        attn: all weights averaged over the heads, ``(N, S + X)``, or of each, or None.
    """

    heads: Tensor
    on_extra: Tensor | None
    attn: Tensor | None


def input_step(
    token: Tensor,
    weights: Weights,
    inputs: Inputs,
    num_heads: int,
    delay: int,
    active: Tensor | None = None,
    add_zero_attn: bool = False,
    dropout_p: float = 0.0,
    put: Put = put,
    mixing: Mixing | None = None,
) -> tuple[Tensor, Inputs]:
    """``reference.ring_step`` over a ring of inputs: write the token, attend to it as to a clip.

    The query of an output is that of the token ``delay`` steps before, read from the ring.
    """
    position, length = inputs.position, shape_of(inputs.x)[-2]
    kept = put(inputs.x, (position % length)[:, None], token.unsqueeze(1))
    x = kept.to(token.dtype)
    asked = token_before(x, position, delay) if delay else token
    mask = mask_of_ring(position, length, token.dtype)
    options = Options(add_zero_attn, dropout_p)
    out, _ = attend_clip((asked, x, x), weights, num_heads, options, mask, mixing=mixing)
    ahead = 1 if active is None else active.to(torch.int64)
    return out, Inputs(kept, position + ahead)


def mask_of_ring(position: Tensor, sequence_len: int, dtype: torch.dtype) -> Tensor | None:
    """The mask ``(N, 1, L)`` of a ring once the token at ``position`` is written; None if full."""
    visible = filled(position, sequence_len)
    return None if visible is None else _hide(~visible[:, 0], dtype)


def input_steps(
    tokens: Tensor,
    weights: Weights,
    inputs: Inputs,
    num_heads: int,
    delay: int,
    attend: Callable[[Tensor, Tensor, Rings], Tensor],
    put: Put | None = put,
) -> tuple[Tensor, Inputs]:
    """The same for many tokens ``(N, T, E)``: then keys and values are worth projecting.

    Args:
        attend: what ``reference.ring_steps`` answers to queries, keys and rings, which it leaves
            as they are.
        put: None leaves the ring as it is.
    """
    kept, position, length = inputs.x, inputs.position, shape_of(inputs.x)[-2]
    seen = as_kept(kept, tokens)
    held = Inputs(kept.to(tokens.dtype), position)
    asked = seen if delay else tokens  # a query that waits is asked from the ring
    out = attend(asked, seen, projected_rings(held, weights, num_heads, delay))
    if put is None:
        return out, inputs
    slot = last_positions(position, tokens.shape[1], length) % length
    kept = put(kept, slot, tokens[:, -slot.shape[1] :])
    return out, Inputs(kept, position + tokens.shape[1])


def projected_rings(inputs: Inputs, weights: Weights, num_heads: int, delay: int) -> Rings:
    """The rings of keys and values that hold the same tokens as a ring of inputs."""
    x, position = inputs
    if torch.is_grad_enabled():  # NaN that no window sees would be in the gradients of weights
        slot = (position % x.shape[-2])[:, None]
        x = put(x, slot, torch.zeros_like(take(x, slot)))
    (w_q, w_k, w_v), (b_q, b_k, b_v) = weights.split(), weights.split_bias()
    k, v = (
        split_heads(linear(x, w, b), num_heads).contiguous() for w, b in ((w_k, b_k), (w_v, b_v))
    )
    waiting = delay + 1 if delay else 0
    q_ring = k.new_zeros(x.shape[0], waiting, x.shape[2])
    if waiting:
        at = position[:, None] + torch.arange(-delay, 0, device=x.device)
        known = take(x, at % x.shape[-2])
        # a token that never was is one of zeros, as in a single step
        known = linear(known.masked_fill((at < 0).unsqueeze(-1), 0), w_q, b_q)
        q_ring = put(q_ring, at % waiting, known)
    return Rings(k, v, q_ring, position)


def _arguments(args: tuple[Any, ...]) -> tuple[Weights, Inputs]:
    """Weights and state among the arguments behind the tokens."""
    in_proj_weight, in_proj_bias, *others = args[:6]
    x_ring, position = args[6:8]
    (x_scale,) = args[14:15] or (None,)
    inputs = Inputs(x_ring if x_scale is None else QuantizedRing(x_ring, x_scale), position)
    return Weights(in_proj_weight, None, None, in_proj_bias, *others), inputs


def input_steps_(query: Tensor, *args: Any) -> Tensor:
    """Operator ``input_steps_``: ``input_steps`` in place."""
    weights, inputs = _arguments(args)
    num_heads, delay, first, add_zero_attn, dropout_p, update = args[8:14]

    def attend(asked: Tensor, seen: Tensor, rings: Rings) -> Tensor:
        options = (first, add_zero_attn, dropout_p)
        return ring_steps(asked, seen, seen, weights, rings, *options, put=None)[0]

    sizes = (num_heads, delay)
    out, new = input_steps(query, weights, inputs, *sizes, attend, put_ if update else None)
    if update:
        inputs.position.copy_(new.position)
    return out


def input_step_(query: Tensor, *args: Any) -> Tensor:
    """Operator ``input_step_``: ``input_step`` in place."""
    weights, inputs = _arguments(args)
    position = inputs.position
    num_heads, delay, active, add_zero_attn, dropout_p, update = args[8:14]
    saved = None if update else saved_slots([inputs.x], position)
    out, new = input_step(
        query, weights, inputs, num_heads, delay, active, add_zero_attn, dropout_p, put_
    )
    if saved is None:
        position.copy_(new.position)
        return out
    for ring, old in saved:
        put_slots_(ring, position, 0, old)
    return out


def single_query(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor]:
    """Operator ``single_query``: ``attend_clip`` without dropout, in one call."""
    weights, (mask, num_heads, add_zero_attn, need_weights) = Weights(*args[:8]), args[8:]
    options = Options(add_zero_attn, 0.0)
    tokens = (query, key, value)
    blank = not need_weights
    out, attn = attend_clip(tokens, weights, num_heads, options, mask, need_weights, blank)
    return out, out.new_empty(0, dtype=wide(out.dtype)) if attn is None else attn


def attend_clip(
    tokens: Tokens,
    weights: Weights,
    num_heads: int,
    options: Options,
    mask: Tensor | None = None,
    need_weights: bool = False,
    blank: bool = True,
    moved: bool = True,
    mixing: Mixing | None = None,
    average: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one query per stream over a clip.

    Args:
        tokens: the query ``(N, E)``, keys ``(N, S, Ek)`` and values ``(N, S, Ev)``.
        mask: float, added to the scores, broadcastable to ``(N, H, S)``.
        need_weights: also return the attention weights, after dropout.
        blank: whether a query to which the mask leaves nothing gets zeros, and not NaN.
        moved: whether to move the key and value projections to the query's side, which is the same
            in exact arithmetic.
        mixing: does the attention over inputs; None for ``plain_mix``.
        average: whether to average the weights over the heads; if not, ``mixing`` must be None.

    Returns:
        ``(N, E)``, and the weights averaged over the heads, ``(N, S + extra slots)``, or those of
        each head, ``(N, H, S + extra slots)``, or None.
    """
    query, key, value = tokens
    weights = weights.unpacked()
    w_q, b_q = weights.split()[0], weights.split_bias()[0]
    q = linear(query, w_q, b_q).unflatten(-1, (num_heads, -1))
    asked = (options, mask, need_weights, blank)
    if moved:
        mixing = mixing or partial(plain_mix, average=average)
        found = _attend_inputs(q, key, value, weights, *asked, mixing)
    else:
        found = _attend_projected(q, key, value, weights, *asked, average)
    heads, on_extra, attn = found
    heads = extra_slots.with_bias(heads, on_extra, weights)
    out = linear(heads.flatten(1), weights.out_proj_weight, weights.out_proj_bias)
    return out, attn


def _normalise(scores: Tensor, extra: Tensor | None, dropout_p: float, blank: bool) -> Tensor:
    """Weights ``(N, H, S + X)`` from the scores of the clip and of the extra slots.

    A query to which the masks leave nothing gets zeros if ``blank``, else NaN.
    """
    if extra is not None:
        scores = torch.cat([scores, extra.to(scores.dtype)], dim=-1)
    hidden = torch.isneginf(scores).all(dim=-1, keepdim=True) if blank else None
    if hidden is not None:
        scores = scores.masked_fill(hidden, 0.0)  # no NaN in the gradient either
    attn = torch.softmax(scores, dim=-1)
    attn = attn if hidden is None else attn.masked_fill(hidden, 0.0)
    return F.dropout(attn, dropout_p) if dropout_p > 0.0 else attn


def _attend_projected(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    options: Options,
    mask: Tensor | None,
    need_weights: bool,
    blank: bool,
    average: bool,
) -> _Attended:
    """Attention over projected keys and values, for queries ``(N, H, D)`` yet to be scaled."""
    (_, w_k, w_v), (_, b_k, b_v) = weights.split(), weights.split_bias()
    q = q / math.sqrt(q.shape[-1])
    k = split_heads(linear(key, w_k, b_k), q.shape[1])  # (N, H, S, D)
    v = split_heads(linear(value, w_v, b_v), q.shape[1])
    scores = matmul(k, q.unsqueeze(-1)).squeeze(-1)
    scores = scores.to(wide(scores.dtype))
    scores = scores if mask is None else scores + mask
    extra = extra_slots.scores_of(q, weights, options.add_zero_attn)
    attn = _normalise(scores, extra, options.dropout_p, blank and mask is not None)
    on_clip, on_extra = attn.split([key.shape[1], attn.shape[2] - key.shape[1]], dim=-1)
    heads = matmul(on_clip.unsqueeze(-2).to(v.dtype), v).squeeze(-2)
    asked_for = _asked_for(attn, need_weights, average)
    return _Attended(heads, None if extra is None else on_extra, asked_for)


def _attend_inputs(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    options: Options,
    mask: Tensor | None,
    need_weights: bool,
    blank: bool,
    mixing: Mixing,
) -> _Attended:
    """As ``_attend_projected``, with the projections of key and value moved to the query's side.

    ``q · (W x + b) = (Wᵀ q) · x + q · b``: the second term is the same for every token of the clip,
    so it is taken off the extra slots' scores instead, and drops out where there are none.
    """
    (_, w_k, w_v), (_, b_k, b_v) = weights.split(), weights.split_bias()
    extra = extra_slots.moved_scores_of(q, weights, b_k, options.add_zero_attn)
    asked = (options.dropout_p, need_weights, blank)
    mix = mixing(moved_queries(q, w_k), key, value, mask, extra, *asked)
    found = projected_mix(mix.inputs, mix.share, w_v, b_v)
    return _Attended(found, mix.on_extra, mix.attn)


def moved_queries(q: Tensor, w_k: Tensor) -> Tensor:
    """Queries ``(N, H, D)``, scaled and with the keys' projection moved to them: ``(N, H, Ek)``."""
    by_head = w_k.view(*q.shape[1:], w_k.shape[1])
    scale = 1.0 / math.sqrt(q.shape[2])
    moved = multiply(q.transpose(0, 1), by_head, scale=scale)
    return moved.transpose(0, 1)


def projected_mix(
    mixed: Tensor,
    share: Tensor | None,
    w_v: Tensor,
    b_v: Tensor | None,
) -> Tensor:
    """Heads' outputs ``(N, H, D)`` from their mixed inputs ``(N, H, Ev)``, of weights ``share``."""
    heads = (mixed.shape[1], w_v.shape[0] // mixed.shape[1])
    mixed, w_v = mixed.transpose(0, 1), w_v.view(*heads, w_v.shape[1]).transpose(1, 2)
    bias = None if b_v is None else b_v.view(heads)
    if bias is None or share is None:
        return multiply(mixed, w_v, bias).transpose(0, 1)
    found = multiply(mixed, w_v).transpose(0, 1)
    return found + bias * share.to(mixed.dtype)


def plain_mix(
    moved: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    extra: Tensor | None,
    dropout_p: float,
    need_weights: bool,
    blank: bool,
    average: bool = True,
) -> Mix:
    """Attention over inputs step by step, every step one that autograd knows."""
    blank = blank and mask is not None
    attn = _normalise(shared_scores(moved, key, mask), extra, dropout_p, blank)
    on_clip, on_extra = attn.split([key.shape[1], attn.shape[2] - key.shape[1]], dim=-1)
    plain = extra is None and dropout_p == 0.0
    share = None if plain and not blank else on_clip.sum(-1, keepdim=True)
    if plain and share is not None:  # exactly 1, as where there is no mask; or 0
        share = share > 0
    return Mix(
        matmul(on_clip.to(value.dtype), value),
        share,
        None if extra is None else on_extra,
        _asked_for(attn, need_weights, average),
    )


def _asked_for(attn: Tensor, need_weights: bool, average: bool) -> Tensor | None:
    """Of all weights ``(N, H, S + X)`` what is to be returned."""
    if not need_weights:
        return None
    return attn.mean(1) if average else attn


def _hide(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores: minus infinity where ``hidden``."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(
        hidden, -math.inf
    )
