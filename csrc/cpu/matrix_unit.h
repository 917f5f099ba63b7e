// Projections of bfloat16 by AMX: the weight's rows as they lie, 16 by 32 features a tile, times
// tiles of 32 features of 16 tokens, whose pairs of features lie side by side.
#pragma once

#include "project_kernel.h"

namespace continual_mha::cpu {
namespace {

constexpr int64_t kTileRows = 16;      // of the weight, and tokens
constexpr int64_t kTileFeatures = 32;  // in pairs
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileSums = 256;

static_assert(kTokenBlock == kTileRows && kRowBlock == kTileRows);

// The tiles of this thread, all of 16 rows of 64 bytes. What it holds is lost between two of them.
class MatrixUnit {
 public:
  MatrixUnit() {
    struct alignas(64) {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    static_assert(sizeof(shapes) == 64);
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
  }
  ~MatrixUnit() { __asm__ volatile("tilerelease"); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;

  template <int kTile>
  CMHA_INLINE void clear() const {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }

  template <int kTile>
  CMHA_INLINE void load(const void* from, int64_t row_bytes) const {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                     :
                     : "r"(from), "r"(row_bytes), "i"(kTile)
                     : "memory");
  }

  // The same for what will not be read again soon.
  template <int kTile>
  CMHA_INLINE void load_once(const void* from, int64_t row_bytes) const {
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2"
                     :
                     : "r"(from), "r"(row_bytes), "i"(kTile)
                     : "memory");
  }

  template <int kTile>
  CMHA_INLINE void store(float* to, int64_t row_bytes = 64) const {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                     :
                     : "r"(to), "r"(row_bytes), "i"(kTile)
                     : "memory");
  }

  // Tile kSum += tile kLeft times tile kRight: each of the two products of a pair is added to a sum
  // of its own over the tile, and subnormal numbers count as zero.
  template <int kSum, int kLeft, int kRight>
  CMHA_INLINE void multiply() const {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0"
                     :
                     : "i"(kSum), "i"(kLeft), "i"(kRight));
  }
};

// f(Int<0>{}) to f(Int<kCount - 1>{}).
template <int kCount, int kFirst = 0, class F>
CMHA_INLINE void unrolled(const F& f) {
  if constexpr (kFirst < kCount) {
    f(Int<kFirst>{});
    unrolled<kCount, kFirst + 1>(f);
  }
}

// Where `transpose` takes lane kLane of its results from.
template <int kLane>
constexpr int place_of = reversed(kLane, kTileRows);

CMHA_INLINE int64_t tiles_of_features(int64_t features) {
  return (features + kTileFeatures - 1) / kTileFeatures;
}

int64_t packed_bytes(int64_t tokens, int64_t features) {
  return (tokens + kTileRows - 1) / kTileRows * tiles_of_features(features) * kTileBytes;
}

// Row i of a tile has the features 2 i and 2 i + 1 of every token, zeros where there is none.
template <class S>
void pack(const GatherParams& p, int64_t begin, int64_t end) {
  const S* src = static_cast<const S*>(p.src);
  char* to = static_cast<char*>(p.dst) + packed_bytes(begin * kTileRows, p.features);
  const bool as_they_are = std::is_same_v<S, BFloat16> && p.feature_stride == 1 && p.scale == 1;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kTileRows;
    const int64_t count = min_of(kTileRows, p.tokens - first);
    for (int64_t i = 0; i < p.features; i += kTileFeatures, to += kTileBytes) {
      const int64_t width = min_of(kTileFeatures, p.features - i);
      FVec rows[kTileRows] = {};
      for (int64_t n = 0; n < count; ++n) {
        FVec& row = rows[reversed(static_cast<int>(n), kTileRows)];
        const S* from = src + (first + n) * p.stream_stride + i * p.feature_stride;
        if (as_they_are && width == kTileFeatures) {
          memcpy(&row, from, sizeof(row));
          continue;
        }
        BFloat16 factors[kTileFeatures] = {};
        gather_row(from, p.feature_stride, width, p.scale, factors);
        memcpy(&row, factors, sizeof(row));
      }
      transpose<float>(rows);
      memcpy(to, rows, sizeof(rows));
    }
  }
}

