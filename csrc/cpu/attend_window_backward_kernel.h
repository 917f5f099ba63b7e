// Gradients of several tokens of every stream, each against the window that ends with it.
#pragma once

#include "ring_steps_kernel.h"

namespace continual_mha::cpu {
namespace {

// Queries that pass the rows of their windows together.
constexpr int64_t kGradientBlock = 32;

// How many rows the windows of a task hold at most.
CMHA_INLINE int64_t most_rows(const RingStepsParams& p) {
  return p.length - 1 + p.tokens - p.first;
}

template <class S>
struct WindowGradientScratch {
  using A = typename AccOf<S>::type;
  A* keys;      // in tiles, and room for some rows
  A* values;    // the same
  A* key_rows;  // (rows, D), oldest first
  A* grad_keys;
  A* grad_values;
  A* q;  // (kGradientBlock, D), scaled
  A* grad_out;
  A* grad_q;
  A* weights;  // (kGradientBlock, stride): scores, then the weights that were applied
  A* scores;   // the same: gradients of the weights, then of the scores
  A* keeps;    // (stride,)
  int64_t stride;

  WindowGradientScratch(const WindowGradientParams& p, Arena& arena) {
    const int64_t rows = most_rows(p);
    const int64_t in_tiles = (rows + kKeyTile - 1) / kKeyTile * kKeyTile + kKeysTogether<A>;
    stride = padded_scores<A>(rows);
    keys = arena.take<A>(in_tiles * p.head_dim);
    values = arena.take<A>(in_tiles * p.head_dim);
    key_rows = arena.take<A>(rows * p.head_dim);
    grad_keys = arena.take<A>(rows * p.head_dim);
    grad_values = arena.take<A>(rows * p.head_dim);
    q = arena.take<A>(kGradientBlock * p.head_dim);
    grad_out = arena.take<A>(kGradientBlock * p.head_dim);
    grad_q = arena.take<A>(kGradientBlock * p.head_dim);
    weights = arena.take<A>(kGradientBlock * stride);
    scores = arena.take<A>(kGradientBlock * stride);
    keeps = arena.take<A>(stride);
  }
};

template <class S>
int64_t window_gradient_scratch(const WindowGradientParams& p) {
  Arena arena(nullptr);
  WindowGradientScratch<S>(p, arena);
  return arena.used();
}

// One head of one stream, with the gradients of its outputs and those of what it is made of.
template <class S>
struct HeadOfGradient {
  using A = typename AccOf<S>::type;
  const WindowGradientParams& p;
  HeadOfClip<S> head;

  const S* grad_out(int64_t token) const {
    return static_cast<const S*>(p.grad_out) + head.output(token) * p.head_dim;
  }

  S* of_clip(void* grads, int64_t token) const {
    const int64_t row = head.stream * p.tokens + token;
    return static_cast<S*>(grads) + row * p.grad_stride + head.head * p.head_dim;
  }

  // Of the window that ends with `token`: from scores, times `scale`, and gradients of the applied
  // weights to these weights and the gradients of the scores. All arrays reach to the next multiple
  // of kLanes, where zeros are written; those of the results may be the first two.
  template <class O>
  CMHA_INLINE void finish(int64_t token, RowRange window, A scale, A* scores, A* grads, A* keeps,
                          O* applied, O* factors) const {
    using Vec = typename Simd<A>::Vec;
    constexpr int kLanes = Simd<A>::kLanes;
    const int64_t slots = window.end - window.begin;
    const int64_t padded = (slots + kLanes - 1) / kLanes * kLanes;
    const int64_t at = head.output(token);
    const A lse = static_cast<const A*>(p.lse)[at];
    const bool drops = head.drops(token, window, keeps);
    for (int64_t l = slots; l < padded; ++l) {
      scores[l] = kMinusInfinity<A>;
      grads[l] = keeps[l] = 0;
    }
    Vec sum = {};
    Vec reaches_weights = {};
    for (int64_t l = 0; l < padded; l += kLanes) {
      const Vec e = exp_nonpositive(load(scores + l) * scale - lse);
      Vec grad = load(grads + l);
      if (drops) {
        grad *= load(keeps + l);
        store<A>(grads + l, grad);
      }
      store<A>(scores + l, e);
      sum += e;
      reaches_weights += e * grad;
    }
    // the logarithm of the denominator is rounded: this makes the weights add up to 1
    const A sink = p.sink == nullptr ? 0 : exp_of(head.sink(token) - lse);
    const A factor = 1 / (sum_lanes<A>(sum) + sink);
    const A of_lse = p.grad_lse == nullptr ? 0 : static_cast<const A*>(p.grad_lse)[at];
    const A shared = of_lse - factor * sum_lanes<A>(reaches_weights);
    for (int64_t l = 0; l < padded; l += kLanes) {
      const Vec weight = load(scores + l) * factor;
      narrow(weight * (load(grads + l) + shared), factors + l);
      narrow(drops ? weight * load(keeps + l) : weight, applied + l);
    }
    if (p.grad_sink != nullptr) static_cast<A*>(p.grad_sink)[at] = sink * factor * shared;
  }

