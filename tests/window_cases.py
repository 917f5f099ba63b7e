"""Arguments of ``attend_window``, for the kernels of every backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def window_arguments(
    dtype: torch.dtype,
    N: int,
    T: int,
    H: int,
    D: int,
    L: int,
    first: int,
    extra: bool,
    device: str = "cpu",
) -> list[Any]:
    """The tensors, of streams at 0, L + 3, ...: NaN where no token was, or one that no query sees,
    as is left by a paused stream; `extra`: sink and seed."""

    def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).mul_(0.5).to(kind)

    clip = [random(N, T, H * D).unflatten(-1, (H, D)) for _ in range(3)]
    rings = [random(N, H, L, D) for _ in range(2)]
    position = torch.arange(N, device=device) * (L + 3)
    for ring in rings:
        ring[:1] = float("nan")
        ring[torch.arange(N, device=device), :, position % L] = float("nan")
    wide = torch.promote_types(dtype, torch.float32)
    options = [random(N, T - first, H, kind=wide), torch.tensor([1 << 50], device=device)]
    return [*clip, *rings, position, *(options if extra else [None, None]), first]


# One token; a cold stream beside a warm one, from cold to wrapped; windows around the block sizes.
WINDOW_SHAPES = [
    (2, 1, 2, 12, 5, 0, True),
    (6, 9, 1, 8, 4, 2, True),
    (1, 70, 1, 20, 33, 0, True),
    (2, 3, 1, 8, 70, 0, False),
    (1, 3, 1, 4, 1, 0, True),
]
