"""Pure functions over tensors: what the module does, without its state and its layouts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, ops, reference, ring  # noqa: F401  (ops registers the operators)
from .dropout import dropout_seed
from .precision import autocast_dtype, wide
from .quantized import QuantizedRing, Ring, as_kept, tensors
from .reference import Rings, Weights
from .repeat import Run
from .ring import (
    InputState,
    Layout,
    QuantizedInputState,
    QuantizedRingState,
    RingState,
    State,
)

# On a CPU the fused operator gains from such a tile on, and in half precision at any size, where it
# also rounds less: see docs/formulations.md.
_CPU_FUSED_ELEMENTS = 1 << 19

Tokens = tuple[Tensor, Tensor, Tensor]  # query, key and value of a call


class Options(NamedTuple):
    """What an attention can be asked for, tensors and sizes aside."""

    add_zero_attn: bool
    dropout_p: float


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


def is_shared(tokens: Tokens) -> bool:
    """Whether query, key and value are one tensor."""
    return tokens[1] is tokens[0] and tokens[2] is tokens[0]


def step(
    tokens: Tokens, state: State, active: Tensor | None, call: StepCall
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Take one token ``(N, E*)`` per stream; ``active``, ``(N,)`` bool or None, says who advances.

    Returns:
        The output ``(N, E)``, and the parts of the state after the token, but for the clock.
    """
    if isinstance(state, InputState | QuantizedInputState):
        return _input_step(tokens[0], state, active, call)
    if call.differentiable:
        return reference.ring_step(*tokens, call.weights, _rings(state), active, *call.options)
    return _run("ring_step_", operands(tokens, state, active, call)), state[:-1]


def repeated_step(query: Tensor, state: State, call: StepCall) -> Run | None:
    """``step`` for more tokens like ``query`` of self-attention, with all but those decided.

    None if such a step is not one operator that writes to the rings.
    """
    if isinstance(state, InputState | QuantizedInputState) or call.differentiable:
        return None
    before, after = _operands_of(state, call)
    function = backends.choose("ring_step_", (query, query, query, *before, None, *after))
    return lambda token, active: function(token, token, token, *before, active, *after)


