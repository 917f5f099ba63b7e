"""Bad input is refused by name, with what was given and what was expected, and changes nothing."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from oracles import LENGTH, assert_same_state, build, draw_tokens, step_through
from torch import nn

from continual_mha import SingleOutputMultiheadAttention

N, E, L = 3, 12, LENGTH
META = torch.device("meta")
ARGUMENTS = {"query_index": 2, "kdim": 7, "vdim": 10}


def zeros(*shape, **kwargs):
    return torch.zeros(shape, **kwargs)


def tokens(n=N, e=E, k=7, v=10, **kwargs):
    return zeros(n, e, **kwargs), zeros(n, k, **kwargs), zeros(n, v, **kwargs)


def clips(n=N, t=3, e=E, k=7, v=10, **kwargs):
    return zeros(n, t, e, **kwargs), zeros(n, t, k, **kwargs), zeros(n, t, v, **kwargs)


# name: (arguments, error, fragments that the message must hold)
BAD_STEPS = {
    "rank 1": ((zeros(E), zeros(7), zeros(10)), ValueError, ["query", "(12,)"]),
    "rank 3": (clips(), ValueError, ["query", "(3, 3, 12)"]),
    "query features": (tokens(e=E + 1), ValueError, ["query", "12", "13"]),
    "key features": (tokens(k=8), ValueError, ["key", "7", "8"]),
    "value features": (tokens(v=11), ValueError, ["value", "10", "11"]),
    "key streams": ((zeros(N, E), zeros(5, 7), zeros(N, 10)), ValueError, ["key", "3", "5"]),
    "value streams": ((zeros(N, E), zeros(N, 7), zeros(5, 10)), ValueError, ["value", "3", "5"]),
    "missing key": ((zeros(N, E),), ValueError, ["key", "7", "12"]),
    "double": (tokens(dtype=torch.float64), TypeError, ["float64", "float32"]),
    "integers": (tokens(dtype=torch.int64), TypeError, ["int64", "float32"]),
    "key dtype": (
        (zeros(N, E), zeros(N, 7, dtype=torch.float16), zeros(N, 10)),
        TypeError,
        ["key", "float16", "float32"],
    ),
    "device": (tokens(device=META), ValueError, ["meta", "cpu"]),
    "value device": (
        (zeros(N, E), zeros(N, 7), zeros(N, 10, device=META)),
        ValueError,
        ["value", "meta", "cpu"],
    ),
    "a list": (([[0.0] * E] * N,), TypeError, ["query", "list"]),
    "none": ((None,), TypeError, ["query", "NoneType"]),
    "sparse": ((zeros(N, E).to_sparse(), *tokens()[1:]), TypeError, ["query", "dense", "sparse"]),
    "sparse key": (
        (zeros(N, E), zeros(N, 7).to_sparse(), zeros(N, 10)),
        TypeError,
        ["key", "dense", "sparse"],
    ),
}
BAD_CLIPS = {
    "rank 2": (tokens(), ValueError, ["query", "(3, 12)"]),
    "rank 4": ((zeros(N, 3, E, 1), *clips()[1:]), ValueError, ["query", "(3, 3, 12, 1)"]),
    "query features": (clips(e=E + 1), ValueError, ["query", "12", "13"]),
    "key features": (clips(k=8), ValueError, ["key", "7", "8"]),
    "value features": (clips(v=11), ValueError, ["value", "10", "11"]),
    "key streams": (
        (clips()[0], clips(n=5)[1], clips()[2]),
        ValueError,
        ["key", "3", "5"],
    ),
    "value tokens": (
        (clips()[0], clips()[1], clips(t=4)[2]),
        ValueError,
        ["value", "3", "4"],
    ),
    "double": (clips(dtype=torch.float64), TypeError, ["float64", "float32"]),
    "device": (clips(device=META), ValueError, ["meta", "cpu"]),
    "a list": (([[0.0] * E] * N,), TypeError, ["query", "list"]),
    "sparse": ((clips()[0].to_sparse(), *clips()[1:]), TypeError, ["query", "dense", "sparse"]),
    "nested": (
        (torch.nested.nested_tensor([zeros(3, E), zeros(2, E)], layout=torch.jagged), *clips()[1:]),
        TypeError,
        ["query", "dense", "nested"],
    ),
}


def assert_refused(call, error, fragments):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message, f"{fragment!r} is not in {message!r}"


def assert_changes_nothing(call, error, fragments, past, mode=torch.no_grad):
    """The refused call leaves the state as it was, and the stream goes on beside a twin's."""
    module, twin = build(**ARGUMENTS), build(**ARGUMENTS)
    stream = draw_tokens(module, N, past + L)
    with mode():
        for each in (module, twin):
            step_through(each, *(x[:, :past] for x in stream))
        assert_refused(lambda: call(module), error, fragments)
        assert_same_state(module.get_state(), twin.get_state())
        for a, b in zip(
            *(step_through(each, *(x[:, past:] for x in stream)) for each in (module, twin)),
            strict=True,
        ):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("update_state", [True, False])
