"""The reference package, and ``torch.nn.MultiheadAttention`` over the window."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor

from ..grid import Case
from ..problem import Problem
from .base import Peer, Ready, missing
from .ours import forward_backward, steps_backward

_MOVING_STATE = "every step makes new state tensors, from which a replay would not go on"


def _setup_continual(problem: Problem) -> Ready:
    import continual as co

    case = problem.case
    module = co.SingleOutputMultiheadAttention(
        case.embed_dim,
        case.num_heads,
        batch_first=True,
        sequence_len=case.sequence_len,
        forward_returns_attn_mask=False,
        device=problem.device,
        dtype=problem.dtype,
    )
    module.load_state_dict(problem.mha.state_dict())
    module.eval().requires_grad_(case.trains)
    if case.mode == "forward":
        return Ready(partial(module.forward, problem.past), torch.inference_mode)
    if case.mode == "forward_backward":
        return Ready(partial(forward_backward, module, problem))
    module.set_state(_continual_state(problem))
    if case.mode == "steps_backward":

        def detach() -> None:
            module.set_state(tuple(x.detach() for x in module.get_state()))

        return Ready(partial(steps_backward, module, problem, detach))
    if case.mode == "step":
        run = partial(module.forward_step, problem.tokens[:, 0])
    else:
        run = partial(module.forward_steps, problem.tokens)
    return Ready(run, torch.inference_mode, _MOVING_STATE)


def _continual_state(problem: Problem) -> tuple[Tensor, ...]:
    """The reference package's state after ``past``: no queries, keys transposed, values, age.

    Stepping through ``past`` would take longer than everything that is measured.
    """
    k, v = (x.flatten(0, 1) for x in problem.past_kv)
    queries = k.new_zeros((k.shape[0], 0, k.shape[2]))
    return queries, k.transpose(1, 2).contiguous(), v.clone(), torch.tensor(0)


class _Window:
    """The inputs of the last ``sequence_len`` tokens, (N, L, E), in a ring.

    Attention without positions does not depend on the order of keys, so the ring serves as it
    lies; that is the least that somebody with only ``nn.MultiheadAttention`` has to do.
    """

    def __init__(self, problem: Problem) -> None:
        self.inputs = problem.past.clone()
        self._slot = 0

    def push(self, token: Tensor) -> int:
        """Write a token (N, E) over the oldest one; returns its slot."""
        slot = self._slot
        self.inputs[:, slot] = token
        self._slot = (slot + 1) % self.inputs.shape[1]
        return slot


_HOST_SLOT = "the slot to write is a number on the host"


def _setup_mha_single(problem: Problem) -> Ready:
    mha = problem.mha
    if problem.case.mode == "forward_backward":
        module = _LastQuery(mha)
        return Ready(partial(forward_backward, module, problem))
    if problem.case.mode == "forward":
        return Ready(partial(_LastQuery(mha), problem.past), torch.inference_mode)
    window = _Window(problem)
    token = problem.tokens[:, 0]

    def run() -> Tensor:
        window.push(token)
        return mha(token.unsqueeze(1), window.inputs, window.inputs, need_weights=False)[0]

    return Ready(run, torch.inference_mode, _HOST_SLOT)


class _LastQuery(torch.nn.Module):
    """``nn.MultiheadAttention`` asked by the last token only."""

    def __init__(self, mha: torch.nn.MultiheadAttention) -> None:
        super().__init__()
        self.mha = mha

    def forward(self, clip: Tensor) -> Tensor:
        return self.mha(clip[:, -1:], clip, clip, need_weights=False)[0]


class _EveryQuery(torch.nn.Module):
    """``nn.MultiheadAttention`` asked by all tokens, of which the last one's answer is taken."""

    def __init__(self, mha: torch.nn.MultiheadAttention) -> None:
        super().__init__()
        self.mha = mha

    def forward(self, clip: Tensor) -> Tensor:
        return self.mha(clip, clip, clip, need_weights=False)[0][:, -1]


def _setup_mha_full(problem: Problem) -> Ready:
    if problem.case.mode == "forward_backward":
        return Ready(partial(forward_backward, _EveryQuery(problem.mha), problem))
    if problem.case.mode == "forward":
        return Ready(partial(_EveryQuery(problem.mha), problem.past), torch.inference_mode)
    window, mha, token = _Window(problem), problem.mha, problem.tokens[:, 0]

    def run() -> Tensor:
        slot = window.push(token)
        return mha(window.inputs, window.inputs, window.inputs, need_weights=False)[0][:, slot]

    return Ready(run, torch.inference_mode, _HOST_SLOT)


def _setup_mha_masked(problem: Problem) -> Ready:
    """All new tokens at once, over the window and themselves, with a sliding mask."""
    length, count = problem.case.sequence_len, problem.case.tokens
    mha = copy.deepcopy(problem.mha)
    asking = torch.arange(length - 1, length - 1 + count, device=problem.device)[:, None]
    seen = torch.arange(length - 1 + count, device=problem.device)
    hidden = (seen > asking) | (seen <= asking - length)
    inputs = torch.cat([problem.past[:, 1:], problem.tokens], dim=1)
    kept = length - 1

    def run() -> Tensor:
        inputs[:, kept:] = problem.tokens
        out = mha(problem.tokens, inputs, inputs, attn_mask=hidden, need_weights=False)[0]
        inputs[:, :kept] = inputs[:, count : count + kept].clone()
        return out

    return Ready(run, torch.inference_mode)


def _full_is_hopeless(case: Case) -> str | None:
    flops = (
        2
        * case.batch_size
        * case.sequence_len
        * (4 * case.embed_dim**2 + 2 * case.sequence_len * case.embed_dim)
    )
    return f"{flops:.1e} operations in a call" if flops > 4e11 else None


def peers(device: torch.device) -> list[Peer]:
    """Those that cost no installation beyond the benchmark's own."""
    clips = ("forward", "forward_backward")
    limit = _full_is_hopeless if device.type == "cpu" else (lambda case: None)
    return [
        Peer(
            "continual-inference",
            ("step", *clips, "steps", "steps_backward"),
            _setup_continual,
            lambda case: missing("continual"),
            copies=3,
        ),
        Peer("nn.MultiheadAttention, one query", ("step", *clips), _setup_mha_single, copies=3),
        Peer(
            "nn.MultiheadAttention, all queries", ("step", *clips), _setup_mha_full, limit, copies=6
        ),
        Peer("nn.MultiheadAttention, sliding mask", ("steps",), _setup_mha_masked, limit, copies=4),
    ]
