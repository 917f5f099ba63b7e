"""The CUDA operators, host code included, on CPU tensors and an emulated device.

What runs is the library's own code from the operator's arguments to the launch, and the kernels as
in ``test_cuda_emulation.py``; only the CUDA runtime is a stand-in.
"""

from __future__ import annotations

import ctypes
import functools
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_emulation import build

import continual_mha.ops  # noqa: F401  declares the operators
from continual_mha import _native, reference

# It registers its operators where the real library does.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the real library is in use")

OPS = torch.ops.continual_mha
# Multiprocessors, the compute capability that code was compiled for, shared memory of a block.
DEVICES = {
    "sm_80": (108, 80, 163 * 1024),
    "sm_86_small": (16, 86, 99 * 1024),
    "sm_90": (132, 90, 227 * 1024),
    "sm_90_one_multiprocessor": (1, 90, 227 * 1024),
    "sm_90_from_ptx_of_89": (132, 89, 227 * 1024),
}


@functools.cache
def library() -> ctypes.CDLL:
    path = str(build("emulate_host"))
    torch.ops.load_library(path)
    return ctypes.CDLL(path)


def use_device(name: str, fail: bool = False) -> None:
    library().set_device(*DEVICES[name], fail)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    use_device(request.param)
    return str(request.param)


