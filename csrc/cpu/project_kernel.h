// Projections of tokens with the weights as they lie in the module.
#pragma once

#include "kernels.h"
#include "tiles.h"

namespace continual_mha::cpu {
namespace {

template <class S>
void gather(const void* src, int64_t stream_stride, int64_t feature_stride, int64_t features,
            void* dst, int64_t begin, int64_t end) {
  using A = typename AccOf<S>::type;
  for (int64_t n = begin; n < end; ++n) {
    const S* from = static_cast<const S*>(src) + n * stream_stride;
    A* to = static_cast<A*>(dst) + n * features;
    for (int64_t i = 0; i < features; ++i) to[i] = widen(from[i * feature_stride]);
  }
}

// Rows [begin, end) of the weight against kC streams.
template <class S, int kC>
CMHA_INLINE void project_streams(const ProjectParams& p, int64_t stream, int64_t begin,
                                 int64_t end) {
  using A = typename AccOf<S>::type;
  const A* x = static_cast<const A*>(p.x) + stream * p.x_stride;
  const S* bias = static_cast<const S*>(p.bias);
  S* out = static_cast<S*>(p.out) + stream * p.out_stride;
  const auto emit = [&](int64_t row, int c, A sum) __attribute__((always_inline)) {
    const A y = bias == nullptr ? sum : sum + widen(bias[row]);
    narrow(y, out + c * p.out_stride + row);
  };
  dot_rows<kC, kC == 1>(static_cast<const S*>(p.weight), p.in_features, begin, end, x, p.x_stride,
                        p.in_features, emit);
}

// Tasks are blocks of kTileVectors rows: few enough to stay in the first-level cache while all
// streams pass by, so that weights are read from memory once per call.
template <class S>
void project(const ProjectParams& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block * kTileVectors;
    const int64_t row_end = min_of(row + kTileVectors, p.rows);
    if (p.streams == 1) {
      // One stretch for all blocks, so that the prefetch looks across their borders.
      project_streams<S, 1>(p, 0, row, min_of(end * kTileVectors, p.rows));
      return;
    }
    int64_t n = 0;
    for (; n + 4 <= p.streams; n += 4) project_streams<S, 4>(p, n, row, row_end);
    if (p.streams - n == 3) project_streams<S, 3>(p, n, row, row_end);
    if (p.streams - n == 2) project_streams<S, 2>(p, n, row, row_end);
    if (p.streams - n == 1) project_streams<S, 1>(p, n, row, row_end);
  }
}

}  // namespace
}  // namespace continual_mha::cpu
