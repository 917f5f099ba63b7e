"""A pool serves streams that come and go as if each had the model for itself."""

from __future__ import annotations

import copy
import gc
import math
import random
import threading
import time
import weakref
from contextvars import ContextVar
from types import SimpleNamespace

import pytest
import torch
from interruptions import interruptions
from oracles import EMBED, LENGTH, assert_same_state, build, seeded
from torch import nn
from torch._subclasses import FakeTensorMode
from upstream import continual

import continual_mha as co

KINDS = {
    "kv": {"formulation": "kv"},
    "kv_delayed": {"formulation": "kv", "query_index": 1, "add_bias_kv": True},
    "input": {"formulation": "input"},
}


class Net(nn.Module):
    """Projection, two attentions in a row with a residual, and a head."""

    def __init__(self, **arguments):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, EMBED)
        self.layers = nn.ModuleList([build(seed, **arguments) for seed in range(2)])
        self.head = nn.Linear(EMBED, 3)
        self.requires_grad_(False)

    def forward_step(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer.forward_step(x)
            if x is None:
                return None
        return self.head(x)


READY = 2 * LENGTH - 1  # tokens until both layers' windows are full


def tokens(count, seed=0):
    return torch.randn(count, 4, generator=seeded(seed))


def alone(model, x):
    """What the model answers to one stream that has it for itself, by the number of its tokens."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "clean_state"):
            module.clean_state()
    answers = {}
    for count, token in enumerate(x, 1):
        answer = twin.forward_step(token[None])
        if answer is not None:
            answers[count] = answer[0]
    return answers


@pytest.mark.parametrize("kind", KINDS)
def test_streams_that_come_go_and_pause_get_what_they_would_get_alone(kind, backend):
    model = Net(**KINDS[kind])
    pool = co.StreamPool(model, 3, (4,), queue_size=2)
    assert pool.batched
    assert pool.receptive_field == READY
    source = random.Random(1)
    streams, answered = {}, 0
    for _ in range(160):
        if len(streams) < 3 and source.random() < 0.3:
            number = pool.open()
            x = tokens(64, number)
            streams[number] = [0, x, alone(model, x)]
        pushed = [n for n in streams if source.random() < 0.7]
        for number in pushed:
            pool.push(number, streams[number][1][streams[number][0]])
            streams[number][0] += 1
        outputs = pool.tick()
        assert set(outputs) <= set(pushed)
        for number in pushed:
            count, _, expected = streams[number]
            assert (number in outputs) == (count in expected)
            if count in expected:
                torch.testing.assert_close(outputs[number], expected[count], rtol=1e-4, atol=1e-5)
                answered += 1
        for number in list(streams):
            if streams[number][0] > 50 or source.random() < 0.02:
                pool.close(number)
                del streams[number]
    assert answered > 50


def test_tick_without_tokens_does_nothing():
    pool = co.StreamPool(build(), 2, (EMBED,))
    assert pool.tick() == {}
    pool.open()
    assert pool.tick() == {}
    assert pool.statistics().ticks == 0


def test_full_pool_refuses_and_waits():
    pool = co.StreamPool(build(), 2, (EMBED,))
    first, second = pool.open(), pool.open()
    assert first != second
    with pytest.raises(co.PoolFull, match="2 slots"):
        pool.open()
    begun = time.monotonic()
    with pytest.raises(co.PoolFull):
        pool.open(timeout=0.05)
    assert time.monotonic() - begun >= 0.05
    closer = threading.Timer(0.05, pool.close, [first])
    closer.start()
    third = pool.open(timeout=60)
    closer.join()
    assert time.monotonic() - begun < 30  # who is not woken would look only then
    assert third not in (first, second)
    with pytest.raises(co.UnknownStream, match="no open stream"):
        pool.push(first, torch.zeros(EMBED))


def test_a_time_to_wait_that_is_no_number_is_refused():
    pool = co.StreamPool(build(), 1, (EMBED,))
    stream = pool.open()
    for call in (
        lambda: pool.open(math.nan),
        lambda: pool.restore(pool.export(stream), math.nan),
        lambda: pool.push(stream, torch.zeros(EMBED), math.nan),
    ):
        with pytest.raises(ValueError, match="timeout"):
            call()
    assert pool.statistics().open == 1


def test_who_waits_for_a_slot_gets_the_one_of_a_stream_that_could_not_begin(monkeypatch):
    pool, got = co.StreamPool(build(), 1, (EMBED,)), []
    waiting, changed = threading.Event(), pool._changed
    wait_for = changed.wait_for
    monkeypatch.setattr(changed, "wait_for", lambda *args: waiting.set() or wait_for(*args))
    waiter = threading.Thread(target=lambda: got.append(pool.open(timeout=None)), daemon=True)

    def fails(slot, states):
        waiter.start()
        assert waiting.wait(20)
        raise MemoryError

    monkeypatch.setattr(pool._slots, "put", fails)
    with pytest.raises(MemoryError):
        pool.restore({})
    waiter.join(20)
    assert got == [0]


def test_full_queue_refuses_and_waits():
    pool = co.StreamPool(build(), 1, (EMBED,), queue_size=2)
    stream = pool.open()
    for _ in range(2):
        pool.push(stream, torch.zeros(EMBED))
    with pytest.raises(co.QueueFull, match="2 tokens"):
        pool.push(stream, torch.zeros(EMBED))
    begun = time.monotonic()
    ticker = threading.Timer(0.05, pool.tick)
    ticker.start()
    pool.push(stream, torch.zeros(EMBED), timeout=60)
    ticker.join()
    assert time.monotonic() - begun < 30
    assert pool.statistics().waiting == 2


def test_close_wakes_whoever_waits_to_push():
    pool = co.StreamPool(build(), 1, (EMBED,), queue_size=1)
    stream = pool.open()
    pool.push(stream, torch.zeros(EMBED))
    begun = time.monotonic()
    closer = threading.Timer(0.05, pool.close, [stream])
    closer.start()
    with pytest.raises(co.UnknownStream):
        pool.push(stream, torch.zeros(EMBED), timeout=60)
    closer.join()
    assert time.monotonic() - begun < 30


def test_bad_tokens_and_numbers_are_refused():
    pool = co.StreamPool(build(), 1, (EMBED,))
    stream = pool.open()
    with pytest.raises(ValueError, match="shape"):
        pool.push(stream, torch.zeros(1, EMBED))
    with pytest.raises(TypeError, match="float32"):
        pool.push(stream, torch.zeros(EMBED, dtype=torch.float64))
    with pytest.raises(TypeError, match="list"):
        pool.push(stream, [0.0] * EMBED)
    for call in (pool.close, pool.export, lambda s: pool.push(s, torch.zeros(EMBED))):
        with pytest.raises(co.UnknownStream):
            call(99)
    for call in (pool.restore, co.states_to_bytes):
        with pytest.raises(TypeError, match=r"what export returned.* got NoneType"):
            call(None)
    with pytest.raises(ValueError, match="no module that keeps streams"):
        co.StreamPool(nn.Linear(2, 2), 1, (2,))
    module = build()
    with pytest.raises(TypeError, match="Sequential has none"):
        co.StreamPool(nn.Sequential(module), 1, (EMBED,))
    assert module.get_state() is None
    with pytest.raises(ValueError, match="CUDA"):
        co.StreamPool(build(), 1, (EMBED,), graph=True, device="cpu")


# name: (arguments, error, words)
BAD_POOLS = {
    "no slot": ({"capacity": 0}, ValueError, "capacity must be at least 1"),
    "half a slot": ({"capacity": 2.5}, TypeError, "capacity must be an integer"),
    "true slots": ({"capacity": True}, TypeError, "capacity must be an integer"),
    "no queue": ({"queue_size": 0}, ValueError, "queue_size must be at least 1"),
    "queue of a name": ({"queue_size": "a"}, TypeError, "queue_size must be an integer"),
    "no history": ({"history": 0}, ValueError, "history must be at least 1"),
    "ready before a token": ({"receptive_field": 0}, ValueError, "receptive_field must be at"),
    "ready by name": ({"receptive_field": "a"}, TypeError, "receptive_field must be an integer"),
    "shape of a number": ({"token_shape": EMBED}, TypeError, r"token_shape .* got 12"),
    "shape of names": ({"token_shape": ("a",)}, TypeError, "token_shape must be an integer"),
    "no model": ({"model": None}, TypeError, "must be a torch.nn.Module, but got NoneType"),
}


@pytest.mark.parametrize("case", BAD_POOLS)
def test_pool_of_bad_arguments_is_refused_and_changes_nothing(case):
    bad, error, words = BAD_POOLS[case]
    module = build()
    module.forward_step(torch.ones(3, EMBED))
    before = module.get_state()
    arguments = {"model": module, "capacity": 2, "token_shape": (EMBED,)}
    with pytest.raises(error, match=words):
        co.StreamPool(**arguments | bad)
    assert_same_state(module.get_state(), before)


@pytest.mark.parametrize("failing", [0, 1])
def test_pool_that_cannot_be_made_leaves_all_modules_as_they_were(failing, monkeypatch):
    model = Net()
    for layer in model.layers:
        layer.forward_step(torch.ones(3, EMBED))
    before = [layer.get_state() for layer in model.layers]

    def no_memory(streams):
        raise MemoryError

    monkeypatch.setattr(model.layers[failing], "start_streams", no_memory)
    with pytest.raises(MemoryError):
        co.StreamPool(model, 2, (4,))
    for layer, state in zip(model.layers, before, strict=True):
        assert_same_state(layer.get_state(), state)


def test_token_that_no_tick_could_take_is_refused_at_once():
    """In the queue it would stop the streams of everyone."""
    pool = co.StreamPool(build(), 1, (EMBED,))
    stream = pool.open()
    with pytest.raises(TypeError, match="dense"):
        pool.push(stream, torch.ones(EMBED).to_sparse())
    with pytest.raises(ValueError, match="meta"):
        pool.push(stream, torch.ones(EMBED, device="meta"))
    with pytest.raises(TypeError, match="dense"):
        pool.push(stream, torch.nested.nested_tensor([torch.ones(EMBED)]))
    with FakeTensorMode(), pytest.raises(ValueError, match="fake"):
        pool.push(stream, torch.ones(EMBED))
    with pytest.raises(ValueError, match="elements"):
        torch.func.vmap(lambda x: pool.push(stream, x), out_dims=None)(torch.ones(2, EMBED))
    assert pool.statistics().waiting == 0


class Answers(nn.Module):
    """One step, of whose output something is made."""

    def __init__(self, make):
        super().__init__()
        self.attention, self.make = build(), make

    def forward_step(self, x):
        return self.make(self.attention.forward_step(x))


@pytest.mark.parametrize(
    ("make", "given"),
    [(lambda y: (y, y), "tuple"), (lambda y: y[:1], r"\(1, 12\)"), (lambda y: y.sum(), r"\(\)")],
)
def test_output_that_has_no_row_for_each_stream_is_named(make, given):
    pool = co.StreamPool(Answers(make), 2, (EMBED,))
    stream = pool.open()
    pool.push(stream, torch.ones(EMBED))
    before = pool.export(stream)
    with pytest.raises(TypeError, match=rf"shape \(2, \.\.\.\), but returned {given}"):
        pool.tick()
    assert pool.statistics().waiting == 1
    assert_same_state(pool.export(stream)["attention"], before["attention"])


@pytest.mark.parametrize("made", ["made", "ticked"])
def test_inference_mode_may_begin_and_end_between_calls(made):
    """As it does for threads: the mode is each thread's own."""
    modules = build(), build()
    with torch.inference_mode(made == "made"):
        pool = co.StreamPool(modules[0], 2, (EMBED,))
    twin = co.StreamPool(modules[1], 2, (EMBED,))
    assert pool.open() == twin.open() == 0
    for t, token in enumerate(torch.randn(3 * LENGTH, EMBED).unbind()):
        for each in (pool, twin):
            each.push(0, token)
        with torch.inference_mode(made == "ticked" and t % 3 == 0):
            got = pool.tick()
        expected = twin.tick()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[s], expected[s]) for s in got)


