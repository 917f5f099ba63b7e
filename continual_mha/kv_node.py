"""A step over keys and values that makes rings of its own, as one node of autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native, backends, extra_slots, reference, windows
from .operands import Options, Rings, Tokens, Weights, of_each
from .products import Multiply, linear, multiplier, sum_over_tokens
from .step_node import Step, StepWay, why_no_step_node


class Given(NamedTuple):
    """What a node over keys and values is given and needs for the gradients."""

    query: Tensor
    key: Tensor | None  # None for the query
    value: Tensor | None
    k_ring: Tensor  # before the tokens
    v_ring: Tensor
    in_proj_weight: Tensor
    k_proj_weight: Tensor | None
    v_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    bias_k: Tensor | None = None
    bias_v: Tensor | None = None
    q_ring: Tensor | None = None  # None where no query waits

    def tokens(self) -> Tokens:
        query = self.query
        key = query if self.key is None else self.key
        return query, key, query if self.value is None else self.value

    def weights(self) -> Weights:
        return Weights(*self[5:13])

    def rings(self) -> tuple[Tensor, ...]:
        return self[3:5] if self.q_ring is None else (self.k_ring, self.v_ring, self.q_ring)

    @classmethod
    def of(cls, tokens: Tokens, rings: Rings, weights: Weights) -> Given:
        query, key, value = tokens
        others = (None if key is query else key, None if value is query else value)
        waiting = rings.q if rings.q.shape[1] > 0 else None
        return cls._make((query, *others, *rings[:2], *weights, waiting))


# The places of tokens, rings and in-projection in `Given`: new rings hold something of all of them.
KEPT = (*range(9), 13)


def step(
    tokens: Tokens, rings: Rings, active: Tensor | None, weights: Weights, add_zero_attn: bool
) -> tuple[Tensor, Rings]:
    """``reference.ring_step`` by the operator for inference, where nothing speaks against it."""
    position, given = rings.position.clone(), Given.of(tokens, rings, weights)
    out, k, v, *waiting = Step.apply(_way(given, add_zero_attn), active, position, *given)
    return out, Rings(k, v, waiting[0] if waiting else rings.q, position)


def why_not(
    tokens: Tokens, rings: Rings, active: Tensor | None, weights: Weights, options: Options
) -> str | None:
    """Why ``step`` does not serve; None if it does."""
    if reason := why_no_step_node(tokens[0], options.dropout_p):
        return reason
    args = (*tokens, *weights, *rings, active, options.add_zero_attn, 0.0, True)
    return backends.why_not(backends.order(tokens[0].device.type)[0], "ring_step_", args)


def _way(given: Given, add_zero_attn: bool) -> StepWay:
    backend = backends.order(given.query.device.type)[0]
    triton = backend == "triton"
    simple = given.q_ring is None and given.bias_k is None and not add_zero_attn
    by_windows = partial(_gradients_by_windows, add_zero_attn)
    gradients = _gradients_by_library if simple and not triton else by_windows
    rings = (3, 4) if given.q_ring is None else (3, 4, 13)
    run = partial(_run_in_place, backend, add_zero_attn)
    by_operators = partial(_step_by_operators, triton, add_zero_attn)
    return StepWay(rings, KEPT, run, by_operators, gradients)


def _run_in_place(
    backend: str,
    add_zero_attn: bool,
    given: Sequence[Any],
    rings: Sequence[Tensor],
    position: Tensor,
    active: Tensor | None,
) -> Tensor:
    found = Given(*given)
    waiting = rings[2] if len(rings) == 3 else _no_queries(found)
    held = (*rings[:2], waiting, position)
    how = (active, add_zero_attn, 0.0, True)
    args = (*found.tokens(), *found.weights(), *held, *how)
    out: Tensor = backends.run_on(backend, "ring_step_", *args)
    return out


def _no_queries(given: Given) -> Tensor:
    return given.query.new_empty((given.query.shape[0], 0, given.query.shape[1]))


def _rings_before(given: Given, position: Tensor) -> Rings:
    waiting = _no_queries(given) if given.q_ring is None else given.q_ring
    return Rings(given.k_ring, given.v_ring, waiting, position)


def _step_by_operators(
    by_windows: bool, add_zero_attn: bool, given: Sequence[Any], position: Tensor
) -> tuple[Tensor, ...]:
    found, options = Given(*given), Options(add_zero_attn, 0.0)
    tokens, weights, rings = found.tokens(), found.weights(), _rings_before(found, position)
    if by_windows:
        out, after = step_by_windows(tokens, rings, None, weights, options)
    else:
        out, after = reference.ring_step(*tokens, weights, rings, None, *options)
    return out, *after[: len(found.rings())]


def step_by_windows(
    tokens: Tokens, rings: Rings, active: Tensor | None, weights: Weights, options: Options
) -> tuple[Tensor, Rings]:
    """``reference.ring_step`` as a clip of one token, by the operator that attends to clips."""

    def steps(clips: Tokens, rings: Rings) -> tuple[Tensor, Rings]:
        return reference.ring_steps(*clips, weights, rings, 0, *options, attending=windows.attend)

    return as_clip(steps, tokens, rings, active)


def as_clip(
    steps: Callable[[Tokens, Rings], tuple[Tensor, Rings]],
    tokens: Tokens,
    rings: Rings,
    active: Tensor | None,
) -> tuple[Tensor, Rings]:
    """A step as a clip of one token, by what takes clips."""
    out, after = steps(of_each(lambda x: x.unsqueeze(1), tokens), rings)
    if active is not None:
        after = after._replace(position=rings.position + active.to(torch.int64))
    return out.squeeze(1), after


def _gradients_by_library(
    given: Sequence[Any],
    rings: Sequence[Tensor],
    before: Tensor,
    d_out: Tensor | None,
    d_rings: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> Sequence[Tensor | None]:
    function = _native.cpu_function("ring_step_backward")
    found = function(d_out, *d_rings, *given[:3], *rings, *given[5:11], before, needed[:11])
    return *found, None, None, None


def _gradients_by_windows(
    add_zero_attn: bool,
    given: Sequence[Any],
    rings: Sequence[Tensor],
    before: Tensor,
    d_out: Tensor | None,
    d_rings: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> Sequence[Tensor | None]:
    """By the operator that attends to clips, of one token here, and PyTorch's products."""
    found, needs = Given(*given), dict(zip(Given._fields, needed, strict=True))
    multiply = multiplier(found.query)
    if d_out is None:
        grads = _gradients_through_rings(multiply, found, needs, before, d_rings)
        return [grads.get(name) if need else None for name, need in needs.items()]
    tokens, weights = found.tokens(), found.weights()
    N, H, L, D = found.k_ring.shape
    scale = 1.0 / math.sqrt(D)
    query, key, value = (x.view(N, 1, H, D) for x in weights.project(tokens, linear))
    due, waiting = before[:, None], found.q_ring
    if waiting is not None:
        due = (due + 1) % waiting.shape[1]
        query = reference.take(waiting, due).view(N, 1, H, D)
    extra = extra_slots.scores_of(query * scale, weights, add_zero_attn)
    held = (found.k_ring, found.v_ring, before, extra_slots.sink(extra), None)
    clip = (query, key, value, *held)
    attended, lse = backends.run_directly("attend_window", *clip, 0, 0.0)
    on_extra = extra_slots.weights_of(extra, lse, 0.0)
    heads = extra_slots.with_bias(attended, on_extra, weights).view(N, H * D)
    grads = {}
    if needs["out_proj_weight"]:
        d_weight = d_out.new_empty(weights.out_proj_weight.shape)
        sum_over_tokens(d_out.t(), heads, d_weight)
        grads["out_proj_weight"] = d_weight
    if needs["out_proj_bias"]:
        grads["out_proj_bias"] = d_out.sum(0)
    d_heads = multiply(d_out, weights.out_proj_weight).view(N, 1, H, D)
    d_extra = d_lse = None
    if on_extra is not None:
        d_on_extra, _ = extra_slots.gradients_of_weights(d_heads, None, on_extra, weights, None)
        d_extra = on_extra * d_on_extra
        d_lse = -d_extra.sum(-1)
        if needs["bias_v"]:
            grads["bias_v"] = _of_slot(on_extra, d_heads)
    of_rings = needs["k_ring"] or needs["v_ring"]
    d_query, d_key, d_value, d_k_ring, d_v_ring, d_sink = backends.run_directly(
        "attend_window_backward", d_heads, d_lse, *clip, attended, lse, 0, 0.0, of_rings
    )
    if extra is not None and d_extra is not None:
        d_extra = scale * extra_slots.gradients_of_scores(d_extra, extra, d_sink)
        d_query = extra_slots.gradients_of_queries(d_query, d_extra, weights, None)
        if needs["bias_k"]:
            grads["bias_k"] = _of_slot(d_extra, query)
    d_query, d_key, d_value = (x.view(N, H * D) for x in (d_query, d_key, d_value))
    slot = (before % L)[:, None]
    d_key, grads["k_ring"] = _through_ring(d_key, d_rings[0], d_k_ring if of_rings else None, slot)
    d_value, grads["v_ring"] = _through_ring(
        d_value, d_rings[1], d_v_ring if of_rings else None, slot
    )
    if waiting is not None:  # the query that was due came with another token
        d_waiting = reference.put(torch.zeros_like(waiting), due, d_query.unsqueeze(1))
        slot = (before % waiting.shape[1])[:, None]
        d_query, grads["q_ring"] = _through_ring(None, d_rings[2], d_waiting, slot)
    d_projected = (d_query, d_key, d_value)
    grads.update(_gradients_of_projection(multiply, found, needs, d_projected))
    return [grads.get(name) if need else None for name, need in needs.items()]


