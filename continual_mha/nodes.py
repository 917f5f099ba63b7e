"""What the nodes of autograd share: when their kernels do not serve a gradient, and what does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from . import backends
from .precision import autocast_dtype
from .tracing import is_batched, is_transformed


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """As the forward ran, whatever surrounds its backward."""
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def as_in_forward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A node's ``backward`` by the backend that was forced around its forward, ``ctx.forced``.

    On GPUs autograd runs it on threads of its own, which see nothing of ``use_backend``.
    """

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        if backends.forced() == ctx.forced:
            return backward(ctx, *grads)
        return backends.run_forcing(ctx.forced, backward, ctx, *grads)

    return run


def is_followed(grads: Iterable[Tensor | None]) -> bool:
    """Whether a backward is differentiated, with ``create_graph``, or transformed itself."""
    return torch.is_grad_enabled() or is_transformed() or any(map(is_batched, grads))


def gradients_by_operators(
    run: Callable[..., Iterable[Tensor | None]],
    given: Sequence[Tensor | None],
    grads: Iterable[Tensor | None],
    needed: Sequence[bool],
    device_type: str,
) -> tuple[Tensor | None, ...]:
    """Gradients by operators that can be differentiated and transformed, from the arguments on.

    What they are of are views: a gradient then ends here, even where one argument comes from
    another or is given twice, and no hook of an argument runs.

    Args:
        run: the forward by such operators, of ``given``.
        given: the node's arguments.
        grads: of the results of ``run``, as many.
        needed: which arguments need one; the others get None.
        device_type: of the arguments.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(device_type):
        views = [None if x is None else x.view_as(x) for x in given]
        results = zip(run(*views), grads, strict=True)
        followed = [
            (x, grad)
            for x, grad in results
            if x is not None and grad is not None and x.requires_grad  # not all, of frozen weights
        ]
        if not followed:  # autograd asks even where nothing of the results was used
            return (None,) * len(needed)
        outs, grads_of_outs = zip(*followed, strict=True)
        wanted = [x for x, need in zip(views, needed, strict=True) if x is not None and need]
        found = iter(
            torch.autograd.grad(
                outs, wanted, grads_of_outs, create_graph=create_graph, allow_unused=True
            )
        )
    return tuple(next(found) if need else None for need in needed)
