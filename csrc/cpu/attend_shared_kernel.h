// The queries of all heads of a stream against one tile of keys and values.
#pragma once

#include "dropout.h"
#include "kernels.h"
#include "scratch.h"
#include "tiles.h"

namespace continual_mha::cpu {
namespace {

// Q: what queries are stored as; those stored as acc are not rounded.
template <class S, class Q>
struct AttendSharedScratch {
  using A = typename AccOf<S>::type;
  using X = typename FactorOf<S>::type;
  using Vector = std::conditional_t<std::is_same_v<Q, S>, X, A>;
  Vector* q;   // (kHeadBlock, Ek)
  A* out;      // (kHeadBlock, Ev)
  A* scores;   // (kHeadBlock, score_stride)
  X* factors;  // the same, as factors of the values
  A* scales;   // (score_stride,)
  int64_t score_stride;

  AttendSharedScratch(const AttendSharedParams& p, Arena& arena) {
    score_stride = p.slots + Simd<A>::kLanes;
    q = arena.take<Vector>(kHeadBlock * p.key_dim);
    out = arena.take<A>(kHeadBlock * p.value_dim);
    scores = arena.take<A>(kHeadBlock * score_stride);
    factors = factors_of<X>(scores, kHeadBlock * score_stride, arena);
    scales = arena.take<A>(score_stride);
  }
};

template <class S>
int64_t attend_shared_scratch(const AttendSharedParams& p) {
  Arena arena(nullptr);
  AttendSharedScratch<S, typename AccOf<S>::type>(p, arena);  // the larger one
  return arena.used();
}

// What multiplies numerators to make weights of them, and the weights of the slots in `extra`.
template <class A>
struct Normaliser {
  A inputs;
  A extra[2];
};

template <class A>
CMHA_INLINE void add_mask(const AttendSharedParams& p, int64_t n, int64_t head, A* scores) {
  if (p.mask == nullptr) return;
  const A* mask =
      static_cast<const A*>(p.mask) + n * p.mask_stream_stride + head * p.mask_head_stride;
  for (int64_t s = 0; s < p.slots; ++s) scores[s] += mask[s * p.mask_slot_stride];
}

// Adds the mask and turns scores into numerators of the softmax; stores the logarithm of the
// denominator, and in `extra` the weights of its first slot and of all inputs.
template <class A>
CMHA_INLINE Normaliser<A> finish_scores(const AttendSharedParams& p, int64_t n, int64_t head,
                                        A* scores) {
  add_mask(p, n, head, scores);
  const int64_t row = n * p.num_heads + head;
  A* extra = p.extra == nullptr ? nullptr : static_cast<A*>(p.extra) + 2 * row;
  A others[2] = {kMinusInfinity<A>, kMinusInfinity<A>};
  if (p.sink != nullptr) others[0] = static_cast<const A*>(p.sink)[row];
  if (extra != nullptr) memcpy(others, extra, sizeof(others));
  const A sink = max_of(others[0], others[1]);
  bool nothing = sink == kMinusInfinity<A>;  // to attend to; a score of NaN is something
  for (int64_t s = 0; nothing && s < p.slots; ++s) nothing = scores[s] == kMinusInfinity<A>;
  const auto [max, sum] = softmax_numerators(scores, p.slots, sink);
  if (p.blank && nothing) {
    for (int64_t s = 0; s < p.slots; ++s) scores[s] = 0;
    if (extra != nullptr) extra[0] = extra[1] = 0;
    if (p.lse != nullptr) static_cast<A*>(p.lse)[row] = kMinusInfinity<A>;
    return {0, {0, 0}};
  }
  for (A& other : others) other = nothing ? 0 : exp_of(other - max);
  const A total = (nothing ? 0 : sum) + others[0] + others[1];
  if (p.lse != nullptr) {
    static_cast<A*>(p.lse)[row] = max + static_cast<A>(__builtin_log(static_cast<double>(total)));
  }
  const Normaliser<A> result{1 / total, {others[0] / total, others[1] / total}};
  if (extra != nullptr) {
    extra[0] = result.extra[0];
    extra[1] = sum / total;
  }
  return result;
}

// The weights of one head: those of the inputs, then of the slots in `extra` that there are.
template <class A>
CMHA_INLINE void store_weights(const AttendSharedParams& p, int64_t row, const A* scores,
                               const Normaliser<A>& normaliser) {
  A* weights = static_cast<A*>(p.weights) + row * (p.slots + p.extra_weights);
  for (int64_t s = 0; s < p.slots; ++s) weights[s] = scores[s] * normaliser.inputs;
  // A slot that is not there weighs nothing, and comes first if only the other one is.
  weights += p.slots;
  if (p.extra_weights == 2) memcpy(weights, normaliser.extra, 2 * sizeof(A));
  if (p.extra_weights == 1) *weights = normaliser.extra[0] + normaliser.extra[1];
}

// Applies dropout to numerators and returns what is left of their sum.
template <class A>
CMHA_INLINE A drop(const AttendSharedParams& p, int64_t n, int64_t head, A* scores, A* scales) {
  keep_scales(p.seed, p.dropout_p, {n, head}, p.slots, scales);
  A sum = 0;
  for (int64_t s = 0; s < p.slots; ++s) sum += scores[s] *= scales[s];
  return sum;
}

// Scores of a head to factors of the values, and its other results. Returns what the sum of the
// values is to be multiplied with.
template <class A, class X>
CMHA_INLINE A finish_head(const AttendSharedParams& p, int64_t n, int64_t head, A* scores,
                          A* scales, X* factors) {
  const int64_t row = n * p.num_heads + head;
  const Normaliser<A> normaliser = finish_scores(p, n, head, scores);
  if (p.kept != nullptr) {
    static_cast<A*>(p.kept)[row] = drop(p, n, head, scores, scales) * normaliser.inputs;
  }
  if (p.weights != nullptr) store_weights(p, row, scores, normaliser);
  to_factors(scores, p.slots, factors);
  return normaliser.inputs;
}

// Those of `count` heads of a stream from `head` on.
template <class Q, class X>
CMHA_INLINE void copy_vectors(const HeadVectors& vectors, int64_t n, int64_t head, int64_t count,
                              int64_t features, X* to) {
  const Q* from = static_cast<const Q*>(vectors.data) + n * vectors.stream_stride;
  for (int64_t c = 0; c < count; ++c) {
    copy_row(from + (head + c) * vectors.head_stride, features, to + c * features);
  }
}

// The tile of stream n. Where its slots are next to each other, features take the place of rows.
template <class S>
struct SharedTile {
  const S* data;
  int64_t slot_stride;
  int64_t feature_stride;
  int64_t slots;
  int64_t features;

