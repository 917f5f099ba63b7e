"""Rings of 8 bits: what they hold, how far off answers may be, and that streams live on them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from oracles import (
    CONSTRUCTIONS,
    LENGTH,
    assert_same_state,
    build,
    draw_tokens,
    run_steps,
    seeded,
    stack,
    step_through,
    to_layout,
    window_attention,
)

import continual_mha
from continual_mha import QuantizedInputState, QuantizedRingState
from continual_mha.quantized import QuantizedRing

DTYPES = [torch.int8, torch.float8_e4m3fn]
FORMULATIONS = ["kv", "input"]
LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}
SELF_ATTENTION = [n for n, a in CONSTRUCTIONS.items() if not {"kdim", "vdim"} & set(a)]
both = pytest.mark.parametrize("formulation", FORMULATIONS)
all_dtypes = pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)


def empty_ring(cache_dtype):
    stored = torch.int8 if cache_dtype == torch.int8 else torch.uint8
    return QuantizedRing(torch.zeros(1, 1, dtype=stored), torch.zeros(1, 1))


def kept(x, cache_dtype):
    """Tokens (..., features) rounded to 8 bits and read again, in double."""
    scale = x.abs().amax(-1, keepdim=True).float().double() / LARGEST[cache_dtype]
    scaled = (x / scale.clamp(min=1e-30)).float()
    codes = scaled.round() if cache_dtype == torch.int8 else scaled.to(cache_dtype)
    return codes.double() * scale


def largest_error(x, cache_dtype):
    """What docs/formulations.md allows each element (..., features) to be off by."""
    scale = x.abs().amax(-1, keepdim=True) / LARGEST[cache_dtype]
    if cache_dtype == torch.int8:
        return (scale / 2).expand_as(x)
    return torch.maximum(x.abs() * 2**-4, scale * 2**-10)


@all_dtypes
@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 1e4, 1e30])
def test_no_element_is_off_by_more_than_the_bound(magnitude, cache_dtype):
    x = magnitude * torch.randn(50, 16, dtype=torch.float64)
    x[0] = 0
    x[1, 1:] = 0
    x[2] *= torch.logspace(-9, 0, 16, dtype=torch.float64)
    x = x.float()
    stored = empty_ring(cache_dtype).holding(x)
    assert stored.codes.element_size() == 1
    assert stored.scale.shape == (50, 1)
    read = stored.to(torch.float64)
    allowed = largest_error(x.double(), cache_dtype)
    error = (read - x).abs()
    assert (error <= allowed * (1 + 1e-5)).all()
    assert (read[0] == 0).all()
    assert error.max() > 0.5 * allowed.max()  # so the bound says something
    torch.testing.assert_close(read.abs().amax(-1), x.double().abs().amax(-1), rtol=1e-6, atol=0)


@all_dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_is_read_as_not_a_number(bad, cache_dtype):
    x = torch.randn(3, 4)
    x[1, 2] = bad
    read = empty_ring(cache_dtype).holding(x).to(torch.float32)
    assert read[1].isnan().all()
    assert read[[0, 2]].isfinite().all()


def windows_of_keys(module, query, key, value):
    """Attention over every window, with keys and values rounded to 8 bits head by head."""
    from torch.nn.functional import linear, pad

    heads, length, lag = module.num_heads, module.sequence_len, module.delay
    weights = module._weights()
    q, k, v = (
        linear(x, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights.split(), weights.split_bias(), strict=True)
    )
    k, v = (kept(x, module.cache_dtype) for x in (k, v))
    outputs = []
    for end in range(length, query.shape[1] + 1):
        keys, values = k[:, :, end - length : end], v[:, :, end - length : end]
        if module.bias_k is not None:
            extra = (
                x.view(1, heads, 1, -1).expand(query.shape[0], -1, -1, -1)
                for x in (module.bias_k, module.bias_v)
            )
            keys, values = (torch.cat(pair, 2) for pair in zip((keys, values), extra, strict=True))
        if module.add_zero_attn:
            keys, values = pad(keys, (0, 0, 0, 1)), pad(values, (0, 0, 0, 1))
        asked = q[:, :, end - 1 - lag, None]
        attn = (asked @ keys.mT / q.shape[-1] ** 0.5).softmax(-1)
        outputs.append(module.out_proj((attn @ values).transpose(1, 2).flatten(2)))
    return torch.cat(outputs, 1)


def expected_outputs(module, query, key, value, formulation):
    if formulation == "kv":
        return windows_of_keys(module, query, key, value)
    x = kept(query, module.cache_dtype)
    return window_attention(module, x if module.delay else query, x, x)


CASES = [
    *(("kv", construction) for construction in CONSTRUCTIONS),
    *(("input", construction) for construction in SELF_ATTENTION),
]


@all_dtypes
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(("formulation", "construction"), CASES)
def test_stream_attends_to_the_rounded_tokens(formulation, construction, at_once, cache_dtype):
    module = build(
        **CONSTRUCTIONS[construction],
        formulation=formulation,
        cache_dtype=cache_dtype,
        dtype=torch.float64,
    )
    tokens = draw_tokens(module, 3, 3 * LENGTH)
    if formulation == "input":
        tokens = (tokens[0],) * 3
    with torch.no_grad():
        if at_once:
            cut = LENGTH + 2
            first = run_steps(module, *(x[:, :cut] for x in own(tokens)))
            output = torch.cat([first, run_steps(module, *(x[:, cut:] for x in own(tokens)))], 1)
        else:
            output = stack(step_through(module, *own(tokens)), module)
        expected = expected_outputs(module, *tokens, formulation)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def own(tokens):
    """The tokens as arguments: the query alone if it is key and value too."""
    return tokens[:1] if tokens[1] is tokens[0] else tokens


@all_dtypes
@both
def test_many_tokens_at_once_leave_the_state_of_single_steps(formulation, cache_dtype):
    states = []
    for at_once in (False, True):
        module = build(
            formulation=formulation, cache_dtype=cache_dtype, query_index=2, dtype=torch.float64
        )
        x = draw_tokens(module, 3, 2 * LENGTH + 1)[0]
        with torch.no_grad():
            run_steps(module, x) if at_once else step_through(module, x)
        states.append(module.get_state())
    left, right = states
    for name in set(left._fields) - {"q"}:
        a, b = getattr(left, name), getattr(right, name)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def output_bound(module, x, formulation):
    """How far docs/formulations.md lets the newest output (N, E) be off, for self-attention.

    |softmax(s + e) - softmax(s)| sums to at most max |e|."""
    heads, dtype = module.num_heads, module.cache_dtype
    window = x[:, -LENGTH:]
    (w_q, w_k, w_v), (b_q, b_k, b_v) = module._weights().split(), module._weights().split_bias()

    def by_head(t):
        return t.unflatten(-1, (heads, -1)).transpose(1, 2)  # (N, H, S, D)

    q = by_head(x[:, -1:] @ w_q.T + b_q) / module.head_dim**0.5
    if formulation == "kv":
        k, v = by_head(window @ w_k.T + b_k), by_head(window @ w_v.T + b_v)
        off_scores = (q.abs() @ largest_error(k, dtype).mT).amax(-1, keepdim=True)
        off = largest_error(v, dtype).amax(2, True) + off_scores * v.abs().amax(2, True)
        return off.transpose(1, 2).flatten(2)[:, 0] @ module.out_proj.weight.abs().T
    moved = torch.einsum("nhd,hde->nhe", q[:, :, 0], w_k.unflatten(0, (heads, -1)))
    error = largest_error(window, dtype)
    off_scores = (moved.abs() @ error.mT).amax(-1, keepdim=True)  # (N, H, 1)
    off_mixed = error.amax(1)[:, None] + off_scores * window.abs().amax(1)[:, None]
    w_v = w_v.unflatten(0, (heads, -1)).abs()
    off_heads = torch.einsum("nhe,hde->nhd", off_mixed, w_v).flatten(1)
    return off_heads @ module.out_proj.weight.abs().T


@all_dtypes
@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_outputs_stay_within_the_documented_bound(seed, dtype, formulation, cache_dtype):
    module = build(seed, formulation=formulation, cache_dtype=cache_dtype, dtype=dtype)
    x = draw_tokens(module, 8, 2 * LENGTH, seed=seed)[0]
    with torch.no_grad():
        output = step_through(module, x)[-1].double()
        exact = window_attention(module, x)[:, -1]
        bound = output_bound(module.double(), x.double(), formulation)
    error = (output - exact).abs()
    assert (error <= bound + 1e-5).all()
    assert error.max() > 1e-4  # it is rounded, after all


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@both
def test_eight_bit_integers_err_little_in_every_precision(formulation, dtype):
    module = build(
        embed_dim=64,
        num_heads=4,
        sequence_len=40,
        formulation=formulation,
        cache_dtype=torch.int8,
        dtype=dtype,
    )
    x = draw_tokens(module, 4, 80)[0]
    with torch.no_grad():
        output = stack(step_through(module, x), module)
        exact = window_attention(module, x)
    assert output.dtype == dtype
    assert ((output - exact).norm() / exact.norm()) < 0.04


# -- the state -----------------------------------------------------------------------------------


def make(formulation, cache_dtype, **arguments):
    return build(formulation=formulation, cache_dtype=cache_dtype, **arguments)


@all_dtypes
@both
def test_state_has_the_documented_parts_of_a_byte_each(formulation, cache_dtype):
    module = make(formulation, cache_dtype, query_index=2)
    step_through_without_grad(module, draw_tokens(module, 3, 2)[0])
    state = module.get_state()
    stored = torch.int8 if cache_dtype == torch.int8 else torch.uint8
    if formulation == "kv":
        assert isinstance(state, QuantizedRingState)
        assert state.k.shape == state.v.shape == (3, 2, LENGTH, 6)
        assert state.k_scale.shape == state.v_scale.shape == (3, 2, LENGTH, 1)
        assert state.q.dtype == torch.float32
        assert state.k.dtype == state.v.dtype == stored
    else:
        assert isinstance(state, QuantizedInputState)
        assert state.x.shape == (3, LENGTH, 12)
        assert state.x_scale.shape == (3, LENGTH, 1)
        assert state.x.dtype == stored
    assert module.formulation == formulation
    assert not module.state_dict().keys() & set(module._buffers)


def step_through_without_grad(module, x, **arguments):
    with torch.no_grad():
        return step_through(module, x, **arguments)


def by_pickle(module):
    return pickle.loads(pickle.dumps(module))


def by_state(module):
    other = copy.deepcopy(module)
    other.clean_state()
    other.set_state(module.get_state())
    return other


def by_file(module):
    other = copy.deepcopy(module)
    other.clean_state()
    data = continual_mha.states_to_bytes(continual_mha.export_state(module))
    continual_mha.import_state(other, continual_mha.states_from_bytes(data))
    return other


@all_dtypes
@both
@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_state, by_file])
@pytest.mark.parametrize("past", [2, LENGTH + 2])
def test_copies_go_on_identically_and_apart(past, duplicate, formulation, cache_dtype):
    if duplicate is by_file:
        pytest.importorskip("safetensors")
    module = make(formulation, cache_dtype, query_index=1)
    x = draw_tokens(module, 2, past + 2 * LENGTH)[0]
    step_through_without_grad(module, x[:, :past])
    other = duplicate(module)
    before = module.get_state()
    copied = step_through_without_grad(other, x[:, past:])
    assert_same_state(module.get_state(), before)
    own = step_through_without_grad(module, x[:, past:])
    for left, right in zip(copied, own, strict=True):
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right)


@all_dtypes
@both
@pytest.mark.parametrize("at_once", [False, True])
def test_step_without_update_leaves_no_trace(at_once, formulation, cache_dtype):
    module = make(formulation, cache_dtype, query_index=1)
    x = draw_tokens(module, 3, 2 * LENGTH)[0]
    step_through_without_grad(module, x[:, :-2])
    before = module.get_state()
    call = module.forward_steps if at_once else module.forward_step
    new = x[:, -2:] if at_once else x[:, -2]
    with torch.no_grad():
        answer = call(new, update_state=False)
        assert_same_state(module.get_state(), before)
        assert torch.equal(call(new), answer)


@all_dtypes
@both
def test_streams_begin_pause_and_move_on_their_own(formulation, cache_dtype):
    module, single = (make(formulation, cache_dtype, query_index=1) for _ in range(2))
    x = draw_tokens(module, 3, 4 * LENGTH)[0]
    generator = seeded(2)
    with torch.no_grad():
        module.start_streams(3)
        history = []
        for t in range(3 * LENGTH):
            active = torch.rand(3, generator=generator) < 0.7
            if t == LENGTH:
                module.reset([2])
                history = []
            if active[2]:
                history.append(x[2, t])
            module.forward_step(x[:, t], active=active)
        assert len(history) > LENGTH
        step_through(single, torch.stack(history)[None])
        other = make(formulation, cache_dtype, query_index=1)
        other.start_streams(2)
        other.set_stream(1, module.get_stream(2))
        for t in range(3 * LENGTH, 4 * LENGTH):
            expected = single.forward_step(x[2:, t])
            for out, n in ((module.forward_step(x[:, t]), 2), (other.forward_step(x[1:, t]), 1)):
                torch.testing.assert_close(out[n], expected[0], rtol=1e-4, atol=1e-4)


@all_dtypes
@both
@pytest.mark.parametrize("left", [float("nan"), float("inf")])
def test_nothing_of_the_former_owner_is_left_after_a_reset(left, formulation, cache_dtype, backend):
    module, clean = (make(formulation, cache_dtype, query_index=1) for _ in range(2))
    x = draw_tokens(module, 2, 2 * LENGTH)[0]
    with torch.no_grad():
        for each in (module, clean):
            each.start_streams(2)
        for _ in range(LENGTH + 1):
            module.forward_step(torch.full_like(x[:, 0], left))
        module.reset([0, 1])
        for token in x.unbind(1):
            assert torch.equal(module.forward_step(token), clean.forward_step(token))
            assert_same_state(module.get_state(), clean.get_state())


@all_dtypes
@both
@pytest.mark.parametrize("way", ["to", "type"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_conversion_of_the_module_keeps_the_rings(dtype, way, formulation, cache_dtype):
    module = make(formulation, cache_dtype)
    x = draw_tokens(module, 2, LENGTH + 1)[0]
    step_through_without_grad(module, x[:, :-1])
    before = module.get_state()
    getattr(module, way)(dtype)
    assert_same_state(
        *(
            s._replace(q=s.position) if formulation == "kv" else s
            for s in (module.get_state(), before)
        )
    )
    assert step_through_without_grad(module, x[:, -1:].to(dtype))[0].dtype == dtype


@all_dtypes
def test_stream_of_inputs_goes_on_with_keys_and_values(cache_dtype):
    module = make("input", cache_dtype)
    x = draw_tokens(module, 2, 2 * LENGTH)[0]
    step_through_without_grad(module, x[:, :-1])
    twin = copy.deepcopy(module)
    module.formulation = "kv"
    assert isinstance(module.get_state(), QuantizedRingState)
    left, right = (step_through_without_grad(m, x[:, -1:])[0] for m in (module, twin))
    assert 0 < (left - right).norm() / right.norm() < (0.05 if cache_dtype == torch.int8 else 0.2)


@both
def test_state_of_another_cache_dtype_is_refused(formulation):
    plain = make(formulation, None)
    modules = [make(formulation, dtype) for dtype in DTYPES]
    for module in (plain, *modules):
        step_through_without_grad(module, draw_tokens(module, 2, 2)[0])
    for taker in (plain, *modules):
        before = taker.get_state()
        for giver in (plain, *modules):
            if giver is not taker:
                with pytest.raises(TypeError):
                    taker.set_state(giver.get_state())
        assert_same_state(taker.get_state(), before)


# -- what it is not for --------------------------------------------------------------------------


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.uint8, "int8", 8, []])
def test_other_cache_dtypes_are_refused(cache_dtype):
    with pytest.raises(ValueError, match=r"cache_dtype must be None, torch.int8, torch.float8"):
        build(cache_dtype=cache_dtype)


@both
@pytest.mark.parametrize("past", [0, LENGTH])
def test_step_that_needs_a_gradient_is_refused_and_changes_nothing(past, formulation):
    module = make(formulation, torch.int8)
    x = draw_tokens(module, 2, past + 2)[0]
    step_through_without_grad(module, x[:, :past])
    before = module.get_state()
    for call in (
        lambda: module.forward_step(x[:, past]),
        lambda: module.forward_steps(x[:, past:]),
        lambda: module._forward_step(x[:, past], prev_state=module.get_state()),
    ):
        with pytest.raises(RuntimeError, match="no_grad"):
            call()
    assert_same_state(module.get_state(), before)
    module.requires_grad_(False)
    module.forward_step(x[:, past])


def test_forward_trains_and_knows_no_rounding():
    plain, module = build(), build(cache_dtype=torch.int8)
    x = to_layout(module, draw_tokens(module, 2, LENGTH)[0])
    out, _ = module(x)
    assert torch.equal(out, plain(x)[0])
    out.sum().backward()
    assert module.in_proj_weight.grad.abs().sum() > 0


@all_dtypes
@both
def test_step_compiles_in_one_graph(formulation, cache_dtype):
    torch._dynamo.reset()
    module = make(formulation, cache_dtype).requires_grad_(False)
    twin = copy.deepcopy(module)
    x = draw_tokens(module, 2, 2 * LENGTH)[0]
    with torch.no_grad():
        step_through(module, x[:, :LENGTH])
        step_through(twin, x[:, :LENGTH])
        step = torch.compile(module.forward_step, fullgraph=True, backend="eager")
        for t in range(LENGTH, 2 * LENGTH):
            torch.testing.assert_close(step(x[:, t]), twin.forward_step(x[:, t]))
    assert_same_state(module.get_state(), twin.get_state())


@both
def test_explanation_says_that_rings_are_quantised(formulation):
    module = make(formulation, torch.int8).requires_grad_(False)
    token = draw_tokens(module, 2, 1)[0][:, 0]
    assert "quantised" in continual_mha.explain(module, token)
