"""Products of the tokens of a batch with weights by PyTorch.

In none does a row that is not finite reach another, but in gradients of weights, which add them up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import autocast_dtype
from .tracing import is_fixed, is_transformed, needs_gradient

Multiply = Callable[..., Tensor]  # as ``multiply``

# What PyTorch multiplies at a time by AMX.
_TILE_FEATURES = 32


def _lacking(x: Tensor, features: int) -> int:
    """How many zeros belong behind so many features, for products with them to keep rows apart.

    In bfloat16 on a processor with AMX, PyTorch (2.11 and 2.13) reads on into the next row where
    they are odd, or more than 32 and no multiple of it, and what is not finite there spoils this
    one. That holds for rows of a product's left, of which batches follow each other as rows do.
    """
    if x.device.type != "cpu" or (autocast_dtype("cpu") or x.dtype) != torch.bfloat16:
        return 0
    if not is_fixed(features):
        # never 0, or compiled code would hold for that number or for all others
        return _TILE_FEATURES - features % _TILE_FEATURES
    return -features % (_TILE_FEATURES if features > _TILE_FEATURES else 2)


def _behind(left: Tensor, right: Tensor, columns: int) -> tuple[int, int]:
    """Zeros behind what a product sums up, and behind what the gradient of its left does."""
    inner, outer = _lacking(left, left.shape[-1]), _lacking(left, columns)
    if outer and not (needs_gradient((left, right)) or is_transformed()):
        outer = 0
    return inner, outer


def _cut(found: Tensor, columns: int) -> Tensor:
    """Its first columns; itself if that is all, for batched gradients refuse a slice of that."""
    return found if found.shape[-1] == columns else found[..., :columns].contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, in which, and in whose gradient, no row of ``x`` reaches another."""
    columns = weight.shape[0]
    inner, outer = _behind(x, weight, columns)
    if inner == 0 and outer == 0:
        return F.linear(x, weight, bias)
    bias = None if bias is None else F.pad(bias, (0, outer))
    found = F.linear(F.pad(x, (0, inner)), F.pad(weight, (0, inner, 0, outer)), bias)
    return _cut(found, columns)


def multiply(
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    """``scale * left @ right + bias``.

    PyTorch does it in one step that autograd knows, but under transforms: there
    ``torch.func.linearize`` ends the process on that step.

    Args:
        left: ``(rows, inner)``, or batches of them.
        right: ``(inner, columns)``, or as many.
        bias: one row of each.
    """
    in_steps = (bias is not None or scale != 1.0) and is_transformed()
    product = _in_steps if in_steps else _at_once
    columns = right.shape[-1]
    inner, outer = _behind(left, right, columns)
    if inner == 0 and outer == 0:
        return product(left, right, bias, scale)
    left, right = F.pad(left, (0, inner)), F.pad(right, (0, outer, 0, inner))
    bias = None if bias is None else F.pad(bias, (0, outer))
    return _cut(product(left, right, bias, scale), columns)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, of any batches, in which no row of the left reaches another, nor in its
    gradient; and in that of the right no matrix.
    """
    columns = right.shape[-1]
    inner, outer = _behind(left, right, columns)
    if inner == 0 and outer == 0:
        return torch.matmul(left, right)
    left, right = F.pad(left, (0, inner)), F.pad(right, (0, outer, 0, inner))
    return _cut(torch.matmul(left, right), columns)


def multiplier(tokens: Tensor) -> Multiply:
    """``multiply`` for many products of such tokens, chosen once, which autograd does not follow.

    It also takes ``out``, where the result is written or, with ``add``, added.
    """
    may_lack = tokens.device.type == "cpu" and tokens.dtype == torch.bfloat16
    return _apart if may_lack else _at_once


def sum_over_tokens(left: Tensor, right: Tensor, out: Tensor, scale: float = 1.0) -> None:
    """``out = scale * left @ right``, where tokens are what is summed over, as in gradients of
    weights: there is nothing to keep apart."""
    _at_once(left, right, None, scale, out)


def _apart(left: Tensor, right: Tensor, *args: Any, **options: Any) -> Tensor:
    if inner := _lacking(left, left.shape[-1]):
        left, right = F.pad(left, (0, inner)), F.pad(right, (0, 0, 0, inner))
    return _at_once(left, right, *args, **options)


def _at_once(
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    batched = left.dim() == 3
    if bias is None and not add and scale == 1.0:
        return (torch.bmm if batched else torch.mm)(left, right, out=out)
    if bias is not None:
        start, beta = bias.unsqueeze(1) if batched else bias, 1
    else:  # with beta 0 nothing of it is read
        start, beta = (left.new_empty(()), 0) if out is None else (out, int(add))
    function = torch.baddbmm if batched else torch.addmm
    return function(start, left, right, beta=beta, alpha=scale, out=out)


def _in_steps(left: Tensor, right: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    product = left @ right * scale if scale != 1.0 else left @ right
    if bias is None:
        return product
    return product + (bias.unsqueeze(1) if left.dim() == 3 else bias)
