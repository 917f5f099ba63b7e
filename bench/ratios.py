"""Speed-ups between rows of one run, and how far noise may have moved them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from .grid import Case, place_of
from .records import Row, case_of, newest, times

OURS = "ours"
# In which order two implementations are compared: by the first timer that both have.
TIMERS = ("wall", "graph", "eager", "cold")


class Ratio(NamedTuple):
    """How many times longer a rival takes, and the relative noise of that number."""

    value: float
    noise: float
    timer: str


def noise_of(row: Row) -> float:
    """Half the distance of the 20th and 80th percentile, as a share of the median."""
    return (row["p80_us"] - row["p20_us"]) / 2 / row["median_us"]


class Results:
    """The times of one results folder, by case and implementation.

    What was measured under other conditions than the last, as with other sources, does not count.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = newest(rows)
        self._times = times(self.rows)
        found = dict.fromkeys(case_of(row) for row in self._newest())
        self.cases: list[Case] = sorted(found, key=place_of)

    def row(self, case: Case, implementation: str, timer: str) -> Row | None:
        """The newest time of an implementation by a timer, if one was taken."""
        taken = self._taken(case, implementation, timer)
        return taken[max(taken)] if taken else None

    def _taken(self, case: Case, implementation: str, timer: str) -> dict[int, Row]:
        return self._times.get((*case, implementation, timer), {})

    def _newest(self) -> list[Row]:
        return [taken[max(taken)] for taken in self._times.values()]

    def first(self, case: Case, implementation: str) -> Row | None:
        """Its time by the first timer that took one."""
        found = (self.row(case, implementation, timer) for timer in TIMERS)
        return next((row for row in found if row is not None), None)

    def implementations(self, mode: str) -> list[str]:
        """All that were timed in a mode, in the order of the run."""
        rows = (row for row in self._newest() if row["case"]["mode"] == mode)
        return list(dict.fromkeys(row["implementation"] for row in rows))

    def rivals(self, mode: str) -> list[str]:
        """All that are not ours."""
        return [name for name in self.implementations(mode) if not name.startswith(OURS)]

    def ratio(self, case: Case, slower: str, faster: str = OURS) -> Ratio | None:
        """How many times longer ``slower`` takes than ``faster``, by the newest run that timed both
        side by side; None where none did."""
        for timer in TIMERS:
            of_slower, of_faster = (self._taken(case, x, timer) for x in (slower, faster))
            if both := of_slower.keys() & of_faster.keys():
                above, below = of_slower[max(both)], of_faster[max(both)]
                noise = math.hypot(noise_of(above), noise_of(below))
                return Ratio(above["median_us"] / below["median_us"], noise, timer)
        return None

    def best_rival(self, case: Case) -> tuple[str, Ratio] | None:
        """The fastest that is not ours, by its ratio."""
        found = [(name, self.ratio(case, name)) for name in self.rivals(case.mode)]
        known = [(name, ratio) for name, ratio in found if ratio is not None]
        return min(known, key=lambda pair: pair[1].value, default=None)


def geometric_mean(values: Iterable[float]) -> float:
    """The mean that fits ratios.

    Raises:
        ValueError: there are none.
    """
    logarithms = [math.log(value) for value in values]
    if not logarithms:
        raise ValueError("no values to average")
    return math.exp(math.fsum(logarithms) / len(logarithms))