@pytest.mark.parametrize("past", [0, 2, L + 2])
@pytest.mark.parametrize("case", BAD_STEPS)
def test_bad_token_is_refused(case, past, update_state):
    given, error, fragments = BAD_STEPS[case]
    assert_changes_nothing(
        lambda module: module.forward_step(*given, update_state=update_state),
        error,
        fragments,
        past,
    )


@pytest.mark.parametrize("past", [0, L + 2])
@pytest.mark.parametrize("case", BAD_CLIPS)
def test_bad_tokens_are_refused(case, past):
    given, error, fragments = BAD_CLIPS[case]
    assert_changes_nothing(lambda module: module.forward_steps(*given), error, fragments, past)


# Attention of all queries takes a clip of one stream without the axis of streams.
OF_ALL_QUERIES = BAD_CLIPS | {
    "rank 2": ((zeros(3, 12), zeros(N, 3, 7), zeros(N, 3, 10)), ValueError, ["batch", "(1, 3, 12)"])
}


@pytest.mark.parametrize("single_output", [True, False])
@pytest.mark.parametrize("case", BAD_CLIPS)
def test_bad_clip_is_refused(case, single_output):
    given, error, fragments = (BAD_CLIPS if single_output else OF_ALL_QUERIES)[case]

    def call(module):
        module.single_output_forward = single_output
        module.forward(*given)

    assert_changes_nothing(call, error, fragments, 2)


BAD_MASKS = {
    "padding of other tokens": ({"key_padding_mask": zeros(N, 4)}, ValueError, ["(3, 4)", "3"]),
    "padding of other streams": ({"key_padding_mask": zeros(4, 3)}, ValueError, ["(4, 3)"]),
    "padding of all streams": ({"key_padding_mask": zeros(3)}, ValueError, ["(3,)"]),
    "mask of other tokens": ({"attn_mask": zeros(1, 4)}, ValueError, ["(1, 4)", "(1, 3)"]),
    "mask of all queries": ({"attn_mask": zeros(3, 3)}, ValueError, ["(3, 3)", "(1, 3)"]),
    "mask of streams and not heads": ({"attn_mask": zeros(3, 1, 3)}, ValueError, ["(6, 1, 3)"]),
    "integer padding": (
        {"key_padding_mask": zeros(N, 3, dtype=torch.int64)},
        TypeError,
        ["key_padding_mask", "int64"],
    ),
    "integer mask": ({"attn_mask": zeros(1, 3, dtype=torch.uint8)}, TypeError, ["uint8"]),
    "a list": ({"key_padding_mask": [[False] * 3] * N}, TypeError, ["key_padding_mask", "list"]),
    "padding elsewhere": (
        {"key_padding_mask": zeros(N, 3, device=META)},
        ValueError,
        ["key_padding_mask", "meta", "cpu"],
    ),
    "sparse padding": (
        {"key_padding_mask": zeros(N, 3).to_sparse()},
        TypeError,
        ["key_padding_mask", "dense", "sparse_coo"],
    ),
    "mask elsewhere": (
        {"attn_mask": zeros(1, 3, device=META)},
        ValueError,
        ["attn_mask", "meta", "cpu"],
    ),
}


