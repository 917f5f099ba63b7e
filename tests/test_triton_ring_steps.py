"""The many-token pass of the Triton backend against the reference, and against single steps."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import assert_as_exact_as_torch
from triton_cases import (
    DEVICE,
    DTYPES,
    RingCase,
    needs_kernels,
    widened,
)

from continual_mha import reference
from continual_mha.quantized import QuantizedRing
from continual_mha.triton_kernels import ring_step_, ring_steps_, why_not

pytestmark = needs_kernels

CODES = [torch.int8, torch.uint8]


def quantised(case: RingCase, codes: torch.dtype) -> list[torch.Tensor]:
    """The case's state with rings of 8 bits, and their scales: NaN where nothing was written."""
    empty = QuantizedRing(torch.zeros(1, 1, dtype=codes, device=DEVICE), case.state[0])
    rings = [empty.holding(ring) for ring in case.state[:2]]
    return [*(ring.codes for ring in rings), *case.state[2:], *(ring.scale for ring in rings)]


def with_scales(clip: tuple, case: RingCase, state: list, *rest: object) -> list:
    """Arguments of the operator for a state of `quantised`."""
    return [*clip, *case.weights, *state[:4], *rest, *state[4:]]


def check_codes(case: RingCase, state: list, T: int, first: int, zero: bool = False) -> None:
    """One clip over rings of 8 bits, which must hold the reference's bits afterwards."""
    clip, torch_state = case.clip(T), [x.clone() for x in state]
    rest = [first, zero, 0.0, True]
    exact_args = widened(with_scales(clip, case, torch_state, *rest))
    exact_args[-2:] = [x.cpu().clone() for x in torch_state[4:]]  # fp32 in every precision
    exact = reference.ring_steps_(*exact_args)
    plain = reference.ring_steps_(*with_scales(clip, case, torch_state, *rest))
    out = ring_steps_(*with_scales(clip, case, state, *rest))
    assert_as_exact_as_torch(out, exact, plain)
    for mine, theirs in zip(state, torch_state, strict=True):
        assert torch.equal(mine.nan_to_num(77), theirs.nan_to_num(77))


