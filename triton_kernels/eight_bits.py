"""Rings of 8-bit numbers on the device: what `quantized.py` does, bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, constants_of, launch
from .plan import cdiv, next_power_of_2

CODES = (torch.int8, torch.uint8)  # integers, and the bits of e4m3

_IN_INTERPRETER = tl.constexpr(INTERPRETED)
_TO_NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no place for a fraction
_LEAST_NORMAL = tl.constexpr(1.1754943508222875e-38)
# A register of four codes to four floats. An integer plus 128 becomes the lowest bits of 2^23 plus
# itself. Two codes of e4m3 become the upper halves of 16 bits each, then two halves as in `decode`.
_FOUR_INTEGERS = tl.constexpr("""{
    .reg .b32 code;
    xor.b32 code, $4, 0x80808080;
    prmt.b32 $0, code, 0x4B000000, 0x7440;
    prmt.b32 $1, code, 0x4B000000, 0x7441;
    prmt.b32 $2, code, 0x4B000000, 0x7442;
    prmt.b32 $3, code, 0x4B000000, 0x7443;
    sub.f32 $0, $0, 0f4B000080;
    sub.f32 $1, $1, 0f4B000080;
    sub.f32 $2, $2, 0f4B000080;
    sub.f32 $3, $3, 0f4B000080;
}""")
_FOUR_E4M3 = tl.constexpr("""{
    .reg .b32 code, half;
    .reg .b16 low, high;
    prmt.b32 code, $4, 0, 0x1404;
    shr.b32 half, code, 1;
    and.b32 half, half, 0x3F803F80;
    lop3.b32 half, code, 0x80008000, half, 0xEA;
    mov.b32 {low, high}, half;
    cvt.f32.f16 $0, low;
    cvt.f32.f16 $1, high;
    prmt.b32 code, $4, 0, 0x3424;
    shr.b32 half, code, 1;
    and.b32 half, half, 0x3F803F80;
    lop3.b32 half, code, 0x80008000, half, 0xEA;
    mov.b32 {low, high}, half;
    cvt.f32.f16 $2, low;
    cvt.f32.f16 $3, high;
}""")


# Two codes in the lower bytes of 16 bits each to two numbers, as in `decode`. An integer plus 128
# becomes the lowest bits of 2^10 plus itself; bfloat16 has too few, so there it and its sign become
# those of 2^7 plus themselves. The bits of e4m3 are also those of bfloat16 with another bias: they
# stand for a 2^120th of the number.
_TWO_INTEGERS_BF16 = tl.constexpr("""{
    .reg .b32 low, sign, minus;
    mov.b32 minus, 0xBF80BF80;
    lop3.b32 low, $1, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 sign, $1, 0x00800080, 0x43004300, 0xEA;
    fma.rn.bf16x2 $0, sign, minus, low;
}""")
_TWO_INTEGERS_F16 = tl.constexpr("""{
    .reg .b32 low, middle;
    mov.b32 middle, 0x64806480;
    lop3.b32 low, $1, 0x00FF00FF, middle, 0x6A;
    sub.f16x2 $0, low, middle;
}""")
_TWO_E4M3_BF16 = tl.constexpr("""{
    .reg .b32 size, sign, unit, none;
    mov.b32 unit, 0x77807780;
    mov.b32 none, 0x80008000;
    shl.b32 size, $1, 4;
    and.b32 size, size, 0x07F007F0;
    shl.b32 sign, $1, 8;
    lop3.b32 size, sign, none, size, 0xEA;
    fma.rn.bf16x2 $0, size, unit, none;
}""")
_TWO_E4M3_F16 = tl.constexpr("""{
    .reg .b32 size, sign;
    shl.b32 size, $1, 7;
    and.b32 size, size, 0x3F803F80;
    shl.b32 sign, $1, 8;
    lop3.b32 $0, sign, 0x80008000, size, 0xEA;
}""")


@triton.jit
def _decode_pairs(codes, dtype: tl.constexpr):
    """`decode` to 16 bits, two codes at a time."""
    pairs = codes.to(tl.uint8, bitcast=True).to(tl.uint16)
    if dtype == tl.float16:
        return tl.inline_asm_elementwise(
            _TWO_E4M3_F16 if codes.dtype == tl.uint8 else _TWO_INTEGERS_F16, "=r,r", [pairs],
            dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            _TWO_E4M3_BF16 if codes.dtype == tl.uint8 else _TWO_INTEGERS_BF16, "=r,r", [pairs],
            dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def decode(codes, dtype: tl.constexpr):
    """The numbers over `unit_of` their dtype, which every floating-point dtype holds exactly.

    The bits of e4m3 are those of a half with another bias: shifted into place they stand for a
    256th of the number, subnormal or not. NaN is not told apart; its scale is not finite. Numbers
    of 16 bits are made two at a time, where a conversion takes registers and instructions for each.
    """
    if dtype.primitive_bitwidth == 16 and not _IN_INTERPRETER:
        return _decode_pairs(codes, dtype)
    if codes.dtype == tl.uint8:
        bits = codes.to(tl.uint16) << 7
        codes = (bits + (bits & 0x4000)).to(tl.float16, bitcast=True)
    if _IN_INTERPRETER:  # which truncates where it makes bfloat16
        return codes.to(tl.float32)
    return codes.to(dtype)


@triton.jit
def decode_words(words, dtype: tl.constexpr):
    """`decode` of codes that were loaded four to an int32, as fp32  # [R, W] -> [R, 4 * W]

    A code that the compiler sees as a number of its own takes a register of its own.
    """
    if _IN_INTERPRETER:
        a = decode((words & 255).to(tl.uint8).to(dtype, bitcast=True), tl.float32)
        b = decode((words >> 8 & 255).to(tl.uint8).to(dtype, bitcast=True), tl.float32)
        c = decode((words >> 16 & 255).to(tl.uint8).to(dtype, bitcast=True), tl.float32)
        d = decode((words >> 24 & 255).to(tl.uint8).to(dtype, bitcast=True), tl.float32)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            _FOUR_E4M3 if dtype == tl.uint8 else _FOUR_INTEGERS, "=&f,=&f,=&f,=&f,r", [words],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    four = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(four, (words.shape[0], 4 * words.shape[1]))


@triton.jit
def unit_of(dtype: tl.constexpr):
    """What the numbers of `decode` are to be multiplied with."""
    return 256.0 if dtype == tl.uint8 else 1.0


@triton.jit
def factor_of(scale, dtype: tl.constexpr):
    """What the numbers of `decode` and this scale stand for is their product: NaN if not finite."""
    return tl.where(tl.abs(scale) < float("inf"), scale * unit_of(dtype), float("nan"))


@triton.jit
def scale_of(x, dtype: tl.constexpr):
    """Scales [...] of tokens' features [..., BLOCK]; they and codes as in `QuantizedRing.holding`.

    `x` is one token or a tile of them. Features beyond a token's width must be zero.
    """
    AXIS: tl.constexpr = len(x.shape) - 1
    x = x.to(tl.float32)
    largest = tl.full((), 448.0 if dtype == tl.uint8 else 127.0, tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(x), axis=AXIS), largest)
    not_a_number = tl.sum((x != x).to(tl.int32), axis=AXIS) > 0
    return tl.where(not_a_number, float("nan"), scale)


@triton.jit
def encode(x, scale, dtype: tl.constexpr):
    """Codes of tokens' features [..., BLOCK], given scales [...], as the ring holds them."""
    largest = 448.0 if dtype == tl.uint8 else 127.0
    # a subnormal scale would overflow its own inverse, and one of zero has none
    divisor = tl.where(scale < _LEAST_NORMAL, _LEAST_NORMAL, scale)
    if len(x.shape) > 1:
        divisor = tl.expand_dims(divisor, len(x.shape) - 1)
    x = x.to(tl.float32)
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
        return tl.where(known, code | sign, 0x7F).to(tl.uint8)
    else:
        return ((bounded + _TO_NEAREST) - _TO_NEAREST).to(tl.int8)


