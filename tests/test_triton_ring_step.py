"""The Triton step against the reference: every path, case and dtype, on a GPU or interpreted."""

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

from continual_mha import reference
from continual_mha.quantized import QuantizedRing
from continual_mha.triton_kernels import plan, ring_step_, why_not
from continual_mha.triton_kernels.launch import counters
from continual_mha.triton_kernels.plan import StepPlan, step_plan

pytestmark = needs_kernels

PATHS = [("fused", 1), ("fused", 2), ("group", 1), ("chain", 1), ("gemm", 3)]
CODES = [torch.int8, torch.uint8]


def plan_of(case: RingCase, path: str, splits: int) -> StepPlan:
    E, sizes = case.H * case.D, (case.dtype.itemsize, path, splits, case.state[0].itemsize)
    return step_plan(case.N, E, case.H, case.L, *sizes)


def quantised(case: RingCase, codes: torch.dtype | None) -> RingCase:
    """The same with rings of 8 bits, and behind its state their scales; as it is for None."""
    if codes is not None:
        empty = QuantizedRing(torch.zeros(1, 1, dtype=codes, device=DEVICE), case.state[0])
        rings = [empty.holding(ring) for ring in case.state[:2]]
        case.state[:2] = [ring.codes for ring in rings]
        case.state += [ring.scale for ring in rings]
    return case


def with_exact_projections(**sizes: Any) -> RingCase:
    """A case whose keys and values are the same in every dtype; its scores are of moderate size."""
    case = RingCase(integers=True, **sizes)
    assert case.weights[0] is not None
    case.weights[0][: case.H * case.D] /= 8
    return case


def arguments(weights: list, state: list[Tensor], token: Any, **kw: Any) -> list[Any]:
    rest = [kw.get("active"), kw.get("add_zero_attn", False), kw.get("dropout_p", 0.0)]
    return [*token, *weights, *state[:4], *rest, kw.get("update", True), *state[4:]]


def step(
    case: RingCase, state: list[Tensor], token: Any, path: str, splits: int, **kw: Any
) -> Tensor:
    args = arguments(case.weights, state, token, **kw)
    return ring_step_(*args, plan=plan_of(case, path, splits))


def as_bits(x: Tensor) -> Tensor:
    """What equals itself, NaN or not."""
    return x.nan_to_num(77) if x.is_floating_point() else x


def check_steps(
    case: RingCase, path: str, splits: int, steps: int, active: bool = False, zero: bool = False
) -> None:
    """Kernel, PyTorch and float64 side by side; each keeps a state of its own."""
    state, torch_state = case.state, case.copied_state()
    exact_state = widened(torch_state)
    weights = widened(case.weights)
    for _ in range(steps):
        token = case.token()
        mask = (torch.rand(case.N, 2, device=DEVICE) < 0.7)[:, 1] if active else None
        out = step(case, state, token, path, splits, active=mask, add_zero_attn=zero)
        options = {"active": mask, "add_zero_attn": zero}
        plain = reference.ring_step_(*arguments(case.weights, torch_state, token, **options))
        options["active"] = None if mask is None else mask.cpu()
        exact = reference.ring_step_(
            *arguments(weights, exact_state, widened(list(token)), **options)
        )
        assert_as_exact_as_torch(out, exact, plain)
        assert torch.equal(state[3].cpu(), exact_state[3])
        if case.integers:
            for ours, theirs in zip(state, torch_state, strict=True):
                assert torch.equal(as_bits(ours), as_bits(theirs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("path", "splits"), PATHS)
def test_output_equals_sliding_window_attention_after_wraparound(
    path: str, splits: int, dtype: torch.dtype
) -> None:
    check_steps(RingCase(dtype=dtype), path, splits, steps=8)


@pytest.mark.parametrize(("path", "splits"), PATHS)
def test_every_option_at_once(path: str, splits: int) -> None:
    case = RingCase(N=3, D=12, L=4, delay=3, kdim=27, vdim=22, extra_slot=True)
    check_steps(case, path, splits, steps=10, active=True, zero=True)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)  # the numbers of the rings are fp32
@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize(("path", "splits"), PATHS)
def test_rings_of_8_bits_hold_what_the_reference_writes_and_are_read_as_that(
    path: str, splits: int, codes: torch.dtype, dtype: torch.dtype
) -> None:
    case = quantised(with_exact_projections(D=12, dtype=dtype), codes)
    check_steps(case, path, splits, steps=7)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize(("path", "splits"), PATHS)