def test_pushed_token_is_a_copy():
    pool = co.StreamPool(build(sequence_len=1), 1, (EMBED,))
    stream, token = pool.open(), torch.ones(EMBED)
    pool.push(stream, token)
    token.fill_(float("nan"))
    assert pool.tick()[stream].isfinite().all()


@pytest.mark.parametrize("together", [True, False])
def test_no_graph_is_kept_of_weights_and_tokens_that_train(together):
    """Which would grow with every tick, and take all tokens along."""
    attention = build(sequence_len=2)
    assert attention.in_proj_weight.requires_grad
    pool = co.StreamPool(attention if together else wrapped(attention), 1, (EMBED,))
    if not together:
        attention.requires_grad_()
    stream, tokens = pool.open(), torch.ones(3, EMBED, requires_grad=True).exp()
    for token in tokens:
        pool.push(stream, token)
    assert not any(x.token.requires_grad for x in pool._streams[stream].queue)
    outputs = [pool.tick() for _ in tokens]
    assert not outputs[-1][stream].requires_grad
    assert not any(part.requires_grad for part in attention.get_state())


@pytest.mark.parametrize("stored", [False, True], ids=["as_it_is", "as_bytes"])
@pytest.mark.parametrize("past", [0, 3, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_exported_stream_goes_on_in_another_pool(kind, past, stored):
    model = Net(**KINDS[kind])
    pool, other = (co.StreamPool(copy.deepcopy(model), size, (4,)) for size in (2, 5))
    x = tokens(40)
    stream = pool.open()
    for token in x[:past]:
        pool.push(stream, token)
        pool.tick()
    state = pool.export(stream)
    if stored:
        state = co.states_from_bytes(co.states_to_bytes(state))
    other.open()
    moved = other.restore(state)
    expected = alone(model, x)
    for count, token in enumerate(x[past:], past + 1):
        other.push(moved, token)
        outputs = other.tick()
        assert (moved in outputs) == (count in expected)
        if count in expected:
            torch.testing.assert_close(outputs[moved], expected[count], rtol=1e-4, atol=1e-5)


def test_stream_of_a_model_that_is_in_no_pool_goes_on_in_one_at_its_age():
    """Of whose layers the first has seen more tokens than those behind it, which got no input."""
    model = Net()
    x = tokens(READY + 2)
    for token in x[: LENGTH + 2]:
        model.forward_step(token[None])
    pool = co.StreamPool(copy.deepcopy(model), 2, (4,))
    stream = pool.restore(co.export_stream(model, 0))
    for count, token in enumerate(x[LENGTH + 2 :], LENGTH + 3):
        pool.push(stream, token)
        output, expected = pool.tick(), model.forward_step(token[None])
        assert (stream in output) == (expected is not None) == (count >= READY)
        if expected is not None:
            torch.testing.assert_close(output[stream], expected[0], rtol=1e-4, atol=1e-5)


def test_state_that_does_not_fit_takes_no_slot():
    pool = co.StreamPool(build(), 1, (EMBED,))
    foreign = co.StreamPool(build(sequence_len=LENGTH + 1), 1, (EMBED,))
    state = foreign.export(foreign.open())
    with pytest.raises(ValueError, match="does not fit"):
        pool.restore(state)
    pool.open()


def test_new_stream_sees_nothing_of_the_slots_former_owner():
    model = build(sequence_len=2, query_index=0, formulation="kv")
    pool = co.StreamPool(model, 1, (EMBED,))
    for _ in range(3):
        stream = pool.open()
        for _ in range(4):
            pool.push(stream, torch.full((EMBED,), float("nan")))
            pool.tick()
        pool.close(stream)
        stream = pool.open()
        assert all(part.isfinite().all() for part in pool.export(stream)[""][:3])
        for count in range(1, 5):
            pool.push(stream, torch.ones(EMBED))
            outputs = pool.tick()
            assert (stream in outputs) == (count >= 2)
            assert count < 2 or outputs[stream].isfinite().all()
        pool.close(stream)


class Breaks(nn.Module):
    """Two layers, of which something between them may fail."""

    def __init__(self):
        super().__init__()
        self.one, self.two = build(0), build(1)
        self.requires_grad_(False)
        self.broken = False

    def forward_step(self, x):
        x = self.one.forward_step(x)
        if self.broken:
            raise MemoryError("between the layers")
        return None if x is None else self.two.forward_step(x)


def test_tick_that_fails_between_layers_has_not_happened():
    pool, twin = (co.StreamPool(Breaks(), 3, (EMBED,)) for _ in range(2))
    x = torch.randn(30, 3, EMBED)
    streams = [pool.open() for _ in range(3)]
    assert streams == [twin.open() for _ in range(3)]
    for t in range(30):
        for i, stream in enumerate(streams):
            if (t + i) % 4:
                for each in (pool, twin):
                    each.push(stream, x[t, i])
        if t % 3 == 0:
            pool._slots._model.broken = True
            with pytest.raises(MemoryError):
                pool.tick()
            pool._slots._model.broken = False
        expected, got = twin.tick(), pool.tick()
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[s], got[s]) for s in expected)
    for stream in streams:
        expected, got = twin.export(stream), pool.export(stream)
        for name in expected:
            assert_same_state(expected[name], got[name])
    assert pool.statistics().tokens == twin.statistics().tokens


