"""Streams in one batch that begin, pause and end when they like, each as if it were alone."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from oracles import (
    EMBED,
    LENGTH,
    assert_equals_window,
    assert_same_state,
    build,
    draw_tokens,
    step_through,
    window_attention,
)

import continual_mha as co
from continual_mha import _native, backends, use_backend

N = 4
KINDS = {
    "kv": {"formulation": "kv"},
    "kv_extra_slots": {"formulation": "kv", "add_bias_kv": True, "add_zero_attn": True},
    "kv_delayed": {"formulation": "kv", "query_index": 1, "add_zero_attn": True},
    "kv_most_delayed": {"formulation": "kv", "query_index": 0},
    "kv_no_bias": {"formulation": "kv", "bias": False},
    "input": {"formulation": "input"},
    "input_extra_slots": {"formulation": "input", "add_bias_kv": True, "add_zero_attn": True},
    "input_delayed": {"formulation": "input", "query_index": -3, "add_bias_kv": True},
    "input_most_delayed": {"formulation": "input", "query_index": 0, "bias": False},
}
NAN = float("nan")


def frozen(kind, **arguments):
    return build(**{**KINDS[kind], **arguments}).requires_grad_(False)


def fresh(kind, streams=N, **arguments):
    module = frozen(kind, **arguments)
    module.start_streams(streams)
    return module


def mask(*streams, of=N):
    return torch.tensor([i in streams for i in range(of)])


class Alone:
    """The oracle: a module of batch size 1 for each stream."""

    def __init__(self, kind, streams=N):
        self.modules = [frozen(kind) for _ in range(streams)]
        self.counts = [0] * streams
        for module in self.modules:
            module.start_streams(1)

    def reset(self, stream):
        self.modules[stream].clean_state()
        self.modules[stream].start_streams(1)
        self.counts[stream] = 0

    def step(self, stream, token):
        self.counts[stream] += 1
        return self.modules[stream].forward_step(token[None])[0]

    def look(self, stream, token):
        return self.modules[stream].forward_step(token[None], update_state=False)[0]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# -- joining, leaving, pausing ---------------------------------------------------------------------


@pytest.mark.parametrize("way", ["mask", "indices", "tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_streams_of_mixed_ages_and_pauses_equal_one_module_per_stream(kind, way, backend):
    """A paused row is what `update_state=False` gives for its token."""
    source = random.Random(len(kind))
    module, oracle = fresh(kind), Alone(kind)
    x = draw_tokens(module, N, 60)[0]
    for t in range(60):
        gone = [i for i in range(N) if source.random() < 0.04]
        module.reset({"mask": mask(*gone), "indices": gone, "tensor": torch.tensor(gone)}[way])
        for i in gone:
            oracle.reset(i)
        active = mask(*(i for i in range(N) if source.random() < 0.75))
        output = module.forward_step(x[:, t], active=active)
        for i in range(N):
            answer = oracle.step if active[i] else oracle.look
            close(output[i], answer(i, x[i, t]))
        assert module.ready.tolist() == [count >= LENGTH for count in oracle.counts]


@pytest.mark.parametrize("kind", KINDS)
def test_many_tokens_at_once_serve_streams_of_mixed_ages(kind, backend):
    module, oracle = fresh(kind), Alone(kind)
    x = draw_tokens(module, N, 40)[0]
    module.forward_step(x[:, 0], active=mask(1, 2))
    module.forward_step(x[:, 1], active=mask(2))
    for t, streams in ((0, (1, 2)), (1, (2,))):
        for i in streams:
            oracle.step(i, x[i, t])
    start = 2
    for count in (1, 3, LENGTH, 2 * LENGTH + 1):
        output = module.forward_steps(x[:, start : start + count])
        assert output.shape[1] == count
        for t in range(count):
            for i in range(N):
                close(output[i, t], oracle.step(i, x[i, start + t]))
        start += count


@pytest.mark.parametrize("kind", KINDS)
def test_ready_rows_equal_attention_over_the_streams_own_window(kind):
    """Whatever their age; against PyTorch's attention, not against this package."""
    module = fresh(kind)
    x = draw_tokens(module, N, 40)[0]
    seen = [[] for _ in range(N)]
    for t in range(40):
        active = torch.rand(N) < 0.7
        output = module.forward_step(x[:, t], active=active)
        for i in range(N):
            if active[i]:
                seen[i].append(x[i, t])
            if active[i] and module.ready[i]:
                own = torch.stack(seen[i])[None, -LENGTH:]
                assert_equals_window(output[i].view(1, 1, -1), module, own)


