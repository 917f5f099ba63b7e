"""Plain PyTorch for every operator: the oracle, the differentiable path, and the ``torch`` backend.

The names and positional arguments are those of the operators in ``ops.py``; a trailing underscore
means that rings and positions are updated in place. Everything here can be differentiated by
autograd, as long as the version without the underscore is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import keep_scale
from .operands import Rings, Tokens, Weights
from .precision import wide
from .products import linear, matmul
from .quantized import QuantizedRing, Ring, as_kept, shape_of, tensors
from .tracing import has_numbers, is_exporting, is_fixed, is_transformed

_QUERY_BLOCK = 128
Attending = Callable[..., Tensor]  # as ``attend_in_blocks``
Put = Callable[[Any, Tensor, Tensor], Any]  # ring, slots and tokens to a ring


class _Slots(NamedTuple):
    """Keys and values ``(N, H, S, D)`` with the slots that each query may see, or None for all."""

    k: Ring
    v: Ring
    visible: Tensor | None  # bool, broadcastable to (N, 1, T, S)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``(N, T, E) -> (N, H, T, D)``, a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(
    q: Tensor,  # (N, H, T, D)
    slots: list[_Slots],
    weights: Weights,
    add_zero_attn: bool,
    dropout_p: float,
) -> Tensor:
    """Scaled dot-product attention over groups of slots: the heads' outputs ``(N, T, E)``."""
    q = q / math.sqrt(q.shape[-1])
    scores = [_scores(q, group) for group in slots]
    if weights.bias_k is not None:
        bias_k = split_heads(weights.bias_k, q.shape[1]).to(q.dtype)  # (1, H, 1, D)
        scores.append(matmul(q, bias_k.transpose(-1, -2)))
    if add_zero_attn:
        scores.append(q.new_zeros((*q.shape[:3], 1)))
    attn = _softmax(scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1), dropout_p)
    parts = attn.to(q.dtype).split([s.shape[-1] for s in scores], dim=-1)
    out = sum(_weighted_values(p, group) for p, group in zip(parts, slots, strict=False))
    if weights.bias_v is not None:
        out = out + parts[len(slots)] * split_heads(weights.bias_v, q.shape[1]).to(q.dtype)
    return out.transpose(1, 2).flatten(2)  # type: ignore[union-attr]


def _scores(q: Tensor, group: _Slots) -> Tensor:
    scores = matmul(q, group.k.to(q.dtype).transpose(-1, -2))
    return scores if group.visible is None else scores.masked_fill(~group.visible, -math.inf)


def _weighted_values(attn: Tensor, group: _Slots) -> Tensor:
    v = group.v.to(attn.dtype)
    if group.visible is None:
        return matmul(attn, v)
    # a slot may hold anything, and a weight of zero leaves NaN of what is not finite
    broken = ~v.isfinite().all(dim=-1, keepdim=True)  # (N, H, S, 1)
    seen = torch.matmul(group.visible.to(v.dtype), broken.to(v.dtype)) > 0  # (N, H, T, 1)
    return matmul(attn, v.masked_fill(broken, 0)).masked_fill(seen, math.nan)


def _softmax(scores: Tensor, dropout_p: float) -> Tensor:
    attn = torch.softmax(scores, dim=-1, dtype=wide(scores.dtype))
    return F.dropout(attn, dropout_p) if dropout_p > 0.0 else attn


def _slot_index(ring: Tensor, slot: Tensor) -> Tensor:
    """Index for gather and scatter along the slots of ``ring``; ``slot`` is ``(N, T)``."""
    shape = (*ring.shape[:-2], slot.shape[1], ring.shape[-1])
    return slot.view(slot.shape[0], *(1,) * (ring.dim() - 3), slot.shape[1], 1).expand(shape)


def put(ring: Tensor, slot: Tensor, new: Tensor) -> Tensor:
    """A copy of a ring with tokens ``new`` ``(N, ..., T, D)`` in the slots ``(N, T)``."""
    return ring.scatter(-2, _slot_index(ring, slot), new.to(ring.dtype))


def put_(ring: Ring, slot: Tensor, new: Tensor) -> Ring:
    """``put`` in place; into a ring of quantised tokens too."""
    if isinstance(ring, QuantizedRing):
        for part, codes in zip(ring, ring.holding(new), strict=True):
            put_(part, slot, codes)
        return ring
    return ring.scatter_(-2, _slot_index(ring, slot), new.to(ring.dtype))


