"""Random calls of the ring operators, for the tests of the Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from conftest import PTX
from torch import Tensor

from continual_mha.triton_kernels.launch import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED and not PTX,
    reason="needs a GPU, TRITON_INTERPRET or CONTINUAL_MHA_PTX",
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
if INTERPRETED:
    DTYPES.append(torch.float64)


@dataclass
class RingCase:
    """Weights and state of N streams; `step_args` are the operator's after query, key and value."""

    N: int = 2
    H: int = 2
    D: int = 8
    L: int = 5
    dtype: torch.dtype = torch.float32
    delay: int = 0
    kdim: int | None = None
    vdim: int | None = None
    bias: bool = True
    extra_slot: bool = False
    integers: bool = False
    weights: list[Tensor | None] = field(init=False)
    state: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        E = self.H * self.D
        if self.kdim or self.vdim:
            shapes = [(E, E), (E, self.kdim or E), (E, self.vdim or E)]
        else:
            shapes = [(3 * E, E), None, None]
        shapes += [(3 * E,) if self.bias else None, (E, E), (E,) if self.bias else None]
        shapes += [(1, 1, E)] * 2 if self.extra_slot else [None] * 2
        self.weights = [None if shape is None else self.random(*shape) for shape in shapes]
        self.state = self.poisoned_state()

    def random(self, *shape: int) -> Tensor:
        if self.integers:
            return torch.randint(-1, 2, shape, device=DEVICE).to(self.dtype)
        return torch.randn(shape, device=DEVICE).mul_(0.5).to(self.dtype)

    def token(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.clip(None)

    def clip(self, T: int | None) -> tuple[Tensor, Tensor, Tensor]:
        E = self.H * self.D
        lead = (self.N,) if T is None else (self.N, T)
        query = self.random(*lead, E)
        if not (self.kdim or self.vdim):
            return query, query, query
        return query, self.random(*lead, self.kdim or E), self.random(*lead, self.vdim or E)

    def poisoned_state(self) -> list[Tensor]:
        """Fresh streams: NaN in the slots that were never written, zeros among the queries."""
        E, R = self.H * self.D, self.delay + 1 if self.delay else 0
        rings = [
            torch.full((self.N, self.H, self.L, self.D), float("nan"), dtype=self.dtype)
            for _ in range(2)
        ]
        state = [*rings, torch.zeros(self.N, R, E, dtype=self.dtype)]
        return [x.to(DEVICE) for x in (*state, torch.zeros(self.N, dtype=torch.int64))]

    def warm(self) -> RingCase:
        """Fill the rings; every stream gets a position of its own past the first wrap-around."""
        for ring in self.state[:3]:
            ring.copy_(self.random(*ring.shape))
        self.state[3].copy_(torch.arange(self.N) + self.L + 1)
        return self

    def copied_state(self) -> list[Tensor]:
        return [x.clone() for x in self.state]


def widened(args: list) -> list:
    """The same arguments in float64 on the CPU, and copies of those that are written."""

    def widen(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().cpu()
        return x.to(torch.float64, copy=True) if x.is_floating_point() else x.clone()

    same = {id(x): widen(x) for x in args}
    return [same[id(x)] for x in args]
