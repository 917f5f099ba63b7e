"""`forward_steps` with a gradient on the CPU: one node of autograd, and what it gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import LENGTH, build
from torch import Tensor
from torch.autograd import gradcheck
from trained_streams import (
    STREAMS,
    assert_as_exact,
    assert_as_plain,
    assert_many_gradients_at_once,
    drawn_calls,
    run,
)

import continual_mha as co
from continual_mha import backends, reference, steps_node, windows

pytestmark = pytest.mark.skipif("cpu" not in backends.available(), reason="plain PyTorch runs")

# From cold on; all slots written at once; more tokens than the kernels take torch's products for.
CHUNKS = {
    "one": [LENGTH + 2],
    "through the rings": [2, LENGTH - 2, LENGTH, 1, 3],
    "longer than the window": [3 * LENGTH, 2 * LENGTH + 1],
    "until warm": [1, LENGTH - 2, 1],
    "many": [20, 40],
}
CONSTRUCTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no bias": {"bias": False},
    "kdim and vdim": {"kdim": 7, "vdim": 10},
    "window of one": {"sequence_len": 1},
    "one head": {"num_heads": 1},
}


def is_one_node(out: Tensor | None) -> bool:
    return out is not None and out.grad_fn is not None and "_StepsBackward" in out.grad_fn.name()


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_gradients_flow_through_the_rings_as_in_plain_pytorch(
    construction: str, chunks: str
) -> None:
    module = build(**CONSTRUCTIONS[construction], dtype=torch.float64)
    calls = drawn_calls(module, CHUNKS[chunks], "all" if "kdim" in construction else "one")
    assert_as_plain(module, calls)
    assert is_one_node(module.forward_steps(*calls[-1]))


@pytest.mark.parametrize("construction", ["defaults", "kdim and vdim", "window of one"])
@pytest.mark.parametrize("chunks", ["through the rings", "longer than the window", "many"])
def test_whole_outputs_that_nobody_uses(construction: str, chunks: str) -> None:
    """Of whose calls only the rings have a gradient."""
    module = build(**CONSTRUCTIONS[construction], dtype=torch.float64)
    calls = drawn_calls(module, CHUNKS[chunks], "all" if "kdim" in construction else "one")
    assert_as_plain(module, calls, every=len(calls))


@pytest.mark.parametrize("chunks", ["through the rings", "many"])
@pytest.mark.parametrize("kind", ["key", "all"])
def test_tokens_of_their_own_have_gradients_of_their_own(kind: str, chunks: str) -> None:
    module = build(dtype=torch.float64)
    assert_as_plain(module, drawn_calls(module, CHUNKS[chunks], kind))


@pytest.mark.parametrize("layout", [{"batch_first": False}, {"embed_dim_second": True}], ids=str)
def test_clips_of_any_layout(layout: dict[str, Any]) -> None:
    module = build(dtype=torch.float64)
    calls = drawn_calls(module, CHUNKS["many"])
    expected = run(module, calls)
    other = build(dtype=torch.float64, **layout)
    axes = (0, 1) if "batch_first" in layout else (1, 2)
    turned = [(x[0].detach().transpose(*axes).contiguous().requires_grad_(),) * 3 for x in calls]
    found = run(other, turned)
    for left, right in zip(found, expected, strict=True):
        assert left is not None
        assert right is not None
        if left.dim() == 3:
            left = left.transpose(*axes)
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize(
    "trained", ["", "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
)
@pytest.mark.parametrize("of_tokens", [False, True])
def test_what_is_frozen_has_no_gradient(trained: str, of_tokens: bool) -> None:
    module = build(dtype=torch.float64)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == trained)
    calls = drawn_calls(module, CHUNKS["through the rings"])
    for given in calls:
        given[0].requires_grad_(of_tokens)
    if trained or of_tokens:
        assert_as_plain(module, calls)
    else:
        out = module.forward_steps(torch.randn(STREAMS, LENGTH, module.embed_dim).double())
        assert out is not None
        assert not out.requires_grad


def test_steps_and_single_steps_make_one_graph() -> None:
    module = build(dtype=torch.float64)
    x = torch.randn(STREAMS, 4 * LENGTH, module.embed_dim, dtype=torch.float64, requires_grad=True)

    def trained(sizes: list[int]) -> list[Tensor]:
        module.clean_state()
        outs = []
        for part in x.split(sizes, dim=1):
            if part.shape[1] == 1:
                out = module.forward_step(part[:, 0])
                outs.append(None if out is None else out[:, None])
            else:
                outs.append(module.forward_steps(part))
        out = torch.cat([y for y in outs if y is not None], dim=1)
        wanted = [x, *module.parameters()]
        return [out, *torch.autograd.grad(out.square().sum(), wanted)]

    mixed = trained([LENGTH - 2, 1, 1, LENGTH - 1, 1, LENGTH, 1, LENGTH - 1])
    for left, right in zip(mixed, trained([1] * 4 * LENGTH), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def test_tokens_that_are_not_remembered_have_gradients_all_the_same() -> None:
    module = build(dtype=torch.float64)
    (first,), (x,) = (given[:1] for given in drawn_calls(module, [LENGTH + 1, 3]))
    module.forward_steps(first)
    out = module.forward_steps(x, update_state=False)
    again = module.forward_steps(x)
    assert is_one_node(out)
    assert out is not None
    assert again is not None
    grads = [
        torch.autograd.grad(y.square().sum(), (first, x), retain_graph=True) for y in (out, again)
    ]
    assert torch.equal(out, again)
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("count", [2, 2 * LENGTH])
def test_streams_of_different_age_and_what_none_has_written(count: int) -> None:
    module = build(dtype=torch.float64)
    calls = drawn_calls(module, [LENGTH + 2, count])
    with torch.no_grad():
        module.forward_steps(*calls[0])
        state = module.get_state()
        assert state is not None
        module.reset([1])
        for ring in (state.k, state.v):
            ring[1] = torch.nan

    def trained() -> list[Tensor]:
        out = module.forward_steps(*calls[1], update_state=False)
        assert out is not None
        wanted = [calls[1][0], *module.parameters()]
        return [out, *torch.autograd.grad(out.square().sum(), wanted)]

    found = trained()
    assert is_one_node(found[0])
    with co.use_backend("torch"):
        expected = trained()
    for left, right in zip(found, expected, strict=True):
        assert left.isfinite().all()
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "arguments", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"query_index": 0}], ids=str
)
def test_what_it_does_not_know_is_attended_to_by_the_kernel_alone(
    arguments: dict[str, Any],
) -> None:
    module = build(**arguments)
    calls = drawn_calls(module, [3 * LENGTH])
    with co.use_backend("cpu"):
        out = module.forward_steps(*calls[0])
    assert out is not None
    assert out.requires_grad
    assert not is_one_node(out)
    explained = co.explain(module, calls[0][0])
    assert explained.endswith("cpu: attends, where it covers sizes and dtype, or else torch")


def test_dropout_is_that_of_plain_pytorch_from_the_same_seed(isa: str) -> None:
    found = []
    for plain in (False, True):
        module = build(dropout=0.4, dtype=torch.float64).train()
        calls = drawn_calls(module, [LENGTH + 3, 2 * LENGTH])
        torch.manual_seed(5)
        with pytest.MonkeyPatch.context() as patch:
            if plain:
                patch.setattr(steps_node, "why_not", lambda *args: "this is the other")
                patch.setattr(
                    windows.ops, "call", lambda name, *args: reference.attend_window(*args)
                )
            found.append(run(module, calls))
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-9)


def test_a_state_that_lies_as_it_likes() -> None:
    module = build(dtype=torch.float64)
    (x, *_), (y, *_) = drawn_calls(module, [LENGTH + 1, 3])
    with torch.no_grad():
        module.forward_steps(x)
    state = module.get_state()
    assert state is not None
    turned = state._replace(
        k=state.k.transpose(2, 3).contiguous().transpose(2, 3),
        position=state.position.repeat_interleave(2)[::2],
    )
    found = []
    for given in (state, turned):
        module.set_state(given)
        out = module.forward_steps(y)
        assert is_one_node(out)
        assert out is not None
        found.append((out, *torch.autograd.grad(out.square().sum(), [y, *module.parameters()])))
    assert all(map(torch.equal, *found))


def test_explain_says_that_it_runs() -> None:
    module = build()
    clip = drawn_calls(module, [4])[0][0]
    assert "cpu: runs it, and makes new rings" in co.explain(module, clip)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_second_derivatives_and_many_gradients_at_once(dropout: float) -> None:
    module = build(embed_dim=6, num_heads=2, sequence_len=3, dropout=dropout, dtype=torch.float64)
    xs = [torch.randn(2, n, 6, dtype=torch.float64, requires_grad=True) for n in (2, 4, 1)]

    def last(*xs: Tensor) -> Tensor:
        torch.manual_seed(3)
        module.clean_state()
        module.start_streams(2)
        outs = [module.forward_steps(x) for x in xs]
        assert is_one_node(outs[-1])
        return torch.cat([y for y in outs if y is not None], dim=1)

    assert gradcheck(last, xs)
    assert torch.autograd.gradgradcheck(last, xs)
    assert_many_gradients_at_once(last(*xs), xs)


def test_what_was_dropped_stays_so_where_a_transform_surrounds_the_backward() -> None:
    """Which is computed by plain PyTorch then, from what the forward drew."""
    module = build(dropout=0.5, dtype=torch.float64).train()
    x = torch.randn(STREAMS, LENGTH + 3, module.embed_dim, dtype=torch.float64, requires_grad=True)
    module.start_streams(STREAMS)
    y = module.forward_steps(x)
    assert is_one_node(y)
    (expected,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    with torch.autograd.forward_ad.dual_level():
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("sizes", [{}, {"embed_dim": 36}, {"embed_dim": 64, "sequence_len": 40}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_as_exact_as_plain_pytorch(
    dtype: torch.dtype, sizes: dict[str, Any], isa: str
) -> None:
    module = build(dtype=dtype, **sizes)
    assert_as_exact(module, drawn_calls(module, [LENGTH + 2, 40]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_is_not_finite_spoils_no_other_stream(dtype: torch.dtype, isa: str) -> None:
    """At a width of which torch's own products of bfloat16 read on into the next row."""
    module = build(embed_dim=36, dtype=dtype)
    grads = []
    for broken in (False, True):
        torch.manual_seed(0)
        x = torch.randn(STREAMS, 40, 36).to(dtype).requires_grad_()
        with torch.no_grad():
            x[1] = torch.nan if broken else 1.0
            module.clean_state()
            module.forward_steps(torch.ones_like(x))  # so that each token has an output
        out = module.forward_steps(x)
        assert is_one_node(out)
        assert out is not None
        grads.append((out[[0, 2]], torch.autograd.grad(out.sum(), x)[0][[0, 2]]))
    assert all(map(torch.equal, *grads))