def test_streams_that_march_together_answer_none_until_warm():
    module = frozen("kv")
    x = draw_tokens(module, N, LENGTH + 1)[0]
    assert module.ready is None
    for t in range(LENGTH - 1):
        assert module.forward_step(x[:, t]) is None
        assert module.ready.tolist() == [False] * N
    assert module.forward_step(x[:, LENGTH - 1]) is not None
    assert module.ready.tolist() == [True] * N
    module.clean_state()
    module.forward_step(x[:, 0])
    module.reset([0])
    assert module.forward_step(x[:, 1]) is not None


def test_mask_around_a_step_is_that_of_the_step():
    module, twin = fresh("kv"), fresh("kv")
    x = draw_tokens(module, N, 3)[0]
    with co.active_streams(mask(0, 3)):
        with co.active_streams(mask(1)):
            inner = module.forward_step(x[:, 0])
        outer = module.forward_step(x[:, 1])
        own = module.forward_step(x[:, 2], active=mask(2))
    assert torch.equal(inner, twin.forward_step(x[:, 0], active=mask(1)))
    assert torch.equal(outer, twin.forward_step(x[:, 1], active=mask(0, 3)))
    assert torch.equal(own, twin.forward_step(x[:, 2], active=mask(2)))
    assert_same_state(module.get_state(), twin.get_state())


def test_mask_is_that_of_the_asynchronous_task():
    module = fresh("kv")
    x = draw_tokens(module, N, 1)[0]

    async def serve(stream):
        with co.active_streams(mask(stream)):
            await asyncio.sleep(0)
            module.forward_step(x[:, 0])

    async def serve_two():
        await asyncio.gather(serve(0), serve(2))

    asyncio.run(serve_two())
    assert module.get_state().position.tolist() == [1, 0, 1, 0]
    module.forward_step(x[:, 0])
    assert module.get_state().position.tolist() == [2, 1, 2, 1]


@pytest.mark.parametrize("kind", ["kv_delayed", "input_delayed"])
def test_inactive_stream_of_all_keeps_everything(kind, backend):
    module = fresh(kind)
    x = draw_tokens(module, N, 12)[0]
    for t in range(7):
        module.forward_step(x[:, t])
    before = [module.get_stream(i) for i in range(N)]
    module.forward_step(x[:, 8], active=mask())
    for i in range(N):
        assert_same_state(module.get_stream(i), before[i])


# -- no waiting for the device ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kv", "kv_delayed", "input", "input_delayed"])
def test_nothing_asks_the_host_for_a_tensors_value(kind):
    """Every operation runs under torch.compile in one graph, which cannot contain an `item()`."""
    torch._dynamo.reset()
    module, twin = fresh(kind), fresh(kind)
    x = draw_tokens(module, N, 4)[0]

    def tick(x, active, gone):
        module.reset(gone)
        return module.forward_step(x, active=active), module.ready

    compiled = torch.compile(tick, fullgraph=True, backend="aot_eager")
    for t in range(4):
        active, gone = mask(t, 1, 2), mask(t - 1)
        output, ready = compiled(x[:, t], active, gone)
        twin.reset(gone)
        close(output, twin.forward_step(x[:, t], active=active))
        assert torch.equal(ready, twin.ready)
    torch._dynamo.reset()


# -- isolation -------------------------------------------------------------------------------------


