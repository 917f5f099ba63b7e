"""The Triton step over a ring of inputs against the reference, on a GPU or interpreted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles import assert_as_exact_as_torch
from torch import Tensor
from triton_cases import (
    DEVICE,
    DTYPES,
    RingCase,
    needs_kernels,
    widened,
)

from continual_mha import inputs
from continual_mha.operands import Weights
from continual_mha.quantized import QuantizedRing
from continual_mha.triton_kernels import input_step_, ring_step_, why_not
from continual_mha.triton_kernels.launch import counters, pretended_little_memory
from continual_mha.triton_kernels.plan import InputPlan, input_plan

pytestmark = needs_kernels

PATHS = [("gemm", 1), ("gemm", 3), ("fused", 1)]
WIDE = [("wide", 1), ("wide", 2)]
CODES = [torch.int8, torch.uint8]


class InputCase(RingCase):
    """As `RingCase`, but its state is a ring of inputs, positions, and scales of 8-bit tokens."""

    def poisoned_state(self) -> list[Tensor]:
        """Fresh streams: NaN in the slots that were never written."""
        x = torch.full((self.N, self.L, self.H * self.D), float("nan"), dtype=self.dtype)
        return [x.to(DEVICE), torch.zeros(self.N, dtype=torch.int64, device=DEVICE)]

    def warm(self) -> InputCase:
        """Fill the ring; every stream gets a position of its own past the first wrap-around."""
        self.state[0].copy_(self.random(*self.state[0].shape))
        self.state[1].copy_(torch.arange(self.N) + self.L + 1)
        return self

    def quantised(self, codes: torch.dtype) -> InputCase:
        """The same with a ring of 8 bits, NaN by their scales where nothing was written."""
        empty = QuantizedRing(torch.zeros(1, 1, dtype=codes, device=DEVICE), self.state[0])
        self.state = [empty.holding(self.state[0]).codes, self.state[1],
                      empty.holding(self.state[0]).scale]  # fmt: skip
        return self

    def arguments(self, state: list[Tensor], token: Tensor, **kw: Any) -> list[Any]:
        weights = [self.weights[0], *self.weights[3:]]
        options = [kw.get("active"), kw.get("add_zero_attn", False), kw.get("dropout_p", 0.0)]
        sizes = [self.H, self.delay]
        return [token, *weights, *state[:2], *sizes, *options, kw.get("update", True), *state[2:]]


def plan_of(case: InputCase, path: str, splits: int) -> InputPlan:
    """The table's plan; "wide" is the path of shapes too large for one program."""
    E, codes = case.H * case.D, len(case.state) > 2
    given = "gemm" if path == "wide" else path
    plan = input_plan(case.N, E, case.H, case.L, case.dtype.itemsize, codes, given, splits)
    wide = {"block_h": 8, "block_q": 16}
    return plan._replace(**wide) if path == "wide" else plan


def step(
    case: InputCase, state: list[Tensor], token: Tensor, path: str, splits: int, **kw: Any
) -> Tensor:
    args = case.arguments(state, token, **kw)
    return input_step_(*args, plan=plan_of(case, path, splits))


def in_float64(args: list) -> list:
    """`widened`, but for scales, which are fp32 in every precision."""
    wide = widened(args)
    return [*wide[:15], *(x.cpu().clone() for x in args[15:])]


def check_steps(
    case: InputCase, path: str, splits: int, steps: int, active: bool = False, zero: bool = False
) -> None:
    """Kernel, PyTorch and float64 side by side; each keeps a state of its own.

    Plain PyTorch reads all slots, and so begins with zeros in those that were never written.
    """
    state, torch_state = case.state, case.copied_state()
    unwritten = torch.arange(case.L, device=DEVICE) >= state[1][:, None]
    for i in range(0, len(state), 2):
        torch_state[i][unwritten] = 0
    exact_state = in_float64(case.arguments(torch_state, case.token()[0]))
    exact_state = [exact_state[i] for i in (7, 8, 15)[: len(state)]]
    for _ in range(steps):
        token = case.token()[0]
        mask = (torch.rand(case.N, 2, device=DEVICE) < 0.7)[:, 1] if active else None
        kw = {"active": mask, "add_zero_attn": zero}
        out = step(case, state, token, path, splits, **kw)
        plain = inputs.input_step_(*case.arguments(torch_state, token, **kw))
        args = in_float64(case.arguments(torch_state, token, **kw))
        args[7:9], args[15:] = exact_state[:2], exact_state[2:]
        assert_as_exact_as_torch(out, inputs.input_step_(*args), plain)
        written = torch.arange(case.L, device=DEVICE) < state[1][:, None]
        assert torch.equal(state[1], torch_state[1])
        for i in range(0, len(state), 2):
            assert torch.equal(state[i][written], torch_state[i][written])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("path", "splits"), PATHS)
