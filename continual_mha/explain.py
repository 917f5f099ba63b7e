"""Which kernel a call will run, and why."""

from __future__ import annotations

from torch import Tensor

from . import backends, functional, ring, steps_node, windows
from .attention import SingleOutputMultiheadAttention
from .reference import Rings, Tokens
from .ring import RingState, State


def explain(
    module: SingleOutputMultiheadAttention,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
) -> str:
    """Say which formulation and which backend a call with these tokens takes, and why.

    Nothing runs and no state changes.

    Args:
        query: as for ``forward_step`` if of rank 2, as for ``forward_steps`` if of rank 3.
        key: as for the same call.
        value: as for the same call.

    Returns:
        A few lines: the call, its formulation, then one line for each backend that was asked.

    Raises:
        ValueError: the tokens do not fit the module.
        TypeError: the tokens do not fit the module, or it is not one of attention, but a model.
    """
    if not isinstance(module, SingleOutputMultiheadAttention):
        raise TypeError(
            "explain takes a SingleOutputMultiheadAttention and its tokens, but got a "
            f"{type(module).__name__}"
        )
    many = isinstance(query, Tensor) and query.dim() == 3
    tokens = (module._many_tokens if many else module._tokens)(query, key, value)
    state, call = module._plan(tokens, module._state(), update=True)
    kept = call.layout.formulation
    if module.cache_dtype is not None:
        kept += f", quantised to {module.cache_dtype}"
    lines = [f"{'forward_steps' if many else 'forward_step'}: formulation {kept}"]
    if call.differentiable:
        return "\n".join([*lines, *_with_gradient(tokens, state, call)])
    way = functional.way_of_steps(tokens, state, 0, call) if many else "at once"
    if way == "projected":
        layout = call.layout._replace(formulation="kv", cache_dtype=None)
        state = ring.new_state(layout, query.shape[0], tokens[0])
        lines.append("the ring is projected to keys and values first")
    if way == "singly":
        query, key, value = (x[:, 0] for x in tokens)
        tokens, many = (query, key, value), False
        lines.append("as many single steps, which alone are batch_invariant here")
    args = functional.operands(tokens, state, 0 if many else None, call)
    return "\n".join([*lines, *backends.reasons(functional.operator_for(state, many), args)])


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
        reason = functional.why_no_node(tokens, state, None, call)
    elif isinstance(state, RingState):
        rings = Rings(*state[:-1])
        reason = steps_node.why_not(tokens, rings, 0, call.weights, call.options)
    if reason is None:
        return [f"{first}: runs it, and makes new rings, because a gradient is needed"]
    if first == "triton":
        return [attends]
    if many and windows.why_not(*(query,) * 5) is None:  # of which class and dtype decide
        return [attends]
    lines = [] if first == "torch" else [f"{first}: {reason}"]
    if backends.forced() in (None, "torch"):
        lines.append("torch: runs it, because a gradient is needed")
    return lines