@triton.jit
def quantise(x, dtype: tl.constexpr):
    """Codes of tokens' features [..., BLOCK], and their scales [...]."""
    scale = scale_of(x, dtype)
    return encode(x, scale, dtype), scale


@triton.jit
def _quantise_tokens_kernel(
    x_ptr, codes_ptr, scale_ptr, stride_xn, stride_xt, T,
    H: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens of one head of one stream, in 8 bits with a scale for each.

    Reads BLOCK_T * D elements and writes as many codes; a tile is what registers hold easily.
    """
    blocks = tl.cdiv(T, BLOCK_T)
    program = tl.program_id(0)
    head = program // blocks % H
    stream = (program // (blocks * H)).to(tl.int64)
    offs_t = program % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    rows = offs_t.to(tl.int64)[:, None]
    mask = (offs_t < T)[:, None] & (offs_d < D)[None, :]
    features = (head * D + offs_d)[None, :]
    x = tl.load(x_ptr + stream * stride_xn + rows * stride_xt + features, mask=mask, other=0.0)
    codes, scale = quantise(x, codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + (stream * T + rows) * (H * D) + features, codes, mask=mask)
    tl.store(scale_ptr + (stream * H + head) * T + offs_t, scale, mask=offs_t < T)


QUANTISE_ELEMENTS = 2048


def quantise_tokens(x: Tensor, num_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes (N, T, E) of tokens `x` (N, T, E), and the scales (N, H, T) of their heads, in fp32."""
    N, T, E = x.shape
    codes = torch.empty((N, T, E), dtype=dtype, device=x.device)
    scale = torch.empty((N, num_heads, T), dtype=torch.float32, device=x.device)
    block_d = next_power_of_2(E // num_heads)
    block_t = max(1, QUANTISE_ELEMENTS // block_d)
    args = (x, codes, scale, *x.stride()[:2], T)
    constants = constants_of(num_heads, E // num_heads, block_t, block_d)
    grid = (N * num_heads * cdiv(T, block_t), 1, 1)
    launch(_quantise_tokens_kernel, grid, args, constants, num_warps=4)
    return codes, scale
