"""The cached launcher and the counters, without a GPU: a stand-in for kernel and device."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

import continual_mha
from continual_mha import devices
from continual_mha.triton_kernels import launch as module
from continual_mha.triton_kernels import pieces, plan, ring_step
from continual_mha.triton_kernels.launch import constants_of, counters, launch, record
from continual_mha.triton_kernels.pieces import dot_precision


def test_gpus_that_no_kernel_is_for_are_declined_and_small_ones_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda", 0)
    properties = SimpleNamespace(shared_memory_per_block_optin=99 << 10)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(pieces, "why_no_launch", lambda: None)
    assert devices.why_unfit(gpu) is None
    assert devices.has_little_memory(gpu)
    properties.shared_memory_per_block_optin = 163 << 10
    assert not devices.has_little_memory(gpu)
    x: Any = SimpleNamespace(device=gpu, dtype=torch.float16)
    assert pieces.not_taken(x) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "older than compute capability 8.0" in (pieces.not_taken(x) or "")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "NVIDIA" in (pieces.not_taken(x) or "")


def test_a_triton_that_cannot_launch_is_declined_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It builds its launcher with a compiler of C, which need not be there."""

    class Driver:
        @property
        def active(self) -> Any:
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(pieces, "why_unfit", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(triton.runtime, "driver", Driver())
    pieces.why_no_launch.cache_clear()
    x: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16)
    try:
        assert "Failed to find C compiler" in (pieces.not_taken(x) or "")
        monkeypatch.setattr(
            torch.cuda, "is_initialized", lambda: False
        )  # of which nothing is known
        assert pieces.not_taken(x) is None
    finally:
        pieces.why_no_launch.cache_clear()


