"""`forward_step` with a gradient through Triton's kernels: one node of autograd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracles import LENGTH, build
from torch.autograd import gradcheck, gradgradcheck
from trained_streams import (
    STREAMS,
    assert_as_plain,
    assert_autocast_around_the_backward_changes_nothing,
    assert_many_gradients_at_once,
    drawn_calls,
    is_step_node,
)
from triton_cases import INTERPRETED, needs_kernels

import continual_mha as co

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter alone"),
]
SMALL = {"embed_dim": 4, "num_heads": 2, "sequence_len": 3, "dtype": torch.float64}


@pytest.fixture(autouse=True)
def by_triton() -> Iterator[None]:
    with co.use_backend("triton"):
        yield


CONSTRUCTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no bias": {"bias": False},
    "kdim and vdim": {"kdim": 3, "vdim": 5},
    "kdim and vdim without bias": {"kdim": 3, "vdim": 5, "bias": False},
    "window of one": {"sequence_len": 1},
    "slots and queries that wait": {
        "add_bias_kv": True, "add_zero_attn": True, "query_index": 0,
    },
    "inputs": {"formulation": "input"},
    "inputs, queries that wait": {"formulation": "input", "query_index": 0},
    "inputs, a learned slot": {"formulation": "input", "add_bias_kv": True, "query_index": -2},
}  # fmt: skip


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_gradients_flow_through_the_rings_as_in_plain_pytorch(construction: str) -> None:
    module = build(**{**SMALL, **CONSTRUCTIONS[construction]})
    kind = "all" if "kdim" in construction else "one"
    steps = drawn_calls(module, module.sequence_len + 3, kind)
    module.start_streams(STREAMS)
    assert is_step_node(module.forward_step(*steps[0]))
    assert "triton: runs it, and makes new rings" in co.explain(module, *steps[0])
    assert_as_plain(module, steps, every=2)  # the others only let theirs through


@pytest.mark.parametrize("kind", ["key", "all"])
def test_tokens_of_their_own_have_gradients_of_their_own(kind: str) -> None:
    module = build(**SMALL)
    assert_as_plain(module, drawn_calls(module, LENGTH, kind))


def test_streams_of_different_age() -> None:
    module = build(**SMALL)
    assert_as_plain(module, drawn_calls(module, LENGTH), active=torch.tensor([True, False, True]))


@pytest.mark.parametrize(
    "trained", ["", "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
)
@pytest.mark.parametrize("of_tokens", [False, True])
def test_what_is_frozen_has_no_gradient(trained: str, of_tokens: bool) -> None:
    module = build(**SMALL)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == trained)
    steps = drawn_calls(module, 4)
    for given in steps:
        given[0].requires_grad_(of_tokens)
    if trained or of_tokens:
        assert_as_plain(module, steps)


def test_a_graph_that_ends_at_the_state() -> None:
    """Then the rings before need no gradient, and those of other slots are not computed."""
    module = build(**SMALL)
    steps = drawn_calls(module, 6)
    found = []
    for name in ("triton", "torch"):
        with co.use_backend(name):
            module.clean_state()
            module.start_streams(STREAMS)
            for given in steps:
                module.detach_state()
                out = module.forward_step(*given)
            leaves = [steps[-1][0], *module.parameters()]
            found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def test_what_no_token_of_a_stream_has_written_is_not_read() -> None:
    module = build(**SMALL)
    (x, *_), *_ = drawn_calls(module, 1)
    module.start_streams(STREAMS)
    state = module.get_state()
    assert state is not None
    state.k.fill_(torch.nan)
    state.v.fill_(torch.nan)
    module.set_state(state)
    out = module.forward_step(x)
    found = torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
    assert all(y.isfinite().all() for y in (out, *found))


def test_second_derivatives_and_many_gradients_at_once() -> None:
    module = build(**SMALL)
    xs = [torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def last(*xs: torch.Tensor) -> torch.Tensor:
        module.clean_state()
        module.start_streams(2)
        return [module.forward_step(x) for x in xs][-1]

    assert gradcheck(last, xs, fast_mode=True)
    assert gradgradcheck(last, xs, fast_mode=True)
    assert_many_gradients_at_once(last(*xs), xs)


def test_autocast_around_the_backward_alone_changes_nothing() -> None:
    module = build(**{**SMALL, "dtype": torch.float32})
    (x, *_), *_ = drawn_calls(module, 1)
    module.start_streams(STREAMS)
    total = module.forward_step(x).sum()
    leaves = [x, *module.parameters()]
    assert_autocast_around_the_backward_changes_nothing(total, leaves)


def test_dropout_is_left_to_operators_that_autograd_knows() -> None:
    module = build(**SMALL, dropout=0.5)
    (x, *_), *_ = drawn_calls(module, 1)
    module.start_streams(STREAMS)
    assert not is_step_node(module.forward_step(x))
    assert "triton: attends" in co.explain(module, x)
