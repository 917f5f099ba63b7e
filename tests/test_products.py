"""Products of tokens with weights: the CPU library's kernel, and who multiplies in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import assert_as_exact_as_torch, build, draw_tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from continual_mha import _native, products, use_backend

pytestmark = pytest.mark.skipif(_native.load("cpu") is not None, reason=str(_native.load("cpu")))

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def by_library(
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """``products.multiply`` by the kernel, which lays batches, as of heads, inside of rows."""
    if out is None:
        *batch, rows, _ = left.shape
        out = left.new_empty((rows, *batch, right.shape[-1]))
        out = out.transpose(0, 1) if batch else out
    torch.ops.continual_mha.cpu_product_(out, left, right, bias, scale, add)
    return out


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_order(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The same numbers, with these axes from the outermost in memory to the innermost."""
    back = sorted(range(len(axes)), key=axes.__getitem__)
    return x.permute(axes).contiguous().permute(back)


SIZES = [
    (None, 1, 1, 1),
    (None, 10, 3, 7),
    (None, 70, 33, 300),
    (None, 3, 200, 17),
    (None, 20, 30, 1024),  # rows a power of two apart, whose second kilobytes of columns are a task
    (None, 40, 70, 1024),  # the same with more that is summed up, and more rows
    (None, 33, 33, 257),  # one more of each than AMX takes at once
    (3, 2, 9, 40),
    (2, 35, 34, 65),
    (4, 6, 0, 5),
    (None, 104, 0, 165),  # so many that AMX takes them in parts
    (0, 6, 2, 5),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_products_are_as_exact_as_torchs_in_every_layout(
    sizes: tuple[int | None, int, int, int], dtype: torch.dtype, isa: str
) -> None:
    batches, rows, inner, columns = sizes
    batch = () if batches is None else (batches,)
    left, right = drawn(*batch, rows, inner).to(dtype), drawn(*batch, inner, columns).to(dtype)
    bias, held = drawn(*batch, columns).to(dtype), drawn(*batch, rows, columns).to(dtype)
    orders = [(0, 1), (1, 0)] if batches is None else [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)]
    # a bias, an addend, or neither, each with and without a scale
    options: list[dict[str, Any]] = [
        {"scale": scale, **option}
        for scale in (1.0, 0.3)
        for option in ({}, {"bias": bias}, {"out": held, "add": True})
    ]
    for option in options:
        wide = {
            k: v.to(torch.float64, copy=True) if isinstance(v, Tensor) else v
            for k, v in option.items()
        }
        exact = products.multiplier(left.double())(left.double(), right.double(), **wide)
        plain = products.multiplier(left)(
            left, right, **{k: v.clone() if k == "out" else v for k, v in option.items()}
        )
        for of_left in orders:
            for of_right in orders:
                given = dict(option)
                if "add" in option:  # to a part of what there is
                    whole = torch.full((*batch, rows + 2, columns + 3), 7.0, dtype=dtype)
                    given["out"] = whole[..., 1:-1, 1:-2]
                    given["out"].copy_(held)
                found = by_library(in_order(left, of_left), in_order(right, of_right), **given)
                assert found.shape == plain.shape
                assert_as_exact_as_torch(found, exact, plain)
                if "add" in option:
                    found.fill_(7.0)
                    assert (whole == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("multiply", [by_library, products.multiplier(torch.empty(0))])
def test_what_is_written_over_is_not_read(
    multiply: Callable[..., Tensor], scale: float, dtype: torch.dtype
) -> None:
    for batch in ((), (3,)):
        for inner in (0, 40):
            out = torch.full((*batch, 5, 6), torch.nan, dtype=dtype)
            left = torch.ones(*batch, 5, inner, dtype=dtype)
            multiply(left, torch.ones(*batch, inner, 6, dtype=dtype), scale=scale, out=out)
            assert torch.equal(out, torch.full_like(out, scale * inner))


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    before = torch.get_num_threads()
    left, right = drawn(40, 300).float(), drawn(300, 700, seed=1).float()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            rights = (right, in_order(right, (1, 0)))
            found.append([by_library(left, x) for x in rights])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_what_does_not_fit_together_is_refused_and_nothing_written() -> None:
    left, right, out = torch.ones(3, 4), torch.ones(4, 5), torch.full((3, 5), 7.0)
    for operands in (
        (out, left, right[:3], None, 1.0, False),
        (out[:2], left, right, None, 1.0, False),
        (out, left, right.double(), None, 1.0, False),
        (out.t().contiguous().t(), left, right, None, 1.0, False),
        (out, left.expand(2, 3, 4), right, None, 1.0, False),
        (out[0], left[0], right, None, 1.0, False),
        (out, left, right, torch.ones(4), 1.0, False),
        (out, left, right, torch.ones(5), 1.0, True),
        (out.int(), left.int(), right.int(), None, 1.0, False),
    ):
        with pytest.raises(RuntimeError, match="cpu_product_"):
            torch.ops.continual_mha.cpu_product_(*operands)
    assert (out == 7.0).all()


class Products(TorchDispatchMode):
    """In how many operators the library multiplied, and how many products PyTorch computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = {"library": 0, "torch": 0}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name.split("::")[1]
        self.count["library"] += name.startswith("cpu_attend_clip")
        self.count["torch"] += name in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "linear")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True])
def test_without_instructions_of_bfloat16_torch_is_not_asked_to_multiply_it(
    training: bool, isa: str
) -> None:
    """It takes many times as long then."""
    module = build(embed_dim=32, num_heads=4, dtype=torch.bfloat16)
    clip = torch.randn(600, 4, 32).bfloat16()
    with torch.set_grad_enabled(training), torch.autograd.profiler.profile() as profile:
        outs = [module(clip)[0], module.forward_steps(clip), module.forward_step(clip[:, 0])]
        if training:
            sum(out.float().sum() for out in outs if out is not None).backward()
    products = {"aten::mm", "aten::bmm", "aten::addmm", "aten::linear"}
    found = products & {event.name for event in profile.function_events}
    if isa in ("avx2", "avx512"):
        assert not found
    else:
        assert found  # or this would see none anyway


def products_in_training(module: torch.nn.Module, x: Tensor) -> dict[str, int]:
    x = x.detach().requires_grad_()
    with Products() as found:
        out, _ = module(x, x, x)
        out.float().sum().backward()
    return found.count


@pytest.mark.parametrize("dtype", DTYPES)
def test_pytorch_multiplies_many_tokens_in_training_where_it_is_faster(
    dtype: torch.dtype, isa: str
) -> None:
    if dtype == torch.bfloat16:
        limits = {"baseline": (64, 0), "amx": (64, 512), "avx512_bf16": (512, 63)}
    else:
        limits = {"baseline": (64, 0), **({} if dtype == torch.float16 else {"avx2": (512, 63)})}
    embed_dim, most = limits.get(isa, (64, 600))
    module = build(embed_dim=embed_dim, num_heads=4, dtype=dtype)
    for N in (1, most, most + 1):
        few = isa not in limits or most >= N
        expected = {"library": 2, "torch": 0} if few else {"library": 0, "torch": 12}
        if N:
            assert products_in_training(module, draw_tokens(module, N, 3)[0]) == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("features", [3, 9, 31, 32, 44, 65, 100])
def test_rows_that_are_not_finite_stay_alone(features: int, bad: float) -> None:
    """In PyTorch's own products of bfloat16 they do not, on processors with AMX."""
    streams, broken = 40, [3, 17, 39]
    x = drawn(streams, features).bfloat16()
    weight = drawn(features, features, seed=1).bfloat16()
    spoilt = x.clone()
    spoilt[broken, 2] = bad
    others = torch.ones(streams, dtype=torch.bool)
    others[broken] = False

    def alone(multiply: Callable[[Tensor], Tensor]) -> None:
        expected, found = multiply(x), multiply(spoilt)
        assert torch.equal(found[others], expected[others])
        assert not found[broken].isfinite().any(-1).all()

    bias = weight[0]
    alone(lambda x: products.linear(x, weight, bias))
    alone(lambda x: products.multiply(x, weight.t(), bias))
    alone(lambda x: products.multiply(x.expand(2, -1, -1), weight.expand(2, -1, -1))[1])
    alone(lambda x: products.matmul(x, weight.t()))
    alone(lambda x: products.matmul(x.view(2, 2, 10, -1), weight).view(streams, -1))
    alone(lambda x: products.multiplier(x)(x, weight.t(), bias))
    alone(lambda x: products.multiplier(x)(x, weight.t(), out=torch.empty_like(x)))
    alone(lambda x: products.multiplier(x)(x, weight.t(), out=torch.zeros_like(x), add=True))
    alone(lambda x: by_library(x, weight.t(), bias))
    alone(lambda x: by_library(x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone(lambda x: products.linear(x.float(), weight.float(), bias.float()))
        alone(lambda x: products.matmul(x.float(), weight.float()))


@pytest.mark.parametrize("features", [7, 40])
def test_results_are_contiguous_whatever_they_were_padded_to(features: int) -> None:
    """As their fakes say, by which compiled code reads them."""
    x = drawn(40, features).bfloat16()
    weight = drawn(features, features, seed=1).bfloat16()
    assert products.linear(x, weight, None).is_contiguous()
    assert products.multiply(x, weight, x[0]).is_contiguous()
    assert products.matmul(x.view(4, 10, -1), weight).is_contiguous()
    module = build(embed_dim=features, num_heads=1, dtype=torch.bfloat16)
    module.start_streams(3)
    with use_backend("torch"), torch.no_grad():
        assert module.forward_step(x[:3]).is_contiguous()
        assert module.forward_steps(x[:12].view(3, 4, -1)).is_contiguous()


@pytest.mark.parametrize("sizes", [(40, 16, 9), (17, 32, 33), (1, 80, 16)], ids=str)
def test_gradients_that_are_not_finite_stay_alone(sizes: tuple[int, int, int]) -> None:
    """Each within its row of the left, and within its matrix of the right."""
    rows, inner, columns = sizes
    left = drawn(6, rows, inner).bfloat16().requires_grad_()
    right = drawn(6, inner, columns, seed=1).bfloat16().requires_grad_()
    grad = drawn(6, rows, columns, seed=2).bfloat16()
    spoilt = grad.clone()
    spoilt[2, -1] = torch.nan
    broken = left.detach().index_fill(0, torch.tensor(2), torch.nan).requires_grad_()
    d_right = torch.autograd.grad(products.matmul(broken, right), right, grad)[0]
    assert [x.isnan().any().item() for x in d_right] == [i == 2 for i in range(6)]
    found = []
    for given in (grad, spoilt):
        out = products.matmul(left, right)
        assert out.shape == grad.shape
        found.append(torch.autograd.grad(out, (left, right), given))
    others = torch.ones(6, rows, dtype=torch.bool)
    others[2, -1] = False
    (d_left, d_right), (of_left, of_right) = found
    assert torch.equal(of_left[others], d_left[others])
    assert of_left[~others].isnan().all()
    kept = [0, 1, 3, 4, 5]
    assert torch.equal(of_right[kept], d_right[kept])
    exact = torch.matmul(left.double(), right.double())
    plain = torch.matmul(left, right)
    assert_as_exact_as_torch(products.matmul(left, right), exact, plain)


def test_pytorch_multiplies_what_the_library_does_not_take() -> None:
    module = build(dtype=torch.float16)
    x = draw_tokens(module, 3, 9)[0]
    with use_backend("torch"):
        assert products_in_training(module, x)["library"] == 0
    in_proj_bias = module.in_proj_bias.detach()
    module.in_proj_bias = torch.nn.Parameter(in_proj_bias.repeat_interleave(2)[::2])
    assert products_in_training(module, x)["library"] == 0
