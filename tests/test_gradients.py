"""Gradients through all three forwards, and through the state that earlier calls left."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from oracles import (
    CONSTRUCTIONS,
    LENGTH,
    build,
    draw_tokens,
    run_steps,
    seeded,
    stack,
    step_through,
    to_layout,
    window_attention,
)
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import continual_mha as co

pytestmark = pytest.mark.usefixtures("backend")

WIDTH = 6
SMALL = {"embed_dim": WIDTH, "num_heads": 2, "dtype": torch.float64}


def build_small(construction, **arguments):
    chosen = {**SMALL, **CONSTRUCTIONS[construction], **arguments}
    if construction == "head_dim_one":
        chosen["num_heads"] = WIDTH
    return build(**chosen)


def leaves(module, streams, count):
    tokens = draw_tokens(module, streams, count)
    return tuple(x.requires_grad_() for x in tokens)


def call_forward(module, query, key, value):
    output, weights = module(*(to_layout(module, x) for x in (query, key, value)))
    return output, weights


def call_forward_without_weights(module, query, key, value):
    tokens = (to_layout(module, x) for x in (query, key, value))
    return module(*tokens, need_weights=False)[0]


def call_steps_one_by_one(module, query, key, value):
    module.clean_state()
    return stack(step_through(module, query, key, value), module)


def call_steps_at_once(module, query, key, value):
    module.clean_state()
    return run_steps(module, query, key, value)


def call_steps_mixed(module, query, key, value):
    """Single tokens, many tokens, an answer without update, and single tokens again."""
    module.clean_state()
    cuts = [0, 2, 3, LENGTH + 1, LENGTH + 2, query.shape[1]]
    outputs = []
    for i in range(len(cuts) - 1):
        chunk = [x[:, cuts[i] : cuts[i + 1]] for x in (query, key, value)]
        if i % 2:
            outputs.append(run_steps(module, *chunk))
        else:
            run_steps(module, *chunk, update_state=False)
            singles = [o for o in step_through(module, *chunk) if o is not None]
            outputs.append(torch.stack(singles, 1) if singles else None)
    return torch.cat([o for o in outputs if o is not None], 1)


STEPWISE = {
    "one by one": call_steps_one_by_one,
    "at once": call_steps_at_once,
    "mixed": call_steps_mixed,
}
CALLS = {
    "forward": call_forward,
    "forward without weights": call_forward_without_weights,
    **STEPWISE,
}


@pytest.mark.parametrize("way", CALLS)
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_gradcheck_of_inputs_and_every_weight(construction, way):
    module = build_small(construction)
    count = LENGTH if way.startswith("forward") else LENGTH + 2
    tokens = leaves(module, 2, count)
    parameters = tuple(module.parameters())
    assert gradcheck(
        lambda query, key, value, *_: CALLS[way](module, query, key, value),
        (*tokens, *parameters),
        fast_mode=True,
    )


@pytest.mark.parametrize("way", CALLS)
def test_gradcheck_entry_by_entry(way):
    module = build(embed_dim=4, num_heads=2, sequence_len=3, dtype=torch.float64)
    tokens = leaves(module, 1, 3 if way.startswith("forward") else 8)
    assert gradcheck(
        lambda query, key, value, *_: CALLS[way](module, query, key, value),
        (*tokens, *module.parameters()),
    )


def test_gradcheck_of_all_queries():
    module = build_small("bias_kv_and_zero_attn", single_output_forward=False)
    tokens = leaves(module, 2, LENGTH)
    assert gradcheck(
        lambda query, key, value, *_: call_forward(module, query, key, value),
        (*tokens, *module.parameters()),
        fast_mode=True,
    )


def test_gradcheck_of_a_long_clip_with_masks():
    """Long enough for the projections to move to the query's side."""
    module = build(embed_dim=8, num_heads=2, sequence_len=40, dtype=torch.float64)
    tokens = leaves(module, 2, 40)
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[0, 3:30] = True

    def call(query, key, value, *_):
        return module(query, key, value, key_padding_mask=mask, need_weights=False)[0]

    assert gradcheck(call, (*tokens, *module.parameters()), fast_mode=True)


