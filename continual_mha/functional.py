"""Pure functions over tensors: what the module does, without its state and its layouts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, ops, reference  # noqa: F401  (ops registers the operators)
from .reference import Rings, Weights


class ClipOptions(NamedTuple):
    """What the single-query attention over a clip can be asked for, tensors aside."""

    num_heads: int
    add_zero_attn: bool
    dropout_p: float


def ring_step_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    rings: Rings,
    active: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    update: bool,
) -> Tensor:
    """One token ``(N, E*)`` per stream: output ``(N, E)``; rings and positions change in place."""
    op = torch.ops.continual_mha.ring_step_
    return op(query, key, value, *weights, *rings, active, add_zero_attn, dropout_p, update)


def ring_steps_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    rings: Rings,
    first: int,
    add_zero_attn: bool,
    dropout_p: float,
    update: bool,
) -> Tensor:
    """``T`` tokens ``(N, T, E*)``: outputs ``(N, T - first, E)``; rings and positions change in place."""
    op = torch.ops.continual_mha.ring_steps_
    return op(query, key, value, *weights, *rings, first, add_zero_attn, dropout_p, update)


def input_formulation_is_cheaper(num_heads: int, clip_len: int, embed_dim: int, kdim: int, vdim: int) -> bool:
    """Whether moving the key and value projections to the query's side saves multiply-adds.

    Projecting a clip of ``S`` tokens costs ``S E (Ek + Ev)``, then ``2 S E`` for the attention. Moving
    the projections costs ``E (Ek + Ev)`` once, then ``H S (Ek + Ev)`` for the attention over inputs.
    """
    projected = clip_len * embed_dim * (kdim + vdim) + 2 * clip_len * embed_dim
    moved = (embed_dim + num_heads * clip_len) * (kdim + vdim)
    return moved < projected


def attend_clip(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    options: ClipOptions,
    mask: Tensor | None = None,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one query per stream over a clip.

    Args:
        query: ``(N, E)``.
        key: ``(N, S, Ek)``.
        value: ``(N, S, Ev)``.
        mask: float, added to the scores, broadcastable to ``(N, H, S)``.
        need_weights: also return the attention weights, after dropout.

    Returns:
        ``(N, E)``, and the weights ``(N, H, S + extra slots)`` or None.
    """
    sizes = (key.shape[1], query.shape[-1], key.shape[-1], value.shape[-1])
    cheaper = input_formulation_is_cheaper(options.num_heads, *sizes)
    attend = _attend_inputs if cheaper else _attend_projected
    heads, attn = attend(query, key, value, weights, options, mask, need_weights)
    return F.linear(heads.flatten(1), weights.out_proj_weight, weights.out_proj_bias), attn


def _scaled_query(query: Tensor, weights: Weights, num_heads: int) -> Tensor:
    """Projected queries ``(N, H, D)`` over the square root of ``D``."""
    q = F.linear(query, weights.split()[0], weights.split_bias()[0]).unflatten(-1, (num_heads, -1))
    return q / math.sqrt(q.shape[-1])


def _extra_scores(q: Tensor, weights: Weights, add_zero_attn: bool) -> Tensor | None:
    """Scores ``(N, H, X)`` of the slots that ``add_bias_kv`` and ``add_zero_attn`` add, or None."""
    scores = []
    if weights.bias_k is not None:
        scores.append((q * weights.bias_k.view(q.shape[1:])).sum(-1, keepdim=True))
    if add_zero_attn:
        scores.append(q.new_zeros((*q.shape[:2], 1)))
    return torch.cat(scores, dim=-1) if scores else None


def _normalise(scores: Tensor, extra: Tensor | None, options: ClipOptions) -> Tensor:
    """Weights ``(N, H, S + X)`` from the scores of the clip and of the extra slots."""
    if extra is not None:
        scores = torch.cat([scores, extra.to(scores.dtype)], dim=-1)
    attn = torch.softmax(scores, dim=-1)
    return F.dropout(attn, options.dropout_p) if options.dropout_p > 0.0 else attn


