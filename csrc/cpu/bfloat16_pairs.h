// Dot products of bfloat16 numbers as they lie, by the instruction that adds up two products a
// lane.
#pragma once

#include "tiles.h"

namespace continual_mha::cpu {
namespace {

CMHA_INLINE __m512bh load_pairs(const BFloat16* p) {
  return bit_cast<__m512bh>(_mm512_loadu_si512(p));
}

// The first `count` < 32 elements, zeros behind them.
CMHA_INLINE __m512bh load_pairs(const BFloat16* p, int64_t count) {
  return bit_cast<__m512bh>(_mm512_maskz_loadu_epi16((__mmask32{1} << count) - 1, p));
}

// As dot_tile in tiles.h, of which this is the overload where both factors are bfloat16.
template <int kR, int kC>
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
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) add(r, load_pairs(rows + r * row_stride + i));
  }
  if (i < count) {
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) xs[c] = load_pairs(x + c * x_stride + i, count - i);
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) add(r, load_pairs(rows + r * row_stride + i, count - i));
  }
  store_sums<float, kR * kC>(acc, sums);
}

}  // namespace
}  // namespace continual_mha::cpu