# name: (call of a module with streams, error, fragments)
BAD_STREAMS = {
    "number that is no integer": (lambda m: m.get_stream(0.5), TypeError, ["integer", "0.5"]),
    "number that is a name": (lambda m: m.get_stream("a"), TypeError, ["integer", "'a'"]),
    "number of a place that is no integer": (
        lambda m: m.set_stream(0.5, m.get_stream(0)),
        TypeError,
        ["integer", "0.5"],
    ),
    "start of a fraction": (lambda m: m.start_streams(1.5), TypeError, ["integer", "1.5"]),
    "start of nothing": (lambda m: m.start_streams(None), TypeError, ["integer", "None"]),
    "start of fewer than none": (lambda m: m.start_streams(-1), ValueError, ["-1"]),
    "reset of nothing": (lambda m: m.reset(None), TypeError, ["mask", "integers", "NoneType"]),
    "reset of a name": (lambda m: m.reset("a"), TypeError, ["mask", "integers", "str"]),
    "warm-up of other features": (lambda m: m.warm_up((N, E + 1)), ValueError, ["12", "13"]),
    "warm-up of a number": (lambda m: m.warm_up(N), ValueError, ["(N, 12)", "3"]),
    "warm-up of a clip": (lambda m: m.warm_up((N, E, L)), ValueError, ["(N, 12)", "(3, 12, 5)"]),
}


@pytest.mark.parametrize("case", BAD_STREAMS)
def test_bad_stream_is_refused(case):
    call, error, fragments = BAD_STREAMS[case]
    assert_changes_nothing(call, error, fragments, 2)


@pytest.mark.parametrize("case", BAD_MASKS)
def test_bad_mask_is_refused(case):
    masks, error, fragments = BAD_MASKS[case]
    assert_changes_nothing(lambda module: module(*clips(), **masks), error, fragments, 2)


@pytest.mark.parametrize("case", BAD_STEPS)
def test_functional_step_refuses_a_bad_token(case):
    given, error, fragments = BAD_STEPS[case]
    if case == "missing key":
        given = (*given, None, None)

    def call(module):
        padded = (*given, None, None)[:3]
        module._forward_step(*padded, module.get_state())

    assert_changes_nothing(call, error, fragments, 2)


@pytest.mark.parametrize("past", [1, L + 2])
@pytest.mark.parametrize("streams", [0, 1, 5])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_another_number_of_streams_in_mid_stream_names_both_and_the_way_out(streams, past, mode):
    fragments = [str(streams), str(N), "clean_state"]
    for call in (
        lambda module: module.forward_step(*tokens(n=streams)),
        lambda module: module.forward_steps(*clips(n=streams)),
        lambda module: module.forward_step(*tokens(n=streams), update_state=False),
    ):
        assert_changes_nothing(call, ValueError, fragments, past, mode)


def test_number_of_streams_may_change_after_the_way_out():
    module = build()
    module.forward_step(zeros(N, E))
    module.clean_state()
    module.forward_step(zeros(N + 1, E))
    assert module.get_state().position.shape == (N + 1,)


def test_layouts_are_named_in_the_message():
    second = build(embed_dim_second=True)
    assert_refused(lambda: second.forward_steps(zeros(N, 3, E)), ValueError, ["12"])
    assert_refused(lambda: second.forward(zeros(N, 3, E)), ValueError, ["12"])
    first = build(batch_first=False)
    first.forward_steps(zeros(3, N, E))
    assert_refused(
        lambda: first.forward_steps(zeros(3, N + 1, E)), ValueError, ["3", "4", "clean_state"]
    )


