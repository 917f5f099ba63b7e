// Projections of float32 by AMX. A number of 24 bits is the sum of three bfloat16 of 8 bits each,
// and a product of two that of six products of those, but for what rounding in float32 loses too.
#pragma once

#include "matrix_unit.h"

namespace continual_mha::cpu {
namespace {

constexpr int kFloatParts = 3;
using TileParts = char[kFloatParts][kTileBytes];

// Which part of a weight meets which of a token, so that few tiles are loaded twice.
struct PartPair {
  int weight;
  int token;
};
constexpr PartPair kPartPairs[] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 0}, {0, 2}};
constexpr int kNumPairs = sizeof(kPartPairs) / sizeof(PartPair);

constexpr int64_t kSpanTiles = 2;  // of features, whose parts of a few rows the first cache holds
constexpr int64_t kSpan = kSpanTiles * kTileFeatures;
constexpr int64_t kPassBlocks = 16;  // of tokens that pass such rows, at most

// 32 numbers as parts of 32 each: the leading 8 bits, what follows them, and what follows those. A
// number of the first 16 and one of the others lie side by side, as they do in the other factor.
CMHA_INLINE void split(FVec low, FVec high, FVec (&parts)[kFloatParts]) {
  typedef uint32_t Words __attribute__((vector_size(64)));
  for (FVec& part : parts) {
    const Words leading_low = bit_cast<Words>(low) & 0xffff0000u;
    const Words leading_high = bit_cast<Words>(high) & 0xffff0000u;
    part = bit_cast<FVec>(leading_low >> 16 | leading_high);
    low -= bit_cast<FVec>(leading_low);
    high -= bit_cast<FVec>(leading_high);
  }
}

int64_t packed_parts_bytes(int64_t tokens, int64_t features) {
  return kFloatParts * packed_bytes(tokens, features);
}

// The tiles of all parts of 32 features, one behind the other, each as `pack` lays it out.
void pack_parts(const GatherParams& p, int64_t begin, int64_t end) {
  const float* src = static_cast<const float*>(p.src);
  char* to = static_cast<char*>(p.dst) + packed_parts_bytes(begin * kTileRows, p.features);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kTileRows;
    const int64_t count = min_of(kTileRows, p.tokens - first);
    for (int64_t i = 0; i < p.features; i += kTileFeatures) {
      FVec rows[kFloatParts][kTileRows] = {};
      for (int64_t n = 0; n < count; ++n) {
        alignas(64) float token[kTileFeatures] = {};
        gather_row(src + (first + n) * p.stream_stride + i * p.feature_stride, p.feature_stride,
                   min_of(kTileFeatures, p.features - i), p.scale, token);
        FVec parts[kFloatParts];
        split(load(token), load(token + kTileRows), parts);
        for (int part = 0; part < kFloatParts; ++part) {
          rows[part][reversed(static_cast<int>(n), kTileRows)] = parts[part];
        }
      }
      for (int part = 0; part < kFloatParts; ++part, to += kTileBytes) {
        transpose<float>(rows[part]);
        memcpy(to, rows[part], kTileBytes);
      }
    }
  }
}

// A span of features of kTiles tiles of rows, to be split a piece at a time.
template <int kTiles>
struct RowSplitter {
  const float* weight;  // of the first row, at the span
  int64_t stride;       // from one row to the next
  int64_t rows;         // that there are, from the first on
  int64_t features;     // that there are, from the span's first on
  TileParts* to;        // [kTiles][kSpanTiles]
  int64_t row = 0;
  int64_t tile = 0;

  CMHA_INLINE bool done() const { return row == kTiles * kTileRows; }

  CMHA_INLINE void piece() {
    FVec parts[kFloatParts] = {};
    const int64_t first = tile * kTileFeatures;
    if (row < rows && first < features) {
      const float* from = weight + row * stride + first;
      alignas(64) float padded[kTileFeatures] = {};
      if (features - first < kTileFeatures) {
        copy_row(from, features - first, padded);
        from = padded;
      }
      split(load(from), load(from + kTileRows), parts);
    }
    TileParts& tiles = to[row / kTileRows * kSpanTiles + tile];
    for (int part = 0; part < kFloatParts; ++part) {
      memcpy(tiles[part] + row % kTileRows * 64, &parts[part], 64);
    }
    tile = (tile + 1) % kSpanTiles;
    row += tile == 0;
  }
};