  CMHA_INLINE SharedTile(const SharedTiles& tiles, int64_t n, int64_t slots, int64_t features)
      : data(static_cast<const S*>(tiles.data) + n * tiles.stream_stride),
        slot_stride(tiles.slot_stride),
        feature_stride(tiles.feature_stride),
        slots(slots),
        features(features) {}

  // products[c * stride + slot] = the slot's row times vector c of kC.
  template <int kC, class X, class A>
  CMHA_INLINE void dot(const X* vectors, A* products, int64_t stride) const {
    if (feature_stride != 1) {
      weighted_rows<kC>(vectors, features, data, feature_stride, 0, features, slots, products,
                        stride);
      return;
    }
    dot_rows<kC>(data, slot_stride, 0, slots, vectors, features, features,
                 [&](int64_t slot, int c, A sum)
                     __attribute__((always_inline)) { products[c * stride + slot] = sum; });
  }

  // sums[c * features + feature], over slots, of weights[c * stride + slot] times the slot's row.
  template <int kC, class X, class A>
  CMHA_INLINE void sum(const X* weights, int64_t stride, A* sums) const {
    if (feature_stride == 1) {
      weighted_rows<kC>(weights, stride, data, slot_stride, 0, slots, features, sums, features);
      return;
    }
    dot_rows<kC>(data, feature_stride, 0, features, weights, stride, slots,
                 [&](int64_t feature, int c, A sum)
                     __attribute__((always_inline)) { sums[c * features + feature] = sum; });
  }
};

// kC heads from `head` on: two passes over the tile, which the first one leaves in a cache.
template <int kC, class S, class Q>
CMHA_INLINE void attend_heads(const AttendSharedParams& p, const AttendSharedScratch<S, Q>& scratch,
                              int64_t n, int64_t head) {
  using A = typename AccOf<S>::type;
  const int64_t row = n * p.num_heads + head;
  Q* out = static_cast<Q*>(p.out) + row * p.value_dim;
  copy_vectors<Q>(p.query, n, head, kC, p.key_dim, scratch.q);
  const SharedTile<S> key(p.key, n, p.slots, p.key_dim);
  key.template dot<kC>(scratch.q, scratch.scores, scratch.score_stride);
  A scale[kC];
  for (int c = 0; c < kC; ++c) {
    scale[c] = finish_head(p, n, head + c, scratch.scores + c * scratch.score_stride,
                           scratch.scales, scratch.factors + c * scratch.score_stride);
  }
  const SharedTile<S> value(p.value, n, p.slots, p.value_dim);
  value.template sum<kC>(scratch.factors, scratch.score_stride, scratch.out);
  for (int c = 0; c < kC; ++c) {
    copy_scaled(scratch.out + c * p.value_dim, p.value_dim, scale[c], out + c * p.value_dim);
  }
}

// Calls run(stream, first head, Int<heads>) for tasks that are (stream, block of kHeadBlock heads).
template <class Run>
CMHA_INLINE void for_head_blocks(const AttendSharedParams& p, int64_t begin, int64_t end,
                                 const Run& run) {
  const int64_t blocks = (p.num_heads + kHeadBlock - 1) / kHeadBlock;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / blocks;
    const int64_t head = task % blocks * kHeadBlock;
    const int64_t count = min_of(kHeadBlock, p.num_heads - head);
    if (count == 4) run(n, head, Int<4>{});
    if (count == 3) run(n, head, Int<3>{});
    if (count == 2) run(n, head, Int<2>{});
    if (count == 1) run(n, head, Int<1>{});
  }
}

// Q is what queries and results are stored as.
template <class S, class Q>
void attend_shared(const AttendSharedParams& p, void* memory, int64_t begin, int64_t end) {
  Arena arena(memory);
  const AttendSharedScratch<S, Q> scratch(p, arena);
  for_head_blocks(p, begin, end, [&](int64_t n, int64_t head, auto count) {
    attend_heads<decltype(count)::value, S, Q>(p, scratch, n, head);
  });
}

// Tasks are streams: the weights (N, H, S + extra_weights), averaged over the heads into `average`.
template <class S>
void average_weights(const AttendSharedParams& p, void* average, int64_t begin, int64_t end) {
  using A = typename AccOf<S>::type;
  const int64_t slots = p.slots + p.extra_weights;
  for (int64_t n = begin; n < end; ++n) {
    const A* weights = static_cast<const A*>(p.weights) + n * p.num_heads * slots;
    A* to = static_cast<A*>(average) + n * slots;
    for (int64_t s = 0; s < slots; ++s) to[s] = weights[s];
    for (int64_t head = 1; head < p.num_heads; ++head) {
      for (int64_t s = 0; s < slots; ++s) to[s] += weights[head * slots + s];
    }
    for (int64_t s = 0; s < slots; ++s) to[s] /= static_cast<A>(p.num_heads);
  }
}

}  // namespace
}  // namespace continual_mha::cpu
