"""Predictions for an H100 from the compiled kernels; nothing here is measured.

``python -m bench.predictions`` writes the tables of docs/triton.md anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from continual_mha.triton_kernels.launch import Launch
from continual_mha.triton_kernels.plan import (
    MULTIPROCESSORS,
    ONE_LAUNCH,
    cdiv,
    input_plan,
    shared_backward_plan,
    shared_plan,
    step_plan,
    steps_plan,
)

from . import ROOT, aot, marked
from .grid import FAMILIES

CAPABILITY = 90
# What the predictions assume of an H100 SXM: seconds, bytes and operations per second.
GRAPH_NODE = 1.0e-6
ROUND_TRIP = 0.35e-6  # one dependent access to the second-level cache
READ_BANDWIDTH = 0.9 * 3.35e12
PROGRAM_BANDWIDTH = 90e9  # what one multiprocessor draws from the second-level cache
CACHE_BANDWIDTH = 5.5e12  # what that cache gives to all of them
MATRIX_RATE = 500e12
# Accesses that wait for one another: the first loads, the output weights, and where parts are
# merged what they store, the counter, the shares and the parts.
CHAIN = {"fused": 6, "group": 6, "chain": 8, "gemm": 7}
LAUNCHES = {"fused": 1, "group": 1, "chain": 3, "gemm": 4}
INPUT_CHAIN = {"fused": 9, "gemm": 13}
INPUT_LAUNCHES = {"fused": 3, "gemm": 5}
# Of a clip: the query's projection, its move to the tokens, attention, values, output. Two of each
# of four products' gradients, the query's token's added to the clip's; the attention's in two;
# three sums over streams for biases, whose keys' are zeros.
FORWARD_LAUNCHES, BACKWARD_LAUNCHES = 5, 14
STEPS_LAUNCHES = 5  # projection, attention, ring, position, output
PER_LAUNCH = 2  # accesses of a launch that wait for one another: its operands, their successors
CLIP_TOKENS = 256
SHAPES = tuple(family[1:] for family in FAMILIES)
STREAMS = (1, 8, 64, 512, 4096)


class Prediction(NamedTuple):
    """What a call moves and computes, and how long that should take."""

    bytes: float
    flops: float
    seconds: float


def seconds_of(launches: int, chain: int, drawn: float, size: float, matrix_flops: float) -> float:
    """Launches, and the larger of latency and throughput.

    Latency: `chain` dependent accesses, and `drawn` bytes that the busiest multiprocessor takes
    from the second-level cache. Throughput: bytes from memory, and work of the matrix unit.
    """
    latency = chain * ROUND_TRIP + drawn / PROGRAM_BANDWIDTH
    return launches * GRAPH_NODE + max(latency, size / READ_BANDWIDTH + matrix_flops / MATRIX_RATE)


def predicted_step(
    N: int, E: int, H: int, L: int, itemsize: int, path: str | None = None
) -> Prediction:
    """One step of `N` streams over keys and values."""
    plan = step_plan(N, E, H, L, itemsize, path)
    weights = 4 * E * E * itemsize
    ring = 2 * N * L * E * itemsize
    flops = N * (8 * E * E + 4 * L * E)
    programs = plan.programs(N, H)
    per_program = ring / programs
    merged = 0.0  # bytes that the last program to arrive reads
    if plan.path in ONE_LAUNCH:
        per_program += weights / H / (2 if plan.spread else 1)
        merged = plan.group * H * plan.merged * E * 4
    busiest = -(-programs // MULTIPROCESSORS) * per_program
    tiles = -(-L // (plan.splits * plan.block_l))  # one after the other, the next on its way
    latency = (CHAIN[plan.path] + tiles - 1) * ROUND_TRIP
    latency += (busiest + merged) / PROGRAM_BANDWIDTH
    throughput = (weights + ring) / READ_BANDWIDTH + N * 8 * E * E / MATRIX_RATE
    throughput = max(throughput, programs * per_program / CACHE_BANDWIDTH)
    seconds = LAUNCHES[plan.path] * GRAPH_NODE + max(latency, throughput)
    return Prediction(weights + ring, flops, seconds)


def predicted_input_step(
    N: int, E: int, H: int, L: int, itemsize: int, codes: bool = False
) -> Prediction:
    """One step of `N` streams over inputs, of 8 bits if `codes`."""
    plan = input_plan(N, E, H, L, itemsize, codes)
    fused = plan.path == "fused"
    blocks = cdiv(H, plan.block_h)
    ring = N * L * (E + 4 if codes else E * itemsize)
    size = 4 * E * E * itemsize + ring
    if not fused:  # moved queries and mixed inputs, each written and read
        size += 4 * N * H * E * itemsize
    flops = N * (8 * E * E + 4 * H * L * E)
    programs = cdiv(N, plan.block_n) if fused else N * blocks * plan.splits
    per_program = ring * (1 if fused else blocks) / programs
    if fused:
        per_program += 2 * E * E * itemsize
    drawn = cdiv(programs, MULTIPROCESSORS) * per_program
    launches = INPUT_LAUNCHES[plan.path] + (blocks > 1)
    seconds = seconds_of(launches, INPUT_CHAIN[plan.path], drawn, size, flops)
    return Prediction(size, flops, seconds)


def predicted_clip(
    N: int, E: int, H: int, S: int, itemsize: int, backward: bool = False
) -> Prediction:
    """One query over a clip of `S` tokens, whose key is its value; with all gradients."""
    plan = shared_plan(N, H, S, E, E, itemsize, True)
    weights, clip, rows = 4 * E * E, N * S * E, 4 * N * H * E
    size: float = weights + clip + rows
    flops = N * (8 * E * E + 4 * H * S * E)
    launches = FORWARD_LAUNCHES
    programs = N * plan.splits * cdiv(E, plan.block_v) * cdiv(H, plan.block_h)
    drawn = cdiv(programs, MULTIPROCESSORS) * clip / (N * plan.splits)
    if backward:
        # the clip once more and its gradient; weights read and written
        size += 2 * weights + 2 * clip + 2 * rows
        flops += N * (16 * E * E + 10 * H * S * E)
        launches += BACKWARD_LAUNCHES
        splits = shared_backward_plan(N, H, S, E, itemsize, True).splits
        drawn += cdiv(N * splits, MULTIPROCESSORS) * clip / (N * splits)
        if splits > 1:  # parts of the moved query's gradient in fp32 are written, read and added
            size += 2 * N * splits * H * E * 4 / itemsize
            launches += 1
    chain = launches * PER_LAUNCH
    seconds = seconds_of(launches, chain, drawn * itemsize, size * itemsize, flops)
    return Prediction(size * itemsize, flops, seconds)


def predicted_steps(N: int, T: int, E: int, H: int, L: int, itemsize: int) -> Prediction:
    """`T` tokens of `N` streams at once, over keys and values."""
    plan = steps_plan(T, E // H, itemsize, False)
    clip, kept = N * T * E, N * min(T, L) * E
    # token, query, key and value, and output, each written and read; the ring read and written
    size = (4 * E * E + 10 * clip + 2 * N * L * E + 2 * kept) * itemsize
    flops = N * T * (8 * E * E + 4 * L * E)
    blocks = cdiv(T, plan.block_t)
    seen = 2 * (L + plan.block_t) * (E // H) * itemsize  # keys and values of one program
    drawn = cdiv(N * H * blocks, 2 * MULTIPROCESSORS) * seen
    seconds = seconds_of(STEPS_LAUNCHES, STEPS_LAUNCHES * PER_LAUNCH, drawn, size, flops)
    return Prediction(size, flops, seconds)


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
            rows.append(
                f"| {E}, {H}, {L} | {N} | {plan.path} | {plan.programs(N, H)} | {size:.3g} "
                f"| {flops:.3g} | {seconds * 1e6:.1f} |"
            )
    return "\n".join(rows)


def input_table(dtype: torch.dtype = torch.bfloat16) -> str:
    """One row per shape: the step over inputs, beside that over keys and values."""
    rows = [
        "| E, H, L | N | path | bytes | flops | predicted µs | int8, µs | keys and values, µs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for E, H, L in SHAPES:
        for N in STREAMS:
            shape = (N, E, H, L, dtype.itemsize)
            plain, codes, kv = (
                predicted_input_step(*shape),
                predicted_input_step(*shape, codes=True),
                predicted_step(*shape),
            )
            rows.append(
                f"| {E}, {H}, {L} | {N} | {input_plan(*shape).path} | {plain.bytes:.3g} "
                f"| {plain.flops:.3g} | {plain.seconds * 1e6:.1f} | {codes.seconds * 1e6:.1f} "
                f"| {kv.seconds * 1e6:.1f} |"
            )
    return "\n".join(rows)


def clip_table(dtype: torch.dtype = torch.bfloat16) -> str:
    """One row per shape: `forward` without and with gradients, and many tokens at once."""
    calls = ("forward", "forward and backward", f"{CLIP_TOKENS} tokens")
    rows = [
        "| E, H, L | N |" + "".join(f" {call}: bytes | flops | µs |" for call in calls),
        "|---|---|" + 3 * len(calls) * "---|",
    ]
    for E, H, L in SHAPES:
        for N in STREAMS:
            if N * max(L, CLIP_TOKENS) * E * dtype.itemsize > 8e9:
                continue  # with its gradients it would not fit into memory
            shape = (N, E, H, L, dtype.itemsize)
            predictions = (
                predicted_clip(*shape),
                predicted_clip(*shape, backward=True),
                predicted_steps(N, CLIP_TOKENS, E, H, L, dtype.itemsize),
            )
            cells = "".join(
                f" {p.bytes:.3g} | {p.flops:.3g} | {p.seconds * 1e6:.1f} |" for p in predictions
            )
            rows.append(f"| {E}, {H}, {L} | {N} |{cells}")
    return "\n".join(rows)


# Of these the resident programs can each have whole tiles under way.
STREAMING = (
    "_ring_step_kernel", "_group_step_kernel", "_input_step_kernel", "_attend_shared_kernel",
    "_one_tile_backward_kernel", "_rows_backward_kernel",
)  # fmt: skip


def kernel_rows(name: str, launches: list[Launch], ahead: int = 0) -> list[str]:
    """One row per kernel: what the compiler made of it, and the bytes it keeps in flight.

    `ahead`: bytes that a program asks for before it needs them.
    """
    rows = []
    for launch in launches:
        report = aot.compile_launch(launch, CAPABILITY)
        resident = report.resident_programs(aot.SHARED_MEMORY[CAPABILITY])
        streams = report.kernel in STREAMING and ahead
        in_flight = f"{resident * ahead / 1024:.0f} KiB" if streams else ""
        rows.append(
            f"| {name} | `{report.kernel}` | {report.programs} | {report.threads} "
            f"| {report.registers} | {report.shared_bytes} | {resident} | {in_flight} |"
        )
    return rows


INPUT_CASES = (
    (1, 512, 8, 32, None),
    (512, 512, 8, 250, None),
    (512, 512, 8, 250, torch.int8),
    (8192, 512, 8, 32, None),
    (512, 1024, 8, 64, None),
    (512, 2048, 16, 64, None),
)


KERNEL_COLUMNS = [
    "| case | kernel | programs | threads | registers | shared bytes | per SM | in flight |",
    "|---|---|---|---|---|---|---|---|",
]


def input_rows(
    N: int, E: int, H: int, L: int, codes: torch.dtype | None, dtype: torch.dtype
) -> list[str]:
    """Rows of a step over inputs."""
    plan = input_plan(N, E, H, L, dtype.itemsize, codes is not None)
    tiles = min(max(plan.stages - 1, 1), cdiv(L, plan.block_s))
    tile = tiles * min(plan.block_s, L) * E * (codes or dtype).itemsize
    name = f"inputs N={N} E={E} H={H} L={L}" + (", int8" if codes else "")
    return kernel_rows(name, aot.input_step_launches(N, E, H, L, dtype, codes=codes), tile)


def clip_rows(E: int, dtype: torch.dtype) -> list[str]:
    """Rows of a single query over a clip, and of its gradients."""
    name, sizes = f"single query N=256 L=64 E={E}", (dtype.itemsize, True)
    *forward, backward = aot.shared_launches(256, 8, 64, E, dtype)
    rows = []
    for launches, plan in (
        (forward, shared_plan(256, 8, 64, E, E, *sizes)),
        ([backward], shared_backward_plan(256, 8, 64, E, *sizes)),
    ):  # fmt: skip
        tiles = min(plan.stages - 1, cdiv(64, plan.block_s))
        tile = tiles * min(plan.block_s, 64) * E * dtype.itemsize
        rows += kernel_rows(name, launches, tile)
    return rows


def fp32_table() -> str:
    """The same for the kernels whose scores threads compute in fp32."""
    rows = KERNEL_COLUMNS.copy()
    for N, E, H, L in ((512, 512, 8, 250), (512, 1024, 8, 64)):
        rows += input_rows(N, E, H, L, None, torch.float32)
    for E in (512, 1024):
        rows += clip_rows(E, torch.float32)
    return "\n".join(rows)


def kernel_table(dtype: torch.dtype = torch.bfloat16) -> str:
    """One row per kernel and representative shape."""
    rows = KERNEL_COLUMNS.copy()
    few = ((1, 512, 8, 32), (64, 192, 16, 120), (8, 1024, 8, 64))
    for N, E, H, L in (*few, *((512, *shape) for shape in SHAPES)):
        plan = step_plan(N, E, H, L, dtype.itemsize)
        tile = 2 * plan.group * min(plan.block_l, L) * (E // H) * dtype.itemsize
        name = f"step N={N} E={E} H={H} L={L}"
        rows += kernel_rows(name, aot.step_launches(N, E, H, L, dtype), tile)
    for N, E, H, L, codes in INPUT_CASES:
        rows += input_rows(N, E, H, L, codes, dtype)
    rows += kernel_rows("256 tokens, E=512", aot.steps_launches(8, 256, 512, 8, 64, dtype))
    for full in (False, True):
        name = "256 tokens, E=512, gradients" + (", dropout" if full else "")
        rows += kernel_rows(name, aot.window_launches(8, 256, 8, 64, 64, dtype, full))
    eight_bits = aot.steps_launches(8, 256, 512, 8, 64, dtype, torch.int8)
    rows += kernel_rows("256 tokens, E=512, int8", eight_bits[1:])
    for E in (512, 1024, 2048):
        rows += clip_rows(E, dtype)
    full_launches = aot.shared_launches(256, 8, 64, 1024, dtype, full=True)
    rows += kernel_rows("the same with dropout and weights, E=1024", full_launches)
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    """Replace what stands between the markers of the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, nargs="?", default=ROOT / "docs" / "triton.md")
    page = parser.parse_args(arguments).page
    tables = "".join(
        f"\n### {title}\n\n{table}\n"
        for title, table in (
            ("Kernels, bf16, sm_90", kernel_table()),
            ("Scores in fp32, sm_90", fp32_table()),
            ("Steps, bf16", step_table()),
            ("Steps over inputs, bf16", input_table()),
            ("Clips, bf16", clip_table()),
        )
    )
    page.write_text(marked.replaced(page.read_text(), {"predictions": tables}.get))


if __name__ == "__main__":
    main()
