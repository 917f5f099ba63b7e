"""How a call is timed: on the host in interleaved rounds, on a GPU by events and graph replay."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

Run = Callable[[], object]
Context = Callable[[], AbstractContextManager[object]]
_SLOW = 0.02
_TOO_SLOW_TO_REPEAT = 0.5
_LEAST_FLUSHED = 256 << 20  # bytes
_WAKE = 0.02  # seconds of work, after which a GPU that had none runs at its clock again


class Summary(NamedTuple):
    """Time per call in microseconds: median, 20th and 80th percentile, and how many samples."""

    median: float
    p20: float
    p80: float
    samples: int


def quantile(ordered: Sequence[float], share: float) -> float:
    """The ``share`` quantile of ascending values, by linear interpolation between neighbours."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def summarise(samples: Sequence[float]) -> Summary:
    """Median and percentiles of ``samples``.

    Raises:
        ValueError: there are none.
    """
    if not samples:
        raise ValueError("no samples to summarise")
    ordered = sorted(samples)
    return Summary(
        statistics.median(ordered), quantile(ordered, 0.2), quantile(ordered, 0.8), len(ordered)
    )


class Contestant(NamedTuple):
    """One of the calls that are timed against each other."""

    run: Run
    context: Context


def _batch(contestant: Contestant, calls: int, clock: Callable[[], float]) -> float:
    """Seconds that ``calls`` calls take."""
    run = contestant.run
    with contestant.context():
        start = clock()
        for _ in range(calls):
            run()
        return clock() - start


def _calls_per_sample(
    contestant: Contestant, shortest: float, clock: Callable[[], float]
) -> tuple[int, float]:
    """Calls that fill ``shortest`` seconds, and the time of one call. Warms up on the way.

    The best of three decides: one disturbance would make the samples of a short call too short.
    """
    first = _batch(contestant, 1, clock)
    if first > _TOO_SLOW_TO_REPEAT:
        return 1, first
    calls = 1
    while True:
        taken = min(_batch(contestant, calls, clock) for _ in range(3))
        if taken >= shortest:
            return calls, taken / calls
        calls = max(2 * calls, math.ceil(1.2 * calls * shortest / max(taken, 1e-9)))
        calls = min(calls, 1_000_000)


