"""Predictions for an H100 from the compiled kernels; nothing here is measured.

``python -m continual_mha.triton_kernels.report`` writes the tables of docs/triton.md anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from . import aot
from .launch import Launch
from .plan import MULTIPROCESSORS, ONE_LAUNCH, SHARED_MEMORY, StepPlan, step_plan

CAPABILITY = 90
# What the predictions assume of an H100 SXM: seconds, bytes and operations per second.
GRAPH_NODE = 1.0e-6
ROUND_TRIP = 0.35e-6  # one dependent access to the second-level cache
READ_BANDWIDTH = 0.9 * 3.35e12
PROGRAM_BANDWIDTH = 90e9  # what one multiprocessor draws from the second-level cache
CACHE_BANDWIDTH = 5.5e12  # what that cache gives to all of them
MATRIX_RATE = 500e12
# Accesses that wait for one another: position, ring or weights, and where parts are merged the
# counter, the shares and the parts.
CHAIN = {"fused": 7, "group": 7, "chain": 9, "gemm": 8}
LAUNCHES = {"fused": 1, "group": 1, "chain": 3, "gemm": 4}
SHAPES = (
    (512, 8, 32),
    (1024, 8, 64),
    (192, 16, 120),
    (512, 8, 250),
    (512, 8, 1024),
    (512, 8, 4096),
)
STREAMS = (1, 8, 64, 512, 4096)
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def _programs(plan: StepPlan, N: int, H: int) -> int:
    """Programs of the kernel that reads the ring."""
    return -(-N // plan.group) * H * (plan.splits + 2 * plan.spread)


def predicted_step(
    N: int, E: int, H: int, L: int, itemsize: int, path: str | None = None
) -> tuple[float, float, float]:
    """Bytes moved, floating-point operations and seconds of one step of `N` streams."""
    plan = step_plan(N, E, H, L, itemsize, path)
    weights = 4 * E * E * itemsize
    ring = 2 * N * L * E * itemsize
    flops = N * (8 * E * E + 4 * L * E)
    programs = _programs(plan, N, H)
    per_program = ring / programs
    merged = 0.0  # bytes that the last program to arrive reads
    if plan.path in ONE_LAUNCH:
        per_program += weights / H / (2 if plan.spread else 1)
        merged = plan.group * H * (plan.splits + plan.spread) * E * 4
    busiest = -(-programs // MULTIPROCESSORS) * per_program
    tiles = -(-L // (plan.splits * plan.block_l))  # one after the other, the next on its way
    latency = (CHAIN[plan.path] + tiles - 1) * ROUND_TRIP
    latency += (busiest + merged) / PROGRAM_BANDWIDTH
    throughput = (weights + ring) / READ_BANDWIDTH + N * 8 * E * E / MATRIX_RATE
    throughput = max(throughput, programs * per_program / CACHE_BANDWIDTH)
    seconds = LAUNCHES[plan.path] * GRAPH_NODE + max(latency, throughput)
    return weights + ring, flops, seconds


def step_table(dtype: torch.dtype = torch.bfloat16) -> str:
    """One row per shape: what a step moves and computes, and how long that should take."""
    rows = [
        "| E, H, L | N | path | programs | bytes | flops | predicted µs |",
        "|---|---|---|---|---|---|---|",
    ]
    for E, H, L in SHAPES:
        for N in STREAMS:
            if 2 * N * L * E * dtype.itemsize > 64e9:
                continue
            plan = step_plan(N, E, H, L, dtype.itemsize)
            size, flops, seconds = predicted_step(N, E, H, L, dtype.itemsize)
            programs = _programs(plan, N, H)
            rows.append(
                f"| {E}, {H}, {L} | {N} | {plan.path} | {programs} | {size:.3g} | {flops:.3g} "
                f"| {seconds * 1e6:.1f} |"
            )
    return "\n".join(rows)


def kernel_rows(name: str, launches: list[Launch], tile_bytes: int = 0) -> list[str]:
    """One row per kernel: what the compiler made of it, and the bytes it keeps in flight."""
    rows = []
    for launch in launches:
        report = aot.compile_launch(launch, CAPABILITY)
        resident = report.resident_programs(SHARED_MEMORY[CAPABILITY])
        ring = report.kernel in ("_ring_step_kernel", "_group_step_kernel") and tile_bytes
        in_flight = f"{resident * tile_bytes / 1024:.0f} KiB" if ring else ""
        rows.append(
            f"| {name} | `{report.kernel}` | {report.programs} | {report.threads} "
            f"| {report.registers} | {report.shared_bytes} | {resident} | {in_flight} |"
        )
    return rows


def kernel_table(dtype: torch.dtype = torch.bfloat16) -> str:
    """One row per kernel and representative shape."""
    rows = [
        "| case | kernel | programs | threads | registers | shared bytes | per SM | in flight |",
        "|---|---|---|---|---|---|---|---|",
    ]
    few = ((1, 512, 8, 32), (64, 192, 16, 120), (8, 1024, 8, 64))
    for N, E, H, L in (*few, *((512, *shape) for shape in SHAPES)):
        plan = step_plan(N, E, H, L, dtype.itemsize)
        tile = 2 * plan.group * min(plan.block_l, L) * (E // H) * dtype.itemsize
        name = f"step N={N} E={E} H={H} L={L}"
        rows += kernel_rows(name, aot.step_launches(N, E, H, L, dtype), tile)
    rows += kernel_rows("256 tokens, E=512", aot.steps_launches(8, 256, 512, 8, 64, dtype))
    for E in (512, 1024, 2048):
        name = f"single query N=256 L=64 E={E}"
        rows += kernel_rows(name, aot.shared_launches(256, 8, 64, E, dtype))
    return "\n".join(rows)


def main(path: str = "docs/triton.md") -> None:
    """Replace what stands between the markers of the page."""
    page = Path(path)
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    tables = (
        f"\n\n### Kernels, bf16, sm_90\n\n{kernel_table()}\n\n### Steps, bf16\n\n{step_table()}\n\n"
    )
    page.write_text(before + BEGIN + tables + END + after)


if __name__ == "__main__":
    main(*sys.argv[1:])