def make_args(
    N: int = 3,
    E: int = 16,
    H: int = 2,
    L: int = 5,
    dtype: torch.dtype = torch.float32,
    delay: int = 0,
    kdim: int | None = None,
    bias: bool = True,
    bias_kv: bool = False,
    active: bool = False,
    add_zero_attn: bool = False,
    update: bool = True,
) -> list[Any]:
    """Arguments of ``ring_step_``, with streams of every age."""
    gen = torch.Generator().manual_seed(1)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=gen) * scale).to(dtype)

    query = draw(N, E)
    key, value = (draw(N, kdim), draw(N, 3)) if kdim else (query, query)
    own = [draw(E, kdim), draw(E, 3)] if kdim else [None, None]
    weights = [draw(E if kdim else 3 * E, E, scale=E**-0.5), *own, draw(3 * E) if bias else None]
    weights += [draw(E, E, scale=E**-0.5), draw(E) if bias else None]
    weights += [draw(1, 1, E), draw(1, 1, E)] if bias_kv else [None, None]
    rings = [draw(N, H, L, E // H), draw(N, H, L, E // H), draw(N, delay + 1 if delay else 0, E)]
    position = torch.arange(N) * (L // 2 + 1)
    paused = (torch.arange(2 * N) % 4 == 0)[::2] if active else None  # with gaps
    return [query, key, value, *weights, *rings, position, paused, add_zero_attn, 0.0, update]


def copied(args: list[Any], dtype: torch.dtype | None = None) -> list[Any]:
    def copy(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(dtype, copy=True) if dtype and x.is_floating_point() else x.clone()

    return [copy(x) for x in args]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "teams_of_four": {"N": 18, "E": 8, "H": 1},
    "by_matrix_products": {"N": 67, "E": 8, "H": 1, "L": 3},
    "by_matrix_products_own_weights": {"N": 65, "E": 8, "H": 2, "L": 2, "kdim": 5, "delay": 1},
    "own_weights_delay_extras": {"kdim": 7, "delay": 2, "bias_kv": True, "add_zero_attn": True},
    "active_no_bias": {"active": True, "bias": False},
    "no_update": {"update": False, "delay": 1},
    "long_window": {"N": 1, "L": 1030, "H": 1, "E": 8},
    "no_streams": {"N": 0},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_ring_step_equals_float64_reference(option: str, device: str) -> None:
    args = make_args(**OPTIONS[option])
    dtype = args[0].dtype
    wide = copied(args, torch.float64)
    expected = reference.ring_step_(*wide)
    actual = OPS.cuda_ring_step_(*args)
    rounding = 1.6e-2 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=rounding)
    for ring, wide_ring in zip(args[11:14], wide[11:14], strict=True):
        torch.testing.assert_close(ring.double(), wide_ring, rtol=rounding, atol=rounding)
    assert torch.equal(args[14], wide[14])


def test_consecutive_steps_share_counters_and_stay_right(device: str) -> None:
    args = make_args(N=2, E=32, H=4, L=130)
    wide = copied(args, torch.float64)
    gen = torch.Generator().manual_seed(2)
    for _ in range(4):
        token = torch.randn(2, 32, generator=gen)
        args[:3], wide[:3] = [token] * 3, [token.double()] * 3
        expected = reference.ring_step_(*wide)
        torch.testing.assert_close(
            OPS.cuda_ring_step_(*args).double(), expected, rtol=2e-6, atol=2e-6
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_do_not_fit_into_one_block_are_divided(dtype: torch.dtype) -> None:
    # The stages of the ring take 64 KiB, so this leaves room for a part of the heads.
    library().set_device(16, 8, 66 * 1024, False)
    args = make_args(N=66, E=96, H=12, L=3, dtype=dtype, delay=1, active=True)
    wide = copied(args, torch.float64)
    expected = reference.ring_step_(*wide)
    rounding = 1.6e-2 if dtype == torch.bfloat16 else 2e-6
    actual = OPS.cuda_ring_step_(*args)
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=rounding)
    assert torch.equal(args[14], wide[14])


def counters_of_a_step(args: list[Any], stream: int = 0, captured: bool = False) -> int:
    library().set_stream(ctypes.c_int64(stream), captured)
    OPS.cuda_ring_step_(*args)
    library().set_stream(ctypes.c_int64(0), False)
    return int(library().last_counters())


def test_steps_that_may_overlap_have_no_counter_in_common() -> None:
    use_device("sm_80")
    reads, writes = make_args(update=False), make_args()
    one, two, per_thread = 16, 32, 2
    on_one, on_two = counters_of_a_step(reads, one), counters_of_a_step(reads, two)
    assert min(on_one, on_two) >= 0
    assert on_one != on_two
    in_graph = counters_of_a_step(writes, one, captured=True)
    assert in_graph >= 0
    assert in_graph not in (on_one, on_two)
    # Two graphs that only read the same rings may run at once: each zeroes its own. So does a step
    # on what is another stream in every thread.
    assert counters_of_a_step(reads, one, captured=True) == -1
    assert counters_of_a_step(writes, per_thread) == -1


def test_counters_are_not_used_up_by_rings_that_come_and_go() -> None:
    use_device("sm_80", fail=True)  # where the kernel is not the question

    def counters_of_a_refused_step(args: list[Any], stream: int) -> int:
        library().set_stream(ctypes.c_int64(stream), False)
        with pytest.raises(RuntimeError, match="failed"):
            OPS.cuda_ring_step_(*args)
        return int(library().last_counters())

    kept = [make_args(N=1) for _ in range(300)]
    assert len({counters_of_a_refused_step(args, 3) for args in kept}) == 1
    # Streams do use them up; a step is right all the same.
    assert [counters_of_a_refused_step(kept[0], stream) for stream in range(4, 304)][-1] == -1
    use_device("sm_80")
    args = make_args()
    expected = reference.ring_step_(*copied(args, torch.float64))
    library().set_stream(ctypes.c_int64(303), False)
    torch.testing.assert_close(OPS.cuda_ring_step_(*args).double(), expected, rtol=2e-6, atol=2e-6)
    library().set_stream(ctypes.c_int64(0), False)


def test_few_streams_take_one_launch_on_every_device(device: str) -> None:
    args = make_args(N=16)
    before = library().count_launches()
    OPS.cuda_ring_step_(*args)
    assert library().count_launches() == before + 1


def test_uncovered_or_wrong_arguments_raise_and_leave_the_state() -> None:
    use_device("sm_90")

    def replaced(index: int, value: Any) -> list[Any]:
        args = make_args()
        args[index] = value
        return args

    bad = {
        "dropout": replaced(17, 0.5),
        "contiguous": replaced(7, torch.zeros(16, 16).t()),
        "in_proj_weight": replaced(3, torch.zeros(48, 8)),
        "active": replaced(15, torch.ones(3)),
        "whole 16 bytes": make_args(E=6, H=2),
        "delay": replaced(13, torch.zeros(3, 1, 16)),
        "dtype": replaced(0, torch.zeros(3, 16, dtype=torch.float64)),
    }
    for reason, args in bad.items():
        before = copied(args)
        with pytest.raises(RuntimeError, match=reason):
            OPS.cuda_ring_step_(*args)
        for ring, old in zip(args[11:15], before[11:15], strict=True):
            assert torch.equal(ring, old)


def test_a_refused_launch_is_an_exception_that_names_operator_and_shape() -> None:
    use_device("sm_90", fail=True)
    with pytest.raises(RuntimeError, match=r"cuda_ring_step_ for query \(3, 16\).*failed"):
        OPS.cuda_ring_step_(*make_args())
    x = torch.zeros(2, 3, 8)
    for value, named in ((x, r"\(2, 3, 8\)"), (None, "None")):
        call = rf"cuda_attend_shared for query \(2, 3, 8\), .* value {named}: .*failed"
        with pytest.raises(RuntimeError, match=call):
            OPS.cuda_attend_shared(x, x, value, None, None)


SHARED_OPTIONS = [
    "",
    "mask",
    "mask sink",
    "broadcast_mask strided",
    "misaligned",
    "mask hidden",
    "out alone",
]
SHARED_OPTIONS += ["one_tensor " + options for options in SHARED_OPTIONS]


@pytest.mark.parametrize("options", SHARED_OPTIONS)
def test_attend_shared_and_gradients_equal_float64_reference(options: str) -> None:
    use_device("sm_90")
    gen = torch.Generator().manual_seed(3)
    N, H, S, Ek = 2, 3, 7, 12
    Ev = Ek if "one_tensor" in options else 9
    query, key = torch.randn(N, H, Ek, generator=gen), torch.randn(N, S, Ek, generator=gen)
    value = None if "one_tensor" in options else torch.randn(N, S, Ev, generator=gen)
    mask, sink = None, None
    if "mask" in options:
        mask = torch.randn(N, H, S, generator=gen)
        mask[0, 1, 2:] = -torch.inf
    if "hidden" in options and mask is not None:
        mask[1, 2] = -torch.inf  # leaves a query nothing
    if "broadcast" in options and mask is not None:
        mask = mask[:1, :1]
    if "sink" in options:
        sink = torch.randn(N, H, generator=gen)
    if "strided" in options:
        key, value = (None if x is None else x.mT.contiguous().mT for x in (key, value))
    wide = [None if x is None else x.double() for x in (query, key, value, mask, sink)]
    expected = reference.attend_shared(*wide)  # type: ignore[arg-type]
    actual = OPS.cuda_attend_shared(query, key, value, mask, sink)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-6, atol=2e-6, equal_nan=True)

    grads = torch.randn(N, H, Ev, generator=gen), torch.randn(N, H, generator=gen)
    if "misaligned" in options:
        grads = torch.cat([grads[0].new_zeros(1), grads[0].flatten()])[1:].view(N, H, Ev), grads[1]
    if "out alone" in options:
        grads = grads[0], None
    exact = (None if g is None else g.double() for g in grads)
    expected = reference.attend_shared_backward(*exact, *wide, *expected)
    actual = OPS.cuda_attend_shared_backward(*grads, query, key, value, mask, sink, *actual)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=1e-5, atol=1e-5)


def test_one_tensor_gets_its_gradient_in_one_launch() -> None:
    use_device("sm_90")
    query, key = torch.randn(2, 3, 8), torch.randn(2, 7, 8)
    out, lse = OPS.cuda_attend_shared(query, key, None, None, None)
    launches = []
    for value in (key, None):
        before = library().count_launches()
        OPS.cuda_attend_shared_backward(out, lse, query, key, value, None, None, out, lse)
        launches.append(library().count_launches() - before)
    assert launches == [3, 2]


def test_queries_beyond_the_default_shared_memory_are_served() -> None:
    use_device("sm_90")
    query, key = torch.randn(1, 2, 1600), torch.randn(1, 3, 1600)
    expected = reference.attend_shared(query.double(), key.double(), key.double(), None, None)
    for a, e in zip(OPS.cuda_attend_shared(query, key, key, None, None), expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


def test_a_library_without_code_for_the_device_is_declined_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def why_not(device: int) -> bytes:
        asked.append(device)
        return b"" if device == 0 else b"no kernel image is available"

    loaded = SimpleNamespace(continual_mha_cuda_why_not=why_not)
    monkeypatch.setattr(_native.ctypes, "CDLL", lambda path: loaded)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 7))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)  # nothing is known then
    x = [SimpleNamespace(is_cuda=True, device=torch.device("cuda", index)) for index in (0, 1)]
    monkeypatch.setattr(_native, "_RUNS_ON", set())
    assert _native.why_not_cuda("another", x[1]) == "no kernel for another"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for _ in range(2):
        assert _native.why_not_cuda("another", x[0]) == "no kernel for another"
    assert asked == [0]
    assert "no kernel image" in (_native.why_not_cuda("another", x[1]) or "")