def take(ring: Tensor, slot: Tensor) -> Tensor:
    """What is in the slots ``(N, T)`` of a ring."""
    return ring.gather(-2, _slot_index(ring, slot))


def split_off(ring: Tensor, slot: Tensor, rest: bool) -> tuple[Tensor, Tensor | None]:
    """What is in the slots ``(N, T)`` of a ring and, if ``rest``, a ring with zeros there."""
    taken = take(ring, slot)
    return taken, put(ring, slot, torch.zeros_like(taken)) if rest else None


def token_before(ring: Tensor, position: Tensor, steps: int) -> Tensor:
    """The token ``(N, E)`` that came ``steps`` before that at ``position``; zero if none did."""
    at = (position - steps)[:, None]
    return take(ring, at % ring.shape[-2]).squeeze(1).masked_fill(at < 0, 0)


def _all_warm(position: Tensor, sequence_len: int) -> bool:
    """Whether every slot is in use once the next token is written, if that costs no waiting.

    A trace or a sample of ``vmap`` stands for streams of any age.
    """
    if torch.compiler.is_compiling() or is_transformed():
        return False
    on_host = position.device.type == "cpu" and has_numbers(position)
    return on_host and bool((position >= sequence_len - 1).all())


def filled(position: Tensor, sequence_len: int) -> Tensor | None:
    """Slots ``(N, 1, 1, L)`` in use once the token at ``position`` is written; None for all."""
    if _all_warm(position, sequence_len):
        return None
    slots = torch.arange(sequence_len, device=position.device)
    return (slots <= position[:, None])[:, None, None]


def ring_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    rings: Rings,
    active: Tensor | None = None,
    add_zero_attn: bool = False,
    dropout_p: float = 0.0,
    put: Put = put,
) -> tuple[Tensor, Rings]:
    """Output ``(N, E)`` for one token ``(N, E*)`` per stream, and the rings with that token."""
    num_heads, sequence_len = shape_of(rings.k)[1:3]
    q, k, v = (x.unsqueeze(1) for x in weights.project((query, key, value), linear))
    slot = (rings.position % sequence_len)[:, None]
    k_ring = put(rings.k, slot, split_heads(k, num_heads))
    v_ring = put(rings.v, slot, split_heads(v, num_heads))
    due, q_ring = _delayed_queries(q, rings, put)
    slots = _held(k_ring, v_ring, filled(rings.position, sequence_len))
    out = attend(split_heads(due, num_heads), [slots], weights, add_zero_attn, dropout_p)
    out = linear(out, weights.out_proj_weight, weights.out_proj_bias)
    step = 1 if active is None else active.to(torch.int64)
    return out.squeeze(1), Rings(k_ring, v_ring, q_ring, rings.position + step)


def ring_steps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    rings: Rings,
    first: int = 0,
    add_zero_attn: bool = False,
    dropout_p: float = 0.0,
    put: Put | None = put,
    attending: Attending | None = None,
) -> tuple[Tensor, Rings]:
    """Outputs ``(N, T - first, E)`` for tokens ``first ..`` of ``(N, T, E*)``, and the rings.

    ``put=None`` leaves the rings as they are; ``attending`` stands in for ``attend_in_blocks``.
    """
    num_heads, sequence_len = shape_of(rings.k)[1:3]
    q, k, v = weights.project((query, key, value), linear)
    due, q_ring = _delayed_queries(q, rings, put)
    out = (attending or attend_in_blocks)(
        (due, k, v), rings, weights, first, add_zero_attn, dropout_p
    )
    out = linear(out, weights.out_proj_weight, weights.out_proj_bias)
    if put is None:
        return out, rings
    slot = last_positions(rings.position, query.shape[1], sequence_len) % sequence_len
    k_ring, v_ring = (
        put(ring, slot, split_heads(x[:, -slot.shape[1] :], num_heads))
        for ring, x in ((rings.k, k), (rings.v, v))
    )
    return out, Rings(k_ring, v_ring, q_ring, rings.position + query.shape[1])


