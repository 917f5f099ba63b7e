"""`forward` is `torch.nn.MultiheadAttention` over the clip, for one query or for all of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from oracles import (
    CONSTRUCTIONS,
    EMBED,
    HEADS,
    LENGTH,
    assert_as_exact_as_torch,
    assert_same_state,
    build,
    draw_tokens,
    from_layout,
    step_through,
    to_layout,
    torch_attention,
)
from torch import nn

import continual_mha as co

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
CLIPS = {"one window": LENGTH, "longer than the window": LENGTH + 6}


def select_query(module, query):
    """The one token (N, 1, E) of a clip (N, S, E) whose output is asked for."""
    return query[:, [module.query_index]]


def assert_forward_equals_torch(module, tokens, all_queries=False, **masks):
    """Output and attention weights of a clip, laid out batch first."""
    query, key, value = tokens
    output, weights = module(*(to_layout(module, x) for x in tokens), **masks)
    output = from_layout(module, output)
    asked = query if all_queries else select_query(module, query)
    with torch.no_grad():
        exact, exact_weights = torch_attention(module, torch.float64)(asked, key, value, **masks)
        plain, plain_weights = torch_attention(module)(asked, key, value, **masks)
    assert_as_exact_as_torch(output, exact, plain)
    if plain_weights is None:
        assert weights is None
    else:
        assert_as_exact_as_torch(weights, exact_weights, plain_weights)
        assert weights.dtype == plain_weights.dtype


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_output_and_weights_equal_torch(construction, need_weights, clip, mode, backend):
    module = build(**CONSTRUCTIONS[construction])
    tokens = draw_tokens(module, 3, CLIPS[clip])
    with mode():
        assert_forward_equals_torch(module, tokens, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_all_queries_equal_torch(construction, need_weights, backend):
    module = build(**CONSTRUCTIONS[construction], single_output_forward=False)
    tokens = draw_tokens(module, 3, LENGTH)
    with torch.no_grad():
        assert_forward_equals_torch(module, tokens, all_queries=True, need_weights=need_weights)


@pytest.mark.parametrize("all_queries", [False, True])
@pytest.mark.parametrize("construction", ["defaults", "sequence_first", "embed_dim_second"])
def test_forward_returns_only_the_output_when_asked_to(construction, all_queries, backend):
    arguments = {**CONSTRUCTIONS[construction], "single_output_forward": not all_queries}
    both, alone = build(**arguments), build(**arguments, forward_returns_attn_mask=False)
    clip = to_layout(both, draw_tokens(both, 2, LENGTH)[0])
    with torch.no_grad():
        output = alone(clip)
        expected, _ = both(clip)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("embed_dim", "num_heads", "clip"), [(30, 3, 7), (64, 4, 64), (7, 7, 1), (33, 1, 120)]
)
def test_precisions_shapes_and_head_dims(embed_dim, num_heads, clip, dtype, backend):
    module = build(embed_dim=embed_dim, num_heads=num_heads, sequence_len=clip, dtype=dtype)
    with torch.no_grad():
        assert_forward_equals_torch(module, draw_tokens(module, 3, clip))
        assert_forward_equals_torch(module, draw_tokens(module, 3, clip), need_weights=False)


@pytest.mark.parametrize("construction", ["defaults", "bias_kv_and_zero_attn", "kdim_and_vdim"])
def test_many_streams_and_long_clips(construction, backend):
    """Long clips of few heads: where moving the projections to the query's side pays."""
    module = build(**{**CONSTRUCTIONS[construction], "embed_dim": 48}, sequence_len=96)
    with torch.no_grad():
        assert_forward_equals_torch(module, draw_tokens(module, 130, 96))
        assert_forward_equals_torch(module, draw_tokens(module, 130, 96), need_weights=False)


