"""What the machine can do at best, measured in the run whose rows are compared with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .grid import Case, work
from .timing import Run, capture, summarise, time_in_graph, time_with_events

CPU_SIZES = (1 << 18, 1 << 21, 1 << 24, 1 << 28)  # bytes; the last is far over any cache here
GPU_SIZES = (1 << 22, 1 << 25, 1 << 28, 1 << 31)
MATRIX_SIDES = {"cpu": 1024, "cuda": 8192}


class Ceiling(NamedTuple):
    """One limit: its name, what it was measured on (bytes or a dtype), value and unit."""

    name: str
    of: str
    value: float
    unit: str


def _best_seconds(run: Run, device: torch.device, seconds: float = 0.15) -> float:
    """The shortest of many calls: a ceiling is what is possible, not what is usual."""
    run()
    if device.type == "cuda":
        # In a graph, for a small size is read sooner than the host launches the next reader.
        return time_in_graph(run).p20 / 1e6
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def _readers(x: Tensor) -> list[Callable[[], object]]:
    """Ways to read all of ``x``, of which the fastest counts."""
    matrix = x.view(-1, 1024)
    vector = torch.ones(1024, dtype=x.dtype, device=x.device)
    ways: list[Callable[[], object]] = [lambda: matrix @ vector, lambda: torch.sum(x)]
    if x.is_cuda:
        from .read_kernel import reader

        ways.append(reader(x))
    return ways


def read_bandwidth(size: int, device: torch.device) -> Ceiling:
    """How fast ``size`` bytes are read again and again."""
    x = torch.ones(size // 4, dtype=torch.float32, device=device)
    seconds = min(_best_seconds(way, device) for way in _readers(x))
    return Ceiling("read bandwidth", str(size), size / seconds / 1e9, "GB/s")


def _bandwidths(device: torch.device) -> list[Ceiling]:
    found = []
    for size in GPU_SIZES if device.type == "cuda" else CPU_SIZES:
        found.append(read_bandwidth(size, device))
        x = torch.ones(size // 4, dtype=torch.float32, device=device)
        y = torch.empty_like(x)
        copy = _best_seconds(lambda x=x, y=y: y.copy_(x), device)
        found.append(Ceiling("copy bandwidth", str(size), 2 * size / copy / 1e9, "GB/s"))
    return found


def _matrix_rate(device: torch.device, dtype: str) -> Ceiling:
    side = MATRIX_SIDES[device.type]
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
    seconds = _best_seconds(lambda: a @ b, device, 0.4)
    return Ceiling("matrix rate", dtype, 2 * side**3 / seconds / 1e9, "GFLOP/s")


def _seconds_per_call(run: Run, calls: int = 2000, rounds: int = 5) -> float:
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        taken.append((time.perf_counter() - start) / calls)
    return min(taken)


def _dispatch(device: torch.device) -> Ceiling:
    """Calling an operator that does nothing, registered as this package registers its own."""
    library = torch.library.Library("continual_mha_bench", "FRAGMENT")
    library.define("nothing(Tensor x) -> ()")
    for key in ("CPU", "CUDA"):
        library.impl("nothing", lambda x: None, key)
    op, x = torch.ops.continual_mha_bench.nothing, torch.zeros(1, device=device)
    with torch.inference_mode():
        seconds = _seconds_per_call(lambda: op(x))
    library._destroy()
    return Ceiling("op dispatch", device.type, 1e6 * seconds, "us")


def _launches(device: torch.device) -> list[Ceiling]:
    """An almost empty kernel: launched from the host, as a graph's node, and a graph of one."""
    x = torch.zeros(1, device=device)
    run = lambda: x.add_(1.0)
    eager = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(500):
            run()
        torch.cuda.synchronize()
        eager.append(1e6 * (time.perf_counter() - start) / 500)
    graph, single = capture(run, 100), capture(run, 1)
    node = time_with_events(graph.replay, 30, 100).median
    alone = time_with_events(single.replay, 100).median
    return [
        Ceiling("empty launch", "eager", summarise(eager).median, "us"),
        Ceiling("empty graph node", "of 100", node, "us"),
        Ceiling("empty graph between events", "of 1", alone, "us"),
    ]


def measure(device: torch.device, dtypes: tuple[str, ...]) -> list[Ceiling]:
    """All ceilings of ``device``; matrix rates for ``dtypes``."""
    found = _bandwidths(device)
    found += [_matrix_rate(device, dtype) for dtype in dtypes]
    found.append(_dispatch(device))
    if device.type == "cuda":
        found += _launches(device)
    return found


class Roofline:
    """The least time of a case on a machine with given ceilings."""

    def __init__(self, ceilings: list[Ceiling]) -> None:
        self._read = sorted((int(c.of), c.value) for c in ceilings if c.name == "read bandwidth")
        self._rates = {c.of: c.value for c in ceilings if c.name == "matrix rate"}

    def bandwidth(self, working_set: int, cold: bool = False) -> float:
        """GB/s for data of ``working_set`` bytes: the fastest of the measured sizes that holds it.

        With ``cold`` caches, or data larger than every measured size, that of the largest.
        """
        if cold:
            return self._read[-1][1]
        larger = [rate for size, rate in self._read if size >= working_set]
        return max(larger, default=self._read[-1][1])

    def microseconds(self, case: Case, formulation: str, cold: bool = False) -> float:
        """``max(bytes / bandwidth, operations / rate)``."""
        least = work(case, formulation)
        moving = least.bytes / self.bandwidth(least.bytes, cold) / 1e3
        return max(moving, least.flops / self._rates[case.dtype] / 1e3)


def as_rows(ceilings: list[Ceiling]) -> list[dict[str, Any]]:
    """Rows of the results file."""
    return [{"kind": "ceiling", **ceiling._asdict()} for ceiling in ceilings]


def from_rows(rows: list[dict[str, Any]]) -> list[Ceiling]:
    """The ceilings among rows of a results file, the newest of each."""
    found = {}
    for row in rows:
        if row["kind"] == "ceiling":
            found[row["name"], row["of"]] = Ceiling(*(row[key] for key in Ceiling._fields))
    return list(found.values())
