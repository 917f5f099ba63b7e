"""What more than one kernel uses: device functions, and the host's choice of precision."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ..devices import why_unfit
from .launch import INTERPRETED, recording
from .plan import next_power_of_2

# The interpreter multiplies bfloat16 operands of a dot as raw 16-bit integers, so there they are
# widened first; products of 16-bit floats are exact in fp32, so the numbers are those of a GPU.
_WIDEN = tl.constexpr(INTERPRETED)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@cache
def why_no_launch() -> str | None:
    """Why Triton runs no kernel here; None if it does.

    Before its first launch it builds a library of its own, for which there may be no C compiler.
    """
    try:
        triton.runtime.driver.active.utils  # noqa: B018  (that library)
    except Exception as error:
        return f"Triton cannot launch kernels here: {type(error).__name__}: {error}"
    return None


def not_taken(x: torch.Tensor) -> str | None:
    """Why no kernel takes tensors like this one, or None."""
    if x.device.type == "cuda":
        if reason := why_unfit(x.device):
            return reason
        if torch.cuda.is_initialized() and (reason := why_no_launch()):
            return reason
    elif not INTERPRETED and not recording():
        return f"the tensors are on {x.device.type}, and Triton needs cuda"
    if x.dtype not in DTYPES and not (INTERPRETED and x.dtype == torch.float64):
        return f"no kernel for {x.dtype}"
    return None


def accumulators(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """What sums of such numbers have: as a tensor's dtype, and as a kernel's."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def dot_precision(whole: bool = False) -> str:
    """Input precision of an fp32 dot: "tf32x3" unless torch's setting names another one.

    That is three products on the matrix unit, of the leading and the following 11 bits of each
    number, and one addition of fp32 for each tile: together they err as products of fp32 do. Those,
    "ieee", read shared memory through one bank wherever the sum runs along an operand's rows.
    `whole`: take them nevertheless.
    """
    # `allow_tf32`, which says less, raises once anybody has set `fp32_precision`.
    setting = torch.backends.cuda.matmul.fp32_precision
    if setting == "tf32":
        return "tf32"
    return "ieee" if whole or setting == "ieee" else "tf32x3"


def features_at_once(features: int, itemsize: int, most: int) -> int:
    """Of a projection, to multiply at a time: at `most` so many, of fp32 32.

    Sums of 32 products err as those of fp32 do even where the matrix unit truncates the sum of
    every four; sums of 128 err nearly four times as much.
    """
    return max(16, min(most if itemsize == 2 else 32, next_power_of_2(features)))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in the accumulator's precision."""
    if _WIDEN:
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc=acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def dot_of_part(a, b, acc, PRECISION: tl.constexpr):
    """`dot` for one part of a long sum: fp32 adds up each part alone, for sums of sums err less.

    A plain addition Triton would turn into what continues the sum, so this subtracts.
    """
    if a.dtype == tl.float32:
        return acc - (-dot(a, b, tl.zeros(acc.shape, acc.dtype), PRECISION))
    else:
        return dot(a, b, acc, PRECISION)


