"""The operators as torch sees them: schemas, fake kernels, gradients, export."""

import pytest
import torch
from oracles import build, draw_tokens, run_steps
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradgradcheck
from torch.library import opcheck

import continual_mha as co
from continual_mha import functional, ops

LENGTH = 4


def step_operands(steps=None, **arguments):
    """Arguments of the operator for one token, or for that many, in mid-stream."""
    module = build(sequence_len=LENGTH, **arguments).requires_grad_(False)
    tokens = draw_tokens(module, 2, 6 + (steps or 1))
    given = tokens[:1] if module.formulation == "input" else tokens
    module.forward_steps(*(x[:, :6] for x in given))
    now = tuple(x[:, 6] if steps is None else x[:, 6:] for x in tokens)
    now = now if module.formulation != "input" else (now[0],) * 3
    now, state, call = module._plan(now, module._state(), update=True)
    return functional.operands(now, state, None if steps is None else 0, call)


def shared_operands(mask, sink, one_tensor=False):
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 5), torch.randn(2, 7, 5)
    value = torch.randn(2, 7, 6)
    return (
        query.requires_grad_(),
        key.requires_grad_(),
        None if one_tensor else value.requires_grad_(),
        torch.randn(2, 1, 7) if mask else None,
        torch.randn(2, 3, requires_grad=True) if sink else None,
    )


