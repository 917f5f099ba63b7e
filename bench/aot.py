"""Compile launches without a GPU, and read in the code what the compiler made of them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from continual_mha.triton_kernels.attend_shared import attend_shared_full
from continual_mha.triton_kernels.attend_shared_backward import (
    attend_shared_full_backward,
    attend_shared_query_backward,
)
from continual_mha.triton_kernels.attend_window import attend_window, attend_window_backward
from continual_mha.triton_kernels.input_step import input_step_
from continual_mha.triton_kernels.launch import Launch, little_memory, record, without_spills
from continual_mha.triton_kernels.plan import input_plan, step_plan
from continual_mha.triton_kernels.ring_step import ring_step_
from continual_mha.triton_kernels.ring_steps import ring_steps_

_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
# Bytes of shared memory that a program may have, by compute capability.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Where that is less, plans are asked for with `little`.
LITTLE_MEMORY = {86: 99 * 1024, 89: 99 * 1024, 120: 99 * 1024}

_LABEL = re.compile(r"(\$\w+):")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+);")
# A load of up to four registers of up to 64 bits, or a copy and its bytes.
_LOAD = re.compile(r"\bld\.global\S*?(?:\.v(?P<registers>\d))?\.b(?P<bits>\d+)\b")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\b.*, 0x(?P<bytes>[\da-f]+)\b")
_MATRIX = re.compile(r"\b(?:mma\.sync|wgmma\.mma|tcgen05\.mma)")


class Report(NamedTuple):
    """What the compiler says of one kernel for one architecture."""

    kernel: str
    programs: int
    threads: int
    registers: int
    spills: int  # bytes of local memory, where registers go that were too many
    shared_bytes: int
    ptx: str
    cubin: bytes

    @property
    def sass(self) -> str:
        """The machine code."""
        return tool("nvdisasm", self.cubin, "-c")

    def loads_in_loops(self, copies: bool = False) -> list[int]:
        """Bits of each global load inside a loop, at least 32.

        `copies=True`: of those alone that copy a later tile into shared memory meanwhile.
        """
        lines = self.ptx.splitlines()
        labels = {m[1]: i for i, line in enumerate(lines) if (m := _LABEL.match(line))}
        looped: set[int] = set()
        for i, line in enumerate(lines):
            target = _BRANCH.search(line)
            if target and labels.get(target[1], i) < i:
                looped.update(range(labels[target[1]], i))
        bits = []
        for i in sorted(looped):
            if copy := _COPY.search(lines[i]):
                bits.append(8 * int(copy["bytes"], 16))
            elif not copies and (load := _LOAD.search(lines[i])):
                bits.append(int(load["registers"] or 1) * int(load["bits"]))
        return [max(x, 32) for x in bits]

    def has_matrix_instructions(self) -> bool:
        """Whether any multiplication runs on the tensor cores."""
        return _MATRIX.search(self.ptx) is not None

    def resident_programs(self, shared_memory: int) -> int:
        """Programs that fit on one multiprocessor at a time."""
        registers = -(-self.registers // 8) * 8 * self.threads
        by_shared = shared_memory // max(self.shared_bytes + 1024, 1)
        return min(65536 // registers, 2048 // self.threads, by_shared, 32)


def source(launch: Launch) -> ASTSource:
    """The launch as Triton's own binder would specialise it, with every pointer 16-byte aligned."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attrs: dict[tuple[int, ...], list] = {}
    for i, (param, arg) in enumerate(zip(launch.kernel.params, launch.args, strict=True)):
        if param.is_constexpr or arg is None or (type(arg) is int and arg == 1):
            signature[param.name], constants[param.name] = "constexpr", arg
        elif isinstance(arg, torch.Tensor):
            signature[param.name] = _TYPES[arg.dtype]
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(arg, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32" if arg < 2**31 else "i64"
            if arg % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attrs)


def compile_launch(launch: Launch, capability: int) -> Report:
    """Compile for a CUDA compute capability such as 90, through Triton's cache."""
    target = GPUTarget("cuda", capability, 32)

    def compile_with(options: dict[str, Any]) -> tuple[Report, int, int]:
        kernel = triton.compile(source(launch), target=target, options=options)
        report = _report(launch, kernel)
        return report, report.registers, report.spills

    return without_spills(compile_with, {"num_stages": 3} | launch.options)


def _report(launch: Launch, kernel: Any) -> Report:
    cubin = kernel.asm["cubin"]
    usage = tool("cuobjdump", cubin, "-res-usage")
    fields = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    return Report(
        kernel=kernel.metadata.name,
        programs=launch.grid[0] * launch.grid[1] * launch.grid[2],
        threads=32 * kernel.metadata.num_warps,
        registers=fields["REG"],
        spills=fields["STACK"] + fields["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        ptx=kernel.asm["ptx"],
        cubin=cubin,
    )


def tool(name: str, cubin: bytes, *options: str) -> str:
    """Output of one of the binary tools that come with Triton."""
    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [path, *options, file.name], check=True, capture_output=True, text=True
        ).stdout


def _meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_DELAY = 3  # of steps with every option