def gradients(output, inputs, cotangent):
    return torch.autograd.grad(output, inputs, cotangent, allow_unused=True)


@pytest.mark.parametrize("way", STEPWISE)
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_gradient_through_the_state_equals_that_of_the_windows(construction, way):
    """Autograd of nn.MultiheadAttention over every window, for earlier tokens and all weights."""
    module = build(**CONSTRUCTIONS[construction], dtype=torch.float64)
    tokens = leaves(module, 2, 3 * LENGTH)
    inputs = (*tokens, *module.parameters())
    expected_output = window_attention(module, *tokens)
    cotangent = torch.randn_like(expected_output)
    expected = gradients(expected_output, inputs, cotangent)
    output = STEPWISE[way](module, *tokens)
    torch.testing.assert_close(output, expected_output)
    for got, want in zip(gradients(output, inputs, cotangent), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("way", STEPWISE)
def test_last_output_reaches_every_token_of_its_window_and_no_other(way):
    module = build(**SMALL)
    x = leaves(module, 1, 3 * LENGTH)[0]
    output = STEPWISE[way](module, x, x, x)
    (grad,) = torch.autograd.grad(output[:, -1].sum(), x)
    assert (grad[:, :-LENGTH] == 0).all()
    assert (grad[:, -LENGTH:] != 0).any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_in_other_precisions(dtype):
    module = build(dtype=dtype)
    tokens = leaves(module, 3, 2 * LENGTH)
    inputs = (*tokens, *module.parameters())
    cotangent = torch.randn(3, LENGTH + 1, module.embed_dim, dtype=dtype)
    plain = gradients(window_attention(module, *tokens, dtype=dtype), inputs, cotangent)
    exact_output = window_attention(module, *tokens)
    exact = gradients(exact_output, inputs, cotangent.double())
    for way in STEPWISE.values():
        got = gradients(way(module, *tokens), inputs, cotangent)
        for mine, theirs, right in zip(got, plain, exact, strict=True):
            assert mine.dtype == dtype
            scale = max(right.abs().max().item(), exact_output.abs().max().item())
            error = (mine - right).abs().max().item() / scale
            allowed = 2 * (theirs - right).abs().max().item() / scale + 4 * torch.finfo(dtype).eps
            assert error <= allowed


def test_frozen_weights_leave_the_gradient_of_the_input():
    module = build(**SMALL).requires_grad_(False)
    x = leaves(module, 2, LENGTH + 3)[0]
    expected = window_attention(module, x)
    cotangent = torch.randn_like(expected)
    (want,) = torch.autograd.grad(expected, x, cotangent)
    for way in STEPWISE.values():
        (got,) = torch.autograd.grad(way(module, x, x, x), x, cotangent)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("at_once", [False, True])
def test_gradient_through_the_state_alone(at_once):
    """Neither the weights nor the newest tokens ask for a gradient, but those before them do."""
    module = build(**SMALL).requires_grad_(False)
    early = leaves(module, 2, LENGTH - 1)[0]
    late = draw_tokens(module, 2, 2, seed=3)[0]
    expected = window_attention(module, torch.cat([early, late], 1))
    (want,) = torch.autograd.grad(expected.sum(), early)
    step_through(module, early)
    if at_once:
        output = module.forward_steps(late)
    else:
        output = torch.stack(step_through(module, late), 1)
    (got,) = torch.autograd.grad(output.sum(), early)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("role", [0, 1, 2])
def test_gradient_of_one_kind_of_token_alone(role):
    module = build(**SMALL).requires_grad_(False)
    tokens = draw_tokens(module, 2, LENGTH + 2)
    x = tokens[role].requires_grad_()
    expected = window_attention(module, *tokens)
    (want,) = torch.autograd.grad(expected.sum(), x)
    for way in STEPWISE.values():
        (got,) = torch.autograd.grad(way(module, *tokens).sum(), x)
        torch.testing.assert_close(got, want)


def test_one_trainable_weight_is_enough():
    module = build(**SMALL).requires_grad_(False)
    module.out_proj.bias.requires_grad_(True)
    x = draw_tokens(module, 2, LENGTH)[0]
    output = stack(step_through(module, x), module)
    output.sum().backward()
    torch.testing.assert_close(module.out_proj.bias.grad, torch.full((WIDTH,), 2.0).double())


@pytest.mark.parametrize("way", ["forward", "forward_steps", "forward_step"])
@pytest.mark.parametrize("trained", ["out_proj.weight", "in_proj_weight", "v_proj_weight"])
def test_second_derivatives_of_partly_frozen_weights(trained, way):
    """Rings, and weights that are returned, need no gradient then."""
    own = {"kdim": 5, "bias": False} if trained == "v_proj_weight" else {}
    module = build(dtype=torch.float64, batch_first=True, **own)
    for name, weight in module.named_parameters():
        weight.requires_grad_(name == trained)
    clip = draw_tokens(module, 2, LENGTH)
    taken = [x.unbind(1) for x in clip]

    def second_derivatives():
        module.clean_state()
        if way == "forward_step":
            outs = [[module.forward_step(*x) for x in zip(*taken, strict=True)][-1]]
        else:
            out = getattr(module, way)(*clip)
            outs = out if way == "forward" else [out]
        total = sum(x.square().sum() for x in outs)
        (first,) = torch.autograd.grad(total, module.get_parameter(trained), create_graph=True)
        return torch.autograd.grad(first.square().sum(), module.get_parameter(trained))[0]

    found = second_derivatives()
    with co.use_backend("torch"):
        torch.testing.assert_close(found, second_derivatives())
    assert found.abs().max() > 0


def test_nothing_to_differentiate_gives_no_graph():
    module = build(**SMALL).requires_grad_(False)
    x = draw_tokens(module, 2, LENGTH)[0]
    assert not stack(step_through(module, x), module).requires_grad
    assert not any(part.requires_grad for part in module.get_state())


def explicit_windows(module, x, cut):
    """Windows over x (N, S, E) whose keys and values before token `cut` are constants."""
    w_q, w_k, w_v = module.in_proj_weight.chunk(3)
    b_q, b_k, b_v = module.in_proj_bias.chunk(3)

    def project(weight, bias):
        y = x @ weight.T + bias
        y = torch.cat([y[:, :cut].detach(), y[:, cut:]], 1)
        return y.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)

    q, k, v = (project(w, b) for w, b in ((w_q, b_q), (w_k, b_k), (w_v, b_v)))
    outputs = []
    for end in range(LENGTH, x.shape[1] + 1):
        window = slice(end - LENGTH, end)
        scores = q[:, :, end - 1 : end] @ k[:, :, window].mT / q.shape[-1] ** 0.5
        heads = (scores.softmax(-1) @ v[:, :, window]).transpose(1, 2).flatten(2)
        outputs.append(heads @ module.out_proj.weight.T + module.out_proj.bias)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("later_at_once", [False, True])
