"""In the containers of `continual-inference`, instead of its own attention of the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from oracles import LENGTH, assert_same_state, build, draw_tokens, step_through
from torch import nn
from upstream import continual

import continual_mha as co

pytestmark = pytest.mark.usefixtures("backend")

E, N = 8, 3
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def pair(**arguments):
    """This package's module and the reference package's, channels second, with the same weights."""
    arguments = {"embed_dim_second": True, "forward_returns_attn_mask": False, **arguments}
    ours = build(embed_dim=E, **arguments)
    theirs = continual.SingleOutputMultiheadAttention(
        E, ours.num_heads, sequence_len=ours.sequence_len, **arguments
    )
    theirs.load_state_dict(ours.state_dict())
    return ours.double().eval(), theirs.double().eval()


def clip(steps):
    return torch.randn(N, E, steps, dtype=torch.float64)


def feed_forward():
    torch.manual_seed(2)
    return continual.Sequential(
        continual.Linear(E, 2 * E, channel_dim=1),
        nn.ReLU(),
        continual.Linear(2 * E, E, channel_dim=1),
    )


CONTAINERS = {
    "sequential": lambda mha: continual.Sequential(mha),
    "sequential with convolution": lambda mha: continual.Sequential(
        feed_forward(), mha, continual.Conv1d(E, 4, kernel_size=3)
    ),
    "two in a row": lambda mha: continual.Sequential(mha, feed_forward(), copy.deepcopy(mha)),
    "residual": lambda mha: continual.Residual(mha),
    "parallel": lambda mha: continual.Sequential(
        continual.Broadcast(2),
        continual.Parallel(mha, copy.deepcopy(mha)),
        continual.Reduce("concat"),
    ),
    "parallel with a delay": lambda mha: continual.BroadcastReduce(
        mha, continual.Conv1d(E, E, kernel_size=4), reduce="sum", auto_delay=True
    ),
    "conditional": lambda mha: continual.Conditional(
        lambda module, x: True, continual.Sequential(mha)
    ),
}

# The others add a warm branch's outputs to a cold one's, which the containers themselves refuse.
TAKE_MANY_STEPS = [
    "sequential",
    "sequential with convolution",
    "two in a row",
    "parallel",
    "conditional",
]


def containers(name, **arguments):
    built = []
    for mha in pair(**arguments):
        torch.manual_seed(1)
        built.append(CONTAINERS[name](mha).double().eval())
    return built


def assert_agree(ours, theirs):
    assert (ours is None) == (theirs is None)
    if ours is not None:
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("query_index", [-1, -2, 1])
@pytest.mark.parametrize("name", CONTAINERS)
def test_steps_in_containers_equal_the_reference(name, query_index):
    ours, theirs = containers(name, query_index=query_index)
    x = clip(4 * LENGTH)
    answered = 0
    with torch.no_grad():
        for round_ in range(2):
            for t in range(4 * LENGTH):
                got, want = ours.forward_step(x[:, :, t]), theirs.forward_step(x[:, :, t])
                assert_agree(got, want)
                answered += got is not None
            ours.clean_state()
            theirs.clean_state()
            assert answered > 5 * (round_ + 1)
    assert ours.delay == theirs.delay
    assert ours.receptive_field == theirs.receptive_field
    assert ours.stride == theirs.stride
    assert ours.padding == theirs.padding


@pytest.mark.parametrize("pad_end", [False, True])
@pytest.mark.parametrize("name", TAKE_MANY_STEPS)
def test_many_steps_in_containers_equal_the_reference(name, pad_end):
    ours, theirs = containers(name)
    x = clip(4 * LENGTH)
    with torch.no_grad():
        got = ours.forward_steps(x[:, :, : 3 * LENGTH], pad_end=pad_end)
        assert got.shape[2] > 1
        assert_agree(got, theirs.forward_steps(x[:, :, : 3 * LENGTH], pad_end=pad_end))
        for t in range(3 * LENGTH, 4 * LENGTH):
            assert_agree(ours.forward_step(x[:, :, t]), theirs.forward_step(x[:, :, t]))


@pytest.mark.parametrize("name", ["sequential", "residual", "parallel", "conditional"])
def test_clips_in_containers_equal_the_reference(name):
    ours, theirs = containers(name)
    x = clip(LENGTH)
    with torch.no_grad():
        assert_agree(ours.forward(x), theirs.forward(x))


@pytest.mark.parametrize("name", ["sequential", "parallel", "two in a row"])
def test_steps_without_update_in_containers(name):
    ours, _ = containers(name)
    x = clip(4 * LENGTH)
    with torch.no_grad():
        ours.forward_steps(x[:, :, :-1])
        peeked = ours.forward_step(x[:, :, -1], update_state=False)
        assert torch.equal(peeked, ours.forward_step(x[:, :, -1]))


@pytest.mark.parametrize("name", ["sequential", "residual", "parallel", "two in a row"])
def test_functional_steps_of_containers_equal_the_reference(name):
    ours, theirs = containers(name)
    x = clip(3 * LENGTH)
    state, their_state = None, None
    with torch.no_grad():
        for t in range(3 * LENGTH):
            got, state = ours._forward_step(x[:, :, t], state)
            want, their_state = theirs._forward_step(x[:, :, t], their_state)
            assert_agree(got, want)
    assert got is not None


@pytest.mark.parametrize("name", ["sequential", "two in a row", "parallel"])
def test_call_mode_of_the_reference_package_reaches_in(name):
    ours, theirs = containers(name)
    x = clip(2 * LENGTH)
    with torch.no_grad():
        with continual.call_mode("forward_steps"):
            assert_agree(ours(x), theirs(x))
        with continual.call_mode("forward_step"):
            assert_agree(ours(x[:, :, 0]), theirs(x[:, :, 0]))
        ours.call_mode = theirs.call_mode = "forward_step"
        assert_agree(ours(x[:, :, 1]), theirs(x[:, :, 1]))
        ours.call_mode = theirs.call_mode = "forward"
        assert_agree(ours(x[:, :, :LENGTH]), theirs(x[:, :, :LENGTH]))


def test_containers_leave_the_call_mode_as_they_found_it():
    ours, _ = pair()
    net = continual.Sequential(ours)
    with torch.no_grad():
        net.forward_step(clip(1)[:, :, 0])
        net.forward_steps(clip(2))
    assert ours.call_mode == "forward"


def test_module_is_a_continual_module_by_duck_typing():
    ours, theirs = pair()
    assert continual.module.CoModule.is_valid(ours)
    assert continual.module.CoModule.is_valid(type(ours))
    assert ours.stride == theirs.stride
    assert ours.padding == theirs.padding
    assert isinstance(ours, nn.MultiheadAttention)
    added = continual.Sequential(ours)
    assert added[0] is ours  # taken as it is and not converted


def test_conversion_takes_the_module_for_a_continual_one():
    class Derived(co.SingleOutputMultiheadAttention):
        pass

    assert continual.CoModule is not None  # imported, and so known to modules made from here on
    for ours in (build(embed_dim=E), Derived(E, 2, sequence_len=LENGTH)):
        assert isinstance(ours, continual.CoModule)
        assert continual.continual(ours) is ours
        converted = continual.continual(nn.Sequential(ours, nn.ReLU()))
        assert converted[0] is ours


@pytest.mark.parametrize("single_output", [False, True])
@pytest.mark.parametrize("query_index", [-1, 2])
def test_transformer_encoder_equals_the_reference(query_index, single_output):
    ours, theirs = (
        continual.SingleOutputTransformerEncoderLayer(
            E,
            2,
            dim_feedforward=16,
            dropout=0.0,
            sequence_len=LENGTH,
            query_index=query_index,
            single_output_forward=single_output,
            dtype=torch.float64,
        ).eval()
        for _ in range(2)
    )
    ours[0].self_attn = co.SingleOutputMultiheadAttention(
        E,
        2,
        sequence_len=LENGTH,
        query_index=query_index,
        embed_dim_second=True,
        forward_returns_attn_mask=False,
        single_output_forward=single_output,
        dtype=torch.float64,
    ).eval()
    ours.load_state_dict(theirs.state_dict())
    x = clip(3 * LENGTH)
    with torch.no_grad():
        assert_agree(ours.forward(x[:, :, :LENGTH]), theirs.forward(x[:, :, :LENGTH]))
        assert_agree(
            ours.forward_steps(x[:, :, : 2 * LENGTH]), theirs.forward_steps(x[:, :, : 2 * LENGTH])
        )
        for t in range(2 * LENGTH, 3 * LENGTH):
            got = ours.forward_step(x[:, :, t])
            assert got is not None
            assert_agree(got, theirs.forward_step(x[:, :, t]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("query_index", [-1, 1])
def test_functional_step_changes_neither_the_module_nor_the_given_state(query_index, mode):
    module, twin = build(query_index=query_index), build(query_index=query_index)
    tokens = draw_tokens(module, 2, 3 * LENGTH)
    other = draw_tokens(module, 2, 3, seed=4)
    with mode():
        step_through(module, *other)
        own = module.get_state()
        expected = step_through(twin, *tokens)
        state = None
        for t in range(3 * LENGTH):
            step = [x[:, t] for x in tokens]
            given = copy.deepcopy([x.detach() for x in state]) if state is not None else None
            output, following = module._forward_step(*step, state)
            again, _ = module._forward_step(*step, state)
            assert_same_state(state, given)
            assert (output is None) == (expected[t] is None)
            if output is not None:
                assert torch.equal(output, expected[t])
                assert torch.equal(again, output)
            state = following
    assert_same_state(module.get_state(), own)
    assert_same_state(state, twin.get_state())


def test_functional_step_takes_a_snapshot_and_gives_one():
    module = build()
    tokens = draw_tokens(module, 2, 2 * LENGTH)
    with torch.no_grad():
        step_through(module, *(x[:, :LENGTH] for x in tokens))
        snapshot = module.get_state()
        output, following = module._forward_step(*(x[:, LENGTH] for x in tokens), snapshot)
        assert torch.equal(output, module.forward_step(*(x[:, LENGTH] for x in tokens)))
        assert_same_state(following, module.get_state())
        module.set_state(following)
        assert isinstance(following, co.RingState)
