"""Many tokens over keys and values that make rings of their own, as one node of autograd."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _native, backends, reference, windows
from .dropout import dropout_seed
from .kv_node import KEPT, Given, as_clip
from .nodes import as_in_forward, gradients_by_operators, is_followed, without_autocast
from .operands import Options, Rings, Tokens, Weights, has_extra_slots
from .step_node import why_no_node
from .windows import NO_GRADIENT

_GIVEN = 11  # of what a step is given: neither extra slots nor queries that wait


def steps(
    tokens: Tokens, rings: Rings, first: int, weights: Weights, dropout_p: float
) -> tuple[Tensor, Rings]:
    """``reference.ring_steps`` by the CPU library, where nothing speaks against it."""
    given = Given.of(tokens, rings, weights)[:_GIVEN]
    out, k, v = _Steps.apply(first, dropout_p, rings.q, rings.position, *given)
    return out, Rings(k, v, rings.q, rings.position + tokens[0].shape[1])


def why_not(
    tokens: Tokens, rings: Rings, first: int, weights: Weights, options: Options
) -> str | None:
    """Why ``steps`` does not serve; None if it does."""
    if reason := why_no_node(tokens[0], ("cpu",)):
        return reason
    if rings.q.shape[1] > 0 or has_extra_slots(weights, options.add_zero_attn):
        return f"{NO_GRADIENT} beside extra slots or queries that wait"
    args = (*tokens, *weights, *rings, first, False, 0.0, True)
    return backends.why_not("cpu", "ring_steps_", args)


def step(
    tokens: Tokens, rings: Rings, active: Tensor | None, weights: Weights, dropout_p: float
) -> tuple[Tensor, Rings]:
    """``reference.ring_step`` as a clip of one token, where nothing speaks against that."""

    def take(clip: Tokens, rings: Rings) -> tuple[Tensor, Rings]:
        return steps(clip, rings, 0, weights, dropout_p)

    return as_clip(take, tokens, rings, active)


class _Steps(torch.autograd.Function):
    """The output and the rings with the tokens."""

    @staticmethod
    def forward(
        ctx: Any, first: int, dropout_p: float, q_ring: Tensor, position: Tensor, *given: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        seed = dropout_seed(dropout_p, position.device)
        function = _native.cpu_function("new_ring_steps")
        out, k, v, *found = function(*given, position, seed, first, dropout_p)
        ctx.save_for_backward(q_ring, position, seed, *found, *given)
        ctx.how, ctx.forced = (first, dropout_p), backends.forced()
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[4 + i] for i in KEPT if i < _GIVEN):
            ctx.mark_non_differentiable(k, v)
        return out, k, v

    @staticmethod
    @as_in_forward
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q_ring, *kept = ctx.saved_tensors
        before, given = kept[:5], kept[5:]  # position and seed, and what the forward found
        needed = ctx.needs_input_grad[4:]
        if is_followed(grads):
            by_operators = partial(_steps_by_operators, *ctx.how, q_ring, *before[:2])
            return *(None,) * 4, *gradients_by_operators(by_operators, given, grads, needed, "cpu")
        with without_autocast("cpu"):
            function = _native.cpu_function("new_ring_steps_backward")
            found = function(*grads, *given, *before, *ctx.how, needed)
        return *(None,) * 4, *found


def _steps_by_operators(
    first: int, dropout_p: float, q_ring: Tensor, position: Tensor, seed: Tensor | None, *given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The node's results by operators that autograd knows."""
    found = Given(*given)
    rings = Rings(found.k_ring, found.v_ring, q_ring, position)
    how = (first, False, dropout_p)
    out, after = reference.ring_steps(
        *found.tokens(), found.weights(), rings, *how, attending=partial(windows.attend, seed=seed)
    )
    return out, after.k, after.v