  // The gradients of keys or values: of tokens from `base` on read(row, sum), of those before
  // zeros, and of those that stay in the ring what it has. `sum` is a row of scratch.
  template <class Read>
  CMHA_INLINE void put(const Read& read, int64_t base, void* of_tokens, void* of_ring,
                       const void* of_ring_after, A* sum) const {
    const int64_t ring = (head.stream * p.num_heads + head.head) * p.length * p.head_dim;
    const auto slot_of = [&](int64_t token) {
      return ring + (head.position() + p.length + token) % p.length * p.head_dim;
    };
    const auto put_token = [&](int64_t token, S* to) {
      if (token < base) {
        for (int64_t d = 0; d < p.head_dim; ++d) sum[d] = 0;
      } else {
        read(token - base, sum);
      }
      if (of_ring_after != nullptr && token >= p.tokens - p.length) {
        const S* after = static_cast<const S*>(of_ring_after) + slot_of(token);
        for (int64_t d = 0; d < p.head_dim; ++d) sum[d] += widen(after[d]);
      }
      copy_row(sum, p.head_dim, to);
    };
    for (int64_t t = 0; t < p.tokens; ++t) put_token(t, of_clip(of_tokens, t));
    if (of_ring == nullptr) return;
    for (int64_t t = -p.length; t < 0; ++t) {  // one that never came has a slot as well
      put_token(t, static_cast<S*>(of_ring) + slot_of(t));
    }
  }

