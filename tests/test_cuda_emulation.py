"""The CUDA kernels' index arithmetic, masks, pipelines and merges, executed on the host.

``tests/cuda_emulation`` runs every CUDA thread as a fiber and switches between them at barriers and
shuffles in an order drawn from a seed. This shows wrong addresses, masks and merges, copies that
are read before they are waited for, and results that depend on the order of threads or blocks. It
says nothing about speed or about what the hardware's memory model allows beyond that.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from cuda_emulation import build

from continual_mha import _native

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def emulator() -> ctypes.CDLL:
    return ctypes.CDLL(str(build("emulate")))


@dataclass(frozen=True)
class Case:
    """Shape, options and launch configuration of one step."""

    N: int = 1
    E: int = 16
    H: int = 2
    L: int = 5
    dtype: torch.dtype = torch.float32
    delay: int = 0
    kdim: int | None = None
    vdim: int | None = None
    bias: bool = True
    bias_kv: bool = False
    add_zero_attn: bool = False
    active: bool = False
    update: bool = True
    strided: bool = False
    projected: bool = False
    # launch configuration
    streams: int = 1
    head_groups: int = 1
    splits: int = 1
    cluster: bool = False


@dataclass
class Step:
    """The operator's tensor arguments."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    weights: list[torch.Tensor]  # q, k, v: (E, size)
    in_bias: torch.Tensor | None
    out_weight: torch.Tensor
    out_bias: torch.Tensor | None
    bias_k: torch.Tensor | None
    bias_v: torch.Tensor | None
    k_ring: torch.Tensor
    v_ring: torch.Tensor
    q_ring: torch.Tensor
    position: torch.Tensor
    active: torch.Tensor | None


