"""Rings of 8-bit numbers with a scale for every token, and for every head where there are heads.

A token's features are stored as ``round(x / scale)``, with the scale that puts the largest of them
at the largest 8-bit number. docs/formulations.md bounds the error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# A state holds 8-bit floats as their bits: most of PyTorch's operators know no 8-bit floats.
STORED_AS = {torch.int8: torch.int8, torch.float8_e4m3fn: torch.uint8}
_MEANING = {stored: dtype for dtype, stored in STORED_AS.items()}


class QuantizedRing(NamedTuple):
    """A ring of quantised tokens, which reads as a ring of numbers does.

    Attributes:
        codes: ``(..., L, D)``, int8, or uint8 for the bits of e4m3.
        scale: ``(..., L, 1)``, fp32.
    """

    codes: Tensor
    scale: Tensor

    def to(self, dtype: torch.dtype) -> Tensor:
        """The numbers that the ring stands for."""
        codes = self.codes
        values = codes if codes.dtype == torch.int8 else codes.view(_MEANING[codes.dtype])
        return (values.to(torch.float32) * self.scale).to(dtype)

    def holding(self, new: Tensor) -> QuantizedRing:
        """Tokens ``(..., T, D)`` as this ring stores them."""
        dtype = _MEANING[self.codes.dtype]
        new = new.to(torch.float32)
        size = new.abs().amax(dim=-1, keepdim=True)
        # by a tensor: for a number a GPU multiplies with its inverse, which has other bits
        scale = size / torch.full_like(size, LARGEST[dtype])
        # a subnormal scale would overflow its own inverse, and one of zero has none
        scaled = new / scale.clamp(min=torch.finfo(torch.float32).tiny)
        scaled = scaled.clamp(-LARGEST[dtype], LARGEST[dtype])
        if dtype == torch.int8:
            return QuantizedRing(scaled.round().nan_to_num().to(torch.int8), scale)
        return QuantizedRing(scaled.to(dtype).view(torch.uint8), scale)


Ring = Tensor | QuantizedRing


def shape_of(ring: Ring) -> torch.Size:
    """That of the tokens; no property, for torch.compile of torch 2.10 could not read that."""
    return (ring.codes if isinstance(ring, QuantizedRing) else ring).shape


def tensors(rings: Iterable[Ring]) -> Iterator[Tensor]:
    """The tensors that some rings are made of."""
    for ring in rings:
        if isinstance(ring, QuantizedRing):
            yield from ring
        else:
            yield ring


def as_kept(ring: Ring, new: Tensor) -> Tensor:
    """Tokens ``(..., T, D)`` as they will be read from ``ring``."""
    return ring.holding(new).to(new.dtype) if isinstance(ring, QuantizedRing) else new