def test_query_index_outside_of_a_clip():
    module = build(query_index=L - 1)
    assert_refused(lambda: module.forward(zeros(N, 2, E)), ValueError, ["query_index", "2"])
    empty = build()
    assert_refused(lambda: empty.forward(zeros(N, 0, E)), ValueError, ["0"])


@pytest.mark.parametrize("sequence_len", [None, 0, -1, 2.5, 4.0, "4"])
def test_sequence_len_must_be_a_positive_integer(sequence_len):
    error = TypeError if isinstance(sequence_len, (float, str)) else ValueError
    fragments = ["sequence_len", "required" if sequence_len is None else str(sequence_len)]
    assert_refused(lambda: build(sequence_len=sequence_len), (error, ValueError), fragments)


def test_sequence_len_must_be_given():
    assert_refused(lambda: SingleOutputMultiheadAttention(8, 2), ValueError, ["sequence_len"])


@pytest.mark.parametrize("query_index", [L, L + 7, -L - 1, -100])
def test_query_index_must_lie_in_the_window(query_index):
    assert_refused(
        lambda: build(query_index=query_index),
        ValueError,
        ["query_index", str(query_index), str(L)],
    )


@pytest.mark.parametrize("query_index", [None, 1.0, "last"])
def test_query_index_must_be_an_integer(query_index):
    assert_refused(lambda: build(query_index=query_index), (TypeError, ValueError), ["query_index"])


@pytest.mark.parametrize(("embed_dim", "num_heads"), [(12, 5), (7, 2), (4, 8)])
def test_embed_dim_must_divide_into_heads(embed_dim, num_heads):
    assert_refused(
        lambda: build(embed_dim=embed_dim, num_heads=num_heads),
        ValueError,
        [str(embed_dim), str(num_heads)],
    )


@pytest.mark.parametrize(("embed_dim", "num_heads"), [(0, 1), (-4, 2), (4, 0), (4, -2)])
def test_sizes_must_be_positive(embed_dim, num_heads):
    with pytest.raises(ValueError):
        SingleOutputMultiheadAttention(embed_dim, num_heads, sequence_len=3)


NO_INTEGERS = ["a", [], True, np.bool_(True), 4.0, np.float32(4), float("nan"), torch.tensor(4.0)]


@pytest.mark.parametrize("number", NO_INTEGERS, ids=repr)
@pytest.mark.parametrize(
    "name", ["embed_dim", "num_heads", "kdim", "vdim", "sequence_len", "query_index"]
)
def test_sizes_must_be_integers(name, number):
    kind = type(number).__name__
    assert_refused(lambda: build(**{name: number}), TypeError, [name, "an integer", kind])


def test_integers_of_numpy_are_sizes_and_become_those_of_python():
    integers = {"embed_dim": 12, "num_heads": 2, "kdim": 7, "vdim": 10, "query_index": 1}
    integers["sequence_len"] = LENGTH
    for kind in (np.int8, np.int64, np.uint64, torch.tensor):
        module = build(**{name: kind(size) for name, size in integers.items()})
        for name, size in integers.items():
            assert type(getattr(module, name)) is int
            assert getattr(module, name) == size
    module = build(sequence_len=np.uint64(LENGTH))  # whose negative is none
    assert module.query_index == -1


NO_NUMBERS = ["a", None, [], True, np.bool_(True), 1j, torch.tensor(0.5)]


@pytest.mark.parametrize("dropout", NO_NUMBERS, ids=repr)
def test_dropout_must_be_a_number(dropout):
    fragments = ["dropout", "a number", type(dropout).__name__]
    assert_refused(lambda: build(dropout=dropout), TypeError, fragments)


