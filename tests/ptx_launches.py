"""Launches of Triton kernels, run as the PTX that Triton compiles them to, without a GPU."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from functools import lru_cache

import torch
from ptx_machine import Machine, parse
from ptx_memory import Memory

from bench import aot
from continual_mha.triton_kernels.launch import Launch, _here
from continual_mha.triton_kernels.ring_step import _load_ring, _load_scales


@lru_cache(maxsize=16)
def _machine(ptx: str, grid: tuple[int, ...], threads: int, shared_bytes: int) -> Machine:
    return Machine(parse(ptx), grid, threads, shared_bytes, _harmless)


@lru_cache(maxsize=4096)
def _harmless(source: str) -> bool:
    """The first tile of a ring is read whole, and the new token's slot of it not used."""
    file, line, _ = source.split(":")
    for function in (_load_ring, _load_scales):
        code, first = inspect.getsourcelines(function.fn)
        named = file == os.path.basename(inspect.getsourcefile(function.fn))
        if named and first <= int(line) < first + len(code):
            return True
    return False


def run(launch: Launch, capability: int, one_by_one: bool) -> None:
    """Do to the tensors of the launch what its machine code does."""
    report = aot.compile_launch(launch, capability)
    signature = aot.source(launch).signature
    names = [param.name for param in launch.kernel.params]
    given = [
        x for name, x in zip(names, launch.args, strict=True) if signature[name] != "constexpr"
    ]
    memory = Memory([x for x in given if isinstance(x, torch.Tensor)])
    parameters = [memory.address(x) if isinstance(x, torch.Tensor) else x for x in given]
    scratch = [0, 0]  # Triton's own, which no kernel here uses
    machine = _machine(report.ptx, launch.grid, report.threads, report.shared_bytes)
    machine.run(memory, [*parameters, *scratch], one_by_one)
    memory.read_back()


class _Runs(list):
    """Where launches are recorded: runs them at once."""

    def __init__(self, capability: int, one_by_one: bool) -> None:
        self.capability, self.one_by_one = capability, one_by_one
        self.count = 0

    def append(self, launch: Launch) -> None:
        run(launch, self.capability, self.one_by_one)
        self.count += 1


@contextlib.contextmanager
def as_ptx(capability: int, one_by_one: bool = False) -> Iterator[_Runs]:
    """Every launch of this thread runs as PTX for a compute capability such as 90."""
    previous, runs = _here.launches, _Runs(capability, one_by_one)
    _here.launches = runs
    try:
        yield runs
    finally:
        _here.launches = previous
