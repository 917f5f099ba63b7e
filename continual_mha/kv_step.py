"""A step over keys and values that makes rings of its own, as one node of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native, backends, reference, windows
from .products import Multiply, multiplier, sum_over_tokens
from .reference import Options, Rings, Tokens, Weights, has_extra_slots, is_shared
from .step_node import Step, Way, why_no_step_node
from .windows import NO_GRADIENT


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


BESIDE = f"{NO_GRADIENT} beside extra slots or queries that wait"
# All that the rings keep something of: tokens, rings, and what projects them.
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
    if backends.forced() == "cpu" and not has_gradients(rings, weights, options):
        return BESIDE
    args = (*tokens, *weights, *rings, active, options.add_zero_attn, 0.0, True)
    return backends.why_not(backends.order(tokens[0].device.type)[0], "ring_step_", args)


def has_gradients(rings: Rings, weights: Weights, options: Options) -> bool:
    """Whether there is a function for gradients: not with extra slots or queries that wait."""
    return rings.q.shape[1] == 0 and not has_extra_slots(weights, options.add_zero_attn)


def _way(given: Given, add_zero_attn: bool) -> Way:
    triton = backends.order(given.query.device.type)[0] == "triton"
    simple = given.q_ring is None and given.bias_k is None and not add_zero_attn
    gradients = None
    if simple:
        gradients = _gradients_by_windows if triton else _gradients_by_library
    again = _again_by_windows if triton else _again_over_keys
    rings = (3, 4) if given.q_ring is None else (3, 4, 13)
    run, again = partial(_run_over_keys, add_zero_attn), partial(again, add_zero_attn)
    return Way(rings, KEPT, run, again, gradients)


def _run_over_keys(
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
    out: Tensor = backends.run_directly("ring_step_", *args)
    return out


def _no_queries(given: Given) -> Tensor:
    return given.query.new_empty((given.query.shape[0], 0, given.query.shape[1]))


def _rings_before(given: Given, position: Tensor) -> Rings:
    waiting = _no_queries(given) if given.q_ring is None else given.q_ring
    return Rings(given.k_ring, given.v_ring, waiting, position)


def _again_over_keys(
    add_zero_attn: bool, given: Sequence[Any], position: Tensor
) -> tuple[Tensor, ...]:
    found = Given(*given)
    rings = _rings_before(found, position)
    out, after = reference.ring_step(
        *found.tokens(), found.weights(), rings, add_zero_attn=add_zero_attn
    )
    return out, *after[: len(found.rings())]


def _again_by_windows(
    add_zero_attn: bool, given: Sequence[Any], position: Tensor
) -> tuple[Tensor, ...]:
    found = Given(*given)
    options = Options(add_zero_attn, 0.0)
    rings = _rings_before(found, position)
    out, after = step_by_windows(found.tokens(), rings, None, found.weights(), options)
    return out, *after[: len(found.rings())]


def step_by_windows(
    tokens: Tokens, rings: Rings, active: Tensor | None, weights: Weights, options: Options
) -> tuple[Tensor, Rings]:
    """``reference.ring_step`` as a clip of one token, by the operator that attends to clips."""
    query, key, value = (x.unsqueeze(1) for x in tokens)
    if is_shared(tokens):  # keep it one tensor for those who ask
        key = value = query
    out, after = reference.ring_steps(
        query, key, value, weights, rings, 0, *options, attending=windows.attend
    )
    if active is not None:
        after = after._replace(position=rings.position + active.to(torch.int64))
    return out.squeeze(1), after


def _gradients_by_library(
    given: Sequence[Any],
    rings: Sequence[Tensor],
    before: Tensor,
    d_out: Tensor,
    d_rings: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> Sequence[Tensor | None]:
    function = _native.cpu_function("ring_step_backward")
    found = function(d_out, *d_rings, *given[:3], *rings, *given[5:11], before, needed[:11])
    return *found, None, None, None


def _gradients_by_windows(
    given: Sequence[Any],
    rings: Sequence[Tensor],
    before: Tensor,
    d_out: Tensor,
    d_rings: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> Sequence[Tensor | None]:
    """By the operator that attends to clips, of one token here, and PyTorch's products."""
    found, needs = Given(*given), dict(zip(Given._fields, needed, strict=True))
    tokens, weights = found.tokens(), found.weights()
    N, H, L, D = found.k_ring.shape
    multiply = multiplier(found.query)
    clip = [x.view(N, 1, H, D) for x in reference.project(*tokens, weights)]
    held = (found.k_ring, found.v_ring, before, None, None)
    attended, lse = backends.run_directly("attend_window", *clip, *held, 0, 0.0)
    heads = attended.view(N, H * D)
    grads: dict[str, Tensor | None] = {}
    if needs["out_proj_weight"]:
        d_weight = d_out.new_empty(weights.out_proj_weight.shape)
        sum_over_tokens(d_out.t(), heads, d_weight)
        grads["out_proj_weight"] = d_weight
    if needs["out_proj_bias"]:
        grads["out_proj_bias"] = d_out.sum(0)
    d_heads = multiply(d_out, weights.out_proj_weight).view(N, 1, H, D)
    of_rings = needs["k_ring"] or needs["v_ring"]
    *d_clip, d_k_ring, d_v_ring, _ = backends.run_directly(
        "attend_window_backward", d_heads, None, *clip, *held, attended, lse, 0, 0.0, of_rings
    )
    d_projected = [x.view(N, H * D) for x in d_clip]
    slot = (before % L)[:, None]
    for i, name, d_ring, d_before in (
        (1, "k_ring", d_rings[0], d_k_ring),
        (2, "v_ring", d_rings[1], d_v_ring),
    ):
        if d_ring is not None:  # of the new ring, in which the token has taken another's place
            of_token = reference.take(d_ring, slot)
            d_projected[i] = d_projected[i] + of_token.reshape(N, H * D)
            if of_rings:
                d_before = reference.put(d_ring, slot, torch.zeros_like(of_token)) + d_before
        grads[name] = d_before if of_rings else None
    grads.update(_gradients_of_projection(multiply, found, needs, d_projected))
    return [
        grads.get(name) if need else None for name, need in zip(Given._fields, needed, strict=True)
    ]


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