def test_detach_state_truncates_the_gradient_and_keeps_the_numbers(later_at_once):
    module = build(**SMALL)
    x = leaves(module, 2, 3 * LENGTH)[0]
    cut = LENGTH + 2
    inputs = (x, *module.parameters())
    expected = explicit_windows(module, x, cut)[:, cut - LENGTH + 1 :]
    cotangent = torch.randn_like(expected)
    want = gradients(expected, inputs, cotangent)

    step_through(module, x[:, :cut])
    module.detach_state()
    assert not any(part.requires_grad for part in module.get_state())
    later = x[:, cut:]
    output = (
        module.forward_steps(later)
        if later_at_once
        else torch.stack(step_through(module, later), 1)
    )
    torch.testing.assert_close(output, expected)
    got = gradients(output, inputs, cotangent)
    assert (got[0][:, :cut] == 0).all()
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_detach_state_truncates_what_transforms_follow(formulation):
    """Where tensors need not say that they need a gradient."""
    module = build(formulation=formulation).double().requires_grad_(False)
    x = draw_tokens(module, 2, LENGTH + 1)[0]
    along = torch.randn(x.shape, generator=seeded(3), dtype=x.dtype)

    def last(x):
        module.clean_state()
        for token in x[:, :-1].unbind(1):
            module.forward_step(token)
        module.detach_state()
        return module.forward_step(x[:, -1]).sum()

    known = x.clone().requires_grad_()
    expected = torch.autograd.grad(last(known), known)[0]
    assert not expected[:, :-1].any()
    many = torch.stack([x, x]).requires_grad_()
    batched = torch.autograd.grad(torch.func.vmap(last)(many).sum(), many)[0]
    torch.testing.assert_close(batched, torch.stack([expected] * 2))
    derivative = torch.func.jvp(last, (x,), (along,))[1]
    torch.testing.assert_close(derivative, (expected * along).sum())


