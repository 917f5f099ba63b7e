"""A step that makes rings of its own, as one node of autograd.

From single operators autograd would have to follow some thirty, where time is short. Here the
operator for inference writes to copies of the rings. Gradients are computed by kernels, or where
they are followed themselves, from the step taken once more by operators that autograd knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .nodes import as_in_forward, gradients_by_operators, is_followed, without_autocast
from .tracing import is_opaque
from .windows import NO_GRADIENT

# The step in place, from what is given, copies of the rings, position and mask to the output.
InPlace = Callable[[Sequence[Any], Sequence[Tensor], Tensor, Tensor | None], Tensor]
# From what is given and the position before, to the output and the new rings.
ByOperators = Callable[[Sequence[Any], Tensor], tuple[Tensor, ...]]
# From what is given, the new rings, the position before, the gradients of output and new rings, and
# who needs one. That of the output is None where nobody used it, as of most in training on windows;
# those of the rings then pass through.
Gradients = Callable[..., Sequence[Tensor | None]]


class StepWay(NamedTuple):
    """How a node steps.

    Attributes:
        rings: the places of the rings among what is given.
        kept: the places of all of which the new rings hold something.
        run: takes the step by the operator for inference.
        by_operators: takes it by operators that autograd knows.
        gradients: computes them by kernels, which cannot be differentiated once more.
    """

    rings: tuple[int, ...]
    kept: tuple[int, ...]
    run: InPlace
    by_operators: ByOperators
    gradients: Gradients


class Step(torch.autograd.Function):
    """The output and the rings with the token; ``position`` goes on in place."""

    @staticmethod
    def forward(
        ctx: Any, way: StepWay, active: Tensor | None, position: Tensor, *given: Any
    ) -> tuple[Tensor, ...]:
        before = position.clone()
        rings = [given[i].clone(memory_format=torch.contiguous_format) for i in way.rings]
        out = way.run(given, rings, position, active)
        ctx.save_for_backward(before, *rings, *given)
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[3 + i] for i in way.kept):
            ctx.mark_non_differentiable(*rings)  # or each step's graph would hold those before
        ctx.way, ctx.forced = way, backends.forced()
        return out, *rings

    @staticmethod
    @as_in_forward
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        way, needed = ctx.way, ctx.needs_input_grad[3:]
        before, *saved = ctx.saved_tensors
        rings, given = saved[: len(way.rings)], saved[len(way.rings) :]
        device_type = before.device.type
        if is_followed(grads):
            step = partial(_step_by_operators, way, before)
            found = gradients_by_operators(step, given, grads, needed, device_type)
            return None, None, None, *found
        d_out, *d_rings = grads
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        with without_autocast(device_type):
            found = way.gradients(given, rings, before, d_out, d_rings, needed)
        return None, None, None, *found


def _step_by_operators(way: StepWay, before: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return way.by_operators(given, before)


def why_no_node(query: Tensor, known: Sequence[str]) -> str | None:
    """Why nodes for steps do not serve, whatever they are made of; None if nothing is known.

    Args:
        query: the tokens that ask.
        known: the backends that have them.
    """
    if backends.order(query.device.type)[0] not in known:
        return NO_GRADIENT
    if reason := backends.why_plain(query):
        return reason
    return "torch.compile looks into its operators" if is_opaque(query) else None


def why_no_step_node(token: Tensor, dropout_p: float) -> str | None:
    """The same of nodes for single steps."""
    reason = why_no_node(token, ("cpu", "triton"))
    if reason is None and dropout_p > 0.0:
        return f"{NO_GRADIENT} beside dropout"
    return reason