def test_autocast_around_the_backward_alone_changes_nothing() -> None:
    module = build()
    calls = drawn_calls(module, [100])
    out = module.forward_steps(*calls[0])
    assert out is not None
    leaves = [calls[0][0], *module.parameters()]
    expected = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(out.sum(), leaves)
    assert all(map(torch.equal, found, expected))


def test_no_streams_have_gradients_of_zero() -> None:
    module = build()
    x = torch.zeros(0, 2 * LENGTH, module.embed_dim, requires_grad=True)
    out = module.forward_steps(x)
    assert is_one_node(out)
    assert out is not None
    found = torch.autograd.grad(out.sum(), [x, *module.parameters()])
    assert found[0].shape == x.shape
    assert not any(y.any() for y in found)


def test_the_librarys_operators_refuse_what_does_not_fit_together() -> None:
    """Their kernels would read and write past the end of it."""
    backends.why_missing("cpu")
    forward = torch.ops.continual_mha.cpu_new_ring_steps
    backward = torch.ops.continual_mha.cpu_new_ring_steps_backward
    N, T, H, L, D = STREAMS, 4, 2, LENGTH, 6
    E = H * D
    x, ring, position = torch.ones(N, T, E), torch.ones(N, H, L, D), torch.zeros(N).long()
    weights = (torch.ones(3 * E, E), None, None, None, torch.ones(E, E), None)
    given = (x, None, None, ring, ring, *weights, position, None, 1, 0.0)
    out, k, v, *found = forward(*given)
    assert out.shape == (N, T - 1, E)
    seed = torch.ones(1).long()
    wrongs: list[tuple[int, Any]] = [
        (0, x[1:]),
        (0, x[:, 0]),
        (0, torch.ones(N, T, E + 1)),
        (0, x.double()),
        (1, x[:, 1:]),
        (1, torch.ones(N, T, E + 1)),
        (2, x[:, 0]),
        (3, ring[0]),
        (3, ring[:, :, :0]),
        (4, ring[:, :, 1:]),
        (5, torch.ones(E, E)),
        (8, torch.ones(E)),
        (9, torch.ones(E, E + 1)),
        (11, position[1:]),
        (11, position.int()),
        (12, seed.float()),
        (12, torch.ones(2).long()),
        (13, T + 1),
        (13, -1),
    ]
    for place, wrong in wrongs:
        with pytest.raises(RuntimeError, match="cpu_new_ring_steps"):
            forward(*given[:place], wrong, *given[place + 1 :])
    back = (torch.ones_like(out), k, v, *given[:13], *found, 1, 0.0, [True] * 11)
    assert backward(*back)[0].shape == x.shape
    of_gradients: list[tuple[int, Any]] = [
        (0, out[:, 1:]),
        (0, out.double()),
        (1, ring[:, :, 1:]),
        (2, ring.double()),
        (16, found[0][1:]),
        (16, found[0].double()),
        (17, found[1][1:]),
        (17, found[1].double()),
        (18, found[2][1:]),
        (21, [True] * 10),
    ]
    for place, wrong in [(at + 3, x) for at, x in wrongs if at < 12] + of_gradients:
        with pytest.raises(RuntimeError, match="cpu_new_ring_steps"):
            backward(*back[:place], wrong, *back[place + 1 :])


@pytest.mark.parametrize("kept", ["transposed", "wider"])
def test_what_hooks_keep_of_saved_tensors_is_read_as_it_lies(kept: str) -> None:
    """As those that compress or offload them."""
    module = build()
    x = torch.randn(STREAMS, 3 * LENGTH, module.embed_dim)
    found = []
    other = {
        "transposed": lambda x: x.t().contiguous().t() if x.dim() == 2 else x,
        # what is in the dtype of sums
        "wider": lambda x: x.double() if x.shape[-1:] == (module.num_heads,) else x,
    }
    for unpack in (lambda x: x, other[kept]):
        module.start_streams(STREAMS)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            out = module.forward_steps(x)
            assert is_one_node(out)
            found.append(torch.autograd.grad(out.square().sum(), module.parameters()))
    for grad, expected in zip(*found, strict=True):
        torch.testing.assert_close(grad, expected)
