"""`forward_step` with a gradient on the CPU: one node of autograd, and what it gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import LENGTH, build, draw_tokens
from torch import Tensor
from torch.autograd import gradcheck
from trained_streams import (
    STREAMS,
    assert_as_exact,
    assert_as_plain,
    assert_autocast_around_the_backward_changes_nothing,
    assert_many_gradients_at_once,
    drawn_calls,
    is_step_node,
)

import continual_mha as co
from continual_mha import backends

pytestmark = pytest.mark.skipif("cpu" not in backends.available(), reason="plain PyTorch runs")


CONSTRUCTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no bias": {"bias": False},
    "kdim and vdim": {"kdim": 7, "vdim": 10},
    "window of one": {"sequence_len": 1},
    "one head": {"num_heads": 1},
}


@pytest.mark.parametrize("count", [1, LENGTH, 2 * LENGTH + 3])
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_gradients_flow_through_the_rings_as_in_plain_pytorch(
    construction: str, count: int
) -> None:
    module = build(**CONSTRUCTIONS[construction], dtype=torch.float64)
    steps = drawn_calls(module, count, "all" if "kdim" in construction else "one")
    module.start_streams(STREAMS)
    assert is_step_node(module.forward_step(*steps[0]))
    assert_as_plain(module, steps)


@pytest.mark.parametrize("kind", ["key", "all"])
def test_tokens_of_their_own_have_gradients_of_their_own(kind: str) -> None:
    module = build(dtype=torch.float64)
    assert_as_plain(module, drawn_calls(module, LENGTH + 4, kind))


def test_streams_of_different_age() -> None:
    module = build(dtype=torch.float64)
    active = torch.tensor([True, False, True])
    assert_as_plain(module, drawn_calls(module, LENGTH + 4), active=active)


@pytest.mark.parametrize(
    "trained", ["", "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
)
@pytest.mark.parametrize("of_tokens", [False, True])
def test_what_is_frozen_has_no_gradient(trained: str, of_tokens: bool) -> None:
    module = build(dtype=torch.float64)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == trained)
    steps = drawn_calls(module, LENGTH + 3)
    for given in steps:
        given[0].requires_grad_(of_tokens)
    if trained or of_tokens:
        assert_as_plain(module, steps)
    else:
        assert not module.forward_step(steps[0][0], update_state=False)


@pytest.mark.parametrize("call", ["forward_step", "forward_steps"])
@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_rings_of_which_nothing_is_trained_need_no_gradient(formulation: str, call: str) -> None:
    """Or a graph would hold all steps before, though no gradient reaches them."""
    module = build(formulation=formulation)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(formulation == "input" or name.startswith("out_proj"))
    x = drawn_calls(module, [3])[0][0].detach()
    module.start_streams(STREAMS)
    for _ in range(3):
        out = module.forward_step(x[:, 0]) if call == "forward_step" else module.forward_steps(x)
        assert out.requires_grad
        state = module.get_state()
        assert state is not None
        assert not any(part.requires_grad for part in state)


def test_what_no_token_of_a_stream_has_written_is_not_read() -> None:
    module = build(dtype=torch.float64)
    steps = drawn_calls(module, LENGTH + 2)
    with torch.no_grad():
        for given in steps:
            module.forward_step(*given)
        state = module.get_state()
        assert state is not None
        state.k.fill_(torch.nan)
        state.v.fill_(torch.nan)
        module.reset([0, 1, 2])
    out = module.forward_step(*steps[0])
    found = torch.autograd.grad(out.square().sum(), [steps[0][0], *module.parameters()])
    assert all(x.isfinite().all() for x in (out, *found))


SPECIAL: dict[str, dict[str, Any]] = {
    "learned slot": {"add_bias_kv": True},
    "slot of zeros": {"add_zero_attn": True},
    "queries that wait": {"query_index": 0},
    "all three": {"add_bias_kv": True, "add_zero_attn": True, "query_index": -2},
    "inputs": {"formulation": "input"},
    "inputs, queries that wait": {"formulation": "input", "query_index": -3},
    "inputs, all three": {
        "formulation": "input", "add_bias_kv": True, "add_zero_attn": True, "query_index": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("every", [3, 100])
@pytest.mark.parametrize("construction", [*CONSTRUCTIONS, *SPECIAL])
def test_outputs_that_nobody_uses_let_gradients_through(construction: str, every: int) -> None:
    module = build(**{**CONSTRUCTIONS, **SPECIAL}[construction], dtype=torch.float64)
    steps = drawn_calls(module, 2 * LENGTH + 3, "all" if "kdim" in construction else "one")
    module.start_streams(STREAMS)
    assert is_step_node(module.forward_step(*steps[0]))
    assert_as_plain(module, steps, every=every)
    if construction == "defaults":
        module.in_proj_weight.requires_grad_(False)
        for token, *_ in steps[::2]:
            token.requires_grad_(False)
        assert_as_plain(module, steps, every=every)


@pytest.mark.parametrize("construction", SPECIAL)
def test_gradients_beside_extra_slots_and_queries_that_wait(construction: str) -> None:
    """Those of the rings too, through a whole window."""
    module = build(**SPECIAL[construction], dtype=torch.float64)
    steps = drawn_calls(module, 2 * LENGTH + 1)
    module.start_streams(STREAMS)
    for given in steps:
        out = module.forward_step(*given)
        assert out is None or is_step_node(out)
    assert "cpu: runs it, and makes new rings" in co.explain(module, steps[0][0])
    assert_as_plain(module, steps)
    assert_as_plain(module, steps, active=torch.tensor([True, False, True]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"add_bias_kv": True}, "torch: runs it"),
        ({"query_index": 0}, "torch: runs it"),
        ({"formulation": "input"}, "cpu: attends"),
    ],
    ids=str,
)
def test_dropout_is_left_to_operators_that_autograd_knows(
    arguments: dict[str, Any], said: str
) -> None:
    module = build(dropout=0.5, **arguments)
    (x, *_), *_ = drawn_calls(module, 1)
    module.start_streams(STREAMS)
    for _ in range(2 * LENGTH):
        out = module.forward_step(x)
    assert out.requires_grad
    assert not is_step_node(out)
    assert said in co.explain(module, x)


@pytest.mark.parametrize("active", [None, [True, False, True]])
def test_a_step_with_dropout_is_a_clip_of_one_token(active: list[bool] | None) -> None:
    module = build(dropout=0.5, dtype=torch.float64)
    (x, *_), (y, *_) = drawn_calls(module, 2)
    seen = torch.randn(STREAMS, LENGTH + 1, module.embed_dim, dtype=torch.float64)
    leaves = [x, y, *module.parameters()]
    mask = None if active is None else torch.tensor(active)
    found = []
    for by_steps in (False, True):
        torch.manual_seed(5)
        module.start_streams(STREAMS)
        with torch.no_grad():
            module.eval().forward_steps(seen)
        module.train()
        outs = []
        for token in (x, y):
            if by_steps:
                before = module.get_state()
                out = module.forward_steps(token[:, None])
                if mask is not None:
                    state = module.get_state()
                    assert state is not None
                    assert before is not None
                    at = torch.where(mask, state.position, before.position)
                    module.set_state(state._replace(position=at))
                assert out is not None
                outs.append(out[:, 0])
            else:
                outs.append(module.forward_step(token, active=mask))
        total = outs[0].square().sum() + outs[1].sum()
        found.append([*outs, *torch.autograd.grad(total, leaves)])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)
    assert "cpu: runs it, and makes new rings" in co.explain(module, x)
    with co.use_backend("cpu"):
        assert module.forward_step(x).requires_grad


def test_who_forces_it_is_told_that_dropout_has_no_kernel() -> None:
    module = build(dropout=0.5, add_bias_kv=True)
    (x, *_), *_ = drawn_calls(module, 1)
    with co.use_backend("cpu"):
        with pytest.raises(RuntimeError, match="cpu: a gradient is needed"):
            module.forward_step(x)
        assert "cpu: a gradient is needed" in co.explain(module, x)


@pytest.mark.parametrize("construction", ["learned slot", "queries that wait", "all three"])
@pytest.mark.parametrize("trained", ["bias_k", "bias_v", "in_proj_weight", "out_proj.bias", "x"])
def test_of_a_step_beside_extra_slots_one_part_is_trained(construction: str, trained: str) -> None:
    module = build(**SPECIAL[construction], dtype=torch.float64)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == trained)
    steps = drawn_calls(module, LENGTH + 3)
    for given in steps:
        given[0].requires_grad_(trained == "x")
    if trained == "x" or any(p.requires_grad for p in module.parameters()):
        assert_as_plain(module, steps)


def test_a_state_that_lies_as_it_likes() -> None:
    module = build(dtype=torch.float64)
    steps = drawn_calls(module, LENGTH + 1)
    with torch.no_grad():
        for given in steps:
            module.forward_step(*given)
    state = module.get_state()
    assert state is not None
    turned = state._replace(k=state.k.transpose(2, 3).contiguous().transpose(2, 3))
    (expected, _), (out, _) = (module._forward_step(*steps[0], s) for s in (state, turned))
    assert out is not None
    assert is_step_node(out)
    grads = [torch.autograd.grad(y.square().sum(), steps[0][0])[0] for y in (expected, out)]
    assert torch.equal(out, expected)
    assert torch.equal(*grads)


@pytest.mark.parametrize("arguments", [{}, {"kdim": 7, "vdim": 10}], ids=str)
def test_many_streams_for_which_torch_multiplies(arguments: dict[str, Any]) -> None:
    module = build(dtype=torch.float64, **arguments)
    tokens = [x[:, 0].requires_grad_() for x in draw_tokens(module, 70, 1)]
    given = tokens if arguments else tokens[:1]

    def trained() -> list[Tensor]:
        module.clean_state()
        module.start_streams(70)
        out = module.forward_step(*given)
        return [out, *torch.autograd.grad(out.square().sum(), [*given, *module.parameters()])]

    found = trained()
    assert is_step_node(found[0])
    with co.use_backend("torch"):
        expected = trained()
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def test_explain_says_that_it_runs() -> None:
    module = build()
    assert "cpu: runs it, and makes new rings" in co.explain(module, drawn_calls(module, 1)[0][0])


@pytest.mark.parametrize(
    "arguments",
    [{}, {"add_bias_kv": True, "add_zero_attn": True, "query_index": -2}, {"formulation": "input"}],
    ids=str,
)
def test_second_derivatives_and_many_gradients_at_once(arguments: dict[str, Any]) -> None:
    sizes = {"embed_dim": 6, "num_heads": 2, "sequence_len": 3}
    module = build(**sizes, **arguments, dtype=torch.float64)
    module.start_streams(2)
    xs = [torch.randn(2, 6, dtype=torch.float64, requires_grad=True) for _ in range(4)]

    def last(*xs: Tensor) -> Tensor:
        module.clean_state()
        module.start_streams(2)
        outs = [module.forward_step(x) for x in xs]
        assert is_step_node(outs[-1])
        return outs[-1]

    assert gradcheck(last, xs)
    assert torch.autograd.gradgradcheck(last, xs)
    assert_many_gradients_at_once(last(*xs), xs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_as_exact_as_plain_pytorch(dtype: torch.dtype, isa: str) -> None:
    module = build(embed_dim=32, num_heads=4, dtype=dtype)
    assert_as_exact(module, drawn_calls(module, LENGTH + 2))


def test_autocast_around_the_backward_alone_changes_nothing() -> None:
    module = build()
    (x, *_), *_ = drawn_calls(module, 1)
    module.start_streams(STREAMS)
    total = module.forward_step(x).sum()
    leaves = [x, *module.parameters()]
    assert_autocast_around_the_backward_changes_nothing(total, leaves)


@pytest.mark.parametrize("formulation", ["kv", "input"])
@pytest.mark.parametrize("arguments", [{}, {"query_index": 1}, {"add_bias_kv": True}], ids=str)
def test_no_streams_have_gradients_of_zero(arguments: dict[str, Any], formulation: str) -> None:
    module = build(**arguments, formulation=formulation)
    module.start_streams(0)
    clip = torch.zeros(0, LENGTH, module.embed_dim, requires_grad=True)
    for out in (module.forward_step(clip[:, 0]), module.forward_steps(clip), module(clip)[0]):
        leaves = [clip, *module.parameters()]
        found = torch.autograd.grad(out.sum(), leaves, allow_unused=True, retain_graph=True)
        assert found[0].shape == clip.shape
        assert not any(y is not None and y.any() for y in found)


def test_the_librarys_operator_refuses_what_does_not_fit_together() -> None:
    """Its kernel would read and write past the end of it."""
    backends.why_missing("cpu")
    operator = torch.ops.continual_mha.cpu_ring_step_backward
    N, H, L, D = STREAMS, 2, LENGTH, 6
    E = H * D
    x, ring, position = torch.ones(N, E), torch.ones(N, H, L, D), torch.zeros(N, dtype=torch.int64)
    weights = (torch.ones(3 * E, E), None, None, None, torch.ones(E, E), None)
    given = (x, ring, ring, x, None, None, ring, ring, *weights, position, [True] * 11)
    assert operator(*given)[0].shape == (N, E)
    for place, wrong in (
        (0, x[1:]),
        (0, x.double()),
        (1, ring[:, :, 1:]),
        (2, ring[..., 1:]),
        (3, torch.ones(N, E + 1)),
        (4, torch.ones(N, E + 1)),
        (5, x.unsqueeze(1)),
        (6, ring.transpose(2, 3).contiguous().transpose(2, 3)),
        (6, ring[0]),
        (7, ring[1:]),
        (8, torch.ones(E, E)),
        (11, torch.ones(E)),
        (12, torch.ones(E, E + 1)),
        (14, position[1:]),
        (14, position.int()),
        (15, [True] * 10),
    ):
        with pytest.raises(RuntimeError, match="cpu_ring_step_backward"):
            operator(*given[:place], wrong, *given[place + 1 :])