class StandIn:
    """Records what was asked: Triton's own way in, its compiler, or a compiled kernel."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.last: tuple[Any, ...] = ()
        self.limits: list[int | None] = []  # of registers, with which it was compiled
        self.taken = 128  # registers of a thread that it is left to the assembler to choose
        self.needed = 0  # below which some are spilled

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self.calls.append("triton")

    def warmup(self, *args: Any, grid: Any, **options: Any) -> Compiled:
        self.calls.append("compile")
        self.args = args
        self.limits.append(options.get("maxnreg"))
        return Compiled(self, options.get("maxnreg", self.taken))


class Compiled:
    def __init__(self, kernel: StandIn, registers: int) -> None:
        self.kernel, self.registers = kernel, registers

    @property
    def run(self) -> None:
        self.n_regs = self.registers
        self.n_spills = max(self.kernel.needed - self.registers, 0)

    def __getitem__(self, grid: Any) -> Any:
        def run(*args: Any) -> None:
            self.kernel.calls.append("run")
            self.kernel.last = args
            self.kernel.ran = self
            assert len(args) == len(self.kernel.args)

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(module, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return StandIn()


def test_a_launch_like_an_earlier_one_skips_the_binder(kernel: StandIn) -> None:
    for N in (4, 4, 5, 4):
        launch(kernel, (1, 1, 1), (torch.zeros(4), None, N), constants_of(1, 2), num_warps=4)
    assert kernel.calls == ["compile", "run", "run", "compile", "run", "run"]


def test_constants_of_another_type_are_others() -> None:
    """As code for a number and for a truth value may be."""
    assert constants_of(1, 2) is constants_of(1, 2)
    assert constants_of(1, 2) is not constants_of(True, 2)
    assert constants_of(1, 2) is not constants_of(1.0, 2)


def test_constants_that_stand_for_compiled_code_live_as_long_as_that(kernel: StandIn) -> None:
    """Or others could get their identity, and with it their code."""

    class Constant:
        pass

    constant = Constant()
    alive = weakref.ref(constant)
    launch(kernel, (1, 1, 1), (torch.zeros(4),), (constant,), num_warps=4)
    kernel.args, kernel.last = (), ()
    del constant
    assert alive() is not None


@pytest.mark.parametrize("change", ["dtype", "constants", "none", "warps"])
def test_whatever_changes_the_machine_code_is_compiled(kernel: StandIn, change: str) -> None:
    x = torch.zeros(4)
    launch(kernel, (1, 1, 1), (x, x, 3), constants_of(1, 2), num_warps=4)
    launch(
        kernel,
        (1, 1, 1),
        (x.half() if change == "dtype" else x, None if change == "none" else x, 3),
        constants_of(1, 3 if change == "constants" else 2),
        num_warps=8 if change == "warps" else 4,
    )
    assert kernel.calls == ["compile", "run"] * 2


def test_what_spills_registers_gets_those_of_one_program_less_at_a_time(kernel: StandIn) -> None:
    kernel.taken, kernel.needed = 80, 150
    for _ in range(2):
        launch(kernel, (1, 1, 1), (torch.zeros(4),), constants_of(), num_warps=4)
    assert kernel.limits == [None, 96, 128, 168]  # of 64 Ki: for six programs, five, four, three
    assert kernel.ran.registers == 168
    assert kernel.calls == ["compile"] * 4 + ["run"] * 2


def test_what_spills_gets_more_registers_even_if_that_takes_several_programs(
    kernel: StandIn,
) -> None:
    kernel.taken, kernel.needed = 40, 48
    launch(kernel, (1, 1, 1), (torch.zeros(4),), constants_of(), num_warps=4)
    assert kernel.limits == [None, 48]  # twelve programs, of eleven each thread would have 40 too


@pytest.mark.parametrize(("warps", "most"), [(4, 255), (16, 128)])
def test_what_spills_whatever_it_gets_is_launched_as_it_spills_least(
    kernel: StandIn, warps: int, most: int
) -> None:
    kernel.needed = 1000
    launch(kernel, (1, 1, 1), (torch.zeros(4),), constants_of(), num_warps=warps)
    assert kernel.ran.registers == most
    assert kernel.calls[-2:] == ["compile", "run"]


def launched(kernel: StandIn, fixed: torch.Tensor, varying: torch.Tensor) -> module.Relaunch:
    """A launch that was made, for other tensors in the second place."""
    with record() as launches:
        launch(kernel, (1, 1, 1), (fixed, varying), constants_of(1), num_warps=4)
    [made] = launches
    launch(made.kernel, made.grid, (fixed, varying), made.constants, num_warps=4)
    again = module.relaunch(made, vary=(1,))
    assert again is not None
    return again


def test_a_launch_is_not_repeated_for_a_tensor_that_lies_in_another_way(kernel: StandIn) -> None:
    weight, token = torch.zeros(4, 4), torch.zeros(4)
    again = launched(kernel, weight, token)
    assert again(token)
    weight.data = weight.data.t()
    assert not again(token)
    assert kernel.calls == ["compile", "run", "run"]


def test_a_launch_that_can_be_repeated_keeps_nothing_of_the_first_call(kernel: StandIn) -> None:
    token = torch.zeros(4)
    alive = weakref.ref(token)
    again = launched(kernel, torch.zeros(4, 4), token)
    kernel.args, kernel.last = (), ()
    del token
    assert alive() is None
    kernel.args = (None,) * 3
    assert again(torch.zeros(4))


def test_a_launch_is_not_repeated_with_a_tensor_of_another_shape(kernel: StandIn) -> None:
    """As of a part of a weight, where the others are elsewhere at times."""
    weight, token = torch.zeros(4, 4), torch.zeros(4)
    again = launched(kernel, weight, token)
    for other in (weight.data[:2], weight.data.view(2, 8), weight.data.half()):
        weight.data = other
        assert not again(token)
    assert kernel.calls == ["compile", "run"]


class OnGPU(torch.Tensor):
    """Memory of the CPU that is said to be a GPU's."""

    gpu: int

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.gpu)

    def get_device(self) -> int:
        return self.gpu


def on_gpu(index: int) -> OnGPU:
    x = torch.zeros(64).as_subclass(OnGPU)
    x.gpu = index
    return x