// kRows tiles of rows against kBlocks blocks of tokens. To sums[tile][block], each (16 rows, 16
// tokens). Rows lie `row` elements apart and tiles `tile`; `rows` is how many there are of all.
template <int kRows, int kBlocks>
CMHA_TILE void multiply_tiles(const MatrixUnit& unit, const BFloat16* weight, int64_t rows,
                              int64_t row, int64_t tile, int64_t features, const char* packed,
                              float* sums) {
  constexpr int kRight = kRows * kBlocks;  // the first tile of tokens, behind those of sums
  constexpr int kLeft = kRight + kBlocks;
  constexpr int kLefts = 8 - kLeft;
  static_assert(kLefts > 0);
  const int64_t block_bytes = tiles_of_features(features) * kTileBytes;
  const auto multiply = [&](int64_t first, bool whole) __attribute__((always_inline)) {
    const char* right = packed + first / kTileFeatures * kTileBytes;
    unrolled<kBlocks>([&](auto b) __attribute__((always_inline)) {
      unit.load_once<kRight + decltype(b)::value>(right + decltype(b)::value * block_bytes, 64);
    });
    unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
      constexpr int kRow = decltype(r)::value;
      constexpr int kTile = kLeft + kRow % kLefts;
      const BFloat16* from = weight + kRow * tile + first;
      const int64_t left = rows - kRow * kTileRows;
      if (whole && (kRow + 1 < kRows || left >= kTileRows)) {
        unit.load<kTile>(from, row * int64_t{sizeof(BFloat16)});
      } else {
        alignas(64) BFloat16 padded[kTileRows * kTileFeatures] = {};
        const int64_t width = min_of(kTileFeatures, features - first);
        for (int64_t i = 0; i < min_of(kTileRows, left); ++i) {
          copy_row(from + i * row, width, padded + i * kTileFeatures);
        }
        unit.load<kTile>(padded, 64);
      }
      unrolled<kBlocks>([&](auto b) __attribute__((always_inline)) {
        constexpr int kBlock = decltype(b)::value;
        unit.multiply<kRow * kBlocks + kBlock, kTile, kRight + kBlock>();
      });
    });
  };
  unrolled<kRight>([&](auto t)
                       __attribute__((always_inline)) { unit.clear<decltype(t)::value>(); });
  int64_t i = 0;
  for (; i + kTileFeatures <= features; i += kTileFeatures) multiply(i, true);
  if (i < features) multiply(i, false);
  unrolled<kRight>([&](auto t) __attribute__((always_inline)) {
    unit.store<decltype(t)::value>(sums + decltype(t)::value * kTileSums);
  });
}

// The columns of sums (16 rows, 16 columns).
CMHA_INLINE void columns_of(const float* sums, FVec* columns) {
  unrolled<kTileRows>([&](auto i) __attribute__((always_inline)) {
    columns[place_of<decltype(i)::value>] = load(sums + decltype(i)::value * kTileRows);
  });
  transpose<float>(columns);
}

// The sums of a tile of rows, (16 rows, 16 tokens), and with kTiles of 2 those of the next, which
// lie `next` behind, with a bias for each row: to `count` tokens of the output.
template <int kTiles>
CMHA_INLINE void put_whole(const float* sums, int64_t next, const float* biases, int64_t count,
                           float* out, int64_t stride) {
  for (int t = 0; t < kTiles; ++t) {
    const FVec bias = load(biases + t * kTileRows);
    FVec by_token[kTileRows];
    columns_of(sums + t * next, by_token);
    float* to = out + t * kTileRows;
    for (int64_t n = 0; n < count; ++n) store<float>(to + n * stride, by_token[n] + bias);
  }
}

// Rounded first, so that two rows are one vector to transpose. No NaN is rounded up to infinity or
// beyond: it comes from bfloat16, and its lower half is zeros.
template <int kTiles>
CMHA_INLINE void put_whole(const float* sums, int64_t next, const float* biases, int64_t count,
                           BFloat16* out, int64_t stride) {
  typedef uint32_t Bits __attribute__((vector_size(64)));
  const auto rounded = [&](const float* row, float bias) __attribute__((always_inline)) {
    const Bits bits = bit_cast<Bits>(load(row) + bias);
    return bits + 0x7fffu + (bits >> 16 & 1u);
  };
  FVec by_token[kTileRows];
  unrolled<kTileRows>([&](auto tag) __attribute__((always_inline)) {
    constexpr int kPair = decltype(tag)::value;
    constexpr int kTile = kPair / 8;
    FVec& pair = by_token[place_of<kPair>];
    if constexpr (kTile < kTiles) {
      const float* row = sums + kTile * next + kPair % 8 * 2 * kTileRows;
      pair = bit_cast<FVec>(rounded(row, biases[2 * kPair]) >> 16 |
                            (rounded(row + kTileRows, biases[2 * kPair + 1]) & 0xffff0000u));
    } else {
      pair = FVec{};
    }
  });
  transpose<float>(by_token);
  for (int64_t n = 0; n < count; ++n) memcpy(out + n * stride, by_token + n, 32 * kTiles);
}

// Rows [row, row + rows) of tokens [token, token + count) from their sums, of kTiles tiles.
template <int kTiles, class S, class O>
CMHA_INLINE void put_sums(const ProjectParams& p, const float* sums, int64_t next, int64_t row,
                          int64_t rows, int64_t token, int64_t count) {
  constexpr int64_t kRows = kTiles * kTileRows;
  float biases[kRows] = {};
  if (p.bias != nullptr) {
    copy_row(static_cast<const S*>(p.bias) + row, min_of(rows, kRows), biases);
  }
  O* out = static_cast<O*>(p.out) + token * p.out_stride + row;
  if (rows >= kRows) {
    put_whole<kTiles>(sums, next, biases, count, out, p.out_stride);
    return;
  }
  O whole[kRows * kTileRows];
  put_whole<kTiles>(sums, next, biases, count, whole, kRows);
  for (int64_t n = 0; n < count; ++n) copy_row(whole + n * kRows, rows, out + n * p.out_stride);
}

