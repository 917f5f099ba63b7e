"""Rings of 8-bit numbers on the device: what `quantized.py` does, bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED

CODES = (torch.int8, torch.uint8)  # integers, and the bits of e4m3

_IN_INTERPRETER = tl.constexpr(INTERPRETED)
_TO_NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no place for a fraction
_LEAST_NORMAL = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def decode(codes, dtype: tl.constexpr):
    """The numbers over `unit_of` their dtype, which every floating-point dtype holds exactly.

    The bits of e4m3 are those of a half with another bias: shifted into place they stand for a
    256th of the number, subnormal or not. NaN is not told apart; its scale is not finite.
    """
    if codes.dtype == tl.uint8:
        bits = codes.to(tl.uint16)
        codes = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    if _IN_INTERPRETER:  # which truncates where it makes bfloat16
        return codes.to(tl.float32)
    return codes.to(dtype)


@triton.jit
def unit_of(dtype: tl.constexpr):
    """What the numbers of `decode` are to be multiplied with."""
    return 256.0 if dtype == tl.uint8 else 1.0


@triton.jit
def quantise(x, dtype: tl.constexpr):
    """Codes of one token's features [BLOCK] and their scale, as `QuantizedRing.holding` has them.

    Features beyond the token's width must be zero.
    """
    x = x.to(tl.float32)
    largest = tl.full((), 448.0 if dtype == tl.uint8 else 127.0, tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(x), axis=0), largest)
    not_a_number = tl.sum((x != x).to(tl.int32), axis=0) > 0
    scale = tl.where(not_a_number, float("nan"), scale)
    # a subnormal scale would overflow its own inverse, and one of zero has none
    divisor = tl.where(scale < _LEAST_NORMAL, _LEAST_NORMAL, scale)
    scaled = tl.div_rn(x, x * 0.0 + divisor)
    known = scaled == scaled
    bounded = tl.where(known, tl.minimum(tl.maximum(scaled, -largest), largest), 0.0)
    if dtype == tl.uint8:
        size = tl.abs(bounded)
        bits = size.to(tl.uint32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # exponents of 127 are of 7
        subnormal = ((size * 512.0 + _TO_NEAREST) - _TO_NEAREST).to(tl.uint32)
        code = tl.where(size < 0.015625, subnormal, normal)
        sign = (bounded.to(tl.uint32, bitcast=True) >> 31) << 7
        return tl.where(known, code | sign, 0x7F).to(tl.uint8), scale
    else:
        return ((bounded + _TO_NEAREST) - _TO_NEAREST).to(tl.int8), scale
