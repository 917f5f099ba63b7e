"""A pytest plugin that keeps every test's outcome as it comes, and a short account of them all.

``-p bench.digest --digest FILE``. What is on disk stays if the run is stopped, and many failures
with one cause take one line.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

BACKENDS = ("triton", "cuda", "cpu", "torch")
ENDED = "its process ended: it took too long, or the test before it lost the device"
_MOST_CAUSES = 12
_WIDTH = 150


def pytest_addoption(parser: Any) -> None:
    """The file to write."""
    parser.addoption("--digest", type=Path, help="outcomes of tests, as JSON Lines")


def pytest_configure(config: Any) -> None:
    """Workers of pytest-xdist report to one process, which writes."""
    if config.option.digest is not None and not hasattr(config, "workerinput"):
        config.option.digest.write_text("")
        config.pluginmanager.register(_Writer(config.option.digest))


class _Writer:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._uncollected: set[str] = set()

    def pytest_collectreport(self, report: Any) -> None:
        """Of files that do not import; workers report each to all."""
        if report.failed and report.nodeid not in self._uncollected:
            self._uncollected.add(report.nodeid)
            self._write(report)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.outcome == "passed" and report.when != "call":
            return
        self._write(report)

    def _write(self, report: Any) -> None:
        row = {"test": report.nodeid, "outcome": report.outcome, "error": _error_of(report)}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _error_of(report: Any) -> str | None:
    """The first line of what went wrong; where a file does not import, the cause."""
    if report.outcome != "failed":
        return None
    if re.match(r"worker '\w+' crashed", str(report.longrepr)):
        return ENDED
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        causes = re.findall(r"^E\s+(.*)", str(report.longrepr), re.M)
        return causes[-1] if causes else str(report.longrepr).strip().partition("\n")[0]
    return crash.message.strip().partition("\n")[0]


def without_numbers(text: str) -> str:
    """What is the same in two messages that differ in numbers alone."""
    return re.sub(r"[\d.]+(e[+-]?\d+)?", "#", text)


def _backend_of(test: str) -> str:
    parameters = test.partition("[")[2].rstrip("]").split("-")
    return next((name for name in BACKENDS if name in parameters), "other")


def passed(path: Path) -> int:
    """How many tests passed."""
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return sum(row["outcome"] == "passed" for row in rows)


def account(path: Path) -> str:
    """Outcomes by backend, and the causes of failures from the most frequent on."""
    if not path.exists():
        return ""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    causes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        backend = _backend_of(row["test"])
        counts[backend][row["outcome"]] += 1
        if row["outcome"] == "failed":
            causes[backend, without_numbers(row["error"])].append(row["test"])
    lines = [
        f"{backend}: " + ", ".join(f"{n} {outcome}" for outcome, n in sorted(found.items()))
        for backend, found in counts.items()
    ]
    ordered = sorted(causes.items(), key=lambda item: -len(item[1]))
    for (backend, cause), tests in ordered[:_MOST_CAUSES]:
        lines.append(f"{len(tests)}x {backend}: {cause}"[:_WIDTH])
        lines.append(f"    {tests[0]}"[:_WIDTH])
    if len(ordered) > _MOST_CAUSES:
        lines.append(f"and {len(ordered) - _MOST_CAUSES} other causes")
    return "\n".join(lines)
