"""Dropout that is drawn anew from a seed wherever it is needed, and stored nowhere."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEYS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_UNIFORM = 4.6566127342e-10  # the largest float32 that takes 2³¹ - 1 below 1


def dropout_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """A seed (1,) drawn on the device from torch's generator, which graphs can replay; or None."""
    if dropout_p == 0.0:
        return None
    return torch.randint(1 << 62, (1,), dtype=torch.int64, device=device)


def keep_scale(
    seed: Tensor, slots: Tensor, streams: Tensor, heads: Tensor, rows: Tensor, dropout_p: float
) -> Tensor:
    """0 where a weight is dropped, else ``1 / (1 - p)``, fp32, from counters that broadcast.

    Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), and bit for
    bit what the function of this name gives in the Triton kernels.
    """
    counters = torch.broadcast_tensors(slots, streams, heads, rows)
    c0, c1, c2, c3 = (x.to(torch.int64) & _LOW for x in counters)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        (high_a, low_a), (high_b, low_b) = (
            _product(_MULTIPLIERS[0], c0),
            _product(_MULTIPLIERS[1], c2),
        )
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEYS[0]) & _LOW, (k1 + _KEYS[1]) & _LOW
    folded = torch.where(c0 > _LOW >> 1, _LOW - c0, c0)  # from 32 bits to 31
    uniform = folded.to(torch.float32) * _UNIFORM
    kept = torch.full_like(uniform, 1.0) / (1.0 - torch.full_like(uniform, dropout_p))
    return torch.where(uniform >= torch.full_like(uniform, dropout_p), kept, 0.0)


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of products of 32-bit numbers; int64 holds no product of all 64."""
    low = a * (b & 0xFFFF)  # 48 bits
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