def test_every_option_at_once_with_rings_of_8_bits(
    path: str, splits: int, codes: torch.dtype
) -> None:
    """Heads of six features too, whose codes cannot be loaded four at a time."""
    sizes = {"N": 3, "D": 6, "L": 4, "delay": 3, "kdim": 27, "vdim": 22, "extra_slot": True}
    case = quantised(with_exact_projections(**sizes), codes)
    check_steps(case, path, splits, steps=8, active=True, zero=True)


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1e30])
def test_stored_codes_and_scales_are_those_of_the_reference(
    magnitude: float, codes: torch.dtype
) -> None:
    """Keys and values are the token itself, whose heads are of many kinds."""
    case = quantised(RingCase(N=4, L=2, D=64, bias=False), codes)
    assert case.weights[0] is not None
    case.weights[0].copy_(torch.eye(128).repeat(3, 1))
    expected = case.copied_state()
    x = magnitude * torch.randn(4, 128, device=DEVICE)
    x[1] *= torch.logspace(-9, 0, 128, device=DEVICE)
    x[2, 64:] = 0
    x[3, 1:64] = torch.arange(63, device=DEVICE) / 254 * x[3, 0]  # ties
    step(case, case.state, (x,) * 3, "fused", 1)
    reference.ring_step_(*arguments(case.weights, expected, (x,) * 3))
    for i in (0, 1, 4, 5):
        assert torch.equal(case.state[i][:, :, 0], expected[i][:, :, 0])


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), -float("inf"), 3e38])
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("path", ["fused", "group"])
def test_a_key_or_value_that_is_not_finite_leaves_with_its_slot(
    path: str, which: int, bad: float, codes: torch.dtype
) -> None:
    """An infinite token makes every feature infinite, 3e38 one alone."""
    case = RingCase(N=2, D=12, L=3, bias=False, kdim=24, vdim=24)
    for weight in (case.weights[1], case.weights[2], case.weights[4]):
        assert weight is not None
        weight.copy_(2 * torch.eye(24) + 1e-3)
    quantised(case, codes)
    outs = []
    for t in range(4):
        token = case.token()
        if t == 0:
            token[which][0, 13] = bad
        expected = case.copied_state()
        outs.append(step(case, case.state, token, path, 1))
        reference.ring_step_(*arguments(case.weights, expected, token))
        if t == 0:
            scale, theirs = case.state[3 + which][0, :, 0], expected[3 + which][0, :, 0]
            assert torch.equal(scale.isinf(), theirs.isinf())
            assert torch.equal(scale.isnan(), theirs.isnan())
    for t, out in enumerate(outs):
        assert bool(out[0].isnan().all()) == (t < 3)
        assert out[1].isfinite().all()


@pytest.mark.parametrize(("L", "splits"), [(1, 1), (2, 1), (63, 2), (64, 1), (120, 4)])
@pytest.mark.parametrize("path", ["fused", "group", "gemm"])
def test_window_lengths_around_the_block_size(path: str, L: int, splits: int) -> None:
    case = RingCase(N=2, L=L, bias=False)
    case.warm()
    check_steps(case, path, splits, steps=3)


@pytest.mark.parametrize(("N", "H", "D"), [(1, 1, 8), (1, 3, 20), (1, 1, 256), (17, 1, 8)])
@pytest.mark.parametrize("path", ["fused", "group", "chain"])
def test_numbers_of_streams_heads_and_features(path: str, N: int, H: int, D: int) -> None:
    check_steps(RingCase(N=N, H=H, D=D, L=3, dtype=torch.float32), path, 1, steps=2)


