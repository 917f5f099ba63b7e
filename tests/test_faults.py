"""What a call that fails leaves behind: every stream at its last complete tick."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import timeit

import pytest
import torch
from interruptions import interruptions
from oracles import EMBED, LENGTH, assert_same_state, build, draw_tokens
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from continual_mha import backends, functional, ring, streams

N = 3
KINDS = {
    "kv": {"formulation": "kv"},
    "kv_delayed": {"formulation": "kv", "query_index": 1, "add_bias_kv": True},
    "input": {"formulation": "input"},
    "input_delayed": {"formulation": "input", "query_index": 1, "add_zero_attn": True},
}


class Failure(BaseException):
    """Stands for whatever may come: no memory, or a signal."""


class FailsAt:
    """Counts calls, and raises in the `at`-th: before it has run, or as soon as it has."""

    def __init__(self, at, when):
        super().__init__()
        self.left, self.when = at, when

    def _call(self, run):
        self.left -= 1
        if self.left == 0 and self.when == "before":
            raise Failure
        result = run()
        if self.left == 0:
            raise Failure
        return result


class FailsAtFunction(FailsAt, TorchFunctionMode):
    """Fails at a call of a function of torch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch._C._set_grad_enabled:  # a failure here would outlive the test
            return function(*args, **(kwargs or {}))
        return self._call(lambda: function(*args, **(kwargs or {})))