@pytest.mark.parametrize(
    ("dropout", "error", "fragment"),
    [*((bad, TypeError, type(bad).__name__) for bad in NO_NUMBERS), (7, ValueError, "7")],
    ids=repr,
)
def test_dropout_is_checked_whenever_it_is_set(dropout, error, fragment):
    module = build(dropout=0.25).train()
    module.forward_step(zeros(N, E))
    assert_refused(
        lambda: setattr(module, "dropout", dropout), error, ["dropout", "from 0 to 1", fragment]
    )
    assert module.dropout == 0.25
    module.dropout = Fraction(1, 2)  # in mid-stream, too
    assert type(module.dropout) is float
    assert module.dropout == 0.5


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, x):
        return 2 * self.inner(x)


OTHER_PROJECTIONS = {
    "none": lambda linear: None,
    "identity": lambda linear: nn.Identity(),
    "of a class of its own": lambda linear: Doubled(E, E),
    "around it": nn.Sequential,
    "around it, with its weight": Wrapped,
}
CALLS_WITH_WEIGHTS = {
    "forward": lambda m: m(zeros(N, L, E)),
    "forward_step": lambda m: m.forward_step(zeros(N, E)),
    "forward_steps": lambda m: m.forward_steps(zeros(N, L, E)),
    "functional step": lambda m: m._forward_step(zeros(N, E)),
}


@pytest.mark.parametrize("past", [0, 2, L + 2])
@pytest.mark.parametrize("call", CALLS_WITH_WEIGHTS)
@pytest.mark.parametrize("projection", OTHER_PROJECTIONS)
def test_output_projection_that_would_not_be_called_is_refused(projection, call, past):
    module = build()
    linear = module.out_proj
    fragments = ["out_proj", "torch.nn.Linear"]
    with torch.no_grad():
        step_through(module, zeros(N, past, E))
        before = module.get_state()
        module.out_proj = OTHER_PROJECTIONS[projection](linear)
        assert_refused(lambda: CALLS_WITH_WEIGHTS[call](module), TypeError, fragments)
        module.out_proj = linear
        assert_same_state(module.get_state(), before)


@pytest.mark.parametrize("call", ["warm_up", "start_streams", "build_from"])
def test_output_projection_is_refused_wherever_its_weight_counts(call):
    module = build()
    module.out_proj = nn.Identity()
    calls = {
        "warm_up": lambda: module.warm_up((N, E)),
        "start_streams": lambda: module.start_streams(N),
        "build_from": lambda: SingleOutputMultiheadAttention.build_from(module, L),
    }
    assert_refused(calls[call], TypeError, ["out_proj", "Identity"])


OTHER_WEIGHTS = {
    "in_proj_weight": ({}, "in_proj_weight", (E, E), (3 * E, E)),
    "q_proj_weight": ({"kdim": 7}, "q_proj_weight", (E, 7), (E, E)),
    "k_proj_weight": ({"kdim": 7}, "k_proj_weight", (E, E), (E, 7)),
    "v_proj_weight": ({"vdim": 7}, "v_proj_weight", (E, E), (E, 7)),
    "in_proj_bias": ({}, "in_proj_bias", (E,), (3 * E,)),
    "bias_k": ({"add_bias_kv": True}, "bias_k", (E,), (1, 1, E)),
    "bias_v": ({"add_bias_kv": True}, "bias_v", (1, E), (1, 1, E)),
}


@pytest.mark.parametrize("past", [0, 2, L + 2])
@pytest.mark.parametrize("weight", OTHER_WEIGHTS)
def test_weight_of_another_shape_is_refused(weight, past):
    arguments, name, got, expected = OTHER_WEIGHTS[weight]
    module = build(**arguments)
    given = [x[:, 0] for x in draw_tokens(module, N, 1)]
    clip = [x.unsqueeze(1) for x in given]
    with torch.no_grad():
        for _ in range(past):
            module.forward_step(*given)
        before = module.get_state()
        setattr(module, name, nn.Parameter(zeros(*got)))
        fragments = [name, str(got), str(expected)]
        for call in (
            lambda: module(*clip),
            lambda: module.forward_step(*given),
            lambda: module.forward_steps(*clip),
        ):
            assert_refused(call, ValueError, fragments)
        assert_same_state(module.get_state(), before)


