"""Pure functions over tensors: what the module does, without its state and its layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, input_node, inputs, kv_node, mixing, reference, ring, steps_node, windows
from .inputs import Inputs
from .operands import Options, RepeatedStep, Rings, Tokens, Weights, as_tokens
from .quantized import QuantizedRing
from .ring import (
    INPUT_STATES,
    InputState,
    Layout,
    QuantizedInputState,
    QuantizedRingState,
    RingState,
    State,
)
from .tracing import is_opaque

# An output, and all parts of the state after it but the clock.
Parts = tuple[Tensor, tuple[Tensor, ...]]
# A step from tokens, as ``told_apart`` returns them, the parts before, and who is active.
RepeatedNode = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | None], Parts]


class StepCall(NamedTuple):
    """What ``step`` and ``steps`` need besides tokens and state.

    Attributes:
        update: whether to remember the tokens.
        differentiable: whether to make new rings, which autograd can follow, rather than to write
            to those given.
        batch_invariant: whether a stream's bits must not depend on the number of streams.
    """

    weights: Weights
    layout: Layout
    options: Options
    update: bool
    differentiable: bool
    batch_invariant: bool = False


def step(tokens: Tokens, state: State, active: Tensor | None, call: StepCall) -> Parts:
    """Take one token ``(N, E*)`` per stream; ``active``, ``(N,)`` bool or None, says who advances.

    Returns:
        The output ``(N, E)``, and the parts of the state after the token, but for the clock.
    """
    if not call.differentiable:
        before, after = _operands_of(tokens, state, call)
        return backends.run(operator_for(state, many=False), (*before, active, *after)), state[:-1]
    return _differentiable_step(tokens, state, active, call)


def repeated_step(
    apart: Sequence[Tensor], state: State, active: Tensor | None, call: StepCall
) -> Callable[..., RepeatedStep] | None:
    """What prepares ``step`` for calls that repeat one with these arguments, but for tokens and
    mask. Tokens are as ``operands.told_apart`` returns them, here and in the calls.

    None if such a step is not one operator that writes to the rings.
    """
    if call.differentiable:
        return None
    before, after = _operands_of(as_tokens(apart), state, call)
    name = operator_for(state, many=False)
    times = _times(apart, state)
    kept, are_three = before[times * len(apart) :], len(apart) == 3

    def by(function: Callable[..., Tensor]) -> RepeatedStep:
        if are_three:
            return lambda q, k, v, active: function(q, k, v, *kept, active, *after)
        return lambda token, active: function(*(token,) * times, *kept, active, *after)

    def prepare(*apart: Tensor) -> RepeatedStep:
        args = (*apart * times, *kept, active, *after)
        function, bind = backends.choose_again(name, args)
        anew = by(partial(backends.run_directly, name))
        return by(function) if bind is None else bind(anew, *args) or by(function)

    return prepare


def _times(apart: Sequence[Tensor], state: State) -> int:
    """How many operands of the operators for steps each of these tokens stands for."""
    return 1 if isinstance(state, INPUT_STATES) or len(apart) == 3 else 3


def repeated_steps(
    apart: Sequence[Tensor], state: State, call: StepCall
) -> Callable[..., Tensor] | None:
    """``steps`` for calls that repeat one with these arguments in warm streams, but for the clips.

    None if such steps are not one operator that writes to the rings.
    """
    tokens = as_tokens(apart)
    if call.differentiable or way_of_steps(tokens, state, 0, call) != "at once":
        return None
    before, after = _operands_of(tokens, state, call)
    name = operator_for(state, many=True)
    times = _times(apart, state)
    kept = before[times * len(apart) :]
    function = backends.choose(name, (*before, 0, *after))

    def run(*apart: Tensor) -> Tensor:
        out: Tensor = function(*apart * times, *kept, 0, *after)
        return out

    return run


def repeated_node(apart: Sequence[Tensor], state: State, call: StepCall) -> RepeatedNode | None:
    """The same of a ``step`` that makes rings of its own, from any parts of such a state.

    None if such a step is not one node of autograd.
    """
    if why_not_one_node(as_tokens(apart), state, None, call) is not None:
        return None
    weights, add_zero_attn = call.weights, call.options.add_zero_attn
    sizes = _sizes(call)

    def over_keys(apart: Sequence[Tensor], parts: Sequence[Tensor], active: Tensor | None) -> Parts:
        tokens = as_tokens(apart)
        return kv_node.step(tokens, Rings._make(parts), active, weights, add_zero_attn)

    def over_inputs(
        apart: Sequence[Tensor], parts: Sequence[Tensor], active: Tensor | None
    ) -> Parts:
        return input_node.step(apart[0], Inputs._make(parts), active, weights, sizes)

    return over_inputs if isinstance(state, INPUT_STATES) else over_keys


def steps(tokens: Tokens, state: State, first: int, call: StepCall) -> Parts:
    """As ``step``, for ``T`` tokens ``(N, T, E*)`` per stream and outputs ``(N, T - first, E)``."""
    way = way_of_steps(tokens, state, first, call)
    if way == "singly":
        return _one_by_one(tokens, state, first, call)
    if isinstance(state, INPUT_STATES) and way == "projected":
        return _projected_steps(tokens[0], state, first, call)
    if call.differentiable:
        rings = _rings(state)  # type: ignore[arg-type]
        if steps_node.why_not(tokens, rings, first, call.weights, call.options) is None:
            return steps_node.steps(tokens, rings, first, call.weights, call.options.dropout_p)
        return reference.ring_steps(
            *tokens, call.weights, rings, first, *call.options, attending=windows.attend
        )
    args = operands(tokens, state, first, call)
    return backends.run(operator_for(state, many=True), args), state[:-1]


def way_of_steps(tokens: Tokens, state: State, first: int, call: StepCall) -> str:
    """How ``steps`` goes about it.

    ``at once``: by the operator for many tokens. ``projected``: by that for keys and values, to
    which a ring of inputs is projected. ``singly``: by that for one token, where nothing else keeps
    ``batch_invariant``.
    """
    is_input = isinstance(state, INPUT_STATES)
    if call.differentiable or not (is_input or call.batch_invariant):
        return "projected" if is_input else "at once"
    if isinstance(state, RingState):
        return "at once"
    query = tokens[0]
    steps = query.shape[1] - first  # of which nothing is asked where any number may come
    if not is_opaque(query) and (
        call.batch_invariant or moving_is_cheaper(call.layout.num_heads, steps, query.shape[-1])
    ):
        args = operands(tokens, state, first, call)
        if backends.has_kernel(operator_for(state, many=True), args):
            return "at once"
    return "singly" if call.batch_invariant else "projected"


def _projected_steps(
    tokens: Tensor, state: InputState | QuantizedInputState, first: int, call: StepCall
) -> Parts:
    """``steps`` over a ring of inputs, by the operator for keys and values."""
    options = (first, *call.options)

    def attend(asked: Tensor, seen: Tensor, rings: Rings) -> Tensor:
        if call.differentiable:
            given = (asked, seen, seen, call.weights, rings, *options)
            return reference.ring_steps(*given, put=None, attending=windows.attend)[0]
        return backends.run(
            "ring_steps_", (asked, seen, seen, *call.weights, *rings, *options, False)
        )

    put = reference.put if call.differentiable else reference.put_
    sizes = (call.layout.num_heads, call.layout.delay)
    out, after = inputs.input_steps(
        tokens, call.weights, _inputs(state), *sizes, attend, put if call.update else None
    )
    if call.differentiable:
        return out, after
    state.position.copy_(after.position)
    return out, state[:-1]


def _one_by_one(tokens: Tokens, state: State, first: int, call: StepCall) -> Parts:
    """``steps`` as single steps, where no kernel serves many tokens without a library's product."""
    goes_on: Any = state if call.update else ring.snapshot(state)
    single = call._replace(update=True)
    singles = zip(*(x.unbind(1) for x in tokens), strict=True)
    outs = [step(one, goes_on, None, single)[0] for one in singles]
    return torch.stack(outs, 1)[:, first:], state[:-1]


