"""Steps answer with attention over the sliding window, however the tokens are handed over."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from oracles import (
    CONSTRUCTIONS,
    assert_as_exact_as_torch,
    assert_equals_window,
    assert_same_state,
    build,
    draw_tokens,
    from_layout,
    query_lag,
    run_steps,
    seeded,
    stack,
    step_through,
    to_layout,
    torch_attention,
    window_attention,
)

from continual_mha import use_backend

LENGTHS = [1, 2, 63, 64, 120]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad": torch.enable_grad,
}


@pytest.mark.parametrize("construction", ["defaults", "delayed_query_with_extra_slots"])
def test_masked_oracle_equals_one_attention_call_per_window(construction):
    module = build(**CONSTRUCTIONS[construction]).double()
    tokens = draw_tokens(module, 2, 13)
    length, lag = module.sequence_len, query_lag(module)
    attend = torch_attention(module)
    expected = []
    for end in range(length, 14):
        query, key, value = (x[:, end - length : end] for x in tokens)
        expected.append(attend(query[:, length - 1 - lag, None], key, value)[0][:, 0])
    torch.testing.assert_close(window_attention(module, *tokens), torch.stack(expected, 1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_every_step_equals_the_window_past_two_wraparounds(construction, mode, backend):
    module = build(**CONSTRUCTIONS[construction])
    tokens = draw_tokens(module, 3, 2 * module.sequence_len + 3)
    with MODES[mode]():
        outputs = step_through(module, *tokens)
    assert_equals_window(stack(outputs, module), module, *tokens)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_many_tokens_at_once_equal_the_window(construction, mode, backend):
    module = build(**CONSTRUCTIONS[construction])
    length = module.sequence_len
    pieces = [length - 1, 2, 1, length + 2, 0, 2 * length + 1, length]
    tokens = draw_tokens(module, 3, sum(pieces))
    outputs, start = [], 0
    with MODES[mode]():
        for count in pieces:
            chunk = [x[:, start : start + count] for x in tokens]
            outputs.append(run_steps(module, *chunk))
            start += count
    assert outputs[0] is None
    assert outputs[4] is None
    assert [o.shape[1] for o in outputs[1:4]] == [2, 1, length + 2]
    assert_equals_window(torch.cat([o for o in outputs if o is not None], 1), module, *tokens)


@pytest.mark.parametrize("streams", [1, 3, 130])
@pytest.mark.parametrize("length", LENGTHS)
def test_window_lengths_and_stream_counts(length, streams, backend):
    module = build(embed_dim=15, num_heads=3, sequence_len=length)
    tokens = draw_tokens(module, streams, 2 * length + 3)
    with torch.no_grad():
        outputs = stack(step_through(module, *tokens), module)
    assert_equals_window(outputs, module, *tokens)


@pytest.mark.parametrize("query_index", [0, 62, -1, -2, -63])
def test_query_index_with_a_long_window(query_index, backend):
    module = build(sequence_len=63, query_index=query_index)
    tokens = draw_tokens(module, 2, 2 * 63 + 3)
    with torch.no_grad():
        outputs = stack(step_through(module, *tokens), module)
    assert_equals_window(outputs, module, *tokens)


@pytest.mark.parametrize("count", [1, 5, 62, 63, 64, 127, 200])
def test_many_tokens_after_any_past(count, backend):
    module = build(embed_dim=15, num_heads=3, sequence_len=63, query_index=-4)
    past = 70
    tokens = draw_tokens(module, 2, past + count)
    with torch.no_grad():
        step_through(module, *(x[:, :past] for x in tokens))
        output = run_steps(module, *(x[:, past:] for x in tokens))
    recent = [x[:, past - 62 :] for x in tokens]
    assert_equals_window(output, module, *recent)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("embed_dim", "num_heads"), [(30, 3), (64, 4), (7, 7), (33, 1)])
def test_precisions_and_head_dims(embed_dim, num_heads, dtype, backend):
    module = build(embed_dim=embed_dim, num_heads=num_heads, sequence_len=9, dtype=dtype)
    tokens = draw_tokens(module, 3, 2 * 9 + 3)
    with torch.no_grad():
        outputs = stack(step_through(module, *tokens), module)
        module.clean_state()
        together = run_steps(module, *tokens)
    assert outputs.dtype == dtype
    assert together.dtype == dtype
    assert_equals_window(outputs, module, *tokens)
    assert_equals_window(together, module, *tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_scores_do_not_overflow(dtype, backend):
    """Scores in the hundreds: the softmax subtracts its maximum."""
    module = build(embed_dim=16, num_heads=2, sequence_len=6, dtype=dtype)
    query, key, value = draw_tokens(module, 2, 15)
    tokens = (query * 16, key * 16, value)
    with torch.no_grad():
        outputs = stack(step_through(module, *tokens), module)
    assert outputs.isfinite().all()
    exact = window_attention(module, *tokens)
    assert outputs.abs().max() < 2 * exact.abs().max()


STRIDED = {
    "every_other_feature": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "feature_major": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "slice_of_a_wider_row": lambda x: torch.cat([x, x.flip(-1)], -1)[..., : x.shape[-1]],
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("strides", STRIDED)
@pytest.mark.parametrize("construction", ["defaults", "kdim_and_vdim", "sequence_first"])
def test_strides_of_the_input_do_not_matter(construction, strides, backend):
    module = build(**CONSTRUCTIONS[construction])
    length = module.sequence_len
    tokens = draw_tokens(module, 3, 3 * length)
    odd = STRIDED[strides]
    with torch.no_grad():
        singles = [
            module.forward_step(*(odd(x[:, t].contiguous()) for x in tokens))
            for t in range(2 * length)
        ]
        rest = module.forward_steps(
            *(odd(to_layout(module, x[:, 2 * length :]).contiguous()) for x in tokens)
        )
    outputs = torch.cat([stack(singles, module), from_layout(module, rest)], 1)
    assert_equals_window(outputs, module, *tokens)


def test_expanded_inputs(backend):
    module = build()
    one = draw_tokens(module, 1, 12)[0]
    x = one.expand(4, 12, module.embed_dim)
    with torch.no_grad():
        outputs = stack(step_through(module, x), module)
        module.clean_state()
        together = run_steps(module, x)
    assert_equals_window(outputs, module, x)
    assert_equals_window(together, module, x)


def test_key_and_value_default_to_the_query(backend):
    module = build()
    query, key, _ = draw_tokens(module, 2, 11)
    with torch.no_grad():
        alone = stack(step_through(module, query), module)
        module.clean_state()
        with_key = stack(step_through(module, query, key), module)
        module.clean_state()
        together = run_steps(module, query, key)
    assert_equals_window(alone, module, query)
    assert_equals_window(with_key, module, query, key, query)
    assert_equals_window(together, module, query, key, query)


def test_inputs_are_not_written_to(backend):
    module = build()
    tokens = draw_tokens(module, 2, 8)
    before = [x.clone() for x in tokens]
    with torch.no_grad():
        step_through(module, *tokens)
        run_steps(module, *tokens)
    assert all(torch.equal(x, y) for x, y in zip(tokens, before, strict=True))


def test_output_is_not_overwritten_by_later_steps(backend):
    module = build()
    x = draw_tokens(module, 2, 14)[0]
    with torch.no_grad():
        step_through(module, x[:, :6])
        step, steps = module.forward_step(x[:, 6]), run_steps(module, x[:, 7:9])
        kept = step.clone(), steps.clone()
        step_through(module, x[:, 9:])
        run_steps(module, x)
    assert torch.equal(step, kept[0])
    assert torch.equal(steps, kept[1])


def test_stream_does_not_depend_on_its_neighbours(backend):
    """Not one bit, and not on values that are not finite."""
    module = build()
    x = draw_tokens(module, 3, 12)[0]
    spoilt = x.clone()
    spoilt[0] = torch.randn(12, module.embed_dim)
    spoilt[2] = float("nan")
    with torch.no_grad():
        clean = stack(step_through(module, x), module)
        module.clean_state()
        beside_others = stack(step_through(module, spoilt), module)
    assert torch.equal(clean[1], beside_others[1])
    assert not torch.equal(clean[0], beside_others[0])


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_not_a_number_leaves_with_its_token(formulation, grad, at_once, backend):
    """A token that is not finite spoils the windows it is in and none before or after it."""
    module = build(formulation=formulation)
    length = module.sequence_len
    x = draw_tokens(module, 2, 4 * length)[0]
    spoilt = x.clone()
    spoilt[0, 7] = float("nan")
    with torch.set_grad_enabled(grad):
        if at_once:
            outputs = run_steps(module, spoilt).detach()
        else:
            outputs = stack(step_through(module, spoilt), module).detach()
        expected = window_attention(module, x).detach()
    inside = torch.zeros(outputs.shape[:2], dtype=torch.bool)
    inside[0, 7 - length + 1 : 7 + 1] = True
    assert outputs[inside].isnan().all()
    torch.testing.assert_close(outputs[~inside].double(), expected[~inside], rtol=1e-5, atol=1e-5)


def test_repeated_runs_give_the_same_bits(backend):
    module = build(embed_dim=30, num_heads=3, sequence_len=17)
    tokens = draw_tokens(module, 5, 40)
    with torch.no_grad():
        first = stack(step_through(module, *tokens), module)
        module.clean_state()
        second = stack(step_through(module, *tokens), module)
    assert torch.equal(first, second)


@pytest.mark.parametrize("construction", ["defaults", "middle_query", "bias_kv_and_zero_attn"])
def test_step_without_update_answers_and_leaves_no_trace(construction, backend):
    module = build(**CONSTRUCTIONS[construction])
    x = draw_tokens(module, 2, 3 * module.sequence_len)[0]
    with torch.no_grad():
        for t in range(x.shape[1]):
            before = module.get_state()
            peeked = module.forward_step(x[:, t], update_state=False)
            other = module.forward_step(-x[:, t], update_state=False)
            assert_same_state(module.get_state(), before)
            output = module.forward_step(x[:, t])
            if output is None:
                assert peeked is None
                assert other is None
            else:
                assert torch.equal(peeked, output)
                # With a delay, the newest token is only a key and a value: still another answer.
                assert not torch.equal(other, output)


@pytest.mark.parametrize("construction", ["defaults", "middle_query", "embed_dim_second"])
@pytest.mark.parametrize("past", [0, 2, 5, 9])
def test_many_tokens_without_update_answer_and_leave_no_trace(construction, past, backend):
    module = build(**CONSTRUCTIONS[construction])
    tokens = draw_tokens(module, 2, past + 12)
    with torch.no_grad():
        step_through(module, *(x[:, :past] for x in tokens))
        before = module.get_state()
        rest = [x[:, past:] for x in tokens]
        peeked = run_steps(module, *rest, update_state=False)
        assert_same_state(module.get_state(), before)
        output = run_steps(module, *rest)
    assert torch.equal(peeked, output)
    first = max(0, past - module.sequence_len + 1)
    assert_equals_window(peeked, module, *(x[:, first:] for x in tokens))


def test_answer_arrives_with_the_last_token_of_the_first_window(backend):
    for length in (1, 2, 7):
        module = build(sequence_len=length)
        x = draw_tokens(module, 2, length)[0]
        with torch.no_grad():
            assert module.forward_steps(x[:, :-1]) is None
            assert module.forward_step(x[:, -1]).shape == (2, module.embed_dim)
            module.clean_state()
            assert module.forward_steps(x).shape == (2, 1, module.embed_dim)


@pytest.mark.parametrize("mode", MODES)
def test_no_streams_and_no_tokens_are_no_errors(mode, backend):
    module = build()
    length, width = module.sequence_len, module.embed_dim
    with MODES[mode]():
        for _ in range(length - 1):
            assert module.forward_step(torch.zeros(0, width)) is None
        assert module.forward_step(torch.zeros(0, width)).shape == (0, width)
        assert module.forward_steps(torch.zeros(0, 3, width)).shape == (0, 3, width)
        assert module.forward_steps(torch.zeros(0, 0, width)) is None
        module.clean_state()
        assert module.forward_steps(torch.zeros(0, length + 1, width)).shape == (0, 2, width)
        module.clean_state()
        assert module.forward_steps(torch.zeros(2, 0, width)) is None
        out, weights = module.forward(torch.zeros(0, length, width))
        assert out.shape == (0, 1, width)
        assert weights.shape == (0, 1, length)


@pytest.mark.parametrize("warm", [False, True])
def test_no_tokens_change_nothing(warm, backend):
    module = build(query_index=-2)
    x = draw_tokens(module, 2, 16)[0]
    with torch.no_grad():
        step_through(module, x[:, : 7 if warm else 2])
        before = module.get_state()
        assert module.forward_steps(x[:, :0]) is None
        assert_same_state(module.get_state(), before)


def integer_module(dtype: torch.dtype, **arguments):
    """Projects small integers by small integers: exact in every dtype and order of summation."""
    module = build(dtype=dtype, **arguments)
    generator = seeded(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "in_proj" in name or "proj_weight" in name:
                parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))
    return module


def expected_rings(module, tokens, count):
    """The rings after `count` tokens, as the definition of the circular cache says."""
    streams, length, lag = tokens[0].shape[0], module.sequence_len, query_lag(module)
    heads = module.num_heads
    width = module.embed_dim // heads
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    else:
        weights = module.in_proj_weight.chunk(3)
    biases = module.in_proj_bias.chunk(3)
    q, k, v = (
        x.double() @ w.double().T + b.double()
        for x, w, b in zip(tokens, weights, biases, strict=True)
    )
    dtype = module.out_proj.weight.dtype
    k_ring = torch.zeros(streams, heads, length, width, dtype=dtype)
    v_ring = torch.zeros_like(k_ring)
    q_slots = lag + 1 if lag > 0 else 0
    q_ring = torch.zeros(streams, q_slots, module.embed_dim, dtype=dtype)
    for t in range(count):
        k_ring[:, :, t % length] = k[:, t].view(streams, heads, width).to(dtype)
        v_ring[:, :, t % length] = v[:, t].view(streams, heads, width).to(dtype)
        if q_slots:
            q_ring[:, t % q_slots] = q[:, t].to(dtype)
    return k_ring, v_ring, q_ring


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("query_index", [-1, 2])
def test_rings_hold_each_token_at_position_modulo_length_bit_for_bit(
    query_index, dtype, mode, backend
):
    module = integer_module(dtype, query_index=query_index)
    length = module.sequence_len
    pieces = [0] * (2 * length + 3) + [3, length, 0, 2 * length + 2, 0, 0]  # 0: one forward_step
    generator = seeded(4)
    total = sum(max(count, 1) for count in pieces)
    tokens = tuple(
        torch.randint(-2, 3, (3, total, module.embed_dim), generator=generator).to(dtype)
        for _ in range(3)
    )
    seen = 0
    with MODES[mode]():
        for count in pieces:
            if count == 0:
                module.forward_step(*(x[:, seen] for x in tokens))
            else:
                run_steps(module, *(x[:, seen : seen + count] for x in tokens))
            seen += max(count, 1)
            state = module.get_state()
            expected = expected_rings(module, tokens, seen)
            for ring, want in zip((state.k, state.v, state.q), expected, strict=True):
                assert ring.dtype == dtype
                assert ring.is_contiguous()
                assert torch.equal(ring, want)
            assert torch.equal(state.position, torch.full((3,), seen, dtype=torch.int64))
            assert state.clock.shape == (min(seen, length), 0)
            assert state.clock.device.type == "cpu"


def test_rings_with_other_key_and_value_sizes_bit_for_bit(backend):
    module = integer_module(torch.float32, kdim=7, vdim=10, query_index=-3)
    generator = seeded(4)
    tokens = tuple(
        torch.randint(-2, 3, (2, 14, size), generator=generator).float()
        for size in (module.embed_dim, 7, 10)
    )
    with torch.no_grad():
        step_through(module, *(x[:, :8] for x in tokens))
        run_steps(module, *(x[:, 8:] for x in tokens))
    state = module.get_state()
    for ring, want in zip(
        (state.k, state.v, state.q), expected_rings(module, tokens, 14), strict=True
    ):
        assert torch.equal(ring, want)


@pytest.mark.parametrize("position", [2**31 - 7, 2**32 - 3, 2**63 - 2**48 - 41])
def test_long_lives_of_streams(position, backend):
    """Positions far past 32 bits choose the slots that small ones of the same remainders do."""
    module = build(query_index=-3)
    period = module.sequence_len * 3  # both rings come round: L = 5 key slots, 3 query slots
    assert query_lag(module) + 1 == 3
    tokens = draw_tokens(module, 3, 40)
    with torch.no_grad():
        step_through(module, *(x[:, :10] for x in tokens))
        young = module.get_state()
        expected = step_through(module, *(x[:, 10:] for x in tokens))
        expected_state = module.get_state()
        shift = (position - 10) // period * period
        age = torch.tensor([0, shift, shift])
        module.set_state(young._replace(position=young.position + age))
        outputs = step_through(module, *(x[:, 10:20] for x in tokens))
        together = run_steps(module, *(x[:, 20:] for x in tokens))
        state = module.get_state()
    assert torch.equal(state.position, torch.tensor([40, 40 + shift, 40 + shift]))
    assert torch.equal(torch.stack(outputs), torch.stack(expected[:10]))
    later = torch.stack(expected[10:], 1)
    assert_as_exact_as_torch(together, later.double(), later)
    torch.testing.assert_close(state.k, expected_state.k)
    torch.testing.assert_close(state.v, expected_state.v)
    torch.testing.assert_close(state.q, expected_state.q)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_step_in_inference_copies_no_ring(mode, backend):
    """What a warm step allocates is far smaller than one ring."""
    module = build(embed_dim=64, num_heads=1, sequence_len=512)
    x = draw_tokens(module, 4, 520)[0]
    with MODES[mode]():
        run_steps(module, x[:, :516])
        module.forward_step(x[:, 516])
        with torch.profiler.profile(profile_memory=True) as profile:
            module.forward_step(x[:, 517])
    allocated = sum(
        max(event.self_cpu_memory_usage, 0) + max(event.self_device_memory_usage, 0)
        for event in profile.events()
    )
    ring = 4 * 512 * 64 * 4
    assert allocated < ring / 4


class SlidingWindow(RuleBasedStateMachine):
    """Any calls in any order, against a plain list of the tokens seen since the last reset."""

    backend = "torch"

    @initialize(
        construction=st.sampled_from(sorted(CONSTRUCTIONS)),
        dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
        shape=st.sampled_from([(12, 2), (15, 3), (12, 4), (10, 1), (6, 6)]),
        length=st.integers(1, 9),
        index=st.integers(0, 99),
        streams=st.integers(1, 4),
        seed=st.integers(0, 2**16),
    )
    def start(self, construction, dtype, shape, length, index, streams, seed):
        arguments = {"embed_dim": shape[0], "num_heads": shape[1], **CONSTRUCTIONS[construction]}
        if arguments["embed_dim"] % arguments["num_heads"]:
            arguments["num_heads"] = 1
        if "query_index" in arguments:
            arguments["query_index"] = index % (2 * length) - length
        self.module = build(seed=seed, **arguments, sequence_len=length, dtype=dtype)
        self.streams = streams
        self.generator = seeded(seed)
        self.forget()
        self.saved = None

    def forget(self):
        module = self.module
        self.history = [
            torch.empty(self.streams, 0, size, dtype=module.out_proj.weight.dtype)
            for size in (module.embed_dim, module.kdim, module.vdim)
        ]

    def draw(self, count):
        return [
            torch.randn(self.streams, count, x.shape[2], generator=self.generator).to(x.dtype)
            for x in self.history
        ]

    def check(self, tokens, output):
        """`output` (N, t, E) or None answers the given tokens, which follow the history."""
        whole = [torch.cat(pair, 1) for pair in zip(self.history, tokens, strict=True)]
        seen, count = self.history[0].shape[1], tokens[0].shape[1]
        first = max(0, seen - self.module.sequence_len + 1)
        recent = [x[:, first:] for x in whole]
        if count == 0 or recent[0].shape[1] < self.module.sequence_len:
            assert output is None
        else:
            assert_equals_window(output, self.module, *recent)
        return whole

    @rule(update=st.sampled_from([True, True, True, False]), mode=st.sampled_from(sorted(MODES)))
    def step(self, update, mode):
        tokens = self.draw(1)
        before = self.module.get_state()
        with MODES[mode]():
            output = self.module.forward_step(*(x[:, 0] for x in tokens), update_state=update)
        whole = self.check(tokens, None if output is None else output[:, None])
        self.settle(update, whole, before)

    @rule(
        count=st.integers(0, 21),
        update=st.sampled_from([True, True, True, False]),
        mode=st.sampled_from(sorted(MODES)),
    )
    def steps(self, count, update, mode):
        tokens = self.draw(count)
        before = self.module.get_state()
        with MODES[mode]():
            output = run_steps(self.module, *tokens, update_state=update)
        self.settle(update, self.check(tokens, output), before)

    def settle(self, update, whole, before):
        after = self.module.get_state()
        if not update:
            assert_same_state(after, before)
            return
        self.history = whole
        seen, length = whole[0].shape[1], self.module.sequence_len
        if after is None:
            assert seen == 0
            return
        assert (after.position == seen).all()
        assert after.clock.shape[0] == min(seen, length)
        if before is not None:
            written = (torch.arange(before.position[0].item(), seen) % length).unique()
            kept = torch.ones(length, dtype=torch.bool)
            kept[written] = False
            assert torch.equal(after.k[:, :, kept], before.k[:, :, kept])
            assert torch.equal(after.v[:, :, kept], before.v[:, :, kept])

    @rule(streams=st.integers(1, 4))
    def clean_and_change_the_number_of_streams(self, streams):
        self.module.clean_state()
        assert self.module.get_state() is None
        self.streams = streams
        self.forget()

    @rule()
    def save(self):
        self.saved = (self.module.get_state(), self.streams, [x.clone() for x in self.history])

    @precondition(lambda self: self.saved is not None)
    @rule()
    def restore(self):
        state, self.streams, history = self.saved
        self.module.set_state(state)
        self.history = [x.clone() for x in history]

    @rule()
    def run_a_clip(self):
        before = self.module.get_state()
        with torch.no_grad():
            self.module.forward(*(to_layout(self.module, x) for x in self.draw(4 + 8)))
        assert_same_state(self.module.get_state(), before)


def test_any_order_of_calls_equals_the_window_at_every_token(backend):
    examples = 4 if backend == "triton" else 60  # each is of a shape for which Triton compiles
    run_state_machine_as_test(
        SlidingWindow,
        settings=settings(max_examples=examples, stateful_step_count=25, deadline=None),
    )


@pytest.mark.parametrize("serves", ["torch", "autocast"])
@pytest.mark.parametrize("formulation", ["kv", "input"])
@pytest.mark.parametrize("sizes", [(64, 4), (36, 4), (9, 1)], ids=str)
def test_plain_pytorch_keeps_a_token_that_is_not_finite_within_its_windows(
    sizes, formulation, serves
):
    """Whose products of bfloat16 read on into the next row on processors with AMX."""
    embed_dim, heads = sizes
    dtype = torch.bfloat16 if serves == "torch" else torch.float32
    module = build(
        embed_dim=embed_dim, num_heads=heads, sequence_len=5, formulation=formulation, dtype=dtype
    )
    x = draw_tokens(module, 3, 71)[0]
    spoilt = x.clone()
    spoilt[1, 20] = torch.nan
    found = []
    forced = use_backend("torch") if serves == "torch" else nullcontext()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, serves == "autocast"), forced:
        for clip in (x, spoilt):
            module.start_streams(3)
            found.append(module.forward_steps(clip))
    expected, out = found
    holds = torch.zeros(3, 71, dtype=torch.bool)
    holds[1, 20:25] = True
    assert out[holds].isnan().all()
    assert torch.equal(out[~holds], expected[~holds])