class FailsAtKernel(FailsAt, TorchDispatchMode):
    """Fails at a call of an operator, those inside torch's functions included."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self._call(lambda: function(*args, **(kwargs or {})))


LEVELS = {"function": FailsAtFunction, "kernel": FailsAtKernel}


def each_failure(run, prepare, level, when):
    """For k = 1, 2, ...: what `prepare` made, after `run` on it failed at its k-th call."""
    for at in range(1, 2000):
        subject = prepare()
        mode = LEVELS[level](at, when)
        try:
            with mode:
                run(subject)
        except Failure:
            yield subject
        else:
            assert at > 1, "no call to fail at"
            assert mode.left > 0
            return
    raise AssertionError("it never ran to its end")


def aged(kind, ages):
    """A module with a stream of each age, or with streams that march together if ages agree."""
    module = build(**(KINDS | EIGHT_BITS)[kind]).requires_grad_(kind in KINDS)
    x = draw_tokens(module, N, 40, seed=5)[0]
    if len(set(ages)) > 1:
        module.start_streams(N)
    for t in range(max(ages)):
        due = torch.tensor([t >= max(ages) - age for age in ages])
        module.forward_step(x[:, t], active=None if bool(due.all()) else due)
    return module


EIGHT_BITS = {
    "kv_of_8_bits": {"formulation": "kv", "query_index": 1, "cache_dtype": torch.int8},
    "input_of_8_bits": {"formulation": "input", "cache_dtype": torch.float8_e4m3fn},
}
AGES = {"together_cold": (2,) * N, "together_warm": (LENGTH + 3,) * N, "mixed": (0, 3, LENGTH + 2)}


def next_outputs(module, x):
    with torch.no_grad():
        return [module.forward_step(x[:, t]) for t in range(x.shape[1])]


def assert_same_outputs(left, right):
    for a, b in zip(left, right, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


CALLS = {
    "forward_step": lambda module, x: module.forward_step(x[:, 0]),
    "forward_step without update": lambda module, x: module.forward_step(
        x[:, 0], update_state=False
    ),
    "forward_steps": lambda module, x: module.forward_steps(x[:, :3]),
    "forward_steps over the window": lambda module, x: module.forward_steps(x[:, : LENGTH + 3]),
}
# How many tokens each call takes.
TOKENS = {
    "forward_step": 1,
    "forward_step without update": 0,
    "forward_steps": 3,
    "forward_steps over the window": LENGTH + 3,
}


def check_failing_call(kind, call, ages, gradients, when):
    x = draw_tokens(build(), N, 16)[0]
    template = aged(kind, AGES[ages])
    state = template.get_state()

    def prepare():
        module = build(**(KINDS | EIGHT_BITS)[kind])
        with torch.no_grad():
            module.set_state(state)
            if not gradients:
                module.requires_grad_(False)
        return module

    expected = {}
    for taken in {0, TOKENS[call]}:
        module = prepare()
        with torch.no_grad():
            for t in range(taken):
                module.forward_step(x[:, t])
            expected[taken] = next_outputs(module, x[:, 8:12])

    def run(module):
        CALLS[call](module, x)

    level = "kernel" if when == "before" else "function"
    for module in each_failure(run, prepare, level, when):
        ahead = set((module._ring_position - state.position).tolist())
        may_have_happened = ages != "together_cold" and call == "forward_step" and when == "after"
        assert ahead <= ({0, 1} if may_have_happened else {0})
        assert len(ahead) == 1
        assert_same_outputs(next_outputs(module, x[:, 8:12]), expected[ahead.pop()])


@pytest.mark.sampled(6)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("ages", AGES)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", KINDS)
class TestFailingCall:
    """It has not happened; only where streams may differ in age may it have, for all of them."""

    def test_in_place_leaves_every_stream_at_a_complete_tick(self, kind, call, ages, when, backend):
        check_failing_call(kind, call, ages, False, when)

    def test_differentiable_leaves_every_stream_at_a_complete_tick(self, kind, call, ages, when):
        check_failing_call(kind, call, ages, True, when)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("ages", AGES)
@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_failing_call_puts_back_rings_of_8_bits(kind, ages, when, backend):
    check_failing_call(kind, "forward_steps", ages, False, when)


def test_tokens_that_the_rings_have_room_for_cost_no_copy(monkeypatch):
    """Nothing is lost by tokens that overwrite nothing, nor where nothing is overwritten."""
    taken = []
    take = functional.take_slots
    monkeypatch.setattr(functional, "take_slots", lambda *args: taken.append(args) or take(*args))
    module = build().requires_grad_(False)
    x = draw_tokens(module, N, LENGTH)[0]
    module.forward_steps(x[:, :2])
    module.forward_steps(x[:, 2:])
    module.forward_steps(x, update_state=False)
    module.forward_steps(x[:, :1])
    assert taken == []
    module.forward_steps(x[:, :3])
    assert [args[3] for args in taken] == [2, 2]  # of keys and values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["forward_step", "forward_steps"])
def test_failing_first_call_leaves_no_state(kind, call):
    x = draw_tokens(build(), N, 8)[0]

    def run(module):
        with torch.no_grad():
            CALLS[call](module, x)

    for module in each_failure(run, lambda: build(**KINDS[kind]), "kernel", "before"):
        assert module.get_state() is None


def copy_of(kind, state):
    module = build(**KINDS[kind])
    module.set_state(state)
    return module


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_failing_reset_happens_for_all_its_streams_or_for_none(kind, level, when):
    x = draw_tokens(build(), N, 8)[0]
    state = aged(kind, AGES["together_warm"]).get_state()
    mask = torch.tensor([True, False, True])
    undisturbed, reset = copy_of(kind, state), copy_of(kind, state)
    reset.reset(mask)
    old = next_outputs(undisturbed, x)
    new = next_outputs(reset, x)
    run = lambda module: module.reset(mask)
    for module in each_failure(run, lambda: copy_of(kind, state), level, when):
        happened = module._ring_position.tolist() == [0, LENGTH + 3, 0]
        assert happened or torch.equal(module._ring_position, state.position)
        assert_same_outputs(next_outputs(module, x), new if happened else old)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_failing_set_stream_changes_nothing(kind, level, when):
    state = aged(kind, AGES["together_cold"]).get_state()
    other = aged(kind, AGES["mixed"]).get_stream(2)
    run = lambda module: module.set_stream(1, other)
    for module in each_failure(run, lambda: copy_of(kind, state), level, when):
        assert_same_state(module.get_state(), state)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["set_state", "start_streams", "get_stream", "get_state"])
def test_failing_change_of_the_whole_state_changes_nothing(kind, call, when):
    state = aged(kind, AGES["mixed"]).get_state()
    argument = {"set_state": (aged(kind, AGES["together_cold"]).get_state(),)}
    arguments = {"start_streams": (5,), "get_stream": (2,), **argument}.get(call, ())
    run = lambda module: getattr(module, call)(*arguments)
    for module in each_failure(run, lambda: copy_of(kind, state), "kernel", when):
        assert_same_state(module.get_state(), state)


@pytest.mark.parametrize("ages", ["together_cold", "mixed"])
@pytest.mark.parametrize("call", ["set_stream", "set_state", "start_streams", "clean_state"])
def test_change_interrupted_anywhere_has_happened_or_not_and_stays_so(call, ages):
    """Also once the exception is dropped, which a console or a log may keep for long."""
    state = aged("kv", AGES[ages]).get_state()
    other = aged("kv", AGES["mixed"])
    arguments = {
        "set_stream": (1, other.get_stream(2)),
        "set_state": (aged("kv", AGES["together_warm"]).get_state(),),
        "start_streams": (N,),
    }.get(call, ())
    run = lambda module: getattr(module, call)(*arguments)
    changed = copy_of("kv", state)
    run(changed)
    endings = [state, changed.get_state()]
    x = torch.randn(2, N, EMBED)
    for module, kept in interruptions(lambda: copy_of("kv", state), run, streams, ring):
        twin = build(**KINDS["kv"])
        twin.set_state(module.get_state())
        assert any(same_state(twin.get_state(), ending) for ending in endings)
        with torch.no_grad():
            for token in x:
                module.forward_step(token)
                twin.forward_step(token)
            kept.clear()
            assert same_state(module.get_state(), twin.get_state())


def same_state(left, right):
    if left is None or right is None:
        return left is right
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_changes_nothing(kind, backend):
    module = aged(kind, AGES["mixed"])
    before = module.get_state()
    good = torch.zeros(N, EMBED)
    bad = [
        (lambda: module.forward_step(good[:2]), ValueError),
        (lambda: module.forward_step(good.double()), TypeError),
        (lambda: module.forward_step(good, active=torch.ones(N)), TypeError),
        (lambda: module.forward_step(good, active=torch.ones(N + 1, dtype=torch.bool)), ValueError),
        (lambda: module.forward_steps(torch.zeros(N, 4, EMBED + 1)), ValueError),
        (lambda: module.reset([N]), ValueError),
        (lambda: module.reset(torch.ones(N)), TypeError),
        (lambda: module.set_stream(N, module.get_stream(0)), ValueError),
        (lambda: module.set_stream(0, before), ValueError),
        (lambda: module.start_streams(-1), ValueError),
        (lambda: module.set_state(before[:2]), TypeError),
    ]
    for call, error in bad:
        with torch.no_grad(), pytest.raises(error):
            call()
        assert_same_state(module.get_state(), before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here")
@pytest.mark.parametrize("kind", KINDS)
def test_signals_in_mid_call_leave_whole_ticks(kind, backend):
    """Interrupted at arbitrary moments, the streams go on as if some calls had not been made."""
    module, twin = (build(**KINDS[kind]).requires_grad_(False) for _ in range(2))
    x = draw_tokens(module, N, 256)[0]
    counted = interrupted = 0
    stepping = False
    undisturbed = timeit.repeat(lambda: twin.forward_step(x[:, 0]), number=1, repeat=20)
    twin.clean_state()

    def interrupt(*args):
        if stepping:  # a signal may come late, by another thread, when the timer is off already
            raise Failure

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with torch.no_grad():
            for t in range(x.shape[1]):
                token = x[:, t]
                try:
                    try:
                        stepping = True
                        signal.setitimer(signal.ITIMER_REAL, min(undisturbed) * 2 ** (t % 10) / 8)
                        module.forward_step(token)
                    finally:
                        stepping = False
                        signal.setitimer(signal.ITIMER_REAL, 0)
                except Failure:
                    interrupted += 1
                position = module._ring_position
                if position is not None and int(position[0]) > counted:
                    assert position.tolist() == [counted + 1] * N
                    counted += 1
                    twin.forward_step(token)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted
    assert counted
    assert_same_outputs(next_outputs(module, x[:, :4]), next_outputs(twin, x[:, :4]))


# What is asked for by the native code is seen by no mode of torch's.
WITHOUT_MEMORY = """
import resource, torch
from torch import nn
from oracles import build