  // Queries that nobody asks have none.
  CMHA_INLINE void clear_unasked() const {
    for (int64_t t = 0; t < p.first; ++t) {
      memset(of_clip(p.grad_q, t), 0, static_cast<size_t>(p.head_dim) * sizeof(S));
    }
  }
};

// `count` queries from `token` on, among rows that lie from the token `base` on.
template <class S>
CMHA_INLINE void window_gradient_of_block(const HeadOfGradient<S>& to,
                                          const WindowGradientScratch<S>& scratch, int64_t token,
                                          int64_t count, int64_t base) {
  using A = typename AccOf<S>::type;
  const HeadOfClip<S>& head = to.head;
  const int64_t head_dim = to.p.head_dim;
  const int64_t stride = scratch.stride;
  const A scale = 1 / static_cast<A>(__builtin_sqrt(static_cast<double>(head_dim)));
  const auto window = [&](int64_t q)
                          __attribute__((always_inline)) { return head.window(token + q, base); };
  const auto seen_by_any = [&](int64_t q, int64_t some) __attribute__((always_inline)) {
    return RowRange{window(q).begin, window(q + some - 1).end};
  };
  const RowRange all = seen_by_any(0, count);
  for (int64_t q = 0; q < count; ++q) {
    copy_scaled(head.query(token + q), head_dim, scale, scratch.q + q * head_dim);
    copy_row(to.grad_out(token + q), head_dim, scratch.grad_out + q * head_dim);
  }
  by_stretches<kKeyTile>(
      all.end, count, seen_by_any,
      [&](int64_t q, auto tag, int64_t begin, int64_t end) __attribute__((always_inline)) {
        constexpr int kQ = decltype(tag)::value;
        score_keys<kQ>(scratch.q + q * head_dim, scratch.keys, begin, end, head_dim,
                       scratch.weights + q * stride, stride);
        score_keys<kQ>(scratch.grad_out + q * head_dim, scratch.values, begin, end, head_dim,
                       scratch.scores + q * stride, stride);
      });
  for (int64_t q = 0; q < count; ++q) {
    A* weights = scratch.weights + q * stride;
    A* scores = scratch.scores + q * stride;
    const auto [first, last] = window(q);
    A* own = weights + first;
    A* grads = scores + first;
    to.finish(token + q, {first, last}, A{1}, own, grads, scratch.keeps, own, grads);
    for (int64_t l = all.begin; l < first; ++l) weights[l] = scores[l] = 0;
    for (int64_t l = last; l < all.end; ++l) weights[l] = scores[l] = 0;
  }
  by_fours(0, count, [&](int64_t q, auto tag) __attribute__((always_inline)) {
    constexpr int kQ = decltype(tag)::value;
    const auto [begin, end] = seen_by_any(q, kQ);
    weighted_rows<kQ>(scratch.scores + q * stride, stride, scratch.key_rows, head_dim, begin, end,
                      head_dim, scratch.grad_q + q * head_dim, head_dim);
  });
  for (int64_t q = 0; q < count; ++q) {
    copy_scaled(scratch.grad_q + q * head_dim, head_dim, scale, to.of_clip(to.p.grad_q, token + q));
  }
  by_fours(all.begin, all.end, [&](int64_t row, auto tag) __attribute__((always_inline)) {
    constexpr int kRows = decltype(tag)::value;
    // the queries that see one of these rows
    const int64_t begin = max_of<int64_t>(0, base + row - token);
    const int64_t end = min_of(count, base + row + kRows - 1 + to.p.length - token);
    weighted_rows<kRows, true>(scratch.scores + row, 1, scratch.q, head_dim, begin, end, head_dim,
                               scratch.grad_keys + row * head_dim, head_dim, stride);
    weighted_rows<kRows, true>(scratch.weights + row, 1, scratch.grad_out, head_dim, begin, end,
                               head_dim, scratch.grad_values + row * head_dim, head_dim, stride);
  });
}

// Tasks are (stream, head).
template <class S>
void window_gradient(const WindowGradientParams& p, void* memory, int64_t begin, int64_t end) {
  using A = typename AccOf<S>::type;
  Arena arena(memory);
  const WindowGradientScratch<S> scratch(p, arena);
  const Kept<S> keys{p.keys, static_cast<const S*>(p.k_ring), nullptr};
  const Kept<S> values{p.values, static_cast<const S*>(p.v_ring), nullptr};
  for (int64_t task = begin; task < end; ++task) {
    const HeadOfClip<S> head{p, task / p.num_heads, task % p.num_heads};
    const HeadOfGradient<S> to{p, head};
    const int64_t base = head.window_begin(p.first);
    const int64_t rows = p.tokens - base;
    lay_out_keys(head, keys, base, rows, scratch.keys);
    lay_out_keys(head, values, base, rows, scratch.values);
    for (int64_t l = 0; l < rows; ++l) {
      head.read(keys, base + l, scratch.key_rows + l * p.head_dim);
    }
    for (int64_t i = 0; i < rows * p.head_dim; ++i)
      scratch.grad_keys[i] = scratch.grad_values[i] = 0;
    to.clear_unasked();
    for (int64_t token = p.first; token < p.tokens; token += kGradientBlock) {
      const int64_t count = min_of(kGradientBlock, p.tokens - token);
      window_gradient_of_block(to, scratch, token, count, base);
    }
    const auto put = [&](const A* grads, void* of_tokens, void* of_ring, const void* after) {
      to.put([&](int64_t row, A* sum) { copy_row(grads + row * p.head_dim, p.head_dim, sum); },
             base, of_tokens, of_ring, after, scratch.grad_q);
    };
    put(scratch.grad_keys, p.grad_k, p.grad_k_ring, p.grad_k_after);
    put(scratch.grad_values, p.grad_v, p.grad_v_ring, p.grad_v_after);
  }
}

}  // namespace
}  // namespace continual_mha::cpu