def attend_in_blocks(
    clip: Tokens,
    rings: Rings,
    weights: Weights,
    first: int,
    add_zero_attn: bool,
    dropout_p: float,
) -> Tensor:
    """Heads' outputs ``(N, T - first, E)`` for a clip of projected tokens ``(N, T, E)``.

    Each block of queries attends to the ring as it lies, as far as its tokens are still in the
    window, and to a band of the clip.
    """
    num_heads, sequence_len = shape_of(rings.k)[1:3]
    q, k, v = (split_heads(x, num_heads) for x in clip)
    seen_k, seen_v = as_kept(rings.k, k), as_kept(rings.v, v)
    outs = [clip[0].new_zeros((*clip[0].shape[:1], 0, clip[0].shape[2]))]
    for start, end in _blocks_of_queries(first, q.shape[2]):
        slots = [_band(seen_k, seen_v, start, end, sequence_len)]
        if start < sequence_len - 1:
            slots.append(
                _held(rings.k, rings.v, _in_window(rings.position, start, end, sequence_len))
            )
        outs.append(attend(q[:, :, start:end], slots, weights, add_zero_attn, dropout_p))
    return outs[1] if len(outs) == 2 else torch.cat(outs, dim=1)


def _blocks_of_queries(first: int, steps: int) -> Iterable[tuple[int, int]]:
    """Begin and end of each; one of all where an exported program takes any number."""
    if is_exporting() and not is_fixed(steps):
        return [(first, steps)]
    starts = range(first, steps, _QUERY_BLOCK)
    return [(start, min(start + _QUERY_BLOCK, steps)) for start in starts]


def _rings(args: tuple[Any, ...]) -> Rings:
    """The rings among the arguments of a step, which may end with the scales of keys and values."""
    k, v, q, position = args[8:12]
    k_scale, v_scale = args[16:18] or (None, None)
    if k_scale is not None and v_scale is not None:
        k, v = QuantizedRing(k, k_scale), QuantizedRing(v, v_scale)
    return Rings(k, v, q, position)


def ring_step_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
) -> Tensor:
    """Operator ``ring_step_``: ``ring_step`` in place. ``update=False`` puts the old slots back."""
    weights, rings = Weights(*args[:8]), _rings(args)
    active, add_zero_attn, dropout_p, update = args[12:16]
    saved = None if update else saved_slots(rings[:3], rings.position)
    out, new = ring_step(query, key, value, weights, rings, active, add_zero_attn, dropout_p, put_)
    if saved is None:
        rings.position.copy_(new.position)
        return out
    for ring, old in saved:
        put_slots_(ring, rings.position, 0, old)
    return out


def ring_steps_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
) -> Tensor:
    """Operator ``ring_steps_``: ``ring_steps`` in place."""
    weights, rings = Weights(*args[:8]), _rings(args)
    first, add_zero_attn, dropout_p, update = args[12:16]
    put = put_ if update else None
    out, new = ring_steps(query, key, value, weights, rings, first, add_zero_attn, dropout_p, put)
    if update:
        rings.position.copy_(new.position)
    return out


def _delayed_queries(q: Tensor, rings: Rings, put: Put | None) -> tuple[Tensor, Tensor]:
    """The ``T`` queries whose turn it is, out of those that wait and the new ``(N, T, E)``."""
    waiting = rings.q.shape[1]
    if waiting == 0:
        return q, rings.q
    steps = q.shape[1]
    before = torch.arange(1 - waiting, 0, device=q.device)
    slot = (rings.position[:, None] + before) % waiting
    old = take(rings.q, slot).to(q.dtype)
    due = torch.cat([old, q], dim=1)[:, :steps]
    if put is None:
        return due, rings.q
    slot = last_positions(rings.position, steps, waiting) % waiting
    return due, put(rings.q, slot, q[:, -slot.shape[1] :])


def last_positions(position: Tensor, steps: int, ring_len: int) -> Tensor:
    """Positions ``(N, min(steps, ring_len))`` of the last of ``steps`` tokens, those that stay."""
    kept = torch.arange(max(0, steps - ring_len), steps, device=position.device)
    return position[:, None] + kept


def next_slots(position: Tensor, first: int, count: int, ring_len: int) -> Tensor:
    """Slots ``(N, count)`` from that of the token ``first`` after a stream's position on."""
    ahead = torch.arange(first, first + count, device=position.device)
    return (position[:, None] + ahead) % max(ring_len, 1)


def take_slots(ring: Tensor, position: Tensor, first: int, count: int) -> Tensor:
    """A copy of what is in ``next_slots`` of a ring."""
    return take(ring, next_slots(position, first, count, ring.shape[-2]))


def put_slots_(ring: Tensor, position: Tensor, first: int, taken: Tensor) -> None:
    """Put back what ``take_slots`` took."""
    put_(ring, next_slots(position, first, taken.shape[-2], ring.shape[-2]), taken)


