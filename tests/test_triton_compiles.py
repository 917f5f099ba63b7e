"""Every row of the Triton plan compiles for each architecture, and to the instructions intended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from continual_mha.triton_kernels import aot, plan
from continual_mha.triton_kernels.eight_bits import CODES
from continual_mha.triton_kernels.launch import INTERPRETED, Launch

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
HALF, FULL = torch.bfloat16, torch.float32
# N, E, H, L: with and without programs of the new token's own, and with a split window.
FUSED = {
    HALF: [(1, 512, 8, 32), (1, 512, 8, 4096), (10, 512, 8, 32), (8, 192, 16, 120)],
    FULL: [(1, 512, 8, 32), (1, 512, 8, 4096)],
}
GROUPS = [
    (32, 192, 16, 120, HALF, None),
    (64, 256, 8, 64, HALF, None),
    (128, 256, 8, 64, HALF, torch.int8),
    (64, 256, 2, 64, HALF, torch.uint8),
    (64, 256, 8, 64, FULL, None),
]
WINDOWS = [
    (32, HALF, True),
    (64, HALF, True),
    (64, HALF, False),
    (256, HALF, True),
    (64, FULL, True),
]


def step_configurations() -> Iterator[tuple[str, list[Launch]]]:
    for dtype in (HALF, FULL):
        for head_dim in plan.RING_TILES:
            shape = (4096, 4 * head_dim, 4, 4096, dtype)
            yield f"ring-D{head_dim}-{dtype}", aot.step_launches(*shape, path="gemm")
        for N, E, H, L in FUSED[dtype]:
            shape = (N, E, H, L, dtype)
            yield f"fused-{N}-{E}-{H}-{L}-{dtype}", aot.step_launches(*shape, path="fused")
        for path in ("chain", "invariant"):
            yield f"{path}-{dtype}", aot.step_launches(8, 1024, 8, 4096, dtype, path=path)
    for codes, head_dims in zip(CODES, (plan.RING_TILES_8, (16, 128)), strict=True):
        for head_dim in head_dims:  # the loop is the same whatever the dtype of tokens
            shape = (4096, 4 * head_dim, 4, 4096, HALF)
            launches = aot.step_launches(*shape, path="gemm", codes=codes)
            yield f"ring-D{head_dim}-{codes}", launches
    launches = aot.step_launches(1, 512, 8, 4096, HALF, path="fused", codes=torch.uint8)
    yield "fused-1-512-8-4096-uint8", launches
    for N, E, H, L, dtype, codes in GROUPS:
        launches = aot.step_launches(N, E, H, L, dtype, path="group", codes=codes)
        yield f"group-{N}-{E}-{H}-{L}-{dtype}-{codes}", launches


def input_configurations() -> Iterator[tuple[str, list[Launch]]]:
    for dtype, rows in ((HALF, plan.INPUT_ROWS_16), (FULL, plan.INPUT_ROWS_32)):
        for E in rows:
            yield f"inputs-E{E}-{dtype}", aot.input_step_launches(4096, E, 8, 4096, dtype)
    for codes in (torch.int8, torch.uint8):
        for E in (512, 1024):
            launches = aot.input_step_launches(4096, E, 8, 4096, HALF, codes=codes)
            yield f"inputs-E{E}-{codes}", launches
    yield "inputs-split", aot.input_step_launches(1, 512, 8, 4096, HALF)
    yield "inputs-many-heads", aot.input_step_launches(512, 512, 16, 250, HALF)
    yield "inputs-fused", aot.input_step_launches(8192, 512, 8, 32, HALF, path="fused")
    yield "inputs-fused-int8", aot.input_step_launches(8192, 512, 8, 32, HALF, "fused", torch.int8)


def other_configurations() -> Iterator[tuple[str, list[Launch]]]:
    for dtype, blocks in ((HALF, plan.STEPS_BLOCKS_16), (FULL, plan.STEPS_BLOCKS_32)):
        for head_dim in blocks:
            yield (
                f"steps-D{head_dim}-{dtype}",
                aot.steps_launches(8, 256, 2 * head_dim, 2, 64, dtype),
            )
    # The rows that need most registers; steps with dropout are the same kernel as the forward here.
    for head_dim, dtype, full in WINDOWS:
        launches = aot.window_launches(8, 256, 2, head_dim, 64, dtype, full)
        yield f"window-D{head_dim}-{dtype}-{full}", launches
    for E in plan.SHARED_ROWS:
        yield f"shared-E{E}", aot.shared_launches(256, 8, 64, E, HALF)
    yield "shared-split", aot.shared_launches(1, 16, 4096, 1024, HALF)
    yield "shared-two-tensors", aot.shared_launches(256, 8, 64, 1024, HALF, one_tensor=False)
    yield "shared-many-heads", aot.shared_launches(256, 64, 64, 1024, HALF, one_tensor=False)
    yield "shared-fp32", aot.shared_launches(256, 8, 64, 1024, FULL)
    yield "shared-full", aot.shared_launches(256, 8, 64, 1024, HALF, full=True)
    yield "shared-full-heads", aot.shared_launches(256, 64, 64, 1024, HALF, False, full=True)
    yield "shared-full-fp32", aot.shared_launches(256, 8, 64, 1024, FULL, full=True)


CONFIGURATIONS = dict([*step_configurations(), *input_configurations(), *other_configurations()])


@pytest.mark.parametrize("capability", plan.SHARED_MEMORY)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration_fits_the_chip_and_uses_its_wide_paths(name: str, capability: int) -> None:
    for launch in CONFIGURATIONS[name]:
        report = aot.compile_launch(launch, capability)
        assert report.spills == 0, report.kernel
        assert report.resident_programs(plan.SHARED_MEMORY[capability]) >= 1, report.kernel
        reads_ring = report.kernel == "_ring_step_kernel"
        if reads_ring and not name.startswith("fused"):
            loads = report.loads_in_loops()
            eight_bits = launch.args[11].dtype in CODES  # with a scale for every row
            wide = "64" if eight_bits and name.startswith("ring-D8-") else "128"
            assert set(loads) == ({wide, "32"} if eight_bits else {wide})
            assert loads.count(wide) >= len(loads) / 2
        if report.kernel == "_input_step_kernel":  # narrower ones are queries, scales and parts
            assert report.loads_in_loops().count("128") >= 4
        copies = report.kernel == "_write_rings_kernel" or (reads_ring and "fused" not in name)
        if not copies and launch.args[0].dtype == HALF:
            assert report.has_matrix_instructions(), report.kernel