@triton.jit
def sum_of_last(x, SIZE: tl.constexpr):
    """Sum over the last axis, of SIZE, which other warps have; flat.

    By moving halves into the registers of one thread: `tl.sum` would pass them through shared
    memory in an order that has up to 16 threads in one bank.
    """
    if SIZE == 1:
        return tl.reshape(x, (x.numel,))
    else:
        a, b = tl.split(tl.reshape(x, (x.numel // 2, 2)))
        return sum_of_last(a + b, SIZE // 2)


@triton.jit
def sum_of_parts(x):
    """Sum over the first axis, which is that of `products_in_parts`."""
    return tl.reshape(sum_of_last(tl.permute(x, (1, 2, 0)), x.shape[0]), (x.shape[1], x.shape[2]))


@triton.jit
def products_in_parts(both, tile, acc, PRECISION: tl.constexpr):
    """acc + products of `both` and a tile over each of as many parts of the features as acc has."""
    PARTS: tl.constexpr = acc.shape[0]
    PART: tl.constexpr = tile.shape[1] // PARTS
    left = tl.permute(tl.reshape(both, (acc.shape[1], PARTS, PART)), (1, 0, 2))
    right = tl.permute(tl.reshape(tile, (acc.shape[2], PARTS, PART)), (1, 2, 0))
    return dot(left, right, acc, PRECISION)


@triton.jit
def scores_in_parts(query, tile, PARTS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """query @ tile.T, whose features the warps divide into PARTS instead of repeating products.

    Such a score is one of few numbers, each a sum over all features. In parts, warps read a tile
    once and not several times from shared memory, and fewer products wait for one another.
    """
    if PARTS == 1:
        zeros = tl.zeros((query.shape[0], tile.shape[0]), ACC)
        return dot(query, tl.trans(tile), zeros, PRECISION)
    else:
        scores = tl.zeros((PARTS, query.shape[0], tile.shape[0]), ACC)
        return sum_of_parts(products_in_parts(query, tile, scores, PRECISION))


@triton.jit
def product(a, b, ALONE: tl.constexpr = True):
    """a * b for a sum across threads; `ALONE` where a thread may have no more than one of a sum.

    That one the compiler would fuse into the addition of what another thread sends, so that each
    has its own sum, unlike the others' in the last bit. So here it is rounded first.
    """
    if ALONE and not _WIDEN:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return a * b


@triton.jit
def finite_or_zero(m):
    """m where it is not -inf, else 0: the shift that keeps exp2(-inf - m) at 0 and not NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def keep_scale(seed_ptr, slots, stream, head, rows, dropout_p):
    """0 where the weight of this slot is dropped, else 1 / (1 - p), from counters that broadcast.

    Philox keyed by the call's seed and counted by (slot, stream, head, row): independent of the
    grid.
    """
    stream = stream.to(tl.int32)
    zero = (slots + stream + head + rows) * 0
    counters = (zero + slots, zero + stream, zero + head, zero + rows)
    bits, _, _, _ = tl.philox(tl.load(seed_ptr), *counters)
    uniform = tl.uint_to_uniform_float(bits)
    p = uniform * 0 + dropout_p
    return tl.where(uniform >= p, 1.0 / (1.0 - p), 0.0)


@triton.jit
def one_more_score(m, l_sum, score):
    """Online softmax: maximum and sum with one more score, what the weights of all before are to be
    multiplied with, and its own."""
    m_new = tl.maximum(m, score)
    shift = finite_or_zero(m_new)
    alpha = tl.exp2(m - shift)
    weight = tl.exp2(score - shift)
    return m_new, l_sum * alpha + weight, alpha, weight


@triton.jit
def one_more_slot(m, l_sum, kept, acc, score, keep):
    """The same of a slot of each head, whose values are still to be added: their weights too."""
    m, l_sum, alpha, weight = one_more_score(m, l_sum, score)
    return m, l_sum, kept * alpha, acc * alpha[:, None], weight * keep


@triton.jit
def store_part(
    partial_ptr, ml_ptr, split, m, l_sum, kept, acc, offsets, mask, in_block, SIZE: tl.constexpr,
    HAS_KEPT: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """What one part of a window found, for `merge_parts`: SIZE elements and three statistics."""
    tl.store(partial_ptr + split * SIZE + offsets, acc, mask=mask)
    tl.store(ml_ptr + split * 3 * BLOCK_H + in_block, m)
    tl.store(ml_ptr + (split * 3 + 1) * BLOCK_H + in_block, l_sum)
    if HAS_KEPT:
        tl.store(ml_ptr + (split * 3 + 2) * BLOCK_H + in_block, kept)


@triton.jit
def merge_parts(
    partial_ptr, ml_ptr, offsets, mask, in_block, SPLITS: tl.constexpr, SIZE: tl.constexpr,
    HAS_KEPT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Maxima, sums and rows of all parts together, for the program that finished last.

    In the order of the parts, whoever that was: the same bits in every run.
    """
    top = tl.full((BLOCK_H,), float("-inf"), ACC)
    for s in range(SPLITS):
        part_ptr = ml_ptr + s * 3 * BLOCK_H + in_block
        top = tl.maximum(top, tl.load(part_ptr, cache_modifier=".cg"))
    shift = finite_or_zero(top)
    l_sum = tl.zeros((BLOCK_H,), ACC)
    kept = tl.zeros((BLOCK_H,), ACC)
    acc = tl.zeros((BLOCK_H, BLOCK_E), ACC)
    for s in range(SPLITS):
        part_ptr = ml_ptr + s * 3 * BLOCK_H + in_block
        scale = tl.exp2(tl.load(part_ptr, cache_modifier=".cg") - shift)
        l_sum += tl.load(part_ptr + BLOCK_H, cache_modifier=".cg") * scale
        if HAS_KEPT:
            kept += tl.load(part_ptr + 2 * BLOCK_H, cache_modifier=".cg") * scale
        rows_ptr = partial_ptr + s * SIZE + offsets
        acc += tl.load(rows_ptr, mask=mask, other=0.0, cache_modifier=".cg") * scale[:, None]
    return top, l_sum, kept, acc


@triton.jit
def start_after_previous_launch(PDL: tl.constexpr):
    """With programmatic dependent launch: let the next kernel start, wait for the previous one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x rounded to nearest even; left alone, the interpreter truncates fp32 to make bfloat16."""
    if _WIDEN and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        even = (bits >> 16) & 1
        rounded = ((bits + 0x7FFF + even) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, float("nan")).to(dtype)
    return x.to(dtype)


@triton.jit
def is_last(counter_ptr, COUNT: tl.constexpr):
    """True in the last of COUNT programs to come here, which then sees all that they stored."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == COUNT - 1
    if last:
        tl.store(counter_ptr, 0)
    return last