def _differentiable_step(
    tokens: Tokens, state: State, active: Tensor | None, call: StepCall
) -> Parts:
    """``step`` to rings of its own: one node where that serves."""
    reason = why_not_one_node(tokens, state, active, call)
    weights, (add_zero_attn, dropout_p) = call.weights, call.options
    if isinstance(state, INPUT_STATES):
        sizes, kept = _sizes(call), _inputs(state)
        if reason is None:
            return input_node.step(tokens[0], kept, active, weights, sizes)
        how = (*sizes[:2], active, add_zero_attn, dropout_p)
        return inputs.input_step(tokens[0], weights, kept, *how, mixing=mixing.mix)
    rings = _rings(state)
    if reason is None:
        return kv_node.step(tokens, rings, active, weights, add_zero_attn)
    if backends.order(tokens[0].device.type)[0] == "triton":
        return kv_node.step_by_windows(tokens, rings, active, weights, call.options)
    if steps_node.why_not(tokens, rings, 0, weights, call.options) is None:
        return steps_node.step(tokens, rings, active, weights, dropout_p)
    backends.leave_to_pytorch("ring_step_", reason)
    return reference.ring_step(*tokens, weights, rings, active, *call.options)


def why_not_one_node(
    tokens: Tokens, state: State, active: Tensor | None, call: StepCall
) -> str | None:
    """Why a differentiable ``step`` is not one node of autograd; None if it is."""
    if isinstance(state, INPUT_STATES):
        given = (tokens[0], _inputs(state), active, call.weights, _sizes(call))
        return input_node.why_not(*given, call.options.dropout_p)
    return kv_node.why_not(tokens, _rings(state), active, call.weights, call.options)


