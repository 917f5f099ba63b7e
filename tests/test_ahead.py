"""What is compiled before it is launched."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import triton
from recording_driver import recording_driver

from bench import ahead, choices, exercise, grid
from bench.formulations import FORMULATIONS
from bench.grid import Case
from bench.peers import ours
from bench.problem import Problem
from continual_mha import use_backend
from continual_mha.triton_kernels import launch as launcher
from continual_mha.triton_kernels import pieces

CPU = torch.device("cpu")
TINY = Case("tiny", 3, 32, 2, 24, 1, "float32", "step")
compiled_here = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU"),
    pytest.mark.skipif(launcher.INTERPRETED, reason="the interpreter does not compile"),
]


KERNELS = [
    kernel
    for name, module in sys.modules.items()
    if name.startswith("continual_mha.triton_kernels.")
    for kernel in vars(module).values()
    if isinstance(kernel, triton.JITFunction)
]


def compiles(folder):
    """Machine code in Triton's cache, and what launches it."""
    return {path for name in ("*.cubin", "__triton_launcher*") for path in folder.rglob(name)}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty one, under a driver that records; Triton's kernels take tensors on the CPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launcher, "_compiled", {})
    monkeypatch.setattr(pieces, "INTERPRETED", True)
    known = {id(kernel): dict(kernel.device_caches) for kernel in KERNELS}
    for kernel in KERNELS:
        kernel.device_caches.clear()
    with recording_driver() as launched:
        yield tmp_path, launched
    for kernel in KERNELS:
        kernel.device_caches.clear()
        kernel.device_caches.update(known[id(kernel)])


class TestWhatIsLaunched:
    pytestmark = compiled_here

    @pytest.mark.parametrize("formulation", ["kv", "input"])
    def test_exercise_compiles_nothing_more(self, formulation, cache):
        folder, launched = cache
        shape = exercise.SHAPES[2]
        ahead.compile_exercise(shape, formulation)
        before = compiles(folder)
        assert before
        assert not launched
        module = exercise.module_of(shape, formulation, CPU)
        with use_backend("triton"), torch.no_grad():
            for call in exercise.calls(module, exercise.clip_of(module, shape.streams, CPU)):
                call()
        assert launched
        assert compiles(folder) == before

    @pytest.mark.parametrize("mode", grid.MODES)
    def test_benchmark_compiles_nothing_more(self, mode, cache):
        folder, launched = cache
        case = TINY._replace(mode=mode)
        case = case._replace(tokens=16 if case.takes_many else 1)
        for job in ahead.jobs_for_case(case):
            job()
        before = compiles(folder)
        assert before
        assert not launched
        for formulation in (None, *(FORMULATIONS if case.goes_on else ())):
            ready = ours.setup("triton", formulation, Problem(case, CPU))
            with ready.context():
                ready.run()
        assert launched
        assert compiles(folder) == before


def test_jobs_are_of_every_module_that_is_exercised_and_every_case():
    jobs = ahead.jobs_for("standard")
    shapes = [job.args[0] for job in jobs if job.func is ahead.compile_exercise]
    cases = [job.args[0] for job in jobs if job.func is ahead.compile_case]
    assert set(shapes) == set(exercise.SHAPES)
    assert {*cases, *(case._replace(mode="forward") for case in cases)} >= set(
        grid.cases("cuda", "standard")
    )


@pytest.fixture
def threads(monkeypatch):
    """In place of processes."""

    def pool(processes, context, begin, given):
        return ThreadPoolExecutor(1, initializer=begin, initargs=given)

    monkeypatch.setattr(ahead, "ProcessPoolExecutor", pool)


@pytest.mark.parametrize("seconds", [None, 0.3])
def test_compiling_ahead_ends_in_time(seconds, threads, capsys):
    assert ahead.compile_all([partial(time.sleep, 0.2)] * 6, 1, seconds) == []
    said = capsys.readouterr().out
    assert ("compiled 1 of 6 ahead" in said) is (seconds is not None)


@pytest.mark.parametrize("little", [False, True])
def test_kernels_are_planned_as_for_the_gpu_that_is_here(little, threads, monkeypatch):
    monkeypatch.setattr(ahead, "has_little", lambda: little)
    nowhere, planned = torch.empty(0), []
    job = lambda: planned.append(launcher.little_memory(nowhere))
    assert ahead.compile_all([job], 1) == []
    assert planned == [little]
    case = Case("tiny", 3, 320, 4, 64, 1, "bfloat16", "step")
    assert (choices.plan_of(case, "kv").stages == 2) is little


def test_what_does_not_compile_is_said_once_and_keeps_no_other(threads, monkeypatch, capsys):
    done = []

    def fail():
        raise ValueError("no registers")

    monkeypatch.setattr(ahead, "jobs_for", lambda size: [fail, fail, lambda: done.append(size)])
    with pytest.raises(SystemExit, match="2 failed"):
        ahead.main(["--size", "quick"])
    assert capsys.readouterr().out.splitlines().count("ValueError: no registers") == 1
    assert done == ["quick"]
