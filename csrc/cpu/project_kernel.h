// Projections of tokens with the weights as they lie in the module.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "tiles.h"

namespace continual_mha::cpu {
namespace {

// `count` numbers, `stride` apart, times a factor.
template <class S, class X>
CMHA_INLINE void gather_row(const S* from, int64_t stride, int64_t count, double scale, X* to) {
  const auto factor = static_cast<typename AccOf<S>::type>(scale);
  if (stride == 1) {
    copy_scaled(from, count, factor, to);
    return;
  }
  for (int64_t i = 0; i < count; ++i) narrow(widen(from[i * stride]) * factor, to + i);
}

// X: what projections multiply, DType or acc.
template <class S, class X>
void gather(const GatherParams& p, int64_t begin, int64_t end) {
  end = min_of(end * kTokenBlock, p.tokens);
  for (int64_t n = begin * kTokenBlock; n < end; ++n) {
    gather_row(static_cast<const S*>(p.src) + n * p.stream_stride, p.feature_stride, p.features,
               p.scale, static_cast<X*>(p.dst) + n * p.features);
  }
}

template <class X>
int64_t gathered_bytes(int64_t tokens, int64_t features) {
  return tokens * features * int64_t{sizeof(X)};
}

// kCount rows of the weight, from `row` on and `stretch` apart, against kC streams. With kAsk those
// that come next are asked for.
template <class S, class X, class O, int kCount, int kC, bool kAsk>
CMHA_INLINE void project_tile(const ProjectParams& p, int64_t row, int64_t stretch,
                              int64_t stream) {
  using A = typename AccOf<S>::type;
  const S* weight = static_cast<const S*>(p.weight) + row * p.in_features;
  const X* x = static_cast<const X*>(p.x) + stream * p.x_stride;
  const S* bias = static_cast<const S*>(p.bias);
  O* out = static_cast<O*>(p.out) + stream * p.out_stride;
  A sums[kCount * kC];
  dot_rows_tile<kCount, kC, kAsk>(weight, stretch * p.in_features, x, p.x_stride, p.in_features,
                                  sums);
  A biases[kCount] = {};
  for (int r = 0; bias != nullptr && r < kCount; ++r) biases[r] = widen(bias[row + r * stretch]);
  if constexpr (std::is_same_v<O, A>) {
    for (int r = 0; r < kCount; ++r) {
      for (int c = 0; c < kC; ++c) {
        out[c * p.out_stride + row + r * stretch] = sums[r * kC + c] + biases[r];
      }
    }
  } else {  // rounded by whole vectors
    for (int r = 0; r < kCount; ++r) {
      for (int c = 0; c < kC; ++c) sums[r * kC + c] += biases[r];
    }
    O narrowed[kCount * kC];
    copy_scaled(sums, kCount * kC, A{1}, narrowed);
    for (int r = 0; r < kCount; ++r) {
      for (int c = 0; c < kC; ++c) {
        out[c * p.out_stride + row + r * stretch] = narrowed[r * kC + c];
      }
    }
  }
}

// f(stream, Int<c>, whether they are the last) for groups of c <= kMost streams, as even as can be,
// that make up [begin, end).
template <int kMost, class F>
CMHA_INLINE void in_even_groups(int64_t begin, int64_t end, const F& f) {
  static_assert(kMost == 4 || kMost == 5);
  int64_t groups = (end - begin + kMost - 1) / kMost;
  for (; begin < end; --groups) {
    const int64_t count = (end - begin + groups - 1) / groups;
    if (kMost == 5 && count == 5) f(begin, Int<kMost>{}, groups == 1);
    if (count == 4) f(begin, Int<4>{}, groups == 1);
    if (count == 3) f(begin, Int<3>{}, groups == 1);
    if (count == 2) f(begin, Int<2>{}, groups == 1);
    if (count == 1) f(begin, Int<1>{}, groups == 1);
    begin += count;
  }
}

// The streams [first, last) against rows [begin, end) of the weight, in tiles of kRows by kColumns
// at most: a tile's rows stay in the first-level cache while streams pass. The first to pass a tile
// wait for it; the last, if those are others, ask for the next.
template <int kRows, int kColumns, class S, class X, class O>
CMHA_INLINE void project_streams(const ProjectParams& p, int64_t begin, int64_t end, int64_t first,
                                 int64_t last) {
  const auto tile = [&](int64_t row, int64_t stretch, auto tag) __attribute__((always_inline)) {
    constexpr int kCount = decltype(tag)::value;
    const auto pass = [&](int64_t n, auto streams, bool are_last) __attribute__((always_inline)) {
      constexpr int kC = decltype(streams)::value;
      if (kC > 2 && are_last && n > first) {
        project_tile<S, X, O, kCount, kC, (kC > 2)>(p, row, stretch, n);
      } else {
        project_tile<S, X, O, kCount, kC, false>(p, row, stretch, n);
      }
    };
    in_even_groups<kColumns>(first, last, pass);
  };
  tiles_of_rows<kRows>(begin, end, tile);
}

// All streams against rows [begin, end), the other way round: a tile's streams stay in the
// first-level cache while rows pass, a block of them that stays in the second level's where they
// pass again.
template <class S, class X, class O>
CMHA_INLINE void project_blocks(const ProjectParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kBlockBytes = 128 << 10;
  constexpr int kSums = 12;  // of a tile, with 16 registers
  const int64_t row_bytes = max_of(p.in_features, int64_t{1}) * int64_t{sizeof(S)};
  const int64_t most = p.streams <= 4 ? end - begin : kBlockBytes / row_bytes;
  const int64_t block = (most / kSums + 1) * kSums;
  for (; begin < end; begin += block) {
    const int64_t stop = min_of(begin + block, end);
    const auto pass = [&](int64_t n, auto streams, bool) __attribute__((always_inline)) {
      constexpr int kC = decltype(streams)::value;
      const auto tile = [&](int64_t row, int64_t stretch, auto tag) __attribute__((always_inline)) {
        project_tile<S, X, O, decltype(tag)::value, kC, false>(p, row, stretch, n);
      };
      tiles_of_rows<(kC == 1 ? 6 : kSums / kC)>(begin, stop, tile);
    };
    in_even_groups<4>(0, p.streams, pass);
  }
}

// As many streams pass a tile of rows as stay in the second-level cache: so weights are read once
// per call where those are all, and else far less often than the streams would be. Six rows
// multiply faster than four, but few streams wait for weights, for six rows longer, and long rows
// are too many for the cache.
template <class S, class X, class O>
CMHA_INLINE void project_passes(const ProjectParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kFewStreams = 20;
  constexpr int64_t kLongRow = 4 << 10;
  constexpr int64_t kStreamBytes = 256 << 10;
  constexpr int64_t kLeastStreams = 64;  // to read all weights for
  const int64_t row_bytes = max_of(p.in_features, int64_t{1}) * int64_t{sizeof(X)};
  const int64_t most = max_of(kStreamBytes / row_bytes, kLeastStreams);
  const int64_t passes = (p.streams + most - 1) / most;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = p.streams * pass / passes;
    const int64_t last = p.streams * (pass + 1) / passes;
    if (p.streams <= kFewStreams || row_bytes > kLongRow) {
      project_streams<4, 5, S, X, O>(p, begin, end, first, last);
    } else {
      project_streams<6, 4, S, X, O>(p, begin, end, first, last);
    }
  }
}

// Tasks are blocks of kRowBlock rows.
template <class S, class X, class O>
void project(const ProjectParams& p, int64_t begin, int64_t end) {
  begin *= kRowBlock;
  end = min_of(end * kRowBlock, p.rows);
  if constexpr (kTileVectors == 16) {
    project_passes<S, X, O>(p, begin, end);
  } else {  // tiles of half as many registers leave no time to fetch streams for each
    project_blocks<S, X, O>(p, begin, end);
  }
}

template <class S, class X>
constexpr Projection projection() {
  using A = typename AccOf<S>::type;
  return {0,
          false,
          std::is_same_v<X, A>,
          gathered_bytes<X>,
          gather<S, X>,
          gather<A, X>,
          project<S, X, S>,
          project<S, X, A>};
}

}  // namespace
}  // namespace continual_mha::cpu
