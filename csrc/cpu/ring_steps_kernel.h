// Several tokens of every stream, each against the window that ends with it.
#pragma once

#include "codes.h"
#include "extra_slots.h"
#include "kernels.h"
#include "scratch.h"

namespace continual_mha::cpu {
namespace {

constexpr int64_t kQueryBlock = 4;

// X: what scores and sums are products of.
template <class S, class X>
struct RingStepsScratch {
  using A = typename AccOf<S>::type;
  X* q;    // (kQueryBlock, D)
  A* out;  // (kQueryBlock, D)
  X* k;    // every key that the task's windows hold, oldest first
  X* v;
  A* scores;   // (kQueryBlock, score_stride)
  X* factors;  // the same, as factors of the values
  int64_t score_stride;

  RingStepsScratch(const RingStepsParams& p, Arena& arena) {
    const int64_t rows = p.length - 1 + p.block_tokens;
    score_stride = padded_scores<A>(p.length + kQueryBlock);
    q = arena.take<X>(kQueryBlock * p.head_dim);
    out = arena.take<A>(kQueryBlock * p.head_dim);
    k = arena.take<X>(rows * p.head_dim);
    v = arena.take<X>(rows * p.head_dim);
    scores = arena.take<A>(kQueryBlock * score_stride);
    factors = factors_of<X>(scores, kQueryBlock * score_stride, arena);
  }
};

template <class S, class X>
int64_t ring_steps_scratch_for(const RingStepsParams& p) {
  Arena arena(nullptr);
  RingStepsScratch<S, X>(p, arena);
  return arena.used();
}

template <class S>
int64_t ring_steps_scratch(const RingStepsParams& p) {
  return max_of(ring_steps_scratch_for<S, typename AccOf<S>::type>(p),
                ring_steps_scratch_for<S, typename FactorOf<S>::type>(p));
}

// Keys or values of a clip and of the ring before it.
template <class R>
struct Kept {
  KeptTokens clip;
  const R* ring;
  const float* ring_scale;
};

// One head of one stream. Tokens are counted from the clip's first; those before it are negative
// and lie in the ring.
template <class S>
struct HeadOfClip {
  using A = typename AccOf<S>::type;
  const RingStepsParams& p;
  int64_t stream;
  int64_t head;

  int64_t position() const { return p.position[stream]; }

  // A key or value.
  template <class R, class X>
  CMHA_INLINE void read(const Kept<R>& from, int64_t token, X* to) const {
    const R* row;
    const float* scale;
    if (token >= 0) {
      const int64_t at = stream * p.tokens + token;
      row = static_cast<const R*>(from.clip.rows) + at * from.clip.stride + head * p.head_dim;
      scale = from.clip.scale == nullptr ? nullptr : from.clip.scale + at * p.num_heads + head;
    } else {
      const int64_t slot = (position() + token) % p.length;
      const int64_t at = (stream * p.num_heads + head) * p.length + slot;
      row = from.ring + at * p.head_dim;
      scale = from.ring_scale == nullptr ? nullptr : from.ring_scale + at;
    }
    if constexpr (std::is_same_v<R, X>) {
      copy_row(row, p.head_dim, to);
    } else {
      read_row(row, scale, p.head_dim, to);
    }
  }

  const S* new_query(int64_t token) const {
    return static_cast<const S*>(p.q) + (stream * p.tokens + token) * p.token_stride +
           head * p.head_dim;
  }

  // The query whose turn it is when `token` arrives.
  const S* query(int64_t token) const {
    if (p.query_slots == 0) return new_query(token);
    const int64_t due = token - (p.query_slots - 1);
    if (due >= 0) return new_query(due);
    const int64_t slot = (position() + token + 1) % p.query_slots;
    const int64_t embed_dim = p.num_heads * p.head_dim;
    return static_cast<const S*>(p.q_ring) + (stream * p.query_slots + slot) * embed_dim +
           head * p.head_dim;
  }

