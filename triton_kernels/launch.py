"""Launching kernels: cheaply, and recordable for compilation without a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
import triton

from ..devices import has_little_memory

_Made = TypeVar("_Made")

INTERPRETED = bool(triton.knobs.runtime.interpret)


class Launch(NamedTuple):
    """One launch as it was asked for: everything that decides the machine code, and the grid.

    constants: the last of `args`, as `launch` was given them.
    """

    kernel: Any
    grid: tuple[int, int, int]
    args: tuple
    options: dict[str, Any]
    constants: tuple


class _Here(threading.local):
    """What is so for one thread.

    launches: those that it collects instead of running them, if any.
    little: whether little shared memory is pretended for tensors that are on no GPU.
    """

    launches: list[Launch] | None = None
    little = False


_here = _Here()
_compiled: dict[tuple, tuple[Any, Any, tuple]] = {}
_arenas: dict[tuple, torch.Tensor] = {}
# For each device, arrays for captured calls, and how much of the last one is taken. Graphs hold no
# reference to them, so none is ever freed: 4 bytes for each counter of each captured call.
_taking = threading.Lock()  # for whoever changes this
_captured: dict[torch.device, tuple[list[torch.Tensor], int]] = {}
_CAPTURE_ARENA = 1 << 18
_STREAM_PER_THREAD = 2  # the handle, cudaStreamPerThread


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect launches of this thread instead of running them, which may be of meta tensors."""
    previous = _here.launches
    launches: list[Launch] = []
    _here.launches = launches
    try:
        yield launches
    finally:
        _here.launches = previous


@contextlib.contextmanager
def pretended_little_memory() -> Iterator[None]:
    """Plan for a GPU with little shared memory where tensors of this thread are on none."""
    previous, _here.little = _here.little, True
    try:
        yield
    finally:
        _here.little = previous


def little_memory(x: torch.Tensor) -> bool:
    """Whether a program may have no more than 99 KiB of shared memory where `x` is."""
    return has_little_memory(x.device) if x.device.type == "cuda" else _here.little


def recording() -> bool:
    """Whether launches of this thread are collected now, and so need no GPU."""
    return _here.launches is not None


@lru_cache(maxsize=4096, typed=True)
def constants_of(*values: Any) -> tuple:
    """The same tuple object for the same values."""
    return values


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    args: tuple,
    constants: tuple,
    *,
    num_warps: int,
    pdl: bool = False,
    registers: int | None = None,
) -> None:
    """Run `kernel` over `grid`; `args` and `constants` are its parameters in order.

    `registers` is how many a thread may have, for kernels that have no more than one program for
    each multiprocessor: the assembler does not know that, and saves some for a second one.

    After the first launch of a signature the compiled kernel is called directly, which skips
    Triton's binder. That is sound only while every pointer keeps the 16-byte alignment which the
    compiled kernel assumes, so a call with any other pointer takes the ordinary way. `constants`
    are the constexprs, from a cache such as `constants_of`: their identity stands for them. Triton
    launches on the current device, so that of `args[0]`, a tensor, is made the current one.
    """
    if 0 in grid:
        return
    if _here.launches is not None:
        options = _options(num_warps, pdl, registers)
        _here.launches.append(Launch(kernel, grid, args + constants, options, constants))
        return
    if INTERPRETED:
        kernel[grid](*args, *constants, **_options(num_warps, pdl, registers))
        return
    device = _device_for(args)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, args, constants, num_warps=num_warps, pdl=pdl, registers=registers)
        return
    key, aligned = _signature(kernel, args, constants, num_warps, device)
    known = _compiled.get(key)
    if known is None or not aligned:
        options = _options(num_warps, pdl, registers)
        if not aligned:
            kernel[grid](*args, *constants, **options)
            return

        def compile_with(options: dict[str, Any]) -> tuple[Any, int, int]:
            compiled = kernel.warmup(*args, *constants, grid=grid, **options)
            _ = compiled.run  # loads it, which is when the driver tells what it takes
            return compiled, compiled.n_regs, compiled.n_spills

        compiled = without_spills(compile_with, options)
        known = _compiled[key] = (compiled, kernel, constants)  # alive, as their identities count
    known[0][grid](*args, *constants)


REGISTERS = 1 << 16  # of a multiprocessor
MOST_REGISTERS = 255  # of a thread