def time_on_host(
    contestants: Sequence[Contestant],
    budget: float = 0.4,
    shortest: float = 2e-3,
    least: int = 5,
    most: int = 40,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Summary]:
    """Time every contestant in rounds, one sample of each per round.

    Whatever disturbs the machine for a while then disturbs all of them, and ratios stay right.

    Args:
        contestants: what to time; each is warmed up first, and before each of its samples.
        budget: seconds that each may take, unless ``least`` samples take longer.
        shortest: seconds that one sample takes at least; short calls are repeated to fill it.
        least: rounds at the least; 3 for a call that takes longer than the whole budget.
        most: rounds at the most.
        clock: seconds, monotonic.
    """
    sizes = [_calls_per_sample(contestant, shortest, clock) for contestant in contestants]
    wanted = [
        max(3 if each > budget else least, min(most, int(budget / max(calls * each, 1e-9))))
        for calls, each in sizes
    ]
    samples: list[list[float]] = [[] for _ in contestants]
    order = list(enumerate(contestants))
    shuffle = random.Random(0).shuffle
    planned = sum(
        rounds * calls * each for rounds, (calls, each) in zip(wanted, sizes, strict=True)
    )
    deadline = clock() + 3 * planned
    for turn in range(max(wanted, default=0)):
        if turn >= least and clock() > deadline:  # somebody else is using the machine
            break
        shuffle(order)  # nobody always comes after the same neighbour
        for index, contestant in order:
            if turn < wanted[index]:
                calls, each = sizes[index]
                if each < _SLOW:  # a slow call loses nothing to caches that others have filled
                    _batch(contestant, 1 + calls // 8, clock)
                samples[index].append(1e6 * _batch(contestant, calls, clock) / calls)
    return [summarise(each) for each in samples]


# -- on a GPU ------------------------------------------------------------------------------------


class Flush:
    """Evicts a GPU's level-2 cache by reading a buffer several times its size.

    Reading leaves clean lines behind; after writing, the timed kernel would pay for write-backs.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.zeros(max(4 * cache, _LEAST_FLUSHED) // 4, device=device)
        self._sink = torch.zeros((), device=device)

    def __call__(self) -> None:
        torch.sum(self._buffer, dim=0, out=self._sink)


def capture(run: Run, calls: int, warm_up: int = 3) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``calls`` calls of ``run``, warmed up on the capturing stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            run()
    return graph


def time_with_events(
    run: Run, samples: int, calls: int = 1, before: Callable[[], None] | None = None
) -> Summary:
    """Device time per call between two events around each run.

    Args:
        run: enqueues the work; ``calls`` calls of what is measured.
        samples: how often.
        calls: what to divide by.
        before: enqueued ahead of every sample, outside of the timed region: a cache flush.
    """
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(samples)
    ]
    for start, end in pairs:
        if before is not None:
            before()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return summarise([1e3 * start.elapsed_time(end) / calls for start, end in pairs])


def _seconds_of_one(run: Run) -> float:
    """Wall time of one warm call, the device's work included."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def share_out(budget: float, one: float, samples: int, most_calls: int) -> tuple[int, int]:
    """Samples, and calls in each, that take ``budget`` seconds if one call takes ``one``.

    At least 5 samples of one call, whatever they take; at most ``samples`` of ``most_calls``.
    """
    samples = max(5, min(samples, int(budget / one)))
    return samples, max(1, min(most_calls, int(budget / samples / one)))


def time_in_loop(
    run: Run, budget: float = 0.1, samples: int = 20, most_calls: int = 200, wait: bool = True
) -> Summary:
    """Wall time per eager call in a loop: the larger of host and device time.

    Args:
        wait: whether the device has to finish before the clock is read; if not, this is the host's
            time to enqueue a call, as long as the device's queue is not full.
    """
    samples, calls = share_out(budget, _seconds_of_one(run), samples, most_calls)
    taken = []
    for _ in range(samples):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        if wait:
            torch.cuda.synchronize()
        taken.append(1e6 * (time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return summarise(taken)


def wake(run: Run) -> None:
    """Let the device run ``run`` for as long as its clock may take to rise.

    It falls while the host sets up or compiles, and a short measurement would be over too soon.
    """
    end = time.perf_counter() + _WAKE
    while True:
        run()
        torch.cuda.synchronize()
        if time.perf_counter() >= end:
            return


def time_in_graph(run: Run, budget: float = 0.1) -> Summary:
    """Device time per call in a replayed graph of many calls, caches as the calls leave them.

    Between calls in one graph there is no launch from the host, so this is the time of the work
    itself.
    """
    samples, calls = share_out(budget, _seconds_of_one(run), 40, 50)
    graph = capture(run, calls)
    wake(graph.replay)
    return time_with_events(graph.replay, samples, calls)


class GpuTimer:
    """The timers of a GPU; each gives a Summary, or raises what capturing raised.

    Args:
        budget: seconds that a timer may take, about.
    """

    def __init__(self, device: torch.device, budget: float = 0.1) -> None:
        self.flush = Flush(device)
        self.budget = budget

    def eager(self, run: Run) -> Summary:
        """Wall time per eager call."""
        return time_in_loop(run, self.budget)

    def host(self, run: Run) -> Summary:
        """Host time per eager call."""
        return time_in_loop(run, self.budget, samples=40, most_calls=20, wait=False)

    def graph(self, run: Run) -> Summary:
        """``time_in_graph``."""
        return time_in_graph(run, self.budget)

    def cold(self, run: Run) -> Summary:
        """Device time of one replayed call with nothing of its data in the level-2 cache."""
        samples, _ = share_out(self.budget, _seconds_of_one(run), 100, 1)
        graph = capture(run, 1)
        wake(graph.replay)
        return time_with_events(graph.replay, samples, 1, self.flush)


GPU_TIMERS = ("graph", "cold", "eager", "host")
