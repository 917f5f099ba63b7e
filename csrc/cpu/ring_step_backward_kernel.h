// Gradients of one token of every stream against its ring, without extra slots.
#pragma once

#include "kernels.h"
#include "scratch.h"

namespace continual_mha::cpu {
namespace {

template <class S>
struct RingGradientScratch {
  using A = typename AccOf<S>::type;
  A* q;     // scaled
  A* grad;  // of the head's output
  A* sum;
  A* weights;  // of the slots
  A* scores;   // their gradients

  RingGradientScratch(const RingGradientParams& p, Arena& arena) {
    const int64_t slots = p.length + Simd<A>::kLanes;
    q = arena.take<A>(p.head_dim);
    grad = arena.take<A>(p.head_dim);
    sum = arena.take<A>(p.head_dim);
    weights = arena.take<A>(slots);
    scores = arena.take<A>(slots);
  }
};

template <class S>
int64_t ring_gradient_scratch(const RingGradientParams& p) {
  Arena arena(nullptr);
  RingGradientScratch<S>(p, arena);
  return arena.used();
}

// Where the gradients of a ring come from and go to, of one head. `given` may be null: that of the
// ring with the token, from later steps; and `before`: that of the ring without it.
template <class S>
struct RingGradient {
  const S* given;
  S* before;
  S* token;
};

template <class S>
CMHA_INLINE RingGradient<S> head_gradient(const void* given, void* before, int64_t row, S* token) {
  return {given == nullptr ? nullptr : static_cast<const S*>(given) + row,
          before == nullptr ? nullptr : static_cast<S*>(before) + row, token};
}

// Of each slot it is weights[slot] times the vector.
template <class S, class A>
CMHA_INLINE void put_gradient(const RingGradient<S>& to, const A* weights, const A* vector,
                              int64_t slot, int64_t slots, const RingGradientParams& p) {
  const auto put = [&](int64_t l, S* row) __attribute__((always_inline)) {
    const A weight = l < slots ? weights[l] : 0;
    const S* given = to.given == nullptr ? nullptr : to.given + l * p.head_dim;
    for (int64_t d = 0; d < p.head_dim; ++d) {
      const A sum = weight * vector[d] + (given == nullptr ? A{0} : widen(given[d]));
      narrow(sum, row + d);
    }
  };
  put(slot, to.token);
  if (to.before == nullptr) return;
  for (int64_t l = 0; l < p.length; ++l) {
    S* row = to.before + l * p.head_dim;
    if (l == slot) {
      memset(row, 0, static_cast<size_t>(p.head_dim) * sizeof(S));
    } else {
      put(l, row);
    }
  }
}

// Tasks are (stream, head).
template <class S>
void ring_gradient(const RingGradientParams& p, void* memory, int64_t begin, int64_t end) {
  using A = typename AccOf<S>::type;
  Arena arena(memory);
  const RingGradientScratch<S> scratch(p, arena);
  const A scale = 1 / static_cast<A>(__builtin_sqrt(static_cast<double>(p.head_dim)));
  const int64_t e = p.num_heads * p.head_dim;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / p.num_heads;
    const int64_t column = task % p.num_heads * p.head_dim;
    const int64_t ring = task * p.length * p.head_dim;
    const S* keys = static_cast<const S*>(p.k_ring) + ring;
    const S* values = static_cast<const S*>(p.v_ring) + ring;
    S* tokens = static_cast<S*>(p.grad_tokens) + n * 3 * e + column;
    const int64_t slot = p.position[n] % p.length;
    const int64_t slots = min_of(p.position[n] + 1, p.length);
    copy_scaled(static_cast<const S*>(p.q) + n * e + column, p.head_dim, scale, scratch.q);
    copy_row(static_cast<const S*>(p.grad_heads) + n * e + column, p.head_dim, scratch.grad);

    A* weights = scratch.weights;
    A* scores = scratch.scores;
    dot_rows<1>(keys, p.head_dim, 0, slots, scratch.q, 0, p.head_dim,
                [&](int64_t l, int, A sum) __attribute__((always_inline)) { weights[l] = sum; });
    const A total = softmax_numerators(weights, slots, kMinusInfinity<A>).sum;
    for (int64_t l = 0; l < slots; ++l) weights[l] /= total;
    weighted_rows<1>(weights, 0, values, p.head_dim, 0, slots, p.head_dim, scratch.sum, 0);
    copy_row(scratch.sum, p.head_dim, static_cast<S*>(p.heads) + n * e + column);

    dot_rows<1>(values, p.head_dim, 0, slots, scratch.grad, 0, p.head_dim,
                [&](int64_t l, int, A sum) __attribute__((always_inline)) { scores[l] = sum; });
    A mean = 0;
    for (int64_t l = 0; l < slots; ++l) mean += weights[l] * scores[l];
    for (int64_t l = 0; l < slots; ++l) scores[l] = weights[l] * (scores[l] - mean);
    weighted_rows<1>(scores, 0, keys, p.head_dim, 0, slots, p.head_dim, scratch.sum, 0);
    copy_scaled(scratch.sum, p.head_dim, scale, tokens);
    put_gradient(head_gradient(p.grad_k_ring, p.grad_k_before, ring, tokens + e), scores, scratch.q,
                 slot, slots, p);
    put_gradient(head_gradient(p.grad_v_ring, p.grad_v_before, ring, tokens + 2 * e), weights,
                 scratch.grad, slot, slots, p);
  }
}

}  // namespace
}  // namespace continual_mha::cpu
