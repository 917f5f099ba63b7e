"""The code that only a GPU would run, on a device that is pretended: its logic, not its speed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import upstream
from oracles import assert_same_state, build, draw_tokens
from pretended_cuda import DEVICE, PretendedCuda

import continual_mha as co
from bench import __main__ as command
from bench import (
    ceilings,
    choices,
    digest,
    exercise,
    gpu,
    grid,
    lost,
    machine,
    measure,
    peers,
    records,
    timing,
)  # fmt: skip
from bench.grid import Case
from continual_mha import graphs
from continual_mha.quantized import QuantizedRing
from continual_mha.triton_kernels import launch as launcher
from continual_mha.triton_kernels import project, ring_step, ring_steps

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
LENGTH = 5


@pytest.fixture
def cuda():
    with PretendedCuda().in_place() as pretended:
        yield pretended


@pytest.fixture(params=[name for name in ("torch", "cpu") if name in co.backends.available()])
def kernels(request, cuda):
    """Kernels that run here, and that the pretended graph can replay."""
    with co.use_backend(request.param):
        yield request.param


def modules(formulation, **arguments):
    """Two of the same."""
    arguments |= {"sequence_len": LENGTH, "formulation": formulation}
    return [build(**arguments).requires_grad_(False) for _ in range(2)]


# -- the pretence ----------------------------------------------------------------------------------


def test_pretended_graph_computes_at_the_replay_only_and_from_what_is_there_then(cuda):
    x, total = torch.zeros(3), torch.zeros(3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x.view(3) * 2
        total.add_(y)
    total.zero_()
    assert y.isnan().all()
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert torch.equal(y, torch.full((3,), 2 * value))
    assert torch.equal(total, torch.full((3,), 12.0))


def test_pretended_graph_refuses_what_a_capture_cannot_hold(cuda):
    x = torch.ones(3)
    for forbidden in (x.sum().item, torch.cuda.synchronize, x.nonzero):
        with pytest.raises(RuntimeError, match="not permitted"), torch.cuda.graph(cuda_graph()):
            forbidden()


def test_what_tests_draw_for_a_backend_is_drawn_on_its_device(cuda):
    with torch.device("cuda"):
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, generator=torch.Generator())
        module = build()
        query, _, _ = draw_tokens(module, 2, LENGTH)
    assert query.isfinite().all()


@pytest.mark.parametrize(("codes", "largest"), [(torch.int8, 127), (torch.uint8, 448)], ids=str)
def test_scales_of_8_bits_are_divided_as_kernels_divide(codes, largest, cuda):
    x = torch.randn(1000, 4)
    size = x.abs().amax(1, keepdim=True)
    ring = QuantizedRing(torch.zeros(1, 1, dtype=codes), size).holding(x)
    exact = size.double() / torch.full_like(size, largest).double()
    assert torch.equal(ring.scale, exact.float())
    assert not torch.equal(size / largest, exact.float())  # so that there is a difference


def cuda_graph():
    return torch.cuda.CUDAGraph()


# -- the graphed step and the pool -----------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"query_index": 1}], ids=["newest", "delayed"])
@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_graphed_step_equals_the_eager_step_across_the_rings_end(formulation, arguments, kernels):
    module, other = modules(formulation, **arguments)
    x = draw_tokens(module, 3, 3 * LENGTH + 2)[0]
    graphed = co.GraphedStep(module, x[:, 0])
    other.start_streams(3)
    active = torch.ones(3, dtype=torch.bool)
    assert torch.equal(graphed.active, active)
    for t, token in enumerate(x.unbind(1)):
        if t == LENGTH + 3:
            module.reset(torch.tensor([True, False, False]))
            other.reset(torch.tensor([True, False, False]))
        if t == LENGTH + 5:
            graphed.active[1] = active[1] = False
        expected = other.forward_step(token, active=active)
        assert torch.equal(graphed(token), expected)
    assert torch.equal(module._ring_position, other._ring_position)
    module.clean_state()
    with pytest.raises(RuntimeError, match="replaced"):
        graphed(x[:, 0])


def test_step_is_captured_on_another_stream_of_its_device_than_ran_it_first(kernels, monkeypatch):
    """What libraries keep for a stream is to come from the graph's memory; torch's own stream for
    captures is that of the first device asked. And a capture may go wrong by what its own thread
    does, not by one that serves beside it.
    """
    used, modes = [], []
    on, captured = torch.cuda.stream, torch.cuda.graph

    def graph(graph, stream=None, capture_error_mode="global"):
        used.append(stream)
        modes.append(capture_error_mode)
        return captured(graph)

    monkeypatch.setattr(torch.cuda, "stream", lambda stream: (used.append(stream), on(stream))[1])
    monkeypatch.setattr(torch.cuda, "graph", graph)
    module, _ = modules("kv")
    co.GraphedStep(module, draw_tokens(module, 3, 1)[0][:, 0])
    first, last = used
    assert first is not last
    assert modes == ["thread_local"]


def test_memory_of_a_step_that_fails_is_freed_when_its_stream_is_done_with_it(cuda, monkeypatch):
    waits = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            waits.append((self.name, other.name))

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("current"))
    module, _ = modules("kv")
    tokens = draw_tokens(module, 3, 1)[0][:, 0]
    monkeypatch.setattr(module, "forward_step", lambda tokens: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        co.GraphedStep(module, tokens)
    assert waits == [("side", "current"), ("current", "side")]


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_keeps_no_copies_of_weights_for_a_graph_to_read(enabled, kernels, monkeypatch):
    """They are freed with its block, and the graph would read what comes after them."""
    module, _ = modules("kv")
    tokens = draw_tokens(module, 3, 1)[0][:, 0]
    seen, step = [], module.forward_step
    monkeypatch.setattr(
        module,
        "forward_step",
        lambda x: seen.append(torch.is_autocast_cache_enabled()) or step(x),
    )
    torch.set_autocast_cache_enabled(enabled)
    try:
        co.GraphedStep(module, tokens)
        assert torch.is_autocast_cache_enabled() == enabled
    finally:
        torch.set_autocast_cache_enabled(True)
    assert seen
    assert not any(seen)


MOVES = {
    "half": lambda module: module.half(),
    "weight": lambda module: setattr(
        module.in_proj_weight, "data", module.in_proj_weight.data.clone()
    ),
    "set_state": lambda module: module.set_state(module.get_state()),
    "assigned": lambda module: module.load_state_dict(build().state_dict(), assign=True),
    "output projection": lambda module: setattr(module, "out_proj", torch.nn.Linear(12, 12)),
}


def test_a_graph_that_fails_last_leaves_the_streams(kernels, monkeypatch):
    module, _ = modules("kv")
    monkeypatch.setattr(graphs, "_parts_of", lambda module: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        co.GraphedStep(module, draw_tokens(module, 3, 1)[0][:, 0])
    assert module.get_state() is None


@pytest.mark.parametrize("moved", MOVES)
def test_graph_is_not_replayed_over_what_moved(moved, kernels):
    module, twin = modules("kv")
    tokens = draw_tokens(module, 3, 1)[0][:, 0]
    graphed = co.GraphedStep(module, tokens)
    twin.start_streams(3)
    assert torch.equal(graphed(tokens), twin.forward_step(tokens))
    module.detach_state()  # which moves nothing
    with torch.no_grad():
        module.out_proj.weight.mul_(2)
        twin.out_proj.weight.mul_(2)
    assert torch.equal(graphed(tokens), twin.forward_step(tokens))
    MOVES[moved](module)
    with pytest.raises(RuntimeError, match="replaced"):
        graphed(tokens)


def test_a_capture_that_fails_leaves_the_thread_on_its_stream(cuda, monkeypatch):
    streams = []

    @contextlib.contextmanager
    def graph(graph, stream=None, capture_error_mode="global"):
        streams.append(stream)
        yield
        raise AssertionError("no error, and none where CUDA ended the capture")

    before = object()
    module, _ = modules("kv")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda: SimpleNamespace(wait_stream=lambda x: None, me=before)
    )
    monkeypatch.setattr(module, "forward_step", lambda tokens: tokens)
    with pytest.raises(AssertionError, match="no error"):
        co.GraphedStep(module, torch.zeros(3, module.embed_dim))
    assert streams[-1].me is before


def test_threads_capture_one_after_the_other(cuda, monkeypatch):
    """A capture begins by waiting for the device, and none that is under way there survives it."""
    under_way, seen = [], []

    @contextlib.contextmanager
    def graph(graph, stream=None, capture_error_mode="global"):
        seen.append(len(under_way))
        under_way.append(graph)
        time.sleep(0.1)
        yield
        under_way.pop()

    def make(module):
        with torch.cuda.stream(None), co.use_backend("torch"):
            co.GraphedStep(module, torch.zeros(3, module.embed_dim))

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(make, modules("kv")))
    assert seen == [0, 0]


# name: (what to make of good tokens, error, fragments)
BAD_TOKENS = {
    "wider": (lambda x: x.double(), TypeError, ["float64", "float32", "convert"]),
    "halves": (lambda x: x.half(), TypeError, ["float16", "float32", "convert"]),
    "integers": (lambda x: x.long(), TypeError, ["int64", "float32"]),
    "fewer streams": (lambda x: x[:2], ValueError, ["(3, 12)", "(2, 12)"]),
    "one stream, which would broadcast": (lambda x: x[:1], ValueError, ["(3, 12)", "(1, 12)"]),
    "no axes": (lambda x: x[0, 0], ValueError, ["(3, 12)", "()"]),
    "elsewhere": (lambda x: x.to("meta"), ValueError, ["cuda:0", "meta"]),
    "a list": (lambda x: x.tolist(), TypeError, ["tensor", "list"]),
}


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_graphed_step_refuses_bad_tokens_and_goes_on(case, kernels):
    spoil, error, fragments = BAD_TOKENS[case]
    module, twin = modules("kv")
    x = draw_tokens(module, 3, LENGTH + 2)[0]
    graphed, other = co.GraphedStep(module, x[:, 0]), co.GraphedStep(twin, x[:, 0])
    for token in x.unbind(1):
        with pytest.raises(error) as caught:
            graphed(spoil(token))
        assert all(fragment in str(caught.value) for fragment in fragments)
        assert torch.equal(graphed(token), other(token))
    assert_same_state(module.get_state(), twin.get_state())


def test_graphed_step_takes_tokens_that_need_a_gradient_and_keeps_no_graph(kernels):
    module, twin = modules("kv")
    x = draw_tokens(module, 3, 4)[0]
    graphed, other = co.GraphedStep(module, x[:, 0]), co.GraphedStep(twin, x[:, 0])
    for token in x.unbind(1):
        assert torch.equal(graphed(token.clone().requires_grad_()), other(token))
    assert not graphed._tokens.requires_grad


def test_graphed_step_may_be_made_in_inference_mode_and_used_outside(kernels):
    module, twin = modules("kv")
    x = draw_tokens(module, 3, 4)[0]
    with torch.inference_mode():
        graphed = co.GraphedStep(module, x[:, 0])
    other = co.GraphedStep(twin, x[:, 0])
    for token in x.unbind(1):
        assert torch.equal(graphed(token), other(token))
    module.reset(torch.tensor([True, False, False]))
    twin.reset(torch.tensor([True, False, False]))
    assert torch.equal(graphed(token), other(token))


@pytest.mark.parametrize("bad", [torch.zeros(3, 13), torch.zeros(3, 12).double(), torch.zeros(())])
def test_capture_that_fails_leaves_the_streams_where_they_were(bad, kernels):
    module, twin = modules("kv")
    x = draw_tokens(module, 2, LENGTH + 2)[0]
    for token in x.unbind(1):
        for each in (module, twin):
            each.forward_step(token)
    with pytest.raises((TypeError, ValueError)):
        co.GraphedStep(module, bad)
    assert_same_state(module.get_state(), twin.get_state())


def test_graphed_step_of_what_makes_no_steps_is_refused(cuda):
    with pytest.raises(TypeError, match="Sequential has no forward_step"):
        co.GraphedStep(torch.nn.Sequential(build()), torch.zeros(3, 12))


def test_pool_puts_the_streams_of_its_threads_in_order(cuda, monkeypatch):
    """None of which would wait for another, nor memory that one frees for its readers."""

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    log, here = [], [Stream("builder")]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: here[0])
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda x, stream: log.append(f"{stream.name} reads")
    )
    first, pusher, ticker = Stream("first"), Stream("pusher"), Stream("ticker")
    with co.use_backend("torch"):
        pool = co.StreamPool(build(), 2, (12,))
        here[0] = first
        streams = [pool.open(), pool.open()]
        assert log == ["first waits for builder"]
        log.clear()
        pool.push(streams[0], torch.ones(12))
        pool.tick()
        assert log == []  # all on one stream
        here[0] = pusher
        pool.push(streams[0], torch.ones(12))
        pool.push(streams[1], torch.ones(12))
        assert log == []
        here[0] = ticker
        pool.tick()
        assert log == [f"ticker waits for {first.name}"] + 2 * [
            "ticker waits for pusher", "ticker reads"
        ]  # fmt: skip
        log.clear()
        pool.export(streams[0])
        assert log == []
        here[0] = first
        pool.close(streams[0])
        pool.open()
        assert log == ["first waits for ticker"]


def test_graphed_pool_answers_as_the_eager_one(kernels):
    graphed, eager = (
        co.StreamPool(module, 3, (module.embed_dim,), graph=graph)
        for module, graph in zip(modules("kv"), (True, False), strict=True)
    )
    x = draw_tokens(build(), 1, 40)[0][0]
    streams = [[pool.open(), pool.open()] for pool in (graphed, eager)]
    for t in range(20):
        if t == 12:
            for pool, own in zip((graphed, eager), streams, strict=True):
                pool.close(own.pop(0))
                own.append(pool.open())
        answers = []
        for pool, own in zip((graphed, eager), streams, strict=True):
            pool.push(own[0], x[t])
            if t % 3:
                pool.push(own[1], x[t + 20])
            out = pool.tick()
            answers.append([out.get(stream) for stream in own])
        for a, b in zip(*answers, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


# -- Triton's launches -----------------------------------------------------------------------------


class Kernel:
    """A Triton kernel that runs nothing: it counts who calls it, and with how many arguments."""

    def __init__(self, kernel):
        self.params = kernel.params
        self.bound = self.direct = 0

    def warmup(self, *args, grid, num_warps, **options):
        assert len(grid) == 3
        assert len(args) == len(self.params)
        self.bound += 1
        return Compiled(self)


class Compiled:
    run, n_regs, n_spills = None, 128, 0

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, size):
        def call(*args):
            assert len(args) == len(self.kernel.params)
            self.kernel.direct += 1

        return call


@pytest.mark.skipif(launcher.INTERPRETED, reason="the interpreter launches nothing")
@pytest.mark.parametrize("streams", [1, 8, 100, 4096])
def test_triton_step_binds_once_and_is_launched_directly_from_then_on(streams, cuda, monkeypatch):
    """Of the paths: one launch, three, one for groups, and one between products of torch's."""
    for cache in ("_compiled", "_arenas", "_captured"):
        monkeypatch.setattr(launcher, cache, {})
    launched = []
    for module, name in (
        (ring_step, "_ring_step_kernel"),
        (project, "_project_kernel"),
        (ring_step, "_group_step_kernel"),
        (ring_steps, "ring_steps_kernel"),
        (ring_steps, "_write_rings_kernel"),
    ):
        launched.append(Kernel(getattr(module, name)))
        monkeypatch.setattr(module, name, launched[-1])
    arguments = {"embed_dim": 1024 if streams == 8 else 32, "num_heads": 8 if streams == 8 else 2}
    module = build(sequence_len=LENGTH, formulation="kv", **arguments).requires_grad_(False).half()
    token = torch.ones(streams, module.embed_dim).half()
    with co.use_backend("triton"):
        module.start_streams(streams)
        module.forward_step(token)
        bound = [kernel.bound for kernel in launched]
        assert bound[:3] == {8: [1, 2, 0], 100: [0, 0, 1]}.get(streams, [1, 0, 0])
        for _ in range(3):
            module.forward_step(token)
        assert [kernel.bound for kernel in launched] == bound
        assert launched[2 if streams == 100 else 0].direct == 4
        module.forward_steps(token[:, None].expand(-1, 4, -1))
        assert [kernel.bound for kernel in launched[3:]] == [1, 1]


