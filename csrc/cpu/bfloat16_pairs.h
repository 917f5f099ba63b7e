// The loops of tiles.h where both factors are bfloat16, by the instruction that adds up two
// products a lane: included there, where the instruction set has it.
#pragma once

namespace continual_mha::cpu {
namespace {

CMHA_INLINE __m512bh load_pairs(const BFloat16* p) {
  return bit_cast<__m512bh>(_mm512_loadu_si512(p));
}

// The first `count` < 32 elements, zeros behind them.
CMHA_INLINE __m512bh load_pairs(const BFloat16* p, int64_t count) {
  return bit_cast<__m512bh>(_mm512_maskz_loadu_epi16((__mmask32{1} << count) - 1, p));
}

template <>
struct FactorOf<BFloat16> {
  using type = BFloat16;
};

template <int kR, int kC, bool kAsk = false>
CMHA_TILE void dot_tile(const BFloat16* rows, int64_t row_stride, const BFloat16* x,
                        int64_t x_stride, int64_t count, float* sums) {
  constexpr int kPairs = 2 * Simd<float>::kLanes;
  FVec acc[kR * kC] = {};
  __m512bh xs[kC];
  const auto add = [&](int r, __m512bh w) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) {
      FVec& sum = acc[r * kC + c];
      sum = bit_cast<FVec>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), w, xs[c]));
    }
  };
  int64_t i = 0;
  for (; i + kPairs <= count; i += kPairs) {
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) xs[c] = load_pairs(x + c * x_stride + i);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const BFloat16* at = rows + r * row_stride + i;
      if (kAsk) __builtin_prefetch(at + count);
      add(r, held(load_pairs(at)));
    }
  }
  if (i < count) {
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) xs[c] = load_pairs(x + c * x_stride + i, count - i);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) add(r, load_pairs(rows + r * row_stride + i, count - i));
  }
  store_sums<float, kR * kC>(acc, sums);
}

// Interleaved by 128 bits, the first of two sums has the columns 0 to 3, 8 to 11, and so on, and
// the second the others: both in the order of columns.
CMHA_INLINE Pair<float> in_order(FVec first, FVec second) {
  const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
  const __m512 a = bit_cast<__m512>(first);
  const __m512 b = bit_cast<__m512>(second);
  return {bit_cast<FVec>(_mm512_permutex2var_ps(a, lower, b)),
          bit_cast<FVec>(_mm512_permutex2var_ps(a, upper, b))};
}

// The first `count` lanes of a sum, or all; none if `count` is not positive.
template <bool kPartial, bool kAdd>
CMHA_INLINE void put(float* to, FVec lanes_of_sum, int64_t count) {
  __m512 sum = bit_cast<__m512>(lanes_of_sum);
  constexpr int kLanes = Simd<float>::kLanes;
  const bool all = !kPartial || count >= kLanes;
  const __mmask16 lanes = all ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
  if constexpr (kAdd) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, to));
  _mm512_mask_storeu_ps(to, lanes, sum);
}

// As weighted_tile, for kChunks times 32 columns, or with kTail for `tail` columns. Two rows are
// interleaved to pairs of a column, whose factors are neighbours in p.
template <int kQ, int kChunks, bool kTail, bool kAdd>
CMHA_TILE void weighted_pairs_tile(const BFloat16* p, int64_t p_stride, const BFloat16* rows,
                                   int64_t row_stride, int64_t begin, int64_t end, int64_t tail,
                                   float* out, int64_t out_stride) {
  constexpr int kLanes = Simd<float>::kLanes;
  FVec acc[kQ][2 * kChunks] = {};
  const auto chunk = [&](int64_t l, int j) __attribute__((always_inline)) {
    const BFloat16* row = rows + l * row_stride + j * 2 * kLanes;
    return bit_cast<__m512i>(kTail ? load_pairs(row, tail) : load_pairs(row));
  };
  const auto add = [&](int64_t l, auto count) __attribute__((always_inline)) {
    constexpr bool kBoth = decltype(count)::value == 2;
    __m512bh factors[kQ];
#pragma GCC unroll 4
    for (int q = 0; q < kQ; ++q) {
      uint32_t pair = 0;
      memcpy(&pair, p + q * p_stride + l, decltype(count)::value * sizeof(BFloat16));
      factors[q] = bit_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair)));
    }
#pragma GCC unroll 8
    for (int j = 0; j < kChunks; ++j) {
      const __m512i first = chunk(l, j);
      const __m512i second = kBoth ? chunk(l + 1, j) : __m512i{};
      const __m512bh pairs[2] = {bit_cast<__m512bh>(_mm512_unpacklo_epi16(first, second)),
                                 bit_cast<__m512bh>(_mm512_unpackhi_epi16(first, second))};
#pragma GCC unroll 4
      for (int q = 0; q < kQ; ++q) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          FVec& sum = acc[q][2 * j + half];
          sum = bit_cast<FVec>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), factors[q], pairs[half]));
        }
      }
    }
  };
  int64_t l = begin;
  for (; l + 2 <= end; l += 2) add(l, Int<2>{});
  if (l < end) add(l, Int<1>{});
#pragma GCC unroll 4
  for (int q = 0; q < kQ; ++q) {
#pragma GCC unroll 8
    for (int j = 0; j < kChunks; ++j) {
      const Pair<float> sums = in_order(acc[q][2 * j], acc[q][2 * j + 1]);
      float* to = out + q * out_stride + j * 2 * kLanes;
      put<kTail, kAdd>(to, sums.low, tail);
      put<kTail, kAdd>(to + kLanes, sums.high, tail - kLanes);
    }
  }
}

template <int kQ, bool kAdd = false>
CMHA_INLINE void weighted_rows(const BFloat16* p, int64_t p_stride, const BFloat16* rows,
                               int64_t row_stride, int64_t begin, int64_t end, int64_t columns,
                               float* out, int64_t out_stride) {
  constexpr int kColumns = 2 * Simd<float>::kLanes;
  int64_t d = 0;
  const auto chunks_of = [&](auto tag) __attribute__((always_inline)) {
    constexpr int kChunks = decltype(tag)::value;
    for (; d + kChunks * kColumns <= columns; d += kChunks * kColumns) {
      weighted_pairs_tile<kQ, kChunks, false, kAdd>(p, p_stride, rows + d, row_stride, begin, end,
                                                    0, out + d, out_stride);
    }
  };
  if constexpr (kTileVectors / kQ >= 16) chunks_of(Int<8>{});
  if constexpr (kTileVectors / kQ >= 8) chunks_of(Int<4>{});
  if constexpr (kTileVectors / kQ >= 4) chunks_of(Int<2>{});
  chunks_of(Int<1>{});
  if (d < columns) {
    weighted_pairs_tile<kQ, 1, true, kAdd>(p, p_stride, rows + d, row_stride, begin, end,
                                           columns - d, out + d, out_stride);
  }
}

}  // namespace
}  // namespace continual_mha::cpu