def is_number(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


@pytest.mark.parametrize("cache_dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("query_index", [-1, -3])
@pytest.mark.parametrize("steps", [None, 1, 3, 9])
def test_steps_pass_torchs_own_checks(steps, query_index, cache_dtype):
    name = "ring_step_" if steps is None else "ring_steps_"
    operator = getattr(torch.ops.continual_mha, name).default
    opcheck(operator, step_operands(steps, query_index=query_index, cache_dtype=cache_dtype))


@pytest.mark.parametrize("cache_dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("query_index", [-1, -3])
@pytest.mark.parametrize("steps", [None, 1, 3, 9])
def test_steps_over_inputs_pass_torchs_own_checks(steps, query_index, cache_dtype):
    name = "input_step_" if steps is None else "input_steps_"
    kept = {"formulation": "input", "query_index": query_index, "cache_dtype": cache_dtype}
    opcheck(getattr(torch.ops.continual_mha, name).default, step_operands(steps, **kept))


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("one_tensor", [False, True])
def test_shared_attention_passes_torchs_own_checks(one_tensor, sink, mask):
    operands = shared_operands(mask, sink, one_tensor)
    opcheck(torch.ops.continual_mha.attend_shared.default, operands)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("extra", [False, True])
def test_single_query_passes_torchs_own_checks(extra, need_weights):
    E, N, S = 6, 2, 5
    bias = torch.randn(1, 1, E) if extra else None
    weights = (torch.randn(3 * E, E), None, None, None, torch.randn(E, E), None, bias, bias)
    arguments = (torch.randn(N, E), *(2 * [torch.randn(N, S, E)]), *weights)
    mask = torch.randn(N, 1, S)
    opcheck(
        torch.ops.continual_mha.single_query.default, (*arguments, mask, 2, extra, need_weights)
    )


def detached(operands):
    return [x if x is None else x.detach() for x in operands]


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("one_tensor", [False, True])
def test_backward_of_shared_attention_passes_torchs_own_checks(one_tensor, sink):
    operands = detached(shared_operands(True, sink, one_tensor))
    out, lse = torch.ops.continual_mha.attend_shared(*operands)
    arguments = (torch.randn_like(out), torch.randn_like(lse), *operands, out, lse)
    opcheck(torch.ops.continual_mha.attend_shared_backward.default, arguments)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("one_tensor", [False, True])
def test_full_shared_attention_passes_torchs_own_checks(one_tensor, dropout, need_weights):
    more = (torch.tensor([7]), 0.25) if dropout else (None, 0.0)
    arguments = (*shared_operands(True, True, one_tensor), *more, need_weights)
    opcheck(torch.ops.continual_mha.attend_shared_full.default, arguments)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("one_tensor", [False, True])
def test_backward_of_full_shared_attention_passes_torchs_own_checks(one_tensor, dropout):
    operands = detached(shared_operands(True, True, one_tensor))
    seed, p = (torch.tensor([7]), 0.25) if dropout else (None, 0.0)
    results = torch.ops.continual_mha.attend_shared_full(*operands, seed, p, True)
    out, lse, kept, average = results
    grads = (torch.ones_like(out), None, torch.ones_like(kept) if dropout else None, average)
    arguments = (*grads, *operands, seed, out, lse, kept, p)
    opcheck(torch.ops.continual_mha.attend_shared_full_backward.default, arguments)
    opcheck(torch.ops.continual_mha.attend_shared_query_backward.default, arguments)


def window_operands(extra):
    """Arguments of ``attend_window`` for a cold stream and one in mid-stream."""
    clip = [torch.randn(2, 3, 2, 4, requires_grad=True) for _ in range(3)]
    rings = [torch.randn(2, 2, 5, 4, requires_grad=True) for _ in range(2)]
    options = [torch.randn(2, 2, 2, requires_grad=True), torch.tensor([7])] if extra else [None] * 2
    return (*clip, *rings, torch.tensor([0, 9]), *options, 1, 0.25 if extra else 0.0)


@pytest.mark.parametrize("extra", [False, True])
def test_attention_over_a_window_passes_torchs_own_checks(extra):
    opcheck(torch.ops.continual_mha.attend_window.default, window_operands(extra))


@pytest.mark.parametrize("extra", [False, True])
def test_backward_of_attention_over_a_window_passes_torchs_own_checks(extra):
    operands = [x.detach() if isinstance(x, torch.Tensor) else x for x in window_operands(extra)]
    out, lse = torch.ops.continual_mha.attend_window(*operands)
    grads = (torch.ones_like(out), torch.ones_like(lse) if extra else None)
    arguments = (*grads, *operands[:8], out, lse, *operands[8:], extra)
    opcheck(torch.ops.continual_mha.attend_window_backward.default, arguments)


@pytest.mark.filterwarnings("error:.*an autograd kernel was not registered")
@pytest.mark.parametrize("name", ["attend_shared", "attend_shared_full", "attend_window"])
@pytest.mark.parametrize("extra", [False, True])
def test_second_derivatives_do_not_come_from_kernels_that_have_none(name, extra):
    operands = window_operands(extra) if name == "attend_window" else shared_operands(extra, extra)
    operands = [x.double() if is_number(x) else x for x in operands]
    more = (torch.tensor([7]), 0.4, True) if extra else (None, 0.0, False)
    operands += more if name == "attend_shared_full" else ()
    leaves = [i for i, x in enumerate(operands) if is_number(x) and x.requires_grad]

    def attend(*given):
        changed = dict(zip(leaves, given, strict=True))
        out = getattr(torch.ops.continual_mha, name)(
            *(changed.get(i, x) for i, x in enumerate(operands))
        )
        return [x for x in out if x.numel()]

    inputs = [operands[i].detach().requires_grad_() for i in leaves]
    assert gradgradcheck(attend, inputs, fast_mode=True)


def test_every_operator_stands_for_every_backend():
    for name in ops.SCHEMAS:
        for prefix in ("", "cpu_", "cuda_"):
            assert hasattr(torch.ops.continual_mha, prefix + name)


def shapes_of_a_stream(arguments, mode, device="cpu", backend="auto"):
    """Shapes and dtypes of all that a module answers and remembers."""
    module = build(sequence_len=LENGTH, device=device, **arguments)
    clip = torch.zeros(2, 2 * LENGTH, module.embed_dim, device=device)
    with mode(), co.use_backend(backend):
        answers = [module(clip)[0]]
        answers += [module.forward_step(clip[:, 0]) for _ in range(LENGTH + 1)]
        answers += [run_steps(module, clip)]
        module.reset([0])
        moves = torch.ones(2, dtype=torch.bool, device=device)
        answers += [module.forward_step(clip[:, 0], active=moves)]
        module.set_state(module.get_state())
        answers += module.get_state()
        module.clean_state()
        module.warm_up((2, module.embed_dim))
        answers += [module.forward_step(clip[:, 0])]
    return [None if x is None else (x.shape, x.dtype, x.requires_grad) for x in answers]


@pytest.mark.parametrize("name", ["auto", "torch", "triton"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize(
    "arguments", [{}, {"formulation": "input"}, {"query_index": 0}, {"add_bias_kv": True}]
)
def test_shapes_propagate_where_there_are_no_numbers(arguments, mode, name):
    wanted = shapes_of_a_stream(arguments, mode)
    assert shapes_of_a_stream(arguments, mode, "meta") == wanted
    with FakeTensorMode():
        assert shapes_of_a_stream(arguments, mode, backend=name) == wanted


@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_shapes_propagate_through_rings_of_8_bits(formulation):
    arguments = {"formulation": formulation, "cache_dtype": torch.int8}
    wanted = shapes_of_a_stream(arguments, torch.no_grad)
    assert shapes_of_a_stream(arguments, torch.no_grad, "meta") == wanted
    with FakeTensorMode():
        assert shapes_of_a_stream(arguments, torch.no_grad) == wanted


class Step(torch.nn.Module):
    """What export needs: a module whose forward is a step."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention.forward_step(x)


def test_exported_step_writes_the_ring_and_equals_the_module():
    module = build(sequence_len=LENGTH).requires_grad_(False)
    x = torch.randn(2, 3 * LENGTH, module.embed_dim)
    module.forward_steps(x[:, :LENGTH])
    exported = torch.export.export(Step(module), (x[:, 0],), strict=False).module()
    other = co.SingleOutputMultiheadAttention.build_from(module, LENGTH).requires_grad_(False)
    other.forward_steps(x[:, :LENGTH])
    for t in range(LENGTH, 3 * LENGTH):
        torch.testing.assert_close(exported(x[:, t]), other.forward_step(x[:, t]))


def test_exported_forward_equals_the_module():
    module = build(sequence_len=LENGTH).eval()
    x = torch.randn(2, LENGTH, module.embed_dim)
    exported = torch.export.export(module, (x,), strict=False).module()
    for got, wanted in zip(exported(x), module(x), strict=True):
        torch.testing.assert_close(got, wanted)
