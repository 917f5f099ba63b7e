"""Results on disk: JSON Lines, one row per implementation, shape, dtype, mode and timer."""

from __future__ import annotations

import json
from collections.abc import Iterable
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


def case_of(row: Row) -> Case:
    """The case that a row belongs to."""
    return Case(**row["case"])


def key_of(row: Row) -> tuple[Any, ...]:
    """What a time is of: case, implementation and timer."""
    return (*case_of(row), row["implementation"], row["timer"])


def times(rows: Iterable[Row]) -> dict[tuple[Any, ...], Row]:
    """The newest measured time of everything that was timed, by ``key_of``."""
    return {key_of(row): row for row in rows if row["kind"] == "time" and row["status"] == "ok"}


def _same_machine(row: Row, machine: dict[str, Any]) -> bool:
    """Whether a row was measured with the same sources on the same kind of device."""
    return all(row["machine"][name] == machine[name] for name in ("sources", "device"))


def finished(rows: Iterable[Row], machine: dict[str, Any]) -> set[Case]:
    """Cases that a run of the same sources on the same kind of device has been through."""
    return {case_of(row) for row in rows if row["kind"] == "case" and _same_machine(row, machine)}


def losers(rows: Iterable[Row], machine: dict[str, Any]) -> list[Row]:
    """Rows of what lost such a device to a run of the same sources."""
    failed = (row for row in rows if row.get("status") == "failed" and _same_machine(row, machine))
    return [row for row in failed if row["reason"].startswith(REASON)]