@pytest.mark.small
@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("kind", ["kv", "kv_delayed", "input", "input_delayed"])
def test_outputs_are_bit_for_bit_the_same_whatever_the_neighbours_hold(kind, bad, backend):
    """Neighbours of other values, of other age, reset, paused, or full of NaN."""
    module, twin = fresh(kind), fresh(kind)
    x = draw_tokens(module, N, 14)[0]
    y = x.clone()
    y[0], y[3] = bad, 5 * x[3]
    everyone = mask(*range(N))
    for t in range(14):
        left = module.forward_step(x[:, t], active=everyone)
        if t in (4, 9):
            twin.reset([3])
        right = twin.forward_step(y[:, t], active=mask(0, 1, 2) if t % 2 else everyone)
        assert torch.equal(left[1:3], right[1:3])
    for i in (1, 2):
        assert_same_state(module.get_stream(i), twin.get_stream(i))


@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}])
@pytest.mark.parametrize("formulation", ["kv", "input"])
@pytest.mark.parametrize("embed_dim", [44, 100])
@pytest.mark.parametrize("on", ["cpu", "torch"])
def test_in_bfloat16_on_a_cpu_no_call_nor_gradient_mixes_streams(on, embed_dim, formulation, extra):
    """PyTorch's products by AMX do, where features are no multiple of what a tile holds."""
    if on not in backends.available():
        pytest.skip("the native library was not built")
    streams, length, broken = 40, 18, [3, 17, 39]
    others = [i for i in range(streams) if i not in broken]
    construction = {"embed_dim": embed_dim, "num_heads": 2, "sequence_len": length, **extra}

    def answers(x):
        module = build(**construction, formulation=formulation).bfloat16()
        clip = x[:, :length].clone().requires_grad_()
        out, _ = module.forward(clip)
        found = [out, torch.autograd.grad(out, clip, torch.ones_like(out))[0]]
        with torch.no_grad():
            found.append(module.forward(x[:, :3])[0])
            found.append(module.forward_steps(x[:, : length + 2]))
            found.append(module.forward_step(x[:, length + 2]))
            found.append(module.forward_steps(x[:, length + 3 :]))
        return found

    x = draw_tokens(build(**construction), streams, length + 8)[0].bfloat16()
    spoilt = x.clone()
    spoilt[broken, 2::3] = NAN
    with use_backend(on):
        for left, right in zip(answers(x), answers(spoilt), strict=True):
            assert torch.equal(left[others], right[others])
            assert right[broken].isnan().any()


@pytest.mark.parametrize("kind", ["kv", "kv_delayed"])
def test_own_kernels_give_the_same_bits_in_any_slot_and_batch(kind, backend):
    """Where PyTorch's GEMM serves the projections, the number of rows may change its rounding."""
    if backend in ("torch", "cuda"):
        pytest.skip("its projections are PyTorch's GEMM, or its work is divided by the streams")
    x = draw_tokens(build(), 9, 12)[0]
    one = fresh(kind, 1)
    expected = [one.forward_step(x[2:3, t])[0] for t in range(12)]
    for streams, slot in ((2, 1), (3, 0), (9, 2), (9, 8)):
        module = fresh(kind, streams)
        rows = torch.arange(streams)
        rows[slot] = 2
        for t in range(12):
            assert torch.equal(module.forward_step(x[rows, t])[slot], expected[t])


@pytest.mark.parametrize("embed_dim", [100, 512, 1040])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16], ids=str
)
def test_streams_keep_their_bits_in_large_batches_on_the_cpu_kernels(dtype, embed_dim):
    """All of a step runs on them in a batch of any size, in bfloat16 of 2 to 512 tokens with a
    matrix unit, which in float32 takes only what must not be invariant. Wide tokens pass the
    weights in parts."""
    if "cpu" not in co.backends.available():
        pytest.skip("the CPU library is not built")
    unit = _native.cpu_isa() == "amx"
    if dtype == torch.bfloat16 and not unit:
        pytest.skip("PyTorch multiplies")
    sizes = {"embed_dim": embed_dim, "num_heads": 4, "sequence_len": 3}
    asked = unit and dtype == torch.float32
    module = build(formulation="kv", batch_invariant=asked, **sizes).to(dtype).requires_grad_(False)
    x = draw_tokens(module, 128, 9)[0]

    def outputs(rows):
        module.start_streams(len(rows))
        steps = [module.forward_step(x[rows, t]) for t in range(5)]
        return torch.cat([torch.stack(steps, 1), module.forward_steps(x[rows, 5:])], 1)

    with co.use_backend("cpu"):
        expected, _ = outputs(torch.tensor([7, 3]))
        for streams, slot in ((1, 0), (33, 32), (128, 64), (128, 127)):
            if streams == 1 and dtype == torch.bfloat16:
                continue
            rows = torch.arange(streams)
            rows[slot] = 7
            assert torch.equal(outputs(rows)[slot], expected)


