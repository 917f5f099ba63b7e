"""``python -m bench.compare OLD NEW``: which shapes got slower between two results folders.

Two runs are never under the same conditions, so our times are judged by their ratio to the times
of other implementations on the same shape in the same run, which did not change.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from . import records
from .arguments import real
from .grid import Case
from .ratios import OURS, TIMERS, Results, noise_of


class Change(NamedTuple):
    """How many times as long a shape takes now, and the relative noise of that number."""

    case: Case
    implementation: str
    timer: str
    factor: float
    noise: float

    def is_slower(self, least: float) -> bool:
        """Slower by more than ``least`` and by more than twice the noise."""
        return math.log(self.factor) > max(math.log1p(least), 2 * self.noise)

    def is_faster(self, least: float) -> bool:
        """As ``is_slower``, the other way."""
        return -math.log(self.factor) > max(math.log1p(least), 2 * self.noise)


def _shift(old: Results, new: Results, case: Case, name: str, timer: str) -> tuple[float, float]:
    """Logarithm of new over old time of one implementation, and its noise.

    Raises:
        KeyError: one of the runs does not have it.
    """
    before, after = old.row(case, name, timer), new.row(case, name, timer)
    if before is None or after is None:
        raise KeyError(name)
    noise = math.hypot(noise_of(before), noise_of(after))
    return math.log(after["median_us"] / before["median_us"]), noise


def _drift(old: Results, new: Results, case: Case, timer: str) -> tuple[float, float] | None:
    """How the machine itself changed, by the other implementations on the same shape."""
    shifts = []
    for rival in old.rivals(case.mode):
        try:
            shifts.append(_shift(old, new, case, rival, timer))
        except KeyError:
            continue
    if not shifts:
        return None
    middle = statistics.median(shift for shift, _ in shifts)
    spread = statistics.median(abs(shift - middle) for shift, _ in shifts)
    return middle, max(spread, statistics.median(noise for _, noise in shifts))


def changes(old: Results, new: Results) -> list[Change]:
    """Every time of ours that both runs have, with the machine's own change taken out."""
    found = []
    for case in old.cases:
        names = [name for name in old.implementations(case.mode) if name.startswith(OURS)]
        for timer in TIMERS:
            drift = _drift(old, new, case, timer)
            if drift is None:
                continue
            for name in names:
                try:
                    shift, noise = _shift(old, new, case, name, timer)
                except KeyError:
                    continue
                factor = math.exp(shift - drift[0])
                found.append(Change(case, name, timer, factor, math.hypot(noise, drift[1])))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print what changed; exit with 1 if anything got slower."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--least", type=real, default=0.05, help="changes below do not count")
    options = parser.parse_args(arguments)
    old, new = (Results(records.read(folder)) for folder in (options.old, options.new))
    devices = [results.rows[-1]["machine"]["device"] for results in (old, new) if results.rows]
    if len(set(devices)) > 1:
        parser.error(f"these are two devices: {' and '.join(devices)}")
    found = changes(old, new)
    slower = [change for change in found if change.is_slower(options.least)]
    faster = [change for change in found if change.is_faster(options.least)]
    for word, group in (("faster", faster), ("SLOWER", slower)):
        for change in sorted(group, key=lambda c: c.factor):
            print(
                f"{word}  {change.factor:.2f}x the time (noise {change.noise:.0%})  "
                f"{change.implementation}, {change.timer}: {change.case.label}"
            )
    print(f"{len(found)} times compared: {len(slower)} slower, {len(faster)} faster")
    if slower or not found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
