"""Pure functions over tensors: what the module does, without its state and its layouts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, ops, reference  # noqa: F401  (ops registers the operators)
from .reference import Rings, Weights

Tokens = tuple[Tensor, Tensor, Tensor]  # query, key and value of a call


class Options(NamedTuple):
    """What an attention can be asked for, tensors and sizes aside."""

    add_zero_attn: bool
    dropout_p: float


def step(
    tokens: Tokens,
    weights: Weights,
    rings: Rings,
    active: Tensor | None,
    options: Options,
    update: bool,
    differentiable: bool,
) -> tuple[Tensor, Rings]:
    """Take one token ``(N, E*)`` per stream.

    Args:
        active: ``(N,)`` bool: which streams advance; None for all.
        update: whether to remember the token.
        differentiable: whether to make new rings, which autograd can follow, rather than to write
            to those given.

    Returns:
        The output ``(N, E)``, and the rings after the token.
    """
    if differentiable:
        return reference.ring_step(*tokens, weights, rings, active, *options)
    op = torch.ops.continual_mha.ring_step_
    return op(*tokens, *weights, *rings, active, *options, update), rings


def steps(
    tokens: Tokens,
    weights: Weights,
    rings: Rings,
    first: int,
    options: Options,
    update: bool,
    differentiable: bool,
) -> tuple[Tensor, Rings]:
    """As ``step``, for ``T`` tokens ``(N, T, E*)`` per stream and outputs ``(N, T - first, E)``."""
    if differentiable:
        return reference.ring_steps(*tokens, weights, rings, first, *options)
    op = torch.ops.continual_mha.ring_steps_
    return op(*tokens, *weights, *rings, first, *options, update), rings


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
) -> tuple[Tensor, Tensor | None]:
    """Attention of one query per stream over a clip, in whichever formulation is cheaper.

    Args:
        tokens: the query ``(N, E)``, keys ``(N, S, Ek)`` and values ``(N, S, Ev)``.
        mask: float, added to the scores, broadcastable to ``(N, H, S)``.
        need_weights: also return the attention weights, after dropout.

    Returns:
        ``(N, E)``, and the weights ``(N, H, S + extra slots)`` or None.
    """
    query, key, value = tokens
    sizes = (key.shape[1], query.shape[-1], key.shape[-1], value.shape[-1])
    cheaper = input_formulation_is_cheaper(num_heads, *sizes)
    attend = _attend_inputs if cheaper else _attend_projected
    w_q, b_q = weights.split()[0], weights.split_bias()[0]
    q = F.linear(query, w_q, b_q).unflatten(-1, (num_heads, -1))
    q = q / math.sqrt(q.shape[-1])
    heads, attn = attend(q, key, value, weights, options, mask, need_weights)
    if attn is not None and weights.bias_v is not None:
        on_bias = attn[..., key.shape[1], None].to(heads.dtype)
        heads = heads + on_bias * weights.bias_v.view(heads.shape[1:])
    out = F.linear(heads.flatten(1), weights.out_proj_weight, weights.out_proj_bias)
    return out, attn if need_weights else None


def _extra_scores(q: Tensor, weights: Weights, add_zero_attn: bool) -> Tensor | None:
    """Scores ``(N, H, X)`` of the slots that ``add_bias_kv`` and ``add_zero_attn`` add, or None."""
    scores = []
    if weights.bias_k is not None:
        scores.append((q * weights.bias_k.view(q.shape[1:])).sum(-1, keepdim=True))
    if add_zero_attn:
        scores.append(q.new_zeros((*q.shape[:2], 1)))
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


def _attend_projected(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    options: Options,
    mask: Tensor | None,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Heads' outputs ``(N, H, D)``, the bias slot's share aside, from projected keys and values."""
    (_, w_k, w_v), (_, b_k, b_v) = weights.split(), weights.split_bias()
    k = reference.split_heads(F.linear(key, w_k, b_k), q.shape[1])  # (N, H, S, D)
    v = reference.split_heads(F.linear(value, w_v, b_v), q.shape[1])
    scores = torch.matmul(k, q.unsqueeze(-1)).squeeze(-1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores if mask is None else scores + mask
    extra = _extra_scores(q, weights, options.add_zero_attn)
    attn = _normalise(scores, extra, options.dropout_p, mask is not None and not need_weights)
    return torch.matmul(attn[..., None, : key.shape[1]].to(v.dtype), v).squeeze(-2), attn


def _attend_inputs(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    options: Options,
    mask: Tensor | None,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
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
    blank = mask is not None and not need_weights
    plain = extra is None and options.dropout_p == 0.0
    if plain and not need_weights and _wants_fused(moved, mask):
        mixed, share = _fused_mix(moved, key, value, mask)
        attn = None
    else:
        scores = reference.shared_scores(moved, key, mask)
        attn = _normalise(scores, extra, options.dropout_p, blank)
        on_clip = attn[..., : key.shape[1]]
        mixed = torch.matmul(on_clip.to(value.dtype), value)
        share = None if plain and not blank else on_clip.sum(-1, keepdim=True)
    heads = torch.einsum("nhe,hde->nhd", mixed, w_v.unflatten(0, (num_heads, -1)))
    if b_v is not None:
        bias = b_v.view(heads.shape[1:])
        heads = heads + (bias if share is None else bias * share.to(heads.dtype))
    return heads, attn


def _fused_mix(
    moved: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weighted sums of inputs ``(N, H, Ev)``, and the clip's weight ``(N, H, 1)``; None for 1."""
    mixed, lse = torch.ops.continual_mha.attend_shared(moved, key, value, mask, None)
    if mask is None:
        return mixed, None
    hidden = torch.isneginf(lse).unsqueeze(-1)
    return mixed.masked_fill(hidden, 0.0), (~hidden).to(mixed.dtype)


def _wants_fused(query: Tensor, mask: Tensor | None) -> bool:
    """Whether the fused operator serves, and gains over plain PyTorch."""
    if torch.is_autocast_enabled(query.device.type) or (mask is not None and mask.requires_grad):
        return False
    return backends.order(query.device.type)[0] in ("triton", "cuda")