@pytest.mark.parametrize(
    ("projection", "name", "got"),
    [(nn.Linear(E, 8), "out_proj.weight", (8, E)), (nn.Linear(8, E), "out_proj.weight", (E, 8))],
)
def test_output_projection_of_another_shape_is_refused(projection, name, got):
    module = build()
    module.out_proj = projection
    for call in CALLS_WITH_WEIGHTS.values():
        assert_refused(lambda call=call: call(module), ValueError, [name, str(got)])


@pytest.mark.parametrize("dropout", [-0.1, 1.5, 2, float("nan"), float("inf")])
def test_dropout_must_be_a_probability(dropout):
    fragments = ["dropout", "from 0 to 1", str(dropout)]
    assert_refused(lambda: build(dropout=dropout), ValueError, fragments)


@pytest.mark.parametrize("dropout", [0, 1, np.float32(0.5), np.float64(0.25), Fraction(1, 2)])
def test_dropout_may_be_any_real_number_and_becomes_that_of_python(dropout):
    module = build(dropout=dropout)
    assert type(module.dropout) is float
    assert module.dropout == dropout


def other_state(**changes):
    """A malformed copy of a good state: `changes` name parts and make them from the good ones."""

    def spoil(state):
        return state._replace(**{name: make(state) for name, make in changes.items()})

    return spoil


# name: (what to make of a good state, error, fragments)
BAD_STATES = {
    "a number": (lambda s: 3, TypeError, ["int"]),
    "a tensor": (lambda s: s.k, TypeError, ["Tensor"]),
    "too few parts": (lambda s: tuple(s)[:4], (TypeError, ValueError), ["position, clock", "4"]),
    "a part that is no tensor": (other_state(v=lambda s: None), TypeError, ["v", "NoneType"]),
    "sparse keys": (
        other_state(k=lambda s: s.k.to_sparse()),
        TypeError,
        ["k", "dense", "sparse_coo"],
    ),
    "nested positions": (
        other_state(position=lambda s: torch.nested.nested_tensor([s.position])),
        TypeError,
        ["position", "dense", "nested"],
    ),
    "a clock of MKLDNN's": (
        other_state(clock=lambda s: zeros(2, 1).to_mkldnn()),
        TypeError,
        ["clock", "dense", "mkldnn"],
    ),
    "other heads": (other_state(k=lambda s: zeros(N, 3, L, 6)), ValueError, ["k", "(3, 3, 5, 6)"]),
    "other length": (
        other_state(v=lambda s: zeros(N, 2, L + 1, 6)),
        ValueError,
        ["v", "(3, 2, 6, 6)", "(3, 2, 5, 6)"],
    ),
    "other head dim": (other_state(k=lambda s: zeros(N, 2, L, 5)), ValueError, ["k"]),
    "other rank": (other_state(k=lambda s: zeros(N, 2, L)), ValueError, ["k"]),
    "other queries": (
        other_state(q=lambda s: zeros(N, 2, E)),
        ValueError,
        ["q", "(3, 2, 12)", "(3, 3, 12)"],
    ),
    "other streams in keys": (other_state(k=lambda s: zeros(2, 2, L, 6)), ValueError, ["k"]),
    "other streams in positions": (
        other_state(position=lambda s: s.position[:2]),
        ValueError,
        ["(3, 2, 5, 6)", "(2, 2, 5, 6)"],
    ),
    "a scalar position": (other_state(position=lambda s: s.position[0]), ValueError, ["position"]),
    "keys in double": (
        other_state(k=lambda s: s.k.double()),
        TypeError,
        ["k", "float64", "float32"],
    ),
    "values in half": (other_state(v=lambda s: s.v.half()), TypeError, ["v", "float16", "float32"]),
    "positions in int32": (
        other_state(position=lambda s: s.position.int()),
        TypeError,
        ["position", "int32", "int64"],
    ),
    "negative position": (
        other_state(position=lambda s: s.position - 100),
        ValueError,
        ["position", "negative"],
    ),
    "position that would pass the largest integer": (
        other_state(
            position=lambda s: torch.full_like(s.position, 2**63 - 1), clock=lambda s: zeros(L, 0)
        ),
        ValueError,
        ["position", "2**63 - 2**48", "9223372036854775807"],
    ),
    "keys elsewhere": (other_state(k=lambda s: s.k.to(META)), ValueError, ["k", "meta", "cpu"]),
    "positions elsewhere": (
        other_state(position=lambda s: s.position.to(META)),
        ValueError,
        ["position", "meta", "cpu"],
    ),
    "clock past the window": (
        other_state(clock=lambda s: zeros(L + 1, 0)),
        ValueError,
        ["clock", "(6, 0)"],
    ),
    "clock with contents": (other_state(clock=lambda s: zeros(2, 1)), ValueError, ["clock"]),
    "clock behind the positions": (
        other_state(clock=lambda s: zeros(0, 0)),
        ValueError,
        ["clock", "position"],
    ),
}


