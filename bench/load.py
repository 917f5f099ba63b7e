"""``python -m bench.load``: how many live streams a CPU core or a GPU serves in real time.

Every stream brings 25 tokens a second, so that a tick may take 40 ms. Streams arrive, leave and
pause at random. A search by short bursts finds about how many fit; a run in real time, one tick
every 40 ms, then has to keep 99.9 % of its ticks within their 40 ms, or is repeated with fewer.
A tick lasts from tokens in the host's memory to outputs there.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import continual_mha as co

from . import grid, machine, records
from .arguments import count, positive, real
from .timing import quantile

RATE = 25.0  # tokens per second of each stream
LEAVE = 0.001  # chance of a stream to leave in a tick: it stays for 40 s on average
JOIN = 0.02  # chance of a free slot to get a stream
PAUSE, RESUME = 0.01, 0.09  # chances of a stream to pause and to go on: a tenth of them pauses
LATE = 0.001  # share of the ticks that may last longer
LEAST = 1.0  # seconds in real time that tell anything
FAMILIES = {family.name: family for family in (grid.DETECTION, grid.SPEECH)}


class Tick(NamedTuple):
    """Who does what in a tick, as bool masks over the slots."""

    left: Tensor
    joined: Tensor
    active: Tensor


class Traffic:
    """Streams that arrive, leave and pause at random, the same for the same seed."""

    def __init__(self, slots: int, seed: int = 0) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self._open = self._chance(slots, JOIN / (JOIN + LEAVE))
        self._paused = self._chance(slots, PAUSE / (PAUSE + RESUME))
        self.first = self._open.clone()
        self.joined = self.left = self.taken = 0

    def _chance(self, slots: int, probability: float) -> Tensor:
        return torch.rand(slots, generator=self._random) < probability

    def next(self) -> Tick:
        """The next tick."""
        slots = len(self._open)
        left = self._open & self._chance(slots, LEAVE)
        joined = ~self._open & self._chance(slots, JOIN)
        self._open = (self._open & ~left) | joined
        turned = torch.where(self._paused, self._chance(slots, RESUME), self._chance(slots, PAUSE))
        self._paused = (self._paused ^ turned) & ~joined
        active = self._open & ~self._paused
        self.left += int(left.sum())
        self.joined += int(joined.sum())
        self.taken += int(active.sum())
        return Tick(left, joined, active)


class ModuleServer:
    """A module stepped by masks: what the package itself costs."""

    def __init__(self, module: co.SingleOutputMultiheadAttention, slots: int) -> None:
        weight = module.out_proj.weight
        self.module = module
        self._device = weight.device
        on_gpu = self._device.type == "cuda"
        shape = (slots, module.embed_dim)
        self._host = torch.randn(shape, dtype=weight.dtype, pin_memory=on_gpu)
        self._answers = torch.empty(shape, dtype=weight.dtype, pin_memory=on_gpu)
        module.start_streams(slots)

    def tick(self, tick: Tick) -> float:
        """Seconds from the tokens on the host to the outputs there."""
        started = time.perf_counter()
        if bool(tick.joined.any()):
            self.module.reset(tick.joined.to(self._device))
        tokens = self._host.to(self._device, non_blocking=True)
        active = tick.active.to(self._device)
        output = self.module.forward_step(tokens, active=active)
        assert output is not None
        self._answers.copy_(output)
        return time.perf_counter() - started


class PoolServer:
    """A ``StreamPool``, token by token: what a server in Python costs besides."""

    def __init__(self, module: co.SingleOutputMultiheadAttention, slots: int) -> None:
        weight = module.out_proj.weight
        self.module = module
        self._pool = co.StreamPool(module, slots, (module.embed_dim,))
        self._tokens = torch.randn(slots, module.embed_dim, dtype=weight.dtype).unbind()
        self._streams: dict[int, int] = {}

    def tick(self, tick: Tick) -> float:
        """Seconds from the tokens on the host to the outputs there, streams' comings included."""
        started = time.perf_counter()
        for slot in tick.left.nonzero().flatten().tolist():
            if slot in self._streams:
                self._pool.close(self._streams.pop(slot))
        for slot in tick.active.nonzero().flatten().tolist():
            if slot not in self._streams:
                self._streams[slot] = self._pool.open()
            self._pool.push(self._streams[slot], self._tokens[slot])
        outputs = self._pool.tick()
        if outputs:
            torch.stack(list(outputs.values())).cpu()
        return time.perf_counter() - started


SERVERS: dict[str, Callable[..., Any]] = {"module": ModuleServer, "pool": PoolServer}


class Load(NamedTuple):
    """What was served, and the times of its ticks in milliseconds."""

    slots: int
    ticks: int
    late: int
    mean_active: float
    joined: int
    left: int
    p50_ms: float
    p99_ms: float
    p999_ms: float


def grow_old(module: co.SingleOutputMultiheadAttention, slots: int) -> None:
    """Give every stream a whole window, which would take seconds by steps: a young stream has few
    slots to attend to, and a short run over young ones would promise too much."""
    stream = module.get_stream(0)
    for field in stream:
        if field.is_floating_point() and field.numel():
            field.normal_()
    stream.position.fill_(module.sequence_len)
    clock = stream.clock.new_empty(module.sequence_len, 0)
    every = [field.expand(slots, *field.shape[1:]) for field in stream[:-1]]
    module.clean_state()  # whose memory the copies take
    module.set_state(type(stream)(*every, clock))