def saved_slots(rings: Iterable[Ring], position: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The tensors that rings are made of, each with a copy of what its next token overwrites."""
    return [(x, take_slots(x, position, 0, min(1, x.shape[-2]))) for x in tensors(rings)]


def _band(k: Tensor, v: Tensor, start: int, end: int, sequence_len: int) -> _Slots:
    """The tokens of a clip ``(N, H, T, D)`` that the queries ``start .. end - 1`` may see."""
    low = max(0, start - sequence_len + 1)
    queries = torch.arange(start, end, device=k.device)[:, None]
    keys = torch.arange(low, end, device=k.device)
    visible = (keys <= queries) & (keys > queries - sequence_len)
    return _Slots(k[:, :, low:end], v[:, :, low:end], visible[None, None])


def _held(k: Ring, v: Ring, visible: Tensor | None) -> _Slots:
    """Keys and values of rings; where there are gradients, without what no query sees."""
    tensors = isinstance(k, Tensor) and isinstance(v, Tensor)
    if tensors and visible is not None and torch.is_grad_enabled():
        k, v = _without_unseen(k, v, visible)
    return _Slots(k, v, visible)


def _without_unseen(k: Any, v: Any, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``(N, H, S, D)`` with zeros where no query of ``(N, 1, T, S)`` sees them.

    There may be NaN, of a row that paused, of a token that left every window or of a slot's former
    owner, and in gradients zero times NaN is NaN.
    """
    unseen = ~visible.any(-2).unsqueeze(-1)
    return k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)


def _in_window(position: Tensor, start: int, end: int, sequence_len: int) -> Tensor:
    """Slots ``(N, 1, end - start, L)`` that the queries ``start .. end - 1`` may see."""
    slots = torch.arange(sequence_len, device=position.device)
    last = position[:, None] - 1
    held = (last - (last - slots) % sequence_len)[:, None]  # position of the token in each slot
    queries = position[:, None, None] + torch.arange(start, end, device=position.device)[:, None]
    return ((held >= 0) & (held > queries - sequence_len))[:, None]