def test_detach_state_does_not_cut_the_graph_of_earlier_outputs():
    module = build(**SMALL)
    x = leaves(module, 2, LENGTH)[0]
    output = stack(step_through(module, x), module)
    module.detach_state()
    (grad,) = torch.autograd.grad(output.sum(), x)
    (want,) = torch.autograd.grad(window_attention(module, x).sum(), x)
    torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_steps_after_detach_state_keep_what_the_earlier_graph_needs(mode):
    module = build(**SMALL)
    x = leaves(module, 2, LENGTH + 3)[0]
    output = stack(step_through(module, x[:, :LENGTH]), module)
    module.detach_state()
    with mode():
        step_through(module, x[:, LENGTH:])
        module.forward_steps(x[:, LENGTH:])
    (grad,) = torch.autograd.grad(output.sum(), x)
    (want,) = torch.autograd.grad(window_attention(module, x[:, :LENGTH]).sum(), x)
    torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_step_without_a_gradient_cuts_the_graph_of_a_state_that_was_set_as_of_its_own(formulation):
    """Or a slot's gradient would go to the token before that which is there."""
    grads = []
    for moved in (False, True):
        module = build(**SMALL, formulation=formulation)
        x = leaves(module, 2, LENGTH + 2)[0]
        step_through(module, x[:, :LENGTH])
        if moved:
            module.set_state(module.get_state())
        with torch.no_grad():
            module.forward_step(x[:, LENGTH])
        output = module.forward_step(x[:, LENGTH + 1])
        grads.append(torch.autograd.grad(output.sum(), x)[0])
    torch.testing.assert_close(*grads)
    assert not grads[0][:, : LENGTH + 1].any()
    assert grads[0][:, LENGTH + 1].any()


def test_detach_state_before_any_step_is_no_error():
    module = build(**SMALL)
    module.detach_state()
    assert module.get_state() is None


@pytest.mark.parametrize("query_index", [-1, 1])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_steps_without_gradient_do_not_corrupt_an_earlier_backward(mode, query_index):
    module = build(**SMALL, query_index=query_index)
    x = leaves(module, 2, 4 * LENGTH)[0]
    first = 2 * LENGTH
    expected = window_attention(module, x)
    cotangent = torch.randn(2, first - LENGTH + 1, WIDTH, dtype=torch.float64)
    inputs = (x, *module.parameters())
    want = gradients(expected[:, : first - LENGTH + 1], inputs, cotangent)
    output = stack(step_through(module, x[:, :first]), module)
    with mode():
        later = step_through(module, x[:, first : first + 4])
        more = module.forward_steps(x[:, first + 4 :])
    torch.testing.assert_close(
        torch.cat([torch.stack(later, 1), more], 1), expected[:, first - LENGTH + 1 :]
    )
    for mine, theirs in zip(gradients(output, inputs, cotangent), want, strict=True):
        torch.testing.assert_close(mine, theirs)