@pytest.mark.skipif(launcher.INTERPRETED, reason="the interpreter launches nothing")
def test_launch_is_made_on_the_device_of_its_tensors(cuda, monkeypatch):
    current, launched_on = [1], []

    @contextlib.contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    class Where:
        run, n_regs, n_spills = None, 128, 0

        def warmup(self, *args, **options):
            return self

        def __getitem__(self, size):
            return lambda *args: launched_on.append(current[0])

    monkeypatch.setattr(launcher, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    for _ in range(2):
        launcher.launch(Where(), (1, 1, 1), (torch.zeros(4),), (), num_warps=4)
    assert launched_on == [0, 0]
    assert current == [1]


# -- forward where Triton is missing ---------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("options", "asked"),
    [({"forward_returns_attn_mask": False}, {}), ({}, {"need_weights": False})],
    ids=["not returned", "not needed"],
)
def test_masked_forward_without_returned_weights_runs_on_cuda(
    options, asked, grad, cuda, monkeypatch
):
    called = []

    def standing_in(name):
        def run(*args):
            called.append(name)
            return getattr(co.reference, name)(*args)

        return run

    native = co.backends._native
    names = ("attend_shared", "attend_shared_backward")
    functions = {name: standing_in(name) for name in names}
    functions["attend_shared_query_backward"] = partial(native.query_backward, functions)
    library = co.backends._Operators(functions, native.WHY_NOT["cuda"])
    load = co.backends._load
    found = {"triton": "Triton does not import", "cuda": library}
    monkeypatch.setattr(co.backends, "_load", lambda name: found.get(name) or load(name))
    module = build(sequence_len=64, **options)
    x = draw_tokens(module, 3, 64)[0]
    hidden = torch.rand(3, 64) < 0.5
    hidden[0] = True  # which leaves nothing
    with torch.set_grad_enabled(grad):
        out = module(x, key_padding_mask=hidden, **asked)
        with co.use_backend("torch"):
            expected = module(x, key_padding_mask=hidden, **asked)
    out, expected = (y if isinstance(y, torch.Tensor) else y[0] for y in (out, expected))
    torch.testing.assert_close(out, expected, equal_nan=True)
    assert out[0].isnan().all() == (not asked)
    if grad:
        trained = list(module.parameters())
        found, plain = (torch.autograd.grad(y[1:].sum(), trained) for y in (out, expected))
        if asked:  # else the NaN of the stream that sees nothing reaches plain PyTorch's
            for mine, other in zip(found, plain, strict=True):  # sums, in another order
                rounding = 1e-5 * float(other.abs().max())
                torch.testing.assert_close(mine, other, rtol=0, atol=rounding)
    assert called == list(names[: 2 if grad else 1])