@pytest.mark.parametrize(("backward", "widest"), [(False, 2904), (True, 1448)])
def test_what_the_library_has_no_shared_memory_for_is_declined_before(
    backward: bool, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_device("sm_86_small")
    properties = SimpleNamespace(shared_memory_per_block_optin=DEVICES["sm_86_small"][2])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    name = "attend_shared_backward" if backward else "attend_shared"
    for width in (widest, widest + 1):
        query, key = torch.zeros(1, 1, width), torch.zeros(1, 2, width)
        args: tuple[Any, ...] = (query, key, None, None, None)
        reason = _native._why_not_cuda_shared(*args, backward)
        if backward:
            args = (query, None, *args, query, torch.zeros(1, 1))
        if width == widest:
            assert reason is None
            getattr(OPS, f"cuda_{name}")(*args)
        else:
            assert "shared memory" in (reason or "")
            with pytest.raises(RuntimeError, match="bytes of shared memory per block"):
                getattr(OPS, f"cuda_{name}")(*args)


@pytest.mark.parametrize(
    ("argument", "shape", "reason"),
    [
        (1, (2, 7, 5), "key has shape (2, 7, 5), expected (2, 7, 8)"),
        (2, (2, 6, 8), "value has shape (2, 6, 8)"),
        (3, (2, 3, 6), "mask must be broadcastable"),
        (4, (2, 4), "sink has shape (2, 4)"),
    ],
)
def test_shared_attention_refuses_what_does_not_fit_together(
    argument: int, shape: tuple[int, ...], reason: str
) -> None:
    use_device("sm_90")
    args: list[Any] = [torch.zeros(2, 3, 8), torch.zeros(2, 7, 8), torch.zeros(2, 7, 8), None, None]
    args[argument] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=re.escape(f"cuda_attend_shared: {reason}")):
        OPS.cuda_attend_shared(*args)