def test_tick_interrupted_anywhere_has_happened_for_all_its_streams_or_for_none():
    """Wherever a signal comes; and no stream is answered early or late afterwards."""
    x = torch.randn(LENGTH + 3, 2, EMBED)
    twin = None

    def one_token_before_the_first_answers():
        nonlocal twin
        pools = [co.StreamPool(build(), 2, (EMBED,)) for _ in range(2)]
        for pool in pools:
            for _ in range(2):
                pool.open()
            for t in range(LENGTH - 1):
                for i in range(2):
                    pool.push(i, x[t, i])
                if t < LENGTH - 2:
                    assert pool.tick() == {}
        twin = pools.pop()
        return pools[0]

    happened = []
    tick = co.StreamPool.tick
    for pool, _ in interruptions(one_token_before_the_first_answers, tick, co.pool, co.pool_slots):
        happened.append(pool.statistics().tokens > twin.statistics().tokens)
        if happened[-1]:
            twin.tick()
        for t in range(LENGTH - 1, LENGTH + 3):
            for i in range(2):
                for each in (pool, twin):
                    each.push(i, x[t, i])
            expected, got = twin.tick(), pool.tick()
            assert expected.keys() == got.keys()
            assert all(torch.equal(expected[i], got[i]) for i in expected)
        assert pool.statistics()[:6] == twin.statistics()[:6]
    assert set(happened) == {False, True}