def check_clip(case: RingCase, T: int, first: int, zero: bool = False) -> None:
    """One clip through kernel, PyTorch and float64; the rings must agree as the outputs do."""
    clip, state, torch_state = list(case.clip(T)), case.state, case.copied_state()
    exact_state = widened(torch_state)
    rest = [first, zero, 0.0, True]
    out = ring_steps_(*clip, *case.weights, *state, *rest)
    plain = reference.ring_steps_(*clip, *case.weights, *torch_state, *rest)
    exact = reference.ring_steps_(*widened(clip), *widened(case.weights), *exact_state, *rest)
    assert out.shape == exact.shape
    assert_as_exact_as_torch(out, exact, plain)
    for ring, best in zip(state, exact_state, strict=True):
        torch.testing.assert_close(
            ring.cpu().double(), best.double(), equal_nan=True, atol=0.05, rtol=0.05
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clips_equal_sliding_window_attention_from_cold_to_wrapped(dtype: torch.dtype) -> None:
    case = RingCase(L=6, dtype=dtype)
    for T, first in ((4, 0), (3, 1), (20, 3)):
        check_clip(case, T, first)


@pytest.mark.parametrize("T", [1, 2, 9])
def test_every_option_at_once(T: int) -> None:
    case = RingCase(N=3, D=12, L=4, delay=3, kdim=27, vdim=22, extra_slot=True)
    case.state[3].copy_(torch.arange(3))
    for ring in case.state[:2]:
        ring.copy_(case.random(*ring.shape))
    check_clip(case, T, 0, zero=True)
    check_clip(case, T, T - 1, zero=True)


@pytest.mark.parametrize(("L", "T"), [(1, 3), (33, 40), (120, 5), (70, 150)])
def test_windows_and_clips_around_the_block_sizes(L: int, T: int) -> None:
    case = RingCase(N=1, L=L, D=20, bias=False).warm()
    check_clip(case, T, 0)


def test_a_clip_equals_its_tokens_one_by_one_and_leaves_the_same_state() -> None:
    case = RingCase(L=5, delay=2, integers=True, dtype=torch.float32)
    state = case.copied_state()
    for _ in range(2):
        clip = case.clip(4)
        outs = ring_steps_(*clip, *case.weights, *case.state, 0, False, 0.0, True)
        for t in range(4):
            token = (clip[0][:, t],) * 3
            out = ring_step_(*token, *case.weights, *state, None, False, 0.0, True)
            torch.testing.assert_close(outs[:, t], out)
    for ring, other in zip(case.state, state, strict=True):
        assert torch.equal(ring.nan_to_num(77), other.nan_to_num(77))


def test_without_update_the_state_stays_as_it_was() -> None:
    case = RingCase(delay=2).warm()
    before = case.copied_state()
    ring_steps_(*case.clip(7), *case.weights, *case.state, 0, False, 0.0, False)
    assert all(torch.equal(x, y) for x, y in zip(case.state, before, strict=True))


def test_no_tokens_and_no_outputs_are_no_errors() -> None:
    case = RingCase().warm()
    before = case.copied_state()
    out = ring_steps_(*case.clip(0), *case.weights, *case.state, 0, False, 0.0, True)
    assert out.shape == (case.N, 0, case.H * case.D)
    assert all(torch.equal(x, y) for x, y in zip(case.state, before, strict=True))
    out = ring_steps_(*case.clip(3), *case.weights, *case.state, 3, False, 0.0, True)
    assert out.shape == (case.N, 0, case.H * case.D)
    assert torch.equal(case.state[3], before[3] + 3)


def test_positions_of_a_long_life() -> None:
    case = RingCase(delay=2).warm()
    case.state[3].fill_(2**63 - 2**48)
    check_clip(case, 7, 0)


def test_a_stream_does_not_see_its_neighbours() -> None:
    case = RingCase(N=3).warm()
    clip, state = case.clip(6)[0], case.copied_state()
    out = ring_steps_(clip, clip, clip, *case.weights, *case.state, 0, False, 0.0, True)
    poisoned = clip.clone()
    poisoned[[0, 2]] = float("nan")
    state[0][[0, 2]], state[1][[0, 2]], state[3][0] = float("inf"), float("nan"), 0
    other = ring_steps_(poisoned, poisoned, poisoned, *case.weights, *state, 0, False, 0.0, True)
    assert torch.equal(out[1], other[1])


def test_dropout_zeroes_weights_at_its_rate_and_rescales_the_others() -> None:
    """Equal scores and one-hot values make the outputs the attention weights themselves."""
    N, H, L, T, p = 1, 2, 32, 8, 0.25
    case = RingCase(N=N, H=H, D=L, L=L, bias=False)
    weight, out_weight = case.weights[0], case.weights[4]
    assert weight is not None
    assert out_weight is not None
    weight.zero_()
    out_weight.copy_(torch.eye(H * L))
    case.state[0].zero_()
    case.state[1].copy_(torch.eye(L).expand(N, H, L, L))
    case.state[3].fill_(2 * L)
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        state = case.copied_state()
        outs.append(ring_steps_(*case.clip(T), *case.weights, *state, 0, False, p, True))
    attn = outs[0].view(T, H, L)[:, :, T:].flatten()  # the clip's own values are zero
    kept = attn != 0
    torch.testing.assert_close(attn[kept], torch.full_like(attn[kept], 1 / (L * (1 - p))))
    deviation = math.sqrt(attn.numel() * p * (1 - p))
    assert abs(kept.sum().item() - attn.numel() * (1 - p)) < 4 * deviation
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_an_uncovered_call_is_declined_with_the_reason() -> None:
    case = RingCase()
    args = [*case.clip(2), *case.weights, *case.state, 0, False, 0.0, True]
    assert why_not("ring_steps_", *args) is None
    args[14] = torch.zeros(case.N, 2, dtype=torch.int64, device=DEVICE)[:, 0]
    assert "contiguous" in (why_not("ring_steps_", *args) or "")
    args[0] = torch.zeros(2, 2, 16, dtype=torch.complex64, device=DEVICE)
    assert "complex64" in (why_not("ring_steps_", *args) or "")
    assert "no kernel" in (why_not("no_such_operator", *args) or "")


@pytest.mark.usefixtures("products_by_row")
def test_batch_invariant_tokens_give_a_stream_the_same_bits_alone_and_among_others() -> None:
    case = RingCase(N=7, H=1, D=16, L=5, delay=1).warm()
    alone = [x[6:].clone() for x in case.state]
    clip = case.random(7, 11, 16)  # 77 tokens in all: two blocks
    together, single = (
        ring_steps_(*[x] * 3, *case.weights, *state, 0, False, 0.0, True, None, None, True)
        for x, state in ((clip, case.state), (clip[6:], alone))
    )
    assert torch.equal(together[6:], single)
    assert all(torch.equal(a[6:], b) for a, b in zip(case.state, alone, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)  # the numbers of the rings are fp32
@pytest.mark.parametrize("codes", CODES, ids=str)
def test_rings_of_8_bits_hold_the_references_bits_and_are_read_as_those(
    codes: torch.dtype, dtype: torch.dtype
) -> None:
    case = RingCase(L=6, D=12, dtype=dtype)
    state = quantised(case, codes)
    for T, first in ((4, 0), (3, 1), (20, 3)):
        check_codes(case, state, T, first)


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize(("T", "L"), [(1, 4), (9, 4), (5, 70)])
def test_every_option_at_once_over_rings_of_8_bits(T: int, L: int, codes: torch.dtype) -> None:
    case = RingCase(N=3, D=12, L=L, delay=3, kdim=27, vdim=22, extra_slot=True)
    for ring in case.state[:2]:
        ring.copy_(case.random(*ring.shape))
    case.state[3].copy_(torch.arange(3) * 40)
    state = quantised(case, codes)
    check_codes(case, state, T, 0, zero=True)
    before = [x.clone() for x in state]
    ring_steps_(*with_scales(case.clip(T), case, state, 0, True, 0.0, False))
    assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))


