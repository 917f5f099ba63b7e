"""Which backend runs, what it says of itself, and the graphed step."""

import asyncio
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import INTERPRETED
from interruptions import interruptions
from oracles import LENGTH, build, draw_tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import continual_mha as co
from continual_mha import _native, backends, clip_node, ops, surroundings


@pytest.mark.skipif("triton" not in co.backends.available(), reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="Triton runs here")
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_forward_on_a_forced_backend_that_cannot_run_raises(grad, need_weights):
    mha = co.SingleOutputMultiheadAttention(8, 2, sequence_len=4)
    expected = pytest.raises(RuntimeError, match=r"attend_shared\w*; triton: .* are on cpu")
    with torch.set_grad_enabled(grad), co.use_backend("triton"), expected:
        mha(torch.randn(1, 4, 8), need_weights=need_weights)


def flops_of(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_flop_counter_sees_the_products_of_steps_that_are_repeated_too():
    N, E, H, L = 3, 16, 2, 5
    mha = co.SingleOutputMultiheadAttention(E, H, sequence_len=L).eval()
    tokens = torch.randn(2 * L, N, E)
    of_step = 2 * N * (4 * E**2 + 2 * L * E)
    with torch.no_grad():
        for token in tokens[:L]:
            mha.forward_step(token)
        for token in tokens[L:]:
            expected, found = mha.forward_step(token, update_state=False), []
            assert flops_of(lambda x=token, to=found: to.append(mha.forward_step(x))) == of_step
            torch.testing.assert_close(found[0], expected)
            with FlopCounterMode(display=False):
                assert "FlopCounterMode" in co.explain(mha, token)
            assert "FlopCounterMode" not in co.explain(mha, token)


@pytest.mark.parametrize("mode", ["forward", "forward_steps", "forward_step"])
def test_flop_counter_sees_gradients_and_changes_no_result(mode):
    mha = co.SingleOutputMultiheadAttention(16, 2, sequence_len=1, batch_first=True).double()
    tokens = torch.randn(3, 16) if mode == "forward_step" else torch.randn(3, 1, 16)
    tokens = tokens.double().requires_grad_()

    def run():
        tokens.grad, _ = None, mha.clean_state()
        with co.call_mode(mode):
            out = mha(tokens)
        (out[0] if mode == "forward" else out).square().sum().backward()
        return tokens.grad

    expected = run()
    forward, backward = 2 * 3 * (4 * 16**2 + 2 * 16), 2
    more = 0.01 if mode == "forward_steps" else 0.0  # the window before them, masked
    assert flops_of(run) == pytest.approx((1 + backward) * forward, rel=more)
    torch.testing.assert_close(tokens.grad, expected)


class OfPtflops(TorchDispatchMode):
    """In the way of `ptflops` with its backend `aten`: the products that it sees."""

    __module__ = "ptflops.aten_engine"

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["forward", "forward_steps", "forward_step"])
def test_ptflops_sees_products(mode):
    mha = co.SingleOutputMultiheadAttention(16, 2, sequence_len=1).eval()
    tokens = torch.randn(3, 16) if mode == "forward_step" else torch.randn(3, 1, 16)
    for _ in range(3):
        with torch.no_grad(), OfPtflops() as counter:
            getattr(mha, mode)(tokens)
        assert counter.seen & {torch.ops.aten.addmm.default, torch.ops.aten.mm.default}


def test_no_backend_is_forced_when_an_interrupted_block_is_dropped():
    def block(_):
        with co.use_backend("torch"):
            pass

    with co.use_backend("cpu"):
        inside = False
        for _, kept in interruptions(lambda: None, block, backends, surroundings):
            with co.use_backend("triton"):
                kept.clear()
                inside = inside or backends.forced() == "triton"
                assert backends.forced() == "triton"
            backends._forced.set("cpu")
    assert inside


