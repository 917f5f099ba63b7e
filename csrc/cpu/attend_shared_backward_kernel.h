// The gradients of attend_shared.
#pragma once

#include "attend_shared_kernel.h"
#include "kernels.h"
#include "scratch.h"
#include "tiles.h"

namespace continual_mha::cpu {
namespace {

template <class S>
struct SharedGradientScratch {
  using A = typename AccOf<S>::type;
  using X = typename FactorOf<S>::type;
  X* vectors;  // of heads: queries, then the outputs' gradients
  A* weights;  // (kHeadBlock, score_stride): scores, then weights
  A* scores;   // (kHeadBlock, score_stride): gradients of the weights, then of the scores
  X* factors;  // the same, as factors of the keys
  A* scales;   // (score_stride,)
  A* rows;     // (kHeadBlock, Ek), or a few slots' gradients
  int64_t score_stride;

  SharedGradientScratch(const SharedGradientParams& p, Arena& arena) {
    const int64_t heads = max_of(p.num_heads, kHeadBlock);
    score_stride = p.slots + Simd<A>::kLanes;
    vectors = arena.take<X>(heads * (p.key_dim + p.value_dim));
    weights = arena.take<A>(kHeadBlock * score_stride);
    scores = arena.take<A>(kHeadBlock * score_stride);
    factors = factors_of<X>(scores, kHeadBlock * score_stride, arena);
    scales = arena.take<A>(score_stride);
    rows = arena.take<A>(kHeadBlock * max_of(p.key_dim, p.value_dim));
  }
};

template <class S>
int64_t shared_gradient_scratch(const SharedGradientParams& p) {
  Arena arena(nullptr);
  SharedGradientScratch<S>(p, arena);
  return arena.used();
}

// Scores to weights, in place, whose array reaches to the next multiple of kLanes. The logarithm of
// their denominator is rounded, so that they and `sink` add up to 1 only with a factor, which is
// returned.
template <class A>
CMHA_INLINE A to_weights(A* scores, int64_t count, A lse, A sink) {
  using Vec = typename Simd<A>::Vec;
  constexpr int kLanes = Simd<A>::kLanes;
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = count; i < padded; ++i) scores[i] = kMinusInfinity<A>;
  Vec sum = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vec e = exp_nonpositive(load(scores + i) - lse);
    store<A>(scores + i, e);
    sum += e;
  }
  const A total = sum_lanes<A>(sum) + sink;
  const A factor = total == 0 ? 1 : 1 / total;
  for (int64_t i = 0; i < padded; i += kLanes) store<A>(scores + i, load(scores + i) * factor);
  return factor;
}

// What every score of a head gets through the normalisation: the gradient of the logarithm of the
// denominator less what reaches the weights. That is summed up as the scores' gradients have it,
// and not from the rounded output: where one weight is nearly all, the two are nearly the same.
template <class A>
CMHA_INLINE A through_normalisation(const SharedGradientParams& p, int64_t row, const A* weights,
                                    const A* grad_weights) {
  if (static_cast<const A*>(p.lse)[row] == kMinusInfinity<A>) return 0;  // it attends to nothing
  A reaches_weights;
  dot_tile<1, 1>(weights, 0, grad_weights, 0, p.slots, &reaches_weights);
  const A of_lse = p.grad_lse == nullptr ? 0 : static_cast<const A*>(p.grad_lse)[row];
  return of_lse - reaches_weights;
}

// Scores of one head to weights, and the gradients of the applied weights to those of the scores.
// Returns the applied weights, which with dropout are in `scales`.
template <class A>
CMHA_INLINE const A* finish_gradients(const SharedGradientParams& p, int64_t n, int64_t head,
                                      A* weights, A* scores, A* scales) {
  constexpr int kLanes = Simd<A>::kLanes;
  const int64_t row = n * p.num_heads + head;
  add_mask(p, n, head, weights);
  const A lse = static_cast<const A*>(p.lse)[row];
  const A known = lse == kMinusInfinity<A> ? 0 : lse;
  const A sink = p.sink == nullptr ? 0 : exp_of(static_cast<const A*>(p.sink)[row] - known);
  const A factor = to_weights(weights, p.slots, known, sink);
  if (p.grad_average != nullptr) {
    const A* average = static_cast<const A*>(p.grad_average) + n * p.slots;
    for (int64_t s = 0; s < p.slots; ++s) scores[s] += average[s] / p.num_heads;
  }
  if (p.kept != nullptr) {
    const A grad_kept = p.grad_kept == nullptr ? 0 : static_cast<const A*>(p.grad_kept)[row];
    keep_scales(p.seed, p.dropout_p, {n, head}, p.slots, scales);
    for (int64_t s = 0; s < p.slots; ++s) {
      scores[s] = (scores[s] + grad_kept) * scales[s];
      scales[s] *= weights[s];
    }
  }
  const A shared = through_normalisation(p, row, weights, scores);
  for (int64_t s = 0; s < p.slots; s += kLanes) {
    store<A>(scores + s, load(weights + s) * (load(scores + s) + shared));
  }
  if (p.grad_sink != nullptr) {
    static_cast<A*>(p.grad_sink)[row] = sink * factor * shared;
  }
  return p.kept == nullptr ? weights : scales;
}

