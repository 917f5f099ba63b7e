"""Streams whose calls are followed by a gradient, beside plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from oracles import assert_as_exact_as_torch, draw_tokens
from torch import Tensor

import continual_mha as co
from continual_mha import SingleOutputMultiheadAttention

STREAMS = 3
Module = SingleOutputMultiheadAttention
Call = tuple[Tensor, ...]  # query, key and value


def drawn_calls(module: Module, counts: list[int] | int, kind: str = "one") -> list[Call]:
    """Tokens for ``forward_steps`` of so many each, or for so many of ``forward_step``.

    Leaves that need a gradient: ``one`` for all three, or a ``key`` of its own, or ``all``.
    """
    many = isinstance(counts, list)
    sizes = counts if isinstance(counts, list) else [1] * counts
    clips = draw_tokens(module, STREAMS, sum(sizes))
    clips = {"one": clips[:1] * 3, "key": (clips[0], clips[1], clips[0]), "all": clips}[kind]
    calls = []
    for parts in zip(*(x.split(sizes, dim=1) for x in clips), strict=True):
        pairs = zip(clips, parts, strict=True)
        own = {id(x): (part if many else part[:, 0]).clone().requires_grad_() for x, part in pairs}
        calls.append(tuple(own[id(x)] for x in clips))
    return calls


def run(module: Module, calls: list[Call], every: int = 1, **how: Any) -> list[Tensor | None]:
    """Outputs of the calls, then gradients of tokens and parameters of a function of them.

    Of each ``every``-th of them, the last among those: nobody uses the others.
    """
    module.clean_state()
    module.start_streams(STREAMS)
    many = calls[0][0].dim() == 3
    outs = [(module.forward_steps if many else module.forward_step)(*x, **how) for x in calls]
    used = list(enumerate(outs))[::-every]
    total = sum((i + 1) * y.square().sum() for i, y in used if y is not None)
    leaves = [x for given in calls for x in dict.fromkeys(given) if x.requires_grad]
    leaves += [x for x in module.parameters() if x.requires_grad]
    return [*outs, *torch.autograd.grad(total, leaves, allow_unused=True)]


def assert_as_plain(module: Module, calls: list[Call], **how: Any) -> None:
    """In float64."""
    found = run(module, calls, **how)
    with co.use_backend("torch"):
        expected = run(module, calls, **how)
    for left, right in zip(found, expected, strict=True):
        if right is None or not right.any():  # a bias of keys
            assert left is None or left.abs().max() < 1e-11
        else:
            atol = 1e-12 * max(1.0, float(right.detach().abs().max()))
            torch.testing.assert_close(left, right, rtol=1e-10, atol=atol)


def assert_as_exact(module: Module, calls: list[Call]) -> None:
    """As plain PyTorch in the module's dtype."""
    found = run(module, calls)
    with co.use_backend("torch"):
        plain = run(module, calls)
        wide = [(given[0].detach().double().requires_grad_(),) * 3 for given in calls]
        exact = run(module.double(), wide)
    for left, right, best in zip(found, plain, exact, strict=True):
        if left is not None and right is not None and best is not None and best.any():
            assert_as_exact_as_torch(left, best, right)


def is_step_node(out: Tensor) -> bool:
    """Whether the output of ``forward_step`` is that of one node."""
    return out.grad_fn is not None and "StepBackward" in out.grad_fn.name()


def assert_autocast_around_the_backward_changes_nothing(
    total: Tensor, leaves: Sequence[Tensor]
) -> None:
    expected = torch.autograd.grad(total, leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(total, leaves)
    assert all(map(torch.equal, found, expected))


def assert_many_gradients_at_once(out: Tensor, wanted: Sequence[Tensor]) -> None:
    """They are those one by one."""
    given = torch.randn(5, *out.shape, dtype=out.dtype)
    many = torch.autograd.grad(out, wanted, given, is_grads_batched=True, retain_graph=True)
    for i in range(5):
        single = torch.autograd.grad(out, wanted, given[i], retain_graph=True)
        for left, right in zip(many, single, strict=True):
            torch.testing.assert_close(left[i], right)
