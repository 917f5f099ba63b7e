"""Each promise of likeness to, or difference from, `continual.SingleOutputMultiheadAttention`.

Where the two modules behave alike, both run, with the same weights and in float64.
"""

from __future__ import annotations

import copy

import pytest
import torch
from oracles import (
    CONSTRUCTIONS,
    LENGTH,
    assert_equals_window,
    assert_same_state,
    build,
    draw_tokens,
    run_steps,
    stack,
    step_through,
    to_layout,
    window_attention,
)
from torch import nn
from upstream import continual

import continual_mha as co

N = 3


def pair(**arguments):
    """Our module and the reference package's, with the same weights, in float64."""
    arguments = {"dtype": torch.float64, **arguments}
    ours = build(**arguments)
    sizes = (ours.embed_dim, ours.num_heads)
    theirs = continual.SingleOutputMultiheadAttention(*sizes, sequence_len=LENGTH, **arguments)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def both(call, modules):
    """What both answer, once it is sure that they agree."""
    with torch.no_grad():
        got, want = (call(module) for module in modules)
    torch.testing.assert_close(got, want)
    return got


def self_clip(module, count=LENGTH):
    return to_layout(module, draw_tokens(module, N, count)[0])


def test_forward_batch_first():
    modules = pair()
    output, weights = both(lambda m: m.forward(self_clip(m)), modules)
    assert output.shape == (N, 1, modules[0].embed_dim)
    assert weights.shape == (N, 1, LENGTH)


def test_forward_embed_dim_second():
    modules = pair(embed_dim_second=True)
    x = self_clip(modules[0])
    assert x.shape == (N, modules[0].embed_dim, LENGTH)
    output, weights = both(lambda m: m.forward(x), modules)
    assert output.shape == (N, modules[0].embed_dim, 1)
    assert weights.shape == (N, 1, LENGTH)


def test_forward_sequence_first():
    modules = pair(batch_first=False)
    x = self_clip(modules[0])
    assert x.shape == (LENGTH, N, modules[0].embed_dim)
    output, weights = both(lambda m: m.forward(x), modules)
    assert output.shape == (1, N, modules[0].embed_dim)
    assert weights.shape == (N, 1, LENGTH)


@pytest.mark.parametrize("query_index", [-1, 0, 2])
def test_forward_attends_over_the_whole_of_a_longer_clip(query_index):
    modules = pair(query_index=query_index)
    _, weights = both(lambda m: m.forward(self_clip(m, LENGTH + 7)), modules)
    assert weights.shape == (N, 1, LENGTH + 7)


@pytest.mark.parametrize("construction", ["defaults", "sequence_first", "embed_dim_second"])
def test_forward_of_all_queries(construction):
    modules = pair(**CONSTRUCTIONS[construction], single_output_forward=False)
    output, weights = both(lambda m: m.forward(self_clip(m)), modules)
    assert output.numel() == N * LENGTH * modules[0].embed_dim
    assert weights.shape == (N, LENGTH, LENGTH)


@pytest.mark.parametrize("need_weights", [True, False])
def test_forward_masks_and_need_weights(need_weights):
    modules = pair()
    padding = torch.zeros(N, LENGTH, dtype=torch.bool)
    padding[1, 2:] = True
    mask = torch.randn(1, LENGTH, dtype=torch.float64)

    def call(module):
        return module.forward(
            *draw_tokens(module, N, LENGTH),
            key_padding_mask=padding,
            need_weights=need_weights,
            attn_mask=mask,
        )

    with pytest.warns(UserWarning, match="mismatched"):  # torch's, about masks of two dtypes
        output, weights = call(modules[1])
    got, got_weights = call(modules[0])
    torch.testing.assert_close(got, output)
    torch.testing.assert_close(got_weights, weights)
    assert (weights is None) == (not need_weights)


