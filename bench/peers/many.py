"""Many tokens in one call: projections, a sliding mask over the cache and the new tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grid import Case
from ..problem import Problem, split_heads
from .base import Peer, Ready, not_compiled
from .ours import steps_backward

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Steps:
    """Projects T tokens, attends to the last L-1 cached and the new ones, keeps the last L-1."""

    def __init__(self, problem: Problem, attend: Attend) -> None:
        case = problem.case
        self._attend, self._mha, self._heads = attend, problem.mha, case.num_heads
        self._kept, self._count = case.sequence_len - 1, case.tokens
        past = torch.stack(problem.past_kv)[:, :, :, 1:]
        self._kv = F.pad(past, (0, 0, 0, case.tokens))  # (2, N, H, L-1+T, D)

    def __call__(self, tokens: Tensor) -> Tensor:
        mha, kept = self._mha, self._kept
        qkv = F.linear(tokens, mha.in_proj_weight, mha.in_proj_bias)
        q, k, v = (split_heads(x, self._heads) for x in qkv.chunk(3, -1))
        self._kv[0, :, :, kept:] = k
        self._kv[1, :, :, kept:] = v
        out = self._attend(q, self._kv[0], self._kv[1])
        newest = self._kv[:, :, :, self._count : self._count + kept]
        self._kv[:, :, :, :kept] = newest.clone() if self._count < kept else newest
        heads = out.transpose(1, 2).flatten(2)
        return F.linear(heads, mha.out_proj.weight, mha.out_proj.bias)


class _TrainedSteps(torch.nn.Module):
    """The same by new tensors, through which a gradient flows."""

    def __init__(self, problem: Problem, attend: Attend) -> None:
        super().__init__()
        self.mha = problem.mha
        self._attend, self._heads = attend, problem.case.num_heads
        self._kept = problem.case.sequence_len - 1
        self._past = torch.stack(problem.past_kv)[:, :, :, 1:]

    def forward_steps(self, tokens: Tensor) -> Tensor:
        qkv = F.linear(tokens, self.mha.in_proj_weight, self.mha.in_proj_bias)
        q, *kv = (split_heads(x, self._heads) for x in qkv.chunk(3, -1))
        k, v = (torch.cat([past, x], dim=2) for past, x in zip(self._past, kv, strict=True))
        self._past = torch.stack([x[:, :, -self._kept :] for x in (k, v)])
        heads = self._attend(q, k, v).transpose(1, 2).flatten(2)
        return F.linear(heads, self.mha.out_proj.weight, self.mha.out_proj.bias)

    def detach(self) -> None:
        """Let no gradient flow into earlier calls."""
        self._past = self._past.detach()


def _visible(length: int, asking: Tensor, seen: Tensor) -> Tensor:
    """Whether new token ``asking`` sees entry ``seen`` of the last L-1 cached and the new ones."""
    return (seen <= asking + length - 1) & (seen >= asking)


def _setup_masked(problem: Problem) -> Ready:
    length, count = problem.case.sequence_len, problem.case.tokens
    asking = torch.arange(count, device=problem.device)[:, None]
    mask = _visible(length, asking, torch.arange(length - 1 + count, device=problem.device))
    attend = partial(F.scaled_dot_product_attention, attn_mask=mask)
    if problem.case.trains:
        trained = _TrainedSteps(problem, attend)
        return Ready(partial(steps_backward, trained, problem, trained.detach))
    return Ready(partial(_Steps(problem, attend), problem.tokens), torch.inference_mode)


def _setup_flex(problem: Problem) -> Ready:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, count = problem.case.sequence_len, problem.case.tokens

    def sliding(batch: Tensor, head: Tensor, asking: Tensor, seen: Tensor) -> Tensor:
        return _visible(length, asking, seen)

    mask = create_block_mask(
        sliding, None, None, count, length - 1 + count, device=problem.device.type
    )
    torch.compiler.reset()  # or cases would use up the limit of compilations of one function
    attend = partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)
    return Ready(partial(_Steps(problem, attend), problem.tokens), torch.inference_mode)


def _flex_absent(device: torch.device, compiled: bool, case: Case) -> str | None:
    return not_compiled(compiled or device.type == "cuda")


def peers(device: torch.device, compiled: bool) -> list[Peer]:
    """scaled_dot_product_attention with a mask, and FlexAttention with a sliding block mask."""
    modes = ("steps", "steps_backward")
    absent = partial(_flex_absent, device, compiled)
    return [
        Peer("SDPA, sliding mask", modes, _setup_masked, copies=2),
        Peer("FlexAttention, sliding mask", ("steps",), _setup_flex, absent, copies=2),
    ]
