"""``python -m bench.choices``: every way in which Triton could run a step, beside the one it takes.

The tables of ``triton_kernels/plan.py`` choose by shape, and nothing tunes itself at run time. On a
GPU this measures, for every step of the grid, what a table could have chosen: other paths, other
divisions of the window, other tiles, as many registers as one or two programs of a multiprocessor
may have, dependent launch. Kernels are compiled by all cores first.
Rows go to ``choices.jsonl`` beside the benchmark's. Printed is, for every shape, the way that the
tables choose now, the fastest one, and their ratio; with ``--report`` that alone, on any machine.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from continual_mha import triton_kernels as kernels
from continual_mha.triton_kernels.launch import MOST_REGISTERS, REGISTERS, record
from continual_mha.triton_kernels.plan import InputPlan, StepPlan, input_plan, step_plan

from . import ahead, grid, machine, records
from .arguments import count, positive, real
from .formulations import FORMULATIONS
from .lost import DeviceLostError, failing_alone
from .measure import each_kept, times_of, why_too_large
from .problem import TOLERANCE, Problem
from .progress import say
from .ratios import OURS, Results
from .records import CHOICES, RESULTS, Row
from .timing import GpuTimer

TIMERS = ("graph", "cold")
TOLERATED = 1.05  # how many times the fastest way's time the tables may take

Plan = StepPlan | InputPlan


def plan_of(case: grid.Case, formulation: str, path: str | None = None, splits: int = 0) -> Plan:
    """What the tables choose for a step, or what belongs to a path and a number of parts."""
    sizes = (case.batch_size, case.embed_dim, case.num_heads, case.sequence_len)
    itemsize, little = grid.BYTES[case.dtype], ahead.has_little()
    if formulation == "kv":
        return step_plan(*sizes, itemsize, path, splits, little=little)
    return input_plan(*sizes, itemsize, path=path, splits=splits, little=little)


def _paths(case: grid.Case, formulation: str) -> list[str]:
    """Paths that are not out of the question for a shape."""
    n, e, h, length = case.batch_size, case.embed_dim, case.num_heads, case.sequence_len
    head_weights = 4 * e * (e // h) * grid.BYTES[case.dtype]
    if formulation == "input":
        fused = n >= 64 and e <= 512 and length <= 64 * h
        return ["gemm", *["fused"] * fused]
    found = ["gemm"]
    if n <= 256:
        found.append("chain")
    if n <= 64 and head_weights <= 512 << 10:
        found.append("fused")
    if 2 <= n <= 512 and head_weights <= 256 << 10 and length <= 512:
        found.append("group")
    return found


def ways(case: grid.Case, formulation: str) -> list[Plan]:
    """Ways to run a step, the one that the tables choose first, each once."""
    found = [plan_of(case, formulation)]
    for path in _paths(case, formulation):
        usual = plan_of(case, formulation, path)
        found.append(usual)
        if path in ("chain", "gemm") or (path == "fused" and formulation == "kv"):
            for splits in {usual.splits // 2, 2 * usual.splits} - {0}:
                if case.sequence_len >= 16 * splits:
                    found.append(plan_of(case, formulation, path, splits))
        found += _with_other_tiles(usual)
        if isinstance(usual, StepPlan):
            found += [usual._replace(pdl=not usual.pdl)] if path == "chain" else []
            found += [usual._replace(spread=not usual.spread)] if path == "fused" else []
            found += _with_other_groups(usual)
        elif path == "gemm":
            found += _with_other_depths(usual)
    return list(dict.fromkeys(found))


def _with_other_tiles(plan: Plan) -> Iterator[Plan]:
    """Half and twice as many slots in a tile, and as many warps."""
    slots = "block_l" if isinstance(plan, StepPlan) else "block_s"
    least = 1 if isinstance(plan, StepPlan) else 16
    for rows in (getattr(plan, slots) // 2, 2 * getattr(plan, slots)):
        if rows >= least:
            yield plan._replace(**{slots: rows})
    for warps in (plan.num_warps // 2, 2 * plan.num_warps):
        if 1 <= warps <= 8:
            yield plan._replace(num_warps=warps)


def _with_other_depths(plan: InputPlan) -> Iterator[InputPlan]:
    """A tile less and one more under way, with the registers of one program and of two."""
    of_two = REGISTERS // (2 * 32 * plan.num_warps)
    for stages in (plan.stages - 1, plan.stages, plan.stages + 1):
        for registers in (None, of_two) if of_two < MOST_REGISTERS else (plan.registers,):
            if stages > 1:
                yield plan._replace(stages=stages, registers=registers)


def _with_other_groups(plan: StepPlan) -> Iterator[StepPlan]:
    """Half and twice as many streams in a program, whose tiles keep their size."""
    if plan.path == "group":
        yield plan._replace(group=plan.group // 2, block_l=2 * plan.block_l)
        if plan.block_l > 1:
            yield plan._replace(group=2 * plan.group, block_l=plan.block_l // 2)


def _step(
    formulation: str,
    mha: nn.MultiheadAttention,
    token: Tensor,
    rings: tuple[Tensor, ...],
    position: Tensor,
    plan: Any,
) -> Tensor:
    """A step of self-attention by the launcher itself."""
    ins, outs = (mha.in_proj_weight, mha.in_proj_bias), (mha.out_proj.weight, mha.out_proj.bias)
    if formulation == "input":
        return kernels.input_step_(
            token, *ins, *outs, None, None, *rings, position, mha.num_heads, 0, None, False, 0.0,
            True, plan=plan,
        )  # fmt: skip
    waiting = token.new_empty((token.shape[0], 0, token.shape[1]))
    return kernels.ring_step_(
        token, token, token, ins[0], None, None, ins[1], *outs, None, None, *rings, waiting,
        position, None, False, 0.0, True, plan=plan,
    )  # fmt: skip


def compile_way(case: grid.Case, formulation: str, plan: Plan) -> None:
    """Compile the kernels of a way into Triton's cache on disk, and launch nothing."""
    n, e, h, length = case.batch_size, case.embed_dim, case.num_heads, case.sequence_len
    options: dict[str, Any] = {"device": "meta", "dtype": getattr(torch, case.dtype)}
    mha = nn.MultiheadAttention(e, h, **options).requires_grad_(False)
    sizes = [(n, length, e)] if formulation == "input" else 2 * [(n, h, length, e // h)]
    rings = tuple(torch.empty(size, **options) for size in sizes)
    position = torch.empty(n, dtype=torch.int64, device="meta")
    with record() as launches:
        _step(formulation, mha, torch.empty(n, e, **options), rings, position, plan)
    ahead.compile_launches(launches)


class Race:
    """The ways of one case against each other, on one device.

    Args:
        about: the machine, which goes into every row.
        budget: seconds that a timer may take for a way, about.
        keep: takes the rows of a case that cannot be ended, before the process is.
        left_out: case, formulation and plan of ways that have lost the device.
    """

    def __init__(
        self,
        device: torch.device,
        about: dict[str, Any],
        budget: float,
        keep: Callable[[list[Row]], None],
        left_out: Collection[tuple[grid.Case, str, dict[str, Any]]],
    ) -> None:
        self.device = device
        self.about = about
        self.timer = GpuTimer(device, budget)
        self.keep = keep
        self.left_out = left_out
        self._found: list[Row] = []

    def rows(self, case: grid.Case) -> list[Row]:
        """A row for every way and timer, or for every way that failed or was wrong.

        The last one says that the case is finished, unless the device was lost on the way.
        """
        end: Row = {"kind": "case", "case": case._asdict(), "machine": self.about}
        reason = why_too_large(case, self.device)
        if reason is not None:
            return [end | {"reason": reason}]
        problem = Problem(case, self.device)
        found = self._found = []
        try:
            for each in FORMULATIONS:
                self._measure(problem, each)
        except DeviceLostError:
            return found
        return [*found, end]

    def _measure(self, problem: Problem, formulation: str) -> None:
        case = problem.case
        kept = problem.past_kv if formulation == "kv" else (problem.past,)
        rings = tuple(ring.clone() for ring in kept)
        token = problem.tokens[:, 0].contiguous()
        position = torch.empty(case.batch_size, dtype=torch.int64, device=self.device)
        for plan in ways(case, formulation):
            if (case, formulation, plan._asdict()) in self.left_out:
                continue
            for ring, past in zip(rings, kept, strict=True):
                ring.copy_(past)
            position.fill_(case.sequence_len)
            run = partial(_step, formulation, problem.mha, token, rings, position, plan)
            about = {"kind": "way", "case": case._asdict(), "formulation": formulation,
                     "plan": plan._asdict(), "machine": self.about}  # fmt: skip
            row_of = lambda reason, about=about: about | {"status": "failed", "reason": reason}
            with (
                failing_alone(self.device, self._found, row_of, self.keep),
                torch.inference_mode(),
            ):
                self._found.extend(self._rows(problem, run, about))

    def _rows(self, problem: Problem, run: Callable[[], Tensor], about: Row) -> Iterator[Row]:
        error = problem.error(run())
        if not error <= TOLERANCE[problem.case.dtype]:
            yield about | {"status": "wrong", "error": error}
            return
        for timer in TIMERS:
            summary = getattr(self.timer, timer)(run)
            yield about | {"status": "ok", "error": error, "timer": timer} | times_of(summary)


class Choice(NamedTuple):
    """The way that the tables choose for a step, and the fastest one that was measured.

    Attributes:
        chosen: its row; None if it was not measured.
        best: that of the fastest.
    """

    case: grid.Case
    formulation: str
    chosen: Row | None
    best: Row

    @property
    def loss(self) -> float:
        """How many times the fastest way's time the chosen one takes; infinite if unmeasured."""
        if self.chosen is None:
            return float("inf")
        return self.chosen["median_us"] / self.best["median_us"]

    @property
    def line(self) -> str:
        """In words."""
        label = f"{self.case.label}, {self.formulation}"
        best = f"{self.best['median_us']:.2f} us by {_words(self.best['plan'])}"
        if self.chosen is None:
            return f"{label}: what the tables choose was not measured; best {best}"
        chosen = f"{self.chosen['median_us']:.2f} us by {_words(self.chosen['plan'])}"
        return f"{label}: {chosen}; best {best}: {self.loss:.2f}x"


def _words(plan: dict[str, Any]) -> str:
    tile = f"{plan.get('block_l', plan.get('block_s'))} slots, {plan['num_warps']} warps"
    more = [name for name in ("spread", "pdl") if plan.get(name)]
    more += [f"{plan[name]} {name}" for name in ("stages", "registers") if plan.get(name)]
    group = [f"{plan['group']} streams"] if plan.get("group", 1) > 1 else []
    return ", ".join([f"{plan['path']} in {plan['splits']} parts", tile, *group, *more])


def choices(rows: Iterable[Row], timer: str = TIMERS[0]) -> list[Choice]:
    """For every case and formulation, what today's tables choose beside the fastest way."""
    found: dict[tuple[grid.Case, str], list[Row]] = {}
    for row in records.newest(rows):
        if row["kind"] == "way" and row["status"] == "ok" and row["timer"] == timer:
            found.setdefault((records.case_of(row), row["formulation"]), []).append(row)
    made = []
    for (case, formulation), measured in found.items():
        now = plan_of(case, formulation)._asdict()
        chosen = [row for row in measured if row["plan"] == now]
        best = min(measured, key=lambda row: row["median_us"])
        made.append(Choice(case, formulation, chosen[-1] if chosen else None, best))
    return made


def losses(results: Results) -> list[str]:
    """Cases in which the automatic choice loses to a backend or formulation asked for by name."""
    lost = []
    for case in results.cases:
        names = [name for name in results.implementations(case.mode) if name.startswith(f"{OURS}:")]
        for name in names:
            ratio = results.ratio(case, OURS, name)
            if ratio is not None and ratio.value > TOLERATED:
                lost.append(f"{case.label}: {ratio.value:.2f} times {name} ({ratio.timer})")
    return lost


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.choices", description=__doc__)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--size", choices=grid.SIZES, default="standard", help="of the grid")
    parser.add_argument("--dtype", action="append", choices=sorted(grid.BYTES), default=None)
    parser.add_argument("--out", type=Path, default=None, help="results folder")
    parser.add_argument("--resume", action="store_true", help="go on with what a run left undone")
    parser.add_argument("--budget", type=positive, default=0.05, help="seconds for a way and timer")
    parser.add_argument("--limit", type=real, default=None, help="seconds, then stop in order")
    parser.add_argument("--processes", type=count, default=ahead.PROCESSES, help="that compile")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure; every finished case is on disk before the next begins."""
    options = parse(arguments)
    if options.report:
        folders = [options.out] if options.out else sorted(RESULTS.iterdir())
        for folder in folders:
            _print(folder)
        return
    end = time.monotonic() + (math.inf if options.limit is None else options.limit)
    about = machine.describe("cuda")
    folder = options.out or RESULTS / machine.slug(about)
    cases = list(grid.cases("cuda", options.size, ("step",), options.dtype))
    left_out = []
    if options.resume:
        rows = records.read(folder, CHOICES)
        done = records.finished(rows, about)
        left_out = [
            (records.case_of(row), row["formulation"], row["plan"])
            for row in records.losers(rows, about)
        ]
        cases = [case for case in cases if case not in done]
    jobs = [
        partial(compile_way, case, each, way)
        for case in cases
        for each in FORMULATIONS
        for way in ways(case, each)
    ]
    say(f"{about['device']}: {len(jobs)} ways of {len(cases)} cases, into {folder}")
    ahead.compile_all(jobs, options.processes, options.limit and options.limit / 2)
    keep = records.keeper(folder, CHOICES, anew=not options.resume)
    race = Race(torch.device("cuda"), about, options.budget, keep, left_out)
    for _ in each_kept(cases, race.rows, keep, end):
        torch.cuda.empty_cache()
    _print(folder)


def _print(folder: Path) -> None:
    results = Results(records.read(folder))
    if results.rows and results.rows[-1]["machine"]["device_type"] == "cuda":
        print("\n".join(losses(results)) or "the automatic choice is nowhere slower than another")
    made = choices(records.read(folder, CHOICES))
    for choice in sorted(made, key=lambda choice: choice.loss):  # the worst where one looks first
        print(choice.line)
    lost = sum(choice.loss > TOLERATED for choice in made)
    if made:
        print(f"{lost} of {len(made)} choices take over {TOLERATED} times the fastest way's time")


if __name__ == "__main__":
    main()
