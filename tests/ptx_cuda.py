"""Launches of the CUDA kernels, run as the PTX that nvcc compiles them to, without a GPU."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from ptx_machine import Machine, Program, parse
from ptx_memory import Memory
from test_cuda_compile import ptx
from test_cuda_emulation import Device, emulator


class Launch(NamedTuple):
    """What a kernel is started with."""

    kernel: str
    grid: int
    cluster: int
    threads: int
    shared_bytes: int
    parameters: bytes


def kernel_of(name: str, arch: int) -> str:
    """The PTX in which the kernel of a symbol is, and no other one."""
    for text in ptx(arch).values():
        head, *kernels = re.split(r"^(?=\.visible \.entry )", text, flags=re.MULTILINE)
        for kernel in kernels:
            if f".entry {name}(" in kernel:
                files = re.findall(r"^\s*\.file.*\n", text, re.MULTILINE)
                return "".join([head, kernel, *files])
    raise KeyError(name)


@cache
def _program(kernel: str, arch: int) -> Program:
    return parse(kernel_of(kernel, arch), kernel)


@lru_cache(maxsize=16)
def _machine(
    program: Callable[[str, int], Program], arch: int, launch: tuple[str, int, int, int, int]
) -> Machine:
    kernel, grid, cluster, threads, shared_bytes = launch
    return Machine(program(kernel, arch), (grid,), threads, shared_bytes, cluster=cluster)


class PtxDevice(Device):
    """Runs the kernels as PTX for a compute capability such as 90.

    All blocks at once, or one cluster after the other in any order.
    """

    def __init__(
        self,
        arch: int,
        one_by_one: bool = False,
        program: Callable[[str, int], Program] = _program,
    ) -> None:
        super().__init__(seed=0)
        self.arch, self.one_by_one, self.program = arch, one_by_one, program

    def addresses(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        self._memory = Memory(tensors)
        return [self._memory.address(tensor) for tensor in tensors]

    def call(
        self, name: str, tensors: Sequence[torch.Tensor | None], *numbers: Sequence[int]
    ) -> None:
        launches: list[Launch] = []

        @ctypes.CFUNCTYPE(None, ctypes.c_char_p, *[ctypes.c_int] * 4, ctypes.c_void_p, ctypes.c_int)
        def record(kernel: bytes, *rest: int) -> None:
            *sizes, parameters, count = rest
            launches.append(Launch(kernel.decode(), *sizes, ctypes.string_at(parameters, count)))

        emulator().record(record)
        try:
            super().call(name, tensors, *numbers)
        finally:
            emulator().record(None)
        for launch in launches:
            machine = _machine(self.program, self.arch, launch[:-1])
            machine.run(self._memory, [launch.parameters], self.one_by_one)
        self._memory.read_back()