def steps(
    tokens: Tokens, state: State, first: int, call: StepCall
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As ``step``, for ``T`` tokens ``(N, T, E*)`` per stream and outputs ``(N, T - first, E)``."""
    if isinstance(state, InputState | QuantizedInputState):
        return _input_steps(tokens[0], state, first, call)
    if call.differentiable:
        return reference.ring_steps(*tokens, call.weights, _rings(state), first, *call.options)
    return _run("ring_steps_", operands(tokens, state, first, call)), state[:-1]


def _run(name: str, args: tuple[Any, ...]) -> Tensor:
    """Run an operator: as one under the compiler, which cannot look into it, else directly."""
    if torch.compiler.is_compiling():
        out: Tensor = getattr(torch.ops.continual_mha, name)(*args)
    else:
        out = backends.choose(name, args)(*args)
    return out


def operands(
    tokens: Tokens,
    state: RingState | QuantizedRingState,
    extra: Tensor | int | None,
    call: StepCall,
) -> tuple[Any, ...]:
    """Arguments of the operators for steps; ``extra`` is ``active`` or, for many, ``first``."""
    before, after = _operands_of(state, call)
    return (*tokens, *before, extra, *after)


def _operands_of(
    state: RingState | QuantizedRingState, call: StepCall
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments between the tokens and ``extra``, and those behind it."""
    rings = (state.k, state.v, state.q, state.position)
    rest: tuple[Any, ...] = ()
    if isinstance(state, QuantizedRingState):
        rest = (state.k_scale, state.v_scale, call.batch_invariant)
    elif call.batch_invariant:
        rest = (None, None, True)
    return (*call.weights, *rings), (*call.options, call.update, *rest)


def _rings(state: RingState | QuantizedRingState) -> Rings:
    """The rings of a state as the reference takes them."""
    if isinstance(state, RingState):
        return Rings(*state[:-1])
    k, v = QuantizedRing(state.k, state.k_scale), QuantizedRing(state.v, state.v_scale)
    return Rings(k, v, state.q, state.position)


def _inputs(state: InputState | QuantizedInputState) -> Ring:
    """The ring of tokens of a state."""
    return state.x if isinstance(state, InputState) else QuantizedRing(state.x, state.x_scale)


def _input_step(
    token: Tensor, state: InputState | QuantizedInputState, active: Tensor | None, call: StepCall
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``step`` over a ring of inputs: write the token, then attend to the ring as to a clip."""
    layout, position = call.layout, state.position
    kept = _inputs(state)
    put: reference.Put = reference.put if call.differentiable else reference.put_
    saved = []
    if not (call.update or call.differentiable):
        saved = reference.slots_of_next_tokens(tensors([kept]), position, 1)
    kept = put(kept, (position % layout.sequence_len)[:, None], token.unsqueeze(1))
    x = kept.to(token.dtype)
    asked = reference.token_before(x, position, layout.delay) if layout.delay else token
    filled = reference.filled(position, layout.sequence_len)
    mask = None if filled is None else _hide(~filled[:, 0], token.dtype)
    out, _ = attend_clip(
        (asked, x, x), call.weights, layout.num_heads, call.options, mask, moved=True
    )
    for ring_, slot, old in saved:
        put(ring_, slot, old)
    ahead = 1 if active is None else active.to(torch.int64)
    if call.update and not call.differentiable:
        return out, (*tensors([kept]), position.add_(ahead))
    return out, (*tensors([kept]), position + ahead)


def _input_steps(
    tokens: Tensor, state: InputState | QuantizedInputState, first: int, call: StepCall
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``steps`` over a ring of inputs: for many tokens, keys and values are worth projecting."""
    kept, length = _inputs(state), call.layout.sequence_len
    x, seen = kept.to(tokens.dtype), as_kept(kept, tokens)
    rings = _projected(x, state.position, call.weights, call.layout)
    asked = seen if call.layout.delay else tokens  # a query that waits is asked from the ring
    out, _ = reference.ring_steps(
        asked, seen, seen, call.weights, rings, first, *call.options, put=None
    )
    if not call.update:
        return out, state[:-1]
    put: reference.Put = reference.put if call.differentiable else reference.put_
    slot = reference.last_positions(state.position, tokens.shape[1], length) % length
    kept = put(kept, slot, tokens[:, -slot.shape[1] :])
    if call.differentiable:
        return out, (*tensors([kept]), state.position + tokens.shape[1])
    return out, (*tensors([kept]), state.position.add_(tokens.shape[1]))


def _projected(x: Tensor, position: Tensor, weights: Weights, layout: Layout) -> Rings:
    """The rings of formulation ``kv`` that hold the same tokens as a ring of inputs ``x``."""
    q, k, v = (
        F.linear(x, w, b) for w, b in zip(weights.split(), weights.split_bias(), strict=True)
    )
    k, v = (reference.split_heads(x, layout.num_heads).contiguous() for x in (k, v))
    waiting = layout.delay + 1 if layout.delay else 0
    q_ring = q.new_zeros(q.shape[0], waiting, q.shape[2])
    if waiting:
        back = torch.arange(-layout.delay, 0, device=q.device)
        at = position[:, None] + back
        known = reference.take(q, at % layout.sequence_len)
        bias = weights.split_bias()[0]  # the query of a token of zeros, as in a single step
        absent = q.new_zeros(q.shape[2]) if bias is None else bias
        known = torch.where((at < 0).unsqueeze(-1), absent, known)
        q_ring = reference.put(q_ring, at % waiting, known)
    return Rings(k, v, q_ring, position)


def to_kv(
    state: InputState | QuantizedInputState, weights: Weights, layout: Layout
) -> RingState | QuantizedRingState:
    """The state laid out as ``layout`` (``kv``) that goes on as ``state`` would. Differentiable."""
    x = _inputs(state).to(weights.out_proj_weight.dtype)
    projected = _projected(x, state.position, weights, layout)
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


def _hide(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores: minus infinity where ``hidden``."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(
        hidden, -math.inf
    )


def input_formulation_is_cheaper(
    num_heads: int, clip_len: int, embed_dim: int, kdim: int, vdim: int
) -> bool:
    """Whether moving the key and value projections to the query's side saves multiply-adds.

    Projecting a clip of ``S`` tokens costs ``S E (Ek + Ev)``, and the attention ``2 S E``. Moving
    the projections costs ``E (Ek + Ev)`` once, and the attention over inputs ``H S (Ek + Ev)``.
    """
    projected = clip_len * embed_dim * (kdim + vdim) + 2 * clip_len * embed_dim
    moved = (embed_dim + num_heads * clip_len) * (kdim + vdim)
    return moved < projected


def attend_clip(
    tokens: Tokens,
    weights: Weights,
    num_heads: int,
    options: Options,
    mask: Tensor | None = None,
    need_weights: bool = False,
    moved: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one query per stream over a clip.

    Args:
        tokens: the query ``(N, E)``, keys ``(N, S, Ek)`` and values ``(N, S, Ev)``.
        mask: float, added to the scores, broadcastable to ``(N, H, S)``.
        need_weights: also return the attention weights, after dropout.
        moved: whether to move the key and value projections to the query's side, which is the same
            in exact arithmetic; None for whichever is cheaper.

    Returns:
        ``(N, E)``, and the weights averaged over the heads, ``(N, S + extra slots)``, or None.
    """
    query, key, value = tokens
    weights = weights.unpacked()
    if moved is None:
        sizes = (key.shape[1], query.shape[-1], key.shape[-1], value.shape[-1])
        moved = input_formulation_is_cheaper(num_heads, *sizes)
    attend = _attend_inputs if moved else _attend_projected
    w_q, b_q = weights.split()[0], weights.split_bias()[0]
    q = F.linear(query, w_q, b_q).unflatten(-1, (num_heads, -1))
    q = q / math.sqrt(q.shape[-1])
    heads, on_extra, attn = attend(q, key, value, weights, options, mask, need_weights)
    heads = _with_bias_slot(heads, on_extra, weights)
    out = F.linear(heads.flatten(1), weights.out_proj_weight, weights.out_proj_bias)
    return out, attn


def _with_bias_slot(heads: Tensor, on_extra: Tensor | None, weights: Weights) -> Tensor:
    """Heads' outputs ``(..., H, D)`` with the share of the slot that ``add_bias_kv`` adds."""
    if on_extra is None or weights.bias_v is None:
        return heads
    return heads + on_extra[..., :1].to(heads.dtype) * weights.bias_v.view(heads.shape[-2:])


def _extra_scores(q: Tensor, weights: Weights, add_zero_attn: bool) -> Tensor | None:
    """Scores ``(..., H, X)`` of the slots that ``add_bias_kv`` and ``add_zero_attn`` add, or None.

    The queries ``(..., H, D)`` are scaled already.
    """
    scores = []
    if weights.bias_k is not None:
        scores.append((q * weights.bias_k.view(q.shape[-2:])).sum(-1, keepdim=True))
    if add_zero_attn:
        scores.append(q.new_zeros((*q.shape[:-1], 1)))
    return torch.cat(scores, dim=-1) if scores else None


def _normalise(scores: Tensor, extra: Tensor | None, dropout_p: float, blank: bool) -> Tensor:
    """Weights ``(N, H, S + X)`` from the scores of the clip and of the extra slots.

    A query to which the masks leave nothing gets zeros if ``blank``, else NaN: which of the two
    ``torch.nn.MultiheadAttention`` gives depends on whether it has to return the weights.
    """
    if extra is not None:
        scores = torch.cat([scores, extra.to(scores.dtype)], dim=-1)
    hidden = torch.isneginf(scores).all(dim=-1, keepdim=True) if blank else None
    if hidden is not None:
        scores = scores.masked_fill(hidden, 0.0)  # no NaN in the gradient either
    attn = torch.softmax(scores, dim=-1)
    attn = attn if hidden is None else attn.masked_fill(hidden, 0.0)
    return F.dropout(attn, dropout_p) if dropout_p > 0.0 else attn


class _Attended(NamedTuple):
    """What a query got from a clip.

    Attributes:
        heads: ``(N, H, D)``, the extra slots aside.
        on_extra: weights of the extra slots, ``(N, H, X)``, or None.
        attn: all weights averaged over the heads, ``(N, S + X)``, or None.
    """

    heads: Tensor
    on_extra: Tensor | None
    attn: Tensor | None


def _attend_projected(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    options: Options,
    mask: Tensor | None,
    need_weights: bool,
) -> _Attended:
    """Attention over projected keys and values."""
    (_, w_k, w_v), (_, b_k, b_v) = weights.split(), weights.split_bias()
    k = reference.split_heads(F.linear(key, w_k, b_k), q.shape[1])  # (N, H, S, D)
    v = reference.split_heads(F.linear(value, w_v, b_v), q.shape[1])
    scores = torch.matmul(k, q.unsqueeze(-1)).squeeze(-1)
    scores = scores.to(wide(scores.dtype))
    scores = scores if mask is None else scores + mask
    extra = _extra_scores(q, weights, options.add_zero_attn)
    attn = _normalise(scores, extra, options.dropout_p, mask is not None and not need_weights)
    on_clip, on_extra = attn.split([key.shape[1], attn.shape[2] - key.shape[1]], dim=-1)
    heads = torch.matmul(on_clip.unsqueeze(-2).to(v.dtype), v).squeeze(-2)
    return _Attended(
        heads, None if extra is None else on_extra, attn.mean(1) if need_weights else None
    )


class _Mix(NamedTuple):
    """Weighted sums of a clip's inputs ``(N, H, Ev)``; otherwise as ``_Attended``.

    Attributes:
        share: the sum of the clip's weights, ``(N, H, 1)``; None for 1.
    """

    inputs: Tensor
    share: Tensor | None
    on_extra: Tensor | None
    attn: Tensor | None


def _attend_inputs(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    options: Options,
    mask: Tensor | None,
    need_weights: bool,
) -> _Attended:
    """As ``_attend_projected``, with the projections of key and value moved to the query's side.

    ``q · (W x + b) = (Wᵀ q) · x + q · b``: the second term is the same for every token of the clip,
    so it is taken off the extra slots' scores instead, and drops out where there are none.
    """
    num_heads = q.shape[1]
    (_, w_k, w_v), (_, b_k, b_v) = weights.split(), weights.split_bias()
    extra = _extra_scores(q, weights, options.add_zero_attn)
    if extra is not None and b_k is not None:
        extra = extra - (q * b_k.view(q.shape[1:])).sum(-1, keepdim=True)
    moved = torch.einsum("nhd,hde->nhe", q, w_k.unflatten(0, (num_heads, -1)))
    full = need_weights or options.dropout_p > 0.0
    mixing = _fused_mix if wants_fused(moved, key, value, mask, full) else _plain_mix
    mix = mixing(moved, key, value, mask, extra, options.dropout_p, need_weights)
    heads = torch.einsum("nhe,hde->nhd", mix.inputs, w_v.unflatten(0, (num_heads, -1)))
    if b_v is not None:
        bias = b_v.view(heads.shape[1:])
        heads = heads + (bias if mix.share is None else bias * mix.share.to(heads.dtype))
    return _Attended(heads, mix.on_extra, mix.attn)


def _plain_mix(
    moved: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    extra: Tensor | None,
    dropout_p: float,
    need_weights: bool,
) -> _Mix:
    """Attention over inputs step by step, every step one that autograd knows."""
    blank = mask is not None and not need_weights
    attn = _normalise(reference.shared_scores(moved, key, mask), extra, dropout_p, blank)
    on_clip, on_extra = attn.split([key.shape[1], attn.shape[2] - key.shape[1]], dim=-1)
    plain = extra is None and dropout_p == 0.0
    share = None if plain and not blank else on_clip.sum(-1, keepdim=True)
    if plain and share is not None:  # exactly 1, as where there is no mask; or 0
        share = share > 0
    return _Mix(
        torch.matmul(on_clip.to(value.dtype), value),
        share,
        None if extra is None else on_extra,
        attn.mean(1) if need_weights else None,
    )


def _fused_mix(
    moved: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    extra: Tensor | None,
    dropout_p: float,
    need_weights: bool,
) -> _Mix:
    """The same by the fused operators: what they return tells the extra slots' weights too."""
    args = (moved, key, value, mask, _sink(extra))
    seed = dropout_seed(dropout_p, moved.device)
    attn: Tensor | None = None
    share: Tensor | None = None
    if seed is None and not need_weights:
        mixed, lse = torch.ops.continual_mha.attend_shared(*args)
    else:
        full = torch.ops.continual_mha.attend_shared_full
        mixed, lse, kept, attn = full(*args, seed, dropout_p, need_weights)
        share = None if seed is None else kept.unsqueeze(-1)
    on_extra = _weights_of_extra(extra, lse, dropout_p)
    if on_extra is not None and share is None:
        share = 1.0 - on_extra.sum(-1, keepdim=True)
    if not need_weights:
        attn = None
    elif on_extra is not None and attn is not None:
        attn = torch.cat([attn, on_extra.mean(1)], dim=-1)
    if mask is not None and extra is None and not need_weights:
        hidden = torch.isneginf(lse).unsqueeze(-1)
        mixed = mixed.masked_fill(hidden, 0.0)
        share = (~hidden).to(mixed.dtype) if share is None else share.masked_fill(hidden, 0.0)
    return _Mix(mixed, share, on_extra, attn)


def _sink(extra: Tensor | None) -> Tensor | None:
    """One score that weighs as much as all extra slots ``(..., H, X)`` together."""
    return None if extra is None else torch.logsumexp(extra.to(wide(extra.dtype)), dim=-1)


def _weights_of_extra(extra: Tensor | None, lse: Tensor, dropout_p: float) -> Tensor | None:
    """Weights of the extra slots, given the logarithm of the softmax's whole denominator."""
    if extra is None:
        return None
    on_extra = torch.exp(extra - lse.unsqueeze(-1))
    return F.dropout(on_extra, dropout_p) if dropout_p > 0.0 else on_extra


def wants_fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, full: bool = False
) -> bool:
    """Whether the fused operator serves, and gains over plain PyTorch.

    ``full`` asks for the operator that also knows dropout and returns weights.
    """
    if autocast_dtype(query.device.type) or (mask is not None and mask.requires_grad):
        return False
    first = backends.order(query.device.type)[0]
    if full:
        return first == "triton" and _triton_covers(
            "attend_shared_full", query, key, value, mask, None, None, 0.0, True
        )
    if first != "cpu":
        return first in ("triton", "cuda")
    large = query.element_size() == 2 or key.numel() >= _CPU_FUSED_ELEMENTS
    if not large or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return False  # there is no kernel for the gradient
    return backends.why_not("cpu", "attend_shared", (query, key, value, mask, None)) is None


def _triton_covers(name: str, *args: Any) -> bool:
    """Whether Triton runs an operator; under the compiler, which cannot ask, let it be so."""
    return torch.compiler.is_compiling() or backends.why_not("triton", name, args) is None
