"""A warm step goes as the one before it, until anything that it depends on is another."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from oracles import EMBED, HEADS, LENGTH, assert_same_state, build, seeded
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

import continual_mha
from continual_mha import _native, attention, functional

needs_library = pytest.mark.skipif(
    _native.load("cpu") is not None or os.environ.get("CONTINUAL_MHA_BACKEND", "auto") != "auto",
    reason="the CPU library does not run",
)
N = 3


# Query, key and value of a call in the ways in which they may be one tensor.
SPELLED = {
    "one": lambda x: (x,),
    "thrice": lambda x: (x, x, x),
    "apart": lambda x: (x, x * 2, x * 3),
    "memory": lambda x: (x, *[x * 2] * 2),
}


def warm(spelled="one", **arguments):
    module = build(**{"dropout": 0.5, **arguments}).eval()
    with torch.no_grad():
        for _ in range(LENGTH + 2):
            module.forward_step(*SPELLED[spelled](torch.randn(N, module.embed_dim)))
    return module


def new_weight(module):
    module.in_proj_weight = nn.Parameter(module.in_proj_weight.detach() * 2)


def new_out_proj(module):
    module.out_proj = nn.Linear(EMBED, EMBED)
    nn.init.eye_(module.out_proj.weight)


def new_out_weight(module):
    module.out_proj.weight = nn.Parameter(module.out_proj.weight.detach() * 2)


def other_data(module):
    module.in_proj_weight.data = module.in_proj_weight.data * 2


def strided_bias(module):
    """Which the library does not take."""
    bias = module.in_proj_bias
    bias.data = torch.stack([bias.data] * 2, -1)[:, 0]


def state_of_other_ages(module):
    other = warm(formulation=module.formulation)
    with torch.no_grad():
        other.reset([1])
    module.set_state(other.get_state())


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrised(module):
    parametrize.register_parametrization(module, "in_proj_weight", Twice())


CHANGES = {
    "nothing": lambda module: None,
    "weight": new_weight,
    "weights in place": lambda module: module.in_proj_weight.detach().mul_(2),
    "data": other_data,
    "layout": strided_bias,
    "output projection": new_out_proj,
    "its weight": new_out_weight,
    "loaded": lambda module: module.load_state_dict(build(seed=3).state_dict()),
    "parametrised": parametrised,
    "state": state_of_other_ages,
    "no state": lambda module: module.clean_state(),
    "begun": lambda module: module.start_streams(N),
    "reset": lambda module: module.reset([1]),
    "stream": lambda module: module.set_stream(
        0, warm(formulation=module.formulation).get_stream(1)
    ),
    "zero slot": lambda module: setattr(module, "add_zero_attn", True),
    "training": lambda module: module.train(),
    "formulation": lambda module: setattr(module, "formulation", "kv"),
    "undone": lambda module: module.return_to(module.mark()),
    "clip": lambda module: module.forward_steps(torch.ones(N, 2, EMBED)),
}


FORMULATIONS = [("kv", "one"), ("kv", "apart"), ("kv", "memory"), ("input", "one")]
OF_STATE = ("state", "no state", "begun", "reset", "stream", "undone", "clip", "formulation")
OF_CLIPS = {
    **{name: change for name, change in CHANGES.items() if name not in OF_STATE},
    "query": lambda module: setattr(module, "query_index", 0),
    "heads": lambda module: setattr(module, "num_heads", 1),
    "returns": lambda module: setattr(module, "forward_returns_attn_mask", False),
    "all queries": lambda module: setattr(module, "single_output_forward", False),
    "layout of clips": lambda module: setattr(module, "batch_first", False),
    "features second": lambda module: setattr(module, "embed_dim_second", True),
    "frozen": lambda module: module.requires_grad_(False),
    "frozen in part": lambda module: module.out_proj.requires_grad_(False),
    "dropout": lambda module: module.train(),
}


@pytest.mark.parametrize(("formulation", "spelled"), FORMULATIONS)
@pytest.mark.parametrize("change", CHANGES)
def test_step_after_a_change_is_decided_anew(change, formulation, spelled, backend):
    module = warm(spelled, formulation=formulation)
    twin = copy.deepcopy(module)
    tokens = [torch.randn(N, EMBED) for _ in range(LENGTH + 1)]
    outputs = []
    for each in (module, twin):
        torch.manual_seed(1)
        with torch.no_grad():
            each.forward_step(*SPELLED[spelled](tokens[0]))
            CHANGES[change](each)
            outputs.append([])
            for token in tokens:
                if each is twin:
                    each._repeat = None
                outputs[-1].append(each.forward_step(*SPELLED[spelled](token)))
    for out, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert_same_state(module.get_state(), twin.get_state())


def trained(**arguments):
    """A module that has made warm steps with a gradient."""
    module = build(**{"dropout": 0.5, **arguments}).eval()
    for _ in range(LENGTH + 2):
        module.forward_step(torch.randn(N, module.embed_dim))
    module.detach_state()
    return module


@pytest.mark.parametrize(("formulation", "spelled"), FORMULATIONS)
@pytest.mark.parametrize("change", CHANGES)
def test_step_with_a_gradient_after_a_change_is_decided_anew(change, formulation, spelled, backend):
    module = trained(formulation=formulation)
    twin = copy.deepcopy(module)
    tokens = [torch.randn(N, EMBED, requires_grad=True) for _ in range(LENGTH + 1)]
    found = []
    for each in (module, twin):
        torch.manual_seed(1)
        each.forward_step(*SPELLED[spelled](tokens[0]))
        assert (each._repeat is None) == (backend == "torch")  # whose steps are no node
        each.detach_state()  # as weights will be others
        with torch.no_grad():
            CHANGES[change](each)
        outputs = []
        for i, token in enumerate(tokens):
            if each is twin:
                each._repeat = None
            if i == 2:
                each.detach_state()
            active = torch.tensor([True, i % 2 > 0, True])
            outputs.append(each.forward_step(*SPELLED[spelled](token), active=active))
        total = sum(out.square().sum() for out in outputs)
        leaves = [*tokens, *(p for p in each.parameters() if p.requires_grad)]
        found.append([*outputs, *torch.autograd.grad(total, leaves)])
    for out, expected in zip(*found, strict=True):
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert_same_state(module.get_state(), twin.get_state())


@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_steps_with_a_gradient_are_not_decided_again(formulation, monkeypatch, backend):
    module = trained(formulation=formulation)
    if backend not in ("cpu", "triton"):
        pytest.skip("its steps with a gradient are no node")

    def fail(*args):
        raise AssertionError("decided again")

    module.forward_step(torch.randn(N, EMBED))
    monkeypatch.setattr(functional, "step", fail)
    module.forward_step(torch.randn(N, EMBED))
    module.detach_state()
    out = module.forward_step(torch.randn(N, EMBED), active=torch.tensor([True, False, True]))
    assert out.requires_grad
    assert module._ring_position.tolist() == [LENGTH + 5, LENGTH + 4, LENGTH + 5]
    with pytest.raises(AssertionError, match="decided again"), torch.no_grad():
        module.forward_step(torch.randn(N, EMBED))


@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_what_a_step_with_a_gradient_keeps_is_freed_with_its_graph(formulation, backend):
    module = trained(formulation=formulation)
    module.forward_step(torch.randn(N, EMBED))
    name = "_ring_k" if formulation == "kv" else "_ring_x"
    before = weakref.ref(getattr(module, name))
    module.forward_step(torch.randn(N, EMBED))
    module.detach_state()
    gc.collect()
    assert before() is None


def test_frozen_weights_repeat_steps_where_gradients_are_on(monkeypatch, backend):
    module = warm().requires_grad_(False)

    def fail(*args):
        raise AssertionError("decided again")

    module.forward_step(torch.randn(N, EMBED))
    monkeypatch.setattr(functional, "step", fail)
    assert not module.forward_step(torch.randn(N, EMBED)).requires_grad
    with pytest.raises(AssertionError, match="decided again"):
        module.forward_step(torch.randn(N, EMBED, requires_grad=True))


OF_MANY = {
    **CHANGES,
    "features second": lambda module: setattr(module, "embed_dim_second", True),
    "trained": lambda module: module.requires_grad_(),
    "step": lambda module: module.forward_step(torch.ones(N, EMBED)),
}


def warm_for_many(spelled="one", **arguments):
    """A module that has taken as many tokens at once as it is wide, so that any layout will do."""
    module = warm(**arguments)
    with torch.no_grad():
        for _ in range(2):  # of what comes once nothing is kept
            module.forward_steps(*SPELLED[spelled](clip_of(module)))
    return module


@pytest.mark.parametrize(("formulation", "spelled"), FORMULATIONS)
@pytest.mark.parametrize("change", OF_MANY)
def test_many_steps_after_a_change_are_decided_anew(change, formulation, spelled, backend):
    module = warm_for_many(spelled, formulation=formulation)
    twin = copy.deepcopy(module)
    outputs = []
    for each in (module, twin):
        with torch.no_grad():
            torch.manual_seed(1)
            each.forward_steps(*SPELLED[spelled](clip_of(each)))
            OF_MANY[change](each)
            outputs.append([])
            for i in range(3):
                if each is twin:
                    each._many_repeat = None
                clips = SPELLED[spelled](clip_of(each) * (i + 1))
                outputs[-1].append(each.forward_steps(*clips))
                outputs[-1].append(each.forward_step(torch.ones(N, EMBED)))
        outputs[-1].append(each.forward_steps(clip_of(each)))
    for out, expected in zip(*outputs, strict=True):
        assert (out is None) == (expected is None)
        if out is not None:
            assert out.requires_grad == expected.requires_grad
            torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert_same_state(module.get_state(), twin.get_state())


@pytest.mark.parametrize("spelled", SPELLED)
def test_many_steps_are_not_decided_again(spelled, monkeypatch, backend):
    module = warm_for_many(spelled, formulation="kv")

    def fail(*args):
        raise AssertionError("decided again")

    monkeypatch.setattr(functional, "steps", fail)
    with torch.no_grad():
        before = module._ring_position.clone()
        clips = SPELLED[spelled](clip_of(module))
        module.forward_steps(*clips)
        assert torch.equal(module._ring_position, before + EMBED)
        others = clips[:1] if len(set(clips)) > 1 else (clips[0], clips[0] * 2)
        for differently in (
            lambda: module.forward_steps(*(x[:, :-1] for x in clips)),
            lambda: module.forward_steps(*clips, update_state=False),
            lambda: module.forward_steps(*others),
        ):
            with pytest.raises(AssertionError, match="decided again"):
                differently()
        with (
            continual_mha.active_streams(torch.tensor([True, False, True])),
            pytest.raises(RuntimeError, match="moves all streams"),
        ):
            module.forward_steps(clip_of(module))
    assert torch.equal(module._ring_position, before + EMBED)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_many_steps_like_those_before_are_undone_if_they_fail(error, monkeypatch, backend):
    module = warm_for_many(formulation="kv")
    twin = copy.deepcopy(module)
    with torch.no_grad():
        assert module._many_repeat.serves(module, (clip_of(module),))
    run = module._many_repeat.run

    def interrupted(*args):
        if not isinstance(args[0], tuple):  # decided anew, it is tokens
            run(args[0])
        raise error("in mid-call")

    module._many_repeat.run = interrupted
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(functional, "steps", interrupted)
        with pytest.raises(error):
            module.forward_steps(clip_of(module))
    assert torch.equal(module._ring_position, twin._ring_position)
    with torch.no_grad():
        for token in torch.randn(LENGTH + 1, N, EMBED):
            assert torch.equal(module.forward_step(token), twin.forward_step(token))


def test_memory_that_runs_out_behind_a_step_lets_it_happen_once(backend):
    """As on a GPU, whose streams have advanced by then."""
    module = warm()
    token = torch.randn(N, EMBED)
    with torch.no_grad():
        module.forward_step(token)
        run = module._repeat.run

        def runs_out(*args):
            run(*args)
            raise torch.OutOfMemoryError

        module._repeat.run = runs_out
        before = module._ring_position.clone()
        with pytest.raises(torch.OutOfMemoryError):
            module.forward_step(token)
    assert torch.equal(module._ring_position, before + 1)


def test_weights_may_be_swapped_between_warm_steps():
    """As torch swaps them if it is told to, of which it says that others must hold none."""
    module = warm()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.load_state_dict(build(seed=3).state_dict())
        with torch.no_grad():
            module.forward_step(torch.randn(N, EMBED))
        module.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    with torch.no_grad():
        module.forward_step(torch.randn(N, EMBED).double())
    assert torch.equal(module.in_proj_weight, build(seed=3).double().in_proj_weight)


@pytest.mark.parametrize("spelled", SPELLED)
def test_warm_steps_are_not_decided_again(spelled, monkeypatch, backend):
    module = warm(spelled)

    def fail(*args):
        raise AssertionError("decided again")

    monkeypatch.setattr(functional, "step", fail)
    with torch.no_grad():
        tokens = SPELLED[spelled](torch.randn(N, EMBED))
        module.forward_step(*tokens)
        module.forward_step(*tokens, active=torch.tensor([True, False, True]))
        assert module._ring_position.tolist() == [LENGTH + 4, LENGTH + 3, LENGTH + 4]
        others = tokens[:1] if len(set(tokens)) > 1 else (tokens[0], tokens[0] * 2)
        with pytest.raises(AssertionError, match="decided again"):
            module.forward_step(*others)
    assert module._ring_position.tolist() == [LENGTH + 4, LENGTH + 3, LENGTH + 4]


def clip_of(module):
    """As long as it is wide, so that any layout will do."""
    return torch.randn(N, EMBED, EMBED, generator=seeded(5)).to(module.out_proj.weight)


MASKED = {
    "no mask": lambda length: {},
    "padding": lambda length: {"key_padding_mask": torch.rand(N, length) < 0.3},
    "mask": lambda length: {"attn_mask": torch.randn(1, length)},
    "both": lambda length: {**MASKED["padding"](length), **MASKED["mask"](length)},
}
CLIPS = [("one", "no mask"), ("memory", "padding"), ("apart", "both")]


def answers(module, clip, spelled, masked):
    """Output, weights and whatever has a gradient."""
    torch.manual_seed(1)
    module.zero_grad()
    clip = clip.clone().requires_grad_()
    result = module.forward(*SPELLED[spelled](clip), **masked)
    out, attn = result if isinstance(result, tuple) else (result, None)
    out.sum().backward()
    return [out, attn, clip.grad, *(weight.grad for weight in module.parameters())]


@pytest.mark.parametrize(("spelled", "masked"), CLIPS)
@pytest.mark.parametrize("change", OF_CLIPS)
@pytest.mark.parametrize("trains", [True, False])
def test_clip_after_a_change_is_decided_anew(trains, change, spelled, masked, backend):
    if change in ("all queries", "layout of clips") and masked != "no mask":
        pytest.skip("its masks have other shapes")
    module = build(dropout=0.5).eval()
    twin = copy.deepcopy(module)
    found = []
    for each in (module, twin):
        clip = clip_of(each)
        torch.manual_seed(1)
        masks = MASKED[masked](EMBED)
        with torch.set_grad_enabled(trains):
            for _ in range(2):
                each.forward(*SPELLED[spelled](clip), **MASKED[masked](EMBED))
        assert each._clip_repeats
        OF_CLIPS[change](each)
        if each is twin:
            each._clip_repeats.clear()
        with torch.no_grad():
            torch.manual_seed(1)
            result = each.forward(*SPELLED[spelled](clip), **masks)
        found.append([*(result if isinstance(result, tuple) else (result,))])
        found[-1] += answers(each, clip, spelled, masks)
    for one, expected in zip(*found, strict=True):
        torch.testing.assert_close(one, expected)  # other kernels may serve


@pytest.mark.parametrize("spelled", SPELLED)
@pytest.mark.parametrize("trains", [True, False])
def test_clips_are_not_decided_again(trains, spelled, monkeypatch, backend):
    module = warm()
    options = [{}, {"need_weights": False}, {"average_attn_weights": False}]
    options += [MASKED[masked](EMBED) for masked in ("padding", "mask", "both")]
    with torch.set_grad_enabled(trains):
        for _ in range(2):
            clips = SPELLED[spelled](clip_of(module))
            for how in options:
                module.forward(*clips, **how)
        expected = [copy.deepcopy(module).forward(*clips, **how) for how in options]

        def fail(*args):
            raise AssertionError("decided again")

        monkeypatch.setattr(attention, "way_of_clip", fail)
        # of the same shapes, but other ones are one tensor
        others = (clips[0], clips[-1] + 0, clips[0] if spelled == "apart" else clips[-1])
        for how, (out, attn) in zip(options, expected, strict=True):
            again, weights = module.forward(*SPELLED[spelled](clip_of(module)), **how)
            assert torch.equal(again, out)
            assert (attn is None) == (weights is None)
            assert attn is None or torch.equal(weights, attn)
        for differently in (
            lambda: module.forward(*(x[:1] for x in clips)),
            lambda: module.forward(*clips, attn_mask=torch.zeros(N * HEADS, 1, EMBED)),
            lambda: module.forward(*clips, attn_mask=torch.zeros(1, EMBED), is_causal=True),
            lambda: module.forward(*others),
        ):
            with pytest.raises(AssertionError, match="decided again"):
                differently()


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_mask_that_needs_a_gradient_gets_one_after_those_that_need_none(name, backend):
    """Of which not every kernel knows one, though the weights need a gradient all the time."""
    module = warm()
    clip = clip_of(module)
    mask = torch.randn(1 if name == "attn_mask" else N, EMBED)
    for _ in range(3):
        module.forward(clip, **{name: mask})
    found = []
    for each in (module, copy.deepcopy(module)):
        given = mask.clone().requires_grad_()
        each.forward(clip, **{name: given})[0].square().sum().backward()
        found.append(given.grad)
    assert found[0].any()
    torch.testing.assert_close(*found)


def test_what_surrounds_a_clip_is_seen(backend):
    module = warm()
    clip = clip_of(module)
    for _ in range(3):
        assert module.forward(clip)[0].requires_grad
    with torch.no_grad():
        assert not module.forward(clip)[0].requires_grad
    with torch.inference_mode():
        assert module.forward(clip)[0].is_inference()
    module.requires_grad_(False)
    assert not module.forward(clip)[0].requires_grad
    assert module.forward(clip.clone().requires_grad_())[0].requires_grad


def test_autocast_around_a_clip_is_seen(backend):
    module = warm()
    clip = clip_of(module)
    for _ in range(2):
        module.forward(clip)
    with torch.autocast(clip.device.type, torch.bfloat16):
        assert module.forward(clip)[0].dtype == torch.bfloat16
    assert module.forward(clip)[0].dtype == torch.float32


def test_another_backend_may_be_forced_between_clips():
    module = warm()
    clip = clip_of(module)
    for _ in range(2):
        expected = module.forward(clip)[0]
    with pytest.raises(RuntimeError), continual_mha.use_backend("cuda"):
        module.forward(clip)
    torch.testing.assert_close(module.forward(clip)[0], expected)


def test_clips_of_changing_lengths_are_not_kept(backend):
    """To keep how costs more than to decide, if it never comes again."""
    module = warm()
    with torch.no_grad():
        for length in (3, 4, 3, 4):
            module.forward(clip_of(module)[:, :length])
            module.forward_steps(clip_of(module)[:, :length])
    assert not module._clip_repeats
    assert module._many_repeat is None


def test_clips_hold_no_weights_that_were_passed_in():
    """Whose graph may be long, as where one trains how to train."""
    module = warm()
    weights = {name: weight * 1 for name, weight in module.named_parameters()}
    kept = weakref.ref(weights["in_proj_weight"])
    for _ in range(2):
        functional_call(module, weights, (clip_of(module),))
    del weights
    gc.collect()
    assert kept() is None


def test_what_surrounds_a_step_is_seen(backend):
    module = warm()
    token = torch.randn(N, EMBED)
    with torch.no_grad():
        with continual_mha.active_streams(torch.tensor([False, True, True])):
            module.forward_step(token)
        before = module._ring_position.clone()
        assert before.tolist() == [LENGTH + 2, LENGTH + 3, LENGTH + 3]
        with pytest.raises(TypeError, match=r"the state|the module's"):
            module.forward_step(token.bfloat16())  # both are float32
        module.forward_step(token, update_state=False)
        assert torch.equal(module._ring_position, before)
    assert module.forward_step(token).requires_grad
    with torch.inference_mode():
        assert module.forward_step(token).is_inference()
    with torch.no_grad():
        assert not module.forward_step(token).is_inference()


def test_surrounding_autocast_is_seen_by_a_step(backend):
    module, token = warm(), torch.randn(N, EMBED)
    with torch.no_grad():
        for _ in range(2):
            with torch.autocast(token.device.type, torch.bfloat16):
                for given in (token, token.bfloat16()):
                    assert module.forward_step(given, update_state=False).dtype == torch.bfloat16
            assert module.forward_step(token).dtype == torch.float32


def test_another_backend_may_be_forced_between_steps(monkeypatch):
    module, ran = warm(), []
    plain = continual_mha.reference.ring_step_
    monkeypatch.setattr(
        continual_mha.reference, "ring_step_", lambda *args: ran.append(1) or plain(*args)
    )
    with torch.no_grad():
        with continual_mha.use_backend("torch"):
            module.forward_step(torch.randn(N, EMBED))
            module.forward_step(torch.randn(N, EMBED))
        assert len(ran) == 2
        with pytest.raises(RuntimeError), continual_mha.use_backend("cuda"):
            module.forward_step(torch.randn(N, EMBED))


def traced_step(module, token):
    return make_fx(lambda x: module.forward_step(x))(token)


@needs_library
def test_what_make_fx_sees_of_a_warm_step_outlives_its_module():
    module, tokens = warm(), torch.randn(3, N, EMBED)
    with torch.no_grad():
        traced = traced_step(module, tokens[0])  # which is a step as well
        expected = copy.deepcopy(module).forward_steps(tokens[1:].transpose(0, 1)).transpose(0, 1)
        del module
        gc.collect()
        found = torch.stack([traced(x) for x in tokens[1:]])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (lambda x: x[:, :-1], ValueError),
        (lambda x: x[:-1], ValueError),
        (lambda x: x[0], ValueError),
        (lambda x: x.double(), TypeError),
        (lambda x: x.tolist(), TypeError),
        (lambda x: x.to("meta"), ValueError),
        (lambda x: x.to_sparse(), TypeError),
        (lambda x: x.to_sparse_csr(), TypeError),
        (lambda x: x.cpu().to_mkldnn(), TypeError),
        (lambda x: torch.nested.nested_tensor(list(x)), TypeError),
        (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), TypeError),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), TypeError),
        (lambda x: torch.complex(x, x), TypeError),
    ],
)
def test_bad_token_in_a_warm_stream_is_refused(bad, error, backend):
    module = warm()
    before = module.get_state()
    with torch.no_grad(), pytest.raises(error):
        module.forward_step(bad(torch.randn(N, EMBED)))
    assert_same_state(module.get_state(), before)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (lambda x: x[..., :-1], ValueError),
        (lambda x: x[0], ValueError),
        (lambda x: x.double(), TypeError),
        (lambda x: x.to("meta"), ValueError),
        (lambda x: x.to_sparse(), TypeError),
    ],
)
def test_bad_clip_is_refused_as_the_first_would_be(bad, error, backend):
    module = warm()
    for _ in range(2):
        module.forward(clip_of(module))
    with pytest.raises(error):
        module.forward(bad(clip_of(module)))


@pytest.mark.parametrize("spelled", ["one", "apart"])
def test_nothing_is_kept_of_the_token_of_a_single_step(spelled, backend):
    module = build().eval()
    module.start_streams(N)
    token = torch.randn(N, EMBED)
    kept = weakref.ref(token)
    with torch.no_grad():
        module.forward_step(*SPELLED[spelled](token))
    del token
    assert kept() is None


def test_weights_passed_in_are_used(backend):
    module = warm()
    token = torch.randn(N, EMBED)
    weights = {name: torch.zeros_like(weight) for name, weight in module.named_parameters()}
    module.call_mode = "forward_step"
    with torch.no_grad():
        assert not functional_call(module, weights, (token,)).any()
        assert module(token).any()


def replicate(module):
    """What `torch.nn.parallel.replicate` does on every device but the first."""
    replica = module._replicate_for_data_parallel()
    for kind in ("_parameters", "_buffers"):
        copies = {n: None if x is None else x.clone() for n, x in getattr(module, kind).items()}
        setattr(replica, kind, copies)
    return replica


def hand_over(module):
    """As to another process, where tensors that are pickled stay the memory that they are."""
    return pickle.loads(ForkingPickler.dumps(module))


COPIES = [
    copy.copy,
    copy.deepcopy,
    lambda module: pickle.loads(pickle.dumps(module)),
    hand_over,
    replicate,
]


@pytest.mark.parametrize("via", COPIES)
def test_copy_does_not_write_to_the_original(via, backend):
    module = warm()
    before = module.get_state()
    twin = via(module)
    with torch.no_grad():
        twin.forward_step(torch.randn(N, EMBED))
    assert_same_state(module.get_state(), before)


def test_weight_of_another_dtype_behind_the_same_parameter_is_refused(backend):
    module = warm()
    before = module.get_state()
    with torch.no_grad():
        module.in_proj_weight.data = module.in_proj_weight.data.double()
        with pytest.raises(RuntimeError):
            module.forward_step(torch.randn(N, EMBED))
    assert_same_state(module.get_state(), before)


def test_weight_of_another_shape_behind_the_same_parameter_is_refused_as_in_a_first_step(backend):
    module = warm()
    positions = module._ring_position.clone()
    with torch.no_grad():
        module.in_proj_weight.data = module.in_proj_weight.data[:-1]
        with pytest.raises(ValueError, match="in_proj_weight must have the shape"):
            module.forward_step(torch.randn(N, EMBED))
    assert torch.equal(module._ring_position, positions)


@pytest.mark.parametrize("name", ["in_proj_weight", "in_proj_bias", "out_proj.weight"])
@pytest.mark.parametrize(
    ("other", "error"), [(lambda x: x[:-1], ValueError), (torch.Tensor.double, RuntimeError)]
)
def test_clip_with_another_weight_behind_a_parameter_is_refused(other, error, name, backend):
    module = warm()
    with torch.no_grad():
        for _ in range(2):
            module.forward(clip_of(module))
        weight = module.get_parameter(name)
        weight.data = other(weight.data)
        with pytest.raises((error, TypeError)):
            module.forward(clip_of(module))


@needs_library
@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_library_holds_a_step_as_long_as_it_can_be_run(formulation):
    module = warm(formulation=formulation)
    run, token = module._repeat.run, torch.randn(N, EMBED)
    (number,) = run.args
    expected = copy.deepcopy(module)
    bound_step = torch.ops.continual_mha.cpu_bound_step_
    with torch.no_grad():
        assert torch.equal(bound_step(number, token, None), expected.forward_step(token))
        module.clean_state()
        run(token, None)
        del run
        gc.collect()
        with pytest.raises(RuntimeError, match=f"nothing is bound to {number}"):
            bound_step(number, token, None)


@needs_library
def test_threads_bind_run_and_let_go_at_the_same_time():
    origin = warm()

    def work(seed):
        module = copy.deepcopy(origin)
        tokens = torch.randn(20, N, EMBED, generator=seeded(seed))
        outputs = []
        with torch.no_grad():
            for token in tokens:
                module._repeat = None if len(outputs) % 3 == 0 else module._repeat
                outputs.append(module.forward_step(token))
        return torch.stack(outputs)

    alone = [work(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(4)))
    for output, expected in zip(together, alone, strict=True):
        assert torch.equal(output, expected)


@pytest.mark.parametrize("forget", ["clean_state", "double"])
def test_rings_are_freed_when_they_are_not_the_state_any_more(forget, backend):
    module = warm()
    ring = weakref.ref(module._ring_k)
    getattr(module, forget)()
    gc.collect()
    assert ring() is None


CALLS = {
    "step": lambda module, clip: module.forward_step(clip[:, 0]),
    "many": lambda module, clip: module.forward_steps(clip),
    "clip": lambda module, clip: module.forward(clip),
}


@pytest.mark.parametrize("formulation", ["kv", "input"])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_module_is_freed_with_its_last_reference(call, trains, formulation, backend):
    """Not when the collector comes, which sees nothing of what a GPU's memory is short of."""
    module = build(formulation=formulation).requires_grad_(trains)
    for _ in range(LENGTH + 3):
        module.forward_step(torch.randn(N, EMBED))
    for _ in range(3):
        CALLS[call](module, clip_of(module))
    weight = weakref.ref(module.in_proj_weight)
    gc.collect()
    gc.disable()
    try:
        del module
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("formulation", ["kv", "input"])
@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_kept_of_the_tokens(call, formulation, backend):
    """Of which views, as those of a recording, would keep the whole of it."""
    module = warm(formulation=formulation)
    module.forward_steps(clip_of(module))
    recording = torch.randn(8, *clip_of(module).shape)
    whole = weakref.ref(recording)
    with torch.no_grad():
        for part in recording.unbind():
            CALLS[call](module, part)
    del recording, part
    assert whole() is None
