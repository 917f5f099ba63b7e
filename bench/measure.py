"""One case: every implementation set up, compared with the exact result, and then timed."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from .ceilings import Roofline
from .grid import Case, work
from .lost import DeviceLostError, failing_alone, leave, line_of
from .machine import free_memory
from .peers import Peer, Ready
from .problem import TOLERANCE, Problem
from .progress import bar, say
from .records import Row
from .timing import GPU_TIMERS, Contestant, GpuTimer, Summary, time_on_host

MEMORY_SHARE = 0.7  # of the memory that is free


@dataclass
class Entry:
    """An implementation that gave the right answer and waits to be timed."""

    peer: Peer
    ready: Ready
    error: float


def why_too_large(case: Case, device: torch.device) -> str | None:
    """Why a case does not fit into the memory that is free on ``device``; None if it does."""
    if 2.5 * case.state_bytes > MEMORY_SHARE * free_memory(device):
        return f"the state alone takes {case.state_bytes / 1e9:.1f} GB"
    return None


def groups(peers: list[Peer], case: Case, memory: int) -> Iterator[list[Peer]]:
    """Implementations that fit into memory together; those are timed in interleaved rounds.

    One that needs more than there is alone comes by itself, and may fail.
    """
    group: list[Peer] = []
    left = memory
    for peer in peers:
        needs = int(peer.copies * case.state_bytes)
        if group and needs > left:
            yield group
            group, left = [], memory
        group.append(peer)
        left -= needs
    if group:
        yield group


class Bench:
    """Measures cases on one device.

    Args:
        machine: goes into every row.
        budget: seconds that an implementation may take per case, about.
        keep: takes the rows of a case that cannot be ended, before the process is.
    """

    def __init__(
        self,
        device: torch.device,
        peers: list[Peer],
        roofline: Roofline,
        machine: dict[str, Any],
        budget: float = 0.4,
        keep: Callable[[list[Row]], None] = lambda rows: None,
    ) -> None:
        self.device = device
        self.peers = peers
        self.roofline = roofline
        self.machine = machine
        self.budget = budget
        self.keep = keep
        self.gpu = GpuTimer(device, budget / 4) if device.type == "cuda" else None
        self._found: list[Row] = []

    def rows(self, case: Case) -> list[Row]:
        """Rows for every implementation that knows the case's mode.

        The last one says that the case is finished, unless the device was lost on the way.
        """
        found = self._found = []
        present = []
        for peer in self.peers:
            if case.mode not in peer.modes:
                continue
            reason = peer.why_absent(case)
            if reason is None:
                present.append(peer)
            else:
                found.append(self._row(case, peer, "absent", reason=reason))
        try:
            reason = why_too_large(case, self.device)
            if reason is not None:
                raise MemoryError(reason)
            problem = Problem(case, self.device)
            problem.past_kv  # noqa: B018  (made now: it counts as taken below)
            memory = free_memory(self.device)
            for group in groups(present, case, int(MEMORY_SHARE * memory)):
                self._measure_group(case, problem, group)
        except DeviceLostError:
            return found
        except (RuntimeError, MemoryError) as error:
            found += [self._row(case, peer, "failed", reason=line_of(error)) for peer in present]
        self._clean_up()
        end = {"kind": "case", "case": case._asdict(), "machine": self.machine}
        return [*found, {**end, "implementations": names_in(case.mode, self.peers)}]

    def _measure_group(self, case: Case, problem: Problem, group: list[Peer]) -> None:
        prepared = [self._prepare(problem, peer) for peer in group]
        entries = [entry for entry in prepared if entry is not None]
        if self.gpu is None:
            contestants = [Contestant(e.ready.run, e.ready.context) for e in entries]
            summaries = time_on_host(contestants, self.budget)
            for entry, summary in zip(entries, summaries, strict=True):
                self._found.append(self._timed(case, entry, "wall", summary))
        else:
            for timer in GPU_TIMERS:
                for entry in entries:
                    self._time_on_gpu(case, entry, timer)
        entries.clear()
        prepared.clear()
        self._clean_up()

    def _failing_alone(
        self, case: Case, peer: Peer, timer: str | None = None
    ) -> AbstractContextManager[None]:
        row_of = lambda reason: self._row(case, peer, "failed", timer, reason)
        return failing_alone(self.device, self._found, row_of, self.keep)

    def _prepare(self, problem: Problem, peer: Peer) -> Entry | None:
        """Set up and check; a row says why there is no entry."""
        case = problem.case
        with self._failing_alone(case, peer):
            ready = peer.setup(problem)
            with ready.context():
                error = problem.error(ready.run())
            if error <= TOLERANCE[case.dtype]:
                return Entry(peer, ready, error)
            reason = f"relative error {error:.1e} is over {TOLERANCE[case.dtype]:.0e}"
            self._found.append(self._row(case, peer, "wrong", reason=reason, error=error))
        return None

    def _time_on_gpu(self, case: Case, entry: Entry, timer: str) -> None:
        reason = entry.ready.why_no_graph if timer in ("graph", "cold") else None
        if reason is not None:
            self._found.append(self._row(case, entry.peer, "absent", timer, reason))
            return
        with self._failing_alone(case, entry.peer, timer):
            with entry.ready.context():
                summary = getattr(self.gpu, timer)(entry.ready.run)
            self._found.append(self._timed(case, entry, timer, summary))

    def _timed(self, case: Case, entry: Entry, timer: str, summary: Summary) -> Row:
        chosen = entry.ready.formulation
        formulation = chosen if chosen in ("kv", "input") else entry.peer.formulation
        least = work(case, formulation)
        floor = self.roofline.microseconds(case, formulation, timer == "cold")
        return {
            **self._row(case, entry.peer, "ok", timer, error=entry.error),
            "formulation": formulation,
            **times_of(summary),
            "bytes": least.bytes,
            "flops": least.flops,
            "gb_per_s": round(least.bytes / summary.median / 1e3, 3),
            "roofline_us": round(floor, 4),
            "roofline_share": round(floor / summary.median, 4),
        }

    def _row(
        self,
        case: Case,
        peer: Peer,
        status: str,
        timer: str | None = None,
        reason: str | None = None,
        error: float | None = None,
    ) -> Row:
        return {
            "kind": "time",
            "case": case._asdict(),
            "implementation": peer.name,
            "formulation": peer.formulation,
            "timer": timer,
            "status": status,
            "reason": reason,
            "error": error,
            "machine": self.machine,
        }

    def _clean_up(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def names_in(mode: str, peers: Iterable[Peer]) -> list[str]:
    """Implementations that know the mode."""
    return [peer.name for peer in peers if mode in peer.modes]


def each_kept(
    cases: Iterable[Case],
    rows_of: Callable[[Case], list[Row]],
    keep: Callable[[list[Row]], None],
    end: float = math.inf,
) -> Iterator[tuple[Case, list[Row]]]:
    """Each case with its rows, which are on disk before the next begins; none begins after ``end``.

    Ends the process after the rows of a case that has lost the device.
    """
    for case in bar(cases, "case"):
        if time.monotonic() > end:
            say("stopped at the time limit; --resume measures the rest")
            return
        rows = rows_of(case)
        keep(rows)
        last = rows[-1]
        if last["kind"] != "case":
            say(f"{case.label}: {last.get('implementation', last.get('plan'))}: {last['reason']}")
            leave()
        yield case, rows


def times_of(summary: Summary) -> Row:
    """The times of a summary as rows have them."""
    return {
        "median_us": round(summary.median, 4),
        "p20_us": round(summary.p20, 4),
        "p80_us": round(summary.p80, 4),
        "samples": summary.samples,
    }
