"""Results on disk: JSON Lines, one row per implementation, shape, dtype, mode and timer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .grid import Case
from .lost import REASON

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"  # a folder for every kind of device
ROWS = "rows.jsonl"
CHOICES = "choices.jsonl"  # of ``bench.choices``
LOAD = "load.jsonl"  # of ``bench.load``


def read(folder: Path, name: str = ROWS) -> list[Row]:
    """All rows of a file of a results folder; none if there is none."""
    path = folder / name
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def append(folder: Path, rows: Iterable[Row], name: str = ROWS) -> None:
    """Add rows at once, so that a run that is cut short leaves whole cases."""
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a") as file:
        file.write(text)


def keeper(
    folder: Path, name: str = ROWS, *, begin: Iterable[Row] = (), anew: bool = False
) -> Callable[[Iterable[Row]], None]:
    """What adds rows to a file, the first of them behind ``begin``.

    Before those it deletes what is there, if the file is to be made ``anew``: a run that gets to
    nothing leaves what another one found.
    """
    waiting, old = list(begin), anew

    def keep(rows: Iterable[Row]) -> None:
        nonlocal old
        if old:
            (folder / name).unlink(missing_ok=True)
        append(folder, [*waiting, *rows], name)
        waiting.clear()
        old = False

    return keep


def case_of(row: Row) -> Case:
    """The case that a row belongs to."""
    return Case(**row["case"])


def key_of(row: Row) -> tuple[Any, ...]:
    """What a time is of: case, implementation and timer."""
    return (*case_of(row), row["implementation"], row["timer"])


def by_run(rows: Iterable[Row]) -> list[tuple[int, Row]]:
    """Rows with the number of their run, which begins with what the machine can do at best."""
    numbered, run, before = [], 0, ""
    for row in rows:
        run += row["kind"] == "ceiling" != before
        before = row["kind"]
        numbered.append((run, row))
    return numbered


def times(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[int, Row]]:
    """The measured times of everything that was timed, by ``key_of`` and run, the newest last."""
    found: dict[tuple[Any, ...], dict[int, Row]] = {}
    for run, row in by_run(rows):
        if row["kind"] == "time" and row["status"] == "ok":
            found.setdefault(key_of(row), {})[run] = row
    return found


_CONDITIONS = ("sources", "device", "threads", "versions")


def same_machine(row: Row, machine: dict[str, Any]) -> bool:
    """Whether a row was measured with the same sources and packages on the same kind of device."""
    about = row.get("machine", {})
    return all(about.get(name) == machine.get(name) for name in _CONDITIONS)


def newest(rows: Iterable[Row]) -> list[Row]:
    """Those that were measured under the conditions of the last."""
    rows = list(rows)
    return [row for row in rows if same_machine(row, rows[-1].get("machine", {}))]


def finished(
    rows: Iterable[Row], machine: dict[str, Any], implementations: Iterable[str] = ()
) -> set[Case]:
    """Cases that one run of the same sources on the same kind of device has been through with all
    of these implementations. What it went through is every one of them where it does not say."""
    wanted = set(implementations)
    return {
        case_of(row)
        for row in rows
        if row["kind"] == "case"
        and same_machine(row, machine)
        and wanted <= set(row.get("implementations", wanted))
    }


def losers(rows: Iterable[Row], machine: dict[str, Any]) -> list[Row]:
    """Rows of what lost such a device to a run of the same sources."""
    failed = (row for row in rows if row.get("status") == "failed" and same_machine(row, machine))
    return [row for row in failed if row["reason"].startswith(REASON)]
