// Products of bfloat16 by AMX whose right lies in rows: its rows are summed up, and two of them
// interleaved to the pairs that a tile holds.
#pragma once

#include "matrix_unit.h"
#include "product_kernel.h"

namespace continual_mha::cpu {
namespace {

// 32 rows, of 32 columns each, to two tiles: one of the lower and one of the upper halves of what
// 128 bits hold of the columns.
template <class Row>
CMHA_INLINE void interleave(const Row& row, char* to) {
  for (int64_t i = 0; i < kTileRows; ++i) {
    const __m512i first = row(2 * i);
    const __m512i second = row(2 * i + 1);
    _mm512_store_si512(to + i * 64, _mm512_unpacklo_epi16(first, second));
    _mm512_store_si512(to + kTileBytes + i * 64, _mm512_unpackhi_epi16(first, second));
  }
}

// `width` <= 32 columns of a row of the sums over such tiles, (2 halves, 16 rows, 16 columns).
template <class O>
CMHA_INLINE void put_halves(const float* row, int64_t width, float scale, O* to) {
  const Pair<float> halves = in_order(load(row), load(row + kTileSums));
  float columns[kTileFeatures];
  store<float>(columns, halves.low);
  store<float>(columns + kTileRows, halves.high);
  copy_scaled(columns, width, scale, to);
}

CMHA_INLINE __m512i load_row(const BFloat16* from, int64_t count) {
  const bool whole = count >= kTileFeatures;
  return bit_cast<__m512i>(whole ? load_pairs(from) : load_pairs(from, count));
}

constexpr int64_t kRightBytes = 2 * kTileBytes;  // of 32 rows by 32 columns

CMHA_INLINE int64_t right_bytes(int64_t inner, int64_t columns) {
  return tiles_of_features(columns) * tiles_of_features(inner) * kRightBytes;
}

// Rows row(0) to row(inner - 1) as tiles, (columns / 32, inner / 32), zeros behind them.
template <class Row>
CMHA_INLINE void pack_right(const Row& row, int64_t inner, int64_t columns, char* packed) {
  const int64_t column_bytes = tiles_of_features(inner) * kRightBytes;
  for (int64_t k = 0; k < inner; k += kTileFeatures, packed += kRightBytes) {
    for (int64_t i = 0; i < columns; i += kTileFeatures) {
      interleave(
          [&](int64_t r) __attribute__((always_inline)) {
            return k + r < inner ? load_row(row(k + r) + i, columns - i) : __m512i{};
          },
          packed + i / kTileFeatures * column_bytes);
    }
  }
}

// A product's left: rows, of which a tile takes 32 numbers each.
struct UnitLeft {
  const BFloat16* rows;  // as many as whole tiles have
  int64_t stride;
  int64_t count;
};

// kTiles tiles of rows, from `first` on, times 32 columns of the right. To sums[tile][half].
template <int kTiles>
CMHA_INLINE void multiply_right(const MatrixUnit& unit, const UnitLeft& left, int64_t first,
                                const char* right, int64_t inner, float* sums) {
  constexpr int kLeft = 2 * kTiles;
  constexpr int kRight = kLeft + kTiles;
  unrolled<kLeft>([&](auto t) __attribute__((always_inline)) { unit.clear<decltype(t)::value>(); });
  for (int64_t k = 0; k < inner; k += kTileFeatures, right += kRightBytes) {
    unit.load<kRight>(right, 64);
    unit.load<kRight + 1>(right + kTileBytes, 64);
    unrolled<kTiles>([&](auto t) __attribute__((always_inline)) {
      constexpr int kTile = decltype(t)::value;
      unit.load<kLeft + kTile>(left.rows + (first + kTile * kTileRows) * left.stride + k,
                               left.stride * int64_t{sizeof(BFloat16)});
      unit.multiply<2 * kTile, kLeft + kTile, kRight>();
      unit.multiply<2 * kTile + 1, kLeft + kTile, kRight + 1>();
    });
  }
  unrolled<kLeft>([&](auto t) __attribute__((always_inline)) {
    unit.store<decltype(t)::value>(sums + decltype(t)::value * kTileSums);
  });
}

struct UnitOut {
  BFloat16* rows;
  int64_t stride;
  float scale;
  bool add;
};

// A row of sums by halves, in the order of columns, rounded to nearest and a subnormal to zero.
CMHA_INLINE __m512i rounded_row(FVec lower, FVec upper) {
  const __m512bh rounded = _mm512_cvtne2ps_pbh(bit_cast<__m512>(upper), bit_cast<__m512>(lower));
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  return _mm512_maskz_permutexvar_epi64(0xff, order, bit_cast<__m512i>(rounded));
}

CMHA_INLINE void put_row(const UnitOut& out, FVec lower, FVec upper, int64_t width, BFloat16* to) {
  const bool whole = width >= kTileFeatures;
  if (whole && out.scale == 1 && !out.add) {
    _mm512_storeu_si512(to, rounded_row(lower, upper));
    return;
  }
  lower *= out.scale;
  upper *= out.scale;
  if (out.add) {
    const __m512i there = load_row(to, width);
    lower += bit_cast<FVec>(_mm512_unpacklo_epi16(__m512i{}, there));
    upper += bit_cast<FVec>(_mm512_unpackhi_epi16(__m512i{}, there));
  }
  const __mmask32 columns = whole ? ~__mmask32{0} : (__mmask32{1} << width) - 1;
  _mm512_mask_storeu_epi16(to, columns, rounded_row(lower, upper));
}

// All of the left times all of the packed right.
CMHA_INLINE void multiply_packed(const MatrixUnit& unit, const UnitLeft& left, const char* right,
                                 int64_t inner, int64_t columns, const UnitOut& out) {
  const int64_t column_bytes = tiles_of_features(inner) * kRightBytes;
  for (int64_t i = 0; i < columns; i += kTileFeatures, right += column_bytes) {
    int64_t first = 0;
    const auto tiles_of = [&](auto tiles) __attribute__((always_inline)) {
      constexpr int kTiles = decltype(tiles)::value;
      for (; left.count - first > (kTiles - 1) * kTileRows; first += kTiles * kTileRows) {
        alignas(64) float sums[2 * kTiles * kTileSums];
        multiply_right<kTiles>(unit, left, first, right, inner, sums);
        for (int64_t r = 0; r < min_of(kTiles * kTileRows, left.count - first); ++r) {
          const float* lower = sums + r / kTileRows * 2 * kTileSums + r % kTileRows * kTileRows;
          put_row(out, load(lower), load(lower + kTileSums), columns - i,
                  out.rows + (first + r) * out.stride + i);
        }
      }
    };
    tiles_of(Int<2>{});
    tiles_of(Int<1>{});
  }
}

constexpr ProductBlock kUnitBlock{kTileFeatures, 256};

struct UnitProductScratch {
  BFloat16* left;  // (kUnitBlock.rows, stride), zeros behind what is summed
  char* right;
  int64_t stride;

