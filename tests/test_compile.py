"""`torch.compile(fullgraph=True)` takes all three forwards, and a stream does not recompile."""

from __future__ import annotations

import copy
import shutil
from collections import OrderedDict
from functools import partial

import pytest
import torch
from oracles import (
    CONSTRUCTIONS,
    LENGTH,
    assert_same_state,
    build,
    draw_tokens,
    step_through,
    to_layout,
)
from torch._dynamo.testing import CompileCounter
from upstream import continual

import continual_mha as co
from continual_mha import backends, tracing

pytestmark = pytest.mark.usefixtures("_fresh_compiler")

WAYS = ["forward", "forward_step", "forward_steps"]
# Without a state, first step, a second one, any later cold one, the warm ones.
GRAPHS = 6


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module, way, backend="eager"):
    return torch.compile(getattr(module, way), fullgraph=True, backend=backend)


def assert_stream_equals_eager(construction, mode, backend, steps=3 * LENGTH):
    module, twin = build(**CONSTRUCTIONS[construction]), build(**CONSTRUCTIONS[construction])
    tokens = draw_tokens(module, 2, steps)
    step = compiled(module, "forward_step", backend)
    with mode():
        expected = step_through(twin, *tokens)
        for t in range(steps):
            output = step(*(x[:, t] for x in tokens))
            assert (output is None) == (expected[t] is None)
            if output is not None:
                torch.testing.assert_close(output, expected[t])
    for a, b in zip(module.get_state(), twin.get_state(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("construction", "mode"),
    [
        ("delayed_query_with_extra_slots", torch.no_grad),
        ("kdim_and_vdim", torch.inference_mode),
        ("defaults", torch.enable_grad),
    ],
)
def test_compiled_step_equals_eager(construction, mode):
    assert_stream_equals_eager(construction, mode, "eager")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_step_through_the_functionalising_compiler_equals_eager(mode):
    assert_stream_equals_eager("middle_query", mode, "aot_eager")


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_step_through_inductor_equals_eager():
    assert_stream_equals_eager("defaults", torch.no_grad, "inductor", LENGTH + 2)


@pytest.mark.parametrize("backend_name", ["eager", "aot_eager"])
@pytest.mark.parametrize("construction", ["defaults", "sequence_first", "embed_dim_second"])
def test_compiled_clip_equals_eager(construction, backend_name):
    module = build(**CONSTRUCTIONS[construction])
    tokens = [to_layout(module, x) for x in draw_tokens(module, 2, LENGTH)]
    with torch.no_grad():
        got = compiled(module, "forward", backend_name)(*tokens)
        torch.testing.assert_close(got, module.forward(*tokens))


@pytest.mark.parametrize(
    ("construction", "mode"),
    [
        ("defaults", torch.enable_grad),
        ("sequence_first", torch.no_grad),
        ("middle_query", torch.no_grad),
    ],
)
def test_compiled_many_steps_equal_eager(construction, mode):
    module, twin = build(**CONSTRUCTIONS[construction]), build(**CONSTRUCTIONS[construction])
    pieces = [2, 2, 3, 8, 3]
    tokens = draw_tokens(module, 2, sum(pieces))
    steps, start = compiled(module, "forward_steps"), 0
    with mode():
        for count in pieces:
            chunk = [to_layout(module, x[:, start : start + count]) for x in tokens]
            got, want = steps(*chunk), twin.forward_steps(*chunk)
            assert (got is None) == (want is None)
            if got is not None:
                torch.testing.assert_close(got, want)
            start += count


@pytest.mark.parametrize(
    ("length", "mode"), [(12, torch.no_grad), (30, torch.no_grad), (30, torch.enable_grad)]
)
def test_stream_does_not_recompile_from_step_to_step(length, mode):
    """A few graphs for the cold phase whatever its length, and none once warm."""
    module = build(sequence_len=length, query_index=-2)
    x = draw_tokens(module, 2, length + 28)[0]
    counter = CompileCounter()
    step = compiled(module, "forward_step", counter)
    with mode():
        for t in range(length + 2):
            step(x[:, t])
        until_warm = counter.frame_count
        assert 1 <= until_warm <= GRAPHS
        for t in range(length + 2, length + 28):
            step(x[:, t])
    assert counter.frame_count == until_warm


def test_compiled_step_goes_from_inference_mode_to_gradients():
    module, twin = build(), build()
    x = draw_tokens(module, 2, 3 * LENGTH)[0]
    step = compiled(module, "forward_step")
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            got = [step(x[:, t]) for t in range(LENGTH)]
            want = step_through(twin, x[:, :LENGTH])
        torch.testing.assert_close(got[-1], want[-1])
    got[-1].sum().backward()


@pytest.mark.parametrize("call", ["forward_step", "forward_steps"])
def test_copied_streams_go_on_outside_of_inference_mode(call):
    module = build()
    x = draw_tokens(module, 2, 3 * LENGTH)[0]
    with torch.inference_mode():
        step_through(module, x[:, :LENGTH])
    module.set_state(module.get_state())
    twin = copy.deepcopy(module)
    tokens = x[:, LENGTH] if call == "forward_step" else x[:, LENGTH:]
    run = torch.compile(getattr(module, call), backend="aot_eager")
    got = run(tokens)
    torch.testing.assert_close(got, getattr(twin, call)(tokens))
    got.sum().backward()
    assert module.in_proj_weight.grad.any()


def test_reset_and_new_stream_do_not_recompile():
    module = build(sequence_len=8)
    x = draw_tokens(module, 2, 12)[0]
    counter = CompileCounter()
    step = compiled(module, "forward_step", counter)
    with torch.no_grad():
        for t in range(12):
            step(x[:, t])
        module.clean_state()
        step(x[:, 0])
        step(x[:, 1])
        seen = counter.frame_count
        for _ in range(3):
            module.clean_state()
            for t in range(12):
                step(x[:, t])
    assert counter.frame_count == seen


def test_streams_that_begin_when_they_like_take_one_graph_for_each_number_of_them():
    module = build()
    counter = CompileCounter()
    step = compiled(module, "forward_step", counter)
    with torch.no_grad():
        for streams in (2, 3, 4):
            module.start_streams(streams)
            for token in draw_tokens(module, streams, 2 * LENGTH)[0].unbind(1):
                step(token)
    assert counter.frame_count <= 3


def test_compiled_call_follows_the_call_mode():
    module, twin = build(), build()
    module.call_mode = "forward_step"
    x = draw_tokens(module, 2, LENGTH)[0]
    call = torch.compile(module, fullgraph=True, backend="eager")
    with torch.no_grad():
        outputs = [call(x[:, t]) for t in range(LENGTH)]
        expected = step_through(twin, x)
    assert outputs[:-1] == [None] * (LENGTH - 1)
    torch.testing.assert_close(outputs[-1], expected[-1])


@pytest.mark.parametrize("surrounding", [co.call_mode, "of continual"])
def test_compiled_call_follows_the_surrounding_call_mode_too(surrounding):
    surrounding = continual.call_mode if surrounding == "of continual" else surrounding
    module, twin = build(), build()
    x = draw_tokens(module, 2, 3 * LENGTH)[0]
    call = torch.compile(module, fullgraph=True, backend="eager")
    with torch.no_grad():
        for each in (module, twin):
            each.forward_steps(x)
        for mode in 2 * ["forward", "forward_steps", "forward_step"]:
            given = x[:, 0] if mode == "forward_step" else x
            with surrounding(mode):
                got = call(given)
            torch.testing.assert_close(got, getattr(twin, mode)(given))
            torch.testing.assert_close(call(x), twin.forward(x))


@pytest.mark.parametrize("way", WAYS)
def test_gradient_through_compiled_calls_equals_eager(way):
    module = build(dtype=torch.float64)
    x = draw_tokens(module, 2, LENGTH + 1)[0].requires_grad_()

    def loss(call):
        module.clean_state()
        if way == "forward":
            return call(x)[0].square().sum()
        if way == "forward_steps":
            return call(x).square().sum()
        outputs = [call(x[:, t]) for t in range(LENGTH + 1)]
        return sum(o.square().sum() for o in outputs if o is not None)

    inputs = (x, *module.parameters())
    want = torch.autograd.grad(loss(getattr(module, way)), inputs)
    got = torch.autograd.grad(loss(compiled(module, way, "aot_eager")), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_model_around_the_module_compiles():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 12)
            self.attention = build()

        def forward(self, token):
            output = self.attention.forward_step(self.inner(token))
            return None if output is None else output.relu()

    model = Model()
    call = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(2, 12, 4)
    with torch.no_grad():
        outputs = [call(x[:, t]) for t in range(12)]
        model.attention.clean_state()
        expected = [model(x[:, t]) for t in range(12)]
    for a, b in zip(outputs[LENGTH - 1 :], expected[LENGTH - 1 :], strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_step_runs_on_the_backend_of_its_block(monkeypatch):
    asked = []
    why_not = backends.why_not
    monkeypatch.setattr(
        backends, "why_not", lambda backend, *args: asked.append(backend) or why_not(backend, *args)
    )
    module = build().requires_grad_(False)
    module.start_streams(2)
    step = compiled(module, "forward_step")
    for name in ("torch", "cpu", "torch"):
        if name in backends.available():
            asked.clear()
            with backends.use_backend(name):
                step(torch.ones(2, module.embed_dim))
            assert asked == [name]


def test_constants_are_marked_as_torch_marks_them():
    ours, theirs = (lambda: 1), (lambda: 1)
    tracing.constant_while_compiling(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}


def own_operators(graph):
    """Names of the operators of this package in a graph."""
    targets = [str(node.target) for node in graph.nodes]
    return [name.split(".")[1] for name in targets if name.startswith("continual_mha.")]


@pytest.mark.skipif("cpu" not in backends.available(), reason="plain PyTorch runs")
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_compiled_clip_on_the_cpu_is_an_operator_with_a_kernel(training, need_weights):
    """Which takes a third of the time of what the compiler makes of single ones."""
    module = build(dropout=0.3).train(training)
    x = draw_tokens(module, 2, LENGTH)[0]
    found = []

    def note(graph, inputs):
        found.extend(own_operators(graph.graph))
        return graph

    call = torch.compile(module, fullgraph=True, backend=note)
    with torch.set_grad_enabled(training):
        call(x, need_weights=need_weights)
    assert found == (["attend_shared_full"] if training else ["single_query"])


@pytest.mark.skipif("cpu" not in backends.available(), reason="nothing can be forced")
def test_compiled_clip_runs_on_a_backend_that_is_forced():
    module = build()
    x = draw_tokens(module, 2, LENGTH)[0]
    with torch.no_grad(), backends.use_backend("cpu"):
        actual = compiled(module, "forward")(x)
        for output, expected in zip(actual, module(x), strict=True):
            torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_exported_clip_holds_no_operator_of_this_package(mode):
    """It may be run where the package is not."""
    module = build()
    x = draw_tokens(module, 2, LENGTH)[0]
    with mode():
        program = torch.export.export(module, (x,))
        torch.testing.assert_close(program.module()(x), module(x))
    assert own_operators(program.graph) == []


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", ["forward_step", "forward_steps", "forward"])
def test_autocast_around_a_compiled_call_is_that_of_the_eager_one(way, training):
    module, twin = build(forward_returns_attn_mask=False), build(forward_returns_attn_mask=False)
    x = draw_tokens(module, 2, 2 * LENGTH)[0]
    x = x[:, 0] if way == "forward_step" else x
    module.start_streams(2)
    twin.start_streams(2)
    torch._dynamo.reset()
    call = torch.compile(getattr(module, way), fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        out, expected = call(x), getattr(twin, way)(x)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=5e-2, atol=5e-2)


def test_invariance_under_autocast_is_refused_by_compiled_calls_too():
    module = build(batch_invariant=True)
    x = draw_tokens(module, 2, 1)[0][:, 0]
    module.start_streams(2)
    torch._dynamo.reset()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for call in (module.forward_step, torch.compile(module.forward_step, backend="aot_eager")):
            with pytest.raises(RuntimeError, match=r"autocast|number of streams"):
                call(x)


def test_one_graph_serves_clips_of_all_lengths_in_plain_pytorch():
    """Whose products of bfloat16 are of as many numbers as keep rows apart."""
    module = build(embed_dim=36, dtype=torch.bfloat16, batch_first=True).eval()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    call = torch.compile(module, dynamic=True, fullgraph=True, backend=count)
    with torch.no_grad(), backends.use_backend("torch"):
        for length in (33, 37, 50, 64, 70):
            x = draw_tokens(module, 4, length)[0]
            torch.testing.assert_close(call(x)[0], module(x)[0], rtol=1e-2, atol=1e-2)
    assert len(graphs) == 1


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_clip_may_be_of_any_length(dtype, strict):
    module = build(embed_dim=36, dtype=dtype, batch_first=True).eval()
    n, s = torch.export.Dim("n"), torch.export.Dim("s", min=2)
    x = draw_tokens(module, 4, 37)[0]
    shapes = ({0: n, 1: s},)
    run = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=strict).module()
    for streams, length in ((3, 5), (20, 64), (33, 71)):
        x = draw_tokens(module, streams, length)[0]
        with backends.use_backend("torch"):
            answers = module(x)
        for found, expected in zip(run(x), answers, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


class Call(torch.nn.Module):
    """What export needs: a module whose forward is another's."""

    def __init__(self, module, way):
        super().__init__()
        self.module, self.way = module, way

    def forward(self, x):
        return getattr(self.module, self.way)(x)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("way", ["forward_step", "forward_steps"])
@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        ({"query_index": 1}, torch.no_grad),
        ({"query_index": 1}, torch.enable_grad),
        ({"formulation": "input"}, torch.no_grad),
        ({"cache_dtype": torch.int8}, torch.no_grad),
    ],
    ids=["kv", "kv in training", "input", "8 bits"],
)
def test_exported_steps_hold_no_operator_of_this_package(arguments, mode, way, strict):
    module, twin = build(**arguments), build(**arguments)
    x = draw_tokens(module, 2, 4 * LENGTH)[0]
    taken = x.unbind(1) if way == "forward_step" else x.split(LENGTH, dim=1)
    with torch.no_grad():
        for each in (module, twin):
            each.forward_steps(x)
    with mode():
        program = torch.export.export(Call(module, way), (taken[0],), strict=strict)
    run = program.module()
    with torch.no_grad():
        for tokens in taken:
            torch.testing.assert_close(run(tokens), getattr(twin, way)(tokens))
    assert own_operators(program.graph) == []


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("least", "most"), [(2, LENGTH), (LENGTH + 1, 1000)], ids=["up to a window", "over a window"]
)
@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_exported_program_takes_any_number_of_tokens(formulation, least, most, strict):
    module, twin = (build(formulation=formulation) for _ in range(2))
    with torch.no_grad():
        for each in (module, twin):
            each.start_streams(3)
        x = draw_tokens(module, 3, 400)[0]
        shapes = ({1: torch.export.Dim("t", min=least, max=most)},)
        call = Call(module, "forward_steps")
        run = torch.export.export(
            call, (x[:, : least + 1].contiguous(),), dynamic_shapes=shapes, strict=strict
        ).module()
        for count in (least, min(most, 150), least + 1):  # the second is over a block of queries
            torch.testing.assert_close(run(x[:, :count]), twin.forward_steps(x[:, :count]))
            x = x[:, count:]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("trained", [False, True])
