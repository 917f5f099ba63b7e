"""Plots of one device's results, as SVG files that are the same for the same data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .ceilings import Roofline, from_rows
from .grid import Case
from .ratios import OURS, Results
from .tables import ONE_QUERY, REFERENCE

_STYLE = {"svg.hashsalt": "continual_mha", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
_SHOWN = (OURS, REFERENCE, ONE_QUERY)
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#c1272d", "#7f5fa8", "#666666")


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
    return figure, axes


def _lines(results: Results, axes: Axes, cases: list[Case], x: Callable[[Case], int]) -> None:
    """One line per implementation of interest: ours, two known ones, and the fastest other."""
    best = [found[0] for case in cases if (found := results.best_rival(case)) is not None]
    names = list(dict.fromkeys((*_SHOWN, *sorted(best, key=best.count, reverse=True)[:1])))
    for name, colour in zip(names, _COLOURS, strict=False):
        points = [(x(case), results.first(case, name)) for case in cases]
        known = sorted((at, row["median_us"]) for at, row in points if row is not None)
        if known:
            axes.plot(*zip(*known, strict=True), marker="o", color=colour, label=name)
    axes.legend()


def over_streams(results: Results) -> Figure | None:
    """Time per step over the number of streams, for the family with the most points."""
    steps = [case for case in results.cases if case.mode == "step"]
    families = [(case.family, case.dtype) for case in steps]
    if not families:
        return None
    chosen = max(dict.fromkeys(families), key=families.count)
    cases = [case for case in steps if (case.family, case.dtype) == chosen]
    one = cases[0]
    window = f"E={one.embed_dim}, H={one.num_heads}, L={one.sequence_len}, {one.dtype}"
    figure, axes = _axes(f"One step, {window}", "streams N", "µs")
    _lines(results, axes, cases, lambda case: case.batch_size)
    return figure


def over_window(results: Results) -> Figure | None:
    """Time per step over the window, for the sizes that have the most windows."""
    steps = [case for case in results.cases if case.mode == "step"]
    sizes = [(c.batch_size, c.embed_dim, c.num_heads, c.dtype) for c in steps]
    if not sizes:
        return None
    chosen = max(dict.fromkeys(sizes), key=sizes.count)
    cases = [c for c, size in zip(steps, sizes, strict=True) if size == chosen]
    title = f"One step, N={chosen[0]}, E={chosen[1]}, H={chosen[2]}, {chosen[3]}"
    figure, axes = _axes(title, "window L", "µs")
    _lines(results, axes, cases, lambda case: case.sequence_len)
    return figure


def roofline(results: Results) -> Figure | None:
    """Our achieved rate over the work's arithmetic intensity, under the measured ceilings."""
    ceilings = from_rows(results.rows)
    rows = [results.first(case, OURS) for case in results.cases if not case.trains]
    known = [row for row in rows if row is not None]
    rates = {c.of: c.value for c in ceilings if c.name == "matrix rate"}
    if not known or not rates:
        return None
    figure, axes = _axes("Roofline", "operations per byte", "GFLOP/s")
    intensities = [row["flops"] / row["bytes"] for row in known]
    low, high = min(intensities) / 2, max(intensities) * 2
    memory, cache = (Roofline(ceilings).bandwidth(0, cold) for cold in (True, False))
    for (dtype, rate), colour in zip(rates.items(), _COLOURS[1:], strict=False):
        grid = [low * (high / low) ** (i / 60) for i in range(61)]
        axes.plot(grid, [min(rate, x * memory) for x in grid], color=colour, label=dtype)
        near = [min(rate, x * cache) for x in grid]
        axes.plot(grid, near, "--", color=colour, label=f"{dtype}, from cache")
    for mode, marker in (("step", "o"), ("forward", "s"), ("steps", "^")):
        points = [row for row in known if row["case"]["mode"] == mode]
        x = [row["flops"] / row["bytes"] for row in points]
        y = [row["flops"] / row["median_us"] / 1e3 for row in points]
        axes.scatter(x, y, marker=marker, color=_COLOURS[0], label=mode, zorder=3)
    axes.legend()
    return figure


def speed_up(results: Results) -> Figure | None:
    """How many times longer each other implementation takes for a step, every shape a point."""
    rivals = results.rivals("step")
    cases = [case for case in results.cases if case.mode == "step"]
    if not rivals:
        return None
    figure = Figure(figsize=(6.4, 0.4 * len(rivals) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title="One step: times as long as ours", xscale="log")
    for line, rival in enumerate(reversed(rivals)):
        found = [ratio.value for c in cases if (ratio := results.ratio(c, rival)) is not None]
        axes.scatter(found, [line] * len(found), color=_COLOURS[0], alpha=0.6)
    axes.set_yticks(range(len(rivals)), list(reversed(rivals)))
    axes.axvline(1, color=_COLOURS[5])
    return figure


def crossover(results: Results) -> Figure | None:
    """Time of a step that caches keys and values, in units of one that caches inputs."""
    points = []
    for case in results.cases:
        if case.mode == "step":
            ratio = results.ratio(case, "ours:kv", "ours:input")
            if ratio is not None:
                points.append((case.state_bytes / 2**20, ratio.value, case.family))
    if not points:
        return None
    title = "Cached keys and values against cached inputs"
    figure, axes = _axes(title, "keys and values of all streams, MiB", "kv / input, time")
    families = list(dict.fromkeys(family for *_, family in points))
    for family, marker in zip(families, "os^vDPX*<>", strict=False):
        mine = sorted((x, y) for x, y, name in points if name == family)
        axes.plot(*zip(*mine, strict=True), marker=marker, label=family)
    axes.axhline(1, color=_COLOURS[5])
    axes.legend()
    return figure


PLOTS = {
    "over-streams": over_streams,
    "over-window": over_window,
    "roofline": roofline,
    "speed-up": speed_up,
    "crossover": crossover,
}


def draw(results: Results, folder: Path, kind: str) -> list[Path]:
    """Write every plot that the results allow; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(_STYLE):
        for name, make in PLOTS.items():
            figure = make(results)
            if figure is not None:
                path = folder / f"{kind}-{name}.svg"
                figure.savefig(path, metadata={"Date": None})
                written.append(path)
    return written
