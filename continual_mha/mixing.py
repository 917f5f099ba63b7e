"""Attention over inputs by the operators that attend to tiles which all heads share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    """The same by the fused operator, as autograd knows it."""
    attend = partial(ops.call, operator_for(dropout_p, need_weights))
    own = None if value is key else value
    return mix_by(attend, moved, key, own, mask, extra, dropout_p, need_weights, blank, seed)[0]


def operator_for(dropout_p: float, need_weights: bool) -> str:
    """The operator that gives what is asked for, and no more."""
    plain = dropout_p == 0.0 and not need_weights
    return "attend_shared" if plain else "attend_shared_full"


def mix_by(
    attend: Callable[..., tuple[Tensor, ...]],
    moved: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    extra: Tensor | None,
    dropout_p: float,
    need_weights: bool,
    blank: bool,
    seed: Tensor | None,
) -> tuple[Mix, Tensor, Tensor]:
    """``inputs.plain_mix`` by a function that runs ``operator_for`` these options.

    Returns:
        The mix, with the weights of the extra slots, which the logarithm of the denominator tells;
        and for the gradients that logarithm and ``kept``, as ``attend_shared_full`` gives them.
    """
    operands = (moved, key, value, mask, extra_slots.sink(extra))
    attn = None
    if operator_for(dropout_p, need_weights) == "attend_shared":
        mixed, lse = attend(*operands)
        kept = lse.new_empty(0)
    else:
        mixed, lse, kept, average = attend(*operands, seed, dropout_p, need_weights)
        attn = average if need_weights else None
    share = None if seed is None else kept.unsqueeze(-1)
    on_extra = extra_slots.weights_of(extra, lse, dropout_p)
    if on_extra is not None:
        share = 1.0 - on_extra.sum(-1, keepdim=True) if share is None else share
        attn = None if attn is None else torch.cat([attn, on_extra.mean(1)], dim=-1)
    elif mask is not None and blank:
        mixed, share = _blanked(mixed, share, lse)
    return Mix(mixed, share, on_extra, attn), lse, kept


def _blanked(mixed: Tensor, share: Tensor | None, lse: Tensor) -> tuple[Tensor, Tensor]:
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
    plain = operator_for(dropout_p, need_weights) == "attend_shared"
    first = backends.order(query.device.type)[0]
    own = None if value is key else value
    asked = (query, key, own, mask, None, None, dropout_p, need_weights)
    if first == "triton":
        # all backends of a GPU have the plain one, and are asked when it runs
        return None if plain else backends.why_not_triton("attend_shared_full", *asked)
    if first == "cuda" and plain:
        return None
    if first != "cpu":
        return "it has no kernel for dropout on the weights, nor for weights that are returned"
    return backends.why_not_later("cpu", "attend_shared_full", asked)
