"""A step over keys and values that makes rings of its own, as one node of autograd on the CPU."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native, backends, mixing, reference
from .clip_node import without_autocast
from .modes import is_batched, is_opaque, is_transformed
from .precision import wide
from .products import linear, multiply
from .reference import Options, Rings, Tokens, Weights, filled, put, split_heads, take

NO_GRADIENT = "a gradient is needed, for which it has no kernel"
_OPTIONS = (False, 0.0, True)  # no slot of zeros, no dropout, and the rings are written to


def step(
    tokens: Tokens, rings: Rings, active: Tensor | None, weights: Weights
) -> tuple[Tensor, Rings]:
    """``reference.ring_step`` by the CPU library's step, where nothing speaks against it."""
    query, key, value = tokens
    position = rings.position.clone()
    others = (None if key is query else key, None if value is query else value)
    given = (query, *others, *rings[:2], *weights[:6])
    out, k, v = _Step.apply(active, rings.q, position, *given)
    return out, Rings(k, v, rings.q, position)


def why_not(
    tokens: Tokens, rings: Rings, active: Tensor | None, weights: Weights, options: Options
) -> str | None:
    """Why ``step`` does not serve; None if it does."""
    query = tokens[0]
    if backends.order(query.device.type)[0] != "cpu":
        return NO_GRADIENT
    if reason := mixing.why_plain(query):
        return reason
    if is_opaque(query):
        return "torch.compile looks into its operators"
    waiting = rings.q.shape[1] > 0
    if waiting or weights.bias_k is not None or options.add_zero_attn or options.dropout_p > 0.0:
        return f"{NO_GRADIENT} beside extra slots, dropout or queries that wait"
    return backends.why_not("cpu", "ring_step_", (*tokens, *weights, *rings, active, *_OPTIONS))


class _Given(NamedTuple):
    """What the gradients need, besides the rings with the token."""

    query: Tensor
    key: Tensor | None  # None for the query
    value: Tensor | None
    k_ring: Tensor  # before the token
    v_ring: Tensor
    in_proj_weight: Tensor
    k_proj_weight: Tensor | None
    v_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None

    def tokens(self) -> Tokens:
        query = self.query
        key = query if self.key is None else self.key
        return query, key, query if self.value is None else self.value

    def weights(self) -> Weights:
        return Weights(*self[5:], None, None)


