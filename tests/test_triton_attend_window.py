"""Attention over ring and clip that writes no state, and its gradients, against the reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from oracles import assert_as_exact_as_torch
from torch import Tensor
from torch.autograd import gradcheck
from triton_cases import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    needs_kernels,
    widened,
)
from window_cases import WINDOW_SHAPES, window_arguments

from continual_mha import reference
from continual_mha.triton_kernels import attend_window, attend_window_backward, why_not

pytestmark = needs_kernels


arguments = partial(window_arguments, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", WINDOW_SHAPES, ids=str)
def test_outputs_and_gradients_equal_the_reference(shape: tuple, dtype: torch.dtype) -> None:
    args, p = arguments(dtype, *shape), 0.3 if shape[-1] else 0.0
    exact_args = widened(args)
    results = attend_window(*args, p)
    plain, exact = reference.attend_window(*args, p), reference.attend_window(*exact_args, p)
    for mine, theirs, best in zip(results, plain, exact, strict=True):
        assert_as_exact_as_torch(mine, best, theirs)
    grads = [torch.randn_like(x) for x in results]
    backward = attend_window_backward(*grads, *args[:8], *results, shape[5], p, True)
    plain = reference.attend_window_backward(*grads, *args[:8], *plain, shape[5], p, True)
    exact = reference.attend_window_backward(
        *widened(grads), *exact_args[:8], *exact, shape[5], p, True
    )
    for mine, theirs, best in zip(backward, plain, exact, strict=True):
        assert mine.shape == best.shape
        assert not mine.isnan().any()
        if best.count_nonzero():  # that of the sinks is made of outputs
            assert_as_exact_as_torch(mine, best, theirs, rounded=dtype)
        else:
            assert not mine.count_nonzero()


def test_gradients_of_the_rings_only_on_request_and_the_others_the_same() -> None:
    args = arguments(torch.float32, 2, 5, 2, 8, 4, 1, False)
    results = attend_window(*args, 0.0)
    given = (torch.ones_like(results[0]), None, *args[:8], *results, 1, 0.0)
    with_rings, without = (attend_window_backward(*given, rings) for rings in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(with_rings[:3], without[:3], strict=True))
    assert [x.numel() for x in without[3:5]] == [0, 0]
    assert with_rings[3][1].count_nonzero()


def test_inputs_of_any_stride() -> None:
    args = arguments(torch.float32, 2, 5, 2, 8, 4, 1, True)
    strided = [x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for x in args[:3]]
    results = attend_window(*args, 0.2)
    for a, b in zip(results, attend_window(*strided, *args[3:], 0.2), strict=True):
        assert torch.equal(a, b)
    grad = torch.ones((), device=DEVICE).expand_as(results[0])
    rest = (*args[3:8], *results, 1, 0.2, True)
    plain = attend_window_backward(grad, None, *args[:3], *rest)
    for a, b in zip(plain, attend_window_backward(grad, None, *strided, *rest), strict=True):
        assert torch.equal(a, b)


def test_a_stream_does_not_see_its_neighbours() -> None:
    args = arguments(torch.float32, 3, 4, 2, 8, 5, 0, True)
    results = attend_window(*args, 0.2)
    grad = torch.randn_like(results[0])
    alone = attend_window_backward(grad, None, *args[:8], *results, 0, 0.2, True)
    for x in args[:5]:
        x[[0, 2]] = float("inf")
    again = attend_window(*args, 0.2)
    assert torch.equal(results[0][1], again[0][1])
    others = attend_window_backward(grad, None, *args[:8], *again, 0, 0.2, True)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(alone, others, strict=True))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        results = attend_window(*args, 1, 0.3)
        ctx.save_for_backward(*args, *results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        *of_tokens, sink = attend_window_backward(*grads, *ctx.saved_tensors, 1, 0.3, True)
        return *of_tokens, None, sink, None


@pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter alone")
def test_gradients_are_those_of_finite_differences() -> None:
    args = arguments(torch.float64, 2, 3, 1, 2, 2, 1, True)[:8]
    for ring in args[3:5]:
        ring.nan_to_num_(0.5)
    given = [x.requires_grad_(x.is_floating_point()) for x in args]
    assert gradcheck(_Attend.apply, given, fast_mode=True)


def test_an_uncovered_call_is_declined_with_the_reason() -> None:
    args = [*arguments(torch.float32, 1, 2, 1, 8, 3, 0, False), 0.0]
    assert why_not("attend_window", *args) is None
    assert "dtype" in (why_not("attend_window", args[0].half(), *args[1:]) or "")
    position = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)[:, 0]
    assert "contiguous" in (why_not("attend_window", *args[:5], position, *args[6:]) or "")
    wide = arguments(torch.float32, 1, 1, 1, 260, 3, 0, False)
    assert "head_dim" in (why_not("attend_window", *wide, 0.0) or "")