def test_forward_step_answers_from_the_last_token_of_the_first_window_on():
    modules = pair()
    tokens = draw_tokens(modules[0], N, 2 * LENGTH + 1)
    with torch.no_grad():
        got, want = (step_through(module, *tokens) for module in modules)
    assert [o is None for o in got] == [o is None for o in want]
    assert got.count(None) == LENGTH - 1
    torch.testing.assert_close(got[LENGTH - 1 :], want[LENGTH - 1 :])
    assert got[-1].shape == (N, modules[0].embed_dim)


@pytest.mark.parametrize("construction", ["defaults", "embed_dim_second"])
def test_forward_steps_answers_for_the_warm_tokens(construction):
    modules = pair(**CONSTRUCTIONS[construction])
    x = draw_tokens(modules[0], N, 2 * LENGTH + 3)[0]
    pieces = (x[:, :3], x[:, 3 : LENGTH + 2], x[:, LENGTH + 2 :])
    with torch.no_grad():
        cold = [module.forward_steps(to_layout(module, pieces[0])) for module in modules]
        assert cold == [None, None]
        for piece in pieces[1:]:
            got, want = (m.forward_steps(to_layout(m, piece)) for m in modules)
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("streams", [1, N])
def test_forward_steps_sequence_first_has_no_stray_axis(streams):
    ours, theirs = pair(batch_first=False)
    x = to_layout(ours, draw_tokens(ours, streams, LENGTH + 3)[0])
    with torch.no_grad():
        got, want = ours.forward_steps(x), theirs.forward_steps(x)
    assert got.shape == (4, streams, ours.embed_dim)
    assert want.dim() == (3 if streams == 1 else 4)  # of which one is stray
    torch.testing.assert_close(got, want.view(got.shape))


@pytest.mark.parametrize("query_index", [*range(-LENGTH, LENGTH)])
def test_query_index_of_any_sign(query_index):
    modules = pair(query_index=query_index)
    ours = modules[0]
    expected = LENGTH - query_index - 1 if query_index >= 0 else -query_index - 1
    assert ours.delay == modules[1].delay == expected
    tokens = draw_tokens(ours, N, 2 * LENGTH + 1)
    with torch.no_grad():
        got, want = (step_through(module, *tokens) for module in modules)
        assert got.count(None) == LENGTH - 1
        torch.testing.assert_close(got[LENGTH - 1 :], want[LENGTH - 1 :])
        for end in range(LENGTH, 2 * LENGTH + 2):
            clip, _ = ours.forward(*(x[:, end - LENGTH : end] for x in tokens))
            torch.testing.assert_close(got[end - 1], clip[:, 0])


def test_receptive_field_is_the_window():
    ours, theirs = pair()
    assert ours.receptive_field == theirs.receptive_field == LENGTH


def test_update_state_false_before_any_state_works_and_leaves_none():
    ours = build(sequence_len=1)
    x = draw_tokens(ours, N, 3)[0]
    with torch.no_grad():
        assert_equals_window(
            ours.forward_step(x[:, 0], update_state=False)[:, None], ours, x[:, :1]
        )
        assert_equals_window(ours.forward_steps(x, update_state=False), ours, x)
    assert ours.get_state() is None
    cold = build()
    assert cold.forward_step(x[:, 0], update_state=False) is None
    assert cold.get_state() is None


@pytest.mark.parametrize(
    "construction",
    ["bias_kv", "zero_attn", "bias_kv_and_zero_attn", "kdim_and_vdim", "kdim", "vdim"],
)
def test_extra_slots_and_other_sizes_work_in_steps(construction):
    """add_bias_kv, add_zero_attn, kdim and vdim: as nn.MultiheadAttention over the window."""
    ours = build(**CONSTRUCTIONS[construction])
    tokens = draw_tokens(ours, N, 2 * LENGTH + 1)
    with torch.no_grad():
        assert_equals_window(stack(step_through(ours, *tokens), ours), ours, *tokens)
        ours.clean_state()
        assert_equals_window(run_steps(ours, *tokens), ours, *tokens)