@pytest.mark.parametrize("group", [2, 16])
def test_other_numbers_of_streams_of_a_program(group: int) -> None:
    case = RingCase(N=17, D=12, dtype=DTYPES[-1], delay=1, extra_slot=True).warm()
    state, token = case.copied_state(), case.token()
    plan = plan_of(case, "group", 1)._replace(group=group)
    out = ring_step_(*arguments(case.weights, case.state, token), plan=plan)
    exact = reference.ring_step_(
        *arguments(widened(case.weights), widened(state), widened(list(token)))
    )
    plain = reference.ring_step_(*arguments(case.weights, state, token))
    assert_as_exact_as_torch(out, exact, plain)
    for ours, theirs in zip(case.state, state, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_table_gives_each_number_of_streams_its_path() -> None:
    """Small weights of a head are read by many programs; others only for few streams."""
    paths = [step_plan(N, 256, 8, 64, 2).path for N in (1, 16, 17, 132, 133)]
    assert paths == ["fused", "fused", "group", "group", "gemm"]
    paths = [step_plan(N, 512, 8, 64, 2).path for N in (1, 4, 5, 32, 33)]
    assert paths == ["fused", "fused", "chain", "chain", "gemm"]
    assert step_plan(17, 256, 8, 129, 2).path == "chain"
    assert step_plan(1, 512, 8, 257, 2).path == "chain"
    assert step_plan(17, 256, 8, 1024, 2, "group").splits == 1
    paths = [step_plan(N, 256, 8, 64, 4).path for N in (1, 16, 17)]
    assert paths == ["fused", "fused", "gemm"]
    paths = [step_plan(N, 512, 8, 64, 4).path for N in (1, 4, 5)]
    assert paths == ["fused", "fused", "gemm"]


@pytest.mark.parametrize(("path", "splits"), PATHS)
def test_a_step_writes_one_slot_of_each_ring_and_nothing_else(path: str, splits: int) -> None:
    """With small integers every projection is exact, so the rings are compared bit for bit."""
    case = RingCase(integers=True, delay=2, dtype=torch.bfloat16)
    expected = case.copied_state()
    for _ in range(7):
        token = case.token()
        step(case, case.state, token, path, splits)
        reference.ring_step_(*token, *case.weights, *expected, None, False, 0.0, True)
        for ring, reference_ring in zip(case.state, expected, strict=True):
            assert torch.equal(ring.nan_to_num(77), reference_ring.nan_to_num(77))


@pytest.mark.parametrize("codes", [None, torch.int8], ids=str)
@pytest.mark.parametrize(("path", "splits"), PATHS)
def test_without_update_the_output_is_the_same_and_the_state_too(
    path: str, splits: int, codes: torch.dtype | None
) -> None:
    case = quantised(RingCase(delay=2).warm(), codes)
    token, before = case.token(), case.copied_state()
    preview = step(case, case.state, token, path, splits, update=False)
    assert all(torch.equal(x, y) for x, y in zip(case.state, before, strict=True))
    assert torch.equal(preview, step(case, case.state, token, path, splits))


@pytest.mark.parametrize(("path", "splits"), PATHS)
def test_two_runs_agree_bit_for_bit_and_leave_the_counters_at_zero(path: str, splits: int) -> None:
    case = RingCase(L=9).warm()
    token, state = case.token(), case.copied_state()
    first = step(case, case.state, token, path, splits)
    assert torch.equal(first, step(case, state, token, path, splits))
    assert not counters(first, case.N * case.H).any()


@pytest.mark.parametrize("codes", [None, torch.uint8], ids=str)
@pytest.mark.parametrize(("path", "splits"), PATHS)
def test_a_stream_does_not_see_its_neighbours(
    path: str, splits: int, codes: torch.dtype | None
) -> None:
    case = quantised(RingCase(N=3).warm(), codes)
    token, state = case.token(), case.copied_state()
    out = step(case, case.state, token, path, splits)
    poisoned = token[0].clone()
    poisoned[[0, 2]] = float("nan")
    bad = (float("inf"), float("nan")) if codes is None else (126, 127)
    state[0][[0, 2]], state[1][[0, 2]], state[3][0] = *bad, 0
    for scale in state[4:]:
        scale[[0, 2]] = float("nan")
    other = step(case, state, (poisoned,) * 3, path, splits)
    assert torch.equal(out[1], other[1])
    assert torch.equal(case.state[0][1], state[0][1])


@pytest.mark.parametrize("position", [2**31 - 1, 2**31 + 4, 2**63 - 2**48])
def test_positions_of_a_long_life(position: int) -> None:
    case = RingCase(delay=2).warm()
    case.state[3].fill_(position)
    check_steps(case, "fused", 1, steps=2)


def test_inputs_of_any_stride() -> None:
    case = RingCase().warm()
    token, state = case.token()[0], case.copied_state()
    strided = torch.empty(case.H * case.D, 7, case.N, device=DEVICE)[:, 3].T.copy_(token)
    out = step(case, case.state, (token,) * 3, "fused", 1)
    assert torch.equal(out, step(case, state, (strided,) * 3, "fused", 1))


@pytest.mark.parametrize("codes", [None, torch.int8], ids=str)
@pytest.mark.parametrize(("path", "splits"), [("fused", 1), ("group", 1), ("gemm", 2)])
def test_dropout_zeroes_weights_at_its_rate_and_rescales_the_others(
    path: str, splits: int, codes: torch.dtype | None
) -> None:
    """Equal scores and one-hot values make the output the attention weights themselves."""
    N, H, L, p = 2, 2, 64, 0.25
    case = RingCase(N=N, H=H, D=L, L=L, bias=False)
    E = H * L
    weight, out_weight = case.weights[0], case.weights[4]
    assert weight is not None
    assert out_weight is not None
    weight.zero_()
    out_weight.copy_(torch.eye(E))
    case.state[0].zero_()
    case.state[1].copy_(torch.eye(L).expand(N, H, L, L))
    case.state[3].fill_(2 * L)
    quantised(case, codes)
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(step(case, case.copied_state(), case.token(), path, splits, dropout_p=p))
    attn = outs[0].view(N, H, L)[:, :, 1:].flatten()  # slot 0 holds the new token, whose value is 0
    kept = attn != 0
    torch.testing.assert_close(attn[kept], torch.full_like(attn[kept], 1 / (L * (1 - p))))
    deviation = math.sqrt(attn.numel() * p * (1 - p))
    assert abs(kept.sum().item() - attn.numel() * (1 - p)) < 4 * deviation
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0][0], outs[0][1])


