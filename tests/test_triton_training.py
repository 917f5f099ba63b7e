"""Gradients of the module through Triton's kernels, in float64 and so in the interpreter alone."""

from __future__ import annotations

import pytest
import torch
from oracles import CONSTRUCTIONS, LENGTH, build, draw_tokens, run_steps, step_through, to_layout
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck
from triton_cases import INTERPRETED, needs_kernels

import continual_mha as co
from continual_mha import backends

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter alone"),
]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that ran on Triton, which every operator that it covers does."""
    seen: list[str] = []
    choose = backends.choose

    def noted(name: str, args: tuple) -> object:
        seen.append(name)
        return choose(name, args)

    monkeypatch.setattr(backends, "order", lambda device_type: ("triton", "torch"))
    monkeypatch.setattr(backends, "choose", noted)
    return seen


def outputs(module: torch.nn.Module, way: str, tokens: tuple[Tensor, ...]) -> list[Tensor]:
    """What a call answers to tokens (N, S, features), in any layout."""
    module.clean_state()
    if way == "forward_step":
        return [x for x in step_through(module, *tokens) if x is not None]
    if way == "forward_steps":
        early, late = [x[:, :3] for x in tokens], [x[:, 3:] for x in tokens]
        answers = [run_steps(module, *early), run_steps(module, *late)]
        return [x for x in answers if x is not None]
    return [x for x in module(*(to_layout(module, x) for x in tokens)) if x is not None]


def differentiate(module: torch.nn.Module, way: str, tokens: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tokens]
    answers = outputs(module, way, tuple(leaves))
    generator = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in answers]
    inputs = [*leaves, *module.parameters()]
    grads = torch.autograd.grad(answers, inputs, cotangents, allow_unused=True)
    return [*answers, *(x for x in grads if x is not None)]


OPERATORS = {
    "forward": "attend_shared_full_backward",
    "forward_steps": "attend_window_backward",
    "forward_step": "attend_window_backward",
}


CHOSEN = (
    "defaults",
    "kdim_and_vdim_without_bias_with_extra_slots",
    "delayed_query_with_extra_slots",
    "sequence_first_delayed_with_kdim",
)


@pytest.mark.parametrize("way", OPERATORS)
@pytest.mark.parametrize("construction", CHOSEN)
def test_outputs_weights_and_gradients_equal_plain_pytorch(
    construction: str, way: str, launches: list[str]
) -> None:
    module = build(**CONSTRUCTIONS[construction], dtype=torch.float64)
    tokens = draw_tokens(module, 2, LENGTH + 2)
    mine = differentiate(module, way, tokens)
    assert OPERATORS[way] in launches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "order", lambda device_type: ("torch",))
        plain = differentiate(module, way, tokens)
    assert len(mine) == len(plain)
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", ["forward", "forward_steps"])
def test_dropout_is_differentiated_as_it_was_drawn(way: str, launches: list[str]) -> None:
    module = build(
        embed_dim=2, num_heads=1, add_bias_kv=True, sequence_len=3, dropout=0.4, dtype=torch.float64
    ).train()
    x = draw_tokens(module, 1, 4)[0].requires_grad_()

    def call(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        return tuple(outputs(module, way, (x, x, x)))

    weights = (module.in_proj_weight, module.bias_k, module.bias_v)
    assert gradcheck(call, (x, *weights), fast_mode=True)
    assert OPERATORS[way] in launches
    first, again = call(x), call(x)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    others = [outputs(module, way, (x, x, x))[0] for _ in range(6)]
    assert any(not torch.equal(first[0], other) for other in others)


@pytest.mark.parametrize("way", ["forward_step", "forward_steps"])
def test_a_gradient_through_the_state_reaches_the_ring_and_no_paused_stream(way: str) -> None:
    module = build(dtype=torch.float64).requires_grad_(False)
    early, late = draw_tokens(module, 2, LENGTH)[0].requires_grad_(), draw_tokens(module, 2, 2)[1]
    active = torch.tensor([True, False])
    grads, positions = [], []
    for name in ("triton", "torch"):
        with co.use_backend(name):
            module.clean_state()
            module.forward_steps(early)
            if way == "forward_step":
                module.forward_step(late[:, 0], active=active)
                out = module.forward_step(late[:, 1], active=active)
            else:
                out = module.forward_steps(late)
            grads.append(torch.autograd.grad(out.sum(), early)[0])
            positions.append(module.get_state().position)
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
    assert torch.equal(*positions)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("way", OPERATORS)
def test_training_compiles_and_does_not_recompile(way: str) -> None:
    torch._dynamo.reset()
    module = build(
        embed_dim=4, sequence_len=3, add_zero_attn=True, query_index=-2, dtype=torch.float64
    )
    x = draw_tokens(module, 1, 9)[0].requires_grad_()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(getattr(module, way), fullgraph=True, backend=counter)

    def train(call: object) -> list[Tensor]:
        module.clean_state()
        if way == "forward":
            answers = [out for t in range(3) for out in call(x[:, t : t + 4])]
        elif way == "forward_steps":
            answers = [call(x[:, t : t + 3]) for t in range(0, 9, 3)]
        else:
            answers = [call(x[:, t]) for t in range(9)]
        loss = sum(out.square().sum() for out in answers if out is not None)
        return list(torch.autograd.grad(loss, (x, *module.parameters())))

    got = train(call)
    seen = counter.frame_count
    got = train(call)
    assert counter.frame_count == seen
    for a, b in zip(got, train(getattr(module, way)), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()