def test_dropout_applies_to_steps_while_training():
    ours = build(dropout=0.5).train()
    x = draw_tokens(ours, N, LENGTH)[0]
    with torch.no_grad():
        ours.forward_steps(x[:, :-1])
        answers = [ours.forward_step(x[:, -1], update_state=False) for _ in range(2)]
        assert not torch.equal(*answers)
        ours.eval()
        answers = [ours.forward_step(x[:, -1], update_state=False) for _ in range(2)]
        assert torch.equal(*answers)
        assert_equals_window(answers[0][:, None], ours, x)


def test_missing_sequence_len_is_a_value_error_that_says_what_to_pass():
    with pytest.raises(ValueError, match="sequence_len"):
        co.SingleOutputMultiheadAttention(8, 2)


def test_another_batch_size_in_mid_stream_is_a_value_error_with_both_sizes_and_the_way_out():
    ours = build()
    ours.forward_step(draw_tokens(ours, 4, 1)[0][:, 0])
    with pytest.raises(ValueError, match="clean_state") as caught:
        ours.forward_step(draw_tokens(ours, 7, 1)[0][:, 0])
    assert "4" in str(caught.value)
    assert "7" in str(caught.value)


@pytest.mark.parametrize("at_once", [False, True])
def test_gradient_flows_through_the_state_of_earlier_calls(at_once):
    modules = pair()
    grads = []
    for module in modules:
        x = draw_tokens(module, N, LENGTH + 2)[0].requires_grad_()
        if at_once:
            module.forward_steps(x[:, :-2])
            output = module.forward_steps(x[:, -2:])
        else:
            output = torch.stack(step_through(module, x)[-2:], 1)
        inputs = (x, *(p for p in module.parameters()))
        grads.append(torch.autograd.grad(output.square().sum(), inputs))
    torch.testing.assert_close(grads[0], grads[1])
    assert (grads[0][0][:, 0] == 0).all()
    assert (grads[0][0][:, 1] != 0).any()


def test_gradient_can_be_cut():
    ours = build()
    x = draw_tokens(ours, N, LENGTH)[0].requires_grad_()
    step_through(ours, x[:, :-1])
    ours.detach_state()
    (grad,) = torch.autograd.grad(ours.forward_step(x[:, -1]).sum(), x)
    assert (grad[:, :-1] == 0).all()
    assert (grad[:, -1] != 0).any()


def test_snapshot_is_none_at_first_and_does_not_follow_later_steps():
    ours, theirs = pair()
    assert ours.get_state() is None
    assert theirs.get_state() is None
    x = draw_tokens(ours, N, 4)[0]
    with torch.no_grad():
        ours.forward_step(x[:, 0])
        snapshot = ours.get_state()
        kept = copy.deepcopy(snapshot)
        step_through(ours, x[:, 1:])
    assert_same_state(snapshot, kept)