class _Window(NamedTuple):
    """All tokens of ring and clip, ``S = L + T`` of them, and who of the queries sees which.

    A token that nobody sees may hold anything, NaN included, and is made zero.
    """

    q: Tensor  # (N, H, T - first, D), scaled
    k: Tensor  # (N, H, S, D)
    v: Tensor  # (N, H, S, D)
    visible: Tensor  # (N, 1, T - first, S), bool
    number: Tensor  # (N, 1, 1, S), by which dropout knows a token: L is the first of the clip

    def weights(self, lse: Tensor | None, sink: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention weights ``(N, H, T - first, S)`` and the logarithm of their denominator."""
        scores = matmul(self.q, self.k.transpose(-1, -2))
        scores = scores.to(wide(scores.dtype)).masked_fill(~self.visible, -math.inf)
        if lse is None:
            lse = torch.logsumexp(scores, dim=-1)
            lse = lse if sink is None else torch.logaddexp(lse, sink.to(lse.dtype))
        return torch.exp(scores - lse.unsqueeze(-1)), lse

    def dropout(self, attn: Tensor, seed: Tensor, first: int, dropout_p: float) -> Tensor:
        """What dropout multiplies the weights with."""
        streams, heads, rows = (torch.arange(n, device=attn.device) for n in attn.shape[:3])
        counters = (self.number, streams[:, None, None, None], heads[:, None, None])
        return keep_scale(seed, *counters, rows[:, None] + first, dropout_p).to(attn.dtype)


def _window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    position: Tensor,
    first: int,
) -> _Window:
    steps, length = key.shape[1], k_ring.shape[2]
    slots, clip = torch.arange(length, device=key.device), torch.arange(steps, device=key.device)
    in_ring = -1 - (position[:, None] - 1 - slots) % length
    token = torch.cat([in_ring, clip.expand(len(position), -1)], dim=1)[:, None]  # (N, 1, S)
    asking = clip[first:, None]
    seen = (token <= asking) & (token > asking - length) & (token >= -position[:, None, None])
    q, k, v = (x.transpose(1, 2) for x in (query[:, first:], key, value))
    k, v = (torch.cat([r.to(x.dtype), x], dim=2) for r, x in ((k_ring, k), (v_ring, v)))
    k, v = _without_unseen(k, v, seen[:, None])
    number = (token + length)[:, None]
    return _Window(q / math.sqrt(q.shape[-1]), k, v, seen[:, None], number)


def attend_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    position: Tensor,
    sink: Tensor | None,
    seed: Tensor | None,
    first: int,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Operator ``attend_window``: each query sees the last ``L`` tokens of ring and clip.

    Args:
        query: ``(N, T, H, D)``; those before ``first`` are not asked.
        key: ``(N, T, H, D)``, of the clip.
        value: ``(N, T, H, D)``.
        k_ring: ``(N, H, L, D)``, the keys before the clip.
        v_ring: ``(N, H, L, D)``.
        position: ``(N,)``, tokens that were seen before the clip.
        sink: ``(N, T - first, H)``, a score that has no value, or None.
        seed: ``(1,)`` int64, decides which weights are dropped; None to drop none.
        first: the first query that is answered.
        dropout_p: the share that is dropped.

    Returns:
        ``(N, T - first, H, D)``, and the logarithm of the softmax's denominator
        ``(N, T - first, H)`` in at least fp32.
    """
    window = _window(query, key, value, k_ring, v_ring, position, first)
    attn, lse = window.weights(None, None if sink is None else sink.transpose(1, 2))
    if seed is not None:
        attn = attn * window.dropout(attn, seed, first, dropout_p)
    out = matmul(attn.to(query.dtype), window.v)
    return out.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()


def attend_window_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    position: Tensor,
    sink: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    first: int,
    dropout_p: float,
    rings: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Operator ``attend_window_backward``: gradients of query, key, value, both rings and sink.

    None stands for a gradient of zeros; without ``rings`` theirs are not computed.
    """
    window = _window(query, key, value, k_ring, v_ring, position, first)
    attn, _ = window.weights(lse.transpose(1, 2), None)
    grad_out = grad_out.transpose(1, 2)
    grad_attn = matmul(grad_out, window.v.transpose(-1, -2)).to(attn.dtype)
    # what every score, the sink's included, loses to the normalisation
    shared = -(grad_out.to(attn.dtype) * out.transpose(1, 2).to(attn.dtype)).sum(-1)
    shared = shared if grad_lse is None else shared + grad_lse.transpose(1, 2)
    applied = attn
    if seed is not None:
        scale = window.dropout(attn, seed, first, dropout_p)
        applied, grad_attn = attn * scale, grad_attn * scale
    grad_scores = (attn * (grad_attn + shared.unsqueeze(-1))).to(query.dtype)
    asked = matmul(grad_scores, window.k) / math.sqrt(query.shape[-1])
    d_query = F.pad(asked.transpose(1, 2), (0, 0, 0, 0, first, 0)).contiguous()
    d_k = matmul(grad_scores.transpose(-1, -2), window.q)
    d_v = matmul(applied.to(query.dtype).transpose(-1, -2), grad_out)
    length = k_ring.shape[2]
    d_key, d_value = (x[:, :, length:].transpose(1, 2).contiguous() for x in (d_k, d_v))
    d_k_ring, d_v_ring = (
        x[:, :, :length].contiguous() if rings else x.new_empty(0) for x in (d_k, d_v)
    )
    d_sink = lse.new_empty(0)
    if sink is not None:
        d_sink = torch.exp(sink.to(lse.dtype) - lse) * shared.transpose(1, 2)
    return d_query, d_key, d_value, d_k_ring, d_v_ring, d_sink


def attend_shared(
    query: Tensor, key: Tensor, value: Tensor | None, mask: Tensor | None, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Operator ``attend_shared``: the queries of all heads against one tile of keys and values.

    Args:
        query: ``(N, H, Ek)``, already scaled.
        key: ``(N, S, Ek)``.
        value: ``(N, S, Ev)``; None for the key, so that the two have one gradient.
        mask: float, added to the scores, broadcastable to ``(N, H, S)``, or None.
        sink: ``(N, H)``, a score that takes part in the softmax but has no value, or None.

    Returns:
        ``(N, H, Ev)``, and the logarithm of the softmax's denominator ``(N, H)`` in at least fp32.
    """
    return attend_shared_full(query, key, value, mask, sink, None, 0.0, False)[:2]


def attend_shared_full(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    sink: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Operator ``attend_shared_full``: ``attend_shared`` with dropout and weights on request.

    Args:
        seed: ``(1,)`` int64, decides which weights are dropped; None to drop none.
        dropout_p: the share that is dropped.
        need_weights: whether to return the weights.

    Returns:
        Besides the results of ``attend_shared``, in at least fp32: what is left of the sum of the
        weights ``(N, H)`` if there is a seed, and the weights that were applied, averaged over the
        heads, ``(N, S)`` if asked for; tensors without elements if not.
    """
    scores = shared_scores(query, key, mask)
    lse = torch.logsumexp(scores, dim=-1)
    if sink is not None:
        lse = torch.logaddexp(lse, sink.to(lse.dtype))
    attn = torch.exp(scores - lse.unsqueeze(-1))
    if seed is not None:
        attn = attn * _shared_dropout(attn, seed, dropout_p)
    kept = lse.new_empty(0) if seed is None else attn.sum(-1)
    average = attn.mean(1) if need_weights else lse.new_empty(0)
    value = key if value is None else value
    return matmul(attn.to(value.dtype), value), lse, kept, average


def _shared_dropout(attn: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    streams, heads, slots = (torch.arange(size, device=attn.device) for size in attn.shape)
    zero = torch.zeros((), dtype=torch.int64, device=attn.device)
    scale = keep_scale(
        seed, slots, streams[:, None, None], heads[:, None], zero, dropout_p
    )  # (N, H, S)
    return scale.to(attn.dtype)


def shared_scores(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Scores ``(N, H, S)`` of ``attend_shared`` in at least fp32."""
    scores = matmul(query, key.transpose(-1, -2))
    scores = scores.to(wide(scores.dtype))
    return scores if mask is None else scores + mask


def attend_shared_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Operator ``attend_shared_backward``: gradients of query, key, value and sink.

    A gradient of a result may be None for zeros. Where ``value`` is None that of ``key`` is of
    both, and that of ``value`` has no elements.
    """
    kept = lse.new_empty(0)
    return attend_shared_full_backward(
        grad_out, grad_lse, None, None, query, key, value, mask, sink, None, out, lse, kept, 0.0
    )


def attend_shared_full_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_kept: Tensor | None,
    grad_average: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    sink: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    dropout_p: float,
    *,
    tiles: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Operator ``attend_shared_full_backward``: as ``attend_shared_backward``.

    A query to which the mask leaves nothing has none either. Without ``tiles`` those of key and
    value have no elements.
    """
    hidden = torch.isneginf(lse)
    attn = torch.exp(shared_scores(query, key, mask) - lse.masked_fill(hidden, 0.0).unsqueeze(-1))
    given = key if value is None else value
    grad_attn = matmul(grad_out, given.transpose(-1, -2)).to(attn.dtype)
    # what every score, the sink's included, loses to the normalisation
    shared = -(grad_out.to(attn.dtype) * out.to(attn.dtype)).sum(-1)
    if grad_lse is not None:
        shared = shared + grad_lse
    if grad_kept is not None:
        grad_attn = grad_attn + grad_kept.unsqueeze(-1)
        shared = shared - grad_kept * kept
    applied = attn
    if seed is not None:
        scale = _shared_dropout(attn, seed, dropout_p)
        applied = attn * scale
    if grad_average is not None:
        grad_weight = grad_average.unsqueeze(1) / query.shape[1]
        grad_attn = grad_attn + grad_weight
        shared = shared - (applied * grad_weight).sum(-1)
    if seed is not None:
        grad_attn = grad_attn * scale
    shared = shared.masked_fill(hidden, 0.0)
    grad_scores = (attn * (grad_attn + shared.unsqueeze(-1))).to(query.dtype)
    d_query = matmul(grad_scores, key)
    d_key = d_value = key.new_zeros(0)
    if tiles:
        d_key = matmul(grad_scores.transpose(-1, -2), query)
        d_value = matmul(applied.to(given.dtype).transpose(-1, -2), grad_out)
    if tiles and value is None:
        d_key, d_value = d_key + d_value, d_key.new_zeros(0)
    d_sink = shared.new_zeros(0) if sink is None else torch.exp(sink.to(lse.dtype) - lse) * shared
    return d_query, d_key, d_value, d_sink


def attend_shared_query_backward(*args: Any) -> tuple[Tensor, Tensor]:
    """Operator ``attend_shared_query_backward``: where key and value need no gradient.

    Takes what ``attend_shared_full_backward`` does, and returns the gradients of query and sink.
    """
    d_query, _, _, d_sink = attend_shared_full_backward(*args, tiles=False)
    return d_query, d_sink
