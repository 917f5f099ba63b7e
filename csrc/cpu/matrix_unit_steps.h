// Several tokens of every stream against windows of bfloat16, by AMX, 16 queries at a time.
#pragma once

#include "matrix_unit_products.h"
#include "ring_steps_kernel.h"

namespace continual_mha::cpu {
namespace {

// Windows of fewer rows, or fewer queries, do not repay that rows are packed.
constexpr int64_t kLeastForUnit = 16;

struct UnitStepsScratch {
  BFloat16* rows;     // (rows, D), of the keys or values that the task's windows hold, oldest first
  char* keys;         // packed, as tokens are for a projection
  char* values;       // packed, as the right of a product
  BFloat16* q;        // (kTileRows, q_stride), zeros behind the features
  float* scores;      // (kTileRows, stride)
  BFloat16* factors;  // the same, zeros outside of the windows
  float* out;         // (kTileRows, D)
  float* keeps;       // (stride,)
  int64_t q_stride;
  int64_t stride;

  UnitStepsScratch(const RingStepsParams& p, Arena& arena) {
    const int64_t most = p.length - 1 + p.block_tokens;
    q_stride = tiles_of_features(p.head_dim) * kTileFeatures;
    stride = tiles_of_features(padded_scores<float>(most)) * kTileFeatures;
    rows = arena.take<BFloat16>(most * p.head_dim);
    keys = arena.take<char>(packed_bytes(most, p.head_dim));
    values = arena.take<char>(right_bytes(most, p.head_dim));
    q = arena.take<BFloat16>(kTileRows * q_stride);
    scores = arena.take<float>(kTileRows * stride);
    factors = arena.take<BFloat16>(kTileRows * stride);
    out = arena.take<float>(kTileRows * p.head_dim);
    keeps = arena.take<float>(stride);
  }
};

CMHA_INLINE bool suits_unit(const RingStepsParams& p) {
  return p.tokens - p.first >= kLeastForUnit && p.length >= kLeastForUnit;
}

int64_t ring_steps_unit_scratch(const RingStepsParams& p) {
  const int64_t bytes = ring_steps_scratch<BFloat16>(p);
  if (!suits_unit(p)) return bytes;
  Arena arena(nullptr);
  UnitStepsScratch(p, arena);
  return max_of(bytes, arena.used());
}

CMHA_INLINE bool all_finite(const BFloat16* numbers, int64_t count) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 broken = 0;
  for (int64_t i = 0; i < count; i += kTileFeatures) {
    const __m512i bits = _mm512_and_si512(load_row(numbers + i, count - i), exponent);
    broken |= _mm512_cmpeq_epi16_mask(bits, exponent);
  }
  return broken == 0;
}

// Rows of as many numbers as whole tiles have, `stride` apart.
template <class T>
struct UnitRows {
  T* data;
  int64_t stride;

