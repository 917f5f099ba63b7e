"""A step over keys and values that makes rings of its own, as one node of autograd on the CPU."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native, backends, mixing, reference
from .modes import is_opaque
from .nodes import gradients_by_operators, is_followed
from .reference import Options, Rings, Tokens, Weights
from .windows import NO_GRADIENT

_OPTIONS = (False, 0.0, True)  # no slot of zeros, no dropout, and the rings are written to


def step(
    tokens: Tokens, rings: Rings, active: Tensor | None, weights: Weights
) -> tuple[Tensor, Rings]:
    """``reference.ring_step`` by the CPU library's step, where nothing speaks against it."""
    position = rings.position.clone()
    out, k, v = _Step.apply(active, rings.q, position, *Given.of(tokens, rings, weights))
    return out, Rings(k, v, rings.q, position)


def why_not(
    tokens: Tokens, rings: Rings, active: Tensor | None, weights: Weights, options: Options
) -> str | None:
    """Why ``step`` does not serve; None if it does."""
    if reason := why_no_node(tokens[0], rings, weights, options):
        return reason
    if options.dropout_p > 0.0:
        return f"{NO_GRADIENT} beside dropout"
    return backends.why_not("cpu", "ring_step_", (*tokens, *weights, *rings, active, *_OPTIONS))


def why_no_node(query: Tensor, rings: Rings, weights: Weights, options: Options) -> str | None:
    """Why nodes for steps do not serve, whatever they are made of; None if nothing is known."""
    if backends.order(query.device.type)[0] != "cpu":
        return NO_GRADIENT
    if reason := mixing.why_plain(query):
        return reason
    if is_opaque(query):
        return "torch.compile looks into its operators"
    if rings.q.shape[1] > 0 or reference.has_extra_slots(weights, options.add_zero_attn):
        return f"{NO_GRADIENT} beside extra slots or queries that wait"
    return None


class Given(NamedTuple):
    """What a node is given and needs for the gradients."""

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

    def tokens(self) -> Tokens:
        query = self.query
        key = query if self.key is None else self.key
        return query, key, query if self.value is None else self.value

    def weights(self) -> Weights:
        return Weights(*self[5:], None, None)

    @classmethod
    def of(cls, tokens: Tokens, rings: Rings, weights: Weights) -> Given:
        query, key, value = tokens
        others = (None if key is query else key, None if value is query else value)
        return cls._make((query, *others, *rings[:2], *weights[:6]))


class _Step(torch.autograd.Function):
    """The output and the rings with the token; ``position`` goes on in place.

    From single operators autograd would have to follow some thirty, where time is short.
    """

    @staticmethod
    def forward(
        ctx: Any, active: Tensor | None, q_ring: Tensor, position: Tensor, *given: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = Given(*given)
        before = position.clone()
        k, v = (x.clone(memory_format=torch.contiguous_format) for x in found[3:5])
        rings = (k, v, q_ring, position)
        function = _native.cpu_function("ring_step_")
        out = function(*found.tokens(), *found.weights(), *rings, active, *_OPTIONS)
        ctx.save_for_backward(q_ring, before, k, v, *given)
        ctx.set_materialize_grads(False)
        return out, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q_ring, before, k, v, *saved = ctx.saved_tensors
        given, needed = Given(*saved), ctx.needs_input_grad[3:]
        if is_followed(grads):
            run_again = partial(_step_by_operators, q_ring, before)
            found = gradients_by_operators(run_again, given, grads, needed, "cpu")
        else:
            d_out, *d_rings = grads
            if d_out is None:
                d_out = torch.zeros_like(given.query)
            function = _native.cpu_function("ring_step_backward")
            found = function(d_out, *d_rings, *given[:3], k, v, *given[5:], before, needed)
        return None, None, None, *found


def _step_by_operators(
    q_ring: Tensor, position: Tensor, *given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The node's results by operators that autograd knows."""
    found = Given(*given)
    rings = Rings(found.k_ring, found.v_ring, q_ring, position)
    out, after = reference.ring_step(*found.tokens(), found.weights(), rings)
    return out, after.k, after.v
