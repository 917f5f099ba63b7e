// Gradients of several tokens of every stream in bfloat16, by AMX, 32 queries at a time.
#pragma once

#include "attend_window_backward_kernel.h"
#include "matrix_unit_steps.h"

namespace continual_mha::cpu {
namespace {

constexpr int64_t kUnitQueries = 2 * kTileRows;

// Sums of gradients, (rows / 16, D / 32, 2 halves, 16, 16): as tiles hold them.
struct UnitSums {
  float* data;
  int64_t stripes;  // D / 32

  float* tiles(int64_t block, int64_t stripe) const {
    return data + (block * stripes + stripe) * 2 * kTileSums;
  }
};

struct UnitWindowScratch {
  BFloat16* rows;  // (rows, D), of the keys or values that the windows hold, oldest first
  char* keys;      // packed, as tokens are for a projection
  char* values;    // the same
  char* right;     // the keys, packed as the right of a product
  UnitSums of_keys;
  UnitSums of_values;
  UnitRows<BFloat16> q;         // (kUnitQueries, D), zeros behind the features
  UnitRows<BFloat16> grad_out;  // the same
  char* q_right;                // packed as the right of a product
  char* grad_right;
  UnitRows<float> scores;      // (kUnitQueries, rows)
  UnitRows<float> grads;       // of the weights
  UnitRows<BFloat16> applied;  // weights, zeros outside of the windows
  UnitRows<BFloat16> factors;  // gradients of the scores, the same
  BFloat16* left;              // (32, 32) of these, by rows of keys
  float* grad_q;               // (kTileRows, D)
  float* keeps;