// What the gradients of the tiles take of a head.
template <class X, class A>
CMHA_INLINE void put_pairs(const SharedGradientParams& p, int64_t n, int64_t head, const A* scores,
                           const A* applied) {
  if (p.pairs == nullptr) return;
  X* pairs = static_cast<X*>(p.pairs) + n * p.slots * 2 * p.num_heads + head;
  for (int64_t s = 0; s < p.slots; ++s, pairs += 2 * p.num_heads) {
    narrow(scores[s], pairs);
    narrow(applied[s], pairs + p.num_heads);
  }
}

// kC heads from `head` on.
template <int kC, class S>
CMHA_INLINE void query_gradient_of_heads(const SharedGradientParams& p,
                                         const SharedGradientScratch<S>& scratch, int64_t n,
                                         int64_t head) {
  using A = typename AccOf<S>::type;
  using X = typename FactorOf<S>::type;
  const int64_t row = n * p.num_heads + head;
  const SharedTile<S> key(p.key, n, p.slots, p.key_dim);
  const SharedTile<S> value(p.value, n, p.slots, p.value_dim);
  X* query = scratch.vectors;
  X* grad_out = query + kC * p.key_dim;
  copy_vectors<S>(p.query, n, head, kC, p.key_dim, query);
  copy_vectors<S>(p.grad_out, n, head, kC, p.value_dim, grad_out);
  key.template dot<kC>(query, scratch.weights, scratch.score_stride);
  value.template dot<kC>(grad_out, scratch.scores, scratch.score_stride);
  for (int c = 0; c < kC; ++c) {
    A* weights = scratch.weights + c * scratch.score_stride;
    A* scores = scratch.scores + c * scratch.score_stride;
    const A* applied = finish_gradients(p, n, head + c, weights, scores, scratch.scales);
    put_pairs<X>(p, n, head + c, scores, applied);
    to_factors(scores, p.slots, scratch.factors + c * scratch.score_stride);
  }
  key.template sum<kC>(scratch.factors, scratch.score_stride, scratch.rows);
  copy_scaled(scratch.rows, kC * p.key_dim, A{1}, static_cast<S*>(p.grad_query) + row * p.key_dim);
}

template <class S>
void shared_query_gradient(const SharedGradientParams& p, void* memory, int64_t begin,
                           int64_t end) {
  Arena arena(memory);
  const SharedGradientScratch<S> scratch(p, arena);
  for_head_blocks(p, begin, end, [&](int64_t n, int64_t head, auto count) {
    query_gradient_of_heads<decltype(count)::value>(p, scratch, n, head);
  });
}

// to[s] = sum over `count` vectors of pairs[s] times them, for slots [begin, end).
template <class X, class S, class A>
CMHA_INLINE void tile_gradient(const X* pairs, int64_t pair_stride, const X* vectors, int64_t count,
                               int64_t features, int64_t begin, int64_t end, A* rows, S* to) {
  const auto block = [&](int64_t s, auto slots) __attribute__((always_inline)) {
    constexpr int kQ = decltype(slots)::value;
    A* out = rows;
    if constexpr (sizeof(S) == sizeof(A)) out = to + s * features;
    weighted_rows<kQ>(pairs + s * pair_stride, pair_stride, vectors, features, 0, count, features,
                      out, features);
    if constexpr (sizeof(S) < sizeof(A)) copy_scaled(rows, kQ * features, A{1}, to + s * features);
  };
  for (; begin + kHeadBlock <= end; begin += kHeadBlock) block(begin, Int<kHeadBlock>{});
  for (; begin < end; ++begin) block(begin, Int<1>{});
}

template <class S>
void shared_tile_gradient(const SharedGradientParams& p, void* memory, int64_t begin, int64_t end) {
  using X = typename FactorOf<S>::type;
  Arena arena(memory);
  const SharedGradientScratch<S> scratch(p, arena);
  const int64_t blocks = (p.slots + kSlotBlock - 1) / kSlotBlock;
  const int64_t heads = p.num_heads;
  int64_t there = -1;  // the stream whose vectors are in scratch
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / blocks;
    const int64_t first = task % blocks * kSlotBlock;
    const int64_t last = min_of(first + kSlotBlock, p.slots);
    const X* pairs = static_cast<const X*>(p.pairs) + n * p.slots * 2 * heads;
    X* query = scratch.vectors;
    X* grad_out = scratch.vectors + heads * p.key_dim;
    if (n != there) {
      copy_vectors<S>(p.query, n, 0, heads, p.key_dim, query);
      copy_vectors<S>(p.grad_out, n, 0, heads, p.value_dim, grad_out);
      there = n;
    }
    S* grad_key = static_cast<S*>(p.grad_key) + n * p.slots * p.key_dim;
    const int64_t count = p.grad_value == nullptr ? 2 * heads : heads;
    tile_gradient(pairs, 2 * heads, query, count, p.key_dim, first, last, scratch.rows, grad_key);
    if (p.grad_value == nullptr) continue;
    S* grad_value = static_cast<S*>(p.grad_value) + n * p.slots * p.value_dim;
    tile_gradient(pairs + heads, 2 * heads, grad_out, heads, p.value_dim, first, last, scratch.rows,
                  grad_value);
  }
}

template <class S>
constexpr void set_clips(Kernels& table) {
  table.attend_shared_scratch = attend_shared_scratch<S>;
  table.attend_shared = attend_shared<S, S>;
  table.attend_shared_acc = attend_shared<S, typename AccOf<S>::type>;
  table.shared_gradient_scratch = shared_gradient_scratch<S>;
  table.shared_query_gradient = shared_query_gradient<S>;
  table.shared_tile_gradient = shared_tile_gradient<S>;
}

}  // namespace
}  // namespace continual_mha::cpu
