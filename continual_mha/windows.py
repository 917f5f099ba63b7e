"""Attention of a clip's queries over the windows that end with them, where a gradient is needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from . import backends, extra_slots, ops, reference
from .dropout import dropout_seed
from .operands import Rings, Tokens, Weights, has_extra_slots

NO_GRADIENT = "a gradient is needed, for which it has no kernel"


def attend(
    clip: Tokens,
    rings: Rings,
    weights: Weights,
    first: int,
    add_zero_attn: bool,
    dropout_p: float,
    seed: Tensor | None = None,
) -> Tensor:
    """``reference.attend_in_blocks`` by the fused operator where it serves.

    Dropout is drawn from ``seed``, which is drawn itself if it is None.
    """
    heads = rings.k.shape[1:4:2]
    q, k, v = (x.unflatten(-1, heads) for x in clip)
    given = (q, k, v, *rings[:2], rings.position)
    reason = why_not(*given)
    attend_window: Callable[..., Any] = partial(ops.call, "attend_window")
    if reason is not None:
        backends.leave_to_pytorch("attend_window", reason)
        if seed is None:
            return reference.attend_in_blocks(clip, rings, weights, first, add_zero_attn, dropout_p)
        attend_window = reference.attend_window  # drops what that seed did before
    extra = None
    if has_extra_slots(weights, add_zero_attn):
        asking = q[:, first:] / math.sqrt(q.shape[-1])
        extra = extra_slots.scores_of(asking, weights, add_zero_attn)
    seed = dropout_seed(dropout_p, q.device) if seed is None else seed
    out, lse = attend_window(*given, extra_slots.sink(extra), seed, first, dropout_p)
    on_extra = extra_slots.weights_of(extra, lse, dropout_p)
    return extra_slots.with_bias(out, on_extra, weights).flatten(2)


def why_not(query: Tensor, *args: Tensor) -> str | None:
    """Why the fused operator does not serve; None if it does."""
    if reason := backends.why_plain(query):
        return reason
    first = backends.order(query.device.type)[0]
    if first == "triton":
        return backends.why_not_triton("attend_window", query, *args)
    if first == "cpu":
        return backends.why_not_later("cpu", "attend_window", (query, *args))
    return NO_GRADIENT