# -- timers ----------------------------------------------------------------------------------------


@pytest.fixture
def small_flush(monkeypatch):
    monkeypatch.setattr(timing, "_LEAST_FLUSHED", 0)


def test_cold_samples_each_follow_a_flush_of_the_whole_cache(cuda, small_flush, monkeypatch):
    timer = timing.GpuTimer(DEVICE, budget=1e-3)
    assert timer.flush._buffer.nbytes >= 4 * torch.cuda.get_device_properties().L2_cache_size
    flush = timer.flush
    monkeypatch.setattr(timer, "flush", lambda: (cuda.log.append("flush"), flush()))
    replay = type(cuda_graph()).replay
    monkeypatch.setattr(
        type(cuda_graph()), "replay", lambda graph: (cuda.log.append("replay"), replay(graph))
    )
    x = torch.zeros(4)
    summary = timer.cold(lambda: x.add_(1))
    sample = ["flush", "record", "replay", "record"]
    timed = cuda.log[cuda.log.index("flush") :]
    assert timed == sample * summary.samples + ["synchronize"]
    assert len(cuda.graphs[-1].operations) == 1


@pytest.mark.parametrize("timer", ["graph", "cold"])
def test_graphs_are_timed_once_the_clock_has_risen(timer, cuda, small_flush, monkeypatch):
    """After a pause of the device, as while a kernel was compiled, it runs at a lower one."""
    monkeypatch.setattr(timing, "_seconds_of_one", lambda run: 1e-4)
    ticks = itertools.count()
    clock = lambda: next(ticks) * timing._WAKE / 4
    timed = timing.GpuTimer(DEVICE, budget=1e-3)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock))
    getattr(timed, timer)(lambda: torch.zeros(4))
    ahead = cuda.log[: cuda.log.index("record")]
    assert ahead.count("synchronize") >= 4
    assert cuda.graphs[-1].replays >= 4 + 5  # samples


