"""Compile recorded launches without a GPU and read what the compiler made of them."""

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

from .launch import Launch

_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class Report(NamedTuple):
    """What the compiler says of one kernel for one architecture."""

    kernel: str
    programs: int
    threads: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    ptx: str
    sass: str


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
    options = {"num_stages": 3} | launch.options
    kernel = triton.compile(source(launch), target=target, options=options)
    cubin = kernel.asm["cubin"]
    usage = _tool("cuobjdump", cubin, "-res-usage")
    fields = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    return Report(
        kernel=kernel.metadata.name,
        programs=launch.grid[0] * launch.grid[1] * launch.grid[2],
        threads=32 * kernel.metadata.num_warps,
        registers=fields["REG"],
        spilled_bytes=fields.get("STACK", 0) + fields.get("LOCAL", 0),
        shared_bytes=kernel.metadata.shared,
        ptx=kernel.asm["ptx"],
        sass=_tool("nvdisasm", cubin, "-c"),
    )


def _tool(name: str, cubin: bytes, *options: str) -> str:
    """Output of one of the binary tools that come with Triton."""
    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [path, *options, file.name], check=True, capture_output=True, text=True
        ).stdout
