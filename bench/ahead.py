"""``python -m bench.ahead``: compile by all cores what ``bench.exercise`` and the benchmark launch.

A process compiles its kernels one after the other, and the GPU waits for each. Here the calls are
made on tensors without memory, and what they would launch is compiled into Triton's cache on disk.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from contextlib import ExitStack
from functools import partial

import torch
import triton

from continual_mha import use_backend
from continual_mha.devices import has_little_memory
from continual_mha.triton_kernels.launch import Launch, pretended_little_memory, record

from . import exercise, grid
from .arguments import count, real
from .formulations import FORMULATIONS
from .lost import line_of
from .peers import ours
from .problem import Problem
from .progress import bar, say

META = torch.device("meta")
_FOR_GOOD = ExitStack()  # what a process that compiles enters and does not leave
PROCESSES = max(1, (os.cpu_count() or 1) - 2)


def has_little() -> bool:
    """Whether plans here are those for a GPU with little shared memory."""
    if not torch.cuda.is_available():
        return False
    return has_little_memory(torch.device("cuda", torch.cuda.current_device()))


def _plan_alike(little: bool) -> None:
    """Let this process plan for tensors without memory as ``has_little`` said elsewhere."""
    if little:
        _FOR_GOOD.enter_context(pretended_little_memory())


def compile_launches(launches: Iterable[Launch]) -> None:
    """Compile each into Triton's cache, with what passes its arguments, and launch nothing."""
    for launch in launches:
        made = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
        triton.runtime.driver.active.launcher_cls(made.src, made.metadata)


def compile_exercise(shape: exercise.Shape, formulation: str) -> None:
    """Compile what ``bench.exercise`` launches for a module."""
    module = exercise.module_of(shape, formulation, META)
    clip = exercise.clip_of(module, shape.streams, META)
    with record() as launches, use_backend("triton"), torch.no_grad():
        for call in exercise.calls(module, clip):
            call()
    compile_launches(launches)


def compile_case(case: grid.Case, formulation: str | None) -> None:
    """Compile what the benchmark launches for this package; None for what the module chooses."""
    problem = Problem(case, META)
    with record() as launches:
        ready = ours.setup("triton", formulation, problem)
        with ready.context():
            ready.run()
    compile_launches(launches)


def jobs_for_case(case: grid.Case) -> list[Callable[[], None]]:
    """Those of a case of the benchmark, whatever formulation it chooses."""
    if case.mode == "forward":  # an operator by name: from such tensors no call of it gets further
        case = case._replace(mode="forward_backward")
    return [
        partial(compile_case, case, each) for each in (FORMULATIONS if case.goes_on else (None,))
    ]


def jobs_for(size: str) -> list[Callable[[], None]]:
    """All of that, in the order in which it is needed."""
    found: list[Callable[[], None]] = [
        partial(compile_exercise, shape, formulation)
        for shape in exercise.SHAPES
        for formulation in FORMULATIONS
    ]
    for case in grid.cases("cuda", size):
        found += jobs_for_case(case)
    return found


def _error_of(job: Callable[[], None]) -> str | None:
    """Run it; in words what it fails of, for not every error can be sent to another process."""
    try:
        job()
    except Exception as error:
        return line_of(error)
    return None


def compile_all(
    jobs: Sequence[Callable[[], None]], processes: int, seconds: float | None = None
) -> list[str]:
    """Run all, by several processes; returns what some failed of, which their first run says, too.

    What is not done in so many ``seconds`` is left to its first run.
    """
    end = float("inf") if seconds is None else time.monotonic() + seconds
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), _plan_alike, (has_little(),)
    )
    running = [pool.submit(_error_of, job) for job in jobs]
    errors = []
    try:
        for job in bar(running, "compiled"):
            left = None if seconds is None else max(0.0, end - time.monotonic())
            lost = job.exception(left)  # its process ended
            errors.append(job.result() if lost is None else line_of(lost))
    except TimeoutError:
        say(f"compiled {sum(job.done() for job in running)} of {len(running)} ahead")
    # Those that are done leave the device before anything is measured.
    pool.shutdown(wait=all(job.done() for job in running), cancel_futures=True)
    return [error for error in errors if error is not None]


def main(arguments: list[str] | None = None) -> None:
    """Compile; exit with an error if something does not."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.ahead", description=__doc__)
    parser.add_argument("--size", choices=grid.SIZES, default="standard", help="of the grid")
    parser.add_argument("--limit", type=real, default=None, help="seconds, then stop")
    parser.add_argument("--processes", type=count, default=PROCESSES, help="that compile")
    options = parser.parse_args(arguments)
    errors = compile_all(jobs_for(options.size), options.processes, options.limit)
    for line in dict.fromkeys(errors):
        print(line, flush=True)
    if errors:
        raise SystemExit(f"{len(errors)} failed")


if __name__ == "__main__":
    main()