// kTiles tiles of rows against kBlocks blocks of tokens over `count` tiles of features: into
// sums[tile][block], or added to them unless these are the first. The unit works on its own; so,
// where there is a `next`, that is split meanwhile.
template <int kTiles, int kBlocks, bool kSplits>
CMHA_TILE void multiply_parts(const MatrixUnit& unit, const TileParts* left, int64_t count,
                              const char* packed, int64_t block_bytes, bool first, float* sums,
                              RowSplitter<kTiles>& splitter) {
  constexpr int kRight = kTiles * kBlocks;  // the first tile of tokens, behind those of sums
  constexpr int kLeft = kRight + kBlocks;
  static_assert(kLeft + kTiles <= 8);
  constexpr int kPieces = (kTiles * kTileRows + kNumPairs - 1) / kNumPairs;
  unrolled<kRight>([&](auto t) __attribute__((always_inline)) {
    constexpr int kTile = decltype(t)::value;
    if (first) {
      unit.clear<kTile>();
    } else {
      unit.load<kTile>(sums + kTile * kTileSums, 64);
    }
  });
  RowSplitter<kTiles> next = splitter;
  for (int64_t i = 0; i < count; ++i, packed += sizeof(TileParts)) {
    unrolled<kNumPairs>([&](auto p) __attribute__((always_inline)) {
      constexpr int kPair = decltype(p)::value;
      constexpr PartPair kNow = kPartPairs[kPair];
      constexpr PartPair kBefore = kPartPairs[kPair == 0 ? kNumPairs - 1 : kPair - 1];
      unrolled<kBlocks>([&](auto b) __attribute__((always_inline)) {
        constexpr int kBlock = decltype(b)::value;
        if constexpr (kPair == 0 || kNow.token != kBefore.token) {
          unit.load<kRight + kBlock>(packed + kBlock * block_bytes + kNow.token * kTileBytes, 64);
        }
      });
      unrolled<kTiles>([&](auto r) __attribute__((always_inline)) {
        constexpr int kRow = decltype(r)::value;
        if constexpr (kPair == 0 || kNow.weight != kBefore.weight) {
          unit.load<kLeft + kRow>(left[kRow * kSpanTiles + i][kNow.weight], 64);
        }
        unrolled<kBlocks>([&](auto b) __attribute__((always_inline)) {
          constexpr int kBlock = decltype(b)::value;
          unit.multiply<kRow * kBlocks + kBlock, kLeft + kRow, kRight + kBlock>();
        });
      });
      if constexpr (kSplits) {
        for (int piece = 0; piece < kPieces && !next.done(); ++piece) next.piece();
      }
    });
  }
  unrolled<kRight>([&](auto t) __attribute__((always_inline)) {
    unit.store<decltype(t)::value>(sums + decltype(t)::value * kTileSums);
  });
  if (kSplits) splitter = next;
}

// Blocks [first, last) of tokens against rows [row, end), as many as are whole groups of kTiles
// tiles, or with one tile a group all. Returns where the others begin.
template <int kTiles>
CMHA_TILE int64_t project_groups(const ProjectParams& p, const MatrixUnit& unit, int64_t first,
                                 int64_t last, int64_t row, int64_t end) {
  constexpr int64_t kRows = kTiles * kTileRows;
  const int64_t features = p.in_features;
  const int64_t block_bytes = packed_parts_bytes(kTileRows, features);
  const char* packed = static_cast<const char*>(p.x) + first * block_bytes;
  alignas(64) TileParts left[2][kTiles * kSpanTiles];
  alignas(64) float sums[kPassBlocks * kTiles * kTileSums];
  const auto splitter = [&](int64_t at, int64_t span, int64_t to) {
    return RowSplitter<kTiles>{static_cast<const float*>(p.weight) + at * features + span, features,
                               end - at, features - span, left[to]};
  };
  int64_t now = 0;
  RowSplitter<kTiles> next = splitter(row, 0, now);
  for (; end - row > (kTiles - 1) * kTileRows; row += kRows) {
    for (int64_t span = 0; span < features; span += kSpan, now ^= 1) {
      while (!next.done()) next.piece();
      const bool last_span = span + kSpan >= features;
      next = last_span ? splitter(row + kRows, 0, now ^ 1) : splitter(row, span + kSpan, now ^ 1);
      const int64_t count = tiles_of_features(min_of(kSpan, features - span));
      for (int64_t block = first; block < last; block += 2) {
        const char* right =
            packed + (block - first) * block_bytes + packed_parts_bytes(kTileRows, span);
        float* to = sums + (block - first) * kTiles * kTileSums;
        const int64_t together = min_of(last - block, int64_t{2});
        if (together == 1) {
          multiply_parts<kTiles, 1, false>(unit, left[now], count, right, block_bytes, span == 0,
                                           to, next);
        } else if (block == first) {
          multiply_parts<kTiles, 2, true>(unit, left[now], count, right, block_bytes, span == 0, to,
                                          next);
        } else {
          multiply_parts<kTiles, 2, false>(unit, left[now], count, right, block_bytes, span == 0,
                                           to, next);
        }
        for (int64_t b = 0; last_span && b < together; ++b) {
          const int64_t token = (block + b) * kTileRows;
          put_sums<kTiles, float, float>(p, to + b * kTileSums, together * kTileSums, row,
                                         end - row, token, min_of(kTileRows, p.streams - token));
        }
      }
    }
  }
  return row;
}

// Tasks are blocks of kRowBlock rows. As many tokens as stay in the second-level cache pass the
// parts of a few rows.
void project_parts(const ProjectParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kBytes = 512 << 10;
  const MatrixUnit unit;
  begin *= kRowBlock;
  end = min_of(end * kRowBlock, p.rows);
  const int64_t block_bytes = packed_parts_bytes(kTileRows, p.in_features);
  const int64_t blocks = (p.streams + kTileRows - 1) / kTileRows;
  const int64_t fitting = max_of(kBytes / max_of(block_bytes, int64_t{1}), int64_t{2});
  const int64_t most = min_of(fitting, kPassBlocks) & ~int64_t{1};
  for (int64_t first = 0; first < blocks; first += most) {
    const int64_t last = min_of(first + most, blocks);
    const int64_t row = project_groups<2>(p, unit, first, last, begin, end);
    project_groups<1>(p, unit, first, last, row, end);
  }
}

constexpr Projection kByParts{40,         true,       true,          packed_parts_bytes,
                              pack_parts, pack_parts, project_parts, project_parts};

}  // namespace
}  // namespace continual_mha::cpu