def pool_with_a_token():
    pool = co.StreamPool(build(), 2, (EMBED,))
    pool.push(pool.open(), torch.zeros(EMBED))
    return pool


def waits_for_nobody(call):
    """Whether a thread of its own gets through."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(20)
    return not thread.is_alive()


@pytest.mark.parametrize(
    "call",
    [
        lambda pool: pool.push(0, torch.zeros(EMBED)),
        lambda pool: pool.tick(),
        lambda pool: pool.statistics(),
        lambda pool: pool.close(0),
        lambda pool: pool.open(),
        lambda pool: pool.export(0),
    ],
    ids=["push", "tick", "statistics", "close", "open", "export"],
)
def test_other_threads_go_on_however_a_call_is_interrupted(call):
    for pool, _ in interruptions(pool_with_a_token, call, co.pool, co.pool_slots):
        assert waits_for_nobody(pool.statistics)
        assert waits_for_nobody(pool.tick)


def test_no_mask_is_left_in_effect_however_a_tick_is_interrupted():
    """Nor comes one back when the exception is dropped."""
    mask = torch.tensor([True, False])
    looked_at = (co.pool, co.pool_slots, co.surroundings)
    for _, kept in interruptions(pool_with_a_token, co.StreamPool.tick, *looked_at):
        assert co.modes.surrounding_active(False) is None
        assert co.modes.surrounding_active(True) is None
        with co.active_streams(mask):
            kept.clear()
            assert co.modes.surrounding_active(False) is mask
        assert co.modes.surrounding_active(False) is None


class Waits(nn.Module):
    """Its step ends when it may."""

    def __init__(self):
        super().__init__()
        self.attention, self.stepping, self.may_end = build(), threading.Event(), threading.Event()

    def forward_step(self, x):
        self.stepping.set()
        assert self.may_end.wait(20)
        return self.attention.forward_step(x)


@pytest.mark.parametrize(
    "call",
    [co.StreamPool.open, lambda pool: pool.restore(pool.state), lambda pool: pool.export(0)],
    ids=["open", "restore", "export"],
)
def test_whoever_needs_the_model_waits_for_the_tick_that_has_it(call):
    pool = co.StreamPool(Waits(), 2, (EMBED,))
    stream, model = pool.open(), pool._slots._model
    pool.state = pool.export(stream)
    pool.push(stream, torch.zeros(EMBED))
    ticker = threading.Thread(target=pool.tick, daemon=True)
    other = threading.Thread(target=call, args=(pool,), daemon=True)
    ticker.start()
    assert model.stepping.wait(20)
    other.start()
    other.join(0.1)
    waits = other.is_alive()
    model.may_end.set()
    for thread in (ticker, other):
        thread.join(20)
        assert not thread.is_alive()
    assert waits


class Remembers(nn.Module):
    """Gives back in each call what it set in a context variable in the one before."""

    seen = ContextVar("seen")

    def __init__(self):
        super().__init__()
        self.attention, self.token = build(), None

    def forward_step(self, x):
        if self.token is not None:
            self.seen.reset(self.token)
        self.token = self.seen.set(x)
        return self.attention.forward_step(x)


def test_model_may_keep_context_variables_from_tick_to_tick():
    pool = co.StreamPool(Remembers().eval(), 1, (EMBED,))
    stream = pool.open()
    for _ in range(3):
        pool.push(stream, torch.zeros(EMBED))
        pool.tick()
    assert pool.statistics().ticks == 3


def test_pool_that_cannot_be_made_takes_no_model_from_another():
    model = Net().eval()
    pool = co.StreamPool(model, 1, (4,))
    model.receptive_field = torch.ones(3)
    with pytest.raises(ValueError, match="one element"):
        co.StreamPool(model, 1, (4,))
    stream = pool.open()
    pool.push(stream, torch.ones(4))
    pool.tick()
    assert pool.statistics().tokens == 1


@pytest.mark.parametrize("alone", [False, True])
def test_pool_whose_model_went_to_another_one_says_so(alone):
    model = continual_model("convolution") if alone else Net().eval()
    first = co.StreamPool(model, 2, (4,))
    stream, token = first.open(), torch.ones(4)
    first.push(stream, token)
    second = co.StreamPool(model, 2, (4,))
    other = second.open()
    for call in (first.tick, first.open, lambda: first.export(stream)):
        with pytest.raises(RuntimeError, match=r"another StreamPool .*deepcopy"):
            call()
    first.close(stream)
    assert first.statistics().open == 0
    second.push(other, token)
    assert second.tick() == {}
    assert second.statistics().tokens == 1


def test_model_and_pool_are_freed_together():
    pool = co.StreamPool(Net(), 2, (4,))
    model = weakref.ref(pool._slots._model)
    del pool
    gc.collect()
    assert model() is None


def test_full_queue_is_told_at_once_and_any_timeout_is_taken():
    pool = co.StreamPool(build(), 1, (EMBED,), queue_size=1)
    stream = pool.open()
    for timeout in (0.0, -1.0):
        with pytest.raises(co.PoolFull):
            pool.open(timeout=timeout)
    pool.push(stream, torch.zeros(EMBED))
    thread = threading.Timer(0.2, pool.tick)
    thread.start()
    pool.push(stream, torch.zeros(EMBED), timeout=math.inf)
    thread.join()


def test_slot_is_never_lost_nor_given_twice_however_open_and_close_are_interrupted():
    def pool_with_a_stream():
        pool = co.StreamPool(build(), 3, (EMBED,))
        pool.open()
        return pool

    for call in (co.StreamPool.open, lambda pool: pool.close(0)):
        for pool, _ in interruptions(pool_with_a_stream, call, co.pool, co.pool_slots):
            open_now = pool.statistics().open
            assert open_now in (0, 1, 2)
            for _ in range(3 - open_now):
                pool.open()
            assert sorted(stream.slot for stream in pool._streams.values()) == [0, 1, 2]
            with pytest.raises(co.PoolFull):
                pool.open()


def test_threads_share_a_pool_without_mixing_their_streams():
    """Each thread pushes to streams of its own while one ticks; every answer is its stream's."""
    model = Net()
    pool = co.StreamPool(model, 4, (4,), queue_size=3)
    received, lock = {}, threading.Lock()
    inputs, failures, done = {}, [], threading.Event()

    def tick():
        while not done.is_set() or pool.statistics().waiting:
            for number, row in pool.tick().items():
                with lock:
                    received.setdefault(number, []).append(row)

    def talk(seed):
        try:
            for turn in range(3):
                number = pool.open(timeout=30)
                x = tokens(READY + 4, 100 * seed + turn)
                inputs[number] = x
                for token in x:
                    pool.push(number, token, timeout=30)
                while True:
                    with lock:
                        if len(received.get(number, ())) == 5:
                            break
                    time.sleep(1e-3)
                pool.close(number)
        except Exception as error:
            failures.append(error)

    ticker = threading.Thread(target=tick)
    talkers = [threading.Thread(target=talk, args=(seed,)) for seed in range(6)]
    for thread in (ticker, *talkers):
        thread.start()
    for thread in talkers:
        thread.join(60)
    done.set()
    ticker.join(60)
    assert not failures
    assert len(inputs) == 18
    for number, x in inputs.items():
        expected = list(alone(model, x).values())
        torch.testing.assert_close(
            torch.stack(received[number]), torch.stack(expected), rtol=1e-4, atol=1e-5
        )
    assert pool.statistics().open == 0