def test_a_launch_is_repeated_on_the_device_of_its_tensors(
    kernel: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models on two GPUs run the same kernel, and none of them need be the current one."""
    current, loaded_on, ran_on = [0], {}, []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        before, current[0] = current[0], index
        yield
        current[0] = before

    class There(StandIn):
        def warmup(self, *args: Any, grid: Any, **options: Any) -> Any:
            loaded_on[compiled := super().warmup(*args, grid=grid, **options)] = current[0]
            return compiled

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    kernel = There()
    again = [launched(kernel, on_gpu(gpu), on_gpu(gpu)) for gpu in (0, 1)]
    for current[0] in (0, 1):
        for gpu, repeat in enumerate(again):
            kernel.last = ()
            assert repeat(on_gpu(gpu))
            ran_on.append((gpu, loaded_on[kernel.ran], *(x.gpu for x in kernel.last[:2])))
            assert not repeat(on_gpu(1 - gpu))
    assert ran_on == [(0,) * 4, (1,) * 4] * 2
    again[0]._fixed[0][0].gpu = 1  # type: ignore[attr-defined]
    assert not again[0](on_gpu(0))


def test_an_unaligned_pointer_never_meets_code_compiled_for_aligned_ones(kernel: StandIn) -> None:
    x = torch.zeros(8)
    for argument in (x, x[1:], x[1:], x):
        launch(kernel, (1, 1, 1), (argument,), constants_of(), num_warps=4)
    assert kernel.calls == ["compile", "run", "triton", "triton", "run"]


@pytest.mark.parametrize("setting", ["tf32", "ieee", "none"])
def test_precision_follows_either_of_torchs_settings(setting: str) -> None:
    """The default, "none", is as exact as fp32; what is asked for by name is taken as it is."""
    matmul = torch.backends.cuda.matmul
    try:
        matmul.fp32_precision = setting
        assert dot_precision() == {"none": "tf32x3"}.get(setting, setting)
        assert dot_precision(whole=True) == {"none": "ieee"}.get(setting, setting)
        matmul.fp32_precision = "none"
        matmul.allow_tf32 = setting == "tf32"
        assert dot_precision() == ("tf32" if setting == "tf32" else "ieee")
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = "none"


def test_an_empty_grid_and_a_recorded_launch_run_nothing(kernel: StandIn) -> None:
    launch(kernel, (0, 1, 1), (), constants_of(), num_warps=4)
    with record() as launches:
        launch(kernel, (2, 1, 1), (1,), constants_of(7), num_warps=4, pdl=True)
    assert kernel.calls == []
    assert [(x.args, x.options["launch_pdl"]) for x in launches] == [((1, 7), True)]


def test_what_is_recorded_or_pretended_around_a_block_goes_on_behind_it(kernel: StandIn) -> None:
    launch_one = lambda: launch(kernel, (1, 1, 1), (1,), constants_of(), num_warps=4)
    with record() as outer:
        with record() as inner:
            launch_one()
        launch_one()
        assert module.recording()
    assert not module.recording()
    assert (len(inner), len(outer)) == (1, 1)
    x = torch.zeros(1)
    with module.pretended_little_memory():
        with module.pretended_little_memory():
            assert module.little_memory(x)
        assert module.little_memory(x)
    assert not module.little_memory(x)


def test_a_thread_that_records_takes_no_launch_of_another(kernel: StandIn) -> None:
    """As of a model that serves beside another one which has its first steps."""
    with record() as launches, ThreadPoolExecutor(1) as other:
        args = (kernel, (1, 1, 1), (torch.zeros(4),), constants_of())
        other.submit(launch, *args, num_warps=4).result()
    assert launches == []
    assert kernel.calls == ["compile", "run"]


@pytest.fixture(params=["fused"])
def step(
    kernel: StandIn, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Any]:
    """A warm module of one stream on a kernel of one launch, whose place a stand-in takes."""
    path, _, cache = request.param.partition(" ")
    name = {"fused": "_ring_step_kernel", "group": "_group_step_kernel"}[path]
    monkeypatch.setattr(ring_step, name, kernel)
    monkeypatch.setattr(plan, "STEP_RULES", [x for x in plan.STEP_RULES if x.path == path])
    _forget_plans()
    monkeypatch.setattr(pieces, "INTERPRETED", True)  # or it declines tensors on the CPU
    monkeypatch.setattr(continual_mha.backends, "order", lambda device_type: ("triton",))
    made = continual_mha.SingleOutputMultiheadAttention(
        32, 2, sequence_len=4, device="cpu", cache_dtype=torch.int8 if cache else None
    ).eval()
    with torch.no_grad():
        for _ in range(6):  # warm, decided, and prepared
            made.forward_step(torch.zeros(1, 32))
    kernel.calls.clear()
    yield made
    _forget_plans()


def _forget_plans() -> None:
    plan.step_plan.cache_clear()
    ring_step._prepare.cache_clear()


@pytest.mark.parametrize("step", ["fused", "fused int8", "group", "group int8"], indirect=True)
def test_a_warm_step_is_launched_again_without_asking(step: Any, kernel: StandIn) -> None:
    token = torch.ones(1, 32)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring_step, "launch", None)
        out = step.forward_step(token)
    assert kernel.calls == ["run"]
    args = kernel.last
    assert args[:3] == (token,) * 3
    assert args[3] is step.in_proj_weight
    assert args[11] is step._ring_k
    assert args[14] is getattr(step, "_ring_v_scale", None)
    assert (args[14] is None) == (step.cache_dtype is None)
    assert args[16] is step._ring_position
    assert args[17] is None
    assert args[19] is out
    assert all(isinstance(x, torch.Tensor) for x in args[20:22])


def test_every_warm_step_has_memory_of_its_own(step: Any, kernel: StandIn) -> None:
    with torch.no_grad():
        outs = [(step.forward_step(torch.ones(1, 32)), *kernel.last[20:22]) for _ in range(2)]
    assert len({x.data_ptr() for out in outs for x in out}) == 6


def test_a_warm_step_with_other_weights_is_declined_where_it_has_to_be(
    step: Any, kernel: StandIn
) -> None:
    step.out_proj.weight.data = step.out_proj.weight.data.half()
    with torch.no_grad(), pytest.raises(TypeError, match="as the module's weights are"):
        step.forward_step(torch.zeros(1, 32))
    assert kernel.calls == []


def test_other_weights_before_a_step_is_prepared_are_seen(step: Any, kernel: StandIn) -> None:
    step.clean_state()
    with torch.no_grad():
        for _ in range(5):
            step.forward_step(torch.zeros(1, 32))
        assert step._repeat.run is None
        kernel.calls.clear()
        step.out_proj.weight.data = step.out_proj.weight.data.half()
        with pytest.raises(TypeError, match="as the module's weights are"):
            step.forward_step(torch.zeros(1, 32))
    assert kernel.calls == []


@pytest.mark.parametrize("change", ["strides", "mask", "alignment", "precision"])
def test_a_warm_step_that_differs_is_asked_about(
    change: str, step: Any, kernel: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, mask = torch.zeros(1, 32), None
    if change == "strides":
        token = torch.zeros(32, 1).T
        assert token.stride() != (32, 1)
    elif change == "mask":
        mask = torch.tensor([True])
    elif change == "alignment":
        token = torch.zeros(33)[1:].view(1, 32)
    else:
        monkeypatch.setattr(ring_step, "dot_precision", lambda: "tf32")
    asked = []
    monkeypatch.setattr(ring_step, "launch", lambda *args, **options: asked.append(args))
    with torch.no_grad():
        step.forward_step(token, active=mask)
    assert len(asked) == 1
    assert kernel.calls == []


def test_a_mask_with_gaps_is_not_read_as_if_it_had_none(
    step: Any, kernel: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    step.clean_state()
    packed, asked = torch.tensor([False, True]), []
    strided = torch.tensor([[False, False], [True, True]])[:, 0]
    with torch.no_grad():
        for _ in range(6):
            step.forward_step(torch.zeros(2, 32), active=packed)
        kernel.calls.clear()
        ring_launch = ring_step.launch
        monkeypatch.setattr(
            ring_step, "launch", lambda *args, **kw: asked.append(args) or ring_launch(*args, **kw)
        )
        for mask in (packed, strided):
            step.forward_step(torch.zeros(2, 32), active=mask)
            assert kernel.last[17].is_contiguous()
            assert kernel.last[17].tolist() == mask.tolist()
    assert kernel.calls == ["run", "run"]
    assert len(asked) == 1


class OnDevice:
    """As much of a CUDA tensor as `counters` asks for."""

    class device:  # noqa: N801
        type = "cuda"


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device without any counters yet, which captures while this list is not empty."""
    capturing: list[int] = []
    zeros = torch.zeros
    monkeypatch.setattr(module, "_arenas", {})
    monkeypatch.setattr(module, "_captured", {})
    monkeypatch.setattr(module, "_CAPTURE_ARENA", 64)
    monkeypatch.setattr(torch, "zeros", lambda n, dtype, device: zeros(n, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda which: contextlib.nullcontext())
    return capturing


def test_each_captured_call_has_counters_of_its_own(capture: list[int]) -> None:
    eager = [counters(OnDevice, 8) for _ in range(2)]  # type: ignore[arg-type]
    assert eager[0].data_ptr() == eager[1].data_ptr()
    capture.append(1)
    captured = [counters(OnDevice, 7) for _ in range(3)]  # type: ignore[arg-type]
    pointers = {x.data_ptr() for x in (*eager, *captured)}
    assert len(pointers) == 4
    assert all((x.data_ptr() - captured[0].data_ptr()) % 16 == 0 for x in captured)
    assert all(abs(x - y) >= 28 for x in pointers for y in pointers if x != y)


def test_each_stream_has_counters_of_its_own(capture: list[int]) -> None:
    """For kernels of two streams may overlap."""
    stream: Any = torch.cuda.current_stream(torch.device("cuda"))
    taken = []
    for stream.cuda_stream in (7, 9, 7):
        taken.append(counters(OnDevice, 8).data_ptr())  # type: ignore[arg-type]
    assert taken[0] == taken[2] != taken[1]


def test_a_handle_that_is_another_stream_in_every_thread_has_no_counters_of_its_own(
    capture: list[int],
) -> None:
    torch.cuda.current_stream(torch.device("cuda")).cuda_stream = 2  # type: ignore[misc]
    taken = [counters(OnDevice, 8) for _ in range(2)]  # type: ignore[arg-type]
    assert taken[0].data_ptr() != taken[1].data_ptr()
    assert not module._arenas


def test_counters_are_zero_before_a_capture_can_take_them(
    capture: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are zeroed on one stream, and a graph may be replayed on another that never waits."""
    log, zeros = [], torch.zeros
    monkeypatch.setattr(
        torch, "zeros", lambda *args, **kw: log.append("zeros") or zeros(*args, **kw)
    )
    stream: Any = torch.cuda.current_stream(torch.device("cuda"))
    stream.synchronize = lambda: log.append(f"waited for, {module._taking.locked()}")
    counters(OnDevice, 8)  # type: ignore[arg-type]
    assert log == ["zeros", "zeros", "waited for, True"]
    counters(OnDevice, 8)  # type: ignore[arg-type]
    assert len(log) == 3


def test_counters_that_stay_do_not_come_from_a_pool_that_this_thread_has_to_use(
    capture: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph's pool takes what is made in the first run of compiled code, but not to keep it."""
    made_on = []
    zeros = torch.zeros
    monkeypatch.setattr(
        torch,
        "zeros",
        lambda *args, **kw: made_on.append(threading.get_ident()) or zeros(*args, **kw),
    )
    counters(OnDevice, 8)  # type: ignore[arg-type]
    counters(OnDevice, 2000)  # type: ignore[arg-type]
    assert len(made_on) == 3  # for eager calls, for captured ones, and more for eager ones
    assert threading.get_ident() not in made_on


def test_threads_that_capture_at_once_do_not_share_counters(
    capture: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(dict[Any, Any]):
        def get(self, *args: Any) -> Any:
            found = super().get(*args)
            time.sleep(0.02)
            return found

    counters(OnDevice, 8)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "_captured", Slow(module._captured))
    capture.append(1)
    with ThreadPoolExecutor(4) as threads:
        taken = list(threads.map(lambda i: counters(OnDevice, 4), range(4)))  # type: ignore[arg-type]
    assert len({x.data_ptr() for x in taken}) == 4


def test_counters_of_captured_calls_are_zeroed_between_the_captures(
    capture: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    zeros = torch.zeros
    monkeypatch.setattr(
        torch, "zeros", lambda *args, **options: made.append(1) or zeros(*args, **options)
    )
    taken = []
    for _ in range(8):
        capture.clear()
        counters(OnDevice, 8)  # type: ignore[arg-type]
        before = len(made)
        capture.append(1)
        taken += [counters(OnDevice, 8) for _ in range(4)]  # type: ignore[arg-type]
        assert len(made) == before
    assert len({x.data_ptr() for x in taken}) == len(taken)
    counters(OnDevice, 8)  # type: ignore[arg-type]
    assert len(made) == before + 1  # a capture that finds no room has to make some
