"""``python -m bench``: measure every implementation over the grid, and keep the rows."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import torch

from . import ceilings, grid, machine, records
from .arguments import names, positive, real
from .measure import Bench, each_kept, names_in
from .peers import Peer, all_peers
from .progress import say


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--size", choices=grid.SIZES, default="standard", help="how much of it")
    parser.add_argument("--mode", type=names, default=grid.MODES, help=",".join(grid.MODES))
    parser.add_argument("--dtype", type=names, default=None, help="names of dtypes, with commas")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="by default a GPU")
    parser.add_argument("--out", type=Path, default=None, help="results folder")
    parser.add_argument("--resume", action="store_true", help="go on with what a run left undone")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="also those under torch.compile; by default on a CPU, but for the quick size",
    )
    parser.add_argument("--only", type=names, default=(), help="implementations that start so")
    parser.add_argument("--budget", type=positive, default=0.4, help="seconds for each and case")
    parser.add_argument("--limit", type=real, default=None, help="seconds, then stop in order")
    options = parser.parse_args(arguments)
    if set(options.mode) - set(grid.MODES):
        parser.error(f"--mode takes {', '.join(grid.MODES)}")
    if set(options.dtype or ()) - set(grid.BYTES):
        parser.error(f"--dtype takes {', '.join(grid.BYTES)}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure; every finished case is on disk before the next begins."""
    options = parse(arguments)
    end = time.monotonic() + (math.inf if options.limit is None else options.limit)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    about = machine.describe(device.type)
    folder = options.out or records.RESULTS / machine.slug(about)
    cases = list(grid.cases(device.type, options.size, options.mode, options.dtype))
    compiled = device.type == "cpu" and options.size != "quick"
    peers = all_peers(device, compiled if options.compile is None else options.compile)
    if options.only:
        known = ", ".join(peer.name for peer in peers)
        peers = [peer for peer in peers if peer.name.startswith(options.only)]
        if not peers:
            raise SystemExit(f"--only takes what implementations start with: {known}")
    losers: set[str] = set()
    if options.resume:
        rows = records.read(folder)
        losers = {row["implementation"] for row in records.losers(rows, about)}
        done = {mode: records.finished(rows, about, names_in(mode, peers)) for mode in grid.MODES}
        cases = [case for case in cases if case not in done[case.mode]]
    if not cases:
        print(f"nothing left to measure in {folder}")
        return
    say(f"{about['device']}: {len(cases)} cases, into {folder}")
    found = ceilings.measure(device, tuple(dict.fromkeys(case.dtype for case in cases)))
    begin = [{**row, "machine": about} for row in ceilings.as_rows(found)]
    keep = records.keeper(folder, begin=begin, anew=not options.resume)
    peers = [_excluded(p) if p.name in losers else p for p in peers]
    bench = Bench(device, peers, ceilings.Roofline(found), about, options.budget, keep)
    for case, rows in each_kept(cases, bench.rows, keep, end):
        say(_line(case, rows))


def _excluded(peer: Peer) -> Peer:
    return replace(peer, why_absent=lambda case: "it had lost the device")


def _line(case: grid.Case, rows: list[records.Row]) -> str:
    """A case's times in words: ours, and the others from the fastest on."""
    first = [row for row in rows if row.get("status") == "ok"]
    timers = [row["timer"] for row in first]
    timed = [row for row in first if row["timer"] == timers[0]]
    timed.sort(key=lambda row: (row["implementation"] != "ours", row["median_us"]))
    times = [f"{row['implementation']} {row['median_us']:.1f}" for row in timed[:4]]
    return f"{case.label}: {', '.join(times) or 'nothing could be timed'} us"


if __name__ == "__main__":
    main()