// All rows of a range, 16 at a time, for a few tokens, which wait for them: rows far apart are long
// streams through memory that the hardware's prefetcher follows. Returns where the others begin.
template <class O>
CMHA_INLINE int64_t project_few(const ProjectParams& p, const MatrixUnit& unit, int64_t begin,
                                int64_t end) {
  const int64_t stretch = (end - begin) / kTileRows;
  const auto tiles = [&](int64_t row, auto count) __attribute__((always_inline)) {
    constexpr int kRows = decltype(count)::value;
    alignas(64) float sums[kRows * kTileSums];
    multiply_tiles<kRows, 1>(unit, static_cast<const BFloat16*>(p.weight) + row * p.in_features,
                             kRows * kTileRows, stretch * p.in_features, p.in_features,
                             p.in_features, static_cast<const char*>(p.x), sums);
    for (int64_t i = 0; i < kRows * kTileRows; ++i) {
      const int64_t at = row + i / kTileRows + i % kTileRows * stretch;
      const float bias = p.bias == nullptr ? 0 : widen(static_cast<const BFloat16*>(p.bias)[at]);
      O* out = static_cast<O*>(p.out) + at;
      for (int64_t n = 0; n < p.streams; ++n) {
        narrow(sums[i * kTileRows + n] + bias, out + n * p.out_stride);
      }
    }
  };
  int64_t row = begin;
  for (; row + 2 <= begin + stretch; row += 2) tiles(row, Int<2>{});
  if (row < begin + stretch) tiles(row, Int<1>{});
  return begin + kTileRows * stretch;
}

// Tasks are blocks of kRowBlock rows. As many tokens as stay in the second-level cache pass a tile
// of rows, which stays in the first level's.
template <class O>
void project_packed(const ProjectParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kBytes = 512 << 10;
  constexpr int64_t kFewTokens = 4;
  const MatrixUnit unit;
  begin *= kRowBlock;
  end = min_of(end * kRowBlock, p.rows);
  if (p.streams <= kFewTokens) begin = project_few<O>(p, unit, begin, end);
  const int64_t block_bytes = tiles_of_features(p.in_features) * kTileBytes;
  const int64_t blocks = (p.streams + kTileRows - 1) / kTileRows;
  const int64_t most = max_of(kBytes / max_of(block_bytes, int64_t{1}), int64_t{2});
  const int64_t passes = (blocks + most - 1) / most;
  const auto tiles = [&](int64_t row, int64_t block, auto row_tiles,
                         auto token_blocks) __attribute__((always_inline)) {
    constexpr int kRows = decltype(row_tiles)::value;
    constexpr int kBlocks = decltype(token_blocks)::value;
    constexpr int kTiles = kRows == 1 ? 1 : 2;  // that go to the output together
    constexpr int64_t kNext = kBlocks * kTileSums;
    alignas(64) float sums[kRows * kNext];
    multiply_tiles<kRows, kBlocks>(
        unit, static_cast<const BFloat16*>(p.weight) + row * p.in_features, end - row,
        p.in_features, kTileRows * p.in_features, p.in_features,
        static_cast<const char*>(p.x) + block * block_bytes, sums);
    for (int r = 0; r < kRows; r += kTiles) {
      const int64_t first = row + r * kTileRows;
      for (int b = 0; b < kBlocks; ++b) {
        const int64_t token = (block + b) * kTileRows;
        put_sums<kTiles, BFloat16, O>(p, sums + r * kNext + b * kTileSums, kNext, first,
                                      end - first, token, min_of(kTileRows, p.streams - token));
      }
    }
  };
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = blocks * pass / passes;
    const int64_t last = blocks * (pass + 1) / passes;
    int64_t row = begin;
    const auto rows_of = [&](auto row_tiles) __attribute__((always_inline)) {
      constexpr int kRows = decltype(row_tiles)::value;
      for (; end - row > (kRows - 1) * kTileRows; row += kRows * kTileRows) {
        int64_t block = first;
        if constexpr (kRows <= 2) {
          for (; block + 2 <= last; block += 2) tiles(row, block, row_tiles, Int<2>{});
        }
        if (block < last) tiles(row, block, row_tiles, Int<1>{});
      }
    };
    if (last - first == 1) rows_of(Int<4>{});
    rows_of(Int<2>{});
    rows_of(Int<1>{});
  }
}

constexpr Projection kByMatrixUnit{2,
                                   true,
                                   false,
                                   packed_bytes,
                                   pack<BFloat16>,
                                   pack<float>,
                                   project_packed<BFloat16>,
                                   project_packed<float>};

}  // namespace
}  // namespace continual_mha::cpu
