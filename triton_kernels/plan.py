"""Which launches, block shapes and warps a shape gets: fixed tables, no autotuning.

Autotuning would run a kernel several times, and these kernels write state. The rows below follow
from the predictions in docs/triton.md; a row that has been measured says so beside it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

MULTIPROCESSORS = 132
MAX_HEAD_DIM = 256
MAX_ELEMENTS = 1 << 31  # of what offsets of 32 bits reach: a head's ring, or a stream's of inputs


# Triton has both, but a call of them from the host takes microseconds.
def cdiv(x: int, y: int) -> int:
    """`x / y`, rounded up."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The least power of two that is `x` or more."""
    return 1 << max(x - 1, 0).bit_length()


class StepPlan(NamedTuple):
    """How one step runs.

    path: "fused", one launch for everything, whose programs have one stream each; "group", the same
    for `group` streams each; "chain", projection, ring and output projection as three launches of
    our own; "gemm", the same with torch's matrix product around the ring kernel.
    spread: "fused" gives the new token's key and its value programs of their own.
    """

    path: str
    group: int
    splits: int
    spread: bool
    block_l: int
    block_d: int
    block_k: int
    block_e: int
    num_warps: int
    stages: int
    block_n: int
    block_o: int
    pdl: bool

    @property
    def merged(self) -> int:
        """Results of a head to merge: of parts of the window and, with `spread`, the new token."""
        return self.splits + self.spread

    def programs(self, N: int, H: int) -> int:
        """Programs of the kernel that reads the ring."""
        return cdiv(N, self.group) * H * (self.splits + 2 * self.spread)


class StepRule(NamedTuple):
    """The first rule whose limits hold for a shape decides its path."""

    path: str
    max_itemsize: int  # of tokens and weights
    max_streams: int
    max_programs: int  # streams, or groups of them, * heads
    max_head_weight_bytes: int  # of all four projections, per head
    max_slots: int  # of a window
    min_split_slots: int  # a window is not cut into parts shorter than this
    max_parts: int  # heads * splits of a stream, where one program merges them all
    pdl: bool  # programmatic dependent launch between the path's launches


_NO_LIMIT = 1 << 62
ONE_LAUNCH = ("fused", "group")
# Streams of a program of path "group". With more, a tile has fewer slots of each, and a program
# waits for more tiles; with fewer, more programs read the same weights.
GROUP = 4
# Several tokens of fp32 are left to torch's products, which are those of fp32 as it is.
STEP_RULES = (
    StepRule("fused", 8, 64, MULTIPROCESSORS, 96 * 1024, _NO_LIMIT, 128, 64, False),
    StepRule("group", 2, 256, 2 * MULTIPROCESSORS, 64 * 1024, 128, _NO_LIMIT, _NO_LIMIT, False),
    StepRule("fused", 8, 4, MULTIPROCESSORS, 256 * 1024, 256, 128, 64, False),
    StepRule("chain", 2, 32, _NO_LIMIT, _NO_LIMIT, _NO_LIMIT, 128, _NO_LIMIT, False),
    StepRule("fused", 8, 16, MULTIPROCESSORS, 128 * 1024, _NO_LIMIT, 128, 64, False),
    StepRule("fused", 8, 4, MULTIPROCESSORS, 512 * 1024, 256, 128, 64, False),
    StepRule("gemm", 8, _NO_LIMIT, _NO_LIMIT, _NO_LIMIT, _NO_LIMIT, 256, _NO_LIMIT, False),
)

# Rows of the ring in one tile and warps, by padded head_dim, for 16-bit elements: 32 elements of k
# and of v per thread, so that with the next tile's loads a thread stays under 200 registers.
RING_TILES = {8: (512, 4), 16: (256, 4), 32: (256, 8), 64: (64, 4), 128: (32, 4), 256: (32, 8)}
# The same for one byte per number. From 16 features on a tile has at most as many rows as threads:
# with more, the rows' scales come through shared memory, with a barrier in the loop.
RING_TILES_8 = {8: (256, 4), 16: (128, 4), 32: (64, 4), 64: (64, 4), 128: (64, 4), 256: (32, 4)}