  // The oldest token of the window that ends with `token`.
  int64_t window_begin(int64_t token) const { return max_of(token - p.length + 1, -position()); }
};

// Outputs of kQ tokens from `token` on. Key and value rows lie in the scratch from token `base` on.
// What the windows share is read once for all of them; the few rows at both ends, once for each:
// a row outside of a window may hold NaN and must not even meet a weight of zero.
template <int kQ, class S, class X, class A>
CMHA_INLINE void attend_block(const HeadOfClip<S>& head, const RingStepsScratch<S, X>& scratch,
                              const ExtraSlots<S>& extra, int64_t token, int64_t base, A scale) {
  const int64_t head_dim = head.p.head_dim;
  const int64_t stride = scratch.score_stride;
  const int64_t first = head.window_begin(token);  // the row of column 0 of the scores
  for (int q = 0; q < kQ; ++q) {
    copy_row(head.query(token + q), head_dim, scratch.q + q * head_dim);
  }
  const X* k = scratch.k + (first - base) * head_dim;
  const X* v = scratch.v + (first - base) * head_dim;
  dot_rows<kQ>(k, head_dim, 0, token + kQ - first, scratch.q, head_dim, head_dim,
               [&](int64_t l, int q, A sum)
                   __attribute__((always_inline)) { scratch.scores[q * stride + l] = sum; });
  const int64_t shared_begin = head.window_begin(token + kQ - 1) - first;
  const int64_t shared_end = max_of(shared_begin, token + 1 - first);
  A scales[kQ];
  for (int q = 0; q < kQ; ++q) {
    A* scores = scratch.scores + q * stride;
    const int64_t begin = head.window_begin(token + q) - first;
    const int64_t end = token + q + 1 - first;
    extra.score(scratch.q + q * head_dim, head_dim, scores + end);
    const int64_t count = end - begin + extra.count();
    copy_scaled(scores + begin, count, scale, scores + begin);
    scales[q] = 1 / softmax_numerators(scores + begin, count, kMinusInfinity<A>).sum;
    to_factors(scores + begin, end - begin, scratch.factors + q * stride + begin);
  }
  weighted_rows<kQ>(scratch.factors, stride, v, head_dim, shared_begin, shared_end, head_dim,
                    scratch.out, head_dim);
  for (int q = 0; q < kQ; ++q) {
    const A* scores = scratch.scores + q * stride;
    A* out = scratch.out + q * head_dim;
    const int64_t begin = head.window_begin(token + q) - first;
    const int64_t end = token + q + 1 - first;
    const X* factors = scratch.factors + q * stride;
    weighted_rows<1, true>(factors, 0, v, head_dim, begin, min_of(shared_begin, end), head_dim, out,
                           0);
    weighted_rows<1, true>(factors, 0, v, head_dim, shared_end, end, head_dim, out, 0);
    extra.add_value(scores[end], head_dim, out);
    for (int64_t d = 0; d < head_dim; ++d) out[d] *= scales[q];
  }
}

// Tasks are (stream, head, block of tokens): the windows' rows are laid out once in the order of
// time and stay in a cache near by while the block's queries pass.
template <class S, class R>
void ring_steps(const RingStepsParams& p, void* memory, int64_t begin, int64_t end) {
  using A = typename AccOf<S>::type;
  using X = std::conditional_t<std::is_same_v<R, S>, typename FactorOf<S>::type, A>;
  Arena arena(memory);
  const RingStepsScratch<S, X> scratch(p, arena);
  const A scale = 1 / static_cast<A>(__builtin_sqrt(static_cast<double>(p.head_dim)));
  const Kept<R> keys{p.keys, static_cast<const R*>(p.k_ring), p.k_scale};
  const Kept<R> values{p.values, static_cast<const R*>(p.v_ring), p.v_scale};
  const int64_t wanted = p.tokens - p.first;
  const int64_t blocks = (wanted + p.block_tokens - 1) / p.block_tokens;
  for (int64_t task = begin; task < end; ++task) {
    const HeadOfClip<S> head{p, task / blocks / p.num_heads, task / blocks % p.num_heads};
    const int64_t column = head.head * p.head_dim;
    const auto extra = extra_slots<S>(p.bias_k, p.bias_v, p.add_zero_attn, column);
    int64_t token = p.first + task % blocks * p.block_tokens;
    const int64_t last = min_of(token + p.block_tokens, p.tokens);
    const int64_t base = head.window_begin(token);
    for (int64_t t = base; t < last; ++t) {
      const int64_t row = (t - base) * p.head_dim;
      head.read(keys, t, scratch.k + row);
      head.read(values, t, scratch.v + row);
    }
    S* out = static_cast<S*>(p.out) + head.stream * wanted * p.num_heads * p.head_dim + column;
    while (token < last) {
      const int64_t count = last - token >= kQueryBlock ? kQueryBlock : 1;
      if (count == kQueryBlock) {
        attend_block<kQueryBlock>(head, scratch, extra, token, base, scale);
      } else {
        attend_block<1>(head, scratch, extra, token, base, scale);
      }
      for (int64_t q = 0; q < count; ++q) {
        S* to = out + (token + q - p.first) * p.num_heads * p.head_dim;
        copy_scaled(scratch.out + q * p.head_dim, p.head_dim, A{1}, to);
      }
      token += count;
    }
  }
}

}  // namespace
}  // namespace continual_mha::cpu