  UnitRows from(int64_t row) const { return {data + row * stride, stride}; }
};

// scores[q][row] of 16 queries for blocks of 16 rows, [begin, end), of the packed keys.
CMHA_INLINE void score_blocks(const MatrixUnit& unit, const UnitRows<BFloat16>& queries,
                              const char* packed, int64_t begin, int64_t end,
                              const UnitRows<float>& scores) {
  constexpr int kQueries = 7;  // their tile, behind those of sums and of keys
  const int64_t block_bytes = packed_bytes(kTileRows, queries.stride);
  const auto blocks_of = [&](auto blocks) __attribute__((always_inline)) {
    constexpr int kBlocks = decltype(blocks)::value;
    for (; begin + kBlocks <= end; begin += kBlocks) {
      const char* keys = packed + begin * block_bytes;
      unrolled<kBlocks>([&](auto b)
                            __attribute__((always_inline)) { unit.clear<decltype(b)::value>(); });
      for (int64_t d = 0; d < queries.stride; d += kTileFeatures, keys += kTileBytes) {
        unit.load<kQueries>(queries.data + d, queries.stride * int64_t{sizeof(BFloat16)});
        unrolled<kBlocks>([&](auto b) __attribute__((always_inline)) {
          constexpr int kBlock = decltype(b)::value;
          unit.load<kBlocks + kBlock>(keys + kBlock * block_bytes, 64);
          unit.multiply<kBlock, kQueries, kBlocks + kBlock>();
        });
      }
      unrolled<kBlocks>([&](auto b) __attribute__((always_inline)) {
        unit.store<decltype(b)::value>(scores.data + (begin + decltype(b)::value) * kTileRows,
                                       scores.stride * int64_t{sizeof(float)});
      });
    }
  };
  blocks_of(Int<3>{});
  blocks_of(Int<1>{});
}

// out[q], (16, D), is the sum of rows [begin, end) of the packed values, of `rows` in all, times
// its factors.
CMHA_INLINE void sum_values(const MatrixUnit& unit, const UnitRows<BFloat16>& factors,
                            const char* packed, int64_t head_dim, int64_t rows, int64_t begin,
                            int64_t end, float* out) {
  const char* right = packed + begin / kTileFeatures * kRightBytes;
  for (int64_t d = 0; d < head_dim; d += kTileFeatures) {
    const int64_t width = min_of(kTileFeatures, head_dim - d);
    alignas(64) float sums[2 * kTileSums];
    multiply_right<1>(unit, {factors.data + begin, factors.stride, kTileRows}, 0, right,
                      end - begin, sums);
    right += right_bytes(rows, kTileFeatures);
    for (int64_t q = 0; q < kTileRows; ++q) {
      put_halves(sums + q * kTileRows, width, 1.0f, out + q * head_dim + d);
    }
  }
}

// As attend_block, of at most 16 queries. All values of the task are finite, so that those outside
// of a window may meet weights of zero. `rows` is how many are laid out.
CMHA_INLINE void attend_block_by_unit(const HeadOfClip<BFloat16>& head,
                                      const UnitStepsScratch& scratch, const MatrixUnit& unit,
                                      const ExtraSlots<BFloat16>& extra, int64_t token,
                                      int64_t count, int64_t base, int64_t rows, float scale) {
  const int64_t head_dim = head.p.head_dim;
  const int64_t stride = scratch.stride;
  const auto window = [&](int64_t q)
                          __attribute__((always_inline)) { return head.window(token + q, base); };
  for (int64_t q = 0; q < count; ++q) {
    BFloat16* to = scratch.q + q * scratch.q_stride;
    copy_row(head.query(token + q), head_dim, to);
    for (int64_t d = head_dim; d < scratch.q_stride; ++d) to[d] = {};
  }
  const int64_t begin = window(0).begin / kTileFeatures * kTileFeatures;
  const int64_t end = window(count - 1).end;
  score_blocks(unit, {scratch.q, scratch.q_stride}, scratch.keys, begin / kTileRows,
               (end + kTileRows - 1) / kTileRows, {scratch.scores, stride});
  float scales[kTileRows];
  for (int64_t q = 0; q < count; ++q) {
    float* scores = scratch.scores + q * stride;
    BFloat16* factors = scratch.factors + q * stride;
    scales[q] = weigh_window(head, token + q, window(q), extra, scratch.q + q * scratch.q_stride,
                             scale, scores, scratch.keeps);
    const auto [first, last] = window(q);
    for (int64_t l = begin; l < first; ++l) factors[l] = {};
    copy_row(scores + first, last - first, factors + first);
    for (int64_t l = last; l < begin + tiles_of_features(end - begin) * kTileFeatures; ++l) {
      factors[l] = {};
    }
  }
  sum_values(unit, {scratch.factors, stride}, scratch.values, head_dim, rows, begin, end,
             scratch.out);
  for (int64_t q = 0; q < count; ++q) {
    finish_output(extra, scratch.scores + q * stride, window(q), head_dim, scales[q],
                  scratch.out + q * head_dim);
  }
}

// As ring_steps, which serves where values are not finite.
void ring_steps_by_unit(const RingStepsParams& p, void* memory, int64_t begin, int64_t end) {
  const auto by_rows = [&](int64_t first, int64_t last) {
    ring_steps<BFloat16, BFloat16>(p, memory, first, last);
  };
  if (!suits_unit(p)) return by_rows(begin, end);
  Arena arena(memory);
  const UnitStepsScratch scratch(p, arena);
  const MatrixUnit unit;
  const float scale = 1 / static_cast<float>(__builtin_sqrt(static_cast<double>(p.head_dim)));
  for_blocks_of_tokens<BFloat16, BFloat16>(p, begin, end, [&](const auto& task) {
    const HeadOfClip<BFloat16>& head = task.head;
    const int64_t rows = task.last - task.base;
    const auto lay_out = [&](const Kept<BFloat16>& from) {
      for (int64_t i = 0; i < rows; ++i) {
        head.read(from, task.base + i, scratch.rows + i * p.head_dim);
      }
    };
    lay_out(task.values);
    if (!all_finite(scratch.rows, rows * p.head_dim)) return by_rows(task.index, task.index + 1);
    pack_right([&](int64_t i) { return scratch.rows + i * p.head_dim; }, rows, p.head_dim,
               scratch.values);
    lay_out(task.keys);
    pack<BFloat16>({scratch.rows, scratch.keys, p.head_dim, 1, rows, p.head_dim, 1.0}, 0,
                   (rows + kTileRows - 1) / kTileRows);
    for (int64_t token = task.token; token < task.last; token += kTileRows) {
      const int64_t count = min_of(kTileRows, task.last - token);
      attend_block_by_unit(head, scratch, unit, task.extra, token, count, task.base, rows, scale);
      task.put(scratch.out, token, count);
    }
  });
}

constexpr void set_steps_of_unit(Kernels& table) {
  table.ring_steps_scratch = ring_steps_unit_scratch;
  table.ring_steps[static_cast<int>(RingDType::kAsTokens)] = ring_steps_by_unit;
}

}  // namespace
}  // namespace continual_mha::cpu