BATCH_INVARIANT = {
    "kv": {"formulation": "kv"},
    "kv_delayed": {"formulation": "kv", "query_index": 1, "add_zero_attn": True},
    "kv_wide": {"formulation": "kv", "embed_dim": 272, "num_heads": 2},
    "kv_bfloat16": {"formulation": "kv", "dtype": torch.bfloat16},
    "kv_int8": {"formulation": "kv", "cache_dtype": torch.int8},
    "input": {"formulation": "input", "add_bias_kv": True},
    "input_delayed": {"formulation": "input", "query_index": 1},
    "input_wide": {"formulation": "input", "embed_dim": 272, "num_heads": 16},
    "input_bfloat16": {"formulation": "input", "dtype": torch.bfloat16},
    "input_int8": {"formulation": "input", "cache_dtype": torch.int8},
}


@pytest.mark.parametrize("at_once", [False, True], ids=["steps", "many"])
@pytest.mark.parametrize("kind", BATCH_INVARIANT)
def test_batch_invariant_streams_keep_their_bits_in_any_batch_and_slot(kind, at_once, backend):
    """Of the CPU kernels, small float32 and bfloat16 would else leave large batches to a GEMM."""
    if backend in ("torch", "cuda"):
        pytest.skip("declines the mode")
    module = build(batch_invariant=True, **BATCH_INVARIANT[kind]).requires_grad_(False)
    x = draw_tokens(module, 130, LENGTH + 1)[0]
    places = [(1, 0), (2, 1), (3, 0), (16, 7), (17, 16), (64, 63), (130, 64)]
    expected = None
    for streams, slot in places:
        rows = torch.arange(streams) + 3
        rows[slot] = 2
        module.start_streams(streams)
        if at_once:
            looked = module.forward_steps(x[rows % 130], update_state=False)
            outputs = module.forward_steps(x[rows % 130])
            assert torch.equal(looked, outputs)
        else:
            outputs = torch.stack(
                [module.forward_step(token) for token in x[rows % 130].unbind(1)], 1
            )
        expected = outputs[slot] if expected is None else expected
        assert torch.equal(outputs[slot], expected), (streams, slot)
    if not module.cache_dtype:
        assert_equals_window(expected[None, LENGTH - 1 :], module, x[2:3])


@pytest.mark.parametrize("formulation", ["auto", "kv", "input"])
def test_batch_invariant_steps_are_refused_where_nothing_can_do_them(formulation):
    module = build(batch_invariant=True, formulation=formulation)
    x = draw_tokens(module, 2, 3)[0]
    with pytest.raises(RuntimeError, match="batch_invariant=True have no gradient"):
        module.forward_step(x[:, 0])
    module.requires_grad_(False)
    for call, tokens in ((module.forward_step, x[:, 0]), (module.forward_steps, x)):
        with (
            co.use_backend("torch"),
            pytest.raises(
                RuntimeError, match="torch: its rounding depends on the number of streams"
            ),
        ):
            call(tokens)
    assert module.get_state() is None
    with torch.no_grad(), co.use_backend("torch"):
        module.batch_invariant = False
        for _ in range(LENGTH + 2):
            module.forward_step(x[:, 0])
        module.batch_invariant = True
        with pytest.raises(RuntimeError, match="torch: its rounding depends"):
            module.forward_step(x[:, 0])