def test_an_uncovered_call_is_declined_with_the_reason() -> None:
    case = RingCase()
    args = [*case.token(), *case.weights, *case.state, None, False, 0.0, True]
    assert why_not("ring_step_", *args) is None
    args[11] = case.state[0].transpose(2, 3).contiguous().transpose(2, 3)
    assert "contiguous" in (why_not("ring_step_", *args) or "")
    args[11] = case.state[0]
    args[14] = torch.zeros(case.N, 2, dtype=torch.int64, device=DEVICE)[:, 0]
    assert "contiguous" in (why_not("ring_step_", *args) or "")
    args[14] = case.state[3]
    args[11] = args[12] = torch.empty(2, 2, 1 << 28, 8, device="meta")
    assert "2147483648 numbers" in (why_not("ring_step_", *args) or "")
    args = [*case.token(), *case.weights, *(x.half() for x in case.state[:3]), case.state[3]]
    assert "dtype" in (why_not("ring_step_", *args, None, False, 0.0, True) or "")
    state = quantised(case, torch.int8).state
    args = arguments(case.weights, state, case.token())
    assert why_not("ring_step_", *args) is None
    assert "dtype" in (why_not("ring_step_", *args[:19]) or "")
    args[11] = torch.empty(state[0].numel() + 1, dtype=torch.int8)[1:].view_as(state[0])
    assert "multiple of 4" in (why_not("ring_step_", *args) or "")
    args[11] = state[0].to(torch.int16)
    assert "torch.int16" in (why_not("ring_step_", *args) or "")


@pytest.mark.usefixtures("products_by_row")
def test_batch_invariant_step_gives_a_stream_the_same_bits_alone_and_among_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The shape is one whose window the table cuts into more parts for one stream alone."""
    monkeypatch.setattr(plan, "INVARIANT_TOKENS", 16)  # so that few streams are two blocks
    case = RingCase(N=17, H=4, D=4, L=600, delay=1).warm()
    table = [step_plan(N, 16, case.H, case.L, case.dtype.itemsize).splits for N in (1, case.N)]
    assert table == [4, 2]
    alone = [x[16:].clone() for x in case.state]
    for _ in range(2):
        token = case.random(17, 16)
        together, single = (
            ring_step_(*[x] * 3, *case.weights, *state, None, False, 0.0, True, None, None, True)
            for x, state in ((token, case.state), (token[16:], alone))
        )
        assert torch.equal(together[16:], single)
        assert all(torch.equal(a[16:], b) for a, b in zip(case.state, alone, strict=True))