def test_pools_in_two_threads_do_not_see_each_others_masks():
    pools = [co.StreamPool(build(), 4, (EMBED,)) for _ in range(2)]
    failures = []

    def run(pool, seed):
        source = random.Random(seed)
        counts = {pool.open(): 0 for _ in range(4)}
        for _ in range(200):
            for number in counts:
                if source.random() < 0.5:
                    pool.push(number, torch.zeros(EMBED))
                    counts[number] += 1
            pool.tick()
        found = {n: int(pool.export(n)[""].position) for n in counts}
        if found != counts:
            failures.append((found, counts))

    threads = [threading.Thread(target=run, args=(p, s)) for s, p in enumerate(pools)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


def test_statistics_count_and_fit_on_a_line():
    pool = co.StreamPool(build(), 3, (EMBED,))
    assert pool.statistics().p50 != pool.statistics().p50  # NaN
    streams = [pool.open(), pool.open()]
    for _ in range(3):
        pool.push(streams[0], torch.zeros(EMBED))
    for _ in range(2):
        pool.push(streams[1], torch.zeros(EMBED))
    pool.tick()
    found = pool.statistics()
    assert (found.capacity, found.open, found.waiting, found.longest_queue) == (3, 2, 3, 2)
    assert (found.ticks, found.tokens) == (1, 2)
    assert 0 < found.p50 <= found.p99 <= found.p999
    assert "2/3 streams" in pool.progress()
    assert "\n" not in pool.progress()


def test_times_are_those_of_the_last_ticks(monkeypatch):
    """The share of a quantile is not exceeded by its own value, which was measured."""
    pool = co.StreamPool(build(), 1, (EMBED,), history=10)
    stream, now = pool.open(), [0.0]
    for seconds in (100.0, *range(10, 0, -1)):
        ends = iter((now[0], now[0] + seconds))
        monkeypatch.setattr(co.pool, "time", SimpleNamespace(perf_counter=lambda e=ends: next(e)))
        now[0] += seconds
        pool.push(stream, torch.zeros(EMBED))
        pool.tick()
    found = pool.statistics()
    assert found.ticks == 11
    assert (found.p50, found.p99, found.p999) == (5.0, 10.0, 10.0)


class Casts(nn.Module):
    """An attention whose tokens come in another dtype than that of its weights."""

    def __init__(self):
        super().__init__()
        self.attention = build()

    def forward_step(self, x):
        return self.attention.forward_step(x.float())


def test_tokens_may_be_of_another_dtype_than_the_first_weight():
    pool = co.StreamPool(Casts(), 1, (EMBED,), dtype=torch.float64, receptive_field=2)
    stream, twin = pool.open(), build().requires_grad_(False)
    twin.start_streams(1)
    assert pool.receptive_field == 2
    for count, token in enumerate(torch.randn(3, EMBED, dtype=torch.float64), 1):
        pool.push(stream, token)
        expected, outputs = twin.forward_step(token[None].float()), pool.tick()
        assert list(outputs) == ([stream] if count >= 2 else [])
        assert all(torch.equal(row, expected[0]) for row in outputs.values())
    with pytest.raises(TypeError, match="float64"):
        pool.push(stream, torch.zeros(EMBED))


# -- modules that know only one clock for the whole batch ------------------------------------------


def continual_model(name):
    torch.manual_seed(0)
    mha = build(embed_dim_second=True, forward_returns_attn_mask=False)
    models = {
        "convolution": lambda: continual.Sequential(continual.Conv1d(4, EMBED, 3), mha),
        "residual with a delay": lambda: continual.Residual(
            continual.Conv1d(4, 4, 3, padding=1), residual_shrink=False
        ),
        "recurrent": lambda: continual.Sequential(continual.GRU(4, 4), continual.Conv1d(4, 4, 2)),
    }
    return models[name]().eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["convolution", "residual with a delay", "recurrent"])
