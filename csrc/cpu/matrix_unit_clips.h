// The queries of up to 16 heads against one tile of keys and values in bfloat16, by AMX.
#pragma once

#include "attend_shared_kernel.h"
#include "matrix_unit.h"

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

// To sums[2][head][16] the weighted sums of `width` <= 32 features of all slots: those of the lower
// and of the upper halves of what 128 bits hold of them.
CMHA_INLINE void weigh_features(const MatrixUnit& unit, const BFloat16* factors, int64_t stride,
                                const BFloat16* values, int64_t slot_stride, int64_t slots,
                                int64_t width, float* sums) {
  const bool whole = width == kTileFeatures;
  const auto row = [&](int64_t slot) __attribute__((always_inline)) {
    const BFloat16* at = values + slot * slot_stride;
    if (slot >= slots) return __m512i{};
    return bit_cast<__m512i>(whole ? load_pairs(at) : load_pairs(at, width));
  };
  alignas(64) char pairs[2][2 * kTileBytes];
  unit.clear<0>();
  unit.clear<1>();
  for (int64_t s = 0; s < slots; s += kTileFeatures) {
    char* to = pairs[s / kTileFeatures % 2];
    for (int64_t i = 0; i < kTileRows; ++i) {
      const __m512i first = row(s + 2 * i);
      const __m512i second = row(s + 2 * i + 1);
      _mm512_store_si512(to + i * 64, _mm512_unpacklo_epi16(first, second));
      _mm512_store_si512(to + kTileBytes + i * 64, _mm512_unpackhi_epi16(first, second));
    }
    unit.load<2>(factors + s, stride * int64_t{sizeof(BFloat16)});
    unit.load<3>(to, 64);
    unit.load<4>(to + kTileBytes, 64);
    unit.multiply<0, 2, 3>();
    unit.multiply<1, 2, 4>();
  }
  unit.store<0>(sums);
  unit.store<1>(sums + kTileSums);
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
  const int64_t queries = kParts<Q> * count;
  const int64_t blocks = (queries + kTileRows - 1) / kTileRows;
  pack<BFloat16>({scratch.queries, scratch.packed, p.key_dim, 1, queries, p.key_dim, 1.0}, 0,
                 blocks);
  const SharedTile<BFloat16> keys(p.key, n, p.slots, p.key_dim);
  if (blocks == 1) {
    score_slots<1>(unit, keys, scratch.packed, scratch.scores, stride);
  } else {
    score_slots<2>(unit, keys, scratch.packed, scratch.scores, stride);
  }
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
  Q* out = static_cast<Q*>(p.out) + (n * p.num_heads + head) * p.value_dim;
  for (int64_t i = 0; i < p.value_dim; i += kTileFeatures) {
    const int64_t width = min_of(kTileFeatures, p.value_dim - i);
    alignas(64) float sums[2 * kTileSums];
    weigh_features(unit, scratch.factors, stride, values.data + i, values.slot_stride, p.slots,
                   width, sums);
    for (int64_t c = 0; c < count; ++c) {
      const Pair<float> halves =
          in_order(load(sums + c * kTileRows), load(sums + kTileSums + c * kTileRows));
      float features[kTileFeatures];
      store<float>(features, halves.low);
      store<float>(features + kTileRows, halves.high);
      copy_scaled(features, width, scale[c], out + c * p.value_dim + i);
    }
  }
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

// As attend_shared, whose tasks of a stream are done together, up to 16 heads.
template <class Q>
void attend_shared_by_unit(const AttendSharedParams& p, void* memory, int64_t begin, int64_t end) {
  if (!suits_unit(p)) return attend_shared<BFloat16, Q>(p, memory, begin, end);
  constexpr int64_t kMost = kTileRows / kHeadBlock;
  Arena arena(memory);
  const UnitScratch scratch(p, arena);
  const MatrixUnit unit;
  const int64_t blocks = (p.num_heads + kHeadBlock - 1) / kHeadBlock;
  while (begin < end) {
    const int64_t n = begin / blocks;
    const int64_t stop = min_of(min_of(begin + kMost, (n + 1) * blocks), end);
    const int64_t head = begin % blocks * kHeadBlock;
    const int64_t count = min_of((stop - begin) * kHeadBlock, p.num_heads - head);
    attend_by_unit<Q>(p, scratch, unit, n, head, count);
    begin = stop;
  }
}

constexpr void set_clips_of_unit(Kernels& table) {
  table.attend_shared_scratch = attend_shared_unit_scratch;
  table.attend_shared = attend_shared_by_unit<BFloat16>;
  table.attend_shared_acc = attend_shared_by_unit<float>;
}

}  // namespace
}  // namespace continual_mha::cpu