def _gradients_through_rings(
    multiply: Multiply,
    given: Given,
    needs: dict[str, bool],
    before: Tensor,
    d_rings: Sequence[Tensor | None],
) -> dict[str, Tensor | None]:
    """Of a step whose output nobody used: of what its rings keep."""
    grads: dict[str, Tensor | None] = {}
    d_projected = {}
    names = {"k_ring": "key", "v_ring": "value", "q_ring": "query"}
    for (ring, token), d_after in zip(names.items(), d_rings, strict=False):
        if d_after is not None:
            slot = (before % d_after.shape[-2])[:, None]
            of_token, grads[ring] = reference.split_off(d_after, slot, needs[ring])
            d_projected[token] = of_token.flatten(1)
    none = torch.zeros_like(given.query)
    ordered = [d_projected.get(token, none) for token in ("query", "key", "value")]
    grads.update(_gradients_of_projection(multiply, given, needs, ordered))
    return grads


def _of_slot(weights: Tensor, vectors: Tensor) -> Tensor:
    """The sum of the heads' vectors ``(N, 1, H, D)``, each times its slot's ``(N, 1, H, X)``, as a
    parameter ``(1, 1, E)``."""
    return (weights[..., :1] * vectors).sum(0).reshape(1, 1, -1).to(vectors.dtype)


