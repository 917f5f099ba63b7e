"""Snapshots, resets, copies, conversions: what carries a stream from here to there."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from oracles import (
    CONSTRUCTIONS,
    LENGTH,
    assert_equals_window,
    assert_near,
    assert_same_state,
    build,
    draw_tokens,
    run_steps,
    stack,
    step_through,
    window_attention,
)
from torch import nn

import continual_mha as co

pytestmark = pytest.mark.usefixtures("backend")

SOME = ["defaults", "middle_query", "kdim_and_vdim", "delayed_query_with_extra_slots"]


def outputs_of(module, tokens, start, stop):
    with torch.no_grad():
        return step_through(module, *(x[:, start:stop] for x in tokens))


def assert_same_outputs(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_there_is_no_state_before_the_first_step_and_after_a_reset():
    module = build()
    assert module.get_state() is None
    outputs_of(module, draw_tokens(module, 2, 1), 0, 1)
    assert isinstance(module.get_state(), co.RingState)
    module.clean_state()
    assert module.get_state() is None
    module.clean_state()
    assert module.get_state() is None


@pytest.mark.parametrize("construction", SOME)
def test_state_has_the_documented_parts(construction):
    module = build(**CONSTRUCTIONS[construction])
    outputs_of(module, draw_tokens(module, 3, 2), 0, 2)
    state = module.get_state()
    assert state._fields == ("k", "v", "q", "position", "clock")
    head_dim = module.embed_dim // module.num_heads
    assert state.k.shape == state.v.shape == (3, module.num_heads, LENGTH, head_dim)
    waiting = module.delay + 1 if module.delay else 0
    assert state.q.shape == (3, waiting, module.embed_dim)
    assert state.position.tolist() == [2, 2, 2]
    assert state.position.dtype == torch.int64
    assert state.clock.shape == (2, 0)
    assert (state.k[:, :, 2:] == 0).all()
    assert (state.v[:, :, 2:] == 0).all()


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@pytest.mark.parametrize("formulation", ["auto", "kv", "input"])
def test_containers_of_the_reference_package_know_the_parts_of_a_state(formulation, cache_dtype):
    """As where they take it apart to export a model."""
    module = build(formulation=formulation, cache_dtype=cache_dtype)
    begun = build(formulation=formulation, cache_dtype=cache_dtype)
    with torch.no_grad():
        token = draw_tokens(module, 3, 1)[0][:, 0]
        begun.forward_step(token)
        state = module._forward_step(token, prev_state=None)[1]
    for each in (module, begun):
        assert each._state_shape == len(state)
        has_streams = [part.shape[:1] == (3,) for part in state]
        assert each._dynamic_state_inds == has_streams


@pytest.mark.parametrize("construction", SOME)
@pytest.mark.parametrize("past", [1, 3, LENGTH, 2 * LENGTH + 1])
def test_snapshot_is_not_changed_by_later_steps_and_restores_any_number_of_times(
    construction, past
):
    module = build(**CONSTRUCTIONS[construction])
    tokens = draw_tokens(module, 2, past + 9)
    outputs_of(module, tokens, 0, past)
    snapshot = module.get_state()
    kept = copy.deepcopy(snapshot)
    first = outputs_of(module, tokens, past, past + 9)
    assert_same_state(snapshot, kept)
    for _ in range(2):
        module.set_state(snapshot)
        assert_same_state(module.get_state(), kept)
        assert_same_outputs(outputs_of(module, tokens, past, past + 9), first)
        assert_same_state(snapshot, kept)


def test_writing_to_a_snapshot_does_not_reach_the_module():
    module = build(query_index=1)
    tokens = draw_tokens(module, 2, 9)
    outputs_of(module, tokens, 0, 6)
    state = module.get_state()
    pristine = copy.deepcopy(state)
    module.set_state(state)
    for part in state[:4]:
        part.fill_(77)
    assert_same_state(module.get_state(), pristine)


def test_setting_none_is_a_reset():
    module = build()
    tokens = draw_tokens(module, 2, LENGTH)
    outputs_of(module, tokens, 0, LENGTH)
    module.set_state(None)
    assert module.get_state() is None
    assert outputs_of(module, tokens, 0, LENGTH)[:-1] == [None] * (LENGTH - 1)


def test_state_moves_between_modules():
    source, target = build(), build()
    tokens = draw_tokens(source, 2, 12)
    outputs_of(source, tokens, 0, 7)
    target.set_state(source.get_state())
    assert_same_outputs(outputs_of(target, tokens, 7, 12), outputs_of(source, tokens, 7, 12))


def test_a_plain_tuple_is_a_state():
    module = build()
    tokens = draw_tokens(module, 2, 12)
    outputs_of(module, tokens, 0, 7)
    state = tuple(module.get_state())
    expected = outputs_of(module, tokens, 7, 12)
    module.set_state(state)
    assert_same_outputs(outputs_of(module, tokens, 7, 12), expected)


def test_states_of_streams_can_be_split_and_joined():
    """Streams are rows of the state: any of them continue as they would have among the others."""
    module = build(query_index=2)
    tokens = draw_tokens(module, 4, 14)
    outputs_of(module, tokens, 0, 8)
    state = module.get_state()
    expected = outputs_of(module, tokens, 8, 14)
    chosen = torch.tensor([3, 1])
    module.set_state(co.RingState(*(part[chosen] for part in state[:4]), clock=state.clock))
    for got, want in zip(
        outputs_of(module, [x[chosen] for x in tokens], 8, 14), expected, strict=True
    ):
        torch.testing.assert_close(got, want[chosen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at_once", [False, True])
def test_younger_streams_attend_over_what_they_have_seen(at_once):
    """Slots that a stream has not reached take no part, whatever they hold."""
    module = build()
    tokens = draw_tokens(module, 3, 4)
    older = draw_tokens(module, 3, LENGTH, seed=9)
    outputs_of(module, older, 0, LENGTH)
    state = module.get_state()
    ages = [0, 2, LENGTH]
    for stream, age in enumerate(ages[:2]):
        state.k[stream, :, age:] = float("nan")
        state.v[stream, :, age:] = float("nan")
    module.set_state(state._replace(position=torch.tensor(ages)))
    with torch.no_grad():
        if at_once:
            outputs = run_steps(module, *tokens)
        else:
            outputs = torch.stack(step_through(module, *tokens), 1)
    for stream, age in enumerate(ages):
        seen = [torch.cat([a[stream, :age], b[stream]]) for a, b in zip(older, tokens, strict=True)]
        for t in range(4):
            end = age + t + 1
            window = [x[max(0, end - LENGTH) : end] for x in seen]
            clip = [x[None] for x in window]
            expected = module.forward(*clip)[0][0, 0]
            torch.testing.assert_close(outputs[stream, t], expected, rtol=1e-5, atol=1e-5)


def test_another_number_of_streams_after_a_reset():
    module = build()
    for streams in (2, 5, 1):
        module.clean_state()
        x = draw_tokens(module, streams, LENGTH + 2)[0]
        with torch.no_grad():
            assert_equals_window(stack(step_through(module, x), module), module, x)


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_state_dict_is_that_of_torch_also_in_mid_stream(construction):
    arguments = CONSTRUCTIONS[construction]
    module = build(**arguments)
    passed = {k: v for k, v in arguments.items() if k not in ("query_index", "embed_dim_second")}
    theirs = nn.MultiheadAttention(module.embed_dim, **{"num_heads": module.num_heads, **passed})

    def shapes(of):
        return {name: tuple(value.shape) for name, value in of.state_dict().items()}

    assert shapes(module) == shapes(theirs)
    assert list(module.state_dict()) == list(theirs.state_dict())
    outputs_of(module, draw_tokens(module, 2, LENGTH), 0, LENGTH)
    assert shapes(module) == shapes(theirs)
    theirs.load_state_dict(module.state_dict(), strict=True)
    fresh = build(seed=8, **arguments)
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    for name, value in module.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)


def test_loading_weights_keeps_the_stream():
    module = build()
    outputs_of(module, draw_tokens(module, 2, 3), 0, 3)
    before = module.get_state()
    module.load_state_dict(build(seed=4).state_dict())
    assert_same_state(module.get_state(), before)


def by_pickle(module):
    return pickle.loads(pickle.dumps(module))


def by_torch_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def step_elsewhere(module, token, answers):
    torch.set_num_threads(1)
    with torch.no_grad():
        answers.put(module.forward_step(token).numpy())


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_module_with_streams_is_an_argument_of_a_new_process(method):
    module = build()
    x = draw_tokens(module, 2, LENGTH + 1)[0]
    with torch.no_grad():
        module.forward_steps(x[:, :LENGTH])
    before = [part.clone() for part in module.get_state()]
    context = torch.multiprocessing.get_context(method)
    answers = context.Queue()
    process = context.Process(target=step_elsewhere, args=(module, x[:, LENGTH], answers))
    process.start()
    answer = answers.get(timeout=60)
    process.join()
    assert_same_state(list(module.get_state()), before)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(answer), module.forward_step(x[:, LENGTH]))


@pytest.mark.parametrize("kept", [{}, {"formulation": "input"}, {"cache_dtype": torch.int8}])
def test_saved_state_loads_without_trusting_the_file(kept):
    module, other = build(**kept), build(**kept)
    with torch.no_grad():
        module.forward_steps(draw_tokens(module, 2, LENGTH)[0])
    for saved in (module.get_state(), tuple(module.get_state())):
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        assert type(loaded) is type(saved)
        other.set_state(loaded)
        assert_same_state(other.get_state(), module.get_state())


def test_state_of_odd_strides_and_kinds_of_tensor_is_a_state():
    module = build()
    module.start_streams(1)
    module.forward_step(torch.randn(1, module.embed_dim))
    state = module.get_state()
    positions = torch.stack([state.position] * 2, dim=1)
    parts = [nn.Parameter(x, requires_grad=False) for x in state]
    other = build()
    other.set_state(type(state)(*parts)._replace(position=positions[:, 0]))
    assert_same_state(other.get_state(), state)
    assert other.state_dict().keys() == module.state_dict().keys()
    x = torch.randn(1, module.embed_dim)
    assert torch.equal(other.forward_step(x), module.forward_step(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("past", [0, 2, LENGTH + 3])
def test_copies_in_mid_stream_continue_identically_and_apart(past, duplicate, mode):
    module = build(query_index=2)
    tokens = draw_tokens(module, 2, past + 8)
    with mode():
        step_through(module, *(x[:, :past] for x in tokens))
    twin = duplicate(module)
    assert_same_state(twin.get_state(), module.get_state())
    outputs_of(twin, tokens, past + 4, past + 6)  # the copy's own steps do not reach the original
    twin.set_state(module.get_state())
    expected = outputs_of(module, tokens, past, past + 8)
    assert_same_outputs(outputs_of(twin, tokens, past, past + 8), expected)


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda m: m.double(), torch.float64),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.to(torch.float64), torch.float64),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    ],
)
def test_conversion_before_the_first_step(convert, dtype):
    module = convert(build())
    x = draw_tokens(module, 2, 2 * LENGTH + 1)[0]
    assert x.dtype == dtype
    with torch.no_grad():
        outputs = stack(step_through(module, x), module)
    assert outputs.dtype == dtype
    state = module.get_state()
    assert state.k.dtype == state.v.dtype == state.q.dtype == dtype
    assert state.position.dtype == torch.int64
    assert_equals_window(outputs, module, x)


@pytest.mark.parametrize("way", ["to", "type"])  # of which the second means integers, too
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_conversion_in_mid_stream_takes_the_state_along(dtype, way):
    module = build(query_index=-2)
    x = draw_tokens(module, 2, 3 * LENGTH)[0]
    outputs_of(module, (x,), 0, LENGTH + 1)
    expected = window_attention(module, x)[:, 2:]
    getattr(module, way)(dtype)
    state = module.get_state()
    assert state.k.dtype == state.v.dtype == state.q.dtype == dtype
    assert state.position.dtype == torch.int64
    assert state.position.tolist() == [6, 6]
    outputs = torch.stack(outputs_of(module, (x.to(dtype),), LENGTH + 1, 3 * LENGTH), 1)
    assert_near(outputs, expected, 1e-6 if dtype == torch.float64 else 0.03)


@pytest.mark.parametrize("arguments", [{}, {"query_index": 1}, {"cache_dtype": torch.int8}])
def test_memory_format_of_images_leaves_rings_as_they_are(arguments):
    """Rings have four axes as images have, and it is the whole model that is converted."""
    module, twin = build(**arguments), build(**arguments)
    tokens = draw_tokens(module, 2, 3 * LENGTH)
    for each in (module, twin):
        outputs_of(each, tokens, 0, LENGTH)
    nn.Sequential(module).to(memory_format=torch.channels_last)
    assert_same_outputs(*(outputs_of(each, tokens, LENGTH, 3 * LENGTH) for each in (module, twin)))


@pytest.mark.parametrize("on_meta", [False, True])
def test_streams_are_forgotten_where_their_numbers_are(on_meta):
    module = build()
    tokens = draw_tokens(module, 2, LENGTH + 1)
    outputs_of(module, tokens, 0, LENGTH + 1)
    model = nn.Sequential(module)
    if on_meta:
        model.to("meta")
        assert module.forward_step(tokens[0][:, 0].to("meta")).shape == (2, module.embed_dim)
    model.to_empty(device=tokens[0].device)
    assert module.get_state() is None
    module.load_state_dict(build().state_dict())
    assert_same_outputs(
        outputs_of(module, tokens, 0, LENGTH), outputs_of(build(), tokens, 0, LENGTH)
    )


def test_conversion_that_fails_keeps_positions():
    module = build()
    outputs_of(module, draw_tokens(module, 2, 3), 0, 3)

    def fails(x):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        module._apply(fails)
    assert module.get_state().position.tolist() == [3, 3]


def test_moving_to_the_same_device_keeps_the_stream():
    module = build()
    tokens = draw_tokens(module, 2, 9)
    outputs_of(module, tokens, 0, 3)
    before = module.get_state()
    module.to(module.out_proj.weight.device)
    assert_same_state(module.get_state(), before)


@pytest.mark.parametrize("at_once", [False, True])
def test_autocast_keeps_the_state_in_the_dtype_of_the_input(at_once):
    module = build(query_index=-2)
    tokens = draw_tokens(module, 3, 2 * LENGTH + 1)
    with torch.no_grad(), torch.autocast(tokens[0].device.type, dtype=torch.bfloat16):
        if at_once:
            outputs = run_steps(module, *tokens)
        else:
            outputs = stack(step_through(module, *tokens), module)
        clip, _ = module(*(x[:, -LENGTH:] for x in tokens))
    assert outputs.dtype == torch.bfloat16
    assert clip.dtype == torch.bfloat16
    state = module.get_state()
    assert state.k.dtype == state.v.dtype == state.q.dtype == torch.float32
    exact = window_attention(module, *tokens)
    assert_near(outputs, exact, 0.03)
    assert_near(clip[:, 0], exact[:, -1], 0.03)


def test_autocast_may_begin_and_end_in_mid_stream():
    module = build()
    tokens = draw_tokens(module, 2, 3 * LENGTH)
    exact = window_attention(module, *tokens).double()
    device = tokens[0].device.type
    outputs = outputs_of(module, tokens, 0, LENGTH)
    with torch.autocast(device, dtype=torch.bfloat16):
        outputs += outputs_of(module, tokens, LENGTH, 2 * LENGTH)
    outputs += outputs_of(module, tokens, 2 * LENGTH, 3 * LENGTH)
    together = torch.stack([o.double() for o in outputs[LENGTH - 1 :]], 1)
    assert_near(together, exact, 0.03)
    assert module.get_state().k.dtype == torch.float32


BEGINNINGS = {
    "a step": lambda module, x: module.forward_step(x[:, 0]),
    "a step of half precision": lambda module, x: module.forward_step(x[:, 0].bfloat16()),
    "room": lambda module, x: module.start_streams(x.shape[0]),
    "zeros": lambda module, x: module.warm_up((x.shape[0], x.shape[2])),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("query_index", [-1, -2])
@pytest.mark.parametrize("formulation", ["kv", "input"])
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_autocast_takes_tokens_of_any_dtype_in_every_stream(
    beginning, formulation, query_index, mode
):
    """As they come from what autocast casts to, a linear layer, and what it casts from, a norm."""
    module, twin = (build(query_index=query_index, formulation=formulation) for _ in range(2))
    x = draw_tokens(module, 2, 3 * LENGTH)[0]
    clips = [x[:, : LENGTH + 1], x[:, LENGTH + 1 :].bfloat16(), x[:, 1 : LENGTH + 1]]
    outputs = []
    for each, same_dtype in ((module, False), (twin, True)):
        outputs.append([])
        with mode(), torch.autocast(x.device.type, dtype=torch.bfloat16):
            BEGINNINGS[beginning](each, x)
            kept = each.get_state()[0].dtype
            assert kept == (torch.bfloat16 if "half" in beginning else torch.float32)
            for clip in clips:
                clip = clip.to(kept) if same_dtype else clip
                outputs[-1] += [each.forward_step(token) for token in clip.unbind(1)]
                outputs[-1].append(each.forward_steps(clip))
            assert each.get_state()[0].dtype == kept
    for got, expected in zip(*outputs, strict=True):
        assert got is expected is None or torch.equal(got, expected)
    assert_same_state(module.get_state(), twin.get_state())


def test_state_of_half_tokens_under_autocast_can_be_set_again():
    """Its dtype is that of the tokens and not of the weights, in a fresh module too."""
    module = build()
    x = draw_tokens(module, 2, LENGTH + 1)[0].bfloat16()
    with torch.no_grad(), torch.autocast(x.device.type, dtype=torch.bfloat16):
        step_through(module, x[:, :-1])
        state = module.get_state()
        assert state.k.dtype == torch.bfloat16
        expected = module.forward_step(x[:, -1])
        module.clean_state()
        module.set_state(state)
        assert torch.equal(module.forward_step(x[:, -1]), expected)
        others = build()
        others.forward_step(x[:, 0].float())  # whose streams give way to it, and are in float32
        others.set_state(state)
        assert torch.equal(others.forward_step(x[:, -1]), expected)
        others.clean_state()
        others.forward_step(x[:, 0].float())
        with pytest.raises(TypeError, match=r"state.k must be torch.float32"):
            others.set_stream(0, module.get_stream(0))


def test_factory_arguments_reach_parameters_and_state():
    module = build(dtype=torch.float64, device="cpu")
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    outputs_of(module, draw_tokens(module, 1, 1), 0, 1)
    assert module.get_state().k.dtype == torch.float64
    abstract = co.SingleOutputMultiheadAttention(8, 2, sequence_len=3, device="meta")
    assert {p.device.type for p in abstract.parameters()} == {"meta"}
    real = abstract.to_empty(device="cpu")
    real.load_state_dict(build(embed_dim=8, num_heads=2, sequence_len=3).state_dict())
    x = draw_tokens(real, 2, 3)[0].cpu()
    with torch.no_grad():
        assert_equals_window(stack(step_through(real, x), real), real, x)


SIZES = {"sequence_len": LENGTH + 2, "query_index": 1, "num_heads": 3, "cache_dtype": torch.int8}


@pytest.mark.parametrize("past", [0, 2])
@pytest.mark.parametrize("name", SIZES)
def test_size_that_is_set_between_streams_is_that_of_those_that_begin_then(name, past):
    module, made_so = build(), build(**{name: SIZES[name]})
    tokens = draw_tokens(module, 2, 2 * LENGTH + 5)
    outputs_of(module, tokens, 0, past)
    module.clean_state()
    setattr(module, name, SIZES[name])
    assert getattr(module, name) == SIZES[name]
    expected = outputs_of(made_so, tokens, 0, 2 * LENGTH + 5)
    assert_same_outputs(outputs_of(module, tokens, 0, 2 * LENGTH + 5), expected)
    assert_same_state(module.get_state(), made_so.get_state())
    clone = copy.deepcopy(module)
    assert_same_outputs(outputs_of(clone, tokens, 0, 3), outputs_of(made_so, tokens, 0, 3))


@pytest.mark.parametrize("name", SIZES)
def test_size_of_streams_that_go_on_cannot_be_set(name):
    module = build()
    tokens = draw_tokens(module, 2, 4)
    outputs_of(module, tokens, 0, 4)
    before = module.get_state()
    same = getattr(module, name)
    setattr(module, name, np.int64(same) if isinstance(same, int) else same)
    with pytest.raises(ValueError, match=rf"{name}=.*clean_state\(\)"):
        setattr(module, name, SIZES[name])
    assert getattr(module, name) != SIZES[name]
    assert_same_state(module.get_state(), before)


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("sequence_len", 0, ValueError, "at least 1"),
        ("sequence_len", 2.5, TypeError, "an integer"),
        ("sequence_len", torch.ones(2), TypeError, "an integer"),
        ("num_heads", np.ones(2), TypeError, "an integer"),
        ("query_index", LENGTH, ValueError, "query_index must be from"),
        ("num_heads", 5, ValueError, "divisible by num_heads"),
        ("cache_dtype", torch.float16, ValueError, "cache_dtype must be"),
        ("embed_dim", 24, ValueError, "embed_dim=12 is that of the weights"),
        ("head_dim", 3, ValueError, "head_dim=6 is that of the weights"),
        ("kdim", 7, ValueError, "kdim=12 is that of the weights"),
        ("vdim", 7, ValueError, "vdim=12 is that of the weights"),
    ],
)
def test_size_that_cannot_be_is_refused_and_changes_nothing(name, value, error, words):
    module, twin = build(), build()
    before = getattr(module, name)
    with pytest.raises(error, match=words):
        setattr(module, name, value)
    assert getattr(module, name) == before
    for each in (module, twin):
        outputs_of(each, draw_tokens(twin, 2, LENGTH), 0, LENGTH)
    assert_same_state(module.get_state(), twin.get_state())
