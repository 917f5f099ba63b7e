"""``python -m bench.report``: tables and plots from the committed results.

A file takes a table between two lines, and this writes what is between them::

    <!-- bench:cpu-step -->
    <!-- /bench:cpu-step -->

Names are ``cpu-`` or ``gpu-`` and a table of ``bench.tables``; ``cpu-plots`` and ``gpu-plots``,
which link the plots from a file in docs; and ``paper``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import ROOT, marked, paper, records
from .ratios import Results
from .tables import TABLES, caption

FILES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
PICTURES = ROOT / "docs" / "benchmarks"
_KINDS = {"cpu": "cpu", "gpu": "cuda"}
_PREFIX = "bench:"  # markers that begin so name a table


def load(folder: Path = records.RESULTS) -> dict[str, list[Results]]:
    """Results of every device kind, ``cpu`` and ``gpu``, by the names of their folders."""
    found: dict[str, list[Results]] = {kind: [] for kind in _KINDS}
    for path in sorted(folder.glob(f"*/{records.ROWS}")):
        rows = records.read(path.parent)
        for kind, device_type in _KINDS.items():
            if rows and rows[-1]["machine"]["device_type"] == device_type:
                found[kind].append(Results(rows))
    return found


def table(name: str, data: dict[str, list[Results]]) -> str:
    """The text for a marker.

    Raises:
        KeyError: there is no table of that name.
    """
    if name == "paper":
        return paper.table()
    kind, _, wanted = name.partition("-")
    if wanted == "plots":
        links = [f"![{p.stem}]({PICTURES.name}/{p.name})" for p in PICTURES.glob(f"{kind}-*.svg")]
        return "\n".join(sorted(links)) or "No results yet."
    make = TABLES[wanted]
    made = [(caption(results), make(results)) for results in data[kind]]
    parts = [f"{head}\n\n{body}" for head, body in made if body]
    return "\n\n".join(parts) or "No results yet."


def render(text: str, data: dict[str, list[Results]]) -> str:
    """``text`` with every table between markers made anew; text without markers as it is."""

    def text_of(marker: str) -> str | None:
        return table(marker.removeprefix(_PREFIX), data) if marker.startswith(_PREFIX) else None

    return marked.replaced(text, text_of)


def main(arguments: list[str] | None = None) -> None:
    """Write tables into the files that ask for them, and the plots into docs."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=records.RESULTS, help="folder of results folders"
    )
    parser.add_argument("--check", action="store_true", help="fail if a table is out of date")
    options = parser.parse_args(arguments)
    data = load(options.results)
    if not any(data.values()):
        parser.error(f"there are no results in {options.results}")
    if not options.check:
        _draw(data)
    stale = []
    for path in FILES:
        before = path.read_text() if path.exists() else ""
        after = render(before, data)
        if after != before:
            stale.append(path.name)
            if not options.check:
                path.write_text(after)
    if options.check and stale:
        raise SystemExit(f"tables out of date in {', '.join(stale)}: python -m bench.report")
    print(f"tables written: {', '.join(stale) or 'all were up to date'}")


def _draw(data: dict[str, list[Results]]) -> None:
    from . import plots  # the tables alone do without matplotlib

    for kind, found in data.items():
        for results in found[-1:]:
            for path in plots.draw(results, PICTURES, kind):
                print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
