"""The slots that ``add_bias_kv`` and ``add_zero_attn`` add to what every query sees.

Kernels attend to all others, take these as one more score, and tell the logarithm of the whole
denominator. What this gives is made here, and its gradients.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import Weights, has_extra_slots
from .precision import wide


def scores_of(q: Tensor, weights: Weights, add_zero_attn: bool) -> Tensor | None:
    """Scores ``(..., H, X)`` of the slots that ``add_bias_kv`` and ``add_zero_attn`` add, or None.

    The scores are scaled if the queries ``(..., H, D)`` are. They are of the dtype of sums: what is
    taken off them is often as large, and so are the two gradients that reach a nearly full slot.
    """
    if not has_extra_slots(weights, add_zero_attn):
        return None
    scores = []
    q = q.to(wide(q.dtype))
    if weights.bias_k is not None:
        scores.append((q * weights.bias_k.view(q.shape[-2:])).sum(-1, keepdim=True))
    if add_zero_attn:
        scores.append(q.new_zeros((*q.shape[:-1], 1)))
    return torch.cat(scores, dim=-1)


def moved_scores_of(
    q: Tensor, weights: Weights, b_k: Tensor | None, add_zero_attn: bool
) -> Tensor | None:
    """``scores_of`` of ``(N, H, D)``, scaled, without the bias that moved queries leave out."""
    extra = scores_of(q, weights, add_zero_attn)
    if extra is None:
        return None
    if b_k is not None:
        extra = extra - (q.to(extra.dtype) * b_k.view(q.shape[1:])).sum(-1, keepdim=True)
    return extra / math.sqrt(q.shape[2])


def sink(extra: Tensor | None) -> Tensor | None:
    """One score that weighs as much as all extra slots ``(..., H, X)`` together."""
    if extra is None:
        return None
    return extra.squeeze(-1) if extra.shape[-1] == 1 else torch.logsumexp(extra, dim=-1)


def weights_of(extra: Tensor | None, lse: Tensor, dropout_p: float) -> Tensor | None:
    """Weights of the extra slots, given the logarithm of the softmax's whole denominator."""
    if extra is None:
        return None
    on_extra = torch.exp(extra - lse.unsqueeze(-1))
    return F.dropout(on_extra, dropout_p) if dropout_p > 0.0 else on_extra


def with_bias(heads: Tensor, on_extra: Tensor | None, weights: Weights) -> Tensor:
    """Heads' outputs ``(..., H, D)`` with the share of the slot that ``add_bias_kv`` adds."""
    if on_extra is None or weights.bias_v is None:
        return heads
    return heads + on_extra[..., :1].to(heads.dtype) * weights.bias_v.view(heads.shape[-2:])


def gradients_of_weights(
    d_heads: Tensor,
    d_attn: Tensor | None,
    on_extra: Tensor,
    weights: Weights,
    b_v: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Those of the weights ``(..., H, X)``, and ``d_attn`` of averaged weights without their part.

    Args:
        d_heads: of the heads' outputs ``(..., H, D)``.
        b_v: the bias of values, where the share of the others is to be multiplied with it.
    """
    H, D = d_heads.shape[-2:]
    d_heads = d_heads.to(on_extra.dtype)
    d_on_extra = torch.zeros_like(on_extra)
    if b_v is not None:  # in the share of the clip, which is what the extra slots leave
        d_on_extra -= (d_heads * b_v.view(H, D)).sum(-1, keepdim=True)
    if weights.bias_v is not None:
        d_on_extra[..., 0] += (d_heads * weights.bias_v.view(H, D)).sum(-1)
    if d_attn is not None:
        slots = d_attn.shape[1] - on_extra.shape[2]
        d_on_extra += d_attn[:, None, slots:] / H
        d_attn = d_attn[:, :slots]
    return d_on_extra, d_attn


def gradients_of_scores(d_extra: Tensor, extra: Tensor, d_sink: Tensor) -> Tensor:
    """``d_extra`` with what scores ``(..., H, X)`` have of the one that stands for them all."""
    share = torch.softmax(extra, dim=-1) if extra.shape[-1] > 1 else 1.0
    return d_extra + share * d_sink.unsqueeze(-1)


def gradients_of_queries(
    d_q: Tensor, d_extra: Tensor, weights: Weights, b_k: Tensor | None
) -> Tensor:
    """``d_q``, of queries ``(..., H, D)``, with what they have of the scores.

    Args:
        d_extra: of the scores ``(..., H, X)``, before queries are scaled.
        b_k: as in ``moved_scores_of``.
    """
    heads = d_q.shape[-2:]
    found = d_q.to(d_extra.dtype)
    if weights.bias_k is not None:
        found = torch.addcmul(found, d_extra[..., :1], weights.bias_k.view(heads))
    if b_k is not None:
        found = torch.addcmul(found, d_extra.sum(-1, keepdim=True), b_k.view(heads), value=-1)
    return found.to(d_q.dtype)
