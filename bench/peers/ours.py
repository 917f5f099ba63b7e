"""This package: what its dispatcher picks, and each backend and formulation by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

import continual_mha
from continual_mha import SingleOutputMultiheadAttention

from ..formulations import FORMULATIONS
from ..grid import MODES, Case
from ..problem import Problem
from .base import Outputs, Peer, Ready

_CHUNK_BYTES = 1 << 30  # of tokens at once while a stream is warmed up


def build(
    problem: Problem, formulation: str | None, backend: str | None = None
) -> SingleOutputMultiheadAttention:
    """The module with the problem's weights; warm if the mode goes on from a state."""
    options: dict[str, Any] = {} if formulation is None else {"formulation": formulation}
    module = SingleOutputMultiheadAttention.build_from(
        problem.mha, problem.case.sequence_len, forward_returns_attn_mask=False, **options
    )
    module.eval().requires_grad_(problem.case.trains)
    if problem.case.goes_on:
        row = problem.past[:, 0]
        chunk = max(1, _CHUNK_BYTES // max(1, row.numel() * row.element_size()))
        # The first call of a stream decides what an automatic module caches.
        alone = 1 if problem.case.mode == "step" else 0
        # The CUDA library takes one token at a time.
        many = continual_mha.use_backend("auto") if backend == "cuda" else nullcontext()
        with torch.no_grad():
            for token in problem.past[:, :alone].unbind(1):
                module.forward_step(token)
            with many:
                for tokens in problem.past[:, alone:].split(chunk, dim=1):
                    module.forward_steps(tokens)
    return module


def _context(backend: str | None, trains: bool) -> AbstractContextManager[object]:
    stack = ExitStack()
    if not trains:
        stack.enter_context(torch.inference_mode())
    if backend is not None:
        stack.enter_context(continual_mha.use_backend(backend))
    return stack


def _run_of(module: SingleOutputMultiheadAttention, problem: Problem) -> Any:
    mode = problem.case.mode
    if mode == "step":
        return partial(module.forward_step, problem.tokens[:, 0])
    if mode == "steps":
        return partial(module.forward_steps, problem.tokens)
    if mode == "forward":
        return partial(module.forward, problem.past)
    if mode == "steps_backward":
        return partial(steps_backward, module, problem, module.detach_state)
    return partial(forward_backward, module, problem)


def steps_backward(module: Any, problem: Problem, detach: Callable[[], None]) -> Outputs:
    """As ``forward_backward``, of the next tokens of a stream; ``detach`` cuts what was before."""
    tokens = problem.tokens.detach().requires_grad_()
    module.zero_grad(set_to_none=True)
    out = module.forward_steps(tokens)
    out.backward(problem.gradient)
    detach()
    assert tokens.grad is not None
    return out, tokens.grad


def forward_backward(module: torch.nn.Module, problem: Problem) -> Outputs:
    """Output and gradient of the clip; gradients of the weights are computed too."""
    clip = problem.past.detach().requires_grad_()
    module.zero_grad(set_to_none=True)
    out = module(clip).reshape(problem.gradient.shape)
    out.backward(problem.gradient)
    assert clip.grad is not None
    return out, clip.grad


def setup(backend: str | None, formulation: str | None, problem: Problem) -> Ready:
    """The module on a backend and in a formulation; None for what it chooses."""
    context = partial(_context, backend, problem.case.trains)
    with context():
        module = build(problem, formulation, backend)
    return Ready(_run_of(module, problem), context, None, module.formulation)


def _setup_single_steps(problem: Problem) -> Ready:
    """T single steps: what ``forward_steps`` saves."""
    context = partial(_context, None, False)
    with context():
        module = build(problem, None)
    tokens = problem.tokens.unbind(1)

    def run() -> Tensor:
        return torch.stack([module.forward_step(token) for token in tokens], dim=1)

    return Ready(run, context)


def _why_absent(backend: str | None, formulation: str | None, case: Case) -> str | None:
    if backend is not None and (missing := continual_mha.backends.why_missing(backend)):
        return missing
    if formulation is not None and not case.goes_on:
        return "a clip has no state"
    if backend == "cuda" and (case.takes_many or formulation == "input"):
        return "the CUDA library has no kernel for it"
    return None


def peers(device: torch.device) -> list[Peer]:
    """The automatic choice, then every backend, then every backend with every formulation."""
    backends = ("triton", "cuda", "torch") if device.type == "cuda" else ("cpu", "torch")
    choices: list[tuple[str | None, str | None]] = [(None, None)]
    choices += [(backend, None) for backend in backends]
    choices += [(None, formulation) for formulation in FORMULATIONS]
    choices += [(b, f) for f in FORMULATIONS for b in backends if b != "torch"]
    found = [
        Peer(
            name="ours" + "".join(f":{part}" for part in choice if part is not None),
            modes=MODES if choice[1] is None else ("step", "steps", "steps_backward"),
            setup=partial(setup, *choice),
            why_absent=partial(_why_absent, *choice),
            formulation=choice[1] or "kv",
        )
        for choice in choices
    ]
    return [*found, Peer("ours:single-steps", ("steps",), _setup_single_steps)]
