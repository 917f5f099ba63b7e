"""Every row of the Triton plan compiles for each architecture, and to the instructions intended."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain, product
from typing import Any

import pytest
import torch

from bench import aot
from continual_mha.triton_kernels import plan
from continual_mha.triton_kernels.attend_shared_backward import _one_tile_backward_kernel
from continual_mha.triton_kernels.eight_bits import CODES
from continual_mha.triton_kernels.input_step import _asked_kernel
from continual_mha.triton_kernels.launch import INTERPRETED, Launch, pretended_little_memory
from continual_mha.triton_kernels.ring_steps import ring_steps_kernel

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
HALF, FULL = torch.bfloat16, torch.float32
# N, E, H, L: with and without programs of the new token's own, and with a split window.
FUSED = {
    HALF: [
        (1, 512, 8, 32), (1, 512, 8, 4096), (10, 512, 8, 32), (8, 192, 16, 120), (1, 320, 4, 64),
        (4, 160, 1, 250),
    ],
    FULL: [(1, 512, 8, 32), (1, 512, 8, 4096), (2, 256, 8, 64)],
}  # fmt: skip
GROUPS = [
    (32, 192, 16, 120, HALF, None),
    (64, 256, 8, 64, HALF, None),
    (128, 256, 8, 64, HALF, torch.int8),
    (64, 256, 2, 64, HALF, torch.uint8),
    (64, 256, 8, 64, FULL, None),
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
    launches = aot.step_launches(100, 80, 1, 64, HALF, path="group", kdim=1024)
    yield "group-wide-keys", launches
    for N, E, H, L, dtype, codes in GROUPS:
        launches = aot.step_launches(N, E, H, L, dtype, path="group", codes=codes)
        yield f"group-{N}-{E}-{H}-{L}-{dtype}-{codes}", launches


def full_configurations() -> Iterator[tuple[str, list[Launch]]]:
    """Steps with every option at once, which take registers besides; not what copies alone."""
    for path, shape in (
        ("fused", (1, 512, 8, 32)), ("group", (64, 256, 8, 64)), ("gemm", (4096, 1024, 4, 250)),
    ):  # fmt: skip
        for dtype in (HALF, FULL):
            yield f"full-{path}-{dtype}", aot.step_launches(*shape, dtype, path, full=True)
    launches = aot.step_launches(64, 256, 8, 64, HALF, "group", torch.int8, full=True)
    yield "full-group-int8", launches
    for path, shape, dtype, codes in (
        ("gemm", (512, 512, 8, 250), HALF, None),
        ("gemm", (512, 1024, 8, 250), HALF, None),
        ("gemm", (512, 256, 8, 250), FULL, None),
        ("gemm", (512, 512, 8, 250), FULL, None),
        ("gemm", (512, 512, 8, 250), HALF, torch.int8),
        ("fused", (8192, 512, 8, 32), HALF, None),
    ):
        launches = aot.input_step_launches(*shape, dtype, path, codes, full=True)
        name = f"full-inputs-{path}-{shape[1]}-{dtype}-{codes}"
        yield name, [x for x in launches if x.kernel is not _asked_kernel]


def input_configurations(little: bool = False) -> Iterator[tuple[str, list[Launch]]]:
    in_half = plan.tile_rows(2, little)
    widest = max(in_half)
    for dtype in (HALF, FULL):
        for E in plan.tile_rows(dtype.itemsize, little):
            yield f"inputs-E{E}-{dtype}", aot.input_step_launches(4096, E, 8, 4096, dtype)
    for E in in_half:
        launches = aot.input_step_launches(4096, E, 8, 4096, HALF, codes=torch.uint8)
        yield f"inputs-E{E}-e4m3", launches
    for E, dtype in ((widest, HALF), (1024, FULL)):
        launches = aot.input_step_launches(4096, E, 8, 4096, dtype, codes=torch.int8)
        yield f"inputs-E{E}-{dtype}-int8", launches
    for E in sorted({512, 1024, widest}):  # as many heads as a program may have, and more of them
        yield f"inputs-E{E}-H32", aot.input_step_launches(512, E, 32, 250, HALF)
    yield "inputs-H16-float32", aot.input_step_launches(512, 512, 16, 250, FULL)
    for E, dtype in ((1024, HALF), (512, FULL)):
        launches = aot.input_step_launches(512, E, 8, 250, dtype, update=False)
        yield f"inputs-preview-{dtype}", launches
    yield "inputs-invariant", aot.input_step_launches(64, 512, 8, 4096, HALF, path="invariant")
    for dtype in (HALF, FULL):
        yield f"inputs-split-{dtype}", aot.input_step_launches(16, 512, 8, 4096, dtype)
        launches = aot.input_step_launches(8192, 512, 8, 32, dtype, path="fused")
        yield f"inputs-fused-{dtype}", launches
    yield "inputs-fused-int8", aot.input_step_launches(8192, 512, 8, 32, HALF, "fused", torch.int8)


def steps_configurations() -> Iterator[tuple[str, list[Launch]]]:
    for dtype, blocks in ((HALF, plan.STEPS_BLOCKS_16), (FULL, plan.STEPS_BLOCKS_32)):
        for D in blocks:
            for full in (False, True):  # with dropout there are rows of their own
                name = f"D{D}-{dtype}" + ("-dropout" if full else "")
                # the forward of a window is the kernel of steps, with more results
                yield f"window-{name}", aot.window_launches(8, 256, 2, D, 64, dtype, full)
                dropout_p = 0.1 if full else 0.0
                sizes = (8, 256, 2 * D, 2, 64, dtype)
                launches = aot.steps_launches(*sizes, torch.uint8, dropout_p)
                attends = [x for x in launches if x.kernel is ring_steps_kernel]
                yield f"steps-{name}-e4m3", attends
        yield f"steps-{dtype}", aot.steps_launches(8, 256, 128, 2, 64, dtype)
        yield f"steps-{dtype}-int8", aot.steps_launches(8, 256, 128, 2, 64, dtype, torch.int8)
        for slots in ("zero", "bias zero"):
            launches = aot.steps_launches(8, 256, 128, 2, 64, dtype, None, 0.1, slots)
            yield f"steps-{dtype}-{slots}", launches


def shared_configurations() -> Iterator[tuple[str, list[Launch]]]:
    for E in plan.SHARED_ROWS:  # the backward's blocks are those of any width, but of one tile
        for full in (False, True):
            name = f"shared-E{E}" + ("-full" if full else "")
            yield name, aot.shared_launches(256, 8, 64, E, HALF, full=full)[:1]
            ragged = ((8, 70, torch.float16), (16, 70, HALF)) if full else ()
            for H, S, dtype in ((8, 64, HALF), *ragged):
                launch = aot.shared_launches(256, H, S, E, dtype, full=full)[-1]
                if launch.kernel is _one_tile_backward_kernel:
                    end = f"H{H}-S{S}-{dtype}" + ("-full" if full else "")
                    yield f"shared-backward-E{E}-{end}", [launch]
    for E in (384, 768):  # with features behind the last
        yield f"shared-backward-E{E}", aot.shared_launches(256, 8, 70, E, HALF)[-1:]
    for E in plan.SHARED_ROWS_32:
        for full in (False, True):
            name = f"shared-E{E}-float32" + ("-full" if full else "")
            launches = aot.shared_launches(256, 8, 70, E, FULL, full=full)
            yield name, [launches[0], launches[-1]]
    for E, dtype, one in product((512, 1024), (HALF, FULL), (True, False)):
        launches = aot.shared_launches(256, 8, 70, E, dtype, one, full=True, frozen=True)
        yield f"shared-frozen-E{E}-{dtype}-{one}", launches[-1:]
    for E, dtype in ((1024, HALF), (512, FULL)):
        yield f"shared-split-{dtype}", aot.shared_launches(1, 16, 4096, E, dtype)
    kinds = ((HALF, 8), (HALF, 64), (FULL, 8), (FULL, 64), (torch.float16, 64))
    for full, (dtype, H), one in product((False, True), kinds, (False, True)):
        if one and H == 8:  # has rows above
            continue
        name = f"shared-{'one-tensor' if one else 'two-tensors'}-H{H}-{dtype}"
        launches = aot.shared_launches(256, H, 64, 1024, dtype, one, full)
        yield name + ("-full" if full else ""), launches


def configurations(little: bool = False) -> dict[str, list[Launch]]:
    every = dict(
        [
            *step_configurations(),
            *input_configurations(little),
            *full_configurations(),
            *steps_configurations(),
            *shared_configurations(),
        ]
    )
    if INTERPRETED:  # nothing is compiled, nor known of a kernel's parameters
        return every
    alike: dict[tuple[Any, ...], list[set[str]]] = {}
    for launch in chain.from_iterable(every.values()):
        alike.setdefault(without_options(launch), []).append(options_of(launch))
    left = {
        name: [
            launch
            for launch in launches
            if name in PLAIN
            or not any(options_of(launch) < more for more in alike[without_options(launch)])
        ]
        for name, launches in every.items()
    }
    return {name: launches for name, launches in left.items() if launches}


# Arguments without which a kernel is a part of what it is with them. Where all the rest is the
# same, the rows too, it is compiled with them alone, but for these plain ones.
OPTIONAL = ("seed_ptr", "sink_ptr", "grad_lse_ptr", "grad_kept_ptr", "grad_average_ptr")
PLAIN = ("shared-E512", f"shared-backward-E512-H8-S64-{HALF}", "shared-E512-float32")


def options_of(launch: Launch) -> set[str]:
    """Which of the optional arguments it has."""
    pairs = zip(launch.kernel.params, launch.args, strict=True)
    return {param.name for param, arg in pairs if param.name in OPTIONAL and arg is not None}


def without_options(launch: Launch) -> tuple[Any, ...]:
    """What Triton would compile without them."""
    pairs = zip(launch.kernel.params, launch.args, strict=True)
    args = tuple(None if param.name in OPTIONAL else arg for param, arg in pairs)
    source = aot.source(launch._replace(args=args))
    return source.hash(), *sorted(launch.options.items())


def shape_of(launch: Launch) -> tuple[Any, ...]:
    """What the machine code depends on, and the sizes of tensors."""
    args = tuple((x.dtype, x.shape) if isinstance(x, torch.Tensor) else x for x in launch.args)
    return launch.kernel, args, sorted(launch.options.items())


CONFIGURATIONS = configurations()
with pretended_little_memory():
    LITTLE_CONFIGURATIONS = configurations(little=True)
# Those that are the same with little shared memory, which are looked at once.
EVERYWHERE = {
    name
    for name, launches in LITTLE_CONFIGURATIONS.items()
    if list(map(shape_of, launches)) == list(map(shape_of, CONFIGURATIONS.get(name, [])))
}
for name in EVERYWHERE:
    del LITTLE_CONFIGURATIONS[name]


def arguments_of(launch: Launch) -> dict[str, Any]:
    """By name."""
    return dict(zip((x.name for x in launch.kernel.params), launch.args, strict=True))


def tile_bytes(launch: Launch) -> int:
    """Bytes of a tile of the ring in a step over inputs, or of the clip in a backward."""
    given = arguments_of(launch)
    tokens = given.get("x_ring_ptr", given.get("key_ptr"))
    return given["BLOCK_S"] * given["BLOCK_E"] * tokens.dtype.itemsize


@pytest.mark.sampled(6)
@pytest.mark.in_turn(90, 80, 90, 100)
@pytest.mark.parametrize("capability", aot.SHARED_MEMORY)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration_fits_the_chip_and_uses_its_wide_paths(name: str, capability: int) -> None:
    for launch in CONFIGURATIONS[name]:
        report = aot.compile_launch(launch, capability)
        assert report.spills == 0, report.kernel
        assert report.resident_programs(aot.SHARED_MEMORY[capability]) >= 1, report.kernel
        if name in EVERYWHERE:
            assert report.resident_programs(min(aot.LITTLE_MEMORY.values())) >= 1, report.kernel
        reads_ring = report.kernel == "_ring_step_kernel"
        if reads_ring and "fused" not in name:
            loads = report.loads_in_loops()
            eight_bits = launch.args[11].dtype in CODES  # with a scale for every row
            wide = 64 if eight_bits and name.startswith("ring-D8-") else 128
            assert set(loads) == ({wide, 32} if eight_bits else {wide})
            assert loads.count(wide) >= len(loads) / 2
        if report.kernel == "_input_step_kernel":  # narrower ones are scales and parts
            size = tile_bytes(launch)
            if launch.args[2].dtype in CODES:
                assert report.loads_in_loops().count(128) * 16 * report.threads >= size
            else:
                copies = report.loads_in_loops(copies=True)
                assert set(copies) == {128}
                assert len(copies) * 16 * report.threads == size
        if report.kernel == "_one_tile_backward_kernel":  # narrower ones are of heads
            copies = report.loads_in_loops(copies=True)
            assert copies.count(128) * 16 * report.threads == tile_bytes(launch)
        without = ("_write_rings_kernel", "_quantise_tokens_kernel", "_shared_gradient_kernel")
        multiplies = report.kernel not in without and not (reads_ring and "fused" not in name)
        given = arguments_of(launch)
        if multiplies and given["PRECISION"] != "ieee" and given.get("USE_DOT", True):
            assert report.has_matrix_instructions(), report.kernel


@pytest.mark.sampled(6)
@pytest.mark.in_turn(89, 120)
@pytest.mark.parametrize("capability", [89, 120])
@pytest.mark.parametrize("name", LITTLE_CONFIGURATIONS)
def test_configuration_fits_a_chip_with_little_shared_memory(name: str, capability: int) -> None:
    for launch in LITTLE_CONFIGURATIONS[name]:
        report = aot.compile_launch(launch, capability)
        assert report.spills <= (8 if capability == 120 else 0), report.kernel
        assert report.resident_programs(aot.LITTLE_MEMORY[capability]) >= 1, report.kernel


@pytest.mark.parametrize("fp32_precision", ["tf32"], indirect=True)
@pytest.mark.usefixtures("fp32_precision")
@pytest.mark.parametrize("codes", CODES, ids=str)
def test_wide_inputs_of_8_bits_fit_little_shared_memory_whatever_multiplies_them(
    codes: torch.dtype,
) -> None:
    with pretended_little_memory():
        launches = aot.input_step_launches(512, 1024, 8, 250, FULL, codes=codes)
    for launch in launches:
        report = aot.compile_launch(launch, 89)
        assert report.resident_programs(aot.LITTLE_MEMORY[89]) >= 1, report.kernel


@pytest.mark.parametrize("fp32_precision", ["ieee"], indirect=True)
@pytest.mark.usefixtures("fp32_precision")
@pytest.mark.parametrize("D", [32, 64, 128])
def test_kernels_fit_where_fp32_is_not_to_be_divided(D: int) -> None:
    for launch in (
        *aot.window_launches(8, 256, 2, D, 64, FULL, full=True),
        *aot.shared_launches(256, D // 2, 64, 512, FULL, False, full=True),
        *aot.step_launches(64, 8 * D, 8, 64, FULL, "invariant"),
    ):
        report = aot.compile_launch(launch, 90)
        assert report.spills == 0, report.kernel
        assert not report.has_matrix_instructions(), report.kernel


_MEMORY = re.compile(r"\b(?:atom|ld|st|red)\.global\S*|\bcp\.async\.c\S*|\bbar\.sync\b")


def with_argument(launch: Launch, name: str, value: Any) -> Launch:
    names = [param.name for param in launch.kernel.params]
    args = [value if x == name else arg for x, arg in zip(names, launch.args, strict=True)]
    return launch._replace(args=tuple(args))


@pytest.mark.in_turn(*aot.SHARED_MEMORY)
@pytest.mark.parametrize("capability", aot.SHARED_MEMORY)
@pytest.mark.parametrize(
    "name",
    [
        f"fused-1-512-8-32-{HALF}",
        f"fused-1-512-8-4096-{FULL}",
        f"group-64-256-8-64-{HALF}-None",
        f"chain-{HALF}",
        f"inputs-split-{HALF}",
        f"inputs-split-{FULL}",
        f"shared-split-{HALF}",
        f"shared-split-{FULL}",
    ],
)
def test_a_program_merges_what_all_threads_of_the_others_stored(name: str, capability: int) -> None:
    """A program's stores, a barrier, one thread's counting, a barrier, loads past the first cache.

    Only then does counting, which releases and acquires, speak for the other threads too.
    """
    launches = CONFIGURATIONS[name]
    counts = [any(param.name == "counter_ptr" for param in x.kernel.params) for x in launches]
    assert counts.count(True) == 1
    # without a bias it reads nothing else behind the count
    launch = with_argument(launches[counts.index(True)], "o_bias_ptr", None)
    ptx = aot.compile_launch(launch, capability).ptx
    accesses = _MEMORY.findall(ptx)
    at = [i for i, access in enumerate(accesses) if access.startswith("atom")]
    assert [accesses[i] for i in at] == ["atom.global.gpu.acq_rel.add.u32"]
    before, after = accesses[: at[0]], accesses[at[0] + 1 :]
    assert before[-1] == "bar.sync"
    assert any(access.startswith("st.global") for access in before)
    assert after[0] == "bar.sync"
    loads = [access for access in after if access.startswith(("ld", "cp"))]
    assert loads
    assert all(access.startswith("ld.global.cg") for access in loads)


@pytest.mark.in_turn(*aot.SHARED_MEMORY)
@pytest.mark.parametrize("capability", aot.SHARED_MEMORY)
def test_first_tile_of_a_ring_is_asked_for_before_anything_is_waited_for(capability: int) -> None:
    (launch,) = CONFIGURATIONS[f"ring-D64-{HALF}"]
    report, given = aot.compile_launch(launch, capability), arguments_of(launch)
    loads = []
    for operation in re.findall(r"\b(?:LDG|STG|BAR|BRA|SHFL)\S*", report.sass):
        if not operation.startswith("LDG"):
            break
        loads.append(operation)
    keys_and_values = 2 * given["BLOCK_L"] * given["BLOCK_D"] * HALF.itemsize
    assert sum(".128" in load for load in loads) * 16 * report.threads == keys_and_values


@pytest.mark.in_turn(*aot.SHARED_MEMORY)
@pytest.mark.parametrize("capability", aot.SHARED_MEMORY)
def test_rows_are_asked_for_before_what_they_weigh_where_parts_are_merged(capability: int) -> None:
    (launch,) = CONFIGURATIONS[f"fused-1-512-8-32-{HALF}"]
    sass = aot.compile_launch(launch, capability).sass
    loads = re.findall(r"\bLDG\S*STRONG\S*", sass[sass.index("ATOM") :])
    wide = [".128" in load for load in loads]
    assert any(wide)
    assert wide == sorted(wide, reverse=True)


@pytest.mark.in_turn(*aot.SHARED_MEMORY)
@pytest.mark.parametrize("capability", aot.SHARED_MEMORY)
def test_warps_repeat_no_product_where_few_tokens_are_projected(capability: int) -> None:
    launch = CONFIGURATIONS[f"chain-{HALF}"][0]
    report, given = aot.compile_launch(launch, capability), arguments_of(launch)
    products = given["BLOCK_N"] * given["BLOCK_O"] * given["BLOCK_K"] // (16 * 8 * 16)
    assert report.ptx.count("mma.sync") == products // (report.threads // 32)


@pytest.mark.parametrize("name", [f"inputs-E1024-{HALF}", "shared-E1024"])
def test_two_programs_of_1024_features_share_a_multiprocessor(name: str) -> None:
    report = aot.compile_launch(CONFIGURATIONS[name][0], 90)
    assert report.resident_programs(aot.SHARED_MEMORY[90]) == 2


def test_a_kernel_that_starts_early_touches_no_memory_before_the_one_before_has_ended() -> None:
    launches = CONFIGURATIONS[f"chain-{HALF}"]
    for launch in launches:
        early = with_argument(launch, "PDL", True)
        early = early._replace(options={**launch.options, "launch_pdl": True})
        lines = aot.compile_launch(early, 90).sass.splitlines()
        waits = [i for i, line in enumerate(lines) if "ACQBULK" in line]
        touches = [i for i, line in enumerate(lines) if re.search(r"\b(?:LDG|STG|ATOM|RED)", line)]
        assert len(waits) == 1, early.kernel
        assert waits[0] < min(touches)
    assert len(launches) == 3