@pytest.mark.skipif("cpu" not in co.backends.available(), reason="no CPU library")
def test_flop_counter_refuses_no_call_that_plain_pytorch_may_not_run():
    token = torch.randn(3, 16)
    for invariant, name in ((True, "auto"), (False, "cpu")):
        mha = co.SingleOutputMultiheadAttention(
            16, 2, sequence_len=1, batch_invariant=invariant
        ).eval()
        with torch.no_grad(), co.use_backend(name):
            expected = mha.forward_step(token, update_state=False)
            with FlopCounterMode(display=False):
                found = mha.forward_step(token, update_state=False)
        assert torch.equal(found, expected)


class Operators(TorchDispatchMode):
    """The operators of the CPU library that ran, or those that ask the backends who runs them."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._opname.startswith(("cpu_", "attend_shared", "single_query")):
            self.names.append(function._opname)
        return result


# name: (constructor's arguments, call with a clip, whether a gradient is needed,
# whether the CPU library does it)
ENTRIES = {
    "forward": ({}, lambda m, x: m(x), False, True),
    "forward without weights": ({}, lambda m, x: m(x, need_weights=False), False, True),
    "forward with heads of one feature": ({"num_heads": 12}, lambda m, x: m(x), False, True),
    "forward of bfloat16": (
        {"dtype": torch.bfloat16, "embed_dim": 64},
        lambda m, x: m(x[:1, :2].expand(33, 2, -1)),
        False,
        True,
    ),
    "forward of all queries": ({"single_output_forward": False}, lambda m, x: m(x), False, False),
    "forward with dropout": ({"dropout": 0.5}, lambda m, x: m(x), False, True),
    "forward with a gradient": ({}, lambda m, x: m(x), True, True),
    "forward with a gradient and extra slots": (
        {"add_zero_attn": True, "dropout": 0.5},
        lambda m, x: m(x),
        True,
        True,
    ),
    "forward with a gradient, heads of one feature": (
        {"num_heads": 12},
        lambda m, x: m(x, need_weights=False),
        True,
        True,
    ),
    "step": ({}, lambda m, x: m.forward_step(x[:, 0]), False, True),
    "step over inputs": (
        {"formulation": "input"},
        lambda m, x: m.forward_step(x[:, 0]),
        False,
        True,
    ),
    "functional step": ({}, lambda m, x: m._forward_step(x[:, 0]), False, True),
    "steps": ({}, lambda m, x: m.forward_steps(x), False, True),
    "steps over inputs": ({"formulation": "input"}, lambda m, x: m.forward_steps(x), False, True),
    "step with dropout": ({"dropout": 0.5}, lambda m, x: m.forward_step(x[:, 0]), False, False),
    "step with a gradient": ({}, lambda m, x: m.forward_step(x[:, 0]), True, True),
    "step over inputs with a gradient": (
        {"formulation": "input"},
        lambda m, x: m.forward_step(x[:, 0]),
        True,
        True,
    ),
    "steps with a gradient": ({}, lambda m, x: m.forward_steps(x), True, True),
    "steps over inputs with a gradient": (
        {"formulation": "input"},
        lambda m, x: m.forward_steps(x),
        True,
        True,
    ),
}


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="more of them run here")
@pytest.mark.parametrize("name", ["cpu", "cuda", "triton", "torch"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_forced_backend_runs_any_call_or_says_why_not(entry, name):
    arguments, call, grad, on_cpu = ENTRIES[entry]
    runs = name == "torch" or (name == "cpu" and on_cpu and "cpu" in backends.available())
    module = build(**arguments)
    x = torch.randn(2, LENGTH, module.embed_dim, dtype=module.out_proj.weight.dtype)
    with torch.set_grad_enabled(grad), co.use_backend(name), Operators() as ran:
        if runs:
            call(module, x)
        else:
            with pytest.raises(RuntimeError, match=rf"no backend can run .*; {name}: .+"):
                call(module, x)
    assert bool(ran.names) == (runs and name == "cpu")
    assert module.get_state() is None or runs


def test_forced_backend_under_the_compiler_runs_or_says_why_not():
    module = build()
    x = torch.randn(2, LENGTH, module.embed_dim)
    names = []

    def note(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    call = torch.compile(module, backend=note, fullgraph=True)
    if "cpu" in backends.available():
        with torch.no_grad(), co.use_backend("cpu"):
            compiled = call(x)
        assert "continual_mha.single_query" in names
        torch.testing.assert_close(compiled[0], module(x)[0])
        torch.compiler.reset()
    with co.use_backend("cuda"), pytest.raises(RuntimeError, match="cuda: "):
        call(x)


def test_plain_pytorch_is_always_available():
    assert backends.available()[-1] == "torch"


def test_forced_backend_that_cannot_run_says_why():
    module = build(sequence_len=3)
    x = draw_tokens(module, 2, 1)[0][:, 0]
    with (
        torch.no_grad(),
        co.use_backend("cuda"),
        pytest.raises(RuntimeError, match=r"no backend can run ring_step_; cuda: .+"),
    ):
        module.forward_step(x)
    assert module.get_state() is None


def test_forcing_ends_with_its_block_even_after_an_error():
    before = backends.order("cpu")
    with pytest.raises(ValueError, match="query must"), co.use_backend("cuda"):
        build().forward_step(torch.zeros(1, 1))
    assert backends.order("cpu") == before != ("cuda",)


def test_auto_inside_a_forced_block_chooses_again():
    with co.use_backend("torch"), co.use_backend("auto"):
        assert backends.order("cpu") == ("cpu", "torch")


def test_forcing_is_seen_by_no_other_thread():
    """Each is inside its block while the other looks."""
    both = threading.Barrier(2, timeout=30)

    def order_inside(name):
        with co.use_backend(name):
            both.wait()
            seen = backends.order("cpu")
            both.wait()
        return seen

    with ThreadPoolExecutor(2) as threads:
        seen = list(threads.map(order_inside, ("torch", "cuda")))
    assert seen == [("torch",), ("cuda",)]
    with co.use_backend("cuda"), ThreadPoolExecutor(1) as thread:
        assert thread.submit(backends.order, "cpu").result() == ("cpu", "torch")


def attended(x):
    return ops.call("attend_shared", x[:, :2], x, None, None, None)[0]


# What trains, and who finds its gradients: a module of the package and a function in it.
BACKWARDS = {
    "clip": (lambda module, x: module(x)[0], clip_node, "_gradients"),
    "step": (lambda module, x: module.forward_step(x[:, 0]), _native, "cpu_function"),
    "steps": (lambda module, x: module.forward_steps(x), _native, "cpu_function"),
    "operator": (lambda module, x: attended(x), ops, "_run_backward"),
}


@pytest.mark.skipif("cpu" not in co.backends.available(), reason="it has the nodes")
@pytest.mark.parametrize("call", BACKWARDS)
def test_backward_on_another_thread_is_by_the_backend_of_the_forward(call, monkeypatch):
    """As on a GPU, where autograd has threads of its own."""
    forward, where, name = BACKWARDS[call]
    module = build()
    module.start_streams(2)
    x = draw_tokens(module, 2, LENGTH)[0].requires_grad_()
    with co.use_backend("cpu"):
        out = forward(module, x).sum()
    forced, plain = [], getattr(where, name)
    monkeypatch.setattr(where, name, lambda *args: forced.append(backends.forced()) or plain(*args))
    with ThreadPoolExecutor(1) as thread:
        thread.submit(out.backward).result()
        assert thread.submit(backends.forced).result() is None
    assert forced == ["cpu"]
    assert x.grad is not None


def test_function_that_forces_gives_every_thread_back_what_it_had():
    """Also where one is called while another thread is in it."""
    found = []

    @co.use_backend("torch")
    def forced(here, until):
        here.set()
        assert until.wait(20)

    def call(around, here, until, back):
        with co.use_backend(around):
            forced(here, until)
            found.append((around, backends.forced()))
        back.set()

    first, second, back = (threading.Event() for _ in range(3))
    other = threading.Thread(target=call, args=("cpu", first, second, back), daemon=True)
    other.start()
    assert first.wait(20)
    call("cuda", second, back, threading.Event())
    other.join(20)
    assert sorted(found) == [("cpu", "cpu"), ("cuda", "cuda")]


def test_forcing_is_seen_by_no_other_task():
    async def order_inside(name):
        with co.use_backend(name):
            await asyncio.sleep(0)
            return backends.order("cpu")

    async def both():
        return await asyncio.gather(order_inside("torch"), order_inside("cuda"))

    assert asyncio.run(both()) == [("torch",), ("cuda",)]


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="fortran"), co.use_backend("fortran"):
        pass


@pytest.mark.parametrize("name", ["torch", "fortran", ""])
def test_environment_forces_a_backend(name):
    code = "import continual_mha; print(continual_mha.backends.order('cpu'))"
    environment = {**os.environ, "CONTINUAL_MHA_BACKEND": name}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    if name == "torch":
        assert done.stdout.strip() == "('torch',)"
    elif name == "":
        assert done.stdout.strip() == "('cpu', 'torch')"
    else:
        assert done.returncode != 0
        assert "CONTINUAL_MHA_BACKEND: there is no backend 'fortran'" in done.stderr


def test_import_loads_neither_the_compiler_nor_triton():
    """Which take longer than all of torch, and more than 100 MB."""
    heavy = "{'torch._dynamo', 'triton'} & set(sys.modules)"
    code = f"import sys, torch; before = {heavy}; import continual_mha; print({heavy} - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_explanation_names_formulation_and_backend():
    module = build(sequence_len=3)
    query = draw_tokens(module, 2, 3)[0]
    assert co.explain(module, query[:, 0]).splitlines()[1].startswith("cpu: runs it, and makes")
    assert co.explain(module, query).splitlines()[1].startswith("cpu: runs it, and makes")
    delayed = co.explain(build(sequence_len=3, query_index=0), query)
    assert delayed.endswith("cpu: attends, where it covers sizes and dtype, or else torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(co.backends, "order", lambda device_type: ("triton", "cuda", "torch"))
        assert "triton: attends" in co.explain(module, query[:, 0])
    with torch.no_grad():
        with co.use_backend("torch"):
            step = co.explain(module, query[:, 0])
        assert step == "forward_step: formulation kv\ntorch: runs it"
        assert co.explain(module, query).startswith("forward_steps: formulation kv\n")
        module.formulation = "input"
        assert co.explain(module, query[:, 0]).startswith("forward_step: formulation input\n")
    assert module.get_state() is None


def test_explanation_gives_the_reason_of_every_backend_that_declines():
    module = build(sequence_len=3, dropout=0.5)
    x = draw_tokens(module, 2, 1)[0][:, 0]
    with torch.no_grad():
        lines = co.explain(module, x).splitlines()
    assert lines[-1] == "torch: runs it"
    assert lines[1].startswith("cpu: ")
    assert not lines[1].endswith("runs it")


@pytest.mark.parametrize(
    ("arguments", "given", "expected"),
    [
        ({}, {}, ["input", "cpu: runs it, as one node of autograd"]),
        (
            {"num_heads": 12},
            {},
            ["kv", "torch: runs it, which is cheaper here than what has kernels"],
        ),
        (
            {"add_bias_kv": True},
            {},
            ["input", "torch: multiplies by the weights; the rest:", "cpu: runs it"],
        ),
        (
            {},
            {"average_attn_weights": False},
            ["input", "cpu: it averages the weights over the heads", "torch: runs it"],
        ),
        (
            {},
            {"attn_mask": torch.zeros(1, 3, requires_grad=True)},
            ["input", "cpu: the mask needs a gradient", "torch: runs it"],
        ),
        (
            {"single_output_forward": False},
            {},
            ["kv", "cpu: it attends with one query", "torch: runs it"],
        ),
    ],
)
def test_explanation_of_a_clip(
    arguments: dict[str, object], given: dict[str, object], expected: list[str]
) -> None:
    module = build(sequence_len=3, **arguments)
    query = draw_tokens(module, 2, 3)[0]
    lines = co.explain(module, query, call_mode="forward", **given).splitlines()
    assert lines == [f"forward: formulation {expected[0]}", *expected[1:]]


def test_explanation_of_a_clip_without_a_gradient():
    module = build(sequence_len=3)
    query = draw_tokens(module, 2, 3)[0]
    with torch.no_grad():
        said = co.explain(module, query, call_mode="forward")
        assert said == "forward: formulation input\ncpu: runs it"
        with co.use_backend("torch"):
            assert co.explain(module, query, call_mode="forward").endswith("\ntorch: runs it")


@pytest.mark.parametrize(
    ("arguments", "given", "autocast"),
    [
        ({}, {}, True),
        ({}, {"attn_mask": torch.zeros(1, 3, requires_grad=True)}, False),
        ({}, {"average_attn_weights": False}, False),
        ({"single_output_forward": False}, {}, False),
    ],
)
def test_explanation_of_a_clip_says_that_nothing_runs_where_forward_raises(
    arguments, given, autocast
):
    module = build(sequence_len=3, **arguments)
    query = draw_tokens(module, 2, 3)[0]
    for name in ("cpu", "cuda"):
        with co.use_backend(name), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            said = co.explain(module, query, call_mode="forward", **given)
            assert f"\n{name}: " in said
            assert "runs it" not in said
            with pytest.raises(RuntimeError, match="no backend can run"):
                module(query, **given)


def test_explanation_asks_for_a_call_that_there_is():
    module = build(sequence_len=3)
    query = draw_tokens(module, 2, 3)[0]
    with pytest.raises(ValueError, match="call_mode must be one of"):
        co.explain(module, query, call_mode="backward")
    with pytest.raises(ValueError, match="query must have the shape"):
        co.explain(module, query, call_mode="forward_step")
    with pytest.raises(ValueError, match="steps take no masks"):
        co.explain(module, query, attn_mask=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="is_causal"):
        co.explain(module, query, is_causal=True, call_mode="forward")


def test_explanation_of_a_clip_of_one_stream():
    module = build(sequence_len=3, single_output_forward=False)
    query = draw_tokens(module, 2, 3)[0]
    together, alone = (co.explain(module, x, call_mode="forward") for x in (query, query[0]))
    assert alone == together


def test_explanation_of_a_step_over_inputs_beside_dropout():
    module = build(sequence_len=3, formulation="input", dropout=0.5)
    assert "cpu: attends" in co.explain(module, draw_tokens(module, 2, 1)[0][:, 0])


def test_explanation_checks_tokens_as_a_step_does():
    module = build(sequence_len=3)
    with pytest.raises(ValueError, match="query must have"):
        co.explain(module, torch.zeros(2, 5))
    with pytest.raises(TypeError, match="query must be a tensor"):
        co.explain(module, None)


def test_explanation_is_of_one_module_of_attention():
    with pytest.raises(TypeError, match="takes a SingleOutputMultiheadAttention"):
        co.explain(torch.nn.Sequential(build(sequence_len=3)), torch.zeros(2, 12))


def test_graphed_step_needs_a_cuda_device():
    module = build(sequence_len=3)
    with pytest.raises(ValueError, match="on a CUDA device, not on cpu"):
        co.GraphedStep(module, torch.zeros(2, module.embed_dim))
    with pytest.raises(TypeError, match="example must be a tensor"):
        co.GraphedStep(module, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_graphed_step_equals_the_eager_step_across_the_rings_end(formulation):
    module = build(sequence_len=5, formulation=formulation).cuda().requires_grad_(False)
    other = co.SingleOutputMultiheadAttention.build_from(module, 5, formulation=formulation)
    other = other.requires_grad_(False)
    x = torch.randn(3, 17, module.embed_dim, device="cuda")
    graphed = co.GraphedStep(module, x[:, 0])
    other.start_streams(3)
    for t in range(17):
        if t == 8:
            module.reset(torch.tensor([True, False, False], device="cuda"))
            other.reset([0])
        if t == 10:
            graphed.active[1] = False
        active = graphed.active.clone()
        assert torch.equal(graphed(x[:, t]), other.forward_step(x[:, t], active=active))
    module.clean_state()
    with pytest.raises(RuntimeError, match="replaced"):
        graphed(x[:, 0])