def test_state_is_not_in_the_state_dict():
    modules = pair(add_bias_kv=True, kdim=7)
    plain = nn.MultiheadAttention(12, 2, add_bias_kv=True, kdim=7)
    for module in modules:
        if module is modules[0]:
            step_through(module, *draw_tokens(module, N, LENGTH))
        assert list(module.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precisions_run_with_the_state_in_theirs(dtype):
    ours, theirs = pair(dtype=dtype)
    tokens = draw_tokens(ours, N, 2 * LENGTH)
    with torch.no_grad():
        outputs = stack(step_through(ours, *tokens), ours)
        reference = stack(step_through(theirs, *tokens), theirs)
    assert outputs.dtype == reference.dtype == ours.get_state().k.dtype == dtype
    exact = window_attention(ours, *tokens)
    assert (outputs - exact).abs().max() <= 1.1 * (reference - exact).abs().max()


def test_autocast_runs_with_the_state_in_the_dtype_of_the_input():
    modules = pair(dtype=torch.float32)
    tokens = draw_tokens(modules[0], N, LENGTH + 1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = (stack(step_through(module, *tokens), module) for module in modules)
    assert got.dtype == want.dtype == torch.bfloat16
    assert modules[0].get_state().k.dtype == modules[1].get_state()[1].dtype == torch.float32
    exact = window_attention(modules[0], *tokens)
    assert (got - exact).abs().max() <= 2 * (want - exact).abs().max()


def test_step_compiles_to_one_graph():
    ours = build()
    x = draw_tokens(ours, N, LENGTH + 1)[0]
    torch._dynamo.reset()
    step = torch.compile(ours.forward_step, fullgraph=True, backend="eager")
    with torch.no_grad():
        outputs = [step(x[:, t]) for t in range(LENGTH + 1)]
        assert_equals_window(stack(outputs, ours), ours, x)


def test_build_from_copies_arguments_and_weights():
    source = nn.MultiheadAttention(12, 2, dropout=0.25, add_bias_kv=True, kdim=7, batch_first=True)
    built = [
        cls.build_from(source, LENGTH, query_index=-2).eval()
        for cls in (co.SingleOutputMultiheadAttention, continual.SingleOutputMultiheadAttention)
    ]
    clip = draw_tokens(built[0], N, LENGTH)
    both(lambda m: m.forward(*clip), built)
    for name in ("dropout", "kdim", "vdim", "batch_first", "query_index", "sequence_len"):
        assert getattr(built[0], name) == getattr(built[1], name)


def test_call_mode_and_its_block():
    modules = pair()
    x = draw_tokens(modules[0], N, LENGTH)[0]
    blocks = (co.call_mode, continual.call_mode)
    with torch.no_grad():
        for module, call_mode in zip(modules, blocks, strict=True):
            with call_mode("forward_steps"):
                assert module(x[:, :-1]) is None
            module.call_mode = "forward_step"
        torch.testing.assert_close(*(module(x[:, -1]) for module in modules))


def test_containers_take_the_module_by_duck_typing():
    modules = pair(embed_dim_second=True, forward_returns_attn_mask=False)
    nets = [continual.Residual(module) for module in modules]
    x = self_clip(modules[0])
    both(lambda net: net.forward(x), nets)
    with torch.no_grad():
        for t in range(LENGTH):
            got, want = (net.forward_step(x[:, :, t]) for net in nets)
    torch.testing.assert_close(got, want)
    assert modules[0]._state_shape == len(modules[0].get_state())
    assert len(modules[0]._dynamic_state_inds) == modules[0]._state_shape


def test_functional_step_returns_the_next_state():
    modules = pair()
    tokens = draw_tokens(modules[0], N, LENGTH + 1)
    states = [None, None]
    with torch.no_grad():
        for t in range(LENGTH + 1):
            for i, module in enumerate(modules):
                output, states[i] = module._forward_step(*(x[:, t] for x in tokens), states[i])
                if i == 0:
                    got = output
        torch.testing.assert_close(got, output)
    assert modules[0].get_state() is None


def test_flops_are_counted_alike():
    ours, theirs = pair()
    assert ours.flops() == theirs.flops()


def test_warm_up_takes_a_shape():
    ours = build()
    ours.warm_up((N, ours.embed_dim))
    assert ours.forward_step(torch.zeros(N, ours.embed_dim)).shape == (N, ours.embed_dim)


def test_step_writes_one_slot_and_shifts_nothing():
    ours = build()
    x = draw_tokens(ours, N, 2 * LENGTH)[0]
    with torch.no_grad():
        step_through(ours, x[:, :LENGTH])
        for t in range(LENGTH, 2 * LENGTH):
            before = ours.get_state()
            ours.forward_step(x[:, t])
            after = ours.get_state()
            changed = (before.k != after.k).flatten(3).any(-1).any(1).any(0)
            assert changed.nonzero().flatten().tolist() == [t % LENGTH]