ABOUT_VALUES = (
    "negative position",
    "position that would pass the largest integer",
    "clock behind the positions",
)


@pytest.mark.parametrize("case", [c for c in BAD_STATES if c not in ABOUT_VALUES])
def test_functional_step_refuses_a_malformed_state(case):
    spoil, error, fragments = BAD_STATES[case]

    def call(module):
        module._forward_step(*tokens(), spoil(module.get_state()))

    assert_changes_nothing(call, error, fragments, 2)


@pytest.mark.parametrize("past", [2, L + 2])
@pytest.mark.parametrize("case", BAD_STATES)
def test_malformed_state_is_refused(case, past):
    spoil, error, fragments = BAD_STATES[case]
    assert_changes_nothing(
        lambda module: module.set_state(spoil(module.get_state())), error, fragments, past
    )


@pytest.mark.parametrize("case", BAD_STATES)
def test_malformed_state_is_refused_before_the_first_step(case):
    spoil, error, fragments = BAD_STATES[case]
    donor, module = build(**ARGUMENTS), build(**ARGUMENTS)
    step_through(donor, *draw_tokens(donor, N, 2))
    state = donor.get_state()
    assert_refused(lambda: module.set_state(spoil(state)), error, fragments)
    assert module.get_state() is None


def test_clock_ahead_of_the_positions_only_for_streams_of_different_age():
    """A clock below the window says that all streams have seen exactly so many tokens."""
    module = build()
    step_through(module, draw_tokens(module, N, 3)[0])
    state = module.get_state()
    uneven = state._replace(position=torch.tensor([3, 2, 3]))
    assert_refused(lambda: module.set_state(uneven), ValueError, ["clock", "position"])


@pytest.mark.parametrize("mode", ["backward", "", 7, -1, None])
def test_unknown_call_mode_is_refused(mode):
    module = build()
    with pytest.raises((ValueError, TypeError)):
        module.call_mode = mode
    assert module.call_mode == "forward"


def test_unknown_backend_is_refused():
    import continual_mha

    with pytest.raises(ValueError, match="nonesuch"), continual_mha.use_backend("nonesuch"):
        pass


@pytest.mark.parametrize("name", ["q_proj_weight", "in_proj_bias"])
@pytest.mark.parametrize("way", ["forward", "forward_step", "forward_steps"])
def test_weight_that_is_not_where_the_others_are_is_refused(way, name):
    """As one without memory, which an incomplete load left on the device meta."""
    module = build(**ARGUMENTS)
    query, key, value = tokens()
    if way != "forward_step":
        query, key, value = (x.unsqueeze(1).expand(-1, L, -1) for x in (query, key, value))
    weight = module.get_parameter(name)
    setattr(module, name, torch.nn.Parameter(weight.to("meta")))
    with pytest.raises(ValueError, match=rf"{name} must be on cpu .* but is on meta"):
        getattr(module, way)(query, key, value)
