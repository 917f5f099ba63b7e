"""The CPU library's attention over ring and clip that writes no state, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import assert_as_exact_as_torch, build
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from trained_streams import assert_many_gradients_at_once
from window_cases import WINDOW_SHAPES, window_arguments

import continual_mha as co
from continual_mha import _native, ops, reference

pytestmark = pytest.mark.skipif(_native.load("cpu") is not None, reason=str(_native.load("cpu")))
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# Besides those of all kernels: blocks of queries and of rows and what is one more, windows of which
# some are hidden by `first`, and no query at all.
SHAPES = [
    *WINDOW_SHAPES,
    (3, 100, 2, 64, 40, 7, False),
    (3, 97, 2, 32, 40, 45, True),
    (2, 200, 1, 40, 64, 0, True),
    (2, 33, 2, 33, 300, 0, True),
    (1, 70, 2, 128, 1, 0, False),
    (2, 40, 3, 16, 17, 40, False),
    (0, 3, 2, 8, 4, 0, True),
]


def attend(*args: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.continual_mha.cpu_attend_window(*args)


def gradients(*args: Any) -> tuple[Tensor, ...]:
    return torch.ops.continual_mha.cpu_attend_window_backward(*args)


def widened(args: list[Any]) -> list[Any]:
    floats = [isinstance(x, Tensor) and x.is_floating_point() for x in args]
    return [x.double() if is_float else x for x, is_float in zip(args, floats, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_equal_the_reference(
    shape: tuple, dtype: torch.dtype, isa: str
) -> None:
    args, p = window_arguments(dtype, *shape), 0.3 if shape[-1] else 0.0
    results = attend(*args, p)
    plain = reference.attend_window(*args, p)
    exact = reference.attend_window(*widened(args), p)
    for mine, best, theirs in zip(results, exact, plain, strict=True):
        assert_as_exact_as_torch(mine, best, theirs)
    grads = [torch.randn_like(x) for x in results]
    back = (args[8], p, True)
    mine_back = gradients(*grads, *args[:8], *results, *back)
    plain_back = reference.attend_window_backward(*grads, *args[:8], *plain, *back)
    exact_back = reference.attend_window_backward(
        *widened(grads), *widened(args[:8]), *exact, *back
    )
    for mine, best, theirs in zip(mine_back, exact_back, plain_back, strict=True):
        assert not mine.isnan().any()
        assert_as_exact_as_torch(mine, best, theirs)


def test_gradients_of_the_rings_only_on_request_and_the_others_the_same(isa: str) -> None:
    args = window_arguments(torch.float32, 2, 40, 2, 8, 35, 1, False)
    results = attend(*args, 0.0)
    given = (torch.randn_like(results[0]), None, *args[:8], *results, 1, 0.0)
    with_rings, without = (gradients(*given, rings) for rings in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(with_rings[:3], without[:3], strict=True))
    assert [x.numel() for x in without[3:5]] == [0, 0]
    assert with_rings[3][1].count_nonzero()


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("streams", [1, 3])
def test_inputs_of_any_stride(streams: int, tokens: int) -> None:
    args = window_arguments(torch.float32, streams, tokens, 2, 8, 7, 0, True)

    def turned(x: Tensor) -> Tensor:
        axes = tuple(reversed(range(x.dim())))
        return x.permute(axes).contiguous().permute(axes)

    def thirds(x: Tensor) -> Tensor:
        return x.repeat(1, 1, 3, 1).chunk(3, dim=2)[1]

    position = args[5].repeat_interleave(2)[::2]
    results = attend(*args, 0.2)
    grad = torch.randn(()).expand_as(results[0])
    back = gradients(grad, None, *args[:8], *results, 0, 0.2, True)
    for lie in (turned, thirds):
        strided = [*map(lie, args[:3]), *map(turned, args[3:5]), position, turned(args[6])]
        others = attend(*strided, *args[7:], 0.2)
        assert all(map(torch.equal, results, others))
        others_back = gradients(grad, None, *strided, args[7], *results, 0, 0.2, True)
        assert all(map(torch.equal, back, others_back))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_stream_does_not_see_its_neighbours(broken: float, dtype: torch.dtype, isa: str) -> None:
    args = window_arguments(dtype, 3, 20, 2, 8, 17, 0, True)
    results = attend(*args, 0.2)
    grad = torch.randn_like(results[0])
    alone = gradients(grad, None, *args[:8], *results, 0, 0.2, True)
    for x in args[:5]:
        x[[0, 2]] = broken
    again = attend(*args, 0.2)
    assert torch.equal(results[0][1], again[0][1])
    others = gradients(grad, None, *args[:8], *again, 0, 0.2, True)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(alone, others, strict=True))


def test_gradients_are_those_of_finite_differences_twice() -> None:
    args = window_arguments(torch.float64, 2, 3, 1, 2, 2, 1, True)[:8]
    for ring in args[3:5]:
        ring.nan_to_num_(0.5)
    given = [x.requires_grad_(x.is_floating_point()) for x in args]

    def run(*tensors: Tensor) -> Any:
        return ops.call("attend_window", *tensors, 1, 0.3)

    assert gradcheck(run, given, fast_mode=True)
    assert gradgradcheck(run, given, fast_mode=True)


def test_many_gradients_at_once_are_those_one_by_one() -> None:
    module = build(sequence_len=5, add_zero_attn=True).double()  # no node takes that
    x = torch.randn(2, 7, module.embed_dim, dtype=torch.float64, requires_grad=True)
    out = module.forward_steps(x)
    assert out is not None
    assert_many_gradients_at_once(out, (x, module.in_proj_weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"query_index": 1},
        {"formulation": "input"},
    ],
    ids=str,
)
def test_chunks_of_a_stream_train_as_plain_pytorch_does(
    arguments: dict[str, Any], dtype: torch.dtype, isa: str
) -> None:
    """Three chunks with a gradient that flows through the state, from cold on."""
    module = build(sequence_len=9, **arguments).to(dtype)
    x = torch.randn(2, 28, module.embed_dim).to(dtype)

    def trained(kind: torch.dtype, backend: str) -> list[Tensor]:
        own = build(sequence_len=9, **arguments)
        own.load_state_dict(module.state_dict())
        own = own.to(kind)
        tokens = x.to(kind, copy=True).requires_grad_()
        with co.use_backend(backend):
            outs = [own.forward_steps(part) for part in tokens.split((5, 12, 11), dim=1)]
            out = torch.cat([y for y in outs if y is not None], dim=1)
            out.square().sum().backward()
        return [out, tokens.grad, *(w.grad for w in own.parameters())]

    exact, plain = trained(torch.float64, "torch"), trained(dtype, "torch")
    for mine, best, theirs in zip(trained(dtype, "cpu"), exact, plain, strict=True):
        assert_as_exact_as_torch(mine, best, theirs)


def test_what_the_kernels_do_not_cover_is_declined_with_the_reason() -> None:
    args = [*window_arguments(torch.float32, 1, 2, 1, 8, 3, 0, False), 0.0]
    assert _native.why_not_cpu("attend_window", *args) is None
    assert "dtype" in str(_native.why_not_cpu("attend_window", args[0].half(), *args[1:]))
    back = (torch.zeros(1, 2, 1, 8), None, *args[:8])
    assert _native.why_not_cpu("attend_window_backward", *back) is None


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.zeros(2, 4, 2), "tokens must be"),
        (1, torch.zeros(2, 3, 2, 8), "differ in their number of tokens"),
        (2, torch.zeros(2, 4, 2, 9), "a token has shape"),
        (2, torch.zeros(2, 4, 2, 8, dtype=torch.float64), "dtype"),
        (4, torch.zeros(2, 2, 6, 8), "the ring of values has shape"),
        (5, torch.zeros(3, dtype=torch.int64), "position must be"),
        (6, torch.zeros(2, 4, 2), "sink has shape"),
        (7, torch.zeros(2, dtype=torch.int64), "seed has shape"),
        (7, torch.zeros(1), "seed must be int64"),
        (8, 5, "first must be in"),
    ],
)
def test_what_does_not_fit_is_refused(index: int, wrong: Any, message: str) -> None:
    args: list[Any] = window_arguments(torch.float32, 2, 4, 2, 8, 5, 1, True)
    args[index] = wrong
    with pytest.raises(RuntimeError, match=message):
        attend(*args, 0.2)


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.zeros(2, 4, 2, 8), "grad_out has shape"),
        (0, torch.zeros(2, 3, 2, 8, dtype=torch.float64), "dtype"),
        (1, torch.zeros(2, 4, 2), "grad_lse has shape"),
        (11, torch.zeros(2, 4, 2), "lse has shape"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(index: int, wrong: Tensor, message: str) -> None:
    args = window_arguments(torch.float32, 2, 4, 2, 8, 5, 1, True)
    results = attend(*args, 0.2)
    given: list[Any] = [torch.ones_like(results[0]), None, *args[:8], *results, 1, 0.2, True]
    given[index] = wrong
    with pytest.raises(RuntimeError, match=message):
        gradients(*given)
