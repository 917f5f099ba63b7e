"""Launches through Triton's own binder and launcher, onto a driver that records them.

What a stand-in for a compiled kernel would take on trust is checked here for the installed Triton:
which arguments a compiled kernel wants when it is launched again, and what it specialises on.
"""

from __future__ import annotations

import itertools
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from recording_driver import STREAM, Recorded, recording_driver
from test_triton_compiles import CONFIGURATIONS
from triton_cases import RingCase

import continual_mha
from continual_mha import triton_kernels
from continual_mha.triton_kernels import launch as launcher
from continual_mha.triton_kernels import pieces, plan, project, ring_step
from continual_mha.triton_kernels.launch import INTERPRETED, Launch, constants_of, launch, record

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="the interpreter launches nothing"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real driver"),
]
HALF, FULL = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def driver() -> Iterator[list[Recorded]]:
    with recording_driver() as launches:
        yield launches


@pytest.fixture
def recorded(driver: list[Recorded], monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    monkeypatch.setattr(launcher, "_compiled", {})
    driver.clear()
    return driver


def constants_in(kernel: Any) -> int:
    return sum(param.is_constexpr for param in kernel.params)


def expected_parameters(args: tuple[Any, ...]) -> tuple[bytes, ...]:
    """What machine code gets of arguments: what is None or the int 1 is compiled into it."""
    found = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            found.append(struct.pack("<Q", arg.data_ptr()))
        elif isinstance(arg, float):
            found.append(struct.pack("<f", arg))
        elif arg is not None and arg != 1:
            found.append(struct.pack("<i" if abs(arg) < 2**31 else "<q", arg))
    return (*found, *2 * (bytes(8),))  # scratch memory, of which our kernels ask for none


def launch_again(made: Launch, direct: bool) -> None:
    """The same launch; ``direct`` if it must not go through Triton's binder."""
    count = len(made.args) - constants_in(made.kernel)
    options = {"num_warps": made.options["num_warps"], "pdl": "launch_pdl" in made.options}
    with pytest.MonkeyPatch.context() as patch:
        if direct:
            patch.setattr(made.kernel, "run", None)
        constants = constants_of(*made.args[count:])
        launch(made.kernel, made.grid, made.args[:count], constants, **options)


# -- the kernels -----------------------------------------------------------------------------------


def ring_calls() -> Iterator[tuple[str, Any, list[Any]]]:
    for path, case in (
        ("fused", RingCase(N=2, H=2, D=16, L=5, dtype=HALF)),
        ("chain", RingCase(N=3, H=2, D=16, L=5, dtype=FULL, delay=2, extra_slot=True)),
        ("gemm", RingCase(N=3, H=2, D=16, L=5, dtype=FULL, bias=False)),
        ("group", RingCase(N=3, H=2, D=16, L=5, dtype=HALF, delay=1)),
    ):
        active = torch.tensor([True] + [False] * (case.N - 1))
        how = plan.step_plan(case.N, case.H * case.D, case.H, case.L, case.dtype.itemsize, path)
        args = [*case.token(), *case.weights, *case.state, active, False, 0.1, True]
        yield f"step-{path}", triton_kernels.ring_step_, [*args, None, None, False, how]
    case = RingCase(N=2, H=2, D=16, L=5, dtype=HALF, delay=1)
    args = [*case.clip(3), *case.weights, *case.state, 1, True, 0.0, True]
    yield "steps", triton_kernels.ring_steps_, args
    rings = [torch.zeros(2, 2, 5, 16, dtype=torch.int8) for _ in range(2)]
    scales = [torch.ones(2, 2, 5, 1) for _ in range(2)]
    yield "steps-8-bits", triton_kernels.ring_steps_, [*args[:11], *rings, *args[13:], *scales]


def input_calls() -> Iterator[tuple[str, Any, list[Any]]]:
    N, E, H, L = 2, 32, 2, 5
    weights = [torch.randn(3 * E, E), torch.randn(3 * E), torch.randn(E, E), torch.randn(E)]
    for path, splits in (("fused", 1), ("gemm", 2)):
        how = plan.input_plan(N, E, H, L, 4, False, path)._replace(splits=splits)
        bias = [torch.randn(1, 1, E)] * 2 if path == "gemm" else [None, None]
        state = [torch.randn(N, L, E), torch.zeros(N, dtype=torch.int64), H, 1]
        args = [torch.randn(N, E), *weights, *bias, *state, None, False, 0.0, True, None, False]
        yield f"inputs-{path}", triton_kernels.input_step_, [*args, how]
    yield "inputs-invariant", triton_kernels.input_step_, [*args[:-1], True]


def attention_calls() -> Iterator[tuple[str, Any, list[Any]]]:
    N, H, S, E = 2, 2, 6, 16
    query, key, seed = torch.randn(N, H, E), torch.randn(N, S, E), torch.ones(1, dtype=torch.int64)
    shared = [query, key, key, torch.zeros(1, 1, S), torch.zeros(N, H), seed]
    yield "shared", triton_kernels.attend_shared_full, [*shared, 0.1, True]
    grads = [torch.randn(N, H, E), torch.randn(N, H), None, torch.randn(N, S)]
    results = [torch.randn(N, H, E), torch.randn(N, H), torch.randn(N, H)]
    backward = triton_kernels.attend_shared_full_backward
    yield "shared-backward", backward, [*grads, *shared, *results, 0.1]
    shared[2] = None  # the value is the key
    yield "shared-backward-one-tensor", backward, [*grads, *shared, *results, 0.1]
    for given in (grads, shared, results):
        given[:1] = [given[0].to(HALF)]
    shared[1] = shared[1].to(HALF)
    yield "shared-backward-one-tile", backward, [*grads, *shared, *results, 0.1]
    of_query = triton_kernels.attend_shared_query_backward
    yield "shared-backward-frozen", of_query, [*grads, *shared, *results, 0.1]
    T, L = 3, 5
    clips, rings = [torch.randn(N, T, H, E) for _ in range(3)], [torch.randn(N, H, L, E)] * 2
    window = [*clips, *rings, torch.zeros(N, dtype=torch.int64), None, None]
    yield "window", triton_kernels.attend_window, [*window, 1, 0.0]
    out, lse = torch.randn(N, T - 1, H, E), torch.randn(N, T - 1, H)
    args = [out, None, *window, out, lse, 1, 0.0, True]
    yield "window-backward", triton_kernels.attend_window_backward, args


_FOUND = (*ring_calls(), *input_calls(), *attention_calls())
CALLS = {name: (call, args) for name, call, args in _FOUND}


@pytest.mark.parametrize("name", CALLS)
def test_launchers_pass_the_kernel_what_they_mean_to_by_both_ways(
    name: str, recorded: list[Recorded]
) -> None:
    call, args = CALLS[name]
    with record() as launches:
        call(*args)
    assert launches
    for made in launches:
        recorded.clear()
        launch_again(made, direct=False)
        launch_again(made, direct=True)
        first, second = recorded
        assert first == second
        count = len(made.args) - constants_in(made.kernel)
        assert first.parameters == expected_parameters(made.args[:count])
        assert (first.grid, first.stream) == (made.grid, STREAM)
        assert first.block == (32 * made.options["num_warps"], 1, 1)
        assert first.pdl == made.options.get("launch_pdl", False)


def test_every_kernel_is_among_those_calls() -> None:
    launched = set()
    for call, args in CALLS.values():
        with record() as launches:
            call(*args)
        launched |= {made.kernel for made in launches}
    assert launched >= {made.kernel for found in CONFIGURATIONS.values() for made in found}


@pytest.fixture
def warm(
    recorded: list[Recorded], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Any]:
    """Steps of a warm module, which go a path, and may launch nothing that has to be prepared."""
    path, _, how = request.param.partition(" ")
    monkeypatch.setattr(pieces, "INTERPRETED", True)  # or it declines tensors on the CPU
    monkeypatch.setattr(continual_mha.backends, "order", lambda device_type: ("triton",))
    monkeypatch.setattr(plan, "STEP_RULES", [x for x in plan.STEP_RULES if x.path == path])
    forget = (plan.step_plan.cache_clear, ring_step._prepare.cache_clear)
    for cache_clear in forget:
        cache_clear()
    module = continual_mha.SingleOutputMultiheadAttention(32, 2, sequence_len=5).eval().to(HALF)
    module.requires_grad_(False)

    def step(*tokens: torch.Tensor) -> tuple[Any, Any, Any]:
        active = torch.tensor([True, False]) if how == "masked" else None
        return module.forward_step(*tokens, active=active), module, active

    with torch.inference_mode():
        for _ in range(7):
            step(*torch.randn(3 if how == "apart" else 1, 2, 32, dtype=HALF))
        for at in (ring_step, project):
            monkeypatch.setattr(at, "launch", None)
        yield step
    for cache_clear in forget:
        cache_clear()


def pointer(x: torch.Tensor) -> bytes:
    return struct.pack("<Q", x.data_ptr())


@pytest.mark.parametrize("warm", ["chain", "chain masked"], indirect=True)
def test_a_warm_step_of_three_launches_hands_each_what_the_one_before_made(
    warm: Any, recorded: list[Recorded]
) -> None:
    recorded.clear()
    token = torch.randn(2, 32, dtype=HALF)
    out, module, active = warm(token)
    project_in, attend, project_out = (made.parameters for made in recorded)
    weight, projected, attended = (project_in[1], project_in[3], project_out[0])
    assert (project_in[0], weight) == (pointer(token), pointer(module.in_proj_weight))
    q, k, v = (struct.unpack("<Q", x)[0] for x in attend[:3])
    assert struct.pack("<Q", q) == projected
    assert (k - q, v - q) == (2 * 32, 4 * 32)
    assert {attended, pointer(module._ring_k), pointer(module._ring_v)} <= set(attend)
    assert project_out[1] == pointer(module.out_proj.weight)
    assert project_out[3:5] == (pointer(out), pointer(module._ring_position))
    assert len({projected, attended, pointer(out)}) == 3
    if active is not None:
        assert project_out[5] == pointer(active)


@pytest.mark.parametrize(("warm", "times"), [("fused", 1), ("fused apart", 3)], indirect=["warm"])
def test_a_warm_step_of_a_module_is_the_launch_of_its_own_tensors(
    warm: Any, times: int, recorded: list[Recorded]
) -> None:
    tokens = list(torch.randn(times, 2, 32, dtype=HALF))
    out, module, _ = warm(*tokens)
    assert len({made.function for made in recorded}) == 1
    assert len(recorded) == 8
    earlier, last = recorded[-2:]
    assert last.parameters[:3] == tuple(map(pointer, tokens * (3 // times)))
    assert pointer(out) in last.parameters
    assert pointer(module._ring_k) in last.parameters
    differ = [a != b for a, b in zip(earlier.parameters, last.parameters, strict=True)]
    assert sum(differ) <= 6  # three tokens, the output, and what programs merge
    assert last._replace(parameters=()) == earlier._replace(parameters=())


@pytest.mark.parametrize("warm", ["chain apart"], indirect=True)
def test_a_warm_step_of_more_launches_is_made_anew(warm: Any) -> None:
    """As with three products in place of one; here nothing can be launched anew."""
    with pytest.raises(TypeError, match="NoneType"):
        warm(*torch.randn(3, 2, 32, dtype=HALF))


# -- what a call costs the host --------------------------------------------------------------------


def host_calls(call: Callable[[], object]) -> int:
    """Functions of Python and C that are called, but for what the driver does that records."""
    count = recording = 0

    def notice(frame: Any, event: str, _: object) -> None:
        nonlocal count, recording
        listens = frame.f_code.co_name == "listen"
        if listens and event in ("call", "return"):
            recording += 1 if event == "call" else -1
        elif event in ("call", "c_call") and not recording:
            count += 1

    sys.setprofile(notice)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


# A fifth more than there are with Triton 3.6 to 3.9.
MOST_CALLS = {
    "step": 120,
    "step of three": 125,
    "forward": 235,
    "masked forward": 260,
    "steps": 370,
    "forward with a gradient": 290,
    "step with a gradient": 345,
    "forward and backward": 670,
}


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("what", MOST_CALLS)
def test_a_call_like_the_one_before_costs_the_host_little(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a small call on a GPU that is most of the time, and time itself is too noisy to test."""
    monkeypatch.setattr(pieces, "INTERPRETED", True)  # or it declines tensors on the CPU
    monkeypatch.setattr(continual_mha.backends, "order", lambda device_type: ("triton", "torch"))
    module = continual_mha.SingleOutputMultiheadAttention(32, 2, sequence_len=4).eval()
    token, clip = torch.randn(2, 32), torch.randn(2, 4, 32)
    padding = torch.zeros(2, 4, dtype=torch.bool)
    calls: dict[str, Callable[[], object]] = {
        "step": lambda: module.forward_step(token),
        "step of three": lambda: module.forward_step(token, clip[:, 0], clip[:, 1]),
        "masked forward": lambda: module(clip, key_padding_mask=padding, need_weights=False),
        "forward": lambda: module(clip, need_weights=False),
        "steps": lambda: module.forward_steps(clip[:, :3]),
        "forward and backward": lambda: module(clip, need_weights=False)[0].sum().backward(),
    }
    call = calls[what.removesuffix(" with a gradient")]
    with torch.set_grad_enabled("gradient" in what or "backward" in what):
        for _ in range(8):  # until streams are warm, and all is decided and compiled
            call()
        assert host_calls(call) <= MOST_CALLS[what]


# -- what machine code is specialised on -----------------------------------------------------------


@triton.jit
def _scaled(x_ptr, y_ptr, n, scale, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    y = tl.load(x_ptr + offs, mask=offs < n)
    if y_ptr is not None:
        y += tl.load(y_ptr + offs, mask=offs < n)
    tl.store(x_ptr + offs, y * scale, mask=offs < n)


MEMORY = torch.zeros(64)
ARGUMENTS = list(
    itertools.product(
        (MEMORY, MEMORY[1:], MEMORY.half()),
        (None, MEMORY),
        (1, 2, 16, 48, 2**31 + 1),
        (0.0, 1.0, 0.5, 0, 1, True, False),
    )
)


def test_a_launch_is_that_of_tritons_binder_whatever_was_launched_before(
    recorded: list[Recorded],
) -> None:
    constants = constants_of(16)
    for _ in range(2):  # the second time all is known
        for args in ARGUMENTS:
            recorded.clear()
            _scaled[1, 1, 1](*args, *constants, **launcher._options(1, False, None))
            launch(_scaled, (1, 1, 1), args, constants, num_warps=1)
            bound, launched = recorded
            assert launched == bound, args[2:]