def test_modules_with_one_clock_serve_streams_of_different_age(name):
    model = continual_model(name)
    pool = co.StreamPool(model, 2, (4,))
    assert not pool.batched
    x = tokens(40)
    expected = alone(model, x)
    assert expected
    first = pool.open()
    second = None
    counts = {}
    for t in range(40):
        if t == 7:
            second = pool.open()
        if t == 20:  # moves while it runs
            state = pool.export(first)
            pool.close(first)
            counts.pop(first)
            first = pool.restore(state)
            counts[first] = 20
        due = [s for s in (first, second) if s is not None and (s == first or t % 3)]
        for stream in due:
            pool.push(stream, x[counts.get(stream, 0)])
            counts[stream] = counts.get(stream, 0) + 1
        outputs = pool.tick()
        for stream in due:
            assert (stream in outputs) == (counts[stream] in expected)
            if stream in outputs:
                torch.testing.assert_close(outputs[stream], expected[counts[stream]])


def test_failed_tick_of_modules_with_one_clock_has_not_happened(monkeypatch):
    model = continual_model("convolution")
    pool = co.StreamPool(model, 2, (4,))
    x = tokens(20)
    expected = alone(model, x)
    streams = [pool.open(), pool.open()]
    real, calls = model.forward_step, []

    def fails_sometimes(token):
        calls.append(token)
        out = real(token)
        if len(calls) % 5 == 0 or len(calls) % 7 == 0:  # of either stream
            raise MemoryError
        return out

    monkeypatch.setattr(model, "forward_step", fails_sometimes)
    for count in range(1, 21):
        for stream in streams:
            pool.push(stream, x[count - 1])
        while True:
            try:
                outputs = pool.tick()
                break
            except MemoryError:
                pass
        for stream in streams:
            assert (stream in outputs) == (count in expected)
            if stream in outputs:
                torch.testing.assert_close(outputs[stream], expected[count])