def test_output_equals_sliding_window_attention_after_wraparound(
    path: str, splits: int, dtype: torch.dtype
) -> None:
    check_steps(InputCase(dtype=dtype), path, splits, steps=12)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)  # the numbers of the ring are fp32
@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize(("path", "splits"), PATHS)
def test_ring_of_8_bits_holds_what_the_reference_writes_and_is_read_as_that(
    path: str, splits: int, codes: torch.dtype, dtype: torch.dtype
) -> None:
    check_steps(InputCase(dtype=dtype, D=12).quantised(codes), path, splits, steps=9)


@pytest.mark.parametrize("codes", [None, *CODES], ids=str)
@pytest.mark.parametrize(("path", "splits"), PATHS)
def test_every_option_at_once(path: str, splits: int, codes: torch.dtype | None) -> None:
    case = InputCase(N=3, D=12, L=4, delay=3, extra_slot=True)
    case = case if codes is None else case.quantised(codes)
    check_steps(case, path, splits, steps=8, active=True, zero=True)


@pytest.mark.parametrize("codes", [None, *CODES], ids=str)
@pytest.mark.parametrize(("path", "splits"), WIDE)
def test_blocks_of_heads_add_up(path: str, splits: int, codes: torch.dtype | None) -> None:
    case = InputCase(N=3, H=9, D=8, L=20, delay=2, extra_slot=True).warm()
    case.state[1].copy_(torch.tensor([0, 18, 70]))
    case = case if codes is None else case.quantised(codes)
    check_steps(case, path, splits, steps=3, active=True, zero=True)
    assert not counters(case.state[0], 2 * case.N).any()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_blocks_of_heads_add_up_in_other_dtypes(dtype: torch.dtype) -> None:
    check_steps(InputCase(N=2, H=9, D=8, L=20, dtype=dtype).warm(), "wide", 2, steps=2)


def test_a_plan_divides_what_registers_do_not_hold() -> None:
    for E, H, itemsize, block_h in (
        (2048, 32, 2, 16),
        (1024, 64, 2, 16),
        (512, 64, 2, 32),
        (64, 64, 2, 32),
        (1024, 16, 4, 8),
        (512, 32, 4, 8),
    ):
        plan = input_plan(4096, E, H, 4, itemsize)
        assert (plan.path, plan.block_h) == ("gemm", block_h)
    for itemsize, rows in ((2, 16), (4, 8)):  # the matrix unit's, which few heads do not fill
        assert input_plan(1, 512, 2, 64, itemsize).block_h == rows


def test_a_window_of_one_tile_has_no_room_for_a_third() -> None:
    stages = [input_plan(512, 512, 8, L, 2).stages for L in (32, 33, 250)]
    assert stages == [2, 3, 3]
    assert input_plan(1, 512, 8, 64, 2).stages == 2  # in two parts


@pytest.mark.parametrize(("L", "splits"), [(1, 1), (2, 1), (63, 2), (64, 1), (120, 4)])
def test_window_lengths_around_the_block_size(L: int, splits: int) -> None:
    case = InputCase(N=2, L=L, bias=False).warm()
    check_steps(case, "gemm", splits, steps=3)


@pytest.mark.parametrize(("N", "H", "D"), [(1, 1, 8), (1, 3, 20), (1, 7, 50), (17, 1, 8)])
@pytest.mark.parametrize("path", ["gemm", "fused"])
def test_numbers_of_streams_heads_and_features(path: str, N: int, H: int, D: int) -> None:
    check_steps(InputCase(N=N, H=H, D=D, L=3), path, 1, steps=2)


