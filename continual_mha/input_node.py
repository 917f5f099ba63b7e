"""A step over inputs that makes a ring of its own, as one node of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from . import backends, inputs, mixing, reference
from .clip_node import ClipCall, Needed, gradients_of_output, node_of
from .inputs import Inputs
from .operands import Options, Weights
from .step_node import Step, StepWay, why_no_step_node


class Sizes(NamedTuple):
    """What ``input_step_`` is told besides tensors."""

    num_heads: int
    delay: int
    add_zero_attn: bool


def step(
    token: Tensor, kept: Inputs, active: Tensor | None, weights: Weights, sizes: Sizes
) -> tuple[Tensor, Inputs]:
    """``inputs.input_step`` by the operator for inference, where nothing speaks against it."""
    position = kept.position.clone()
    backend = backends.order(token.device.type)[0]
    run = partial(_run_in_place, backend, sizes)
    by_operators = partial(_step_by_operators, sizes)
    way = StepWay((1,), (0, 1), run, by_operators, partial(_gradients_by_clip, sizes))
    given = (token, kept.x, *_of_inputs(weights))
    out, x = Step.apply(way, active, position, *given)
    return out, Inputs(x, position)


def why_not(
    token: Tensor,
    kept: Inputs,
    active: Tensor | None,
    weights: Weights,
    sizes: Sizes,
    dropout_p: float,
) -> str | None:
    """Why ``step`` does not serve; None if it does."""
    if reason := why_no_step_node(token, dropout_p):
        return reason
    args = _input_args(token, kept.x, _of_inputs(weights), kept.position, active, sizes)
    return backends.why_not(backends.order(token.device.type)[0], "input_step_", args)


def _of_inputs(weights: Weights) -> tuple[Tensor | None, ...]:
    """The weights that ``input_step_`` takes."""
    packed, _, _, bias, *others = weights
    return (packed, bias, *others)


def _input_args(
    token: Tensor,
    x_ring: Tensor,
    weights: Sequence[Tensor | None],
    position: Tensor,
    active: Tensor | None,
    sizes: Sizes,
) -> tuple[Any, ...]:
    state = (x_ring, position, sizes.num_heads, sizes.delay)
    return (token, *weights, *state, active, sizes.add_zero_attn, 0.0, True)


def _run_in_place(
    backend: str,
    sizes: Sizes,
    given: Sequence[Any],
    rings: Sequence[Tensor],
    position: Tensor,
    active: Tensor | None,
) -> Tensor:
    args = _input_args(given[0], rings[0], given[2:], position, active, sizes)
    out: Tensor = backends.run_on(backend, "input_step_", *args)
    return out


def _step_by_operators(sizes: Sizes, given: Sequence[Any], position: Tensor) -> tuple[Tensor, ...]:
    token, x_ring, packed, bias, *others = given
    weights = Weights(packed, None, None, bias, *others)
    how = (sizes.num_heads, sizes.delay, None, sizes.add_zero_attn)
    out, after = inputs.input_step(
        token, weights, Inputs(x_ring, position), *how, mixing=mixing.mix
    )
    return out, after.x


def _gradients_by_clip(
    sizes: Sizes,
    given: Sequence[Any],
    rings: Sequence[Tensor],
    before: Tensor,
    d_out: Tensor | None,
    d_rings: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> Sequence[Tensor | None]:
    """By the node that attends to clips, of which the ring with the token is one."""
    token, x_ring, packed, bias, *others = given
    (kept,), delay, length = rings, sizes.delay, x_ring.shape[1]
    slot = (before % length)[:, None]
    if d_out is None:  # nobody used the output, and the ring keeps nothing but tokens
        (d_after,) = d_rings
        assert d_after is not None
        of_token, d_ring = reference.split_off(d_after, slot, needed[1])
        return [of_token.squeeze(1) if needed[0] else None, d_ring, *[None] * len(needed[2:])]
    asking = reference.token_before(kept, before, delay) if delay else token
    mask = inputs.mask_of_ring(before, length, token.dtype)
    weights = Weights._make((packed, None, None, bias, *others))
    call = ClipCall(
        sizes.num_heads,
        query_index=0,
        options=Options(sizes.add_zero_attn, dropout_p=0.0),
        need_weights=False,
        blank=True,
        average=True,
    )
    node = node_of(asking, kept, None, mask, weights, call)
    of_tokens = needed[0] or needed[1]
    needs = Needed(
        query=of_tokens,
        key=of_tokens,
        value=False,
        mask=False,
        in_proj_weight=needed[2],
        k_proj_weight=False,
        v_proj_weight=False,
        in_proj_bias=needed[3],
        out_proj_weight=needed[4],
        out_proj_bias=needed[5],
        bias_k=needed[6],
        bias_v=needed[7],
    )
    clip = (asking, kept, None, mask, *weights)
    d_asking, d_kept, _, _, d_packed, _, _, *d_others = gradients_of_output(
        node, clip, d_out, needs
    )
    d_token = d_ring = None
    if of_tokens:
        assert d_asking is not None
        assert d_kept is not None
        if d_rings[0] is not None:
            d_kept = d_kept + d_rings[0]
        if delay:
            asked_at = (before - delay)[:, None]
            of_asked = d_asking.unsqueeze(1).masked_fill((asked_at < 0).unsqueeze(-1), 0)
            slots = (asked_at % length).unsqueeze(-1).expand(of_asked.shape)
            d_kept = d_kept.scatter_add(1, slots, of_asked)
        of_token, d_ring = reference.split_off(d_kept, slot, needed[1])
        d_token = of_token.squeeze(1) if delay else of_token.squeeze(1) + d_asking
    found = (d_token, d_ring, d_packed, *d_others)
    return [x if need else None for x, need in zip(found, needed, strict=True)]