def serve(server: Any, slots: int, ticks: int, real_time: bool) -> Load:
    """Run traffic over ``slots``, each tick at its time if ``real_time``, else at once.

    In real time it ends with the tick that makes more than ``LATE`` of all ticks late.
    """
    traffic = Traffic(slots)
    server.tick(Tick(torch.zeros_like(traffic.first), traffic.first, traffic.first))
    grow_old(server.module, slots)
    for _ in range(3):
        server.tick(traffic.next())
    gc.collect()
    gc.freeze()  # as a server does: a collection that looks at all of torch's objects takes 90 ms
    traffic.joined = traffic.left = traffic.taken = 0
    times: list[float] = []
    late = 0
    begun = time.perf_counter()
    for number in range(ticks):
        if real_time and late > LATE * ticks:
            break
        tick = traffic.next()
        if real_time:
            time.sleep(max(0.0, begun + number / RATE - time.perf_counter()))
        times.append(1e3 * server.tick(tick))
        late += times[-1] > 1e3 / RATE
    gc.unfreeze()
    ordered = sorted(times)
    p50, p99, p999 = (quantile(ordered, share) for share in (0.5, 0.99, 0.999))
    served = len(times)
    counts = (slots, served, late, traffic.taken / served, traffic.joined, traffic.left)
    return Load(*counts, p50, p99, p999)


def _room(family: grid.Family, device: torch.device, dtype: torch.dtype) -> int:
    """Slots whose rings fit into half of the memory."""
    each = 2 * family.sequence_len * family.embed_dim * dtype.itemsize
    return max(1, machine.free_memory(device) // 2 // each)


def find(make: Callable[[int], Any], most: int, burst: int) -> int:
    """About the largest number of slots whose median tick takes less than 80 % of its time."""
    fits = lambda slots: serve(make(slots), slots, burst, False).p50_ms < 0.8 * 1e3 / RATE
    good = 1
    while good < most and fits(min(2 * good, most)):
        good = min(2 * good, most)
    bad = min(2 * good, most + 1)
    while bad - good > max(1, good // 16):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def measure(
    family: grid.Family, through: str, device: torch.device, dtype: torch.dtype, seconds: float
) -> Load:
    """The largest load that is served in real time."""
    module = co.SingleOutputMultiheadAttention(
        family.embed_dim,
        family.num_heads,
        sequence_len=family.sequence_len,
        device=device,
        dtype=dtype,
    ).requires_grad_(False)

    def make(slots: int) -> Any:
        module.clean_state()
        return SERVERS[through](module, slots)

    slots = find(make, _room(family, device, dtype), burst=15)
    while True:
        load = serve(make(slots), slots, max(1, int(seconds * RATE)), True)
        if load.late <= LATE * load.ticks or slots == 1:
            return load
        print(f"{slots} streams: {load.late} late in {load.ticks} ticks, fewer now", flush=True)
        slots = max(1, slots * 9 // 10)


def main(arguments: list[str] | None = None) -> None:
    """Measure every family, and append a row for each to ``load.jsonl`` in the results folder."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="by default a GPU")
    parser.add_argument("--family", choices=sorted(FAMILIES), action="append")
    parser.add_argument("--through", choices=sorted(SERVERS), action="append")
    parser.add_argument("--dtype", choices=sorted(grid.BYTES), default=None)
    parser.add_argument("--seconds", type=positive, default=60.0, help="of each run in real time")
    parser.add_argument("--limit", type=real, default=None, help="seconds for all runs, about")
    parser.add_argument("--threads", type=count, default=1, help="cores, on a CPU")
    parser.add_argument("--out", type=Path, default=None, help="results folder")
    options = parser.parse_args(arguments)
    if options.seconds < LEAST:
        parser.error(f"--seconds: less than {LEAST} tell nothing")
    end = float("inf") if options.limit is None else time.monotonic() + options.limit
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_num_threads(options.threads)
    about = machine.describe(device.type)
    name = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    folder = options.out or records.RESULTS / machine.slug(about)
    runs = list(product(options.family or FAMILIES, options.through or SERVERS))
    dtype = getattr(torch, name)
    for number, (family, through) in enumerate(runs):
        # The search takes its time too, and a run that fails is repeated.
        share = (end - time.monotonic()) / (len(runs) - number) / 3
        if share < LEAST:
            print(f"stopped at the time limit before {family} through the {through}", flush=True)
            break
        seconds = min(options.seconds, share)
        load = measure(FAMILIES[family], through, device, dtype, seconds)
        row = {"kind": "load", "through": through, "dtype": name, "rate": RATE}
        row |= {"family": FAMILIES[family]._asdict(), **load._asdict()}
        row |= {"threads": options.threads, "machine": about}
        records.append(folder, [row], records.LOAD)
        unit = "GPU" if device.type == "cuda" else f"{options.threads} CPU core(s)"
        print(
            f"{family}, {name}, through the {through}: {load.slots} streams on {unit}; tick "
            f"p50 {load.p50_ms:.1f}, p99 {load.p99_ms:.1f}, p99.9 {load.p999_ms:.1f} ms; "
            f"{load.late} of {load.ticks} late",
            flush=True,
        )


if __name__ == "__main__":
    main()