def _add_bias_value(heads: Tensor, attn: Tensor, clip_len: int, weights: Weights) -> Tensor:
    if weights.bias_v is None:
        return heads
    return heads + attn[..., clip_len, None].to(heads.dtype) * weights.bias_v.view(heads.shape[1:])


def _attend_projected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    options: ClipOptions,
    mask: Tensor | None,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Heads' outputs ``(N, H, D)`` from projected keys and values."""
    q = _scaled_query(query, weights, options.num_heads)
    (_, w_k, w_v), (_, b_k, b_v) = weights.split(), weights.split_bias()
    k = reference.split_heads(F.linear(key, w_k, b_k), options.num_heads)  # (N, H, S, D)
    v = reference.split_heads(F.linear(value, w_v, b_v), options.num_heads)
    scores = torch.matmul(k, q.unsqueeze(-1)).squeeze(-1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores if mask is None else scores + mask
    attn = _normalise(scores, _extra_scores(q, weights, options.add_zero_attn), options)
    clip_len = key.shape[1]
    heads = torch.matmul(attn[..., None, :clip_len].to(v.dtype), v).squeeze(-2)
    return _add_bias_value(heads, attn, clip_len, weights), attn if need_weights else None


def _attend_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    options: ClipOptions,
    mask: Tensor | None,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Heads' outputs ``(N, H, D)`` with the projections of key and value moved to the query's side.

    ``q · (W x + b) = (Wᵀ q) · x + q · b``: the second term is the same for every token of the clip, so
    it is taken off the extra slots' scores instead, and drops out altogether where there are none.
    """
    q = _scaled_query(query, weights, options.num_heads)
    (_, w_k, w_v), (_, b_k, b_v) = weights.split(), weights.split_bias()
    extra = _extra_scores(q, weights, options.add_zero_attn)
    if extra is not None and b_k is not None:
        extra = extra - (q * b_k.view(q.shape[1:])).sum(-1, keepdim=True)
    moved = torch.einsum("nhd,hde->nhe", q, w_k.unflatten(0, (options.num_heads, -1)))
    mixed, attn, clip_share = _mix_inputs(moved, key, value, mask, extra, options, need_weights)
    heads = torch.einsum("nhe,hde->nhd", mixed, w_v.unflatten(0, (options.num_heads, -1)))
    if b_v is not None:
        bias = b_v.view(heads.shape[1:])
        heads = heads + (bias if clip_share is None else clip_share.to(heads.dtype) * bias)
    if weights.bias_v is not None:
        assert attn is not None
        heads = _add_bias_value(heads, attn, key.shape[1], weights)
    return heads, attn if need_weights else None


def _mix_inputs(
    moved: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    extra: Tensor | None,
    options: ClipOptions,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weighted sums of inputs ``(N, H, Ev)``, the weights, and the weight that fell on the clip.

    The weights may be None where nobody needs them; the share ``(N, H, 1)`` is None where it is one.
    """
    plain = extra is None and options.dropout_p == 0.0
    if plain and not need_weights and _wants_fused(moved, mask):
        mixed, _ = torch.ops.continual_mha.attend_shared(moved, key, value, mask, None)
        return mixed, None, None
    attn = _normalise(reference.shared_scores(moved, key, mask), extra, options)
    on_clip = attn[..., : key.shape[1]]
    mixed = torch.matmul(on_clip.to(value.dtype), value)
    return mixed, attn, None if plain else on_clip.sum(-1, keepdim=True)


def _wants_fused(query: Tensor, mask: Tensor | None) -> bool:
    """Whether the fused operator serves, and gains over plain PyTorch."""
    if torch.is_autocast_enabled(query.device.type) or (mask is not None and mask.requires_grad):
        return False
    return backends.order(query.device.type)[0] in ("triton", "cuda")
