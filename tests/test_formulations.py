"""Both formulations give the same numbers: in `forward` by cost, in steps by choice."""

from __future__ import annotations

import copy
import math
from functools import partial

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
    seeded,
    stack,
    step_through,
    to_layout,
    window_attention,
)
from test_forward import masks_for
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import continual_mha
from bench import formulations as bench
from bench import grid
from continual_mha import (
    InputState,
    RingState,
    backends,
    clip_node,
    clips,
    devices,
    formulations,
    mixing,
    reference,
)

SELF_ATTENTION = [
    name for name, arguments in CONSTRUCTIONS.items() if not {"kdim", "vdim"} & set(arguments)
]
DROPOUT = 0.4
SEED = torch.tensor([5])


def agree(left, right, tolerance=1e-10):
    """Equal within `tolerance` of the largest magnitude; NaN where the other has NaN."""
    assert left.shape == right.shape
    scale = max(1.0, right.detach().nan_to_num().abs().max().item())
    torch.testing.assert_close(
        left, right, rtol=0, atol=tolerance * scale, equal_nan=True, check_dtype=True
    )


def dropped(slots, weights, dropout_p):
    """What the operators drop by `SEED`: of all weights of a clip, or of the slots behind it."""
    first = 0 if weights.shape[-1] >= slots else slots
    all_slots = weights.new_empty((*weights.shape[:-1], first + weights.shape[-1]))
    scale = reference._shared_dropout(all_slots, SEED.to(weights.device), dropout_p)
    return weights * scale[..., first:]


def forward_with(monkeypatch, moved, module, tokens, **arguments):
    """Outputs and gradients of `forward` in one formulation, whatever the cost rule says."""
    monkeypatch.setattr(clips, "input_formulation_is_cheaper", lambda *sizes: moved)
    seed_of = lambda dropout_p, device: SEED.to(device) if dropout_p else None
    for drawing in (clip_node, mixing):
        monkeypatch.setattr(drawing, "dropout_seed", seed_of)
    monkeypatch.setattr(torch.nn.functional, "dropout", partial(dropped, tokens[1].shape[1]))
    tokens = [x.detach().requires_grad_() for x in tokens]
    masks = {
        name: mask.detach().requires_grad_(mask.is_floating_point())
        for name, mask in arguments.items()
        if isinstance(mask, torch.Tensor)
    }
    out, weights = module(*(to_layout(module, x) for x in tokens), **{**arguments, **masks})
    results = [out] if weights is None else [out, weights]
    generator = seeded(9)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in results]
    leaves = [*tokens, *module.parameters(), *(m for m in masks.values() if m.requires_grad)]
    grads = torch.autograd.grad(results, leaves, cotangents, allow_unused=True)
    return results, grads


