"""What every implementation is given for a case, and what it has to answer."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .grid import Case

# Largest error allowed, as a share of the largest expected magnitude. A case whose implementation
# errs more is not timed.
TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "float16": 1e-2, "bfloat16": 5e-2}
CHECKED_STREAMS = 4


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """From (N, S, E) to (N, H, S, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class Problem:
    """Weights, tokens and the expected outputs of one case.

    Streams have seen ``sequence_len`` tokens, ``past``; ``tokens`` come next. ``forward`` takes
    ``past`` as its clip. Only the first and last few streams are compared: the exact result costs
    as much as all that is measured.

    Attributes:
        mha: the weights, as a ``torch.nn.MultiheadAttention`` in evaluation mode.
        past: (N, L, E).
        tokens: (N, T, E).
    """

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case = case
        self.device = device
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        torch.manual_seed(seed)
        options = {"device": device, "dtype": self.dtype}
        self.mha = nn.MultiheadAttention(case.embed_dim, case.num_heads, batch_first=True)
        for bias in (self.mha.in_proj_bias, self.mha.out_proj.bias):
            nn.init.normal_(bias, std=0.1)
        self.mha = self.mha.to(**options).eval()
        self.mha.requires_grad_(case.trains)
        n, length, e = case.batch_size, case.sequence_len, case.embed_dim
        self.past = torch.randn(n, length, e, **options)
        self.tokens = torch.randn(n, case.tokens, e, **options)
        # of the loss by the output
        self.gradient = torch.randn(n, *((case.tokens,) if case.goes_on else ()), e, **options)

    @property
    def in_weight(self) -> Tensor:
        """Packed in-projection, (3E, E)."""
        return self.mha.in_proj_weight

    @property
    def in_bias(self) -> Tensor:
        """Its bias, (3E,)."""
        return self.mha.in_proj_bias

    @cached_property
    def past_kv(self) -> tuple[Tensor, Tensor]:
        """Keys and values of ``past``, each (N, H, L, D) and contiguous."""
        e, heads = self.case.embed_dim, self.case.num_heads
        parts = []
        with torch.no_grad():
            for part in (1, 2):
                rows = slice(part * e, (part + 1) * e)
                x = F.linear(self.past, self.in_weight[rows], self.in_bias[rows])
                parts.append(split_heads(x, heads).contiguous())
        return parts[0], parts[1]

    @cached_property
    def checked(self) -> Tensor:
        """Indices of the streams that are compared."""
        n = self.case.batch_size
        picked = [i for i in range(n) if i < CHECKED_STREAMS or i >= n - CHECKED_STREAMS]
        return torch.tensor(picked, device=self.device)

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        """Outputs of the checked streams in float64, and if there is one, the gradient of tokens.

        Steps give (n, T, E), ``forward`` gives (n, E). The gradient is of the tokens that a call
        takes: of ``tokens`` (n, T, E), or of ``past`` (n, L, E).
        """
        past = self.past[self.checked].double()
        tokens = self.tokens[self.checked].double()
        taken = tokens if self.case.goes_on else past
        taken.requires_grad_(self.case.trains)
        if self.case.goes_on:
            out = self._exact(torch.cat([past, tokens], dim=1), self.case.tokens)
        else:
            out = self._exact(past, 1)[:, 0]
        if not self.case.trains:
            return (out.detach(),)
        out.backward(self.gradient[self.checked].double())
        assert taken.grad is not None
        return out.detach(), taken.grad

    def _exact(self, x: Tensor, count: int) -> Tensor:
        """Attention of the last ``count`` tokens of x, each over its last ``L`` tokens."""
        total, length = x.shape[1], self.case.sequence_len
        weight, bias = self.in_weight.detach().double(), self.in_bias.detach().double()
        q, k, v = (
            split_heads(part, self.case.num_heads)
            for part in F.linear(x, weight, bias).chunk(3, -1)
        )
        asking = torch.arange(total - count, total, device=x.device)[:, None]
        seen = torch.arange(total, device=x.device)
        visible = (seen <= asking) & (seen > asking - length)
        heads = F.scaled_dot_product_attention(q[:, :, -count:], k, v, attn_mask=visible)
        out_proj = self.mha.out_proj
        return F.linear(
            heads.transpose(1, 2).flatten(2),
            out_proj.weight.detach().double(),
            out_proj.bias.detach().double(),
        )

    def error(self, outputs: Tensor | tuple[Tensor, ...]) -> float:
        """Largest error of a call's outputs, as a share of the largest expected magnitude.

        Args:
            outputs: what the first call gave for all streams; one axis of size 1 more or less does
                not matter. With the gradient of the tokens, if gradients are taken.
        """
        given = outputs if isinstance(outputs, tuple) else (outputs,)
        if len(given) != len(self.expected):
            raise ValueError(f"expected {len(self.expected)} results, but got {len(given)}")
        worst = 0.0
        for actual, exact in zip(given, self.expected, strict=True):
            per_stream = exact.shape[1:]
            actual = actual.detach().reshape(self.case.batch_size, *per_stream)[self.checked]
            difference = (actual.double() - exact).abs().max() / exact.abs().max()
            worst = max(worst, difference.nan_to_num(nan=float("inf")).item())
        return worst