@pytest.mark.parametrize("codes", [None, torch.int8], ids=str)
@pytest.mark.parametrize(("path", "splits"), [*PATHS, *WIDE])
def test_without_update_the_output_is_the_same_and_the_state_too(
    path: str, splits: int, codes: torch.dtype | None
) -> None:
    case = InputCase(H=9, delay=2).warm()
    case = case if codes is None else case.quantised(codes)
    token, before = case.token()[0], case.copied_state()
    preview = step(case, case.state, token, path, splits, update=False)
    assert all(torch.equal(x, y) for x, y in zip(case.state, before, strict=True))
    assert torch.equal(preview, step(case, case.state, token, path, splits))


@pytest.mark.parametrize(("path", "splits"), PATHS)
def test_two_runs_agree_bit_for_bit_and_leave_the_counters_at_zero(path: str, splits: int) -> None:
    case = InputCase(L=40).warm()
    token, state = case.token()[0], case.copied_state()
    first = step(case, case.state, token, path, splits)
    assert torch.equal(first, step(case, state, token, path, splits))
    assert not counters(first, case.N).any()


@pytest.mark.parametrize(("path", "splits"), PATHS)
def test_a_stream_does_not_see_its_neighbours(path: str, splits: int) -> None:
    case = InputCase(N=3).warm()
    token, state = case.token()[0], case.copied_state()
    out = step(case, case.state, token, path, splits)
    poisoned = token.clone()
    poisoned[[0, 2]] = float("nan")
    state[0][[0, 2]], state[1][0] = float("inf"), 0
    other = step(case, state, poisoned, path, splits)
    assert torch.equal(out[1], other[1])
    assert torch.equal(case.state[0][1], state[0][1])


@pytest.mark.parametrize("position", [2**31 - 1, 2**63 - 2**48])
def test_positions_of_a_long_life(position: int) -> None:
    case = InputCase(delay=2).warm()
    case.state[1].fill_(position)
    check_steps(case, "gemm", 1, steps=2)


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize(("path", "splits"), [("gemm", 1), WIDE[1]])
def test_inputs_of_any_stride(path: str, splits: int, update: bool) -> None:
    """Every other number, and rows that do not begin where 16 bytes do."""
    case = InputCase(H=9, L=20).warm()
    (N, E), token = (case.N, case.H * case.D), case.token()[0]
    of_columns = torch.empty(E, 7, N, device=DEVICE)[:, 3].T
    odd_rows = torch.empty(N, E + 3, device=DEVICE)[:, 1:-2]
    expected = step(case, case.copied_state(), token, path, splits, update=update)
    for strided in (of_columns, odd_rows):
        out = step(case, case.copied_state(), strided.copy_(token), path, splits, update=update)
        torch.testing.assert_close(out, expected)  # torch adds up in another order, too


@pytest.mark.parametrize(("path", "splits"), [("gemm", 1), WIDE[1]])
def test_a_ring_may_begin_anywhere(path: str, splits: int) -> None:
    case = InputCase(N=2, H=9, D=8, L=20).warm()
    ring = torch.empty(case.state[0].numel() + 1, device=DEVICE)[1:].view(case.state[0].shape)
    case.state[0] = ring.copy_(case.state[0])
    check_steps(case, path, splits, steps=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize(("path", "splits"), [*PATHS, *WIDE])
def test_what_the_new_token_overwrites_is_seen_by_no_program(
    path: str, splits: int, update: bool, dtype: torch.dtype
) -> None:
    """In whichever part of the window it lies, and in streams that pause."""
    case = InputCase(N=3, H=9, L=40, dtype=dtype).warm()
    case.state[1].copy_(torch.tensor([41, 60, 79]))
    kw = {"active": torch.tensor([True, False, True], device=DEVICE), "update": update}
    token, state, before = case.token()[0], case.copied_state(), case.copied_state()
    new = torch.arange(case.N), case.state[1].cpu() % case.L
    state[0][new] = float("nan")
    out = step(case, case.state, token, path, splits, **kw)
    assert out.isfinite().all()
    assert torch.equal(out, step(case, state, token, path, splits, **kw))
    if update:
        before[0][new] = token
        before[1] += torch.tensor([1, 0, 1], device=DEVICE)
        assert torch.equal(state[0], before[0])
    assert torch.equal(state[1], before[1])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("path", "splits"), [*PATHS, WIDE[0]])