@pytest.mark.parametrize("left", [NAN, float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_former_owner_is_left_after_a_reset(kind, left, backend):
    """Neither in outputs, from the first on, nor in what is exported."""
    module, clean = fresh(kind), fresh(kind)
    x = draw_tokens(module, N, 14)[0]
    poison = torch.full((N, EMBED), left)
    for _ in range(LENGTH + 3):
        module.forward_step(poison)
    for part in module.get_state()[:-2]:
        assert part.numel() == 0 or not part.isfinite().all()
    module.reset(list(range(N)))
    for age in range(14):
        assert_same_state(module.get_state(), clean.get_state())
        for i in (0, 3):
            assert_same_state(module.get_stream(i), clean.get_stream(i))
        assert torch.equal(module.forward_step(x[:, age]), clean.forward_step(x[:, age]))


@pytest.mark.parametrize("kind", KINDS)
def test_token_of_a_paused_stream_leaves_no_trace(kind, backend):
    module, twin = fresh(kind), fresh(kind)
    x = draw_tokens(module, N, 20)[0]
    for t in range(20):
        for _ in range(t % 3):
            module.forward_step(torch.full((N, EMBED), NAN), active=mask())
        assert torch.equal(module.forward_step(x[:, t]), twin.forward_step(x[:, t]))
        assert_same_state(module.get_stream(1), twin.get_stream(1))


# -- one stream, to and fro ------------------------------------------------------------------------


@pytest.mark.parametrize("age", [0, 2, LENGTH, 3 * LENGTH + 1])
@pytest.mark.parametrize("kind", KINDS)
def test_stream_moves_to_any_slot_of_any_module(kind, age, backend):
    source, target = fresh(kind), fresh(kind, 7)
    x = draw_tokens(source, N, age + 12)[0]
    for t in range(age):
        source.forward_step(x[:, t])
        target.forward_step(torch.ones(7, EMBED))
    target.set_stream(5, source.get_stream(2))
    source.set_stream(0, source.get_stream(3))
    others = target.get_state()
    for t in range(age, age + 12):
        expected = source.forward_step(x[[3, 1, 2, 3], t])
        got = target.forward_step(x[[0, 0, 0, 0, 0, 2, 0], t])
        close(got[5], expected[2])
        close(expected[0], expected[3])
    assert others.position.tolist() == [age] * 7


@pytest.mark.parametrize("kind", ["kv", "input"])
def test_stream_that_does_not_fit_is_refused_and_nothing_changes(kind):
    module = fresh(kind)
    for token in draw_tokens(module, N, 7)[0].unbind(1):
        module.forward_step(token)
    before = module.get_state()
    other = "input" if kind == "kv" else "kv"
    bad = [
        (fresh(kind).double().get_stream(0), TypeError),
        (fresh(other).get_stream(0), TypeError),
        (fresh(kind, sequence_len=LENGTH + 1).get_stream(0), ValueError),
        (module.get_state(), ValueError),
        (module.get_stream(0)._replace(position=torch.tensor([-1])), ValueError),
        (module.get_stream(0)[:-1], TypeError),
        (None, TypeError),
    ]
    for stream, error in bad:
        with pytest.raises(error):
            module.set_stream(1, stream)
        assert_same_state(module.get_state(), before)
    with pytest.raises(TypeError, match="what mark"):
        module.return_to(None)
    assert_same_state(module.get_state(), before)
    for index in (-1, N):
        with pytest.raises(ValueError, match="streams 0 to 3"):
            module.get_stream(index)
        with pytest.raises(ValueError, match="streams 0 to 3"):
            module.set_stream(index, module.get_stream(0))
    with pytest.raises(ValueError, match="no streams yet"):
        frozen(kind).get_stream(0)


@pytest.mark.parametrize("kind", KINDS)
def test_imported_stream_may_hold_anything_in_slots_it_has_not_filled(kind):
    module, twin = fresh(kind), fresh(kind)
    x = draw_tokens(module, N, 10)[0]
    for t in range(2):
        twin.forward_step(x[:, t])
    state = twin.get_stream(1)
    dirty = [part.clone() for part in state[:-2]]
    for part in dirty:
        part[..., 2:, :] = NAN
    module.set_stream(1, type(state)(*dirty, state.position, state.clock))
    for t in range(2, 10):
        close(module.forward_step(x[:, t])[1], twin.forward_step(x[:, t])[1])


# -- long life -------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [2**31 - 7, 2**32 - 3, 2**53 + 1, 2**63 - 2**48 - 100], ids=str)
@pytest.mark.parametrize("at_once", [False, True], ids=["steps", "many"])
@pytest.mark.parametrize("kind", KINDS)
def test_streams_of_great_age_go_on_as_young_ones(kind, at_once, start, backend):
    """Slots depend on the position modulo the window, and the waiting queries' on theirs."""
    module = frozen(kind)
    x = draw_tokens(module, N, LENGTH + 30)[0]
    period = LENGTH * (module.delay + 1)
    young = LENGTH + (start - LENGTH) % period
    for token in draw_tokens(module, N, young - LENGTH, seed=5)[0].unbind(1):
        module.forward_step(token)
    for t in range(LENGTH):
        module.forward_step(x[:, t])
    state = module.get_state()
    position = state.position - young + start
    module.set_state(state._replace(position=position))
    rest = x[:, LENGTH:]
    if at_once:
        output = module.forward_steps(rest)
    else:
        output = torch.stack([module.forward_step(token) for token in rest.unbind(1)], 1)
    close(output, window_attention(module, x)[:, 1:].float())
    assert module._ring_position.tolist() == [start + 30] * N
    assert module.ready.all()


@pytest.mark.parametrize("gone", [[1], [False, True, False, False], range(1, 2)])
def test_streams_are_named_wherever_torch_makes_tensors_by_default(gone):
    module = build()
    with torch.no_grad():
        module.forward_step(torch.ones(N, EMBED))
        with torch.device("meta"):
            module.reset(gone)
    assert module.get_state().position.tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("then", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_streams_go_on_after_a_reset_outside_of_the_inference_mode_they_began_in(
    formulation, then, backend
):
    module, twin = (build(formulation=formulation, query_index=-2) for _ in range(2))
    x = draw_tokens(module, 2, LENGTH + 4)[0]
    with torch.inference_mode():
        step_through(module, x[:, :LENGTH])
    with torch.no_grad():
        step_through(twin, x[:, :LENGTH])
        for each in (module, twin):
            each.reset([1])
        expected = step_through(twin, x[:, LENGTH:])
    with then():
        outputs = step_through(module, x[:, LENGTH:])
    for output, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_gradient_reaches_the_past_of_streams_that_a_reset_leaves_alone(formulation, mode):
    grads = []
    for resets in (True, False):
        module = build(formulation=formulation, query_index=-2)
        x = draw_tokens(module, 2, LENGTH + 2)[0].requires_grad_()
        step_through(module, x[:, :LENGTH])
        if resets:
            with mode():
                module.reset([1])
        last = step_through(module, x[:, LENGTH:])[-1]
        grads.append(torch.autograd.grad(last.sum(), x)[0])
    torch.testing.assert_close(grads[0][0], grads[1][0])
    assert (grads[0][1, :LENGTH] == 0).all()
    assert (grads[1][1, 2:LENGTH] != 0).any()


@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_no_call_inside_a_block_moves_a_paused_stream(formulation, backend):
    module = build(formulation=formulation).requires_grad_(False)
    x = draw_tokens(module, 2, LENGTH + 3)[0]
    step_through(module, x[:, :LENGTH])
    before, answers = module.get_state(), module.forward_steps(x[:, LENGTH:], update_state=False)
    with co.active_streams(torch.tensor([True, False])):
        with pytest.raises(RuntimeError, match="forward_steps moves all streams"):
            module.forward_steps(x[:, LENGTH:])
        assert module.forward_steps(x[:, :0]) is None
        assert torch.equal(module.forward_steps(x[:, LENGTH:], update_state=False), answers)
        assert_same_state(module.get_state(), before)
        output, after = module._forward_step(x[:, LENGTH], prev_state=before)
    torch.testing.assert_close(output, answers[:, 0])
    assert after.position.tolist() == [LENGTH + 1, LENGTH]
    assert_same_state(module.get_state(), before)
    with (
        co.active_streams(torch.ones(3, dtype=torch.bool)),
        pytest.raises(ValueError, match="active"),
    ):
        module._forward_step(x[:, LENGTH], prev_state=before)