  UnitProductScratch(const ProductParams& p, Arena& arena) {
    stride = tiles_of_features(p.inner) * kTileFeatures;
    left = arena.take<BFloat16>(kUnitBlock.rows * stride);
    right = arena.take<char>(right_bytes(p.inner, min_of(kUnitBlock.columns, p.columns)));
  }
};

int64_t unit_product_scratch(const ProductParams& p) {
  Arena arena(nullptr);
  UnitProductScratch(p, arena);
  return arena.used();
}

// 32 numbers each of up to 32 columns of the left, whose rows lie `stride` apart, to rows.
CMHA_INLINE void turn_left(const BFloat16* from, int64_t stride, int64_t count, int64_t width,
                           BFloat16* to, int64_t to_stride) {
  alignas(64) char pairs[kRightBytes];
  interleave(
      [&](int64_t k) __attribute__((always_inline)) {
        return k < count ? load_row(from + k * stride, width) : __m512i{};
      },
      pairs);
  constexpr int kTogether = 4;  // columns whose pairs 128 bits hold
  for (int half = 0; half < 2; ++half) {
    FVec by_column[kTileRows];
    columns_of(reinterpret_cast<const float*>(pairs + half * kTileBytes), by_column);
    for (int i = 0; i < kTileRows; ++i) {
      const int column = (i / kTogether * 2 + half) * kTogether + i % kTogether;
      memcpy(to + column * to_stride, by_column + i, sizeof(FVec));
    }
  }
}

// `rows` <= kUnitBlock.rows rows of the left.
CMHA_INLINE void copy_left(const ProductParams& p, const BFloat16* left, int64_t rows,
                           const UnitProductScratch& scratch) {
  if (p.left_row == 1) {
    for (int64_t k = 0; k < p.inner; k += kTileFeatures) {
      turn_left(left + k * p.left_inner, p.left_inner, p.inner - k, rows, scratch.left + k,
                scratch.stride);
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    BFloat16* to = scratch.left + r * scratch.stride;
    gather_row(left + r * p.left_row, p.left_inner, p.inner, 1.0, to);
    for (int64_t k = p.inner; k < scratch.stride; ++k) to[k] = {};
  }
}

// Tasks as those of `multiply`, but that those of the same columns follow each other.
void multiply_by_unit(const ProductParams& p, void* memory, int64_t begin, int64_t end) {
  Arena arena(memory);
  const UnitProductScratch scratch(p, arena);
  const MatrixUnit unit;
  const int64_t across = (p.columns + kUnitBlock.columns - 1) / kUnitBlock.columns;
  const int64_t down = (p.rows + kUnitBlock.rows - 1) / kUnitBlock.rows;
  int64_t there = -1;  // the columns whose tiles are in scratch
  for (int64_t task = begin; task < end; ++task) {
    const int64_t batch = task / (across * down);
    const int64_t row = task % down * kUnitBlock.rows;
    const int64_t column = task / down % across * kUnitBlock.columns;
    const int64_t rows = min_of(kUnitBlock.rows, p.rows - row);
    const int64_t columns = min_of(kUnitBlock.columns, p.columns - column);
    if (task / down != there) {
      const auto* right = static_cast<const BFloat16*>(p.right) + batch * p.right_batch + column;
      pack_right([&](int64_t k) __attribute__((always_inline)) { return right + k * p.right_row; },
                 p.inner, columns, scratch.right);
      there = task / down;
    }
    copy_left(p, static_cast<const BFloat16*>(p.left) + batch * p.left_batch + row * p.left_row,
              rows, scratch);
    auto* out = static_cast<BFloat16*>(p.out) + batch * p.out_batch + row * p.out_row + column;
    multiply_packed(unit, {scratch.left, scratch.stride, rows}, scratch.right, p.inner, columns,
                    {out, p.out_row, static_cast<float>(p.scale), p.add});
  }
}

ProductBlock unit_product_block(const ProductParams&) { return kUnitBlock; }

constexpr void set_products_of_unit(Kernels& table) {
  table.product_block = unit_product_block;
  table.product_scratch = unit_product_scratch;
  table.multiply = multiply_by_unit;
}

}  // namespace
}  // namespace continual_mha::cpu