def make_step(case: Case, positions: list[int], seed: int = 0) -> Step:
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=gen) * scale).to(case.dtype)

    N, E, L = case.N, case.E, case.L
    sizes = [E, case.kdim or E, case.vdim or E]
    if case.strided:
        inputs = [draw(size, 2 * N)[:, ::2].t() for size in sizes]
    elif case.kdim or case.vdim:
        inputs = [draw(N, size) for size in sizes]
    else:
        inputs = [draw(N, E)] * 3
    slots = case.delay + 1 if case.delay else 0
    step = Step(
        *inputs,
        weights=[draw(E, size, scale=size**-0.5) for size in sizes],
        in_bias=draw(3 * E) if case.bias else None,
        out_weight=draw(E, E, scale=E**-0.5),
        out_bias=draw(E) if case.bias else None,
        bias_k=draw(E) if case.bias_kv else None,
        bias_v=draw(E) if case.bias_kv else None,
        k_ring=draw(N, case.H, L, E // case.H),
        v_ring=draw(N, case.H, L, E // case.H),
        q_ring=draw(N, slots, E),
        position=torch.tensor(positions),
        active=torch.arange(N) % 2 == 0 if case.active else None,
    )
    # Slots without a token may hold anything.
    for n, position in enumerate(positions):
        step.k_ring[n, :, min(position, L) :] = torch.nan
        step.v_ring[n, :, min(position, L) :] = torch.nan
    return step


def in_projected(case: Case, step: Step) -> list[torch.Tensor]:
    """q, k, v of the new token in float64, rounded as they are stored."""
    biases = step.in_bias.double().chunk(3) if step.in_bias is not None else (None,) * 3
    rows = [
        torch.nn.functional.linear(x.double(), w.double(), b)
        for x, w, b in zip((step.query, step.key, step.value), step.weights, biases, strict=True)
    ]
    stored = [case.delay > 0 or case.projected, True, True]
    return [r.to(case.dtype) if s else r for r, s in zip(rows, stored, strict=True)]


def reference(case: Case, step: Step) -> tuple[torch.Tensor, Step]:
    """Output in float64 and the state after the step."""
    N, E, H, L = case.N, case.E, case.H, case.L
    q, k, v = in_projected(case, step)
    after = replace(step)
    after.k_ring, after.v_ring = step.k_ring.clone(), step.v_ring.clone()
    after.q_ring, after.position = step.q_ring.clone(), step.position.clone()
    outputs = []
    for n in range(N):
        position = int(step.position[n])
        after.k_ring[n, :, position % L] = k[n].view(H, -1)
        after.v_ring[n, :, position % L] = v[n].view(H, -1)
        query = q[n].double()
        if case.delay:
            slots = case.delay + 1
            after.q_ring[n, position % slots] = q[n]
            query = step.q_ring[n, (position + 1) % slots].double()
        rows = min(position + 1, L)
        keys = [after.k_ring[n, :, :rows].double()]
        values = [after.v_ring[n, :, :rows].double()]
        if step.bias_k is not None and step.bias_v is not None:
            keys.append(step.bias_k.double().view(H, 1, -1))
            values.append(step.bias_v.double().view(H, 1, -1))
        if case.add_zero_attn:
            keys.append(torch.zeros(H, 1, E // H, dtype=torch.float64))
            values.append(torch.zeros(H, 1, E // H, dtype=torch.float64))
        scores = torch.cat(keys, 1) @ query.view(H, -1, 1) / (E // H) ** 0.5
        heads = (scores.softmax(1).mT @ torch.cat(values, 1)).reshape(E)
        if not case.projected:
            bias = step.out_bias.double() if step.out_bias is not None else 0
            heads = step.out_weight.double() @ heads + bias
        outputs.append(heads)
        if step.active is None or step.active[n]:
            after.position[n] += 1
    if not case.update:
        after = step
    return torch.stack(outputs), after


def integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*map(int, values))


class Device:
    """Runs the kernels that functions of ``emulate.cpp`` launch: on the host, ordered by a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def addresses(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        """Where they are; their memory alone may the kernels then read 16 bytes at a time."""
        library = emulator()
        library.forget_memory()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            library.declare_memory(
                ctypes.c_void_p(storage.data_ptr()), ctypes.c_int64(storage.nbytes())
            )
        return [tensor.data_ptr() for tensor in tensors]

    def call(
        self, name: str, tensors: Sequence[torch.Tensor | None], *numbers: Sequence[int]
    ) -> None:
        """The function of that name, of pointers and of lists of integers; the seed comes last."""
        there = [i for i, t in enumerate(tensors) if t is not None]
        pointers = (ctypes.c_void_p * len(tensors))()
        addresses = self.addresses([t for t in tensors if t is not None])
        for i, address in zip(there, addresses, strict=True):
            pointers[i] = address if tensors[i].numel() else None  # type: ignore[union-attr]
        *others, last = numbers
        getattr(emulator(), name)(pointers, *map(integers, others), integers([*last, self.seed]))


def run_step(case: Case, step: Step, device: Device) -> tuple[torch.Tensor, Step]:
    """Output and the state after the step, by the CUDA kernel."""
    state = replace(
        step,
        k_ring=step.k_ring.clone(),
        v_ring=step.v_ring.clone(),
        q_ring=step.q_ring.clone(),
        position=step.position.clone(),
    )
    N, E, H = case.N, case.E, case.H
    teams = -(-N // case.streams)
    pairs = case.streams * (H // case.head_groups)
    blocks = teams * case.head_groups * case.splits
    output = torch.full((N, E), torch.nan, dtype=case.dtype)
    partial = torch.full((blocks * pairs * (E // H + 2),), torch.nan)
    partial_output = torch.full((teams * case.head_groups * case.streams * E,), torch.nan)
    done = torch.zeros(teams * (case.head_groups + 1), dtype=torch.int32)
    # The in-projection's bias is one tensor even where the weights are three.
    projected = in_projected(case, step) if case.projected else [None] * 3
    projected = [None if t is None else t.to(case.dtype).contiguous() for t in projected]
    tensors = [
        *(state.query, state.key, state.value, *state.weights, state.in_bias),
        *(state.out_weight, state.out_bias, state.bias_k, state.bias_v),
        *(state.k_ring, state.v_ring, state.q_ring, state.position, state.active, None, None),
        *(output, partial, partial_output, done, *projected),
    ]
    strides = [s for t in (state.query, state.key, state.value) for s in t.stride()]
    sizes = [N, E, H, case.L, state.q_ring.shape[1], state.key.shape[1], state.value.shape[1]]
    sizes += [DTYPES.index(case.dtype), case.streams, case.head_groups, case.splits, case.cluster]
    sizes += [case.add_zero_attn, case.update]
    device.call("ring_step", tensors, strides, sizes)
    assert not done.any(), "a counter did not reset itself"
    return output, state


DEVICES = Device(seed=1), Device(seed=2)


def check(case: Case, positions: list[int], devices: Sequence[Device] = DEVICES) -> None:
    step = make_step(case, positions)
    expected, after = reference(case, step)
    output, state = run_step(case, step, devices[0])
    # Rounding of the output, and of q, k, v to the stored type where rings and projections differ.
    rounding = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[case.dtype]
    torch.testing.assert_close(output.double(), expected, rtol=rounding, atol=rounding)
    torch.testing.assert_close(
        state.k_ring, after.k_ring, rtol=rounding, atol=rounding, equal_nan=True
    )
    torch.testing.assert_close(
        state.v_ring, after.v_ring, rtol=rounding, atol=rounding, equal_nan=True
    )
    torch.testing.assert_close(state.q_ring, after.q_ring, rtol=rounding, atol=rounding)
    assert torch.equal(state.position, after.position)
    for device in devices[1:]:
        again, _ = run_step(case, step, device)
        assert torch.equal(output, again), "the result depends on the order of threads or blocks"


LAUNCHES = {
    "one_block": {},
    "one_block_four_streams": {"streams": 4},
    "counter_heads": {"head_groups": 2},
    "counter_splits": {"splits": 3},
    "counter_heads_splits_four_streams": {"head_groups": 2, "splits": 2, "streams": 4},
    "cluster_heads": {"head_groups": 2, "cluster": True},
    "cluster_splits": {"splits": 3, "cluster": True},
    "cluster_heads_splits_four_streams": {
        "head_groups": 2,
        "splits": 2,
        "streams": 4,
        "cluster": True,
    },
}
POSITIONS = [0, 3, 4, 5, 13]


@pytest.mark.parametrize("launch", LAUNCHES)
def test_step_equals_float64_reference_cold_and_warm(launch: str) -> None:
    check(Case(N=5, **LAUNCHES[launch]), POSITIONS)


OPTIONS = {
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "delay": {"delay": 2},
    "bias_kv": {"bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv_zero_attn_bfloat16": {
        "bias_kv": True,
        "add_zero_attn": True,
        "dtype": torch.bfloat16,
    },
    "no_bias": {"bias": False},
    "active": {"active": True},
    "no_update": {"update": False, "delay": 1},
    "strided_inputs": {"strided": True},
    "own_key_and_value_sizes": {"kdim": 5, "vdim": 24},
}


@pytest.mark.parametrize("launch", ["counter_heads_splits_four_streams", "cluster_splits"])
@pytest.mark.parametrize("option", OPTIONS)
def test_step_options_equal_float64_reference(option: str, launch: str) -> None:
    check(Case(N=5, **OPTIONS[option], **LAUNCHES[launch]), POSITIONS)


# By name.
STEPS = {
    "window_of_one": {"E": 8, "H": 1, "L": 1},
    "rows_of_half_a_pack": {"E": 12, "H": 3, "L": 2},
    "no_multiple_of_a_pack": {"E": 60, "H": 1, "L": 63},
    "odd": {"E": 80, "H": 2, "L": 70, "dtype": torch.bfloat16},
    "longest_rows_of_halves": {"E": 256, "H": 1, "L": 130, "dtype": torch.float16},
    "longest_rows": {"E": 256, "H": 1, "L": 67},
    "more_heads_than_warps": {"E": 320, "H": 20, "L": 9, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("cluster", [False, True], ids=["counter", "cluster"])
def test_step_shapes_equal_float64_reference(name: str, cluster: bool) -> None:
    case = Case(N=2, splits=2, cluster=cluster, **STEPS[name])
    check(case, [case.L - 1, 3 * case.L])


def test_step_of_projected_tokens_equals_float64_reference() -> None:
    for dtype in DTYPES:
        check(Case(N=3, L=9, dtype=dtype, delay=1, bias_kv=True, projected=True), [0, 8, 100])


def test_teams_of_projected_tokens_divide_the_heads() -> None:
    case = Case(N=5, E=48, H=6, L=9, delay=1, active=True, head_groups=3, projected=True)
    check(case, [0, 8, 9, 100, 3])


def test_position_survives_passing_2_to_31() -> None:
    check(Case(N=2, splits=2), [2**31 - 1, 2**40 + 3])


def test_bits_of_a_stream_do_not_depend_on_streams_of_its_team() -> None:
    case = Case(N=4, streams=4, head_groups=2, splits=2, cluster=True)
    step = make_step(case, [3, 9, 4, 20])
    output, _ = run_step(case, step, Device(seed=3))
    for tensor in (step.query, step.k_ring, step.v_ring):
        tensor[1:] = torch.inf
    step.position[1:] = 7
    other, _ = run_step(case, step, Device(seed=3))
    assert torch.equal(output[0], other[0])


# (E, H, L) of the benchmark.
SHAPES = [(512, 8, 32), (1024, 8, 64), (192, 16, 120), (512, 8, 250), (512, 8, 4096), (768, 12, 64)]


@pytest.mark.parametrize("cluster", [False, True], ids=["counter", "cluster"])
def test_plan_fits_every_gpu_and_covers_all_heads(cluster: bool) -> None:
    limit = (227 if cluster else 99) * 1024  # of one block, from sm_90 on and on sm_86
    for (E, H, L), streams, wanted in itertools.product(SHAPES, (1, 4), (0, 1, 8, 13, 132)):
        plan = (ctypes.c_int64 * 3)()
        emulator().plan_step(integers([E, H, L, 2, streams, wanted, 16, cluster]), plan)
        groups, splits, shared = plan
        assert H % groups == 0
        assert 1 <= groups * splits <= max(1, min(wanted, 16))
        assert not cluster or (groups * splits).bit_count() == 1
        assert shared <= (limit if streams == 1 or groups > 1 else 227 * 1024)
        if wanted >= 16:
            assert groups * splits > 16 // 3, "most of the blocks that a team may have are idle"


@dataclass(frozen=True)
class SharedCase:
    """Shape and options of single-query attention over a tile that all heads share."""

    N: int = 2
    H: int = 3
    S: int = 9
    Ek: int = 16
    Ev: int = 24
    dtype: torch.dtype = torch.float32
    mask: bool = False
    sink: bool = False
    one_tensor: bool = False


SHARED_CASES = {
    "plain": SharedCase(),
    "mask_and_sink": SharedCase(mask=True, sink=True),
    "bfloat16": SharedCase(dtype=torch.bfloat16, mask=True, sink=True),
    "float16": SharedCase(dtype=torch.float16, S=33),
    "two_head_tiles": SharedCase(H=11, S=5),
    "one_row_unaligned": SharedCase(S=1, Ek=7, Ev=3),
    "unaligned": SharedCase(S=70, Ek=21, Ev=44, dtype=torch.bfloat16),
    "wide": SharedCase(N=1, H=2, S=5, Ek=300, Ev=2056),
    "one_tensor": SharedCase(Ev=16, one_tensor=True),
    "one_tensor_mask_and_sink": SharedCase(
        S=33, Ek=24, Ev=24, dtype=torch.bfloat16, mask=True, sink=True, one_tensor=True
    ),
    "one_tensor_two_head_tiles": SharedCase(
        H=11, S=5, Ek=21, Ev=21, dtype=torch.float16, mask=True, one_tensor=True
    ),
    "one_tensor_of_one_row": SharedCase(N=3, S=1, Ek=7, Ev=7, sink=True, one_tensor=True),
    "one_tensor_wide": SharedCase(N=1, H=2, S=3, Ek=2056, Ev=2056, one_tensor=True),
}


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    mask: torch.Tensor | None,
    sink: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    v = k if v is None else v
    scores = q @ k.mT + (mask if mask is not None else 0)
    extra = [] if sink is None else [sink.unsqueeze(-1)]
    lse = torch.cat([scores, *extra], -1).logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp() @ v, lse


def make_shared(case: SharedCase) -> list[torch.Tensor | None]:
    gen = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen).to(case.dtype)

    N, H, S = case.N, case.H, case.S
    query, key = draw(N, H, case.Ek) * case.Ek**-0.5, draw(N, S, case.Ek)
    value, mask, sink = None if case.one_tensor else draw(N, S, case.Ev), None, None
    if case.mask:
        mask = draw(N, H, S)
        mask[0, :, 2] = -torch.inf
        mask[0, 1, 3:] = -torch.inf
    if case.sink:
        sink = draw(N, H)
    return [query, key, value, mask, sink]


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    rounding = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    scale = expected.abs().max().clamp(min=1).item()  # sums of many terms cancel
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=rounding * scale)


@pytest.mark.parametrize("name", SHARED_CASES)
def test_attend_shared_and_its_gradients_equal_float64_reference(name: str) -> None:
    check_shared(SHARED_CASES[name], Device(seed=5))


def check_shared(case: SharedCase, device: Device) -> None:
    inputs = make_shared(case)
    wide = [None if t is None else t.double().requires_grad_() for t in inputs]
    out, lse = attend(*wide)  # type: ignore[arg-type]
    gen = torch.Generator().manual_seed(8)
    grad_out = torch.randn(out.shape, generator=gen).to(case.dtype)
    grad_lse = torch.randn(lse.shape, generator=gen)
    ((out * grad_out.double()).sum() + (lse * grad_lse.double()).sum()).backward()
    gradients = [t.grad for i, t in enumerate(wide) if t is not None and i != 3]

    actual = run_shared(case, inputs, grad_out, grad_lse, device)
    expected = [out.detach(), lse.detach(), *gradients]
    for a, e in zip(actual, expected, strict=True):
        assert e is not None
        close(a, e, case.dtype)


def run_shared(
    case: SharedCase,
    inputs: list[torch.Tensor | None],
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    device: Device,
) -> list[torch.Tensor]:
    """out, lse and the gradients of query, key and, if they are there, of value and sink."""
    N, H, S = case.N, case.H, case.S
    out = torch.full((N, H, case.Ev), torch.nan, dtype=case.dtype)
    lse = torch.full((N, H), torch.nan)
    weights = torch.full((N, -(-H // 8), S, 8), torch.nan)
    tensors = [*inputs, out, lse, weights]
    sizes = [N, H, S, case.Ek, case.Ev, DTYPES.index(case.dtype)]
    device.call("attend_shared", [*tensors, *[None] * 7], [*sizes, 0])
    grads = [None if t is None else torch.full_like(t, torch.nan) for t in inputs[:3]]
    dsink = torch.full((N, H), torch.nan)
    weights.fill_(torch.nan)
    tensors += [grad_out, grad_lse, *grads, dsink, torch.full_like(weights, torch.nan)]
    device.call("attend_shared", tensors, [*sizes, 1])
    return [t for t in (out, lse, *grads, dsink if case.sink else None) if t is not None]


@pytest.mark.parametrize("one_tensor", [False, True])
def test_attend_shared_ignores_what_masked_rows_hold(one_tensor: bool) -> None:
    case = SharedCase(Ev=16, mask=True, one_tensor=one_tensor)
    query, key, value, mask, sink = make_shared(case)
    assert key is not None
    assert mask is not None
    mask[:, :, 4] = -torch.inf
    grad_out, grad_lse = torch.randn(case.N, case.H, case.Ev), torch.randn(case.N, case.H)
    before = run_shared(case, [query, key, value, mask, sink], grad_out, grad_lse, DEVICES[0])
    for tile in (key, value):
        if tile is not None:
            tile[:, 4] = torch.nan
    after = run_shared(case, [query, key, value, mask, sink], grad_out, grad_lse, DEVICES[0])
    for b, a in zip(before, after, strict=True):
        assert torch.equal(a, b)


def test_attend_shared_with_everything_masked_is_nan_as_softmax() -> None:
    case = SharedCase(mask=True)
    query, key, value, mask, sink = make_shared(case)
    assert mask is not None
    mask[1, 2] = -torch.inf
    grads = torch.zeros(case.N, case.H, case.Ev), torch.zeros(case.N, case.H)
    out, lse, *_ = run_shared(case, [query, key, value, mask, sink], *grads, DEVICES[0])
    assert out[1, 2].isnan().all()
    assert lse[1, 2] == -torch.inf
    assert not out[0].isnan().any()
    assert not out[1, :2].isnan().any()


@pytest.mark.parametrize("sizes", [(8, 8), (12, 20), (1024, 513)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_shared_memory_is_counted_before_the_launch_as_it_is_taken(
    sizes: tuple[int, int], itemsize: int
) -> None:
    for backward in (False, True):
        expected = emulator().shared_bytes(*sizes, itemsize, backward)
        assert _native.shared_bytes(list(sizes)[: 1 + backward], itemsize) == expected