def masks_for(streams, heads, queries, keys, dtype=torch.float32):
    """Masks by name, as `torch.nn.MultiheadAttention` takes them; none hides a whole row."""
    generator = torch.Generator().manual_seed(7)

    def hidden(*shape):
        mask = torch.rand(shape, generator=generator, device="cpu") < 0.4
        mask[..., 0] = False
        return mask.to(torch.get_default_device())

    def added(*shape):
        mask = torch.randn(shape, generator=generator, device="cpu").to(dtype)
        return mask.to(torch.get_default_device())

    return {
        "padding": {"key_padding_mask": hidden(streams, keys)},
        "float padding": {"key_padding_mask": added(streams, keys)},
        "one attention mask": {"attn_mask": hidden(queries, keys)},
        "one float attention mask": {"attn_mask": added(queries, keys)},
        "attention mask per head": {"attn_mask": hidden(streams * heads, queries, keys)},
        "float attention mask per head": {"attn_mask": added(streams * heads, queries, keys)},
        "padding and attention mask": {
            "key_padding_mask": hidden(streams, keys),
            "attn_mask": hidden(queries, keys),
        },
        "both float": {
            "key_padding_mask": added(streams, keys),
            "attn_mask": added(streams * heads, queries, keys),
        },
    }


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", masks_for(1, 1, 1, 1))
@pytest.mark.parametrize(
    "construction",
    ["defaults", "sequence_first", "embed_dim_second", "bias_kv_and_zero_attn", "middle_query"],
)
def test_masks_act_as_in_torch(construction, mask, need_weights, backend):
    for all_queries in (False, True):
        module = build(**CONSTRUCTIONS[construction], single_output_forward=not all_queries)
        keys = LENGTH + 3
        masks = masks_for(3, module.num_heads, keys if all_queries else 1, keys)[mask]
        tokens = draw_tokens(module, 3, keys)
        with torch.no_grad():
            assert_forward_equals_torch(
                module, tokens, all_queries, need_weights=need_weights, **masks
            )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mask", ["none", *masks_for(1, 1, 1, 1)])
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_weights_of_each_head_equal_torch(construction, mask, training, backend):
    module = build(**CONSTRUCTIONS[construction]).train(training)
    tokens = draw_tokens(module, 3, LENGTH)
    asked = {"average_attn_weights": False}
    for all_queries in (False, True):
        module.single_output_forward = not all_queries
        queries = LENGTH if all_queries else 1
        masks = masks_for(3, module.num_heads, queries, LENGTH)[mask] if mask != "none" else {}
        assert_forward_equals_torch(module, tokens, all_queries, **asked, **masks)
        with torch.no_grad():
            assert_forward_equals_torch(module, tokens, all_queries, **asked, **masks)
            assert_forward_equals_torch(module, tokens, all_queries, need_weights=False, **asked)


def test_weights_of_each_head_over_a_long_clip(backend):
    """Where moving the projections to the query's side pays."""
    module = build(embed_dim=48, sequence_len=96)
    tokens = draw_tokens(module, 3, 96)
    assert_forward_equals_torch(module, tokens, average_attn_weights=False)
    _, weights = module(*tokens, average_attn_weights=False)
    assert weights.shape == (3, HEADS, 1, 96)
    assert weights.requires_grad


def test_gradient_of_the_weights_of_each_head_equals_torch(backend):
    module = build(dtype=torch.float64)
    tokens = draw_tokens(module, 3, LENGTH)
    _, weights = module(*tokens, average_attn_weights=False)
    _, expected = torch_attention(module)(
        select_query(module, tokens[0]), *tokens[1:], average_attn_weights=False
    )
    factor = torch.randn_like(weights)
    got, wanted = (
        torch.autograd.grad((x * factor).sum(), module.in_proj_weight) for x in (weights, expected)
    )
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", ["triton", "cuda", "cpu"])
def test_forced_backend_refuses_the_weights_of_each_head(name):
    module = build()
    tokens = draw_tokens(module, 3, LENGTH)
    with co.use_backend(name), pytest.raises(RuntimeError, match=f"{name}.*averages"):
        module(*tokens, average_attn_weights=False)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("all_queries", [False, True])
def test_causal_hint_changes_nothing_but_needs_its_mask(all_queries, need_weights, backend):
    module = build(single_output_forward=not all_queries)
    tokens = draw_tokens(module, 3, LENGTH)
    queries = LENGTH if all_queries else 1
    mask = torch.ones(queries, LENGTH, dtype=torch.bool).triu(LENGTH - queries + 1)
    asked = {"attn_mask": mask, "need_weights": need_weights}
    for answer, expected in zip(
        module(*tokens, **asked, is_causal=True), module(*tokens, **asked), strict=True
    ):
        torch.testing.assert_close(answer, expected)
    with pytest.raises(ValueError, match="attn_mask"):
        module(*tokens, need_weights=need_weights, is_causal=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_transformer_layers_of_torch_take_the_module(training, causal, backend):
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 16, dropout=0.0, batch_first=True)
    other = copy.deepcopy(layer)
    other.self_attn = build(single_output_forward=False)
    layer.self_attn.load_state_dict(other.self_attn.state_dict())
    clip = torch.randn(3, LENGTH, EMBED)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH) if causal else None
    given = {"src_mask": mask, "is_causal": causal}
    layer.train(training)
    other.train(training)
    torch.testing.assert_close(other(clip, **given), layer(clip, **given))