def _sizes(call: StepCall) -> input_node.Sizes:
    layout = call.layout
    return input_node.Sizes(layout.num_heads, layout.delay, call.options.add_zero_attn)


def take_slots(
    ring: Tensor, position: Tensor, first: int, count: int, known: dict[tuple[int, int], Tensor]
) -> Tensor:
    """``reference.take_slots``, in one call where that serves.

    Args:
        known: slots by their number and the ring's length, to be found once for all rings.
    """
    args = (ring, position, first, count)
    if ring.is_cpu and "cpu" in backends.order("cpu") and not backends.why_missing("cpu"):
        taken: Tensor = torch.ops.continual_mha.cpu_take_slots.default(*args)
        return taken
    which = (count, ring.shape[-2])
    if which not in known:
        known[which] = reference.next_slots(position, first, *which)
    return reference.take(ring, known[which])


def operands(
    tokens: Tokens, state: State, extra: Tensor | int | None, call: StepCall
) -> tuple[Any, ...]:
    """Arguments of the operators for steps; ``extra`` is ``active`` or, for many, ``first``."""
    before, after = _operands_of(tokens, state, call)
    return (*before, extra, *after)


def operator_for(state: State, many: bool) -> str:
    """The name of the operator that takes one token of every stream, or ``many``."""
    if isinstance(state, INPUT_STATES):
        return "input_steps_" if many else "input_step_"
    return "ring_steps_" if many else "ring_step_"


def _operands_of(
    tokens: Tokens, state: State, call: StepCall
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments before ``extra``, and those behind it."""
    rest: tuple[Any, ...] = (*call.options, call.update)
    if isinstance(state, RingState | QuantizedRingState):
        rings = (state.k, state.v, state.q, state.position)
        if isinstance(state, QuantizedRingState):
            rest += (state.k_scale, state.v_scale, call.batch_invariant)
        elif call.batch_invariant:
            rest += (None, None, True)
        return (*tokens, *call.weights, *rings), rest
    packed, _, _, bias, *others = call.weights
    kept = (state.x, state.position, call.layout.num_heads, call.layout.delay)
    if isinstance(state, QuantizedInputState):
        rest += (state.x_scale, call.batch_invariant)
    elif call.batch_invariant:
        rest += (None, True)
    return (tokens[0], packed, bias, *others, *kept), rest


def _rings(state: RingState | QuantizedRingState) -> Rings:
    """The rings of a state as the reference takes them."""
    if isinstance(state, RingState):
        return Rings(*state[:-1])
    k, v = QuantizedRing(state.k, state.k_scale), QuantizedRing(state.v, state.v_scale)
    return Rings(k, v, state.q, state.position)


def _inputs(state: InputState | QuantizedInputState) -> Inputs:
    """As ``_rings``."""
    kept = state.x if isinstance(state, InputState) else QuantizedRing(state.x, state.x_scale)
    return Inputs(kept, state.position)


def to_kv(
    state: InputState | QuantizedInputState, weights: Weights, layout: Layout
) -> RingState | QuantizedRingState:
    """The state laid out as ``layout`` (``kv``) that goes on as ``state`` would. Differentiable."""
    kept, position = _inputs(state)
    held = Inputs(kept.to(weights.out_proj_weight.dtype), position)
    projected = inputs.projected_rings(held, weights, layout.num_heads, layout.delay)
    converted: Any = RingState(*projected, clock=state.clock)
    if layout.cache_dtype is not None:
        converted = _quantized(converted, layout)
    snapshot: RingState | QuantizedRingState = ring.snapshot(converted)
    return snapshot


def _quantized(state: RingState, layout: Layout) -> QuantizedRingState:
    """The same streams with keys and values as ``layout.cache_dtype`` holds them."""
    empty = ring.new_state(layout, 0, state.k)
    assert isinstance(empty, QuantizedRingState)
    template = _rings(empty).k
    assert isinstance(template, QuantizedRing)
    (k, k_scale), (v, v_scale) = template.holding(state.k), template.holding(state.v)
    return QuantizedRingState(k, v, k_scale, v_scale, state.q, state.position, state.clock)


def moving_is_cheaper(num_heads: int, queries: int, embed_dim: int) -> bool:
    """Whether so many queries save multiply-adds by being moved to a ring of inputs.

    Projecting the ring costs ``2 L E E`` for any number of them, and then each ``2 L E``; moved,
    each costs ``2 H L E``.
    """
    return queries * (num_heads - 1) < embed_dim