def test_events_are_divided_by_the_calls_between_them(cuda, small_flush, monkeypatch):
    ticks = itertools.count()
    cuda.clock = lambda: float(next(ticks))  # a second from each event to the next
    x = torch.zeros(4)
    timer = timing.GpuTimer(DEVICE, budget=1e-2)
    monkeypatch.setattr(timing, "_seconds_of_one", lambda run: 1e-4)
    summary = timer.graph(lambda: x.add_(1))
    calls = len(cuda.graphs[-1].operations)
    assert calls > 1
    assert summary.median == pytest.approx(1e6 / calls)
    before = float(x[0])
    timer.cold(lambda: x.add_(1))
    assert len(cuda.graphs[-1].operations) == 1
    assert float(x[0]) > before


@pytest.mark.parametrize(("timer", "waits"), [("eager", True), ("host", False)])
def test_eager_timers_wait_where_they_should(timer, waits, cuda, small_flush, monkeypatch):
    monkeypatch.setattr(timing, "_seconds_of_one", lambda run: 1e-3)
    cuda.log.clear()
    summary = getattr(timing.GpuTimer(DEVICE, 1e-2), timer)(lambda: cuda.log.append("run"))
    runs = [len(list(group)) for kind, group in itertools.groupby(cuda.log) if kind == "run"]
    assert len(runs) == summary.samples
    assert cuda.log[-1] == "synchronize"
    assert cuda.log.count("synchronize") == (2 if waits else 1) * summary.samples + 1


def test_ceilings_of_a_gpu_are_all_measured(cuda, monkeypatch):
    from bench import read_kernel

    class Read:
        def __getitem__(self, size):
            def run(x, sums, per_program, BLOCK):
                sums.copy_(x.view(size[0], per_program * BLOCK).sum(1))

            return run

    monkeypatch.setattr(read_kernel, "_read", Read())
    monkeypatch.setattr(ceilings, "GPU_SIZES", (1 << 16, 1 << 18))
    monkeypatch.setattr(ceilings, "MATRIX_SIDES", {"cuda": 64})
    monkeypatch.setattr(timing, "_seconds_of_one", lambda run: 1e-4)
    found = ceilings.measure(DEVICE, ("float32",))
    in_a_graph = [len(graph.operations) for graph in cuda.graphs]
    assert sum(operations >= 20 for operations in in_a_graph) == 2 * 4 + 1 + 1
    assert {ceiling.name for ceiling in found} == {
        "read bandwidth",
        "copy bandwidth",
        "matrix rate",
        "op dispatch",
        "empty launch",
        "empty graph node",
        "empty graph between events",
    }
    assert all(ceiling.value > 0 for ceiling in found)


# -- the benchmark ---------------------------------------------------------------------------------

CASES = [
    Case("tiny", 3, 24, 2, 7, 1, "float32", "step"),
    Case("tiny", 3, 24, 2, 7, 1, "float32", "forward_backward"),
]
CEILINGS = [
    ceilings.Ceiling("read bandwidth", "1000", 100.0, "GB/s"),
    ceilings.Ceiling("matrix rate", "float32", 50.0, "GFLOP/s"),
]


@pytest.fixture
def tiny_bench(cuda, small_flush, monkeypatch, tmp_path):
    """`python -m bench --device cuda` over two cases; a function of more arguments."""
    monkeypatch.setattr(grid, "cases", lambda *args: iter(CASES))
    monkeypatch.setattr(ceilings, "measure", lambda *args: CEILINGS)
    machine.describe.cache_clear()
    only = "ours:torch,ours:triton,ring + SDPA math,ring + SDPA flash,graphed,continual"

    def run(*arguments):
        given = ["--device", "cuda", "--out", str(tmp_path), "--only", only, "--budget", "0.001"]
        command.main([*given, *arguments])
        return records.read(tmp_path)

    yield run
    machine.describe.cache_clear()