def test_dropout_zeroes_weights_at_its_rate_and_rescales_the_others(
    path: str, splits: int, bias: bool
) -> None:
    """Equal scores and one-hot tokens make the output the attention weights themselves."""
    N, H, L, p = 2, 2, 64, 0.25
    case = InputCase(N=N, H=H, D=L, L=L, bias=bias)
    E = H * L
    weight, out_weight = case.weights[0], case.weights[4]
    assert weight is not None
    assert out_weight is not None
    weight.zero_()
    weight[2 * E :, :L] = torch.eye(L).repeat(H, 1)
    out_weight.copy_(torch.eye(E))
    for given, value in zip((case.weights[3], case.weights[5]), (0.0, 0.0), strict=True):
        if given is not None:
            given.fill_(value)
    if case.weights[3] is not None:
        case.weights[3][2 * E :] = 1.0  # the value's bias, which the kept weights share
    case.state[0].zero_()
    case.state[0][:, :, :L] = torch.eye(L)
    case.state[1].fill_(2 * L)
    token = torch.zeros(N, E, device=DEVICE)
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(step(case, case.copied_state(), token, path, splits, dropout_p=p))
    attn = outs[0].view(N, H, L)
    shared = attn[:, :, :1].clone() if bias else 0.0  # slot 0 holds the new token: zeros
    attn = (attn - shared)[:, :, 1:].flatten()
    kept = attn.abs() > 1e-4
    torch.testing.assert_close(attn[kept], torch.full_like(attn[kept], 1 / (L * (1 - p))))
    deviation = math.sqrt(attn.numel() * p * (1 - p))
    assert abs(kept.sum().item() - attn.numel() * (1 - p)) < 4 * deviation
    if bias:
        counted = kept.view(N, H, L - 1).sum(-1) / (L * (1 - p))
        assert ((shared[..., 0] - counted) < 1.01 / (L * (1 - p))).all()
        assert ((shared[..., 0] - counted) > -1e-5).all()
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0][0], outs[0][1])


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1e4, 1e30])
def test_stored_codes_and_scales_are_those_of_the_reference(
    magnitude: float, codes: torch.dtype
) -> None:
    case = InputCase(N=4, L=2, D=64).quantised(codes)
    expected = case.copied_state()
    x = magnitude * torch.randn(4, 128, device=DEVICE)
    x[1] *= torch.logspace(-9, 0, 128, device=DEVICE)
    x[2] = 0
    x[3, 1:] = torch.arange(127, device=DEVICE) / 254 * x[3, 0]  # ties
    step(case, case.state, x, "gemm", 1)
    inputs.input_step_(*case.arguments(expected, x))
    for i in (0, 2):
        assert torch.equal(case.state[i][:, 0], expected[i][:, 0])


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_leaves_with_its_slot(bad: float, codes: torch.dtype) -> None:
    case = InputCase(N=2, L=3).quantised(codes)
    token = case.token()[0]
    token[0, 1] = bad
    outs = [step(case, case.state, token, "gemm", 1)]
    outs += [step(case, case.state, case.token()[0], "gemm", 1) for _ in range(3)]
    for t, out in enumerate(outs):
        assert bool(out[0].isnan().all()) == (t < 3)
        assert out[1].isfinite().all()


