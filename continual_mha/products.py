"""Products of the tokens of a batch with weights: by PyTorch, or by the CPU library's kernel."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from . import _native
from .modes import is_transformed


class Multiply(Protocol):
    """``scale * left @ right + bias``, or with ``add`` that added to ``out``.

    Left is ``(rows, inner)`` and right ``(inner, columns)``, or batches of them, and a bias one row
    of each. Where it is given, the result is written to ``out``.
    """

    def __call__(
        self,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        out: Tensor | None = None,
        add: bool = False,
    ) -> Tensor: ...


def by_pytorch(
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """``Multiply`` in one step that autograd knows.

    But under transforms: there ``torch.func.linearize`` ends the process on that step.
    """
    batched = left.dim() == 3
    if bias is not None and batched:
        bias = bias.unsqueeze(1)
    if out is None and is_transformed():
        product = left @ right * scale if scale != 1.0 else left @ right
        return product if bias is None else product + bias
    added = out if add else bias
    function = torch.baddbmm if batched else torch.addmm
    start, beta = (left.new_empty(()), 0) if added is None else (added, 1)
    return function(start, left, right, beta=beta, alpha=scale, out=out)


def by_cpu_library(
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """``Multiply`` by the CPU library, without a gradient; batches, as of heads, inside of rows."""
    if out is None:
        *batch, rows, _ = left.shape
        out = left.new_empty((rows, *batch, right.shape[-1]))
        out = out.transpose(0, 1) if batch else out
    _native.cpu_function("product_")(out, left, right, bias, scale, add)
    return out