def test_gpu_rows_have_every_timer_and_say_what_cannot_be_captured(tiny_bench, monkeypatch):
    monkeypatch.setattr(ring_step, "why_not", lambda *args: "not on a pretended device")
    rows = [row for row in tiny_bench("--resume") if row["kind"] == "time"]
    status = {(r["case"]["mode"], r["implementation"], r["timer"]): r["status"] for r in rows}
    for timer in timing.GPU_TIMERS:
        for name in ("ours:torch", "ring + SDPA math", "graphed pipeline"):
            assert status["step", name, timer] == "ok"
        assert status["forward_backward", "ours:torch", timer] == "ok"
    assert status["step", "continual-inference", "eager"] == "ok"
    assert status["step", "continual-inference", "graph"] == "absent"
    declined = [row for row in rows if row["implementation"] == "ours:triton"]
    assert "not on a pretended device" in declined[0]["reason"]
    about = rows[0]["machine"]
    assert (about["device"], about["capability"]) == ("Pretended GPU", "9.0")


def test_cuda_library_is_timed_by_the_single_steps_that_it_has_kernels_for(
    cuda, small_flush, monkeypatch
):
    load, native = co.backends._load, co.backends._native
    library = co.backends._Operators(vars(co.reference), native.WHY_NOT["cuda"])
    monkeypatch.setattr(
        co.backends, "_load", lambda name: library if name == "cuda" else load(name)
    )
    monkeypatch.setattr(ring_step, "why_not", lambda *args: "not on a pretended device")
    monkeypatch.setattr(ring_steps, "why_not", lambda *args: "not on a pretended device")
    found = [peer for peer in peers.all_peers(DEVICE) if peer.name.startswith("ours:cuda")]
    bench = measure.Bench(DEVICE, found, ceilings.Roofline(CEILINGS), {}, budget=1e-3)
    step = CASES[0]
    for case in (step, step._replace(mode="steps", tokens=3)):
        rows = [row for row in bench.rows(case) if row["kind"] == "time"]
        status = {(row["implementation"], row["timer"]): row["status"] for row in rows}
        names = ["ours:cuda", "ours:cuda:kv"] if case is step else []
        timed = {(name, timer): "ok" for name in names for timer in timing.GPU_TIMERS}
        assert status == timed | {
            (peer.name, None): "absent" for peer in found if peer.name not in names
        }


def test_gpu_run_stops_at_its_limit_and_goes_on_later(tiny_bench, monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(command.time, "monotonic", lambda: float(next(now)))
    first = tiny_bench("--resume", "--limit", "1.5")
    assert [row["case"]["mode"] for row in first if row["kind"] == "case"] == ["step"]
    rows = tiny_bench("--resume")
    done = [row["case"]["mode"] for row in rows if row["kind"] == "case"]
    assert done == ["step", "forward_backward"]
    assert rows[: len(first)] == first


def test_failure_of_one_implementation_on_the_gpu_leaves_the_others_rows(cuda, small_flush):
    def bad(problem):
        def run():
            torch.cuda.synchronize()
            return problem.expected[0][:, 0].float()

        return peers.Ready(run)

    found = [peers.Peer("waits", ("step",), bad)]
    found += [peer for peer in peers.all_peers(DEVICE) if peer.name == "ours:torch"]
    bench = measure.Bench(DEVICE, found, ceilings.Roofline(CEILINGS), {}, budget=1e-3)
    rows = {(r["implementation"], r["timer"]): r for r in bench.rows(CASES[0]) if "timer" in r}
    assert rows["waits", "graph"]["status"] == "failed"
    assert "not permitted" in rows["waits", "graph"]["reason"]
    assert rows["waits", "eager"]["status"] == "ok"
    assert rows["ours:torch", "cold"]["status"] == "ok"


@pytest.fixture
def breaking(cuda, monkeypatch):
    """A peer whose second timer loses the device, and a list of the exits that this leads to."""
    replays = itertools.count()
    broken, exits = [], []

    def synchronize(device=None):
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\n\nmore")
        cuda.synchronize()

    def setup(problem):
        def run():
            if torch.cuda.is_current_stream_capturing() and next(replays) > 0:
                broken.append(True)
                raise RuntimeError("CUDA error: unspecified launch failure")
            return problem.expected[0][:, 0].float()

        return peers.Ready(run)

    def leave():
        exits.append(lost.LOST)
        broken.clear()
        raise SystemExit(lost.LOST)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(measure, "leave", leave)
    monkeypatch.setattr(timing, "share_out", lambda *args: (5, 1))
    right = [peer for peer in peers.all_peers(DEVICE) if peer.name == "ours:torch"]
    found = [peers.Peer("breaks", ("step",), setup), *right]
    monkeypatch.setattr(command, "all_peers", lambda *args: found)
    return exits


def test_lost_device_ends_the_run_which_goes_on_later_without_what_lost_it(tiny_bench, breaking):
    arguments = ["--resume", "--only", "breaks,ours"]
    with pytest.raises(SystemExit):
        tiny_bench(*arguments)
    rows = tiny_bench(*arguments)
    assert breaking == [lost.LOST]
    status = {(r["implementation"], r["timer"]): r for r in rows if r["kind"] == "time"}
    assert status["breaks", "graph"]["status"] == "ok"
    assert status["breaks", "cold"]["status"] == "failed"
    assert "illegal memory access" in status["breaks", "cold"]["reason"]
    assert status["breaks", None]["status"] == "absent"
    assert status["ours:torch", "host"]["status"] == "ok"
    finished = [row["case"]["mode"] for row in rows if row["kind"] == "case"]
    assert finished == ["step", "forward_backward"]


def test_call_that_does_not_end_leaves_the_rows_of_the_others(cuda, small_flush, monkeypatch):
    kept, left = [], []
    monkeypatch.setattr(lost, "PATIENCE", 0.2)
    monkeypatch.setattr(lost, "leave", lambda: left.append(time.perf_counter()))
    hangs = peers.Peer("hangs", ("step",), lambda problem: time.sleep(1.5))
    bench = measure.Bench(
        DEVICE, [hangs], ceilings.Roofline(CEILINGS), {}, budget=1e-3, keep=kept.append
    )
    began = time.perf_counter()
    bench.rows(CASES[0])
    assert [row["implementation"] for row in kept[0]] == ["hangs"]
    assert kept[0][0]["reason"].startswith(lost.REASON)
    assert left[0] - began < 1.4


def test_nobody_is_called_to_account_after_the_end(monkeypatch):
    kept = []
    monkeypatch.setattr(lost, "PATIENCE", 0.5)
    monkeypatch.setattr(lost, "leave", lambda: None)
    with lost.failing_alone(DEVICE, [], lambda reason: {"reason": reason}, kept.append):
        pass
    time.sleep(0.8)
    assert not kept


def _compile_with_torch(seconds):
    def backend(graph, inputs):
        time.sleep(seconds)
        return graph.forward

    torch.compiler.reset()
    return torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(1))


