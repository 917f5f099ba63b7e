"""Products of the tokens of a batch with weights: by PyTorch, or by the CPU library's kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from .modes import is_transformed


def multiply(
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
    add: bool = False,
    by_library: bool = False,
) -> Tensor:
    """``scale * left @ right + bias``, or with ``add`` that added to ``out``.

    PyTorch does it in one step that autograd knows, but under transforms: there
    ``torch.func.linearize`` ends the process on that step.

    Args:
        left: ``(rows, inner)``, or batches of them.
        right: ``(inner, columns)``, or as many.
        bias: one row of each.
        out: where the result is written.
        by_library: by the CPU library, of which autograd knows nothing. It lays batches, as of
            heads, inside of rows.
    """
    batched = left.dim() == 3
    if by_library:
        if out is None:
            *batch, rows, _ = left.shape
            out = left.new_empty((rows, *batch, right.shape[-1]))
            out = out.transpose(0, 1) if batched else out
        _native.cpu_function("product_")(out, left, right, bias, scale, add)
        return out
    if bias is not None and batched:
        bias = bias.unsqueeze(1)
    if out is None and is_transformed():
        product = left @ right * scale if scale != 1.0 else left @ right
        return product if bias is None else product + bias
    added = out if add else bias
    function = torch.baddbmm if batched else torch.addmm
    start, beta = (left.new_empty(()), 0) if added is None else (added, 1)
    return function(start, left, right, beta=beta, alpha=scale, out=out)