def wrapped(attention, **attributes):
    """A module around ours that knows only one clock."""

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.seen = attention, None

        def clean_state(self):
            self.seen = None

        def get_state(self):
            return None if self.seen is None else {"seen": self.seen, "twice": [2 * self.seen]}

        def set_state(self, state):
            self.seen = state["seen"]

        def forward_step(self, x):
            self.seen = x.clone() if self.seen is None else self.seen.add_(x)
            return self.attention.forward_step(self.seen)

    for name, method in attributes.items():
        setattr(Wrapped, name, method)
    return Wrapped().requires_grad_(False)


def test_state_of_a_module_around_ours_is_kept_apart_too():
    model = wrapped(build())
    pool = co.StreamPool(model, 2, (EMBED,))
    assert not pool.batched
    x = tokens(2 * LENGTH).repeat(1, EMBED)[:, :EMBED]
    expected = alone(model, x)
    first, second = pool.open(), pool.open()
    for count in range(1, len(x) + 1):
        pool.push(first, x[count - 1])
        pool.push(second, -x[count - 1])
        state = pool.export(first)
        output = pool.tick().get(first)
        assert (output is None) == (count not in expected)
        if output is not None:
            torch.testing.assert_close(output, expected[count])
    pool_of_one = co.StreamPool(model, 1, (EMBED,))
    again = pool_of_one.restore(state)
    pool_of_one.push(again, x[-1])
    torch.testing.assert_close(pool_of_one.tick()[again], expected[len(x)])


