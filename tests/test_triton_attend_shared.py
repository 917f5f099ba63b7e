"""The shared-tile attention of the Triton backend and its gradients, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import PTX
from oracles import assert_as_exact_as_torch
from torch import Tensor
from triton_cases import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    needs_kernels,
    widened,
)

from continual_mha import reference
from continual_mha.triton_kernels import (
    attend_shared,
    attend_shared_backward,
    attend_shared_full,
    attend_shared_full_backward,
    attend_shared_query_backward,
    why_not,
)
from continual_mha.triton_kernels.plan import shared_plan

pytestmark = needs_kernels


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).mul_(0.4).to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def arguments(
    dtype: torch.dtype,
    N: int,
    H: int,
    S: int,
    EK: int,
    EV: int,
    one_tensor: bool = False,
    options: bool = False,
) -> list[Any]:
    key = random(dtype, N, S, EK)
    mask = sink = None
    if options:
        mask = random(wide(dtype), 1, H, S)
        mask[..., 1] = float("-inf")
        sink = random(wide(dtype), N, H)
    value = None if one_tensor else random(dtype, N, S, EV)
    return [random(dtype, N, H, EK), key, value, mask, sink]


SHAPES = [
    (2, 3, 5, 24, 40, False, False),
    (2, 2, 70, 24, 24, True, True),
    (1, 9, 130, 300, 24, False, True),
    (3, 8, 33, 64, 64, True, False),
    (1, 1, 1, 1, 1, True, False),
    (1, 5, 40, 200, 200, True, True),
    (1, 20, 70, 100, 100, True, True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_equal_the_reference(shape: tuple, dtype: torch.dtype) -> None:
    args = arguments(dtype, *shape)
    exact_args = widened(args)
    results = attend_shared(*args)
    plain, exact = reference.attend_shared(*args), reference.attend_shared(*exact_args)
    for mine, theirs, best in zip(results, plain, exact, strict=True):
        assert_as_exact_as_torch(mine, best, theirs)
    grads = [random(dtype, *results[0].shape), random(wide(dtype), *results[1].shape)]
    backward = attend_shared_backward(*grads, *args, *results)
    plain = reference.attend_shared_backward(*grads, *args, *plain)
    exact = reference.attend_shared_backward(*widened(grads), *exact_args, *exact)
    assert_gradients(backward, plain, exact, dtype)
    of_query = attend_shared_query_backward(
        *grads, None, None, *args, None, *results, results[1], 0.0
    )
    assert_gradients(of_query, plain[::3], exact[::3], dtype)


def assert_gradients(actual: tuple, plain: tuple, exact: tuple, dtype: torch.dtype) -> None:
    """Some are of sums, which are fp32, of numbers in this dtype."""
    for mine, theirs, best in zip(actual, plain, exact, strict=True):
        assert mine.shape == best.shape
        if best.numel():
            assert_as_exact_as_torch(mine, best, theirs, dtype)


def seed_of(number: int) -> Tensor:
    return torch.tensor([number], device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [*SHAPES[:2], (2, 4, 33, 20, 20, True, False), *SHAPES[-2:]], ids=str
)
def test_dropout_and_weights_equal_the_reference(shape: tuple, dtype: torch.dtype) -> None:
    """The reference draws the same weights to drop, so that the numbers themselves compare."""
    args = [*arguments(dtype, *shape), seed_of(11 << 40), 0.3, True]
    exact_args = widened(args)
    results = attend_shared_full(*args)
    plain, exact = reference.attend_shared_full(*args), reference.attend_shared_full(*exact_args)
    for mine, theirs, best in zip(results, plain, exact, strict=True):
        assert_as_exact_as_torch(mine, best, theirs)
    grads = [random(x.dtype, *x.shape) for x in results]
    seeded = [*args[:6], *results[:3], 0.3]
    backward = attend_shared_full_backward(*grads, *seeded)
    plain = reference.attend_shared_full_backward(*grads, *args[:6], *plain[:3], 0.3)
    exact = reference.attend_shared_full_backward(*widened(grads), *exact_args[:6], *exact[:3], 0.3)
    assert_gradients(backward, plain, exact, dtype)
    of_query = attend_shared_query_backward(*grads, *seeded)
    assert_gradients(of_query, plain[::3], exact[::3], dtype)


def test_a_split_window_drops_what_a_whole_one_drops() -> None:
    """Dropout depends on slot, head and stream alone, and not on who computes them."""
    args = arguments(torch.float32, 1, 2, 40, 16, 16, options=True)
    assert shared_plan(1, 2, 40, 16, 16, 4, False).splits > 1
    args += [seed_of(5), 0.5, True]
    for mine, best in zip(
        attend_shared_full(*args), reference.attend_shared_full(*widened(args)), strict=True
    ):
        torch.testing.assert_close(mine.cpu().double(), best, rtol=1e-4, atol=1e-5)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        results = attend_shared(*args)
        ctx.save_for_backward(*args, *results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, sink = attend_shared_backward(*grads, *ctx.saved_tensors)
        return query, key, value if value.numel() else None, None, sink


def differentiable(args: list[Any]) -> list[Any]:
    """The same arguments, of which all but the mask want a gradient."""
    return [x if x is None else x.requires_grad_(i != 3) for i, x in enumerate(args)]


@pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter alone")
@pytest.mark.parametrize("one_tensor", [False, True])
def test_gradients_are_those_of_finite_differences(one_tensor: bool) -> None:
    args = arguments(torch.float64, 1, 2, 3, 3, 2, one_tensor, options=True)
    assert torch.autograd.gradcheck(_Attend.apply, differentiable(args))


class _Full(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        given = (*args, seed_of(3), 0.4)
        results = attend_shared_full(*given, True)
        ctx.save_for_backward(*given[:6], *results[:3])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, sink = attend_shared_full_backward(*grads, *ctx.saved_tensors, 0.4)
        return query, key, value if value.numel() else None, None, sink


@pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter alone")
@pytest.mark.parametrize("one_tensor", [False, True])
def test_gradients_through_weights_and_dropout_are_those_of_finite_differences(
    one_tensor: bool,
) -> None:
    args = arguments(torch.float64, 1, 2, 3, 2, 2, one_tensor, options=True)
    assert torch.autograd.gradcheck(_Full.apply, differentiable(args), fast_mode=True)


def test_a_window_split_over_programs_gives_the_same_bits_in_every_run() -> None:
    args = arguments(torch.float16, 1, 4, 200, 64, 64, one_tensor=True)
    assert shared_plan(1, 4, 200, 64, 64, 2, True).splits > 1
    first, second = attend_shared(*args), attend_shared(*args)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_a_stream_does_not_see_its_neighbours() -> None:
    args = arguments(torch.float32, 3, 2, 9, 8, 8)
    alone = attend_shared(*args)[0][1]
    for x in args[:3]:
        x[[0, 2]] = float("nan")
    assert torch.equal(alone, attend_shared(*args)[0][1])


@pytest.mark.parametrize("one_tensor", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_inputs_of_any_stride(dtype: torch.dtype, one_tensor: bool) -> None:
    args = arguments(dtype, 2, 2, 9, 8, 8 if one_tensor else 6, one_tensor, options=True)
    strided = [x if x is None else x.transpose(1, 2).contiguous().transpose(1, 2) for x in args[:3]]
    strided.append(args[3].expand(2, -1, -1))
    assert torch.equal(attend_shared(*args)[0], attend_shared(*strided, args[4])[0])
    results = attend_shared(*args)
    grads = [torch.ones_like(x[:1, :1]).expand_as(x) for x in results]
    plain = attend_shared_backward(*grads, *args, *results)
    other = attend_shared_backward(*grads, *strided, args[4], *results)
    assert all(torch.equal(x, y) for x, y in zip(plain, other, strict=True))


@pytest.mark.skipif(bool(PTX), reason="that machine copies all of the memory")
def test_a_mask_whose_heads_lie_far_apart() -> None:
    """Further than an offset of 32 bits reaches; of that memory only what is used is ever there."""
    args = arguments(torch.float16, 1, 3, 4, 8, 8, options=True)
    args[3] = args[3].half()
    far = torch.empty((1 << 31) + 4, dtype=torch.float16, device=DEVICE)
    mask = far.as_strided(args[3].shape, (0, 1 << 30, 1)).copy_(args[3])
    out = attend_shared(*args[:3], mask, args[4])[0]
    assert torch.equal(out, attend_shared(*args)[0])


@pytest.mark.skipif(bool(PTX), reason="that machine copies all of the memory")
def test_queries_whose_heads_lie_far_apart() -> None:
    """As those of many streams do, whose queries were moved to the tokens head by head."""
    args = arguments(torch.float32, 1, 3, 4, 8, 8, one_tensor=True)
    far = torch.empty((1 << 31) + 8, device=DEVICE)
    query = far.as_strided(args[0].shape, (0, 1 << 30, 1)).copy_(args[0])
    results = attend_shared(*args)
    assert torch.equal(attend_shared(query, *args[1:])[0], results[0])
    grads = [torch.ones_like(x) for x in results]
    found = attend_shared_backward(*grads, query, *args[1:], *results)
    expected = attend_shared_backward(*grads, *args, *results)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_where_everything_is_masked_the_output_is_nan() -> None:
    args = arguments(torch.float32, 1, 2, 4, 8, 8)
    args[3] = torch.full((1, 1, 4), float("-inf"), device=DEVICE)
    out, lse = attend_shared(*args)
    assert out.isnan().all()
    assert torch.equal(lse, torch.full_like(lse, float("-inf")))


@pytest.mark.parametrize("one_tensor", [False, True])
def test_a_stream_that_sees_nothing_has_no_gradient(one_tensor: bool) -> None:
    args = arguments(torch.float32, 2, 2, 4, 8, 8, one_tensor)
    mask = torch.zeros(2, 1, 4, device=DEVICE)
    mask[1] = float("-inf")
    args = [*args[:3], mask, None]
    results = attend_shared(*args)
    grads = [torch.ones_like(results[0]), torch.zeros_like(results[1])]
    grads[0][1] = 0  # what a caller gets who replaces the outputs of the hidden stream
    mine = attend_shared_backward(*grads, *args, *results)
    plain = reference.attend_shared_backward(*grads, *args, *reference.attend_shared(*args))
    for grad, other in zip(mine[: 3 - one_tensor], plain[: 3 - one_tensor], strict=True):
        assert (grad[1] == 0).all()
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


def test_an_uncovered_call_is_declined_with_the_reason() -> None:
    args = arguments(torch.float32, 1, 2, 4, 8, 8)
    assert why_not("attend_shared", *args) is None
    assert "dtype" in (why_not("attend_shared", args[0].half(), *args[1:]) or "")
    empty = [args[0], args[1][:, :0], args[2][:, :0], None, None]
    assert "empty" in (why_not("attend_shared", *empty) or "")