def test_mask_over_a_long_clip(backend):
    module = build(embed_dim=48, sequence_len=96)
    for masks in masks_for(3, module.num_heads, 1, 96).values():
        with torch.no_grad():
            tokens = draw_tokens(module, 3, 96)
            assert_forward_equals_torch(module, tokens, need_weights=False, **masks)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("construction", ["defaults", "head_dim_one", "kdim_and_vdim", "zero_attn"])
@pytest.mark.parametrize("returned", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_fully_masked_stream_answers_as_torch_and_spoils_no_other(
    need_weights, returned, construction, mode, backend
):
    """Which is NaN where weights are asked for, returned or not, and else the output's bias."""
    module = build(**CONSTRUCTIONS[construction], forward_returns_attn_mask=returned)
    tokens = draw_tokens(module, 3, LENGTH)
    mask = torch.zeros(3, LENGTH, dtype=torch.bool)
    mask[1] = True
    asked = {"key_padding_mask": mask, "need_weights": need_weights}
    with mode():
        answer = module(*tokens, **asked)
        expected, expected_weights = torch_attention(module)(
            select_query(module, tokens[0]), *tokens[1:], **asked
        )
    output, weights = answer if returned else (answer, None)
    assert expected[1].isnan().all() == (need_weights and not module.add_zero_attn)
    torch.testing.assert_close(output, expected, equal_nan=True)
    if need_weights and returned:
        torch.testing.assert_close(weights, expected_weights, equal_nan=True)


HIDDEN, UNKNOWN = -math.inf, math.nan
SPOILED = {
    "all": [UNKNOWN] * LENGTH,
    "one": [UNKNOWN, *[0.0] * (LENGTH - 1)],
    "first, others hidden": [UNKNOWN, *[HIDDEN] * (LENGTH - 1)],
    "last, others hidden": [*[HIDDEN] * (LENGTH - 1), UNKNOWN],
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("construction", ["defaults", "head_dim_one", "bias_kv", "zero_attn"])
@pytest.mark.parametrize("mask", SPOILED)
@pytest.mark.parametrize("need_weights", [True, False])
def test_stream_with_a_mask_of_nan_answers_nan_and_spoils_no_other(
    need_weights, mask, construction, mode, backend
):
    module = build(**CONSTRUCTIONS[construction])
    tokens = draw_tokens(module, 3, LENGTH)
    masks = torch.zeros(3, LENGTH)
    masks[1] = torch.tensor(SPOILED[mask])
    asked = {"key_padding_mask": masks, "need_weights": need_weights}
    with mode():
        output, weights = module(*tokens, **asked)
        expected, expected_weights = torch_attention(module)(
            select_query(module, tokens[0]), *tokens[1:], **asked
        )
    assert expected.isnan().flatten(1).any(1).tolist() == [False, True, False]
    torch.testing.assert_close(output, expected, equal_nan=True)
    if need_weights:
        torch.testing.assert_close(weights, expected_weights, equal_nan=True)


def test_masked_tokens_may_hold_anything_finite(backend):
    module = build()
    query, key, value = draw_tokens(module, 2, LENGTH)
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[:, 1] = True
    other_key, other_value = key.clone(), value.clone()
    other_key[:, 1], other_value[:, 1] = 1e4, -1e4
    with torch.no_grad():
        output, _ = module(query, key, value, key_padding_mask=mask)
        other, _ = module(query, other_key, other_value, key_padding_mask=mask)
    torch.testing.assert_close(output, other)


def test_key_and_value_default_to_the_query(backend):
    module = build()
    query, key, _ = draw_tokens(module, 2, LENGTH)
    with torch.no_grad():
        torch.testing.assert_close(module(query), module(query, query, query))
        torch.testing.assert_close(module(query, key), module(query, key, query))


@pytest.mark.parametrize("construction", ["defaults", "middle_query"])
def test_clip_and_stream_agree_and_do_not_disturb_each_other(construction, backend):
    module = build(**CONSTRUCTIONS[construction])
    x = draw_tokens(module, 2, 2 * LENGTH)[0]
    with torch.no_grad():
        for t in range(2 * LENGTH):
            last = module.forward_step(x[:, t])
            before = module.get_state()
            if t >= LENGTH - 1:
                output, _ = module.forward(x[:, t - LENGTH + 1 : t + 1])
                torch.testing.assert_close(output[:, 0], last, rtol=1e-5, atol=1e-6)
            assert_same_state(module.get_state(), before)


def test_strides_of_the_clip_do_not_matter(backend):
    module = build()
    x = draw_tokens(module, 3, LENGTH)[0]
    odd = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    with torch.no_grad():
        torch.testing.assert_close(module(odd), module(x))
        torch.testing.assert_close(
            module(x[:1].expand(3, -1, -1))[0], module(x[:1])[0].expand(3, -1, -1)
        )


def test_forward_repeats_bit_for_bit(backend):
    module = build(embed_dim=48, sequence_len=96)
    x = draw_tokens(module, 5, 96)[0]
    with torch.no_grad():
        first, _ = module(x, need_weights=False)
        second, _ = module(x, need_weights=False)
    assert torch.equal(first, second)


def show_attention(dropout, **arguments):
    """A module whose output is its attention weights.

    Value and output projections are identities. With one-hot values v_t = e_t, repeated for each
    head, output[n, h * L + t] is the weight that head h gives token t.
    """
    module = build(embed_dim=2 * LENGTH, num_heads=2, dropout=dropout, bias=False, **arguments)
    embed = module.embed_dim
    with torch.no_grad():
        module.in_proj_weight[2 * embed :] = torch.eye(embed)
        module.out_proj.weight.copy_(torch.eye(embed))
    return module


def call(module, way, query, key, value):
    """The newest window's output (N, E) by each of the three forwards."""
    if way == "forward":
        return module.forward(query, key, value, need_weights=False)[0][:, 0]
    module.clean_state()
    if way == "forward_steps":
        return module.forward_steps(query, key, value)[:, -1]
    return step_through(module, query, key, value)[-1]


WAYS = ["forward", "forward_step", "forward_steps"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("way", WAYS)
def test_dropout_while_training_drops_attention_weights(way, mode, backend):
    """Each weight is dropped with probability p on its own, or divided by 1 - p."""
    p, streams = 0.4, 2000
    module = show_attention(p)
    query, key, _ = (x.expand(streams, -1, -1) for x in draw_tokens(module, 1, LENGTH))
    value = torch.eye(LENGTH).repeat(1, 2).expand(streams, -1, -1)
    with mode():
        kept = call(module.eval(), way, query, key, value).detach()
        dropped = call(module.train(), way, query, key, value).detach()
    torch.testing.assert_close(kept.view(streams, 2, LENGTH).sum(-1), torch.ones(streams, 2))
    zero = dropped == 0
    torch.testing.assert_close(dropped[~zero], (kept / (1 - p))[~zero], rtol=1e-4, atol=1e-5)
    rate = zero.float().mean(0)
    assert (rate - p).abs().max() < 6 * (p * (1 - p) / streams) ** 0.5
    # Independent between streams, heads and tokens: correlations vanish.
    centred = zero.float() - rate
    correlation = (centred.T @ centred) / streams / (p * (1 - p))
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 6 / streams**0.5


@pytest.mark.parametrize("way", WAYS)
def test_mean_under_dropout_is_the_output_without(way, backend):
    streams = 4000
    module = build(dropout=0.3, add_bias_kv=True, add_zero_attn=True)
    tokens = [x.expand(streams, -1, -1) for x in draw_tokens(module, 1, LENGTH)]
    with torch.no_grad():
        exact = call(module.eval(), way, *tokens)[0]
        noisy = call(module.train(), way, *tokens)
    assert (noisy.mean(0) - exact).abs().max() < 6 * (noisy.std(0) / streams**0.5).max()
    assert noisy.std(0).min() > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_dropout_of_everything_leaves_the_output_bias(way, backend):
    module = build(dropout=1.0)
    tokens = draw_tokens(module, 2, LENGTH)
    with torch.no_grad():
        output = call(module.train(), way, *tokens)
    torch.testing.assert_close(output, module.out_proj.bias.expand(2, -1))


@pytest.mark.parametrize("way", WAYS)
def test_dropout_does_nothing_in_evaluation(way, backend):
    dropping, plain = build(dropout=0.5).eval(), build()
    tokens = draw_tokens(plain, 2, LENGTH)
    with torch.no_grad():
        torch.testing.assert_close(
            call(dropping, way, *tokens), call(plain, way, *tokens), rtol=0, atol=0
        )


def test_weights_returned_while_training_are_those_applied(backend):
    """As in torch, averaged over the heads after dropout."""
    module = show_attention(0.5).train()
    query, key, _ = draw_tokens(module, 40, LENGTH)
    value = torch.eye(LENGTH).repeat(1, 2).expand(40, -1, -1)
    with torch.no_grad():
        output, weights = module(query, key, value)
    applied = output[:, 0].view(40, 2, LENGTH)
    assert (applied == 0).any()
    torch.testing.assert_close(weights[:, 0], applied.mean(1))
