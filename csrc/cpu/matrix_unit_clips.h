// The queries of up to 16 heads against one tile of keys and values in bfloat16, by AMX, and their
// gradients.
#pragma once

#include "attend_shared_backward_kernel.h"
#include "attend_shared_kernel.h"
#include "matrix_unit_products.h"

namespace continual_mha::cpu {
namespace {

// Queries that come as acc are two numbers of bfloat16 each, which have nearly all of their digits.
template <class Q>
constexpr int kParts = std::is_same_v<Q, float> ? 2 : 1;

struct UnitScratch {
  BFloat16* queries;  // (parts, heads, Ek)
  char* packed;       // the same
  float* scores;      // (2 * kTileRows, stride)
  BFloat16* factors;  // (kTileRows, stride), zeros behind the slots
  float* scales;      // (stride,)
  int64_t stride;

  UnitScratch(const AttendSharedParams& p, Arena& arena) {
    stride = (p.slots + kTileFeatures - 1) / kTileFeatures * kTileFeatures;
    queries = arena.take<BFloat16>(2 * kTileRows * p.key_dim);
    packed = arena.take<char>(packed_bytes(2 * kTileRows, p.key_dim));
    scores = arena.take<float>(2 * kTileRows * stride);
    factors = arena.take<BFloat16>(kTileRows * stride);
    scales = arena.take<float>(stride);
  }
};

// To the scores of kBlocks times 16 packed queries.
template <int kBlocks>
CMHA_INLINE void score_slots(const MatrixUnit& unit, const SharedTile<BFloat16>& keys,
                             const char* packed, float* scores, int64_t stride) {
  int64_t slot = 0;
  const auto tiles_of = [&](auto tiles) __attribute__((always_inline)) {
    constexpr int kTiles = decltype(tiles)::value;
    for (; keys.slots - slot > (kTiles - 1) * kTileRows; slot += kTiles * kTileRows) {
      alignas(64) float sums[kTiles * kBlocks * kTileSums];
      multiply_tiles<kTiles, kBlocks>(unit, keys.data + slot * keys.slot_stride, keys.slots - slot,
                                      keys.slot_stride, kTileRows * keys.slot_stride, keys.features,
                                      packed, sums);
      for (int i = 0; i < kTiles * kBlocks; ++i) {
        FVec by_query[kTileRows];
        columns_of(sums + i * kTileSums, by_query);
        float* to = scores + i % kBlocks * kTileRows * stride + slot + i / kBlocks * kTileRows;
        for (int c = 0; c < kTileRows; ++c) store<float>(to + c * stride, by_query[c]);
      }
    }
  };
  tiles_of(Int<4 / kBlocks>{});
  tiles_of(Int<2 / kBlocks>{});
  tiles_of(Int<1>{});
}

// To scores[c] those of vector c of `count` <= 32; behind them is room for those of whole tiles.
CMHA_INLINE void score(const MatrixUnit& unit, const SharedTile<BFloat16>& keys,
                       const BFloat16* vectors, int64_t count, char* packed, float* scores,
                       int64_t stride) {
  const int64_t features = keys.features;
  const int64_t blocks = (count + kTileRows - 1) / kTileRows;
  pack<BFloat16>({vectors, packed, features, 1, count, features, 1.0}, 0, blocks);
  if (blocks == 1) {
    score_slots<1>(unit, keys, packed, scores, stride);
  } else {
    score_slots<2>(unit, keys, packed, scores, stride);
  }
}

// To sums[half][head][16] the weighted sums of `width` <= 32 features of all slots.
CMHA_INLINE void weigh_features(const MatrixUnit& unit, const BFloat16* factors, int64_t stride,
                                const BFloat16* values, int64_t slot_stride, int64_t slots,
                                int64_t width, float* sums) {
  alignas(64) char pairs[2][kRightBytes];
  unit.clear<0>();
  unit.clear<1>();
  for (int64_t s = 0; s < slots; s += kTileFeatures) {
    char* to = pairs[s / kTileFeatures % 2];
    interleave(
        [&](int64_t r) __attribute__((always_inline)) {
          return s + r < slots ? load_row(values + (s + r) * slot_stride, width) : __m512i{};
        },
        to);
    unit.load<2>(factors + s, stride * int64_t{sizeof(BFloat16)});
    unit.load<3>(to, 64);
    unit.load<4>(to + kTileBytes, 64);
    unit.multiply<0, 2, 3>();
    unit.multiply<1, 2, 4>();
  }
  unit.store<0>(sums);
  unit.store<1>(sums + kTileSums);
}

// To out[head] = scale[head] times the sum over slots of its factors times their rows.
template <class O>
CMHA_INLINE void weigh_slots(const MatrixUnit& unit, const BFloat16* factors, int64_t stride,
                             const SharedTile<BFloat16>& values, const float* scale, int64_t count,
                             O* out) {
  for (int64_t i = 0; i < values.features; i += kTileFeatures) {
    const int64_t width = min_of(kTileFeatures, values.features - i);
    alignas(64) float sums[2 * kTileSums];
    weigh_features(unit, factors, stride, values.data + i, values.slot_stride, values.slots, width,
                   sums);
    for (int64_t c = 0; c < count; ++c) {
      put_halves(sums + c * kTileRows, width, scale[c], out + c * values.features + i);
    }
  }
}

// `count` <= 16 heads from `head` on.
template <class Q>
CMHA_INLINE void attend_by_unit(const AttendSharedParams& p, const UnitScratch& scratch,
                                const MatrixUnit& unit, int64_t n, int64_t head, int64_t count) {
  const int64_t stride = scratch.stride;
  const Q* from = static_cast<const Q*>(p.query.data) + n * p.query.stream_stride;
  for (int64_t c = 0; c < count; ++c) {
    const Q* query = from + (head + c) * p.query.head_stride;
    BFloat16* high = scratch.queries + c * p.key_dim;
    copy_row(query, p.key_dim, high);
    if constexpr (kParts<Q> == 2) {
      BFloat16* low = high + count * p.key_dim;
      for (int64_t i = 0; i < p.key_dim; ++i) narrow(query[i] - widen(high[i]), low + i);
    }
  }
  score(unit, SharedTile<BFloat16>(p.key, n, p.slots, p.key_dim), scratch.queries,
        kParts<Q> * count, scratch.packed, scratch.scores, stride);
  float scale[kTileRows];
  for (int64_t c = 0; c < count; ++c) {
    float* scores = scratch.scores + c * stride;
    if constexpr (kParts<Q> == 2) {
      const float* low = scores + count * stride;
      for (int64_t s = 0; s < p.slots; ++s) scores[s] += low[s];
    }
    BFloat16* factors = scratch.factors + c * stride;
    scale[c] = finish_head(p, n, head + c, scores, scratch.scales, factors);
    for (int64_t s = p.slots; s < stride; ++s) factors[s] = {};
  }
  const SharedTile<BFloat16> values(p.value, n, p.slots, p.value_dim);
  weigh_slots(unit, scratch.factors, stride, values, scale, count,
              static_cast<Q*>(p.out) + (n * p.num_heads + head) * p.value_dim);
}

// Whether a call gains by the unit, whatever part of its tasks a thread has.
CMHA_INLINE bool suits_unit(const AttendSharedParams& p) {
  return p.num_heads >= kHeadBlock && p.slots >= kTileRows && p.key.feature_stride == 1 &&
         p.value.feature_stride == 1;
}

int64_t attend_shared_unit_scratch(const AttendSharedParams& p) {
  if (!suits_unit(p)) return attend_shared_scratch<BFloat16>(p);
  Arena arena(nullptr);
  UnitScratch(p, arena);
  return arena.used();
}

// f(n, head, count) for the heads of tasks [begin, end), up to 16 of a stream together.
template <class F>
CMHA_INLINE void for_unit_blocks(const AttendSharedParams& p, int64_t begin, int64_t end,
                                 const F& f) {
  constexpr int64_t kMost = kTileRows / kHeadBlock;
  const int64_t blocks = (p.num_heads + kHeadBlock - 1) / kHeadBlock;
  while (begin < end) {
    const int64_t n = begin / blocks;
    const int64_t stop = min_of(min_of(begin + kMost, (n + 1) * blocks), end);
    const int64_t head = begin % blocks * kHeadBlock;
    f(n, head, min_of((stop - begin) * kHeadBlock, p.num_heads - head));
    begin = stop;
  }
}

// As attend_shared, whose tasks of a stream are done together, up to 16 heads.
template <class Q>
void attend_shared_by_unit(const AttendSharedParams& p, void* memory, int64_t begin, int64_t end) {
  if (!suits_unit(p)) return attend_shared<BFloat16, Q>(p, memory, begin, end);
  Arena arena(memory);
  const UnitScratch scratch(p, arena);
  const MatrixUnit unit;
  for_unit_blocks(p, begin, end, [&](int64_t n, int64_t head, int64_t count) {
    attend_by_unit<Q>(p, scratch, unit, n, head, count);
  });
}

struct UnitGradientScratch {
  BFloat16* vectors;  // of heads: queries, then the outputs' gradients
  char* packed;       // the same
  float* scores;      // (2 * kTileRows, stride): scores, then gradients of the weights
  BFloat16* factors;  // (kTileRows, stride), zeros behind the slots
  float* scales;      // (stride,)
  char* right;        // the vectors of all heads, whose sums a tile's gradients are
  BFloat16* left;     // (kSlotBlock, left_stride): factors of these, zeros behind them
  int64_t stride;
  int64_t left_stride;