def _compile_with_triton(seconds):
    compiler = pytest.importorskip("triton.compiler.compiler")

    def make_backend(target):
        time.sleep(seconds)
        raise RuntimeError("compiled enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "make_backend", make_backend)
        with pytest.raises(RuntimeError, match="compiled enough"):
            compiler.compile(None, target=compiler.GPUTarget("cuda", 90, 32))


@pytest.mark.parametrize("most", [5.0, 0.3], ids=["time left", "too long"])
@pytest.mark.parametrize("thread", [False, True], ids=["here", "in a thread"])
@pytest.mark.parametrize("compile_for", [_compile_with_torch, _compile_with_triton])
def test_compiling_is_no_call_without_end(compile_for, thread, most, monkeypatch):
    compile_for(0.0)  # with all that it imports
    kept = []
    monkeypatch.setattr(lost, "PATIENCE", 0.3)
    monkeypatch.setattr(lost, "MOST", most)
    monkeypatch.setattr(lost, "leave", lambda: None)
    with lost.failing_alone(DEVICE, [], lambda reason: {"reason": reason}, kept.append):
        if thread:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(compile_for, 0.7).result()
        else:
            compile_for(0.7)
    assert bool(kept) == (most < 0.7)
    with lost.failing_alone(DEVICE, [], lambda reason: {"reason": reason}, kept.append):
        compile_for(0.1)
        time.sleep(0.6)
    assert len(kept) == 1 + (most < 0.7)


def test_what_the_sanitizer_watches_is_right(capsys, monkeypatch):
    monkeypatch.setattr(exercise, "SHAPES", exercise.SHAPES[:2])
    exercise.main(["--device", "cpu", "--backend", "torch"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.endswith(", 0 calls declined") for line in lines)


def test_wrong_output_fails_its_shape_and_not_the_others(capsys, monkeypatch):
    monkeypatch.setattr(exercise, "SHAPES", exercise.SHAPES[:2])
    step = co.SingleOutputMultiheadAttention.forward_step

    def wrong(module, token, **options):
        out = step(module, token, **options)
        broken = out is not None and token.dtype == torch.float32 and token.shape[0] == 1
        return out * 1.001 if broken else out

    monkeypatch.setattr(co.SingleOutputMultiheadAttention, "forward_step", wrong)
    with pytest.raises(SystemExit, match="2 failed"):
        exercise.main(["--device", "cpu", "--backend", "torch"])
    lines = capsys.readouterr().out.splitlines()
    assert ["relative error" in line for line in lines] == [True, True, False, False]


def test_what_comes_after_a_lost_device_is_not_called_wrong(capsys, monkeypatch):
    def lose(*args, **options):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(co.SingleOutputMultiheadAttention, "forward_step", lose)
    monkeypatch.setattr(exercise, "why_lost", lambda device: lost.REASON)
    with pytest.raises(SystemExit, match=lost.REASON):
        exercise.main(["--device", "cpu", "--backend", "torch"])
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_backend_that_does_not_load_fails(capsys, monkeypatch):
    monkeypatch.setattr(co.backends, "why_missing", lambda backend: "it was not built")
    with pytest.raises(SystemExit, match="1 failed"):
        exercise.main(["--device", "cpu", "--backend", "cuda"])
    assert capsys.readouterr().out == "cuda: it was not built\n"


# -- the driver ------------------------------------------------------------------------------------


def test_commands_are_those_of_the_tools(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_tool", lambda name: f"/tools/{name}")
    found = {stage.name: stage for stage in gpu.stages(tmp_path, "quick", ["--mode", "step"])}
    exercises = ["exercise-triton", "exercise-cuda"]
    measured = ["kernels", "bench", "choices", "tests", "load"]
    assert list(found) == ["build", "ahead", *exercises, *measured, *gpu.TOOLS]
    assert found["ahead"].command[3:] == ["--size", "quick", "--limit", gpu.LEFT]
    for tool in gpu.TOOLS:
        watched = found[tool].command
        assert watched[:5] == [
            "/tools/compute-sanitizer", "--tool", tool, "--error-exitcode", "1",
        ]  # fmt: skip
        assert watched[5:] == [sys.executable, "-m", "bench.exercise"]
    options = command.parse([*found["bench"].command[3:-4], "--mode", "step"])
    assert (options.out, options.mode, options.resume) == (tmp_path, ("step",), True)
    options = choices.parse([x if x != gpu.LEFT else "9" for x in found["choices"].command[3:]])
    assert (options.out, options.size, options.resume) == (tmp_path, "quick", True)
    assert gpu.LEFT in found["load"].command
    assert found["build"].environment["CONTINUAL_MHA_BUILD_CUDA"] == "1"
    assert found["build"].environment["CONTINUAL_MHA_BUILD_CPU"] == "0"
    ignored = [part.split("=")[1] for part in found["tests"].command if "--ignore" in part]
    files = [part for part in found["kernels"].command if part.endswith(".py")]
    assert set(files) < set(ignored)
    assert all((gpu.ROOT / path).exists() for path in ignored)


def test_compiler_off_the_path_is_told_to_the_build(monkeypatch):
    found = {"nvcc": None, ("nvcc", gpu._CUDA): f"{gpu._CUDA}/nvcc"}
    which = lambda name, path=None: found[name if path is None else (name, path)]
    monkeypatch.setattr(gpu.shutil, "which", which)
    assert gpu._build_environment()["CUDA_HOME"] == "/usr/local/cuda"


# What nvidia-smi says, and the architectures to build for, None for all.
@pytest.mark.parametrize(
    ("said", "architectures"),
    [
        ("8.0\n9.0\n", "8.0;9.0"),
        ("7.5\n9.0\n", "9.0"),
        ("7.5\n", None),
        ("NVIDIA-SMI has failed because it could not reach the driver.\n", None),
    ],
)
def test_build_is_for_the_gpus_that_kernels_are_for(said, architectures, monkeypatch):
    monkeypatch.setattr(gpu, "_tool", lambda name: f"/somewhere/bin/{name}")
    answer = subprocess.CompletedProcess([], 0, stdout=said)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *args, **kwargs: answer)
    assert gpu._build_environment().get("CONTINUAL_MHA_CUDA_ARCHS") == architectures


_SOME_FAIL = """
import os, pytest
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_it(backend, n):
    assert backend == "torch" or n == 3, f"error {n / 7} on {backend}"
def test_skipped():
    pytest.skip("for a reason")
@pytest.fixture
def broken():
    raise OSError("no such thing")
def test_broken(broken):
    pass
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "in workers"])
def test_account_of_tests_has_every_outcome_and_each_cause_once(workers, tmp_path):
    (tmp_path / "test_some.py").write_text(_SOME_FAIL)
    outcomes = tmp_path / "outcomes.jsonl"
    options = ["-p", "no:cacheprovider", "-p", "bench.digest", "--digest", str(outcomes)]
    command = [sys.executable, "-m", "pytest", str(tmp_path), "--rootdir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(gpu.ROOT)}
    subprocess.run(
        [*command, *options, *workers], cwd=tmp_path, env=environment, capture_output=True
    )
    lines = digest.account(outcomes).splitlines()
    assert set(lines[:3]) == {
        "triton: 2 failed, 1 passed",
        "torch: 3 passed",
        "other: 1 failed, 1 skipped",
    }
    causes = [line for line in lines[3:] if not line.startswith("    ")]
    assert causes == [
        "2x triton: AssertionError: error # on triton",
        "1x other: OSError: no such thing",
    ]
    assert digest.account(tmp_path / "none.jsonl") == ""


def test_processes_that_ended_have_one_cause_whatever_they_ran(tmp_path):
    ended = "worker 'gw{0}' crashed while running 'tests/test_it.py::test_it[triton-{0}-x]'"
    rows = [
        SimpleNamespace(nodeid=f"test_it[triton-{i}]", outcome="failed", longrepr=ended.format(i))
        for i in range(3)
    ]
    outcomes = tmp_path / "outcomes.jsonl"
    for row in rows:
        digest._Writer(outcomes)._write(row)
    assert digest.account(outcomes).splitlines()[1] == f"3x triton: {digest.ENDED}"


@pytest.mark.parametrize("plugins", [True, False], ids=["plugins", "plain"])
def test_file_that_does_not_import_is_told_and_costs_no_other(plugins, tmp_path, monkeypatch):
    (tmp_path / "test_bad.py").write_text("import no_such_package")
    (tmp_path / "test_good.py").write_text("def test_it(): pass")
    if not plugins:
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    stage = gpu._tests("tests", tmp_path, [str(tmp_path)], 1.0)
    monkeypatch.undo()
    paths = [str(gpu.ROOT), str(gpu.ROOT / "tests")]
    subprocess.run(
        [*stage.command, "-p", "conftest", "--rootdir", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
    )
    lines = digest.account(gpu.outcomes_of(tmp_path / "tests.log")).splitlines()
    assert "other: 1 failed, 1 passed" in lines
    assert any("no_such_package" in line for line in lines)


def test_name_of_a_missing_package_skips_tests_and_no_file():
    missing = upstream._Missing()
    try:
        getattr(missing, "__wrapped__", None)  # as pytest asks while it collects
    except pytest.skip.Exception:
        pytest.fail("the whole file is skipped")
    with pytest.raises(pytest.skip.Exception):
        missing.Sequential  # noqa: B018


def test_device_that_is_lost_ends_the_process_that_lost_it(monkeypatch):
    import conftest

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(conftest, "ON_GPU", True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    ended = []
    monkeypatch.setattr(conftest.os, "_exit", ended.append)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    with pytest.raises(pytest.exit.Exception, match="illegal memory access"):
        conftest.pytest_runtest_setup(None)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    with contextlib.suppress(pytest.exit.Exception):  # here _exit comes back
        conftest.pytest_runtest_setup(None)
    assert ended == [1]


def test_time_is_shared_among_the_chosen_stages_and_what_is_left_goes_to_the_later_ones():
    first, second = gpu.Stage("a", [], 0.25), gpu.Stage("b", [], 0.5)
    assert gpu.limit_of(first, [second], 90) == 30
    assert gpu.limit_of(second, [], 85) == 85


def test_unknown_stages_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.parse(["--stages", "build,bensh"])
    assert "build,ahead,exercise-triton" in capsys.readouterr().err.replace(", ", ",")


def test_benchmark_goes_on_from_an_earlier_folder(tmp_path, monkeypatch, capsys):
    row = {"kind": "case", "case": CASES[0]._asdict(), "machine": {"sources": "x"}}
    for name in (records.ROWS, records.CHOICES):
        records.append(tmp_path / "earlier", [row], name)
    monkeypatch.setattr(gpu, "stages", lambda *args: [gpu.Stage("bench", ["true"], 1.0)])
    folder = tmp_path / "later"
    gpu.main(["--out", str(folder), "--go-on-from", str(tmp_path / "earlier")])
    assert records.read(folder) == records.read(folder, records.CHOICES) == [row]
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("bench: passed")


_LOSES_DEVICES = """
import sys
from pathlib import Path
attempts, left = Path(sys.argv[1]), sys.argv[2]
attempts.open("a").write(left + "\\n")
print("attempt")
sys.exit(75 if len(attempts.read_text().split()) < 3 else 0)
"""


@pytest.mark.parametrize("least", [0.0, 100.0], ids=["time left", "no time left"])
def test_stage_that_lost_its_device_goes_on_while_there_is_time(least, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_LEAST", least)
    attempts, log = tmp_path / "attempts", tmp_path / "bench.log"
    command = [sys.executable, "-c", _LOSES_DEVICES, str(attempts), gpu.LEFT]
    outcome = gpu.run(gpu.Stage("bench", command, 1.0), log, 80)
    made = 3 if least == 0 else 1
    assert outcome.result.endswith(f"; devices lost: {min(made, 2)}")
    assert outcome.result.startswith("passed" if made == 3 else "failed with code 75")
    assert log.read_text() == made * "attempt\n"
    left = [int(seconds) for seconds in attempts.read_text().split()]
    assert len(left) == made
    assert 50 < left[-1] <= left[0] == 60


def test_process_that_cannot_be_killed_does_not_hold_up_the_others(tmp_path, monkeypatch):
    killed = []
    monkeypatch.setattr(gpu, "_GRACE", 0.2)
    monkeypatch.setattr(gpu.os, "killpg", lambda *args: killed.append(args))
    began = time.monotonic()
    outcome = gpu.run(gpu.Stage("bench", ["sleep", "4"], 1.0), tmp_path / "bench.log", 0.3)
    assert outcome.result.startswith("stopped")
    assert time.monotonic() - began < 2
    monkeypatch.undo()
    os.killpg(*killed[0])


def test_tool_that_is_missing_fails_its_stage_only(tmp_path, monkeypatch, capsys):
    planned = [gpu.Stage("memcheck", ["/no/such/tool"], 1), gpu.Stage("bench", ["true"], 1)]
    monkeypatch.setattr(gpu, "stages", lambda *args: planned)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "memcheck: could not be started" in said
    assert "bench: passed" in said


@pytest.mark.parametrize("outcome", ["passed", "skipped"])
def test_tests_that_were_all_skipped_are_no_success(outcome, tmp_path, monkeypatch, capsys):
    row = json.dumps({"test": "test_it[triton]", "outcome": outcome, "error": None})
    gpu.outcomes_of(tmp_path / "kernels.log").write_text(row)
    monkeypatch.setattr(gpu, "stages", lambda *args: [gpu.Stage("kernels", ["true"], 1.0)])
    with contextlib.nullcontext() if outcome == "passed" else pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
    result = "passed, " if outcome == "passed" else "passed no test, "
    assert f"kernels: {result}" in capsys.readouterr().out


@pytest.mark.parametrize("name", [stage.name for stage in gpu.stages(Path(), "quick")])
def test_what_a_stage_measures_is_not_taken_for_outcomes_of_tests(name, tmp_path, monkeypatch):
    (tmp_path / f"{name}.jsonl").write_text('{"kind": "load"}\n')
    monkeypatch.setattr(gpu, "stages", lambda *args: [gpu.Stage(name, ["true"], 1.0)])
    gpu.main(["--out", str(tmp_path)])


def timed(case, name, median):
    """Rows of an implementation by both timers of the device, with what a table reads of them."""
    times = {"median_us": median, "p20_us": median, "p80_us": median, "roofline_share": 0.5}
    about = {"kind": "time", "case": case._asdict(), "implementation": name, "status": "ok"}
    return [about | {"timer": timer} | times for timer in ("graph", "cold")]


def test_end_of_the_output_tells_of_every_stage_and_fits_into_few_characters(tmp_path, capsys):
    """Where all fails, and the table has more cases than anyone reads."""
    planned = gpu.stages(tmp_path, "full")
    outcomes = [gpu.Outcome(stage.name, "failed with code 1", 9.0) for stage in planned]
    for stage in planned:
        lines = [f"line {i} of {stage.name} {'x' * 200}" for i in range(200)]
        (tmp_path / f"{stage.name}.log").write_text("\n".join(lines))
    for name in ("kernels", "tests"):
        rows = [
            {"test": f"test_{i}[triton]", "outcome": "failed", "error": f"{'abc'[i % 3]} of {i}"}
            for i in range(200)
        ]
        gpu.outcomes_of(tmp_path / f"{name}.log").write_text("\n".join(map(json.dumps, rows)))
    for i, case in enumerate(grid.cases("cuda", "full")):
        rows = timed(case, "ours", 1.0) + timed(case, "ring + SDPA math", 1.5 + i)
        about = {"kind": "time", "case": case._asdict(), "timer": "graph", "status": "failed"}
        reasons = {"a rival": f"no memory for {i}", "ours:cuda": f"CUDA error {i}: misaligned"}
        rows += [about | {"implementation": n, "reason": why} for n, why in reasons.items()]
        records.append(tmp_path, rows)
    way = {"kind": "way", "formulation": "kv", "plan": {"path": "chain"}, "status": "wrong"}
    records.append(tmp_path, [way | {"error": 0.25}], records.CHOICES)
    text = gpu.summary(tmp_path, planned, outcomes)
    kept = text[-12000:]
    for stage in planned:
        assert f"{stage.name}: failed with code 1, 9 s" in kept
    for name in ("exercise-triton", "exercise-cuda", "build"):
        assert f"-- {name}: failed with code 1" in kept
        assert f"line 199 of {name}" in kept
    assert "67x triton: a of #" in kept
    cases = len(list(grid.cases("cuda", "full")))
    assert kept.count("ring + SDPA math (graph)") == gpu._MOST_CASES < cases
    assert f"{cases} cases, over the fastest other" in kept
    assert f"least 1.50x: {next(iter(grid.cases('cuda', 'full'))).label}" in kept
    told = gpu.troubles(tmp_path)
    assert told[0] == f"{cases}x ours:cuda: CUDA error 0: misaligned"
    assert told[1:] == [
        "1x ours, kv by chain: relative error 2.5e-01",
        f"{cases}x a rival: no memory for 0",
    ]
    assert all(line in kept for line in told)


def test_stage_that_passed_tells_what_it_found(tmp_path):
    (tmp_path / "load.log").write_text("\n".join(f"row {i}" for i in range(9)))
    (tmp_path / "build.log").write_text("built")
    planned = [gpu.Stage("build", [], 1.0), gpu.Stage("load", [], 1.0, tells=4)]
    text = gpu.summary(
        tmp_path, planned, [gpu.Outcome(each.name, "passed", 1.0) for each in planned]
    )
    assert "row 5\nrow 6" in text
    assert "row 4" not in text
    assert "built" not in text


_KILLED = """
import sys
from pathlib import Path
from bench import gpu, records
folder = Path(sys.argv[1])
row = {"kind": "case", "case": {}, "machine": {}}
work = "import sys, time; print(1, flush=True); time.sleep(60)"
gpu.stages = lambda *args: [
    gpu.Stage("build", ["true"], 1), gpu.Stage("bench", [sys.executable, "-c", work], 99)
]
gpu.main(["--out", str(folder)])
"""


def test_driver_that_is_killed_has_written_what_was_done_and_leaves_nothing_running(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(tmp_path)], cwd=gpu.ROOT, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    log, until = tmp_path / "bench.log", time.monotonic() + 30
    while not (log.exists() and log.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert [stage["name"] for stage in json.loads((tmp_path / "stages.json").read_text())] == [
        "build"
    ]
    assert said.rstrip().splitlines()[-1].startswith("build: passed")
    assert children
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(int(child), 0)
