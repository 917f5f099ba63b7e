"""Which kernel a call will run, and why."""

from __future__ import annotations

from torch import Tensor

from . import backends, checks, functional, mixing, ring, steps_node, windows
from .attention import ONE_QUERY, SingleOutputMultiheadAttention, is_unbatched
from .clip_node import as_moved
from .clips import explain_clip
from .modes import checked_mode
from .operands import Rings, Tokens, as_tokens, told_apart
from .ring import InputState, RingState, State


def explain(
    module: SingleOutputMultiheadAttention,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    call_mode: str | None = None,
) -> str:
    """Say which formulation and which backend a call with these tokens takes, and why.

    Nothing runs and no state changes.

    Args:
        query: as for that call.
        key: as for that call.
        value: as for that call.
        key_padding_mask: as for ``forward``, like the four that follow; steps have no masks.
        need_weights: whether it computes the attention weights.
        attn_mask: as for ``forward``.
        average_attn_weights: whether it averages them over the heads.
        is_causal: as for ``forward``.
        call_mode: ``forward``, ``forward_steps`` or ``forward_step``; by default a step if the
            query is of rank 2, and ``forward_steps`` if it is of rank 3.

    Returns:
        A few lines: the call, its formulation, then one line for each backend that was asked.

    Raises:
        ValueError: the tokens do not fit the module or the call, there is no such mode, or there
            are masks for a step.
        TypeError: the tokens do not fit the module, or it is not one of attention, but a model.
    """
    if not isinstance(module, SingleOutputMultiheadAttention):
        raise TypeError(
            "explain takes a SingleOutputMultiheadAttention and its tokens, but got a "
            f"{type(module).__name__}"
        )
    mode = None if call_mode is None else checked_mode(call_mode)
    if mode == "forward":
        tokens, masks = as_tokens(told_apart(query, key, value)), (key_padding_mask, attn_mask)
        checks.check_causal(is_causal, attn_mask)
        return _explain_clip(module, tokens, masks, need_weights, average_attn_weights)
    if key_padding_mask is not None or attn_mask is not None:
        raise ValueError("steps take no masks; call_mode='forward' explains a clip")
    if mode is None:
        mode = "forward_steps" if isinstance(query, Tensor) and query.dim() == 3 else "forward_step"
    many = mode == "forward_steps"
    tokens = (module._many_tokens if many else module._tokens)(query, key, value)
    tokens, state, plan = module._plan(tokens, module._state(), update=True)
    kept = plan.layout.formulation
    if module.cache_dtype is not None:
        kept += f", quantised to {module.cache_dtype}"
    lines = [f"{mode}: formulation {kept}"]
    if plan.differentiable:
        return "\n".join([*lines, *_with_gradient(tokens, state, plan)])
    way = functional.way_of_steps(tokens, state, 0, plan) if many else "at once"
    if way == "projected":
        layout = plan.layout._replace(formulation="kv", cache_dtype=None)
        state = ring.new_state(layout, tokens[0].shape[0], tokens[0])
        lines.append("the ring is projected to keys and values first")
    if way == "singly":
        query, key, value = (x[:, 0] for x in tokens)
        tokens, many = (query, key, value), False
        lines.append("as many single steps, which alone are batch_invariant here")
    args = functional.operands(tokens, state, 0 if many else None, plan)
    return "\n".join([*lines, *backends.reasons(functional.operator_for(state, many), args)])


def _explain_clip(
    module: SingleOutputMultiheadAttention,
    tokens: Tokens,
    masks: tuple[Tensor | None, Tensor | None],
    *how: bool,
) -> str:
    """What runs ``forward``."""
    if not module.single_output_forward:
        axis = 0 if module.batch_first else 1
        query, key, value = (x.unsqueeze(axis) if is_unbatched(x) else x for x in tokens)
        checks.check_clips(*module._clips((query, key, value)))
        lines = backends.reasons_to_leave(query, ONE_QUERY)
        return "\n".join(["forward: formulation kv", *lines])
    clips = module._clips(tokens)
    checks.check_clips(*clips)
    mask, plan = module._plan_clip(clips, masks, *how)
    formulation, lines = explain_clip(clips, module._weights(), mask, plan)
    return "\n".join([f"forward: formulation {formulation}", *lines])


def _with_gradient(tokens: Tokens, state: State, call: functional.StepCall) -> list[str]:
    """What runs a step, or many, that makes rings of its own."""
    query = tokens[0]
    many, first = query.dim() == 3, backends.order(query.device.type)[0]
    attends = (
        "torch: projects, because a gradient is needed; "
        f"{first}: attends, where it covers sizes and dtype, or else torch"
    )
    reason: str | None = windows.NO_GRADIENT
    if not many:
        reason = functional.why_not_one_node(tokens, state, None, call)
    if reason is not None and isinstance(state, RingState):  # a step may be a clip of one token
        rings = Rings(*state[:-1])
        by_steps = steps_node.why_not(tokens, rings, 0, call.weights, call.options)
        reason = by_steps if many or by_steps is None else reason
    if reason is None:
        return [f"{first}: runs it, and makes new rings, because a gradient is needed"]
    if first == "triton":
        return [attends]
    if many and windows.why_not(*(query,) * 5) is None:  # of which class and dtype decide
        return [attends]
    if isinstance(state, InputState) and not many:
        moved = as_moved(state.x, call.layout.num_heads)
        if mixing.why_not_fused(moved, state.x, None, None, call.options.dropout_p) is None:
            return [attends]
    lines = [] if first == "torch" else [f"{first}: {reason}"]
    if backends.forced() in (None, "torch"):
        lines.append("torch: runs it, because a gradient is needed")
    return lines
