"""Markdown tables from rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .grid import Case
from .ratios import OURS, Ratio, Results, geometric_mean
from .records import Row

REFERENCE = "continual-inference"
ONE_QUERY = "nn.MultiheadAttention, one query"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first aligned to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def microseconds(row: Row | None) -> str:
    """Median and percentiles at three figures."""
    if row is None:
        return ""
    spread = f"{figures(row['p20_us'])}–{figures(row['p80_us'])}"
    return f"{figures(row['median_us'])} ({spread})"


def figures(value: float) -> str:
    """A number at three figures, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def times_as(ratio: Ratio | None) -> str:
    """A speed-up: ``4.2×``."""
    return "" if ratio is None else f"{figures(ratio.value)}×"


def _sizes(case: Case) -> list[str]:
    many = f", T={case.tokens}" if case.takes_many else ""
    window = f"E={case.embed_dim}, H={case.num_heads}, L={case.sequence_len}{many}"
    return [f"{case.family}: {window}, {case.dtype}", str(case.batch_size)]


def _share(row: Row | None) -> str:
    return "" if row is None else f"{100 * row['roofline_share']:.0f} %"


def speed(results: Results, mode: str) -> str:
    """Our times over the cases of a mode, their share of the roofline, and the speed-ups."""
    on_gpu = any(row["timer"] == "graph" for row in results.rows if row["kind"] == "time")
    header = ["shape", "N"]
    header += ["graph, µs", "cold, µs", "host, µs"] if on_gpu else ["µs"]
    header += ["of roofline", f"over {REFERENCE}"]
    one_query = not mode.startswith("steps")
    header += [f"over {ONE_QUERY}"] if one_query else []
    header += ["over the fastest other", "which is"]
    lines = []
    for case in results.cases:
        first = results.first(case, OURS)
        if case.mode != mode or first is None:
            continue
        cells = _sizes(case)
        if on_gpu:
            cells += [microseconds(results.row(case, OURS, t)) for t in ("graph", "cold", "host")]
            cells.append(_share(results.row(case, OURS, "cold")))
        else:
            cells += [microseconds(first), _share(first)]
        best = results.best_rival(case)
        cells.append(times_as(results.ratio(case, REFERENCE)))
        cells += [times_as(results.ratio(case, ONE_QUERY))] if one_query else []
        cells += [times_as(best[1]), f"{best[0]} ({best[1].timer})"] if best else ["", ""]
        lines.append(cells)
    return markdown(header, lines) if lines else ""


def _kinds(results: Results) -> list[tuple[str, str]]:
    """Modes and dtypes, in the order of the cases."""
    return list(dict.fromkeys((case.mode, case.dtype) for case in results.cases))


def _speed_ups(results: Results, kind: tuple[str, str], rival: str | None) -> list[float]:
    """Over one implementation, or in each case over the fastest, where there are times."""
    found = []
    for case in results.cases:
        if (case.mode, case.dtype) != kind:
            continue
        if rival is not None:
            ratio = results.ratio(case, rival)
        else:
            best = results.best_rival(case)
            ratio = best[1] if best else None
        if ratio is not None:
            found.append(ratio.value)
    return found


def _mean_and_least(speed_ups: list[float]) -> str:
    return f"{figures(geometric_mean(speed_ups))}× ({figures(min(speed_ups))}×)"


def brief(results: Results) -> str:
    """Speed-up of the automatic choice by mode and dtype: geometric means, and the least ones."""
    rivals = {REFERENCE: REFERENCE, ONE_QUERY: ONE_QUERY, "the fastest other": None}
    lines = []
    for kind in _kinds(results):
        found = [_speed_ups(results, kind, rival) for rival in rivals.values()]
        if any(found):
            cells = [_mean_and_least(x) if x else "" for x in found]
            lines.append([f"{kind[0]}, {kind[1]}", str(max(map(len, found))), *cells])
    return markdown(["", "shapes", *(f"over {name}" for name in rivals)], lines) if lines else ""


def summary(results: Results) -> str:
    """Speed-up of the automatic choice over every other implementation, by mode and dtype."""
    lines = []
    for mode, dtype in _kinds(results):
        for rival in results.rivals(mode):
            found = _speed_ups(results, (mode, dtype), rival)
            if found:
                numbers = (geometric_mean(found), min(found), max(found))
                cells = [f"{figures(x)}×" for x in numbers]
                lines.append([f"{mode}, {dtype}: {rival}", str(len(found)), *cells])
    header = ["over", "shapes", "geometric mean", "least", "most"]
    return markdown(header, lines) if lines else ""


def dispatch(results: Results) -> str:
    """Where the automatic choice is not our fastest, and by how much."""
    lines = []
    for case in results.cases:
        ours = [name for name in results.implementations(case.mode) if name.startswith("ours:")]
        ratios = {name: results.ratio(case, OURS, name) for name in ours}
        known = {name: ratio for name, ratio in ratios.items() if ratio is not None}
        if known:
            best = max(known, key=lambda name: known[name].value)
            lost = known[best].value
            judged = "noise" if lost < 1 + 2 * known[best].noise else f"{figures(lost)}×"
            lines.append([f"{case.mode} {_sizes(case)[0]}", _sizes(case)[1], best, judged])
    return markdown(["shape", "N", "our fastest", "automatic takes"], lines) if lines else ""


def ceilings(results: Results) -> str:
    """What the machine can do."""
    found = {(r["name"], r["of"]): r for r in results.rows if r["kind"] == "ceiling"}
    lines = [
        [f"{name}, {of}", f"{figures(r['value'])} {r['unit']}"] for (name, of), r in found.items()
    ]
    return markdown(["ceiling, on bytes or dtype", "measured"], lines) if lines else ""


def missing(results: Results) -> str:
    """Implementations without a time, and why."""
    reasons: dict[tuple[str, str, str], int] = {}
    for row in results.rows:
        if row["kind"] == "time" and row["status"] != "ok":
            reason = row["reason"].replace("|", "/")
            key = (row["implementation"], row["status"], reason)
            reasons[key] = reasons.get(key, 0) + 1
    lines = [[f"{name}: {reason}", status, str(n)] for (name, status, reason), n in reasons.items()]
    return markdown(["implementation", "status", "rows"], lines) if lines else ""


TABLES: dict[str, Callable[[Results], str]] = {
    "brief": brief,
    "summary": summary,
    "step": lambda results: speed(results, "step"),
    "forward": lambda results: speed(results, "forward"),
    "forward_backward": lambda results: speed(results, "forward_backward"),
    "steps": lambda results: speed(results, "steps"),
    "steps_backward": lambda results: speed(results, "steps_backward"),
    "dispatch": dispatch,
    "ceilings": ceilings,
    "missing": missing,
}


def caption(results: Results) -> str:
    """The machine and the versions, in one line above a table."""
    machine = next(row["machine"] for row in reversed(results.rows))
    versions = machine["versions"]
    parts = [machine["device"], machine["capability"]]
    parts += [f"driver {machine['driver']}"] if machine["driver"] else []
    parts += [f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions]
    return f"*{', '.join(parts)}; commit {machine['commit']}*"