KINDS = {
    "kv": {},
    "kv_delayed": {"query_index": 1},
    "kv_with_a_slot": {"add_zero_attn": True},
    "input": {"formulation": "input"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_reset_and_steps_without_gradient_do_not_corrupt_an_earlier_backward(mode, kind):
    module = build(**SMALL, **KINDS[kind])
    x = leaves(module, 2, LENGTH + 3)[0]
    inputs = (x, *module.parameters())
    output = module.forward_steps(x)
    want = gradients(output, inputs, torch.ones_like(output))
    module.clean_state()
    output = stack(step_through(module, x), module)
    with mode():
        module.reset([0])
        for _ in range(3):
            module.forward_step(torch.ones(2, WIDTH, dtype=torch.float64))
        module.set_stream(1, module.get_stream(0))
    for mine, theirs in zip(gradients(output, inputs, torch.ones_like(output)), want, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_steps_after_one_that_was_undone_do_not_corrupt_its_backward(mode, kind):
    module = build(**SMALL, **KINDS[kind])
    x = leaves(module, 2, LENGTH + 3)[0]
    found = []
    for goes_on in (False, True):
        module.clean_state()
        with torch.no_grad():
            step_through(module, x[:, :-1])
        mark = module.mark()
        output = module.forward_step(x[:, -1])
        module.return_to(mark)
        if goes_on:
            with mode():
                for _ in range(3):
                    module.forward_step(torch.ones(2, WIDTH, dtype=torch.float64))
        found.append(torch.autograd.grad(output.square().sum(), (x, *module.parameters())))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("formulation", ["kv", "input"])
@pytest.mark.parametrize("began", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("stepped", [torch.no_grad, torch.inference_mode])
def test_step_is_undone_outside_of_the_mode_it_was_taken_in(stepped, began, formulation):
    module = build(**SMALL, formulation=formulation)
    x = draw_tokens(module, 2, LENGTH + 3)[0]
    with torch.no_grad():
        expected = step_through(module, x)[-1]
    module.clean_state()
    with began():
        step_through(module, x[:, :-1])
    mark = module.mark()
    with stepped():
        module.forward_step(-x[:, 0])
    module.return_to(mark)
    assert module._ring_position.tolist() == [LENGTH + 2] * 2
    with torch.no_grad():
        torch.testing.assert_close(module.forward_step(x[:, -1]), expected)


@pytest.mark.parametrize("how", ["paused", "not kept", "left the window"])
@pytest.mark.parametrize("call", ["forward_step", "forward_steps", "converted"])
@pytest.mark.parametrize("kind", KINDS)
def test_token_that_no_window_sees_is_in_no_gradient(kind, call, how):
    module = build(**SMALL, **KINDS[kind])
    x, nan = draw_tokens(module, 2, 3 * LENGTH)[0], torch.full((2, WIDTH), torch.nan).double()
    with torch.no_grad():
        module.start_streams(2)
        for t in range(LENGTH + 2):
            module.forward_step(nan if how == "left the window" and t == 1 else x[:, t])
        if how == "left the window":
            module.forward_step(x[:, LENGTH + 2])
        elif how == "paused":
            module.forward_step(nan, active=torch.tensor([False, True]))
            module.reset([1])
        else:
            module.forward_step(nan, update_state=False)
    if call == "converted" and module.formulation == "input":
        module.formulation = "kv"
    if call == "forward_steps":
        output = module.forward_steps(x[:, -LENGTH:])
    else:
        output = module.forward_step(x[:, -1])
    assert output.isfinite().all()
    found = torch.autograd.grad(output.sum(), module.parameters(), allow_unused=True)
    assert all(grad is None or grad.isfinite().all() for grad in found)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_converted_streams_are_cut_from_a_graph_by_steps_without_a_gradient(cache_dtype):
    arguments = {"embed_dim": WIDTH, "num_heads": 2, "cache_dtype": cache_dtype}
    module = build(**arguments, formulation="input")
    x = draw_tokens(module, 2, 3 * LENGTH)[0]
    with torch.no_grad():
        step_through(module, x[:, :LENGTH])
    module.formulation = "kv"
    assert any(part.requires_grad for part in module.buffers()) == (cache_dtype is None)
    with torch.no_grad():
        step_through(module, x[:, LENGTH:])
    assert not any(part.requires_grad for part in module.get_state())
    module.requires_grad_(False)
    module.forward_step(x[:, 0])


@pytest.mark.parametrize("at_once", [False, True])
def test_inference_mode_then_no_grad_then_gradient(at_once):
    module = build(**SMALL)
    x = leaves(module, 2, 4 * LENGTH)[0]
    cut = 2 * LENGTH + 2
    expected = explicit_windows(module, x, cut)
    with torch.inference_mode():
        first = step_through(module, x[:, :LENGTH])
    with torch.no_grad():
        second = step_through(module, x[:, LENGTH:cut])
    outputs = torch.stack([*first[LENGTH - 1 :], *second], 1)
    torch.testing.assert_close(outputs, expected[:, : cut - LENGTH + 1])
    later = x[:, cut:]
    output = module.forward_steps(later) if at_once else torch.stack(step_through(module, later), 1)
    torch.testing.assert_close(output, expected[:, cut - LENGTH + 1 :])
    cotangent = torch.randn_like(output)
    inputs = (x, *module.parameters())
    want = gradients(expected[:, cut - LENGTH + 1 :], inputs, cotangent)
    for mine, theirs in zip(gradients(output, inputs, cotangent), want, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("order", [None, ("triton", "torch")], ids=["here", "as on a GPU"])
@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_functional_step_takes_a_state_from_inference_mode(formulation, order, monkeypatch):
    if order is not None:
        monkeypatch.setattr(co.backends, "order", lambda device_type: order)
    module = build(**SMALL, formulation=formulation)
    x = draw_tokens(module, 2, LENGTH)[0]
    state = None
    with torch.inference_mode():
        for t in range(LENGTH - 1):
            _, state = module._forward_step(x[:, t], prev_state=state)
    output, _ = module._forward_step(x[:, -1], prev_state=state)
    torch.testing.assert_close(output[:, None], window_attention(module, x))
    output.sum().backward()
    assert (module.in_proj_weight.grad != 0).any()


@pytest.mark.parametrize("update_state", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_answers_without_update_keep_what_an_earlier_graph_needs(mode, update_state):
    module = build(**SMALL)
    x = leaves(module, 2, LENGTH + 3)[0]
    output = stack(step_through(module, x[:, :LENGTH]), module)
    with mode():
        module.forward_step(x[:, LENGTH], update_state=False)
        module.forward_steps(x[:, LENGTH:], update_state=False)
        module.forward_step(x[:, LENGTH], update_state=update_state)
        module.forward_steps(x[:, LENGTH + 1 :])
    (grad,) = torch.autograd.grad(output.sum(), x)
    (want,) = torch.autograd.grad(window_attention(module, x[:, :LENGTH]).sum(), x)
    torch.testing.assert_close(grad, want)


def test_state_from_inference_mode_serves_after_it():
    """Tensors made in inference mode refuse to be written to outside of it; the module must not."""
    module = build(**SMALL)
    x = draw_tokens(module, 2, 3 * LENGTH)[0]
    with torch.inference_mode():
        step_through(module, x[:, :2])
        snapshot = module.get_state()
    with torch.no_grad():
        first = step_through(module, x[:, 2:])
        module.set_state(snapshot)
        again = step_through(module, x[:, 2:])
    torch.testing.assert_close(torch.stack(first[LENGTH - 3 :]), torch.stack(again[LENGTH - 3 :]))


def test_truncated_backpropagation_trains():
    """Weights change between windows of steps: no error about versions, and the loss falls."""
    module = build(**SMALL)
    target = build(**SMALL, seed=5)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        x = torch.randn(4, LENGTH, WIDTH, dtype=torch.float64)
        with torch.no_grad():
            wanted = [o for o in step_through(target, x) if o is not None]
        outputs = [o for o in step_through(module, x) if o is not None]
        loss = sum((a - b).square().mean() for a, b in zip(outputs, wanted, strict=True)) / len(
            outputs
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        module.detach_state()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_gradient_survives_a_snapshot():
    """A state that is taken and set again carries the gradient of the steps that made it."""
    module = build(**SMALL)
    x = leaves(module, 2, LENGTH + 1)[0]
    expected = window_attention(module, x)
    cotangent = torch.randn_like(expected)
    (want,) = torch.autograd.grad(expected, x, cotangent)
    step_through(module, x[:, :3])
    snapshot = module.get_state()
    module.clean_state()
    module.set_state(snapshot)
    outputs = step_through(module, x[:, 3:])
    (got,) = torch.autograd.grad(torch.stack(outputs[-2:], 1), x, cotangent)
    torch.testing.assert_close(got, want)


def test_gradient_through_autocast_steps():
    module = build()
    x = leaves(module, 2, LENGTH)[0]
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        output = stack(step_through(module, x), module)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    (want,) = torch.autograd.grad(window_attention(module, x).sum(), x)
    torch.testing.assert_close(x.grad, want.float(), rtol=0.1, atol=0.1)


def test_functional_step_may_be_run_again_in_the_backward_pass():
    module = build_small("middle_query")
    x, *_ = leaves(module, 2, LENGTH + 2)

    def step(token, *state):
        output, state = module._forward_step(token, prev_state=state or None)
        return token if output is None else output, *state

    grads = []
    for run in (step, partial(checkpoint, step, use_reentrant=False)):
        state = ()
        for token in x.unbind(1):
            output, *state = run(token, *state)
        grads += torch.autograd.grad(output.square().sum(), x)
    torch.testing.assert_close(*grads)


def step_in_a_warm_window_of_one(module, x):
    return torch.stack([module.forward_step(token) for token in x.unbind(1)], 1)


FORWARD_MODE = {
    "forward": (lambda module, x: module(x)[0], LENGTH),
    "forward without weights": (lambda module, x: module(x, need_weights=False)[0], LENGTH),
    "one by one": (lambda module, x: call_steps_one_by_one(module, x, None, None), LENGTH),
    "at once": (lambda module, x: call_steps_at_once(module, x, None, None), LENGTH),
    "repeated": (step_in_a_warm_window_of_one, 1),
}


@pytest.mark.parametrize("formulation", ["kv", "input"])
@pytest.mark.parametrize("way", FORWARD_MODE)
def test_forward_mode_reaches_the_tokens_while_nothing_needs_a_gradient(way, formulation):
    """Operators of this package know no forward mode: they would answer with a derivative of 0."""
    answer, length = FORWARD_MODE[way]
    module = build(**SMALL, formulation=formulation, sequence_len=length).requires_grad_(False)
    x, direction, _ = draw_tokens(module, 2, LENGTH + 2)
    with torch.no_grad():
        difference = answer(module, x + 1e-5 * direction) - answer(module, x - 1e-5 * direction)
        _, derivative = torch.func.jvp(lambda x: answer(module, x), (x,), (direction,))
    torch.testing.assert_close(derivative, difference / 2e-5, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_linearised_clip_has_the_derivative_of_forward_mode():
    module = build(**SMALL).requires_grad_(False)
    x, direction, _ = draw_tokens(module, 2, LENGTH)
    _, derivative = torch.func.jvp(lambda x: module(x)[0], (x,), (direction,))
    _, linear = torch.func.linearize(lambda x: module(x)[0], x)
    torch.testing.assert_close(linear(direction), derivative)


@pytest.fixture
def _no_fallback():
    """vmap runs what it has no formula for once for every sample; here it is an error."""
    before = torch._C._functorch._is_vmap_fallback_enabled()
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(before)


@pytest.mark.usefixtures("_no_fallback")
@pytest.mark.parametrize("formulation", ["kv", "input"])
@pytest.mark.parametrize("way", FORWARD_MODE)
def test_vmap_takes_each_sample_by_itself(way, formulation):
    answer, length = FORWARD_MODE[way]
    module = build(**SMALL, formulation=formulation, sequence_len=length).requires_grad_(False)
    samples = torch.stack(draw_tokens(module, 2, LENGTH + 2))
    with torch.no_grad():
        together = torch.func.vmap(lambda x: answer(module, x))(samples)
        module.clean_state()
        alone = torch.stack([answer(module, x) for x in samples])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("_no_fallback")
@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_vmap_of_a_warm_step_is_one_step_of_every_sample(formulation):
    module = build(**SMALL, formulation=formulation).requires_grad_(False)
    x = draw_tokens(module, 2, LENGTH + 4)[0]
    with torch.no_grad():
        step_through(module, x[:, : LENGTH + 1])
        state, samples = module.get_state(), x[:, LENGTH + 1 :].unbind(1)
        together = torch.func.vmap(module.forward_step)(torch.stack(samples))
        assert (module._ring_position == LENGTH + 2).all()
        for sample, output in zip(samples, together, strict=True):
            module.set_state(state)
            torch.testing.assert_close(module.forward_step(sample), output, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("_no_fallback")
@pytest.mark.parametrize("query_index", [-1, 1])
@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_vmap_takes_a_state_for_each_sample(formulation, query_index):
    """One of streams at positions of their own, which nobody can read."""
    module = build(**SMALL, formulation=formulation, query_index=query_index)
    x = draw_tokens(module, 2, LENGTH + 2)[0]
    with torch.no_grad():
        step_through(module, x[:, : LENGTH + 1])
        states = [module.get_state()]
        module.reset(1)
        states.append(module.get_state())
        *parts, clock = zip(*states, strict=True)

        def step(*parts):
            output, _ = module._forward_step(x[:, -1], prev_state=(*parts, clock[0]))
            return output

        together = torch.func.vmap(step)(*map(torch.stack, parts))
        alone = [module._forward_step(x[:, -1], prev_state=state)[0] for state in states]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-9, atol=1e-12)


def test_transforms_differentiate_what_fused_operators_would_serve(monkeypatch):
    """The order is that of a CUDA device; its operators know nothing of transforms."""
    monkeypatch.setattr(co.backends, "order", lambda device_type: ("triton", "torch"))
    module = build(**SMALL)
    x = draw_tokens(module, 1, LENGTH)[0]

    def answer(x):
        return module(x, need_weights=False)[0].square().sum()

    derivative = torch.func.grad(answer)(x)
    monkeypatch.undo()
    x.requires_grad_()
    torch.testing.assert_close(derivative, torch.autograd.grad(answer(x), x)[0])


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_gradcheck_of_attention_over_a_shared_tile(with_mask, with_sink):
    """Both outputs, for every differentiable argument of the operator behind `forward`."""
    drawn = [torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 6), torch.randn(2, 3)]
    query, key, value, sink = (x.double().requires_grad_() for x in drawn)
    mask = torch.randn(2, 1, 5).double() if with_mask else None
    attend = torch.ops.continual_mha.attend_shared
    if with_sink:
        assert gradcheck(
            lambda *given: attend(*given[:3], mask, given[3]), (query, key, value, sink)
        )
    else:
        assert gradcheck(lambda *given: attend(*given, mask, None), (query, key, value))


@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_many_gradients_at_once_of_widths_that_are_padded(formulation):
    module = build(
        embed_dim=3, num_heads=1, dtype=torch.bfloat16, formulation=formulation, batch_first=True
    )
    x = draw_tokens(module, 2, LENGTH)[0].requires_grad_()
    out = [module.forward_step(token) for token in x.unbind(1)][-1]
    seeds = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
    how = {"retain_graph": True}
    (found,) = torch.autograd.grad(out, x, seeds, is_grads_batched=True, **how)
    singly = torch.stack([torch.autograd.grad(out, x, seed, **how)[0] for seed in seeds])
    assert torch.dist(found, singly) < 5e-2 * singly.norm()


@pytest.mark.parametrize("formulation", ["kv", "input"])
@pytest.mark.parametrize("query_index", [-1, -2])
@pytest.mark.parametrize("call", ["forward", "forward_step", "forward_steps"])
def test_outputs_that_need_a_gradient_may_be_written_to(call, query_index, formulation, backend):
    """As by ``nn.ReLU(inplace=True)`` behind the attention, or ``+=``."""
    module = build(query_index=query_index, formulation=formulation)
    x = draw_tokens(module, 2, 2 * LENGTH)[0]
    grads = []
    for written in (True, False):
        module.zero_grad()
        module.clean_state()
        module.forward_steps(x[:, :LENGTH])
        later = x[:, LENGTH] if call == "forward_step" else x[:, LENGTH:]
        out = getattr(module, call)(later)
        out = out[0] if call == "forward" else out
        out = out.mul_(2).relu_() if written else out.mul(2).relu()
        (out * torch.arange(out.shape[-1], device=out.device)).sum().backward()
        grads.append([weight.grad.clone() for weight in module.parameters()])
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)
