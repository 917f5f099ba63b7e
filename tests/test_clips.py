"""`forward` with its gradient as one node of autograd: what it allocates, and what it gives."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import pytest
import torch
from oracles import LENGTH, assert_as_exact_as_torch, build, draw_tokens
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import continual_mha as co
from continual_mha import SingleOutputMultiheadAttention, backends, clip_node

pytestmark = pytest.mark.skipif("cpu" not in backends.available(), reason="plain PyTorch runs")

STREAMS = 3


@pytest.fixture(autouse=True, params=["library", "torch"])
def multiplying(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who multiplies with weights in a node, whatever the CPU."""
    who: str = request.param
    monkeypatch.setattr(clip_node, "_library_multiplies", lambda *args: who == "library")
    return who


def drawn(module: SingleOutputMultiheadAttention, count: int = LENGTH + 2) -> Tensor:
    x: Tensor = draw_tokens(module, STREAMS, count)[0]
    return x.requires_grad_()


def gradients(
    module: SingleOutputMultiheadAttention, *tokens: Tensor, weight_of_attn: float = 0.5, **how: Any
) -> list[Tensor | None]:
    """Of a function of output and weights, by the tokens and all parameters that need one."""
    out, attn = module(*tokens, **how)
    total = out.square().sum()
    if attn is not None:
        total = total + weight_of_attn * attn.square().sum()
    leaves = [x for x in (*tokens, *module.parameters()) if x.requires_grad]
    return list(torch.autograd.grad(total, leaves, allow_unused=True))


def plain_gradients(
    module: SingleOutputMultiheadAttention, *tokens: Tensor, **how: Any
) -> list[Tensor | None]:
    with co.use_backend("torch"):
        return gradients(module, *tokens, **how)


