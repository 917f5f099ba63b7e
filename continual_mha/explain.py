"""Which kernel a call will run, and why."""

from __future__ import annotations

from torch import Tensor

from . import backends, functional
from .attention import SingleOutputMultiheadAttention
from .ring import QuantizedInputState, QuantizedRingState, RingState


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
        TypeError: the tokens do not fit the module.
    """
    many = query.dim() == 3
    tokens = (module._many_tokens if many else module._tokens)(query, key, value)
    state, call = module._plan(tokens, module._state(), update=True)
    kept = call.layout.formulation
    if module.cache_dtype is not None:
        kept += f", quantised to {module.cache_dtype}"
    lines = [f"{'forward_steps' if many else 'forward_step'}: formulation {kept}"]
    if call.differentiable:
        return "\n".join([*lines, "torch: runs it, because a gradient is needed"])
    if isinstance(state, QuantizedInputState):
        return "\n".join([*lines, "torch: runs it, because the rings are quantised"])
    if isinstance(state, RingState | QuantizedRingState):
        name = "ring_steps_" if many else "ring_step_"
        args = functional.operands(tokens, state, 0 if many else None, call)
        return "\n".join([*lines, *backends.reasons(name, args)])
    if many:
        return "\n".join([*lines, "torch: runs it, because keys and values are projected anew"])
    heads = state.x.new_empty((query.shape[0], module.num_heads, module.embed_dim))
    if not functional.wants_fused(heads, state.x, state.x, None):
        return "\n".join([*lines, "torch: runs it, because it is faster here"])
    return "\n".join(
        [*lines, *backends.reasons("attend_shared", (heads, state.x, state.x, None, None))]
    )