def test_traced_steps_go_on_from_the_streams_that_were_there(trained):
    module, twin = build().requires_grad_(trained), build()
    x = draw_tokens(module, 2, 2 * LENGTH)[0].unbind(1)
    module.start_streams(2)
    twin.start_streams(2)
    traced = torch.jit.trace(Call(module, "forward_step"), (x[0],), check_trace=False)
    with torch.no_grad():
        twin.forward_step(x[0])
        for token in x[1:]:
            torch.testing.assert_close(traced(token), twin.forward_step(token))


class Anew(torch.nn.Module):
    """A program that begins its streams itself."""

    def __init__(self, module, begin):
        super().__init__()
        self.module, self.begin = module, begin

    def forward(self, x):
        self.begin(self.module)
        return self.module.forward_steps(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("begin", ["clean_state", "start_streams"])
@pytest.mark.parametrize("way", ["export", "trace"])
def test_program_may_begin_streams_of_its_own(way, begin, begun):
    module, twin = build(), build()
    x, other, _ = draw_tokens(module, 2, 2 * LENGTH)
    if begun:
        module.start_streams(2)
    call = (lambda m: m.clean_state()) if begin == "clean_state" else (lambda m: m.start_streams(2))
    program = Anew(module, call)
    if way == "export":
        run = torch.export.export(program, (x,)).module()
    else:
        run = torch.jit.trace(program, (x,), check_trace=False)
    expected = Anew(twin, call)
    with torch.no_grad():
        for clip in (x, other, x):
            torch.testing.assert_close(run(clip), expected(clip))


# name: (what happens before, what is said)
UNKEPT = {
    "no streams": (lambda module, token: None, "start_streams"),
    "windows that are not full": (
        lambda module, token: module.forward_step(token),
        "start_streams",
    ),
    "nearly full windows": (lambda module, token: module.warm_up(token.shape), "start_streams"),
    "streams of a graph": (
        lambda module, token: module.forward_steps(token.unsqueeze(1).repeat(1, LENGTH, 1)),
        "detach_state",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", ["export", "trace"])
@pytest.mark.parametrize("before", UNKEPT)
def test_program_of_steps_is_refused_where_it_would_keep_no_streams(before, way, monkeypatch):
    # Torch leaves a hook of its own behind where an export raises.
    hooks = "_global_buffer_registration_hooks"
    monkeypatch.setattr(torch.nn.modules.module, hooks, OrderedDict())
    module, (happens, said) = build(), UNKEPT[before]
    token = draw_tokens(module, 2, 1)[0][:, 0]
    with torch.set_grad_enabled(said == "detach_state"):
        happens(module, token)
    state = module.get_state()
    make = torch.export.export if way == "export" else partial(torch.jit.trace, check_trace=False)
    with pytest.raises(RuntimeError, match=said):
        make(Call(module, "forward_step"), (token,))
    if state is None:
        assert module.get_state() is None
    else:
        assert_same_state(module.get_state(), state)


def test_program_of_steps_is_refused_for_onnx(monkeypatch):
    hooks = "_global_buffer_registration_hooks"
    monkeypatch.setattr(torch.nn.modules.module, hooks, OrderedDict())
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    module = build()
    module.start_streams(2)
    with pytest.raises(RuntimeError, match=r"ONNX.*_forward_step"):
        torch.export.export(Call(module, "forward_step"), (torch.zeros(2, module.embed_dim),))


@pytest.mark.skipif("cpu" not in backends.available(), reason="no kernel to insist on")
def test_export_keeps_what_plain_pytorch_cannot_do(monkeypatch):
    module = build(batch_invariant=True)
    x = draw_tokens(module, 2, LENGTH)[0]
    with torch.no_grad():
        module.forward_steps(x)
        program = torch.export.export(Call(module, "forward_step"), (x[:, 0],))
        assert own_operators(program.graph) == ["ring_step_"]
        module.batch_invariant = False
        # Torch 2.10 leaves a hook of its own behind where an export raises.
        hooks = "_global_buffer_registration_hooks"
        monkeypatch.setattr(torch.nn.modules.module, hooks, OrderedDict())
        with backends.use_backend("cpu"), pytest.raises(RuntimeError, match="exported"):
            torch.export.export(Call(module, "forward_step"), (x[:, 0],))


@pytest.mark.parametrize("training", [False, True])
def test_compiled_clip_has_the_gradients_of_the_eager_one(training):
    module = build(dtype=torch.float64).train(training)
    x, *_ = draw_tokens(module, 2, LENGTH)

    def gradients(call):
        leaf = x.clone().requires_grad_()
        out, attn = call(leaf)
        total = out.square().sum() + attn.square().sum()
        return torch.autograd.grad(total, [leaf, *module.parameters()])

    for got, want in zip(
        gradients(compiled(module, "forward", "aot_eager")), gradients(module), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_trace_holds_no_operator_of_this_package(mode):
    """It may be run, or exported, where the package is not."""
    module = build().eval()
    query, other, _ = draw_tokens(module, 2, LENGTH)
    with mode():
        traced = torch.jit.trace(module, (query,))
        torch.testing.assert_close(traced(other), module(other))
    assert "continual_mha::" not in str(traced.inlined_graph)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_trace_of_a_warm_step_serves_streams_of_any_age(formulation):
    module = build(formulation=formulation).requires_grad_(False)
    x = draw_tokens(module, 2, LENGTH + 2)[0]

    def step(token, *state):
        output, following = module._forward_step(token, prev_state=state)
        return output, *following

    with torch.no_grad():
        module.forward_steps(x[:, : LENGTH + 1])
        traced = torch.jit.trace(step, (x[:, -1], *module.get_state()))
        module.reset(1)
        output, *following = traced(x[:, -1], *module.get_state())
        torch.testing.assert_close(output, module.forward_step(x[:, -1]))
        torch.testing.assert_close(following, list(module.get_state()))
