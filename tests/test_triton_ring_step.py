"""The Triton step against the reference: every path, case and dtype, on a GPU or interpreted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import (
    DEVICE,
    DTYPES,
    RingCase,
    assert_as_exact_as_torch,
    needs_kernels,
    widened,
)

from continual_mha import reference
from continual_mha.triton_kernels import plan
from continual_mha.triton_kernels.launch import counters
from continual_mha.triton_kernels.plan import StepPlan, step_plan
from continual_mha.triton_kernels.ring_step import ring_step_, why_not

pytestmark = needs_kernels

PATHS = [("fused", 1), ("fused", 2), ("chain", 1), ("gemm", 3)]


def plan_of(case: RingCase, path: str, splits: int) -> StepPlan:
    E = case.H * case.D
    return step_plan(case.N, E, case.H, case.L, case.dtype.itemsize, path, splits)


def step(
    case: RingCase, state: list[Tensor], token: Any, path: str, splits: int, **kw: Any
) -> Tensor:
    rest = [kw.get("active"), kw.get("add_zero_attn", False), kw.get("dropout_p", 0.0)]
    args = [*token, *case.weights, *state, *rest, kw.get("update", True)]
    return ring_step_(*args, plan=plan_of(case, path, splits))


def check_steps(
    case: RingCase, path: str, splits: int, steps: int, active: bool = False, zero: bool = False
) -> None:
    """Kernel, PyTorch and float64 side by side; each keeps a state of its own."""
    state, torch_state = case.state, case.copied_state()
    exact_state = widened(torch_state)
    weights = widened(case.weights)
    for _ in range(steps):
        token = case.token()
        mask = torch.rand(case.N, device=DEVICE) < 0.7 if active else None
        out = step(case, state, token, path, splits, active=mask, add_zero_attn=zero)
        plain = reference.ring_step_(*token, *case.weights, *torch_state, mask, zero, 0.0, True)
        on_cpu = None if mask is None else mask.cpu()
        exact = reference.ring_step_(
            *widened(list(token)), *weights, *exact_state, on_cpu, zero, 0.0, True
        )
        assert_as_exact_as_torch(out, plain, exact)
        assert torch.equal(state[3].cpu(), exact_state[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("path", "splits"), PATHS)
def test_output_equals_sliding_window_attention_after_wraparound(
    path: str, splits: int, dtype: torch.dtype
) -> None:
    check_steps(RingCase(dtype=dtype), path, splits, steps=12)


@pytest.mark.parametrize(("path", "splits"), PATHS)
def test_every_option_at_once(path: str, splits: int) -> None:
    case = RingCase(N=3, D=12, L=4, delay=3, kdim=27, vdim=22, extra_slot=True)
    check_steps(case, path, splits, steps=10, active=True, zero=True)


@pytest.mark.parametrize(("L", "splits"), [(1, 1), (2, 1), (63, 2), (64, 1), (120, 4)])
@pytest.mark.parametrize("path", ["fused", "gemm"])
def test_window_lengths_around_the_block_size(path: str, L: int, splits: int) -> None:
    case = RingCase(N=2, L=L, bias=False)
    case.warm()
    check_steps(case, path, splits, steps=3)


@pytest.mark.parametrize(("N", "H", "D"), [(1, 1, 8), (1, 3, 20), (1, 1, 256), (17, 1, 8)])
@pytest.mark.parametrize("path", ["fused", "chain"])
def test_numbers_of_streams_heads_and_features(path: str, N: int, H: int, D: int) -> None:
    check_steps(RingCase(N=N, H=H, D=D, L=3, dtype=torch.float32), path, 1, steps=2)


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


@pytest.mark.parametrize(("path", "splits"), PATHS)
def test_without_update_the_output_is_the_same_and_the_state_too(path: str, splits: int) -> None:
    case = RingCase(delay=2).warm()
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


@pytest.mark.parametrize(("path", "splits"), PATHS)
def test_a_stream_does_not_see_its_neighbours(path: str, splits: int) -> None:
    case = RingCase(N=3).warm()
    token, state = case.token(), case.copied_state()
    out = step(case, case.state, token, path, splits)
    poisoned = token[0].clone()
    poisoned[[0, 2]] = float("nan")
    state[0][[0, 2]], state[1][[0, 2]], state[3][0] = float("inf"), float("nan"), 0
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


@pytest.mark.parametrize(("path", "splits"), [("fused", 1), ("gemm", 2)])
def test_dropout_zeroes_weights_at_its_rate_and_rescales_the_others(path: str, splits: int) -> None:
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
    args = [*case.token(), *case.weights, *(x.half() for x in case.state[:3]), case.state[3]]
    assert "dtype" in (why_not("ring_step_", *args, None, False, 0.0, True) or "")


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