def without_spills(
    compile_with: Callable[[dict[str, Any]], tuple[_Made, int, int]], options: dict[str, Any]
) -> _Made:
    """What `compile_with(options)` makes when threads get the registers that they need.

    It returns what it made, a thread's registers, and how much of them it spilled. Left alone, the
    assembler may spill some to fit one more program onto a multiprocessor, by rules of its version.
    So what spilled is compiled anew, for one program less at a time.
    """
    best, registers, least = compile_with(options)
    threads = 32 * options["num_warps"]
    while least:
        # the most programs whose threads can have more, which they get by eights
        programs = max(REGISTERS // ((registers // 8 * 8 + 8) * threads), 1)
        more = min(REGISTERS // (programs * threads) // 8 * 8, MOST_REGISTERS)
        if more <= registers:
            break
        registers = more
        made, _, spilled = compile_with({**options, "maxnreg": registers})
        if spilled < least:
            best, least = made, spilled
    return best


def _options(num_warps: int, pdl: bool, registers: int | None) -> dict[str, Any]:
    """Triton's options; that products and sums are fused has been the default up to triton 3.9."""
    options: dict[str, Any] = {"num_warps": num_warps, "enable_fp_fusion": True}
    if pdl:
        options["launch_pdl"] = True
    if registers is not None:
        options["maxnreg"] = registers
    return options


def _device_for(args: tuple) -> int:
    """The device on which kernels of these arguments run: that of the first, a tensor."""
    index = args[0].device.index
    return torch.cuda.current_device() if index is None else index


def _signature(
    kernel: Any, args: tuple, constants: tuple, num_warps: int, device: int
) -> tuple[tuple, bool]:
    """What decides the machine code, and whether every pointer is a multiple of 16."""
    pointers = 0
    traits: list[Any] = [id(kernel), id(constants), device, num_warps]
    for arg in args:
        kind = type(arg)
        if kind is int or arg is None:
            traits.append(arg)
        elif isinstance(arg, torch.Tensor):
            pointers |= arg.data_ptr()
            traits.append(arg.dtype)
        else:  # of other numbers Triton looks at the type alone
            traits.append(kind)
    return tuple(traits), pointers % 16 == 0


class Relaunch:
    """A launch that has been made, to be made again with other tensors in some places.

    It asks only what may have changed since, as by setting a parameter's `data`: where tensors
    are, their alignment, and shapes, dtypes and layout of those that stay, which are contiguous.
    """

    __slots__ = ("_args", "_constants", "_device", "_fixed", "_run", "_vary", "_where")

    def __init__(
        self, run: Any, args: tuple, constants: tuple, vary: tuple[int, ...], device: int
    ) -> None:
        """`run` launches it on `device`, where its tensors are if they are on any."""
        self._run, self._args, self._constants = run, list(args), constants
        self._vary, self._device = vary, device
        fixed = [x for i, x in enumerate(args) if isinstance(x, torch.Tensor) and i not in vary]
        self._fixed = tuple((x, x.dtype, x.shape) for x in fixed)
        self._where = args[0].get_device()  # which is -1 for the CPU
        for place in vary:
            self._args[place] = None  # keep nothing of the call alive

    def __call__(self, *tensors: torch.Tensor) -> bool:
        """Launch with these in place of those that vary, of the same dtypes; False if it cannot."""
        if _here.launches is not None:
            return False
        pointers, where = 0, self._where
        for tensor, dtype, shape in self._fixed:
            if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_contiguous():
                return False
            if tensor.get_device() != where:
                return False
            pointers |= tensor.data_ptr()
        args = self._args.copy()
        for place, tensor in zip(self._vary, tensors, strict=True):
            if tensor.get_device() != where:
                return False
            pointers |= tensor.data_ptr()
            args[place] = tensor
        if pointers % 16:
            return False
        if torch.cuda.current_device() == self._device:
            self._run(*args, *self._constants)
        else:
            with torch.cuda.device(self._device):
                self._run(*args, *self._constants)
        return True


def relaunch(made: Launch, vary: tuple[int, ...]) -> Relaunch | None:
    """A recorded launch for calls that differ in the tensors at the places `vary` of `args` alone.

    None where such a launch has not been made yet, or none is made directly.
    """
    if _here.launches is not None or INTERPRETED or 0 in made.grid:
        return None
    args = made.args[: len(made.args) - len(made.constants)]
    device = _device_for(args)
    key, aligned = _signature(made.kernel, args, made.constants, made.options["num_warps"], device)
    known = _compiled.get(key)
    if known is None or not aligned:
        return None
    again = known[0][made.grid]
    return Relaunch(again, args, made.constants, vary, device)


def counters(like: torch.Tensor, count: int) -> torch.Tensor:
    """Zeroed int32 counters on the device of `like`; a kernel leaves them zero when it ends.

    One array per CUDA stream, since kernels of one stream never overlap, but for the handle that
    is another stream in every thread. A captured graph may be replayed beside anything, so each
    captured call gets counters of its own, from an array which a call outside of captures has
    zeroed: within, that would be one more node of the graph.
    """
    device = like.device
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        with _taking:
            arenas, used = _captured.get(device, ([], _CAPTURE_ARENA))
            if used + count <= _CAPTURE_ARENA:
                _captured[device] = (arenas, used + (count + 3) // 4 * 4)  # keeps 16-byte alignment
                return arenas[-1][used : used + count]
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    if stream == _STREAM_PER_THREAD:
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device, stream)
    arena = _arenas.get(key)
    if arena is None or arena.numel() < count:
        arena = _arenas[key] = _zeros_to_keep(max(count, 1024), device)
    if 2 * _captured.get(device, ([], _CAPTURE_ARENA))[1] > _CAPTURE_ARENA:
        with _taking:
            arenas, used = _captured.get(device, ([], _CAPTURE_ARENA))
            if 2 * used > _CAPTURE_ARENA:  # nobody was faster
                arenas.append(_zeros_to_keep(_CAPTURE_ARENA, device))
                torch.cuda.current_stream(device).synchronize()  # no graph waits for zeros
                _captured[device] = (arenas, 0)
    return arena


def _zeros_to_keep(count: int, device: torch.device) -> torch.Tensor:
    """Zeroed int32 that outlive the call, made for its stream on another thread.

    Memory that this thread asks for may come from a pool of graphs, as in the first runs of what
    `torch.compile` captures: there everything must be a result, or is freed and handed out again.
    """
    stream = torch.cuda.current_stream(device)

    def make() -> torch.Tensor:
        # the thread's own device is another one, and would be begun when the stream is left
        with torch.cuda.device(device), torch.cuda.stream(stream):
            return torch.zeros(count, dtype=torch.int32, device=device)

    with ThreadPoolExecutor(1) as elsewhere:
        return elsewhere.submit(make).result()