class _Step(torch.autograd.Function):
    """The output and the rings with the token; ``position`` goes on in place.

    From single operators autograd would have to follow some thirty, where time is short.
    """

    @staticmethod
    def forward(
        ctx: Any, active: Tensor | None, q_ring: Tensor, position: Tensor, *given: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = _Given(*given)
        before = position.clone()
        k, v = found.k_ring.clone(), found.v_ring.clone()
        rings = (k, v, q_ring, position)
        function = _native.cpu_function("ring_step_")
        out = function(*found.tokens(), *found.weights(), *rings, active, *_OPTIONS)
        ctx.save_for_backward(q_ring, before, k, v, *given)
        ctx.set_materialize_grads(False)
        return out, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q_ring, before, k, v, *saved = ctx.saved_tensors
        given, needed = _Given(*saved), ctx.needs_input_grad[3:]
        with without_autocast("cpu"):
            # the former with create_graph
            if torch.is_grad_enabled() or is_transformed() or any(map(is_batched, grads)):
                found = _gradients_by_operators(given, q_ring, before, grads, needed)
            else:
                found = _gradients(given, before, k, v, grads, _Given._make(needed))
        return None, None, None, *found


def _gradients(
    given: _Given,
    position: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    grads: tuple[Tensor | None, ...],
    needed: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``given``, of those that need one."""
    weights = given.weights()
    (w_q, w_k, w_v), (b_q, _, _) = weights.split(), weights.split_bias()
    d_out, d_k_ring, d_v_ring = grads
    N, H, L, D = k_ring.shape
    if d_out is None:
        d_out = given.query.new_zeros(N, H * D)
    slot = (position % L)[:, None]
    visible = filled(position, L)  # (N, 1, 1, L)
    keys, values = k_ring, v_ring
    scale = 1.0 / math.sqrt(D)
    q = split_heads(linear(given.query, w_q, b_q).unsqueeze(1), H) * scale  # (N, H, 1, D)
    if visible is not None:  # what nobody sees may hold anything
        unseen = ~visible.transpose(-1, -2)
        keys, values = keys.masked_fill(unseen, 0.0), values.masked_fill(unseen, 0.0)
    scores = torch.matmul(q, keys.transpose(-1, -2))
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    attn = torch.softmax(scores, dim=-1, dtype=wide(scores.dtype))

    d_heads = split_heads(multiply(d_out, weights.out_proj_weight).unsqueeze(1), H)
    d_attn = torch.matmul(d_heads, values.transpose(-1, -2)).to(attn.dtype)
    d_scores = torch._softmax_backward_data(d_attn, attn, -1, attn.dtype).to(q.dtype)
    attn = attn.to(q.dtype)
    d_w_o = d_b_o = None
    if needed.out_proj_weight:
        heads = torch.matmul(attn, values).view(N, H * D)
        d_w_o = multiply(d_out.t(), heads, out=torch.empty_like(weights.out_proj_weight))
    if needed.out_proj_bias:
        d_b_o = d_out.sum(0)
    d_q = torch.matmul(d_scores, keys).view(N, H * D) * scale
    d_k, d_k_ring = _of_ring(d_scores, q, d_k_ring, slot, needed.k_ring)
    d_v, d_v_ring = _of_ring(attn, d_heads, d_v_ring, slot, needed.v_ring)

    of_bias = torch.cat([d_q, d_k, d_v], dim=-1)
    d_b_in = of_bias.sum(0) if needed.in_proj_bias else None
    if given.key is None and given.value is None and given.k_proj_weight is None:
        d_query = multiply(of_bias, given.in_proj_weight) if needed.query else None
        d_w_in = None
        if needed.in_proj_weight:
            d_w_in = torch.empty_like(given.in_proj_weight)
            multiply(of_bias.t(), given.query, out=d_w_in)
        return d_query, None, None, d_k_ring, d_v_ring, d_w_in, None, None, d_b_in, d_w_o, d_b_o
    tokens, parts = given.tokens(), (d_q, d_k, d_v)
    of_tokens = [multiply(d, w) for d, w in zip(parts, (w_q, w_k, w_v), strict=True)]
    of_weights = [multiply(d.t(), x) for d, x in zip(parts, tokens, strict=True)]
    if given.key is None:
        of_tokens[0] += of_tokens[1]
    if given.value is None:
        of_tokens[0] += of_tokens[2]
    if given.k_proj_weight is None:
        of_weights = [torch.cat(of_weights)]
    found = (*of_tokens, d_k_ring, d_v_ring, *of_weights, *(None,) * (3 - len(of_weights)))
    found = (*found, d_b_in, d_w_o, d_b_o)
    return tuple(x if need else None for x, need in zip(found, needed, strict=True))


def _of_ring(
    weight: Tensor, vector: Tensor, given: Tensor | None, slot: Tensor, needed: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the new token ``(N, E)`` and, if needed, of a ring as it was before.

    Args:
        weight: of each slot, ``(N, H, 1, L)``.
        vector: by which slots are weighted, ``(N, H, 1, D)``.
        given: the gradient of the ring with the token, from later steps.
        slot: of the token, ``(N, 1)``.
        needed: whether the ring needs one.
    """
    if not needed:
        weight = take(weight.transpose(-1, -2), slot)
        of_token = weight * vector
        of_token = of_token if given is None else of_token + take(given, slot)
        return of_token.flatten(1), None
    whole = weight.transpose(-1, -2) * vector
    whole = whole if given is None else whole.add_(given)
    of_token = take(whole, slot)
    return of_token.flatten(1), put(whole, slot, torch.zeros_like(of_token))


def _gradients_by_operators(
    given: _Given,
    q_ring: Tensor,
    position: Tensor,
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The same by operators that can be differentiated and transformed, from the arguments on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        views: list[Any] = [None if x is None else x.view_as(x) for x in given]
        given = _Given(*views)
        rings = Rings(given.k_ring, given.v_ring, q_ring, position)
        out, after = reference.ring_step(*given.tokens(), given.weights(), rings)
        results = zip((out, after.k, after.v), grads, strict=True)
        followed = [(x, grad) for x, grad in results if grad is not None]
        outs, grads_of_outs = zip(*followed, strict=True)
        wanted = [x for x, need in zip(views, needed, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                outs, wanted, grads_of_outs, create_graph=create_graph, allow_unused=True
            )
        )
    return tuple(next(found) if need else None for need in needed)
