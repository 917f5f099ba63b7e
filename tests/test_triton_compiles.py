"""Every row of the Triton plan compiles for each architecture, and to the instructions intended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from continual_mha.triton_kernels import aot, plan
from continual_mha.triton_kernels.launch import INTERPRETED, Launch

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
HALF, FULL = torch.bfloat16, torch.float32
# N, E, H, L: with and without programs of the new token's own, and with a split window.
FUSED = {
    HALF: [(1, 512, 8, 32), (1, 512, 8, 4096), (10, 512, 8, 32), (8, 192, 16, 120)],
    FULL: [(1, 512, 8, 32), (1, 512, 8, 4096)],
}


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


def other_configurations() -> Iterator[tuple[str, list[Launch]]]:
    for dtype, blocks in ((HALF, plan.STEPS_BLOCKS_16), (FULL, plan.STEPS_BLOCKS_32)):
        for head_dim in blocks:
            yield (
                f"steps-D{head_dim}-{dtype}",
                aot.steps_launches(8, 256, 2 * head_dim, 2, 64, dtype),
            )
    for E in plan.SHARED_ROWS:
        yield f"shared-E{E}", aot.shared_launches(256, 8, 64, E, HALF)
    yield "shared-split", aot.shared_launches(1, 16, 4096, 1024, HALF)
    yield "shared-two-tensors", aot.shared_launches(256, 8, 64, 1024, HALF, one_tensor=False)
    yield "shared-many-heads", aot.shared_launches(256, 64, 64, 1024, HALF, one_tensor=False)
    yield "shared-fp32", aot.shared_launches(256, 8, 64, 1024, FULL)
    yield "shared-full", aot.shared_launches(256, 8, 64, 1024, HALF, full=True)
    yield "shared-full-heads", aot.shared_launches(256, 64, 64, 1024, HALF, False, full=True)
    yield "shared-full-fp32", aot.shared_launches(256, 8, 64, 1024, FULL, full=True)


CONFIGURATIONS = dict([*step_configurations(), *other_configurations()])


@pytest.mark.parametrize("capability", plan.SHARED_MEMORY)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration_fits_the_chip_and_uses_its_wide_paths(name: str, capability: int) -> None:
    for launch in CONFIGURATIONS[name]:
        report = aot.compile_launch(launch, capability)
        assert report.spills == 0, report.kernel
        assert report.resident_programs(plan.SHARED_MEMORY[capability]) >= 1, report.kernel
        reads_ring = report.kernel == "_ring_step_kernel"
        if reads_ring and not name.startswith("fused"):
            assert set(report.loads_in_loops()) == {"128"}
        copies = report.kernel == "_write_rings_kernel" or (reads_ring and "fused" not in name)
        if not copies and launch.args[0].dtype == HALF:
            assert report.has_matrix_instructions(), report.kernel
