"""Attention over inputs by the operators that attend to tiles which all heads share."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, extra_slots, inputs, ops
from .dropout import dropout_seed
from .inputs import Mix


def mix(
    moved: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    extra: Tensor | None,
    dropout_p: float,
    need_weights: bool,
    blank: bool,
) -> Mix:
    """``inputs.plain_mix``, fused where that serves and gains."""
    args = (moved, key, value, mask, extra, dropout_p, need_weights, blank)
    reason = why_not_fused(*args[:4], dropout_p, need_weights)
    if reason is None:
        return fused_mix(*args, dropout_seed(dropout_p, moved.device))
    backends.leave_to_pytorch("attend_shared", reason)
    return inputs.plain_mix(*args)


def fused_mix(
    moved: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    extra: Tensor | None,
    dropout_p: float,
    need_weights: bool,
    blank: bool,
    seed: Tensor | None,
) -> Mix:
    """The same by the fused operators: what they return tells the extra slots' weights too."""
    args = (moved, key, None if value is key else value, mask, extra_slots.sink(extra))
    if needs_output_alone(dropout_p, need_weights):
        (mixed, lse), share, attn = ops.call("attend_shared", *args), None, None
    else:
        how = (seed, dropout_p, need_weights)
        mixed, lse, kept, attn = ops.call("attend_shared_full", *args, *how)
        share = None if seed is None else kept.unsqueeze(-1)
    on_extra = extra_slots.weights_of(extra, lse, dropout_p)
    if on_extra is not None and share is None:
        share = 1.0 - on_extra.sum(-1, keepdim=True)
    if not need_weights:
        attn = None
    elif on_extra is not None and attn is not None:
        attn = torch.cat([attn, on_extra.mean(1)], dim=-1)
    if mask is not None and extra is None and blank:
        mixed, share = blanked(mixed, share, lse)
    return Mix(mixed, share, on_extra, attn)


def needs_output_alone(dropout_p: float, need_weights: bool) -> bool:
    """Whether ``attend_shared`` will do, without what ``attend_shared_full`` does besides."""
    return dropout_p == 0.0 and not need_weights


def blanked(mixed: Tensor, share: Tensor | None, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Mixed inputs and shares with zeros for the heads to which a mask leaves nothing."""
    hidden = torch.isneginf(lse).unsqueeze(-1)
    mixed = mixed.masked_fill(hidden, 0.0)
    return mixed, (~hidden).to(mixed.dtype) if share is None else share.masked_fill(hidden, 0.0)


def why_not_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    dropout_p: float = 0.0,
    need_weights: bool = False,
) -> str | None:
    """Why the fused operators do not serve, or gain nothing; None if one is to run."""
    reason = backends.why_plain(query)
    if reason is None and mask is not None and mask.requires_grad:
        reason = "the mask needs a gradient"
    if reason is not None:
        return reason
    plain = needs_output_alone(dropout_p, need_weights)
    first = backends.order(query.device.type)[0]
    own = None if value is key else value
    asked = (query, key, own, mask, None, None, dropout_p, need_weights)
    if first == "triton":
        # what is plain, every backend of a GPU is asked for when the operator runs
        return None if plain else backends.why_not_triton("attend_shared_full", *asked)
    if first == "cuda" and plain:
        return None
    if first != "cpu":
        return "it has no kernel for dropout on the weights, nor for weights that are returned"
    return backends.why_not_later("cpu", "attend_shared_full", asked)