def assert_formulations_agree(monkeypatch, module, tokens, **arguments):
    results, grads = forward_with(monkeypatch, False, module, tokens, **arguments)
    moved_results, moved_grads = forward_with(monkeypatch, True, module, tokens, **arguments)
    for left, right in zip(moved_results, results, strict=True):
        agree(left, right)
    if any(x.isnan().any() for x in results):
        return  # and so are the gradients
    for left, right in zip(moved_grads, grads, strict=True):
        agree(
            torch.zeros(()) if left is None else left, torch.zeros(()) if right is None else right
        )


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_outputs_and_gradients_of_forward_agree(
    construction, dropout, need_weights, monkeypatch, backend
):
    module = build(**CONSTRUCTIONS[construction], dropout=dropout, dtype=torch.float64)
    tokens = draw_tokens(module, 3, LENGTH + 2)
    assert_formulations_agree(monkeypatch, module, tokens, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", masks_for(1, 1, 1, 1))
@pytest.mark.parametrize("construction", ["defaults", "kdim_and_vdim", "bias_kv_and_zero_attn"])
def test_outputs_and_gradients_under_masks_agree(
    construction, mask, need_weights, monkeypatch, backend
):
    module = build(**CONSTRUCTIONS[construction], dropout=DROPOUT, dtype=torch.float64)
    tokens = draw_tokens(module, 3, LENGTH)
    masks = masks_for(3, module.num_heads, 1, LENGTH, torch.float64)[mask]
    assert_formulations_agree(monkeypatch, module, tokens, need_weights=need_weights, **masks)
    assert_formulations_agree(
        monkeypatch, module.eval(), tokens, need_weights=need_weights, **masks
    )


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("construction", ["defaults", "no_bias", "bias_kv_and_zero_attn"])
def test_a_stream_whose_clip_is_all_masked_agrees(construction, need_weights, monkeypatch, backend):
    module = build(**CONSTRUCTIONS[construction], dtype=torch.float64)
    tokens = draw_tokens(module, 3, LENGTH)
    hidden = torch.zeros(3, LENGTH, dtype=torch.bool)
    hidden[1] = True
    assert_formulations_agree(
        monkeypatch, module, tokens, key_padding_mask=hidden, need_weights=need_weights
    )


# heads of one feature: PyTorch multiplies their rows by broadcasting
COUNTED = {torch.ops.aten.mul: lambda *shapes, out_shape, **options: 2 * math.prod(out_shape)}


def flops_of_forward(monkeypatch, moved, module, tokens):
    monkeypatch.setattr(clips, "input_formulation_is_cheaper", lambda *sizes: moved)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter, torch.no_grad():
        module(*tokens)
    return counter.get_total_flops()


# (heads, embed_dim, kdim, vdim): the longest clip for which projecting keys and values is cheaper
EDGES = {
    (2, 12, 12, 12): 1,
    (1, 2, 2, 2): 1,  # a tie
    (2, 8, 3, 5): 1,
    (4, 12, 30, 6): 1,
    (8, 16, 16, 16): 1,
    (12, 12, 12, 12): 12,  # a tie
    (12, 12, 7, 10): 8,
    (16, 16, 40, 24): 32,  # a tie
}


@pytest.mark.parametrize("sizes", EDGES)
@continual_mha.use_backend("torch")  # whose operators the counter knows
def test_cost_rule_chooses_as_counted_multiplications_do(sizes, monkeypatch):
    heads, embed_dim, kdim, vdim = sizes
    rule = clips.input_formulation_is_cheaper
    longest = EDGES[sizes]
    for clip in sorted({1, 2, 3, longest - 1, longest, longest + 1, 2 * longest, 100} - {0}):
        module = build(
            embed_dim=embed_dim, num_heads=heads, kdim=kdim, vdim=vdim, sequence_len=clip
        )
        tokens = draw_tokens(module, 1, clip)
        projected, moved = (
            flops_of_forward(monkeypatch, way, module, tokens) for way in (False, True)
        )
        assert rule(heads, clip, embed_dim, kdim, vdim) == (moved < projected)
        assert rule(heads, clip, embed_dim, kdim, vdim) == (clip > longest)


def test_kernels_are_worth_some_multiplications():
    """Of a clip of one token too, unless its heads are narrow."""
    for heads, moves in ((1, True), (2, True), (16, False)):
        assert clips.input_formulation_is_cheaper(heads, 1, 16, 16, 16, eighths=1) == moves
        assert not clips.input_formulation_is_cheaper(heads, 1, 16, 16, 16)
        module = build(embed_dim=16, num_heads=heads, sequence_len=1)
        x = torch.zeros(2, 1, 16)
        said = continual_mha.explain(module, x, call_mode="forward")
        assert said.startswith(f"forward: formulation {'input' if moves else 'kv'}")


@pytest.mark.skipif("cpu" not in backends.available(), reason="plain PyTorch runs")
@pytest.mark.parametrize("grad", [False, True])
def test_kernels_are_worth_nothing_where_torch_multiplies_faster(grad, monkeypatch):
    monkeypatch.setattr("continual_mha._native.cpu_isa", lambda: "avx2")
    monkeypatch.setattr("continual_mha.clip_node._CPU_LARGE_PRODUCT", 4 * 16 * 16)
    module = build(embed_dim=16, num_heads=2, sequence_len=1)
    with torch.set_grad_enabled(grad):
        for streams, formulation in ((3, "input"), (4, "kv")):
            x = torch.zeros(streams, 1, 16)
            said = continual_mha.explain(module, x, call_mode="forward")
            assert said.startswith(f"forward: formulation {formulation}")


@continual_mha.use_backend("torch")  # whose operators the counter knows
def test_forward_takes_the_cheaper_formulation(monkeypatch):
    module = build(embed_dim=12, num_heads=12, sequence_len=12)
    for clip, moved in ((12, False), (13, True)):
        tokens = draw_tokens(module, 2, clip)
        with (
            FlopCounterMode(display=False, custom_mapping=COUNTED) as counter,
            torch.no_grad(),
        ):
            module(*tokens)
        chosen = counter.get_total_flops()
        with monkeypatch.context() as patch:
            assert chosen == flops_of_forward(patch, moved, module, tokens)
            assert chosen <= flops_of_forward(patch, not moved, module, tokens)


# -- steps ---------------------------------------------------------------------------------------


def run_mixed(module, x):
    """Single tokens, several at once, single ones again; the outputs as one tensor."""
    cuts = [0, 2, LENGTH + 1, LENGTH + 3, 2 * LENGTH + 4, x.shape[1]]
    outputs = []
    for i in range(len(cuts) - 1):
        chunk = x[:, cuts[i] : cuts[i + 1]]
        if i % 2:
            outputs.append(run_steps(module, chunk))
        else:
            singles = [o for o in step_through(module, chunk) if o is not None]
            outputs.append(torch.stack(singles, 1) if singles else None)
    return torch.cat([o for o in outputs if o is not None], 1)


RUNS = {
    "one by one": lambda module, x: stack(step_through(module, x), module),
    "at once": run_steps,
    "mixed": run_mixed,
}
MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("construction", SELF_ATTENTION)
def test_input_formulated_stream_equals_the_window(construction, run, mode, backend):
    module = build(**CONSTRUCTIONS[construction], formulation="input")
    x = draw_tokens(module, 3, 4 * LENGTH)[0]
    with mode():
        output = RUNS[run](module, x)
    assert module.formulation == "input"
    assert isinstance(module.get_state(), InputState)
    assert_equals_window(output, module, x)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("construction", ["defaults", "no_bias", "middle_query"])
def test_fused_operator_over_a_clip_equals_the_window(construction, dtype, monkeypatch, backend):
    ran = operators_run(monkeypatch)
    module = build(**CONSTRUCTIONS[construction], dtype=dtype)
    x = draw_tokens(module, 3, LENGTH)[0]
    with torch.no_grad():
        output, _ = module(to_layout(module, x), need_weights=False)
    assert ran == {"torch": [], "cpu": ["single_query"]}.get(backend, ["attend_shared"])
    assert_equals_window(to_layout(module, output), module, x)


def operators_run(monkeypatch):
    """The names of the operators that run from now on, in their order."""
    names = []
    choose = backends.choose
    monkeypatch.setattr(
        backends, "choose", lambda name, args: names.append(name) or choose(name, args)
    )
    return names


@pytest.mark.skipif("cpu" not in backends.available(), reason="the native library was not built")
@pytest.mark.parametrize(
    ("dtype", "streams", "clip", "expected"),
    [
        (torch.bfloat16, 63, 7, "single_query"),
        # 14 slots of heads, 8 features; and torch has instructions to multiply them
        (torch.bfloat16, 64, 7, "attend_shared"),
        (torch.bfloat16, 64, 8, "single_query"),
        (torch.float32, 64, 7, "single_query"),
    ],
)
def test_a_clip_on_the_cpu_is_left_to_matrix_products_only_where_those_gain(
    dtype, streams, clip, expected, monkeypatch, isa
):
    by_unit = isa == "amx" and dtype == torch.bfloat16 and streams == 64  # all of it, as a node
    if isa in ("avx2", "avx512"):
        expected = "single_query"
    module = build(embed_dim=8, num_heads=2, sequence_len=clip, dtype=dtype)
    ran = operators_run(monkeypatch)
    with torch.no_grad():
        module(draw_tokens(module, streams, clip)[0], need_weights=False)
    assert ran == ([] if by_unit else [expected])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("construction", SELF_ATTENTION)
def test_step_over_inputs_equals_the_window_in_every_dtype(construction, dtype, backend):
    module = build(**CONSTRUCTIONS[construction], formulation="input", dtype=dtype)
    x = draw_tokens(module, 3, 3 * LENGTH)[0]
    with torch.no_grad():
        output = stack(step_through(module, x), module)
    assert_equals_window(output, module, x)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("construction", SELF_ATTENTION)
def test_streams_and_their_gradients_agree(construction, run, backend):
    results = []
    for formulation in ("kv", "input"):
        module = build(**CONSTRUCTIONS[construction], formulation=formulation, dtype=torch.float64)
        x = draw_tokens(module, 2, 3 * LENGTH)[0].requires_grad_()
        output = RUNS[run](module, x)
        cotangent = torch.linspace(-1, 1, output.numel(), dtype=x.dtype).view(output.shape)
        leaves = (x, *module.parameters())
        results.append((output, *torch.autograd.grad(output, leaves, cotangent)))
    for left, right in zip(*results, strict=True):
        agree(left, right)


@pytest.mark.parametrize("query_index", [-1, 1])
def test_dropout_of_a_step_is_the_same_in_both_formulations(query_index):
    outputs = []
    for formulation in ("kv", "input"):
        module = build(
            formulation=formulation,
            dropout=DROPOUT,
            query_index=query_index,
            add_bias_kv=True,
            dtype=torch.float64,
        )
        x = draw_tokens(module, 3, LENGTH + 3)[0]
        with torch.no_grad():
            step_through(module.eval(), x[:, :-1])
            plain = module.forward_step(x[:, -1], update_state=False)
            torch.manual_seed(3)
            outputs.append(module.train().forward_step(x[:, -1]))
        assert not torch.allclose(outputs[-1], plain)
    agree(*outputs)


@pytest.mark.parametrize("query_index", [-1, 1])
@pytest.mark.parametrize("run", RUNS)
def test_new_weights_in_mid_stream_keep_only_an_input_formulated_stream_exact(
    run, query_index, backend
):
    past = LENGTH + 2
    modules = {
        name: build(formulation=name, query_index=query_index, dtype=torch.float64)
        for name in ("kv", "input")
    }
    x = draw_tokens(modules["kv"], 3, past + 4 * LENGTH)[0]
    outputs = {}
    for name, module in modules.items():
        other = build(seed=4, query_index=query_index, dtype=torch.float64)
        with torch.no_grad():
            RUNS[run](module, x[:, :past])
            module.load_state_dict(other.state_dict())
            outputs[name] = torch.stack(step_through(module, x[:, past:]), 1)
    expected = window_attention(modules["input"], x)[:, past - LENGTH + 1 :]
    agree(outputs["input"], expected)
    mixed = LENGTH - 1  # outputs that still see a token from before
    off = (outputs["kv"] - expected).abs().amax(dim=(0, 2))
    assert (off[:mixed] > 1e-3).all()
    agree(outputs["kv"][:, 2 * mixed :], expected[:, 2 * mixed :])


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("query_index", [-1, 2])
def test_step_without_update_answers_and_leaves_no_trace(query_index, at_once, backend):
    module = build(formulation="input", query_index=query_index)
    x = draw_tokens(module, 3, 2 * LENGTH)[0]
    with torch.no_grad():
        step_through(module, x[:, :-2])
        before = module.get_state()
        call = module.forward_steps if at_once else module.forward_step
        new = x[:, -2:] if at_once else x[:, -2]
        answer = call(new, update_state=False)
        assert_same_state(module.get_state(), before)
        assert torch.equal(call(new), answer)


# -- the choice ----------------------------------------------------------------------------------


def test_formulation_can_be_read_before_and_after_the_first_step(monkeypatch):
    module = build()
    assert module.formulation == "auto"
    module.forward_step(draw_tokens(module, 2, 1)[0][:, 0], update_state=False)
    assert module.formulation == "auto"
    module.forward_step(draw_tokens(module, 2, 1)[0][:, 0])
    assert module.formulation == "kv"
    module.clean_state()
    assert module.formulation == "auto"
    monkeypatch.setattr(formulations, "choose", lambda *sizes: "input")
    module.forward_step(draw_tokens(module, 2, 1)[0][:, 0])
    assert module.formulation == "input"
    assert isinstance(module.get_state(), InputState)


@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_forced_formulation_is_read_and_kept(formulation):
    module = build(formulation=formulation)
    kind = {"kv": RingState, "input": InputState}[formulation]
    for _ in range(2):
        assert module.formulation == formulation
        module.forward_step(draw_tokens(module, 2, 1)[0][:, 0])
        assert module.formulation == formulation
        assert isinstance(module.get_state(), kind)
        module.clean_state()


def test_auto_keeps_keys_and_values_where_they_are_not_the_query(monkeypatch):
    monkeypatch.setattr(formulations, "choose", lambda *sizes: "input")
    module = build()
    query, key, value = draw_tokens(module, 3, 2 * LENGTH)
    with torch.no_grad():
        output = stack(step_through(module, query, key, value), module)
    assert module.formulation == "kv"
    assert_equals_window(output, module, query, key, value)
    for sizes in ({"kdim": 7}, {"vdim": 7}):
        other = build(**sizes)
        other.forward_step(*(x[:, 0] for x in draw_tokens(other, 2, 1)))
        assert other.formulation == "kv"


@pytest.mark.parametrize("past", [0, 2])
def test_warm_up_gives_inputs_of_zeros(past):
    module, twin = build(formulation="input"), build(formulation="input")
    tokens = draw_tokens(module, 2, past)[0]
    with torch.no_grad():
        for each in (module, twin):
            each.forward_steps(tokens)
        module.warm_up((2, module.embed_dim))
        twin.forward_steps(torch.zeros(2, LENGTH - 1, module.embed_dim))
    assert_same_state(module.get_state(), twin.get_state())


def chosen(batch_size, embed_dim, num_heads, length, dtype, device):
    with FakeTensorMode():
        like = torch.empty(batch_size, embed_dim, dtype=dtype, device=device)
        return formulations.choose(batch_size, embed_dim, num_heads, length, like)


@pytest.mark.parametrize(("dtype", "programs"), [(torch.bfloat16, 2), (torch.float32, 1)])
def test_auto_takes_inputs_where_few_programs_of_the_triton_kernel_read_a_stream(dtype, programs):
    plan = pytest.importorskip("continual_mha.triton_kernels.plan")
    size = dtype.itemsize
    for embed_dim in (48, 192, 512, 1000, 1024, 1536, 2048, 2049):
        for heads in (1, 2, 4, 8, 12, 16, 24, 32):
            serves = plan.input_step_covers(embed_dim, size) is None
            if serves:
                block = plan.input_plan(4096, embed_dim, heads, 4096, size).block_h
                serves = heads <= programs * (block if size == 2 else min(block, 8))
            kept = chosen(4096, embed_dim, heads, 4096, dtype, "cuda")
            assert (kept == "input") == serves, (embed_dim, heads)


def test_auto_takes_inputs_only_where_the_gpu_has_memory_for_the_kernel(monkeypatch):
    wide, narrow = (4096, 2048, 8, 64, torch.bfloat16), (4096, 1024, 8, 64, torch.bfloat16)
    assert chosen(*wide, "cuda") == "input"
    with monkeypatch.context() as patch:
        patch.setattr(devices, "has_little_memory", lambda device: True)
        assert chosen(*wide, "cuda") == "kv"
        assert chosen(*narrow, "cuda") == "input"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert chosen(*narrow, "cuda") == "kv"


def test_auto_takes_inputs_where_a_gpu_reads_large_rings():
    sizes = (512, 512, 8, 64)  # keys and values of 64 MiB in half precision
    assert chosen(*sizes, torch.bfloat16, "cuda") == "input"
    assert chosen(*sizes, torch.float16, "cuda") == "input"
    assert chosen(*sizes, torch.float32, "cuda") == "input"
    assert chosen(256, 512, 8, 64, torch.float32, "cuda") == "input"
    assert chosen(255, 512, 8, 64, torch.float32, "cuda") == "kv"
    assert chosen(512, 512, 9, 64, torch.float32, "cuda") == "kv"
    assert chosen(512, 1025, 8, 64, torch.float32, "cuda") == "kv"
    assert chosen(*sizes, torch.float64, "cuda") == "kv"
    assert chosen(*sizes, torch.bfloat16, "cpu") == "kv"
    assert chosen(511, 512, 8, 64, torch.bfloat16, "cuda") == "kv"
    assert chosen(512, 4096, 8, 64, torch.bfloat16, "cuda") == "kv"
    assert chosen(512, 512, 64, 64, torch.bfloat16, "cuda") == "kv"


def test_auto_keeps_keys_and_values_where_triton_does_not_serve(monkeypatch):
    sizes = (512, 512, 8, 64, torch.bfloat16, "cuda")
    for forced, expected in (
        ("triton", "input"),
        ("auto", "input"),
        ("cuda", "kv"),
        ("torch", "kv"),
    ):
        with continual_mha.use_backend(forced):
            assert chosen(*sizes) == expected, forced
    monkeypatch.setattr(formulations, "_HAS_TRITON", False)
    assert chosen(*sizes) == "kv"


@pytest.mark.parametrize(("forced", "expected"), [("auto", "input"), ("torch", "kv")])
def test_auto_chooses_while_torch_compile_traces_the_first_step(forced, expected, monkeypatch):
    """As it would for a GPU, whose tensors this machine may not have."""
    monkeypatch.setattr(formulations, "_DEVICE", "cpu")
    monkeypatch.setattr(formulations, "_CUDA_RING_BYTES", 1)
    torch._dynamo.reset()
    module = build().requires_grad_(False)
    compiled = torch.compile(module.forward_step, fullgraph=True, backend="eager")
    tokens = draw_tokens(module, 2, 1)[0]
    with continual_mha.use_backend(forced):
        compiled(tokens[:, 0])
    assert module.formulation == expected


@pytest.mark.parametrize("formulation", ["keys", "", None, 1])
def test_unknown_formulation_is_refused(formulation):
    with pytest.raises(ValueError, match="formulation must be auto, kv or input"):
        build(formulation=formulation)
    module = build()
    with pytest.raises(ValueError, match="formulation must be auto, kv or input"):
        module.formulation = formulation
    assert module.formulation == "auto"


@pytest.mark.parametrize("sizes", [{"kdim": 7}, {"vdim": 7}, {"kdim": 7, "vdim": 7}])
def test_input_formulation_needs_keys_and_values_of_the_querys_size(sizes):
    with pytest.raises(ValueError, match="kdim and vdim"):
        build(formulation="input", **sizes)
    module = build(**sizes)
    with pytest.raises(ValueError, match="kdim and vdim"):
        module.formulation = "input"


@pytest.mark.parametrize("past", [0, LENGTH + 1])
@pytest.mark.parametrize("role", [1, 2])
def test_input_formulated_stream_refuses_a_key_or_value_of_its_own(role, past):
    module = build(formulation="input")
    tokens = list(draw_tokens(module, 2, past + 2))
    step_through(module, tokens[0][:, :past])
    before = module.get_state()
    given = [tokens[0][:, past:]] * 3
    given[role] = tokens[role][:, past:]
    with pytest.raises(ValueError, match="formulation='kv'"):
        module.forward_step(*(x[:, 0] for x in given))
    with pytest.raises(ValueError, match="formulation='kv'"):
        module.forward_steps(*given)
    assert_same_state(module.get_state(), before)


# -- conversion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("past", [1, LENGTH - 1, LENGTH, 2 * LENGTH + 3])
@pytest.mark.parametrize("construction", SELF_ATTENTION)
def test_stream_of_inputs_goes_on_with_keys_and_values(construction, past, mode, backend):
    module = build(**CONSTRUCTIONS[construction], formulation="input", dtype=torch.float64)
    x = draw_tokens(module, 3, past + 2 * LENGTH)[0]
    with mode():
        outputs = step_through(module, x[:, :past])
        module.formulation = "kv"
        assert module.formulation == "kv"
        assert isinstance(module.get_state(), RingState)
        outputs += step_through(module, x[:, past:])
    agree(stack(outputs, module), window_attention(module, x))


def test_converted_state_is_that_of_a_stream_that_always_kept_keys_and_values():
    x = draw_tokens(build(), 3, LENGTH + 2)[0].double()
    states = []
    for formulation in ("kv", "input"):
        module = build(formulation=formulation, query_index=1, dtype=torch.float64)
        with torch.no_grad():
            step_through(module, x)
            module.formulation = "kv"
        states.append(module.get_state())
    for name in ("k", "v", "position"):
        agree(*(getattr(state, name) for state in states))
    waiting = [p % 4 for p in range(LENGTH - 1, LENGTH + 2)]  # slots of queries still to be asked
    agree(*(state.q[:, waiting] for state in states))


def test_keys_and_values_cannot_become_inputs():
    module = build(formulation="kv")
    x = draw_tokens(module, 2, 2 * LENGTH)[0]
    with torch.no_grad():
        outputs = step_through(module, x[:, :LENGTH])
        before = module.get_state()
        with pytest.raises(ValueError, match=r"cannot be turned back into inputs.*clean_state"):
            module.formulation = "input"
        assert module.formulation == "kv"
        assert_same_state(module.get_state(), before)
        outputs += step_through(module, x[:, LENGTH:])
        assert_equals_window(stack(outputs, module), module, x)
        module.clean_state()
        module.formulation = "input"
        assert_equals_window(stack(step_through(module, x), module), module, x)


def test_setting_the_formulation_that_is_there_changes_nothing():
    module = build(formulation="input")
    step_through(module, draw_tokens(module, 2, 3)[0])
    before = module.get_state()
    for formulation in ("input", "auto"):
        module.formulation = formulation
        assert_same_state(module.get_state(), before)
        assert module.formulation == "input"
    module.clean_state()
    assert module.formulation == "auto"


@pytest.mark.parametrize(("given", "taken"), [("kv", "input"), ("input", "kv")])
def test_state_of_the_other_formulation_is_refused_by_name(given, taken):
    donor, module = build(formulation=given), build(formulation=taken)
    for each in (donor, module):
        step_through(each, draw_tokens(each, 2, 2)[0])
    before = module.get_state()
    with pytest.raises(TypeError, match=f"formulation='{taken}'"):
        module.set_state(donor.get_state())
    with pytest.raises(TypeError, match=f"formulation='{taken}'"):
        module.set_stream(0, donor.get_stream(0))
    assert_same_state(module.get_state(), before)


# -- streams of inputs ---------------------------------------------------------------------------


@pytest.mark.parametrize("query_index", [-1, 1])
def test_streams_of_inputs_begin_pause_and_end_on_their_own(query_index, backend):
    """Each stream's outputs are those of its own window, whatever the others do."""
    module = build(formulation="input", query_index=query_index)
    x = draw_tokens(module, 3, 6 * LENGTH)[0]
    generator = seeded(2)
    histories = [[] for _ in range(3)]
    module.start_streams(3)
    compared = 0
    for t in range(x.shape[1]):
        if t == 2 * LENGTH:
            module.reset(1)
            histories[1] = []
        active = torch.rand(3, generator=generator) < 0.7
        with torch.no_grad():
            output = module.forward_step(x[:, t], active=active)
        ready = module.ready
        for n in range(3):
            if active[n]:
                histories[n].append(x[n, t])
            assert ready[n] == (len(histories[n]) >= LENGTH)
            if active[n] and ready[n]:
                window = torch.stack(histories[n][-LENGTH:])[None]
                assert_equals_window(output[n, None, None], module, window)
                compared += 1
    assert compared > 3 * LENGTH


@pytest.mark.parametrize("query_index", [-1, 1])
@pytest.mark.parametrize("past", [2, LENGTH + 2])
def test_stream_of_inputs_moves_to_another_place(past, query_index):
    source = build(formulation="input", query_index=query_index)
    target = build(formulation="input", query_index=query_index)
    x = draw_tokens(source, 3, past + 2 * LENGTH)[0]
    with torch.no_grad():
        step_through(source, x[:, :past])
        target.start_streams(2)
        target.forward_step(x[:2, 0])
        target.set_stream(1, source.get_stream(2))
        for t in range(past, x.shape[1]):
            expected = source.forward_step(x[:, t])
            moved = target.forward_step(x[[0, 2], t])
            if expected is not None:
                torch.testing.assert_close(moved[1], expected[2], rtol=1e-6, atol=1e-6)


def test_copies_and_snapshots_of_a_stream_of_inputs_go_on_apart():
    module = build(formulation="input")
    x = draw_tokens(module, 2, 3 * LENGTH)[0]
    with torch.no_grad():
        step_through(module, x[:, : LENGTH + 1])
        other, state = copy.deepcopy(module), module.get_state()
        expected = torch.stack(step_through(module, x[:, LENGTH + 1 :]), 1)
        assert torch.equal(torch.stack(step_through(other, x[:, LENGTH + 1 :]), 1), expected)
        module.set_state(state)
        assert torch.equal(torch.stack(step_through(module, x[:, LENGTH + 1 :]), 1), expected)


# -- rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_inputs_err_no_more_than_a_fifth_above_keys_and_values(dtype, name, monkeypatch):
    """Root mean square against float64 for the same rounded tokens and weights."""
    if name not in continual_mha.backends.available():
        pytest.skip(f"no {name} here")
    errors = {}
    monkeypatch.setattr(continual_mha.backends, "order", lambda device_type: (name,))
    for formulation in ("kv", "input"):
        module = build(
            embed_dim=256, num_heads=8, sequence_len=48, formulation=formulation, dtype=dtype
        )
        with torch.no_grad():
            for parameter in module.parameters():  # scores of the size that training gives
                parameter.mul_(0.5)
            x = draw_tokens(module, 4, 96)[0]
            output = stack(step_through(module, x), module)
            exact = window_attention(module, x)
        errors[formulation] = ((output - exact).norm() / exact.norm()).item()
    assert 0 < errors["input"] <= 1.2 * errors["kv"]
    assert math.isfinite(errors["kv"])


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@pytest.mark.parametrize("chosen", ["kv", "input"])
def test_state_of_either_formulation_goes_on_where_it_is_left_open(chosen, cache_dtype):
    """A process that begins with a state has not chosen yet, and need not choose as another did."""
    arguments = {"cache_dtype": cache_dtype, "query_index": -2}
    donor = build(formulation=chosen, **arguments)
    fresh, loaded, busy = (build(**arguments) for _ in range(3))
    x = draw_tokens(donor, 2, LENGTH + 3)[0]
    with torch.no_grad():
        step_through(donor, x[:, :LENGTH])
        state = donor.get_state()
        busy.forward_steps(x)
        fresh.set_state(state)
        busy.set_state(state)
        continual_mha.import_state(loaded, continual_mha.export_state(donor))
        function_of_state = build(**arguments)
        for token in x[:, LENGTH:].unbind(1):
            expected = donor.forward_step(token)
            output, state = function_of_state._forward_step(token, prev_state=state)
            torch.testing.assert_close(output, expected, rtol=0, atol=0)
            for module in (fresh, loaded, busy):
                assert module.formulation == chosen
                torch.testing.assert_close(module.forward_step(token), expected, rtol=0, atol=0)
    assert function_of_state.get_state() is None


def test_functional_steps_go_on_in_the_formulation_chosen_for_new_streams(monkeypatch):
    monkeypatch.setattr(formulations, "choose", lambda *sizes_and_dtype: "input")
    module = build()
    x = draw_tokens(module, 2, LENGTH + 1)[0]
    state = None
    with torch.no_grad():
        for token in x.unbind(1):
            output, state = module._forward_step(token, prev_state=state)
        assert isinstance(state, InputState)
        torch.testing.assert_close(output, step_through(module, x)[-1])


def test_explanation_names_the_formulation_in_use():
    module = build(formulation="input")
    token = draw_tokens(module, 2, 1)[0][:, 0]
    with torch.no_grad():
        assert "formulation input" in continual_mha.explain(module, token)
        module.forward_step(token)
        module.formulation = "kv"
        assert "formulation kv" in continual_mha.explain(module, token)


# -- the benchmark page --------------------------------------------------------------------------


def test_inputs_overtake_only_where_bandwidth_and_not_arithmetic_decides():
    assert 1 < bench.crossover(grid.EXAMPLE, "bfloat16", ridge=200.0) <= 64
    assert bench.crossover(grid.EXAMPLE, "bfloat16", ridge=0.1) is None
    case = grid.case_of(grid.LONG_1024, 4096, "step", "bfloat16")
    kv, inputs = (grid.work(case, formulation).bytes for formulation in ("kv", "input"))
    assert 1.9 < kv / inputs < 2


def test_page_has_a_row_for_every_point_and_a_time_where_it_was_measured(monkeypatch):
    monkeypatch.setattr(bench, "FAMILIES", (grid.Family("tiny", 8, 2, 4),))
    monkeypatch.setattr(bench, "STREAMS", (1, 2))
    rows = bench.table("float32", 200.0, timed=True).splitlines()
    assert len(rows) == 2 + 2
    assert all(float(row.split("|")[-2]) > 0 for row in rows[2:])
    monkeypatch.setattr(bench, "_LARGEST_TIMED", 0)
    assert all(
        row.endswith("|  |  |  |") for row in bench.table("float32", 200.0, True).splitlines()[2:]
    )
