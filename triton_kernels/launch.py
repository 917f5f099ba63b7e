"""Launching kernels: cheaply, and recordable for compilation without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)


class Launch(NamedTuple):
    """One launch as it was asked for: everything that decides the machine code, and the grid."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]


_recorder: list[Launch] | None = None
_compiled: dict[tuple, tuple[Any, tuple]] = {}
_arenas: dict[tuple, torch.Tensor] = {}
_captured: dict[torch.device, tuple[torch.Tensor, int]] = {}
_CAPTURE_ARENA = 1 << 18


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect launches instead of running them; launchers may then be given meta tensors."""
    global _recorder
    previous, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = previous


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
) -> None:
    """Run `kernel` over `grid`; `args` and `constants` are its parameters in order.

    After the first launch of a signature the compiled kernel is called directly, which skips
    Triton's binder. That is sound only while every pointer keeps the 16-byte alignment which the
    compiled kernel assumes, so a call with any other pointer takes the ordinary way. `constants`
    are the constexprs, from a cache such as `constants_of`: their identity stands for them.
    """
    if 0 in grid:
        return
    if _recorder is not None or INTERPRETED:
        options = {"num_warps": num_warps} | ({"launch_pdl": True} if pdl else {})
        if _recorder is not None:
            _recorder.append(Launch(kernel, grid, args + constants, options))
        else:
            kernel[grid](*args, *constants, **options)
        return
    pointers = 0
    traits: list[Any] = [kernel, id(constants), torch.cuda.current_device(), num_warps]
    for arg in args:
        if isinstance(arg, torch.Tensor):
            pointers |= arg.data_ptr()
            traits.append(arg.dtype)
        else:
            traits.append(arg)
    key = tuple(traits)
    known = _compiled.get(key)
    if known is not None and pointers % 16 == 0:
        known[0][grid](*args, *constants)
        return
    options = {"num_warps": num_warps} | ({"launch_pdl": True} if pdl else {})
    compiled = kernel[grid](*args, *constants, **options)
    if pointers % 16 == 0:
        _compiled[key] = (compiled, constants)  # keeps `constants` alive, and so its identity


def counters(like: torch.Tensor, count: int) -> torch.Tensor:
    """Zeroed int32 counters on the device of `like`; a kernel leaves them zero when it ends.

    One array per CUDA stream, since kernels of one stream never overlap. A captured graph may
    be replayed beside anything, so each captured call gets counters of its own.
    """
    if like.device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=like.device)
    if torch.cuda.is_current_stream_capturing():
        arena, used = _captured.get(like.device, (None, 0))
        if arena is None or used + count > arena.numel():
            return torch.zeros(count, dtype=torch.int32, device=like.device)
        _captured[like.device] = (arena, used + (count + 3) // 4 * 4)  # keeps 16-byte alignment
        return arena[used : used + count]
    key = (like.device, torch.cuda.current_stream(like.device).cuda_stream)
    arena = _arenas.get(key)
    if arena is None or arena.numel() < count:
        arena = torch.zeros(max(count, 1024), dtype=torch.int32, device=like.device)
        _arenas[key] = arena
    if like.device not in _captured:
        zeros = torch.zeros(_CAPTURE_ARENA, dtype=torch.int32, device=like.device)
        _captured[like.device] = (zeros, 0)
    return arena