  UnitWindowScratch(const WindowGradientParams& p, Arena& arena) {
    const int64_t most = most_rows(p);
    const int64_t tiled_rows = tiles_of_features(most) * kTileFeatures;
    const int64_t stripes = tiles_of_features(p.head_dim);
    const int64_t width = stripes * kTileFeatures;
    const int64_t stride = tiles_of_features(padded_scores<float>(tiled_rows)) * kTileFeatures;
    rows = arena.take<BFloat16>(most * p.head_dim);
    keys = arena.take<char>(packed_bytes(most, p.head_dim));
    values = arena.take<char>(packed_bytes(most, p.head_dim));
    right = arena.take<char>(right_bytes(most, p.head_dim));
    of_keys = {arena.take<float>(tiled_rows * width), stripes};
    of_values = {arena.take<float>(tiled_rows * width), stripes};
    q = {arena.take<BFloat16>(kUnitQueries * width), width};
    grad_out = {arena.take<BFloat16>(kUnitQueries * width), width};
    q_right = arena.take<char>(right_bytes(kUnitQueries, p.head_dim));
    grad_right = arena.take<char>(right_bytes(kUnitQueries, p.head_dim));
    scores = {arena.take<float>(kUnitQueries * stride), stride};
    grads = {arena.take<float>(kUnitQueries * stride), stride};
    applied = {arena.take<BFloat16>(kUnitQueries * stride), stride};
    factors = {arena.take<BFloat16>(kUnitQueries * stride), stride};
    left = arena.take<BFloat16>(kTileFeatures * kTileFeatures);
    grad_q = arena.take<float>(kTileRows * p.head_dim);
    keeps = arena.take<float>(stride);
  }
};

CMHA_INLINE bool suits_unit(const WindowGradientParams& p) {
  return p.tokens - p.first >= kLeastForUnit && p.length >= kLeastForUnit;
}

int64_t window_gradient_unit_scratch(const WindowGradientParams& p) {
  if (!suits_unit(p)) return window_gradient_scratch<BFloat16>(p);
  Arena arena(nullptr);
  UnitWindowScratch(p, arena);
  return arena.used();
}

// Two rows of tiles += the turned factors of 32 rows times the vectors of 32 queries.
CMHA_INLINE void add_products(const MatrixUnit& unit, const UnitRows<BFloat16>& factors,
                              int64_t row, const char* vectors, const UnitSums& sums,
                              BFloat16* left) {
  turn_left(factors.data + row, factors.stride, kUnitQueries, kTileFeatures, left, kTileFeatures);
  unit.load<4>(left, 64);
  unit.load<5>(left + kTileRows * kTileFeatures, 64);
  for (int64_t i = 0; i < sums.stripes; ++i, vectors += kRightBytes) {
    float* upper = sums.tiles(row / kTileRows, i);
    float* lower = sums.tiles(row / kTileRows + 1, i);
    unit.load<6>(vectors, 64);
    unit.load<7>(vectors + kTileBytes, 64);
    unit.load<0>(upper, 64);
    unit.load<1>(upper + kTileSums, 64);
    unit.load<2>(lower, 64);
    unit.load<3>(lower + kTileSums, 64);
    unit.multiply<0, 4, 6>();
    unit.multiply<1, 4, 7>();
    unit.multiply<2, 5, 6>();
    unit.multiply<3, 5, 7>();
    unit.store<0>(upper);
    unit.store<1>(upper + kTileSums);
    unit.store<2>(lower);
    unit.store<3>(lower + kTileSums);
  }
}

// As window_gradient_of_block, of at most 32 queries, whose rows meet weights of zero outside of
// their windows. `rows` is how many are laid out.
CMHA_INLINE void window_gradient_by_unit(const HeadOfGradient<BFloat16>& to,
                                         const UnitWindowScratch& scratch, const MatrixUnit& unit,
                                         int64_t token, int64_t count, int64_t base, int64_t rows) {
  const int64_t head_dim = to.p.head_dim;
  const float scale = 1 / static_cast<float>(__builtin_sqrt(static_cast<double>(head_dim)));
  const auto window = [&](int64_t q) __attribute__((always_inline)) {
    return to.head.window(token + q, base);
  };
  const int64_t begin = window(0).begin / kTileFeatures * kTileFeatures;
  const int64_t end = window(count - 1).end;
  const int64_t stop = begin + tiles_of_features(end - begin) * kTileFeatures;
  const int64_t tiles = (count + kTileRows - 1) / kTileRows;
  for (int64_t q = 0; q < tiles * kTileRows; q += kTileRows) {
    const auto score = [&](const UnitRows<BFloat16>& vectors, const char* packed,
                           const UnitRows<float>& scores) __attribute__((always_inline)) {
      score_blocks(unit, vectors.from(q), packed, begin / kTileRows,
                   (end + kTileRows - 1) / kTileRows, scores.from(q));
    };
    score(scratch.q, scratch.keys, scratch.scores);
    score(scratch.grad_out, scratch.values, scratch.grads);
  }
  for (int64_t q = 0; q < kUnitQueries; ++q) {
    BFloat16* applied = scratch.applied.from(q).data;
    BFloat16* factors = scratch.factors.from(q).data;
    const auto [first, last] = q < count ? window(q) : RowRange{stop, stop};
    if (q < count) {
      to.finish(token + q, {first, last}, scale, scratch.scores.from(q).data + first,
                scratch.grads.from(q).data + first, scratch.keeps, applied + first,
                factors + first);
    }
    for (int64_t l = begin; l < first; ++l) applied[l] = factors[l] = {};
    for (int64_t l = last; l < stop; ++l) applied[l] = factors[l] = {};
  }
  for (int64_t q = 0; q < count; q += kTileRows) {
    sum_values(unit, scratch.factors.from(q), scratch.right, head_dim, rows, begin, end,
               scratch.grad_q);
    for (int64_t i = 0; i < min_of(kTileRows, count - q); ++i) {
      copy_scaled(scratch.grad_q + i * head_dim, head_dim, scale,
                  to.of_clip(to.p.grad_q, token + q + i));
    }
  }
  for (int64_t row = begin; row < stop; row += kTileFeatures) {
    add_products(unit, scratch.factors, row, scratch.q_right, scratch.of_keys, scratch.left);
    add_products(unit, scratch.applied, row, scratch.grad_right, scratch.of_values, scratch.left);
  }
}

// The queries or the gradients of outputs from `token` on, vector(i), to rows and to the right of a
// product.
template <class Vector>
CMHA_INLINE void lay_out_vectors(const Vector& vector, int64_t count, int64_t head_dim,
                                 const UnitRows<BFloat16>& to, char* right) {
  memset(to.data, 0, static_cast<size_t>(kUnitQueries * to.stride) * sizeof(BFloat16));
  for (int64_t i = 0; i < count; ++i) copy_row(vector(i), head_dim, to.from(i).data);
  pack_right([&](int64_t i) { return to.from(i).data; }, kUnitQueries, head_dim, right);
}

// One head of one stream.
CMHA_INLINE void window_gradient_of_head(const HeadOfGradient<BFloat16>& to,
                                         const UnitWindowScratch& scratch, const MatrixUnit& unit) {
  const WindowGradientParams& p = to.p;
  const int64_t head_dim = p.head_dim;
  const int64_t base = to.head.window_begin(p.first);
  const int64_t rows = p.tokens - base;
  const auto lay_out = [&](const KeptTokens& clip, const void* ring, char* packed) {
    const Kept<BFloat16> from{clip, static_cast<const BFloat16*>(ring), nullptr};
    for (int64_t i = 0; i < rows; ++i) {
      to.head.read(from, base + i, scratch.rows + i * head_dim);
    }
    pack<BFloat16>({scratch.rows, packed, head_dim, 1, rows, head_dim, 1.0}, 0,
                   (rows + kTileRows - 1) / kTileRows);
  };
  lay_out(p.values, p.v_ring, scratch.values);
  lay_out(p.keys, p.k_ring, scratch.keys);
  pack_right([&](int64_t i) { return scratch.rows + i * head_dim; }, rows, head_dim, scratch.right);
  const int64_t tiled = tiles_of_features(rows) * kTileFeatures * scratch.of_keys.stripes;
  for (int64_t i = 0; i < tiled * kTileFeatures; ++i) {
    scratch.of_keys.data[i] = scratch.of_values.data[i] = 0;
  }
  for (int64_t token = p.first; token < p.tokens; token += kUnitQueries) {
    const int64_t count = min_of(kUnitQueries, p.tokens - token);
    lay_out_vectors([&](int64_t i) { return to.head.query(token + i); }, count, head_dim, scratch.q,
                    scratch.q_right);
    lay_out_vectors([&](int64_t i) { return to.grad_out(token + i); }, count, head_dim,
                    scratch.grad_out, scratch.grad_right);
    window_gradient_by_unit(to, scratch, unit, token, count, base, rows);
  }
  const auto put = [&](const UnitSums& sums, float scale, void* of_tokens, void* of_ring,
                       const void* after) {
    to.put(
        [&](int64_t row, float* sum) {
          for (int64_t i = 0; i < sums.stripes; ++i) {
            const int64_t width = min_of(kTileFeatures, head_dim - i * kTileFeatures);
            put_halves(sums.tiles(row / kTileRows, i) + row % kTileRows * kTileRows, width, scale,
                       sum + i * kTileFeatures);
          }
        },
        base, of_tokens, of_ring, after, scratch.grad_q);
  };
  const float scale = 1 / static_cast<float>(__builtin_sqrt(static_cast<double>(head_dim)));
  put(scratch.of_keys, scale, p.grad_k, p.grad_k_ring, p.grad_k_after);
  put(scratch.of_values, 1, p.grad_v, p.grad_v_ring, p.grad_v_after);
  to.clear_unasked();
}

// As window_gradient.
void window_gradient_of_unit(const WindowGradientParams& p, void* memory, int64_t begin,
                             int64_t end) {
  if (!suits_unit(p)) return window_gradient<BFloat16>(p, memory, begin, end);
  Arena arena(memory);
  const UnitWindowScratch scratch(p, arena);
  const MatrixUnit unit;
  for (int64_t task = begin; task < end; ++task) {
    const HeadOfClip<BFloat16> head{p, task / p.num_heads, task % p.num_heads};
    window_gradient_of_head({p, head}, scratch, unit);
  }
}

constexpr void set_windows_of_unit(Kernels& table) {
  table.window_gradient_scratch = window_gradient_unit_scratch;
  table.window_gradient = window_gradient_of_unit;
}

}  // namespace
}  // namespace continual_mha::cpu