def _ring_arguments(N: int, E: int, H: int, L: int, dtype: torch.dtype) -> list[Any]:
    """Self-attention's weights with biases, and the state without a delay."""
    ring = _meta(dtype, N, H, L, E // H)
    return [
        _meta(dtype, 3 * E, E), None, None, _meta(dtype, 3 * E), _meta(dtype, E, E),
        _meta(dtype, E), None, None, ring, ring, _meta(dtype, N, 0, E), _meta(torch.int64, N),
    ]  # fmt: skip


def step_launches(
    N: int,
    E: int,
    H: int,
    L: int,
    dtype: torch.dtype,
    path: str | None = None,
    codes: torch.dtype | None = None,
    full: bool = False,
    kdim: int | None = None,
) -> list[Launch]:
    """Our launches of one step; `path` as in `step_plan`, or "invariant".

    `codes` is the dtype of rings of 8 bits; `full`: a delay, extra slots, paused streams, dropout;
    `kdim`: features of keys and values, which are tokens of their own then.
    """
    token = key = _meta(dtype, N, E)
    invariant, plan = path == "invariant", None
    if not invariant:
        sizes = (N, E, H, L, dtype.itemsize, path, 0, (codes or dtype).itemsize)
        plan = step_plan(*sizes, little=little_memory(token))
    args = _ring_arguments(N, E, H, L, dtype)
    if kdim is not None:
        key = _meta(dtype, N, kdim)
        args[:3] = _meta(dtype, E, E), *(2 * [_meta(dtype, E, kdim)])
    scale = None
    if codes is not None:
        args[8] = args[9] = _meta(codes, N, H, L, E // H)
        scale = _meta(torch.float32, N, H, L, 1)
    options: list[Any] = [None, False, 0.0]
    if full:
        args[6:8] = 2 * [_meta(dtype, 1, 1, E)]
        args[10] = _meta(dtype, N, _DELAY + 1, E)
        options = [_meta(torch.bool, N), True, 0.1]
    with record() as launches:
        ring_step_(*[token, key, key, *args, *options, True, scale, scale, invariant, plan])
    return launches


def input_step_launches(
    N: int,
    E: int,
    H: int,
    L: int,
    dtype: torch.dtype,
    path: str | None = None,
    codes: torch.dtype | None = None,
    full: bool = False,
    update: bool = True,
) -> list[Launch]:
    """Our launches of one step over inputs; `codes` is the dtype of a ring of 8 bits.

    `path` as in `input_plan`, or "invariant"; `full` as in `step_launches`; `update` of the state.
    """
    ring, scale = _meta(codes or dtype, N, L, E), None
    if codes is not None:
        scale = _meta(torch.float32, N, L, 1)
    extra: list[Any] = 2 * [_meta(dtype, 1, 1, E) if full else None]
    args = [
        _meta(dtype, N, E), _meta(dtype, 3 * E, E), _meta(dtype, 3 * E), _meta(dtype, E, E),
        _meta(dtype, E), *extra, ring, _meta(torch.int64, N), H,
    ]  # fmt: skip
    options = [_DELAY, _meta(torch.bool, N), True, 0.1] if full else [0, None, False, 0.0]
    invariant, plan = path == "invariant", None
    if not invariant:
        sizes = (N, E, H, L, dtype.itemsize, codes is not None, path)
        plan = input_plan(*sizes, little=little_memory(ring))
    with record() as launches:
        input_step_(*[*args, *options, update, scale, invariant, plan])
    return launches


def steps_launches(
    N: int,
    T: int,
    E: int,
    H: int,
    L: int,
    dtype: torch.dtype,
    codes: torch.dtype | None = None,
    dropout_p: float = 0.0,
    slots: str = "",
) -> list[Launch]:
    """Our launches for T tokens at once; `codes` is the dtype of rings of 8 bits.

    `slots` names extra ones: "zero", or "bias zero", which comes with a delay too.
    """
    clip, args = _meta(dtype, N, T, E), _ring_arguments(N, E, H, L, dtype)
    if "bias" in slots:
        args[6:8] = 2 * [_meta(dtype, 1, 1, E)]
        args[10] = _meta(dtype, N, _DELAY + 1, E)
    args += [0, "zero" in slots, dropout_p, True]
    if codes is not None:
        ring, scale = _meta(codes, N, H, L, E // H), _meta(torch.float32, N, H, L, 1)
        args[8:10], args[16:] = [ring, ring], [scale, scale]
    with record() as launches:
        ring_steps_(*[clip, clip, clip, *args])
    return launches


def window_launches(
    N: int, T: int, H: int, D: int, L: int, dtype: torch.dtype, full: bool = False
) -> list[Launch]:
    """Our launches of `attend_window` and its backward; `full`: sink, dropout, rings' gradients."""
    clip, ring = _meta(dtype, N, T, H, D), _meta(dtype, N, H, L, D)
    wide = torch.promote_types(dtype, torch.float32)
    options = [_meta(wide, N, T, H), _meta(torch.int64, 1)] if full else [None, None]
    args: list[Any] = [clip, clip, clip, ring, ring, _meta(torch.int64, N), *options]
    with record() as launches:
        out, lse = attend_window(*[*args, 0, 0.1])
        grads: list[Any] = [out, lse if full else None]
        attend_window_backward(*[*grads, *args, out, lse, 0, 0.1, full])
    return launches


def shared_launches(
    N: int,
    H: int,
    S: int,
    E: int,
    dtype: torch.dtype,
    one_tensor: bool = True,
    full: bool = False,
    frozen: bool = False,
) -> list[Launch]:
    """Our launches of `attend_shared`, or of `attend_shared_full`, and of the backward.

    With `frozen` keys and values that of the query alone.
    """
    query, key = _meta(dtype, N, H, E), _meta(dtype, N, S, E)
    args: list[Any] = [query, key, None if one_tensor else _meta(dtype, N, S, E), None, None]
    args.append(_meta(torch.int64, 1) if full else None)
    with record() as launches:
        out, lse, kept, average = attend_shared_full(*[*args, 0.1, full])
        grads = [out, lse, kept if full else None, average if full else None]
        backward = attend_shared_query_backward if frozen else attend_shared_full_backward
        backward(*[*grads, *args, out, lse, kept, 0.1])
    return launches