def _through_ring(
    d_token: Tensor | None, d_after: Tensor | None, d_before: Tensor | None, slot: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of a token ``(N, E)`` and of the ring in which it takes a place.

    Args:
        d_token: what the token has besides; None for nothing.
        d_after: of the ring with the token; None for nothing.
        d_before: what the ring without it has besides; None if it needs no gradient.
    """
    if d_after is None:
        if d_token is None:
            assert d_before is not None
            d_token = d_before.new_zeros(d_before.shape[0], d_before.shape[2])
        return d_token, d_before
    of_token, rest = reference.split_off(d_after, slot, d_before is not None)
    if d_before is not None and rest is not None:
        d_before = d_before + rest
    of_token = of_token.flatten(1)
    return of_token if d_token is None else d_token + of_token, d_before


def _gradients_of_projection(
    multiply: Multiply, given: Given, needs: dict[str, bool], d_projected: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Gradients of tokens, weights and biases from those of query, key and value ``(N, E)``."""
    weights, packed = given.weights(), given.k_proj_weight is None
    names = ("in_proj_weight", "k_proj_weight", "v_proj_weight")
    grads = {
        name: weight.new_empty(weight.shape)
        for name, weight in zip(names, weights, strict=False)
        if weight is not None and needs[name]
    }
    d_all = torch.cat(tuple(d_projected), dim=1)
    if needs["in_proj_bias"]:
        grads["in_proj_bias"] = d_all.sum(0)
    if packed and given.key is None and given.value is None:
        d_weight = grads.get("in_proj_weight")
        parts: list[Any] = [("query", given.query, d_all, weights.in_proj_weight, d_weight)]
    else:
        own = (("query", given.query), ("key", given.key), ("value", given.value))
        owners = ["query" if x is None else name for name, x in own]
        d_weights: Any = [grads.get(name) for name in names]
        if packed:
            d_weights = [None] * 3 if d_weights[0] is None else d_weights[0].chunk(3)
        parts = list(
            zip(owners, given.tokens(), d_projected, weights.split(), d_weights, strict=True)
        )
    for owner, token, d, weight, d_weight in parts:
        if d_weight is not None:
            sum_over_tokens(d.t(), token, d_weight)
        if needs[owner]:
            if owner in grads:
                multiply(d, weight, out=grads[owner], add=True)
            else:
                grads[owner] = multiply(d, weight)
    return grads