def relative_error(out: Tensor, exact: Tensor) -> float:
    return ((out.cpu().double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_inputs_err_no_more_than_a_fifth_above_keys_and_values(dtype: torch.dtype) -> None:
    """Both Triton kernels on one stream; the interpreter adds up in another order than a GPU."""
    N, H, D, L = 4, 8, 32, 48
    E = H * D
    torch.manual_seed(1)
    case, kv = InputCase(N=N, H=H, D=D, L=L, dtype=dtype), RingCase(N=N, H=H, D=D, L=L, dtype=dtype)
    for i, weight in enumerate(case.weights):
        if weight is not None:
            weight.copy_(torch.randn(weight.shape) * (E**-0.5 if weight.dim() == 2 else 0.2))
            kv.weights[i] = weight
    x = torch.randn(N, L + 3, E, device=DEVICE).to(dtype)
    weights = Weights(*case.weights)
    held = inputs.Inputs(x[:, :L].roll(0, 1).contiguous(), torch.full((N,), L, device=DEVICE))
    rings = inputs.projected_rings(held, weights, H, 0)
    for part, value in zip(kv.state, (rings.k, rings.v, rings.q, held.position), strict=True):
        part.copy_(value)
    case.state[0].copy_(held.x)
    case.state[1].copy_(held.position)
    exact_state = widened(case.state)
    errors = torch.zeros(2, dtype=torch.float64)
    for t in range(L, L + 3):
        token = x[:, t]
        exact = inputs.input_step_(*widened(case.arguments(exact_state, token)))
        exact_state[0][:, t % L] = token.double()
        exact_state[1] += 1
        by_inputs = step(case, case.state, token, "gemm", 1)
        args = [token] * 3 + [*kv.weights, *kv.state, None, False, 0.0, True]
        by_keys = ring_step_(*args)
        errors += torch.tensor([relative_error(out, exact) for out in (by_inputs, by_keys)])
    assert 0 < errors[0] <= 1.2 * errors[1]


def test_an_uncovered_call_is_declined_with_the_reason() -> None:
    case = InputCase()
    args = case.arguments(case.state, case.token()[0])
    assert why_not("input_step_", *args) is None
    args[7] = case.state[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert "contiguous" in (why_not("input_step_", *args) or "")
    args[7] = torch.empty(2, 1 << 27, 16, device="meta")
    assert "2147483648 numbers" in (why_not("input_step_", *args) or "")
    args[7] = case.state[0]
    args[8] = torch.zeros(case.N, 2, dtype=torch.int64, device=DEVICE)[:, 0]
    assert "contiguous" in (why_not("input_step_", *args) or "")
    args[7] = case.state[0].half()
    assert "dtype" in (why_not("input_step_", *args) or "")
    wide = InputCase(H=8, D=512)
    assert "embed_dim" in (
        why_not("input_step_", *wide.arguments(wide.state, wide.token()[0])) or ""
    )
    half = InputCase(H=8, D=256, dtype=torch.float16)
    args = half.arguments(half.state, half.token()[0])
    assert why_not("input_step_", *args) is None
    if DEVICE == "cpu":
        with pretended_little_memory():
            assert "embed_dim 2048 is over 1024" in (why_not("input_step_", *args) or "")


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has what it has")
def test_a_step_where_programs_have_little_shared_memory() -> None:
    """A tile of fewer rows in half precision, and of fp32 no second one under way."""
    for dtype in (torch.float16, torch.float32):
        case = InputCase(N=2, H=1, D=1024, L=20, dtype=dtype).warm()
        token = case.token()[0]
        plain, exact = (
            inputs.input_step_(*(in_float64(args) if wide else args))
            for wide in (False, True)
            for args in [case.arguments(case.copied_state(), token)]
        )
        with pretended_little_memory():
            out = input_step_(*case.arguments(case.state, token))
        assert_as_exact_as_torch(out, exact, plain)


@pytest.mark.usefixtures("products_by_row")
@pytest.mark.parametrize("codes", [None, torch.int8], ids=str)
def test_batch_invariant_steps_give_a_stream_the_same_bits_alone_and_among_others(
    codes: torch.dtype | None,
) -> None:
    case = InputCase(N=70, H=9, D=12, L=5, extra_slot=True).warm()
    case = case if codes is None else case.quantised(codes)
    alone = [x[66:67].clone() for x in case.state]
    token = case.token()[0]
    plain, exact = (
        inputs.input_step_(*(in_float64(args) if wide else args))
        for wide in (False, True)
        for args in [case.arguments(case.copied_state(), token, add_zero_attn=True)]
    )
    together, single = (
        input_step_(*case.arguments(state, x, add_zero_attn=True), batch_invariant=True)
        for state, x in ((case.state, token), (alone, token[66:67]))
    )
    assert torch.equal(together[66:67], single)
    assert all(torch.equal(x[66:67], y) for x, y in zip(case.state, alone, strict=True))
    assert_as_exact_as_torch(together, exact, plain)


def test_batch_invariant_steps_have_heads_of_any_size() -> None:
    case = InputCase(N=2, H=1, D=272, L=3).warm()
    args = case.arguments(case.copied_state(), case.token()[0])
    exact = inputs.input_step_(*in_float64(args))
    plain = inputs.input_step_(*case.arguments(case.copied_state(), args[0]))
    assert why_not("input_step_", *args) is None
    assert_as_exact_as_torch(input_step_(*args, batch_invariant=True), exact, plain)