@lru_cache(maxsize=1024)
def step_plan(
    N: int,
    E: int,
    H: int,
    L: int,
    itemsize: int,
    path: str | None = None,
    splits: int = 0,
    slot_itemsize: int = 0,
    *,
    little: bool = False,
) -> StepPlan:
    """The plan of a step of `N` streams; `path` and `splits` override the table.

    `itemsize` is that of tokens and weights, `slot_itemsize` that of the rings where it differs.
    """
    head_dim = E // H
    for rule in STEP_RULES:
        group = GROUP if rule.path == "group" else 1
        sizes = (itemsize, N, cdiv(N, group) * H, 4 * E * head_dim * itemsize, L)
        limits = (rule.max_itemsize, rule.max_streams, rule.max_programs,
                  rule.max_head_weight_bytes, rule.max_slots)  # fmt: skip
        fits = all(size <= limit for size, limit in zip(sizes, limits, strict=True))
        if rule.path == path or (path is None and fits):
            break
    # The matrix unit, which projects in the same launch, adds up no fewer than 16 products.
    block_d = max(next_power_of_2(head_dim), 16 if rule.path in ONE_LAUNCH else 8)
    if rule.path == "group":
        splits = 1
    if not splits:
        splits = 1
        while (
            N * H * splits * 2 <= 2 * MULTIPROCESSORS
            and L // (splits * 2) >= rule.min_split_slots
            and H * splits * 2 <= rule.max_parts
        ):
            splits *= 2
    slot_itemsize = slot_itemsize or itemsize
    tiles = RING_TILES_8 if slot_itemsize == 1 else RING_TILES
    rows, warps = tiles[min(block_d, MAX_HEAD_DIM)]  # wider heads are projected alone
    if rule.path == "fused":  # the projections want all eight warps, the ring has few rows
        rows, warps = rows * 4 // warps, 8
    elif rule.path == "group":  # 16 elements per thread; 8 of narrow heads, which have more rows
        rows, warps = max((4096 if block_d > 16 else 2048) // (block_d * group), 1), 8
    rows = max(rows * 2 // max(slot_itemsize, 2), 1)
    part = next_power_of_2(cdiv(L, splits))
    while rows > part:
        rows //= 2
        if rule.path not in ONE_LAUNCH and warps > 1 and rows * block_d <= 1024 * warps // 2:
            warps //= 2
    wide = 4096 // max(itemsize, 2)
    # The product of a group is unrolled, and 256 features of fp32 at once spill.
    features = 64 if rule.path == "group" and itemsize > 2 else 256
    block_k = max(16, min(features, wide * 16 // block_d))
    # two blocks of weights of 64 KiB, and the tokens, are more than there is
    block_bytes = block_d * block_k * max(itemsize, 2)
    crowded = little and rule.path in ONE_LAUNCH and block_bytes >= 1 << 16
    return StepPlan(
        path=rule.path,
        group=group,
        splits=splits,
        spread=rule.path == "fused" and N * H * (splits + 2) <= MULTIPROCESSORS,
        block_l=rows,
        block_d=block_d,
        block_k=block_k,
        block_e=max(16, min(128, wide * 8 // block_d)),
        num_warps=warps,
        stages=2 if crowded else 3,
        block_n=16,
        block_o=16,
        pdl=rule.pdl,
    )


# One program of the projections takes so many tokens and output features, whatever the batch.
INVARIANT_TOKENS, INVARIANT_FEATURES = 64, 32


def invariant_step_plan(E: int, H: int, L: int, itemsize: int, slot_itemsize: int = 0) -> StepPlan:
    """The plan of a step whose bits do not depend on the number of streams.

    Parts of 256 slots cost many streams under 1 % of the bytes, and a single one still gets many.
    """
    splits = 1
    while H * splits * 2 <= 2 * MULTIPROCESSORS and L // (splits * 2) >= 256:
        splits *= 2
    plan = step_plan(1, E, H, L, itemsize, "chain", splits, slot_itemsize)
    return plan._replace(block_n=INVARIANT_TOKENS, block_o=INVARIANT_FEATURES)


class SharedPlan(NamedTuple):
    """How `attend_shared` or its backward runs.

    one_tile: one load serves both products.
    by_rows, registers: as of `InputPlan`.
    parts: parts of the features, among which warps divide the first product of one tile.
    """

    splits: int
    block_h: int
    block_s: int
    block_e: int
    block_v: int
    one_tile: bool
    by_rows: bool
    num_warps: int
    stages: int
    registers: int | None = None
    parts: int = 1

    @property
    def groups(self) -> int:
        """As of `InputPlan`."""
        return self.num_warps if self.by_rows else 0


# Slots of a tile by padded embed_dim, for 16-bit elements: what fits into shared memory twice, and
# of the widest once, beside the queries and the sums of the parts.
SHARED_ROWS = {64: 128, 128: 64, 256: 64, 512: 32, 1024: 16, 2048: 16}
LITTLE_SHARED_ROWS = {64: 128, 128: 64, 256: 64, 512: 32, 1024: 16}
# The same for fp32, whose scores are computed from registers: what fits there beside the sums.
SHARED_ROWS_32 = {64: 32, 128: 32, 256: 16, 512: 16, 1024: 16}
# Warps of a program with `row_scores`, by padded embed_dim. They divide the features, 32 or more
# for each, or a thread would have fewer than four; but each reads all queries and adds up all
# scores, so that more warps have more to do.
ROW_WARPS = {64: 2, 128: 4, 256: 4, 512: 8, 1024: 8}
# Registers of a thread, by padded embed_dim, with which two programs share a multiprocessor, where
# the assembler would take more: for tiles of 16 bits, and with `row_scores`.
SHARED_REGISTERS = {1024: 128}
ROW_REGISTERS = {512: 128}
ROW_HEADS = 8  # of a program with `row_scores`


def tile_rows(itemsize: int, little: bool = False) -> dict[int, int]:
    """Slots of a tile of which one load serves both products, by padded embed_dim."""
    if itemsize > 2:
        return SHARED_ROWS_32
    return LITTLE_SHARED_ROWS if little else SHARED_ROWS


def _stages(itemsize: int, width: int, little: bool, tiles: int = 2) -> int:
    """How many of the tiles of a program that has so many are in shared memory at a time.

    Of 1024 features in 16 bits, two programs with two tiles under way fit onto a multiprocessor.
    """
    if itemsize == 2:
        return 2 if width == 2048 or tiles == 1 else 3
    return 1 if little and width == 1024 else 2


def _registers(itemsize: int, width: int, little: bool) -> int | None:
    """Registers of a thread that works on such tiles; None where the assembler chooses best."""
    if itemsize == 2:
        return None if little else SHARED_REGISTERS.get(width)
    return ROW_REGISTERS.get(width)


@lru_cache(maxsize=1024)
def shared_plan(
    N: int,
    H: int,
    S: int,
    EK: int,
    EV: int,
    itemsize: int,
    one_tensor: bool,
    *,
    dropout: bool = False,
    little: bool = False,
) -> SharedPlan:
    """The plan of `attend_shared` for `N` streams."""
    # The matrix unit has 16 rows, which fewer heads do not fill; `row_scores` needs none.
    block_h = max(16 if itemsize == 2 else 8, next_power_of_2(H))
    width = max(64, next_power_of_2(max(EK, EV)))
    rows = tile_rows(itemsize, little)
    fits = one_tensor and width in rows
    by_rows = fits and itemsize > 2
    one_tile = by_rows or (fits and block_h <= 16)
    if by_rows:
        block_h, block_s, block_v, warps = ROW_HEADS, rows[width], width, ROW_WARPS[width]
    elif one_tile:
        block_s, block_v, warps = rows[width], width, 8 if width >= 1024 else 4
    else:
        # Philox keeps five numbers per weight, which more warps share, and fp32 two of each number.
        accumulators = 8192 if itemsize == 2 else 2048 if dropout else 4096
        block_v = min(width, 256, accumulators // block_h)
        block_s = 64 if itemsize == 2 and not (dropout and block_h > 16) else 32
        warps = 8 if block_h > 16 or (itemsize == 2 and dropout) else 4
    block_s = max(16, min(block_s, next_power_of_2(S)))
    blocks = N * cdiv(EV, block_v) * cdiv(H, block_h)
    splits = _splits(blocks, S, block_s)
    tiles = cdiv(cdiv(S, splits), block_s)
    stages = _stages(itemsize, width, little, tiles) if one_tile else 2
    registers = _registers(itemsize, width, little) if one_tile else None
    parts = _parts(width, warps, little) if one_tile and itemsize == 2 else 1
    block_e = 64 if itemsize == 2 else 32
    return SharedPlan(
        splits, block_h, block_s, block_e, block_v, one_tile, by_rows, warps, stages, registers,
        parts,
    )  # fmt: skip


def _parts(width: int, warps: int, little: bool) -> int:
    """Parts of the features, among which warps divide the first product of a 16-bit tile.

    In narrower tiles no warp repeats another's product, and few products wait for one another.
    """
    return warps if width >= 512 and not little else 1


# Accumulators, heads * padded embed_dim, that registers hold beside the gradient of 16 slots, in 16
# bits. Up to these, the backward of one tensor keeps a tile in shared memory for all its products,
# with two more under way. Read again from the second-level cache, as those of two tensors are, not
# every tile would still be there: with 64 slots of 1024 features the resident programs have 69 MB,
# and write as much. Each also has a part of the query's gradient in fp32, which comes to a quarter
# of the bytes of the clip and its gradient.
MAX_BACKWARD_ACCUMULATORS = 8192


@lru_cache(maxsize=1024)
def shared_backward_plan(
    N: int,
    H: int,
    S: int,
    EK: int,
    itemsize: int,
    one_tensor: bool = False,
    *,
    little: bool = False,
) -> SharedPlan:
    """The plan of `attend_shared_backward`, whose tiles are its splits unless `one_tile`."""
    block_h = max(8, next_power_of_2(H))
    width = max(64, next_power_of_2(EK))
    accumulators = block_h * width
    most = MAX_BACKWARD_ACCUMULATORS // (2 if little else 1)
    if one_tensor and itemsize == 2 and block_h <= 16 and accumulators <= most:
        block_s = min(32 if accumulators <= 2048 else 16, max(16, next_power_of_2(S)))
        warps = 8 if accumulators > 4096 else 4
        # Of 1024 features, eight warps that repeat the first product would take 5300 cycles of
        # shared memory a tile, whose bytes take 5000 of an H100's memory; they divide it in 3500.
        parts = min(warps, width // 32)
        blocks = (_splits(N, S, block_s), block_h, block_s, width, width)
        return SharedPlan(*blocks, True, False, warps, 3, parts=parts)
    if one_tensor and itemsize > 2 and block_h <= ROW_HEADS and width in ROW_WARPS:
        warps = ROW_WARPS[width]
        stages = _stages(itemsize, width, little)
        return SharedPlan(_splits(N, S, 16), ROW_HEADS, 16, 64, width, True, True, warps, stages)
    block_h = max(16, block_h)
    rows = 64 if itemsize == 2 and block_h <= 32 else 32
    block_s = max(16, min(rows, next_power_of_2(S)))
    block_e = 64 if itemsize == 2 else 16 if block_h >= 32 else 32
    warps = 8 if itemsize > 2 and block_h >= 64 else 4
    return SharedPlan(1, block_h, block_s, block_e, block_e, False, False, warps, 2)


def _splits(programs: int, S: int, block_s: int) -> int:
    """Parts of a window of `S` slots that fill the chip with so many programs of each part."""
    splits = 1
    while programs * splits * 2 <= 2 * MULTIPROCESSORS and (splits * 2 - 1) * block_s < S:
        splits *= 2
    return splits


class InputPlan(NamedTuple):
    """How a step over a ring of inputs runs.

    path: "gemm", matrix products per head around the kernel; "fused", in it, by groups of streams.
    block_c: features of the weights that "fused" takes at a time.
    block_q: features of the queries that are in registers for the scores of a new token in codes.
    block_h: heads of a program; of more, each block is a program.
    by_rows: scores are those of `row_scores`, not a `tl.dot`.
    registers: that a thread may have, where the assembler's choice is not the best.
    stages: tiles of tokens in shared memory under way and worked on, where the widest leave room
    for fewer; codes are fetched ahead into registers, without.
    parts: as of `SharedPlan`.
    """

    path: str
    splits: int
    block_n: int
    block_d: int
    block_c: int
    block_q: int
    block_h: int
    block_s: int
    block_e: int
    by_rows: bool
    num_warps: int
    stages: int
    registers: int | None = None
    parts: int = 1

    @property
    def groups(self) -> int:
        """Into how many the warps divide the features in `row_scores`; 0 without."""
        return self.num_warps if self.by_rows else 0


class InputRule(NamedTuple):
    """The first rule whose limits hold for a shape decides its path."""

    path: str
    min_streams: int
    max_slots_per_head: int
    max_embed_dim: int


# Moved queries and mixed inputs are 4 H E elements a stream beside the ring's L E. Up to about 4 MB
# they stay in the second-level cache; beyond, for L of a few H, they double what comes from memory.
# In the kernel the two matrices cost E^2 / 8 elements a stream from that cache, and 16 streams are
# one program: predicted to pay from two programs a multiprocessor on. Nothing here is measured.
INPUT_RULES = (
    InputRule("fused", 2 * 16 * MULTIPROCESSORS, 8, 512),
    InputRule("gemm", 0, _NO_LIMIT, _NO_LIMIT),
)
# Slots of a tile by padded embed_dim where they are of 8 bits and tokens of 16: what fits decoded
# into registers.
INPUT_ROWS_8 = {64: 64, 128: 64, 256: 64, 512: 16, 1024: 16, 2048: 16}
# Accumulators of a program, heads * padded embed_dim, and heads; of more, each block is a program.
# The matrix unit has 16 rows, which fewer heads do not fill; fp32 is not multiplied there.
MAX_INPUT_ACCUMULATORS_16 = 16384
MAX_INPUT_ACCUMULATORS_32 = 8192
MAX_INPUT_HEADS = 32


def input_step_covers(E: int, itemsize: int, *, little: bool = False) -> str | None:
    """None if there is a plan for a step over inputs, else the reason why not."""
    widest = max(tile_rows(itemsize, little))
    return f"embed_dim {E} is over {widest}" if widest < E else None


@lru_cache(maxsize=1024)
def input_plan(
    N: int,
    E: int,
    H: int,
    L: int,
    itemsize: int,
    codes: bool = False,
    path: str | None = None,
    splits: int = 0,
    *,
    little: bool = False,
) -> InputPlan:
    """The plan of a step of `N` streams over inputs, which are `codes` if the ring is of 8 bits.

    `path` and `splits` override the table.
    """
    block_e = max(64, next_power_of_2(E))
    least, most = 8, MAX_INPUT_ACCUMULATORS_32
    if itemsize == 2:
        least, most = 16, MAX_INPUT_ACCUMULATORS_16
    by_rows = itemsize > 2 and not codes
    block_h = min(next_power_of_2(H), ROW_HEADS if by_rows else MAX_INPUT_HEADS)
    block_h = max(least, min(block_h, most // block_e))
    for rule in INPUT_RULES:
        fits = rule.min_streams <= N and rule.max_slots_per_head * H >= L
        fits = fits and rule.max_embed_dim >= E and block_h >= H
        if rule.path == path or (path is None and fits):
            break
    rows = INPUT_ROWS_8 if codes and itemsize == 2 else tile_rows(itemsize, little)
    block_s = max(16, min(rows[block_e], next_power_of_2(L)))
    if rule.path == "fused":
        splits = 1
    splits = splits or _splits(N * cdiv(H, block_h), L, block_s)
    block_d = max(16, next_power_of_2(E // H))
    tiles = cdiv(cdiv(L, splits), block_s)
    stages = 1 if codes else _stages(itemsize, block_e, little, tiles)
    fused = rule.path == "fused"
    # Decoded tiles of the widest fill shared memory, and there is no room for what parts add up.
    divided = itemsize == 2 and not fused and not (codes and block_e == 2048)
    if by_rows:
        warps = min(8, block_e // 32) if fused else ROW_WARPS[block_e]
    else:
        warps = 8 if block_h * block_e >= most or (itemsize > 2 and fused) else 4
    return InputPlan(
        path=rule.path,
        splits=splits,
        block_n=16,
        block_d=block_d,
        block_c=max(16, min(32, 8192 // block_d, block_e)),
        block_q=min(
            block_e // 2, (4096 if itemsize == 2 else 1024) // block_h, ((1 << 14) // block_e) ** 2
        ),
        block_h=block_h,
        block_s=block_s,
        block_e=block_e,
        by_rows=by_rows,
        num_warps=warps,
        stages=stages,
        registers=None if fused or codes else _registers(itemsize, block_e, little),
        parts=_parts(block_e, warps, little) if divided else 1,
    )


INVARIANT_PART = 1024  # slots: merging parts costs a few hundredths of their bytes


def invariant_input_plan(
    E: int, H: int, L: int, itemsize: int, codes: bool, *, little: bool = False
) -> InputPlan:
    """The plan of a step over inputs whose bits do not depend on the number of streams."""
    splits = max(1, L // INVARIANT_PART)
    return input_plan(1, E, H, L, itemsize, codes, "gemm", splits, little=little)


class StepsPlan(NamedTuple):
    """Blocks of tokens, of keys and of features in the many-token kernel.

    block_one: keys of a tile that a single token has to itself.
    key_t, key_s: tokens and keys of a program that computes gradients of keys.
    whole: fp32 is multiplied as it is, since registers have no room for two parts of each number.
    """

    block_t: int
    block_s: int
    block_d: int
    block_one: int
    num_warps: int
    stages: int
    whole: bool
    key_t: int
    key_s: int


# (tokens, keys, warps) by padded head_dim, for 16-bit elements and for fp32, of which a thread has
# two parts of each number in registers. Four warps and 64 tokens, or in the keys' kernel 64 keys,
# are what sm_90 multiplies out of shared memory. Of fewer each warp reads operands for itself: for
# 64 tokens and 32 keys of 128 features 1340 cycles of shared memory, counted in the compiled code,
# in place of 380, and three times as many in the backward's kernels, too.
STEPS_BLOCKS_16 = {16: (64, 64, 4), 32: (64, 64, 4), 64: (64, 64, 4), 128: (64, 32, 4),
                   256: (32, 32, 8)}  # fmt: skip
STEPS_BLOCKS_32 = {16: (32, 32, 4), 32: (32, 32, 4), 64: (32, 32, 4), 128: (16, 16, 4),
                   256: (16, 16, 8)}  # fmt: skip

# Keys of a tile for a single token, by padded head_dim: what needs no registers beside the others.
ONE_TOKEN_BLOCKS = {16: 32, 32: 16, 64: 32, 128: 4, 256: 8}


# The backward holds two tiles of accumulators where the forward holds one.
WINDOW_BACKWARD_BLOCKS_16 = {16: (64, 64, 4), 32: (64, 64, 4), 64: (64, 64, 4), 128: (64, 32, 4),
                             256: (32, 32, 8)}  # fmt: skip
WINDOW_BACKWARD_BLOCKS_32 = {16: (32, 32, 4), 32: (32, 16, 4), 64: (16, 32, 4), 128: (16, 16, 8),
                             256: (16, 16, 8)}  # fmt: skip


@lru_cache(maxsize=1024)
def steps_plan(
    tokens: int,
    head_dim: int,
    itemsize: int,
    dropout: bool,
    backward: bool = False,
    codes: bool = False,
    *,
    little: bool = False,
) -> StepsPlan:
    """The plan of `ring_steps_`, `attend_window` or its backward for `tokens` outputs a stream.

    `codes`: keys and values are of 8 bits.
    """
    if backward:
        table = WINDOW_BACKWARD_BLOCKS_16 if itemsize == 2 else WINDOW_BACKWARD_BLOCKS_32
    else:
        table = STEPS_BLOCKS_16 if itemsize == 2 else STEPS_BLOCKS_32
    block_d = max(16, next_power_of_2(head_dim))
    block_t, block_s, warps = table[block_d]
    wide = itemsize == 2 and block_d == 128
    if wide and little:  # a program of 64 tokens would be alone on a multiprocessor
        block_t = 32
    of_few_weights = block_d == 256 and codes and itemsize == 2  # eight warps share them
    if dropout and not (backward and itemsize > 2) and not of_few_weights:
        block_t = max(16, block_t // 2)  # Philox keeps five numbers per weight
    if dropout and backward and itemsize > 2:
        block_s = min(block_s, block_t)
    if dropout and backward and itemsize == 2 and block_d == 64:
        block_s //= 2
    stages = 2
    if codes and itemsize > 2 and block_d >= 64:  # decoded tiles are in registers whole
        block_t, warps = max(16, block_t // 2), 8
        stages = 1 if block_d > 128 else 2  # two such tiles at once are too many
    # Decoded tiles take registers beside what it takes to find their slots.
    if codes and itemsize == 2 and block_d <= 64:
        block_s //= 2
    key_t, key_s = block_t, block_s
    if wide and not little:  # Philox and masks of other widths take the registers of more keys
        key_t, key_s = (16 if dropout else 32), (64 if head_dim == 128 and not dropout else 32)
    least = next_power_of_2(max(tokens, 16))
    whole = itemsize > 2 and block_d == 256
    return StepsPlan(
        min(block_t, least), block_s, block_d, ONE_TOKEN_BLOCKS[block_d], warps, stages, whole,
        min(key_t, least), key_s,
    )  # fmt: skip
