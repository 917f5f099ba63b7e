// The queries of all heads of a stream against one tile of keys and values.
#pragma once

#include "kernels.h"
#include "scratch.h"
#include "tiles.h"

namespace continual_mha::cpu {
namespace {

template <class S>
struct AttendSharedScratch {
  using A = typename AccOf<S>::type;
  A* q;       // (kHeadBlock, Ek)
  A* out;     // (kHeadBlock, Ev)
  A* scores;  // (kHeadBlock, score_stride)
  int64_t score_stride;

  AttendSharedScratch(const AttendSharedParams& p, Arena& arena) {
    score_stride = p.slots + Simd<A>::kLanes;
    q = arena.take<A>(kHeadBlock * p.key_dim);
    out = arena.take<A>(kHeadBlock * p.value_dim);
    scores = arena.take<A>(kHeadBlock * score_stride);
  }
};

template <class S>
int64_t attend_shared_scratch(const AttendSharedParams& p) {
  Arena arena(nullptr);
  AttendSharedScratch<S>(p, arena);
  return arena.used();
}

// Adds the mask and turns scores into numerators of the softmax; returns the factor that makes
// weights of them, and stores the logarithm of the denominator.
template <class A>
CMHA_INLINE A finish_scores(const AttendSharedParams& p, int64_t n, int64_t head, A* scores) {
  if (p.mask != nullptr) {
    const A* mask =
        static_cast<const A*>(p.mask) + n * p.mask_stream_stride + head * p.mask_head_stride;
    for (int64_t s = 0; s < p.slots; ++s) scores[s] += mask[s * p.mask_slot_stride];
  }
  const int64_t row = n * p.num_heads + head;
  const A sink = p.sink == nullptr ? kMinusInfinity<A> : static_cast<const A*>(p.sink)[row];
  const auto [max, sum] = softmax_numerators(scores, p.slots, sink);
  const bool nothing = max == kMinusInfinity<A>;
  const A total =
      nothing ? 0 : sum + static_cast<A>(__builtin_exp(static_cast<double>(sink - max)));
  static_cast<A*>(p.lse)[row] = max + static_cast<A>(__builtin_log(static_cast<double>(total)));
  return 1 / total;
}

// kC heads from `head` on: two passes over the tile, which the first one leaves in a cache.
template <int kC, class S>
CMHA_INLINE void attend_heads(const AttendSharedParams& p, const AttendSharedScratch<S>& scratch,
                              int64_t n, int64_t head) {
  using A = typename AccOf<S>::type;
  const int64_t row = n * p.num_heads + head;
  const S* query = static_cast<const S*>(p.query) + row * p.key_dim;
  const S* key = static_cast<const S*>(p.key) + n * p.key_stream_stride;
  const S* value = static_cast<const S*>(p.value) + n * p.value_stream_stride;
  S* out = static_cast<S*>(p.out) + row * p.value_dim;
  for (int64_t i = 0; i < kC * p.key_dim; ++i) scratch.q[i] = widen(query[i]);
  dot_rows<kC>(key, p.key_slot_stride, 0, p.slots, scratch.q, p.key_dim, p.key_dim,
               [&](int64_t s, int c, A sum) __attribute__((always_inline)) {
                 scratch.scores[c * scratch.score_stride + s] = sum;
               });
  A scale[kC];
  for (int c = 0; c < kC; ++c) {
    scale[c] = finish_scores(p, n, head + c, scratch.scores + c * scratch.score_stride);
  }
  for (int64_t i = 0; i < kC * p.value_dim; ++i) scratch.out[i] = 0;
  weighted_rows<kC>(scratch.scores, scratch.score_stride, value, p.value_slot_stride, 0, p.slots,
                    p.value_dim, scratch.out, p.value_dim);
  for (int c = 0; c < kC; ++c) {
    for (int64_t d = 0; d < p.value_dim; ++d) {
      narrow(scratch.out[c * p.value_dim + d] * scale[c], out + c * p.value_dim + d);
    }
  }
}

// Tasks are (stream, block of kHeadBlock heads).
template <class S>
void attend_shared(const AttendSharedParams& p, void* memory, int64_t begin, int64_t end) {
  Arena arena(memory);
  const AttendSharedScratch<S> scratch(p, arena);
  const int64_t blocks = (p.num_heads + kHeadBlock - 1) / kHeadBlock;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / blocks;
    const int64_t head = task % blocks * kHeadBlock;
    const int64_t count = min_of(kHeadBlock, p.num_heads - head);
    if (count == 4) attend_heads<4>(p, scratch, n, head);
    if (count == 3) attend_heads<3>(p, scratch, n, head);
    if (count == 2) attend_heads<2>(p, scratch, n, head);
    if (count == 1) attend_heads<1>(p, scratch, n, head);
  }
}

}  // namespace
}  // namespace continual_mha::cpu
