"""What Triton compiles, executed: the tables' own tiles and warps, and the faults that show."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from oracles import assert_as_exact_as_torch
from torch import Tensor
from triton_cases import INTERPRETED, RingCase, widened

from continual_mha import inputs, reference
from continual_mha.triton_kernels import (
    attend_shared_full,
    attend_shared_full_backward,
    attend_window,
    attend_window_backward,
    ring_steps_,
)
from continual_mha.triton_kernels.eight_bits import CODES, decode
from continual_mha.triton_kernels.input_step import input_step_
from continual_mha.triton_kernels.launch import constants_of, launch
from continual_mha.triton_kernels.pieces import dot
from continual_mha.triton_kernels.plan import input_plan, invariant_step_plan, step_plan
from continual_mha.triton_kernels.project import project
from continual_mha.triton_kernels.ring_step import ring_step_

pytest.importorskip("numpy")
from ptx_launches import as_ptx
from ptx_machine import parse
from ptx_memory import FaultError
from test_triton_attend_shared import arguments as shared_arguments
from test_triton_input_step import InputCase, in_float64
from test_triton_ring_step import arguments, quantised
from window_cases import window_arguments

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the same tests itself"),
]
in_turn = pytest.mark.in_turn(80, 90)
HALF, FULL = torch.bfloat16, torch.float32


@pytest.fixture(params=[80, 90])
def capability(request: pytest.FixtureRequest) -> int:
    return request.param


def in_both_orders(
    capability: int, step: Callable[..., Tensor], args: list, again: list, plan: Any
) -> Tensor:
    """What a step gives with all programs at once, bit for bit that of one after the other.

    `args` and `again` are the same arguments with states of their own.
    """
    with as_ptx(capability) as runs:
        out = step(*args, plan=plan)
    assert runs.count >= 1
    with as_ptx(capability, one_by_one=True):
        assert torch.equal(out, step(*again, plan=plan))
    return out


# N, E, H, L as the table sees them, the path it takes, and how many of the streams are here.
STEPS = [
    (1, 512, 8, 32, HALF, None, "fused", 1),
    (1, 512, 8, 32, FULL, None, "fused", 1),
    (1, 64, 8, 32, HALF, None, "fused", 1),
    (8, 192, 16, 120, HALF, None, "fused", 2),
    (1, 256, 4, 1024, torch.float16, None, "fused", 1),
    (1, 512, 8, 64, HALF, torch.uint8, "fused", 1),
    (64, 256, 8, 64, HALF, None, "group", 5),
    (64, 64, 8, 16, FULL, None, "group", 5),
    (64, 256, 8, 64, HALF, torch.int8, "group", 5),
    (8, 260, 13, 40, HALF, None, "chain", 2),
    (4096, 512, 8, 250, HALF, None, "gemm", 2),
    (4096, 96, 8, 70, FULL, torch.int8, "gemm", 2),
    (64, 256, 4, 300, HALF, None, "invariant", 2),
]


@pytest.mark.sampled(6)
@in_turn
@pytest.mark.parametrize("case", STEPS, ids=lambda x: "-".join(map(str, x)))
def test_step(case: tuple, capability: int) -> None:
    many, E, H, L, dtype, codes, path, N = case
    slot = (codes or dtype).itemsize
    if path == "invariant":
        plan = invariant_step_plan(E, H, L, dtype.itemsize, slot)
    else:
        plan = step_plan(many, E, H, L, dtype.itemsize, path, 0, slot)
    ring = RingCase(N=N, H=H, D=E // H, L=L, dtype=dtype).warm()
    ring = quantised(ring, codes)
    ring.state[3][-1] = 3  # a cold one
    token = ring.token()
    args = [arguments(ring.weights, ring.copied_state(), token) for _ in range(4)]
    exact_args = widened(args[3])
    exact_args[19:] = args[3][19:]  # scales are fp32 in every precision
    exact = reference.ring_step_(*exact_args)
    out = in_both_orders(capability, ring_step_, args[0], args[1], plan)
    assert_as_exact_as_torch(out, exact, reference.ring_step_(*args[2]))
    assert all(
        torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        for a, b in zip(args[0][11:], args[1][11:], strict=True)
        if isinstance(a, Tensor)
    )
    assert torch.equal(args[0][14], exact_args[14])


INPUT_STEPS = [
    (4096, 512, 8, 100, HALF, None, "gemm", 2),
    (4096, 256, 4, 40, FULL, None, "gemm", 2),
    (16, 96, 12, 70, FULL, None, "gemm", 2),
    (4096, 512, 8, 40, FULL, None, "gemm", 1),
    (64, 1024, 16, 40, FULL, None, "gemm", 1),
    (16, 1024, 8, 600, HALF, None, "gemm", 1),
    (4096, 128, 2, 60, HALF, torch.uint8, "gemm", 2),
    (8192, 256, 4, 32, HALF, None, "fused", 3),
    (8192, 256, 4, 32, FULL, None, "fused", 3),
    (8192, 60, 3, 16, FULL, None, "fused", 3),
]


@pytest.mark.sampled(6)
@in_turn
@pytest.mark.parametrize("case", INPUT_STEPS, ids=lambda x: "-".join(map(str, x)))
def test_step_over_inputs(case: tuple, capability: int) -> None:
    many, E, H, L, dtype, codes, path, N = case
    plan = input_plan(many, E, H, L, dtype.itemsize, codes is not None, path)
    ring = InputCase(N=N, H=H, D=E // H, L=L, dtype=dtype).warm()
    if codes is not None:
        ring.quantised(codes)
    token = ring.token()[0]
    args = [ring.arguments(ring.copied_state(), token) for _ in range(3)]
    exact = inputs.input_step_(*in_float64(args[2]))
    out = in_both_orders(capability, input_step_, args[0], args[1], plan)
    assert_as_exact_as_torch(out, exact, inputs.input_step_(*args[2]))


@triton.jit
def _decode_kernel(codes_ptr, out_ptr):
    """Writes what all 256 codes stand for, over `unit_of` them."""
    at = tl.arange(0, 256)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + at, decode(tl.load(codes_ptr + at), dtype))


@in_turn
@pytest.mark.parametrize("dtype", [HALF, torch.float16, FULL])
@pytest.mark.parametrize("codes", CODES)
def test_every_code_is_decoded(codes: torch.dtype, dtype: torch.dtype, capability: int) -> None:
    given = torch.arange(256, dtype=torch.uint8)
    out = torch.full((256,), torch.nan, dtype=dtype)
    with as_ptx(capability):
        launch(_decode_kernel, (1, 1, 1), (given.view(codes), out), (), num_warps=1)
    exact = given.view(torch.int8 if codes == torch.int8 else torch.float8_e4m3fn).float()
    exact /= 1 if codes == torch.int8 else 256
    known = exact.isfinite()
    assert torch.equal(out.float()[known], exact[known])
    assert known.sum() == (256 if codes == torch.int8 else 254)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr):
    """The product (64, 16) of a (64, 64) and b (64, 16)."""
    rows, inner, columns = tl.arange(0, 64), tl.arange(0, 64), tl.arange(0, 16)
    a = tl.load(a_ptr + rows[:, None] * 64 + inner[None, :])
    b = tl.load(b_ptr + inner[:, None] * 16 + columns[None, :])
    product = dot(a, b, tl.zeros((64, 16), tl.float32), PRECISION)
    tl.store(out_ptr + rows[:, None] * 16 + columns[None, :], product)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
def test_three_products_of_tf32_err_as_fp32_does(precision: str, capability: int) -> None:
    """Although the matrix unit truncates: here as coarsely as any is known to."""
    torch.manual_seed(0)
    a, b, out = torch.randn(64, 64), torch.randn(64, 16), torch.full((64, 16), torch.nan)
    with as_ptx(capability):
        launch(_dot_kernel, (1, 1, 1), (a, b, out), constants_of(precision), num_warps=4)
    exact = a.double() @ b.double()
    error = (out - exact).abs().max() / exact.abs().max()
    assert error < 5e-7 if precision != "tf32" else error > 1e-4, error


def test_projections_of_fp32_add_up_often_enough(capability: int) -> None:
    x, weight = torch.randn(8, 512), torch.randn(16, 512)
    with as_ptx(capability):
        out = project(x, weight, None, step_plan(8, 512, 8, 64, 4, "chain"))
    exact = x.double() @ weight.double().T
    assert (out - exact).abs().max() < 5e-7 * exact.abs().max()


@pytest.mark.sampled(6)
@in_turn
@pytest.mark.parametrize(
    ("dtype", "D", "T", "fp32_precision"),
    [
        (HALF, 64, 70, "none"),
        (FULL, 32, 20, "none"),
        (FULL, 64, 40, "none"),
        (FULL, 64, 40, "ieee"),
        (HALF, 8, 40, "none"),
    ],
    indirect=["fp32_precision"],
)
@pytest.mark.usefixtures("fp32_precision")
def test_steps(dtype: torch.dtype, D: int, T: int, capability: int) -> None:
    case = RingCase(N=1, H=2, D=D, L=33, dtype=dtype).warm()
    clip, rest = case.clip(T), [0, True, 0.0, True]
    exact = reference.ring_steps_(*widened([*clip, *case.weights, *case.copied_state(), *rest]))
    plain = reference.ring_steps_(*clip, *case.weights, *case.copied_state(), *rest)
    with as_ptx(capability):
        out = ring_steps_(*clip, *case.weights, *case.state, *rest)
    assert_as_exact_as_torch(out, exact, plain)


def assert_as_exact(
    actual: Sequence, exact: Sequence, plain: Sequence, rounded: torch.dtype | None = None
) -> None:
    """Of what is computed in the backward, some is fp32 and made of numbers that are not."""
    for ours, best, theirs in zip(actual, exact, plain, strict=True):
        if best is not None and best.count_nonzero():
            assert_as_exact_as_torch(ours, best, theirs, rounded, in_mean=True)


@pytest.mark.sampled(6)
@in_turn
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (HALF, (1, 40, 1, 64, 33, 0, True)),
        (HALF, (1, 40, 1, 128, 20, 0, False)),
        (FULL, (1, 40, 1, 64, 33, 0, True)),
        (FULL, (1, 20, 1, 100, 20, 0, False)),
    ],
    ids=str,
)
def test_window_and_its_gradients(dtype: torch.dtype, shape: tuple, capability: int) -> None:
    args, p = window_arguments(dtype, *shape), 0.3 if shape[-1] else 0.0
    args[3:5] = [x.nan_to_num(0.0) for x in args[3:5]]
    plain, exact = (reference.attend_window(*x, p) for x in (args, widened(args)))
    grads = [torch.randn_like(x) for x in plain]
    rest = [shape[5], p, True]

    def backward(function: Callable, args: list, grads: list, results: Any) -> Any:
        return function(*grads, *args[:8], *results, *rest)

    with as_ptx(capability):
        results = attend_window(*args, p)
        mine = backward(attend_window_backward, args, grads, results)
    plain_back = backward(reference.attend_window_backward, args, grads, plain)
    exact_back = backward(reference.attend_window_backward, widened(args), widened(grads), exact)
    assert_as_exact(results, exact, plain)
    assert_as_exact(mine, exact_back, plain_back, dtype)


@pytest.mark.sampled(6)
@in_turn
@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 8, 70, 256, 256, True, True),
        (2, 2, 9, 12, 12, True, False),  # whose rows no thread may read by 16 bytes
        (1, 16, 40, 512, 512, True, False),
        (1, 8, 40, 1024, 1024, True, False),
        (1, 20, 40, 64, 128, False, False),
    ],
    ids=str,
)
def test_clip_and_its_gradients(shape: tuple, dtype: torch.dtype, capability: int) -> None:
    args = [*shared_arguments(dtype, *shape), None, 0.0, shape[-1]]
    exact_args = widened(args)
    plain, exact = (reference.attend_shared_full(*x) for x in (args, exact_args))
    grads = [torch.randn_like(x) if x.numel() else None for x in plain]
    given = [args[0], args[1], args[2], args[3], args[4], args[5]]
    with as_ptx(capability):
        results = attend_shared_full(*args)
        mine = attend_shared_full_backward(*grads, *given, *results[:3], 0.0)
    plain_back = reference.attend_shared_full_backward(*grads, *given, *plain[:3], 0.0)
    exact_back = reference.attend_shared_full_backward(
        *widened(grads), *widened(given), *exact[:3], 0.0
    )
    assert_as_exact(results, exact, plain)
    assert_as_exact(mine, exact_back, plain_back, dtype)


# What the machine says of kernels without one of their guards.


def fused_step() -> None:
    case = RingCase(N=1, H=8, D=64, L=32, dtype=HALF).warm()
    plan = step_plan(1, 512, 8, 32, 2, "fused")
    with as_ptx(90):
        ring_step_(*arguments(case.weights, case.state, case.token()), plan=plan)


def without(pattern: str, which: int = 0) -> Callable[[str], str]:
    """PTX without one of the instructions that match."""

    def change(ptx: str) -> str:
        found = list(re.finditer(rf"^\s*{pattern}.*\n", ptx, re.MULTILINE))
        return ptx[: found[which].start()] + ptx[found[which].end() :]

    return change


def before_counting(ptx: str) -> str:
    """PTX without barriers between the last store and the count of the programs that have ended."""
    counts = ptx.index("atom.global")
    stores = ptx.rindex("st.global", 0, counts)
    return ptx[:stores] + re.sub(r"bar\.sync.*", "", ptx[stores:counts]) + ptx[counts:]


def after_counting(ptx: str) -> str:
    at = ptx.index("bar.sync", ptx.index("atom.global"))
    return ptx[:at] + ptx[ptx.index("\n", at) :]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (before_counting, "another"),
        (after_counting, "another"),
        (without(r"cp\.async\.wait_group", -1), "still being copied|nobody wrote|ends before"),
    ],
    ids=["before counting", "after counting", "wait"],
)
def test_a_step_without_one_of_its_guards_is_found_out(
    change: Callable[[str], str], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ptx_launches

    fused_step()
    monkeypatch.setattr(ptx_launches, "parse", lambda ptx: parse(change(ptx)))
    ptx_launches._machine.cache_clear()
    try:
        with pytest.raises(FaultError, match=what):
            fused_step()
    finally:
        ptx_launches._machine.cache_clear()
