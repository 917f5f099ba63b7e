"""The CUDA kernels as nvcc compiles them, executed: their results, and the faults that show."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

pytest.importorskip("numpy")
from ptx_cuda import PtxDevice, kernel_of
from ptx_machine import parse
from ptx_memory import FaultError
from test_cuda_compile import find_nvcc
from test_cuda_emulation import (
    DTYPES,
    LAUNCHES,
    OPTIONS,
    POSITIONS,
    SHARED_CASES,
    STEPS,
    Case,
    check,
    check_shared,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels itself")
ARCHS = (80, 90)
in_turn = pytest.mark.in_turn(*ARCHS)


@pytest.fixture(autouse=True)
def nvcc() -> str:
    return find_nvcc()


def compiled(case: Case, capability: int) -> bool:
    """Clusters exist from sm_90 on, where counters serve teams of one stream only."""
    return capability >= 90 if case.cluster else capability < 90 or case.streams == 1


TEAMS = [
    pytest.param(case, capability, id=f"{name}-{capability}")
    for (name, launch), capability in itertools.product(LAUNCHES.items(), ARCHS)
    if compiled(case := Case(N=5, E=32, **launch), capability)
]


@pytest.mark.parametrize(("case", "capability"), TEAMS)
def test_step_cold_and_warm_in_every_order_of_blocks(case: Case, capability: int) -> None:
    check(case, POSITIONS, [PtxDevice(capability), PtxDevice(capability, one_by_one=True)])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("case", "capability"), TEAMS)
def test_step_of_16_bit_numbers(case: Case, capability: int, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype), POSITIONS, [PtxDevice(capability)])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("merge", "capability"), [("counter", 80), ("cluster", 90)])
def test_step_options(option: str, merge: str, capability: int) -> None:
    launch = LAUNCHES[f"{merge}_heads_splits_four_streams"]
    check(Case(N=5, **OPTIONS[option], **launch), POSITIONS, [PtxDevice(capability)])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("cluster", "capability"), [(False, 80), (True, 90)])
def test_step_shapes(name: str, cluster: bool, capability: int) -> None:
    case = Case(N=2, splits=2, cluster=cluster, **STEPS[name])
    check(case, [case.L - 1, 3 * case.L], [PtxDevice(capability)])


@pytest.mark.parametrize(
    ("case", "capability"),
    [
        (Case(E=512, H=8, L=32, head_groups=8, splits=2, cluster=True), 90),
        (Case(E=256, H=4, L=1100, head_groups=2, splits=16), 80),
    ],
    ids=["cluster_of_16", "long_window"],
)
def test_steps_of_one_stream_that_fill_a_chip(case: Case, capability: int) -> None:
    check(replace(case, dtype=torch.bfloat16), [3 * case.L], [PtxDevice(capability)])


@in_turn
@pytest.mark.parametrize("capability", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_of_projected_tokens(dtype: torch.dtype, capability: int) -> None:
    case = Case(N=5, E=48, H=6, L=9, dtype=dtype, delay=1, active=True, projected=True)
    for groups in (1, 3):
        check(replace(case, head_groups=groups), [0, 8, 9, 100, 3], [PtxDevice(capability)])


@pytest.mark.sampled(4)
@in_turn
@pytest.mark.parametrize("capability", ARCHS)
@pytest.mark.parametrize("name", SHARED_CASES)
def test_attend_shared_and_its_gradients(name: str, capability: int) -> None:
    check_shared(SHARED_CASES[name], PtxDevice(capability))


# What the machine says of kernels without one of their guards.

Change = Callable[[str], str]


def without(pattern: str, which: int, instead: str = "") -> Change:
    """Another instruction in the place of one of those that match."""

    def change(ptx: str) -> str:
        found = list(re.finditer(rf"^\s*{pattern}\s*;\n", ptx, re.MULTILINE))[which]
        return ptx[: found.start()] + instead + ptx[found.end() :]

    return change


def beside_the_count(of: Callable[[str, int], int]) -> Change:
    """Without the barrier before or after a block counts those of its team that have ended."""

    def change(ptx: str) -> str:
        at = of(ptx, [x.start() for x in re.finditer(r"atom\.", ptx)][-1])
        return ptx[:at] + ptx[ptx.index("\n", at) :]

    return change


ARRIVE, WAIT = r"barrier\.cluster\.arrive", r"barrier\.cluster\.wait"
RELAXED = "barrier.cluster.arrive.relaxed;\n"
GUARDS = {
    "inputs": ("counter", without(r"bar\.sync\s+0", 0), "as another warp writes"),
    "copies": ("counter", without(r"cp\.async\.wait_group \d", -1), "copied|nobody wrote"),
    "before_the_count": (
        "counter",
        beside_the_count(lambda ptx, at: ptx.rindex("bar.sync", 0, at)),
        "another program writes",
    ),
    "after_the_count": (
        "counter",
        beside_the_count(lambda ptx, at: ptx.index("bar.sync", at)),
        "another warp writes",
    ),
    "count": (
        "counter",
        lambda ptx: ptx.replace("atom.acq_rel.gpu.global", "atom.relaxed.gpu.global"),
        "another program writes",
    ),
    "peers_begin": ("cluster", without(WAIT, 0), "may not have begun"),
    "projection": ("cluster", without(ARRIVE, 0, RELAXED), "as another warp writes"),
    "heads": ("cluster", without(ARRIVE, 1, RELAXED), "as another warp writes"),
    "peers_end": ("cluster", without(WAIT, -1), "may have ended"),
    "arrival": ("cluster", without(ARRIVE + r"\.relaxed", -1), "without having arrived"),
}


def changed(change: Change, capability: int) -> PtxDevice:
    """A device for kernels that differ from the compiled ones."""
    return PtxDevice(
        capability,
        program=lambda kernel, capability: parse(change(kernel_of(kernel, capability)), kernel),
    )


@pytest.mark.parametrize("guard", GUARDS)
def test_a_step_without_one_of_its_guards_is_found_out(guard: str) -> None:
    merge, change, what = GUARDS[guard]
    case = Case(N=5, **LAUNCHES[f"{merge}_heads_splits_four_streams"])
    device = changed(change, 90 if case.cluster else 80)
    with pytest.raises(FaultError, match=what):
        check(case, POSITIONS, [device])


@pytest.mark.parametrize("which", range(3))
def test_attention_without_one_of_its_barriers_is_found_out(which: int) -> None:
    with pytest.raises(FaultError, match="another warp writes"):
        check_shared(SHARED_CASES["plain"], changed(without(r"bar\.sync\s+0", which), 80))