def test_small_scales_do_not_make_weights_underflow() -> None:
    case = RingCase(N=1, L=40, dtype=torch.float16, bias=False).warm()
    weight = case.weights[0]
    assert weight is not None
    weight[2 * case.H * case.D :] /= 2048  # of the clip's values, as those of the ring
    case.state[1] /= 2048
    check_codes(case, quantised(case, torch.int8), 3, 0)


@pytest.mark.parametrize("codes", [None, *CODES], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["clip", "clip's values", "ring's values"])
def test_a_token_that_is_not_finite_reaches_those_alone_who_see_it(
    where: str, bad: float, codes: torch.dtype | None
) -> None:
    case = RingCase(N=2, L=4, bias=False).warm()
    clip, outs = [case.random(2, 37, case.H * case.D)] * 3, []
    for spoilt in (False, True):
        if spoilt and where == "ring's values":  # of the token before the last
            case.state[1][0, 1, (case.state[3][0] - 2) % case.L, 3] = bad
        elif spoilt:
            clip[2] = clip[2].clone()
            clip[2][0, 30, 1] = bad  # in the first block of queries and seen from the next
            clip[:2] = [clip[2]] * 2 if where == "clip" else clip[:2]
        state = case.state if codes is None else quantised(case, codes)
        outs.append(ring_steps_(*with_scales(tuple(clip), case, state, 0, False, 0.0, False)))
    seen = torch.zeros(2, 37, dtype=torch.bool, device=DEVICE)
    seen[0, slice(0, 2) if where == "ring's values" else slice(30, 34)] = True
    assert not outs[1][seen].isfinite().any()
    torch.testing.assert_close(outs[1][~seen], outs[0][~seen])


def test_dropout_over_rings_of_8_bits_drops_what_it_drops_elsewhere() -> None:
    case = RingCase(L=5, delay=1).warm()
    clip, state = case.clip(7), quantised(case, torch.int8)
    outs = []
    for rings in (state, [QuantizedRing(state[i], state[i + 4]).to(case.dtype) for i in (0, 1)]):
        torch.manual_seed(5)
        args = with_scales(clip, case, [x.clone() for x in state], 0, False, 0.5, False)
        if rings is not state:
            args[11:13], args[19:] = rings, []
        outs.append(ring_steps_(*args))
    torch.testing.assert_close(outs[0], outs[1], rtol=0.05, atol=0.02)


def test_rings_of_8_bits_are_declined_with_the_reason() -> None:
    case = RingCase()
    args = with_scales(case.clip(2), case, quantised(case, torch.int8), 0, False, 0.0, True)
    assert why_not("ring_steps_", *args) is None
    args[11] = args[11].to(torch.int16)
    assert "int16" in (why_not("ring_steps_", *args) or "")
    args[11] = args[12].view(torch.uint8)
    assert "torch.uint8 and torch.int8" in (why_not("ring_steps_", *args) or "")
    args[11] = args[12].transpose(2, 3).contiguous().transpose(2, 3)
    assert "contiguous" in (why_not("ring_steps_", *args) or "")
    args[11] = args[12].repeat(1, 1, 1, 40)
    assert "head_dim" in (why_not("ring_steps_", *args) or "")