def test_state_that_a_module_sets_or_cleans_in_place_is_kept_apart_too():
    def set_state(self, state):
        if self.seen is None:
            self.seen = torch.empty_like(state["seen"])
        self.seen.copy_(state["seen"])

    def clean_state(self):
        if self.seen is not None:
            self.seen.zero_()

    model = wrapped(build(sequence_len=1), set_state=set_state, clean_state=clean_state)
    pool = co.StreamPool(model, 2, (EMBED,))
    x = tokens(4).repeat(1, EMBED)[:, :EMBED]
    expected = list(alone(model, x).values())
    first, second = pool.open(), pool.open()
    for token, answer in zip(x, expected, strict=True):
        pool.push(first, token)
        pool.push(second, -token)
        torch.testing.assert_close(pool.tick()[first], answer)


def test_restored_state_goes_where_the_model_is():
    pool = co.StreamPool(wrapped(build()), 1, (EMBED,))
    pool._slots._device = torch.device("meta")
    state = {"seen": torch.ones(1, EMBED), "twice": [torch.ones(1, EMBED)]}
    pool.restore({"attention": None, "": state})
    [kept] = pool._slots._states.values()
    assert kept[""]["seen"].is_meta
    assert kept[""]["twice"][0].is_meta


def test_state_that_does_not_fit_a_module_of_one_clock_is_refused():
    pool = co.StreamPool(wrapped(build()), 1, (EMBED,))
    other = co.StreamPool(wrapped(build(sequence_len=LENGTH + 1)), 1, (EMBED,))
    stream = other.open()
    other.push(stream, torch.ones(EMBED))
    other.tick()
    states = other.export(stream)
    together = build().requires_grad_(False)
    together.forward_step(torch.ones(2, EMBED))
    for wrong in (states["attention"], (1, 2), together.get_state()):
        with pytest.raises(ValueError, match="module 'attention' does not fit"):
            pool.restore({**states, "attention": wrong})
    pool.open()  # whose slot is free


def test_output_of_a_module_with_one_clock_that_is_no_row_is_named():
    twice = lambda self, x: (x, x)
    pool = co.StreamPool(wrapped(build(), forward_step=twice), 1, (EMBED,))
    stream = pool.open()
    pool.push(stream, torch.ones(EMBED))
    with pytest.raises(TypeError, match=r"shape \(1, \.\.\.\), but returned tuple"):
        pool.tick()
    assert pool.statistics().waiting == 1


def test_no_graph_is_made_of_a_model_that_is_stepped_stream_by_stream():
    model = wrapped(build())
    with pytest.raises(ValueError, match="stepped stream by stream"):
        co.StreamPool(model, 1, (EMBED,), graph=True)
    assert co.StreamPool(model, 1, (EMBED,)).open() == 0


def test_residual_around_our_module_is_still_batched():
    mha = build(embed_dim_second=True, forward_returns_attn_mask=False)
    model = continual.Residual(mha, residual_shrink="lagging").eval().requires_grad_(False)
    assert co.StreamPool(model, 2, (EMBED,)).batched


def test_model_that_mixes_streams_in_training_is_refused():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mha = nn.BatchNorm1d(EMBED), build()

        def forward_step(self, x):
            return self.mha.forward_step(self.norm(x))

    model = Normalised().train()
    with pytest.raises(ValueError, match=r"'norm' \(BatchNorm1d; call eval\(\)\)"):
        co.StreamPool(model, 2, (EMBED,))
    assert model.mha.get_state() is None
    co.StreamPool(model.eval(), 2, (EMBED,))
    model.norm = nn.BatchNorm1d(EMBED, track_running_stats=False).eval()
    with pytest.raises(ValueError, match=r"'norm' \(BatchNorm1d; it keeps no statistics\)"):
        co.StreamPool(model, 2, (EMBED,))


def test_state_that_nobody_can_read_is_refused():
    model = continual.Sequential(continual.RecyclingPositionalEncoding(4, 8), build())
    with pytest.raises(ValueError, match="cannot be read"):
        co.StreamPool(model, 2, (4,))