def limit(more):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more if more else -1, -1))

torch.set_grad_enabled(False)
for formulation in ("kv", "input"):
    module = build(formulation=formulation, embed_dim=1024, num_heads=8)
    module.out_proj.weight = nn.Parameter(torch.randn(1024, 1024).t())  # which is to be copied
    xs = torch.randn(4, module.sequence_len + 2, 1024)
    for call in (module.forward_step, module.forward_steps):
        token = xs[:, 0] if call == module.forward_step else xs[:, :3]
        for x in xs.unbind(1):
            call(x if token.dim() == 2 else x[:, None])
        call(token)
        call(token)  # as the one before
        before = module.get_state()
        for again in (True, False):
            if not again:
                module._forget_calls()
            limit(2 << 20)
            try:
                call(token)
            except RuntimeError as error:
                assert "memory" in str(error) or "contiguous" in str(error), error
            else:
                raise AssertionError("there was enough")
            finally:
                limit(None)
            assert torch.equal(module._ring_position, before.position)
        twin = build(formulation=formulation, embed_dim=1024, num_heads=8)
        twin.load_state_dict(module.state_dict())
        twin.set_state(before)
        assert torch.equal(call(token), getattr(twin, call.__name__)(token))
print("done")
"""


@pytest.mark.skipif(
    sys.platform != "linux" or backends.why_missing("cpu") is not None,
    reason="asks /proc how much memory it has, or there is no native library",
)
def test_a_step_without_memory_for_its_output_has_not_happened():
    environment = {
        **os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "CONTINUAL_MHA_BACKEND": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    command = [sys.executable, "-c", WITHOUT_MEMORY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr[-2000:]) == ("done\n", "")