  UnitGradientScratch(const SharedGradientParams& p, Arena& arena) {
    stride = tiles_of_features(p.slots) * kTileFeatures;
    left_stride = tiles_of_features(2 * p.num_heads) * kTileFeatures;
    const int64_t most = max_of(p.key_dim, p.value_dim);
    vectors = arena.take<BFloat16>(2 * kTileRows * most);
    packed = arena.take<char>(packed_bytes(2 * kTileRows, most));
    scores = arena.take<float>(2 * kTileRows * stride);
    factors = arena.take<BFloat16>(kTileRows * stride);
    scales = arena.take<float>(stride);
    right = arena.take<char>(2 * right_bytes(left_stride, most));
    left = arena.take<BFloat16>(kSlotBlock * left_stride);
  }
};

int64_t shared_gradient_unit_scratch(const SharedGradientParams& p) {
  if (!suits_unit(p)) return shared_gradient_scratch<BFloat16>(p);
  Arena arena(nullptr);
  UnitGradientScratch(p, arena);
  return arena.used();
}

// `count` <= 16 heads from `head` on.
CMHA_INLINE void query_gradient_by_unit(const SharedGradientParams& p,
                                        const UnitGradientScratch& scratch, const MatrixUnit& unit,
                                        int64_t n, int64_t head, int64_t count) {
  const int64_t stride = scratch.stride;
  const SharedTile<BFloat16> key(p.key, n, p.slots, p.key_dim);
  const SharedTile<BFloat16> value(p.value, n, p.slots, p.value_dim);
  const bool same = key.data == value.data && key.slot_stride == value.slot_stride &&
                    key.features == value.features;
  BFloat16* grad_out = scratch.vectors + count * p.key_dim;
  copy_vectors<BFloat16>(p.query, n, head, count, p.key_dim, scratch.vectors);
  copy_vectors<BFloat16>(p.grad_out, n, head, count, p.value_dim, grad_out);
  float* of_weights = scratch.scores + (same ? count : kTileRows) * stride;
  score(unit, key, scratch.vectors, same ? 2 * count : count, scratch.packed, scratch.scores,
        stride);
  if (!same) score(unit, value, grad_out, count, scratch.packed, of_weights, stride);
  float ones[kTileRows];
  for (int64_t c = 0; c < count; ++c) {
    float* weights = scratch.scores + c * stride;
    float* scores = of_weights + c * stride;
    const float* applied = finish_gradients(p, n, head + c, weights, scores, scratch.scales);
    put_pairs<BFloat16>(p, n, head + c, scores, applied);
    BFloat16* factors = scratch.factors + c * stride;
    copy_row(scores, p.slots, factors);
    for (int64_t s = p.slots; s < stride; ++s) factors[s] = {};
    ones[c] = 1;
  }
  weigh_slots(unit, scratch.factors, stride, key, ones, count,
              static_cast<BFloat16*>(p.grad_query) + (n * p.num_heads + head) * p.key_dim);
}

void shared_query_gradient_by_unit(const SharedGradientParams& p, void* memory, int64_t begin,
                                   int64_t end) {
  if (!suits_unit(p)) return shared_query_gradient<BFloat16>(p, memory, begin, end);
  Arena arena(memory);
  const UnitGradientScratch scratch(p, arena);
  const MatrixUnit unit;
  for_unit_blocks(p, begin, end, [&](int64_t n, int64_t head, int64_t count) {
    query_gradient_by_unit(p, scratch, unit, n, head, count);
  });
}

void shared_tile_gradient_by_unit(const SharedGradientParams& p, void* memory, int64_t begin,
                                  int64_t end) {
  if (!suits_unit(p)) return shared_tile_gradient<BFloat16>(p, memory, begin, end);
  Arena arena(memory);
  const UnitGradientScratch scratch(p, arena);
  const MatrixUnit unit;
  const int64_t blocks = (p.slots + kSlotBlock - 1) / kSlotBlock;
  const int64_t heads = p.num_heads;
  const bool together = p.grad_value == nullptr;
  const int64_t count = together ? 2 * heads : heads;
  char* of_value = scratch.right + right_bytes(count, p.key_dim);
  const auto vector = [&](const HeadVectors& vectors, int64_t n, int64_t h) {
    return static_cast<const BFloat16*>(vectors.data) + n * vectors.stream_stride +
           h * vectors.head_stride;
  };
  int64_t there = -1;  // the stream whose vectors are in scratch
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / blocks;
    const int64_t first = task % blocks * kSlotBlock;
    const int64_t slots = min_of(kSlotBlock, p.slots - first);
    if (n != there) {
      pack_right(
          [&](int64_t i) {
            return i < heads ? vector(p.query, n, i) : vector(p.grad_out, n, i - heads);
          },
          count, p.key_dim, scratch.right);
      if (!together) {
        pack_right([&](int64_t i) { return vector(p.grad_out, n, i); }, heads, p.value_dim,
                   of_value);
      }
      there = n;
    }
    const auto put = [&](int64_t from, const char* right, int64_t features, void* grads) {
      const int64_t row = n * p.slots + first;
      const auto* pairs = static_cast<const BFloat16*>(p.pairs) + row * 2 * heads + from;
      for (int64_t s = 0; s < slots; ++s) {
        BFloat16* to = scratch.left + s * scratch.left_stride;
        copy_row(pairs + s * 2 * heads, count, to);
        for (int64_t i = count; i < scratch.left_stride; ++i) to[i] = {};
      }
      multiply_packed(unit, {scratch.left, scratch.left_stride, slots}, right, count, features,
                      {static_cast<BFloat16*>(grads) + row * features, features, 1, false});
    };
    put(0, scratch.right, p.key_dim, p.grad_key);
    if (!together) put(heads, of_value, p.value_dim, p.grad_value);
  }
}

constexpr void set_clips_of_unit(Kernels& table) {
  table.attend_shared_scratch = attend_shared_unit_scratch;
  table.attend_shared = attend_shared_by_unit<BFloat16>;
  table.attend_shared_acc = attend_shared_by_unit<float>;
  table.shared_gradient_scratch = shared_gradient_unit_scratch;
  table.shared_query_gradient = shared_query_gradient_by_unit;
  table.shared_tile_gradient = shared_tile_gradient_by_unit;
}

}  // namespace
}  // namespace continual_mha::cpu
