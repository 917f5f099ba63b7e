"""A long life: no drift, no growth, no slowing down.

`make soak` takes a million steps; the test suite as many as fit into a few seconds.
"""

from __future__ import annotations

import gc
import os
import resource
import statistics
import sys
import time
import tracemalloc

import pytest
import torch
from oracles import assert_equals_window, build

import continual_mha as co

STEPS = int(os.environ.get("CONTINUAL_MHA_SOAK_STEPS", "0"))
SECONDS = 4.0
SIZES = {"embed_dim": 16, "num_heads": 2, "sequence_len": 24}
N = 3


def soak(tick, least=5000):
    """Call `tick` again and again; the seconds of every hundred calls."""
    times = []
    until = time.monotonic() + SECONDS
    while len(times) * 100 < max(STEPS, least) or (not STEPS and time.monotonic() < until):
        started = time.perf_counter()
        for _ in range(100):
            tick()
        times.append(time.perf_counter() - started)
    return times


def resident():
    """The most memory that the process has held so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def assert_no_growth(tick):
    """A thousand more ticks allocate nothing that stays."""
    gc.collect()
    tracemalloc.start()
    for _ in range(200):  # until the pool's history holds none that was not traced
        tick()
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(1000):
        tick()
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    print(f"{grown} bytes more after a thousand more")
    assert grown < 20_000, f"{grown} bytes more"


def assert_as_fast_as_at_first(times):
    tenth = len(times) // 10
    first, last = (statistics.median(part) for part in (times[:tenth], times[-tenth:]))
    print(f"{100 * len(times)} in {sum(times):.0f} s: {1e4 * first:.1f} us, then {1e4 * last:.1f}")
    assert last < 3 * first, f"{first:.4f} s, then {last:.4f} s for a hundred steps"


@pytest.mark.parametrize("kind", ["kv", "kv_delayed", "input"])
def test_steps_neither_drift_nor_grow_nor_slow_down(kind):
    arguments = {"formulation": kind[:2] if kind != "input" else kind}
    arguments |= {"query_index": 5} if kind == "kv_delayed" else {}
    module = build(**SIZES, **arguments).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(997, N, SIZES["embed_dim"], generator=generator)
    count = 0
    output = None

    def tick():
        nonlocal count, output
        output = module.forward_step(tokens[count % len(tokens)])
        count += 1

    for _ in range(200):
        tick()
    held = resident()
    times = soak(tick)
    print(f"{resident() - held:.1f} MiB more held")
    assert resident() - held < 64
    assert_no_growth(tick)
    assert_as_fast_as_at_first(times)
    last = [tokens[t % len(tokens)] for t in range(count - SIZES["sequence_len"], count)]
    assert_equals_window(output[:, None], module, torch.stack(last, 1))
    assert module._ring_position.tolist() == [count] * N


def test_pool_neither_grows_nor_slows_down_as_streams_come_and_go():
    module = build(**SIZES).requires_grad_(False)
    pool = co.StreamPool(module, 4, (SIZES["embed_dim"],), history=100)
    token = torch.ones(SIZES["embed_dim"])
    streams = [pool.open() for _ in range(4)]
    count = 0

    def tick():
        nonlocal count
        if count % 37 == 0:
            pool.close(streams.pop(0))
            streams.append(pool.open())
        for stream in streams[: 1 + count % 4]:
            pool.push(stream, token)
        pool.tick()
        count += 1

    for _ in range(200):
        tick()
    held = resident()
    times = soak(tick, least=2000)
    print(f"{resident() - held:.1f} MiB more held")
    assert resident() - held < 64
    assert_no_growth(tick)
    assert_as_fast_as_at_first(times)