def assert_same(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for left, right in zip(actual, expected, strict=True):
        if right is None or not right.any():  # a query alone in its softmax, a bias of keys
            assert left is None or left.abs().max() < 1e-12
        else:
            assert left is not None
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def is_one_node(out: Tensor) -> bool:
    """Whether the node is behind the change of layout."""
    function = out.grad_fn
    while function is not None and "AttendClip" not in function.name():
        function = function.next_functions[0][0] if function.next_functions else None
    return function is not None


class Allocations(TorchDispatchMode):
    """How many tensors of each number of elements were made, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[int] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(x, Tensor) or "out" in (kwargs or {}):
                continue
            self.made[x.numel()] += x.untyped_storage().data_ptr() not in given
        return result


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_backward_makes_one_gradient_of_the_clip_and_one_of_the_packed_weight(
    dropout: float, need_weights: bool
) -> None:
    module = build(dropout=dropout)
    x = drawn(module, 29)
    out, _ = module(x, need_weights=need_weights)
    assert is_one_node(out)
    with Allocations() as allocations:
        out.backward(torch.ones_like(out))
    made = allocations.made
    assert made[x.numel()] == 1
    assert made[module.in_proj_weight.numel()] == 1
    assert made[module.out_proj.weight.numel()] == 1
    assert x.grad is not None
    with co.use_backend("torch"):
        out, _ = module(x, need_weights=need_weights)
    with Allocations() as allocations:
        out.backward(torch.ones_like(out))
    assert allocations.made[x.numel()] > 2  # the instrument sees what is made
    assert allocations.made[module.out_proj.weight.numel()] > 3


@pytest.mark.parametrize("weight_of_attn", [0.0, 0.5])
@pytest.mark.parametrize("query_index", [-1, 0, 2, -LENGTH])
def test_the_token_that_asks_gets_both_of_its_gradients(
    query_index: int, weight_of_attn: float
) -> None:
    module = build(query_index=query_index, dtype=torch.float64)
    x = drawn(module, LENGTH)
    how = {"weight_of_attn": weight_of_attn}
    assert_same(gradients(module, x, **how), plain_gradients(module, x, **how))


@pytest.mark.parametrize("kind", ["another query", "another value", "three tensors", "one tensor"])
def test_tensors_of_their_own_have_gradients_of_their_own(kind: str) -> None:
    module = build(dtype=torch.float64)
    x, y, z = (drawn(module, LENGTH).detach() * scale for scale in (1.0, 0.5, -1.5))
    tokens = {
        "another query": (x, y, y),
        "another value": (x, x, y),
        "three tensors": (x, y, z),
        "one tensor": (x, x, x),
    }[kind]
    tokens = tuple(t.requires_grad_() for t in tokens)
    assert is_one_node(module(*tokens)[0])
    assert_same(gradients(module, *tokens), plain_gradients(module, *tokens))


def test_the_weights_alone_have_a_gradient() -> None:
    module = build(dtype=torch.float64)
    x = drawn(module)

    def of_weights() -> list[Tensor | None]:
        leaves = [x, *module.parameters()]
        total = module(x)[1].square().sum()
        return list(torch.autograd.grad(total, leaves, allow_unused=True))

    actual = of_weights()
    with co.use_backend("torch"):
        expected = of_weights()
    assert_same(actual, expected)


@pytest.mark.parametrize(
    "trained", ["", "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
)
@pytest.mark.parametrize("of_tokens", [False, True])
def test_what_is_frozen_has_no_gradient(trained: str, of_tokens: bool) -> None:
    module = build(dtype=torch.float64)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == trained)
    x = drawn(module).requires_grad_(of_tokens)
    if not trained and not of_tokens:
        assert not module(x)[0].requires_grad
        return
    assert_same(gradients(module, x), plain_gradients(module, x))


def test_nothing_is_made_for_what_is_frozen() -> None:
    module = build().requires_grad_(False)
    x = drawn(module, 29)
    out, _ = module(x)
    with Allocations() as allocations:
        out.backward(torch.ones_like(out))
    assert allocations.made[x.numel()] == 1
    assert allocations.made[module.in_proj_weight.numel()] == 0
    assert allocations.made[module.out_proj.weight.numel()] == 0


@pytest.mark.parametrize("slots", ["none", "add_bias_kv", "add_zero_attn"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_clip_without_a_gradient_costs_none(dropout: float, slots: str) -> None:
    module = build(dropout=dropout, **({} if slots == "none" else {slots: True}))
    x = drawn(module, 29).detach()
    out, _ = module(x)
    with Allocations() as allocations:
        out.backward(torch.ones_like(out))
    assert allocations.made[x.numel()] == 0


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("slots", ["add_bias_kv", "add_zero_attn"])
def test_the_weights_alone_train_beside_extra_slots(slots: str, need_weights: bool) -> None:
    module = build(dtype=torch.float64, **{slots: True})
    x = drawn(module, 9).detach()
    how = {"need_weights": need_weights}
    assert_same(gradients(module, x, **how), plain_gradients(module, x, **how))


SLOTS: dict[str, dict[str, Any]] = {
    "learned": {"add_bias_kv": True},
    "of zeros": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
    "both, no bias": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    "both, kdim and vdim": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 7, "vdim": 10},
}


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("slots", SLOTS)
def test_extra_slots_are_part_of_the_node(slots: str, need_weights: bool, hidden: bool) -> None:
    """Of a stream whose clip is hidden they have all the weight."""
    module = build(**SLOTS[slots], dtype=torch.float64)
    tokens = [x.requires_grad_() for x in draw_tokens(module, STREAMS, LENGTH + 2)]
    given = tokens if "kdim" in slots else tokens[:1]
    how: dict[str, Any] = {"need_weights": need_weights}
    if hidden:
        how["key_padding_mask"] = torch.tensor([[True]] * 2 + [[False]]).expand(-1, LENGTH + 2)
    assert is_one_node(module(*given, **how)[0])
    assert_same(gradients(module, *given, **how), plain_gradients(module, *given, **how))


@pytest.mark.parametrize("trained", ["bias_k", "bias_v", "in_proj_bias", "in_proj_weight", "x"])
def test_of_what_extra_slots_take_part_in_one_is_trained(trained: str) -> None:
    module = build(**SLOTS["both"], dtype=torch.float64)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == trained)
    x = drawn(module).detach().requires_grad_(trained == "x")
    assert is_one_node(module(x)[0])
    assert_same(gradients(module, x), plain_gradients(module, x))


def test_second_derivatives_and_many_gradients_at_once_beside_extra_slots() -> None:
    module = build(embed_dim=6, num_heads=2, **SLOTS["both"], dtype=torch.float64)
    x = draw_tokens(module, 2, 3)[0].requires_grad_()
    assert gradcheck(module, x)
    assert gradgradcheck(module, x, fast_mode=True)
    outs = module(x)
    given = tuple(torch.randn(4, *y.shape, dtype=y.dtype) for y in outs)
    batched = torch.autograd.grad(outs, x, given, is_grads_batched=True, retain_graph=True)[0]
    for i in range(4):
        single = torch.autograd.grad(outs, x, [y[i] for y in given], retain_graph=True)
        assert_same([batched[i]], list(single))


def test_what_is_dropped_of_extra_slots_is_left_to_operators() -> None:
    module = build(**SLOTS["both"], dropout=0.5)
    assert not is_one_node(module(drawn(module))[0])


class Work(TorchDispatchMode):
    """How many products of matrices there were, and which gradients of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.attention: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name.split("::")[1]
        self.products += name in ("mm", "bmm", "addmm", "addmm_", "baddbmm")
        if name.startswith("cpu_attend_shared_"):
            self.attention.add(name.removeprefix("cpu_attend_shared_"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("trained", "products", "attention"),
    [
        (["out_proj.bias"], 0, None),
        (["out_proj.weight"], 1, None),
        (["in_proj_bias"], 3, "query_backward"),
        (["in_proj_weight"], 6, "query_backward"),
        (["out_proj.weight", "in_proj_weight"], 7, "query_backward"),
        (["v_proj_weight"], 2, None),
        (["k_proj_weight"], 3, "query_backward"),
        (["q_proj_weight"], 4, "query_backward"),
        (["q_proj_weight", "v_proj_weight"], 5, "query_backward"),
        (["query"], 4, "query_backward"),
        (["key"], 2, "backward"),
        (["query", "key"], 4, "backward"),
        (["one tensor"], 4, "backward"),
        (["one tensor", "out_proj.weight"], 5, "backward"),
    ],
)
def test_the_backward_computes_what_the_trained_parts_take(
    trained: list[str], products: int, attention: str | None, multiplying: str
) -> None:
    packed = not any(
        name in ("q_proj_weight", "k_proj_weight", "v_proj_weight") for name in trained
    )
    module = build(dtype=torch.float64, **({} if packed else {"kdim": 7, "vdim": 7}))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained)
    x = drawn(module).detach()
    query, key = x.clone(), x if packed else x[..., :7].contiguous()
    if "one tensor" in trained:
        query = key
    key.requires_grad_("one tensor" in trained or "key" in trained)
    query.requires_grad_("one tensor" in trained or "query" in trained)
    tokens = (query, key, key)
    out, _ = module(*tokens, need_weights=False)
    assert is_one_node(out)
    with Work() as work:
        out.backward(torch.ones_like(out))
    if multiplying == "torch":  # the library's are inside of one operator
        assert work.products == products
        assert work.attention == (set() if attention is None else {attention})
    how = {"need_weights": False}
    assert_same(gradients(module, *tokens, **how), plain_gradients(module, *tokens, **how))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_without_a_kernel_autograd_follows_single_operators(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is faster then, with dropout up to four times."""
    assert is_one_node(forward_of(dropout))
    why_not = backends.why_not
    monkeypatch.setattr(
        backends,
        "why_not",
        lambda backend, *args: "declined" if backend == "cpu" else why_not(backend, *args),
    )
    assert not is_one_node(forward_of(dropout))


def forward_of(dropout: float) -> Tensor:
    module = build(dropout=dropout)  # anew, as what one has decided stays so
    return module(drawn(module))[0]


@pytest.mark.parametrize("kind", ["query alone", "value alone", "key alone"])
def test_of_three_tensors_one_has_a_gradient(kind: str) -> None:
    module = build(dtype=torch.float64)
    x, y, z = (drawn(module, LENGTH).detach() * scale for scale in (1.0, 0.5, -1.5))
    {"query alone": x, "key alone": y, "value alone": z}[kind].requires_grad_()
    assert_same(gradients(module, x, y, z), plain_gradients(module, x, y, z))


@pytest.mark.parametrize("need_weights", [False, True])
def test_streams_that_see_nothing(need_weights: bool) -> None:
    module = build(dtype=torch.float64)
    x = drawn(module, LENGTH)
    hidden = torch.zeros(STREAMS, LENGTH, dtype=torch.bool)
    hidden[1] = True
    how = {"key_padding_mask": hidden, "need_weights": need_weights}
    actual, expected = gradients(module, x, **how), plain_gradients(module, x, **how)
    if need_weights:  # the answer is NaN then, as torch's
        assert actual[0] is not None
        assert actual[0][1].isnan().all()
        return
    assert_same(actual, expected)
    assert actual[0] is not None
    assert not actual[0][1].any()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_no_gradient_reaches_a_stream_that_sees_nothing(dropout: float) -> None:
    """Not even one that is not finite."""
    module = build(dropout=dropout, dtype=torch.float64)
    x = drawn(module, LENGTH)
    hidden = torch.zeros(STREAMS, LENGTH, dtype=torch.bool)
    hidden[1] = True
    out, _ = module(x, key_padding_mask=hidden, need_weights=False)
    grad = torch.ones_like(out)
    grad[1] = torch.nan
    found = torch.autograd.grad(out, x, grad)[0]
    assert not found[1].any()  # NaN would count
    assert found[[0, 2]].isfinite().all()


def test_the_backward_may_run_twice() -> None:
    module = build(dtype=torch.float64)
    x = drawn(module)
    out = module(x)[0].sum()
    first = torch.autograd.grad(out, x, retain_graph=True)
    second = torch.autograd.grad(out, x)
    assert torch.equal(first[0], second[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, x)


def test_a_clip_that_is_changed_before_the_backward_is_an_error() -> None:
    module = build()
    x = drawn(module).detach()
    out = module(x)[0].sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("need_weights", [False, True])
def test_second_derivatives(
    need_weights: bool, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(embed_dim=6, num_heads=2, dropout=dropout, dtype=torch.float64)
    seed = torch.tensor([11]) if dropout else None
    monkeypatch.setattr(clip_node, "dropout_seed", lambda p, device: seed)
    hidden = torch.tensor([[False, True, False], [False, False, False]])
    names, parameters = zip(*module.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, values, strict=True))
        how = {"key_padding_mask": hidden, "need_weights": need_weights}
        out, attn = torch.func.functional_call(module, given, (x,), how)
        return (out,) if attn is None else (out, attn)

    x = draw_tokens(module, 2, 3)[0].requires_grad_()
    leaves = (x, *(p.detach().requires_grad_() for p in parameters))
    assert gradcheck(run, leaves)
    assert gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("kind", ["query of key", "value of key", "tied weights", "hooked"])
def test_with_create_graph_a_gradient_goes_no_further_than_the_node(kind: str) -> None:
    """Else it comes twice: where an argument is made of another, is another, or has a hook."""
    module = build(dtype=torch.float64)
    x = drawn(module)
    tokens = (x, x, x)
    if kind == "query of key":
        tokens = (2 * x, x, x)
    if kind == "value of key":
        tokens = (x, x, 2 * x)
    if kind == "hooked":
        x.register_hook(lambda grad: 2 * grad)
    if kind == "tied weights":
        module = build(dtype=torch.float64, kdim=7, vdim=7)
        module.v_proj_weight = module.k_proj_weight
        tokens = (x, x[..., :7], x[..., :7])

    def grads(create_graph: bool) -> list[Tensor | None]:
        out, attn = module(*tokens)
        assert is_one_node(out)
        total = out.square().sum() + attn.square().sum()
        how = {"create_graph": create_graph, "retain_graph": True, "allow_unused": True}
        return list(torch.autograd.grad(total, [x, *module.parameters()], **how))

    assert_same(grads(True), grads(False))


@pytest.mark.parametrize("kind", ["leaf", "made of another", "query of key", "weights"])
def test_a_penalty_on_some_gradients(kind: str) -> None:
    """By `grad` and by `backward`, which ask for the gradients of different arguments."""
    module = build(dtype=torch.float64)
    start = drawn(module, LENGTH)

    def of_penalty(by_grad: bool) -> list[Tensor | None]:
        module.zero_grad()
        start.grad = None
        x = start if kind == "leaf" else 0.5 * start
        tokens = (2 * x, x, x) if kind == "query of key" else (x, x, x)
        out, _ = module(*tokens, need_weights=False)
        asked = [module.in_proj_weight, module.out_proj.weight] if kind == "weights" else [x]
        found = torch.autograd.grad(out.square().sum(), asked, create_graph=True)
        penalty = sum(grad.square().sum() for grad in found)
        leaves = [start, *module.parameters()]
        if by_grad:
            return list(torch.autograd.grad(penalty, leaves, allow_unused=True))
        penalty.backward()
        return [leaf.grad for leaf in leaves]

    for by_grad in (False, True):
        actual = of_penalty(by_grad)
        with co.use_backend("torch"):
            expected = of_penalty(by_grad)
        assert_same(actual, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("need_weights", [False, True])
def test_many_gradients_at_once(need_weights: bool, dropout: float) -> None:
    module = build(dropout=dropout, dtype=torch.float64)
    x = drawn(module)
    outs = tuple(y for y in module(x, need_weights=need_weights) if y is not None)
    assert is_one_node(outs[0])
    given = tuple(torch.randn(4, *y.shape, dtype=y.dtype) for y in outs)
    leaves = [x, *module.parameters()]
    batched = torch.autograd.grad(outs, leaves, given, is_grads_batched=True, retain_graph=True)
    for i in range(4):
        single = torch.autograd.grad(outs, leaves, [y[i] for y in given], retain_graph=True)
        assert_same([grad[i] for grad in batched], list(single))


def test_forward_mode_follows_the_backward() -> None:
    module = build(dtype=torch.float64)
    x = drawn(module)
    out = module(x, need_weights=False)[0]
    assert is_one_node(out)
    with forward_ad.dual_level():
        given = forward_ad.make_dual(torch.ones_like(out), torch.full_like(out, 2.0))
        grad, tangent = forward_ad.unpack_dual(torch.autograd.grad(out, x, given)[0])
    torch.testing.assert_close(tangent, 2 * grad)


@pytest.mark.parametrize("create_graph", [False, True])
def test_autocast_around_the_backward_alone_changes_nothing(create_graph: bool) -> None:
    module = build()
    x = drawn(module)
    leaves = [x, *module.parameters()]
    total = module(x, need_weights=False)[0].sum()
    expected = torch.autograd.grad(total, leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = torch.autograd.grad(total, leaves, create_graph=create_graph)
    for left, right in zip(actual, expected, strict=True):
        scale = float(right.abs().max())
        torch.testing.assert_close(left, right, rtol=0, atol=scale * (2e-2 if create_graph else 0))


def test_under_checkpoint_the_same_weights_are_dropped_again() -> None:
    module = build(dropout=0.5, dtype=torch.float64)
    x = drawn(module)

    def grad(run: Any) -> Tensor:
        torch.manual_seed(3)
        return torch.autograd.grad(run(x).square().sum(), x)[0]

    def out(x: Tensor) -> Tensor:
        return module(x, need_weights=False)[0]

    plain = grad(out)
    assert torch.equal(grad(lambda x: checkpoint(out, x, use_reentrant=False)), plain)
    torch.manual_seed(4)
    assert not torch.equal(torch.autograd.grad(out(x).square().sum(), x)[0], plain)


@pytest.mark.parametrize("layout", [{"batch_first": False}, {"embed_dim_second": True}])
def test_layouts_that_are_views(layout: dict[str, bool]) -> None:
    module = build(dtype=torch.float64, **layout)
    x = drawn(module)
    shaped = x.transpose(0, 1) if "batch_first" in layout else x.transpose(1, 2)
    x = shaped.detach().contiguous().requires_grad_()
    assert_same(gradients(module, x), plain_gradients(module, x))


@pytest.mark.parametrize("construction", [{}, {"kdim": 7, "vdim": 10}])
def test_weights_that_lie_by_columns_train(construction: dict[str, int]) -> None:
    module = build(dtype=torch.float64, **construction)
    tokens = [x.requires_grad_() for x in draw_tokens(module, STREAMS, LENGTH)]
    for part in (module, module.out_proj):
        for name, weight in list(part.named_parameters(recurse=False)):
            if weight.dim() == 2:
                setattr(part, name, torch.nn.Parameter(weight.detach().t().contiguous().t()))
    assert is_one_node(module(*tokens)[0])
    assert_same(gradients(module, *tokens), plain_gradients(module, *tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_exact_where_one_token_has_nearly_all_the_weight(
    dtype: torch.dtype, isa: str
) -> None:
    module = build(embed_dim=16, num_heads=1, query_index=0).to(dtype)
    mask = torch.full((1, 40), -20.0, dtype=dtype)
    mask[0, 3] = 0.0
    x = draw_tokens(module, 2, 40)[0]

    def of_queries(module: SingleOutputMultiheadAttention, backend: str) -> Tensor:
        to = module.in_proj_weight
        with co.use_backend(backend):
            out, _ = module(x.to(to), need_weights=False, attn_mask=mask.to(to))
        (gradient,) = torch.autograd.grad(out.sum(), to)
        return gradient[:16]

    exact = of_queries(copy.deepcopy(module).double(), "torch")
    assert exact.abs().max() > 1e-3
    assert_as_exact_as_torch(of_queries(module, "cpu"), exact, of_queries(module, "torch"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_of_an_extra_slot_that_has_nearly_all_the_weight(dtype: torch.dtype) -> None:
    module = build(embed_dim=16, num_heads=2, sequence_len=1, add_bias_kv=True)
    with torch.no_grad():
        module.in_proj_weight[:16] = 0
        module.in_proj_bias[:16] = 1
        module.bias_k += 9 / math.sqrt(8)  # 9 more than the score of a token
    module = module.to(dtype)
    x = draw_tokens(module, 2, 1)[0]

    def of_slot(module: SingleOutputMultiheadAttention, backend: str) -> Tensor:
        with co.use_backend(backend):
            out, _ = module(x.to(module.bias_k), need_weights=False)
        return torch.autograd.grad(64 * out.sum(), module.bias_k)[0]

    exact = of_slot(copy.deepcopy(module).double(), "torch")
    assert_as_exact_as_torch(of_slot(module, "cpu"), exact, of_slot(module, "torch"))


def test_the_librarys_operators_refuse_what_does_not_fit_together() -> None:
    """Their kernels would read and write past the end of it."""
    backends.why_missing("cpu")
    operators = torch.ops.continual_mha
    N, S, E = STREAMS, LENGTH, 12
    clip, other = torch.ones(N, S, E), torch.ones(N, S, E + 1)
    given = [None, clip, None, None, torch.ones(3 * E, E), None, None, None, torch.ones(E, E), None]
    how = (None, 2, 0, 0.0, False, False)
    _, _, *found = operators.cpu_attend_clip(*given, *how)
    grad = torch.ones(N, E)
    backward = (grad, None, *given, None, *found, 2, 0, 0.0, False, [True] * 10)
    assert all(x is not None for x in operators.cpu_attend_clip_backward(*backward)[1:5:3])

    def refused(operator: Any, args: tuple[Any, ...], place: int, wrong: Any) -> None:
        with pytest.raises(RuntimeError, match=r"cpu_attend_(clip|shared)"):
            operator(*args[:place], wrong, *args[place + 1 :])

    forward = (*given, *how)
    for place, wrong in (
        (0, torch.ones(N + 1, E)),
        (0, torch.ones(N, E, dtype=torch.float64)),
        (1, other),
        (1, clip[0]),
        (1, clip[:, :0]),
        (2, other),
        (2, other[:, 1:]),
        (2, clip.double()),
        (3, torch.ones(N, 2, S + 1)),
        (4, torch.ones(E, E)),
        (5, torch.ones(E, E)),
        (7, torch.ones(E)),
        (8, torch.ones(E, E + 1)),
        (9, torch.ones(E - 1)),
        (11, 5),
        (12, S),
    ):
        refused(operators.cpu_attend_clip, forward, place, wrong)
    for place, wrong in (
        (0, torch.ones(N, E + 1)),
        (0, grad.double()),
        (1, torch.ones(N, S + 1)),
        (13, found[0][1:]),
        (14, found[1].transpose(0, 1).contiguous().transpose(0, 1)),
        (15, found[2].double()),
        (16, found[3][1:]),
        (16, found[3].double()),
        (18, found[5][:, 1:]),
        (23, [True] * 9),
    ):
        refused(operators.cpu_attend_clip_backward, backward, place, wrong)
