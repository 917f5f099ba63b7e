// Several tokens of every stream, each against the window that ends with it.
#pragma once

#include "codes.h"
#include "dropout.h"
#include "extra_slots.h"
#include "kernels.h"
#include "scratch.h"

namespace continual_mha::cpu {
namespace {

constexpr int64_t kKeyTile = 64;

// Keys as scores are made of them: tiles of kKeyTile keys, feature by feature, so that a score
// needs no sum over lanes; or row by row where X comes in pairs of neighbours.
template <class X>
constexpr bool kKeysInTiles = std::is_same_v<X, typename AccOf<X>::type>;

// Queries that pass so many rows together, four at a time: the rows stay in the first-level cache,
// or where products are as fast as those in pairs, the scores of only four.
template <class X>
constexpr int64_t kQueryBlock = kKeysInTiles<X> ? 16 : 4;
template <class X>
constexpr int64_t kStretch = kKeysInTiles<X> ? kKeyTile : int64_t{1} << 40;

// Keys that are turned to features together.
template <class X>
constexpr int kKeysTogether = Simd<typename AccOf<X>::type>::kLanes;

// X: what scores and sums are products of.
template <class S, class X>
struct RingStepsScratch {
  using A = typename AccOf<S>::type;
  X* q;    // (kQueryBlock<X>, D)
  A* out;  // (kQueryBlock<X>, D)
  X* k;    // every key that the task's windows hold, oldest first, and room for some rows
  X* v;
  A* scores;   // (kQueryBlock<X>, score_stride)
  X* factors;  // the same, as factors of the values
  A* keeps;    // (score_stride,)
  int64_t score_stride;

  RingStepsScratch(const RingStepsParams& p, Arena& arena) {
    const int64_t rows = p.length - 1 + p.block_tokens;
    const int64_t keys = (rows + kKeyTile - 1) / kKeyTile * kKeyTile + kKeysTogether<X>;
    score_stride = padded_scores<A>(rows);
    q = arena.take<X>(kQueryBlock<X> * p.head_dim);
    out = arena.take<A>(kQueryBlock<X> * p.head_dim);
    k = arena.take<X>(keys * p.head_dim);
    v = arena.take<X>(rows * p.head_dim);
    scores = arena.take<A>(kQueryBlock<X> * score_stride);
    factors = factors_of<X>(scores, kQueryBlock<X> * score_stride, arena);
    keeps = arena.take<A>(score_stride);
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

struct RowRange {
  int64_t begin;
  int64_t end;
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

  // That window among rows that lie from the token `base` on.
  CMHA_INLINE RowRange window(int64_t token, int64_t base) const {
    return {window_begin(token) - base, token + 1 - base};
  }

  // Where among one number for every output that of `token` is.
  int64_t output(int64_t token) const {
    return (stream * (p.tokens - p.first) + token - p.first) * p.num_heads + head;
  }

  A sink(int64_t token) const {
    return p.sink == nullptr ? kMinusInfinity<A> : static_cast<const A*>(p.sink)[output(token)];
  }

  // What dropout multiplies the weights of the window with that ends with `token`, if it does.
  CMHA_INLINE bool drops(int64_t token, RowRange window, A* keeps) const {
    if (p.dropout_p == 0) return false;
    const int64_t slots = window.end - window.begin;
    keep_scales(p.seed, p.dropout_p, {stream, head, token}, slots, keeps,
                token + 1 - slots + p.length);
    return true;
  }
};

// Lays out the keys of `count` tokens from `token` on.
template <class S, class R, class X>
CMHA_INLINE void lay_out_keys(const HeadOfClip<S>& head, const Kept<R>& keys, int64_t token,
                              int64_t count, X* to) {
  const int64_t head_dim = head.p.head_dim;
  if constexpr (!kKeysInTiles<X>) {
    for (int64_t i = 0; i < count; ++i) head.read(keys, token + i, to + i * head_dim);
  } else {
    constexpr int kLanes = kKeysTogether<X>;
    X* rows = to + (count + kKeyTile - 1) / kKeyTile * kKeyTile * head_dim;
    for (int64_t i = 0; i < count; i += kLanes) {
      for (int64_t r = 0; r < kLanes; ++r) {  // behind the last its own again, which none asks for
        head.read(keys, token + min_of(i + r, count - 1), rows + r * head_dim);
      }
      X* tile = to + i / kKeyTile * kKeyTile * head_dim + i % kKeyTile;
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        const int64_t features = min_of<int64_t>(kLanes, head_dim - d);
        typename Simd<X>::Vec v[kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) {
          const X* row = rows + reversed(r, kLanes) * head_dim + d;
          v[r] = features == kLanes ? load(row) : load_partial(row, features);
        }
        transpose<X>(v);
        for (int64_t f = 0; f < features; ++f) store<X>(tile + (d + f) * kKeyTile, v[f]);
      }
    }
  }
}

// scores[q][l] = query q . key l for keys [begin, end), which are of one tile; `keys` are those
// from key 0 on.
template <int kQ, class X, class A>
CMHA_INLINE void score_keys(const X* q, const X* keys, int64_t begin, int64_t end, int64_t head_dim,
                            A* scores, int64_t stride) {
  if constexpr (kKeysInTiles<X>) {
    const int64_t tile = begin / kKeyTile * kKeyTile;
    weighted_rows<kQ>(q, head_dim, keys + tile * head_dim + begin - tile, kKeyTile, 0, head_dim,
                      end - begin, scores + begin, stride);
  } else {
    dot_rows<kQ>(keys, head_dim, begin, end, q, head_dim, head_dim,
                 [&](int64_t l, int i, A sum)
                     __attribute__((always_inline)) { scores[i * stride + l] = sum; });
  }
}

// f(i, Int<c>, begin, end) for groups of c <= 4 of `count` queries, from i on, and what range(i, c)
// says of `rows` rows, by stretches of kLength that stay in a cache while all groups pass.
template <int64_t kLength, class Range, class F>
CMHA_INLINE void by_stretches(int64_t rows, int64_t count, const Range& range, const F& f) {
  for (int64_t stretch = 0; stretch < rows; stretch += kLength) {
    by_fours(0, count, [&](int64_t i, auto tag) __attribute__((always_inline)) {
      const auto [first, last] = range(i, decltype(tag)::value);
      const int64_t begin = max_of(stretch, first);
      const int64_t end = min_of(stretch + kLength, last);
      if (begin < end) f(i, tag, begin, end);
    });
  }
}

// The scores of the query that `token` answers to the numerators of its softmax, behind whose
// window come those of the extra slots. Returns the reciprocal of their sum.
template <class S, class X, class A>
CMHA_INLINE A weigh_window(const HeadOfClip<S>& head, int64_t token, RowRange window,
                           const ExtraSlots<S>& extra, const X* q, A scale, A* scores, A* keeps) {
  extra.score(q, head.p.head_dim, scores + window.end);
  A* own = scores + window.begin;
  const int64_t slots = window.end - window.begin;
  const A sink = head.sink(token);
  const auto [max, sum] = softmax_numerators(own, slots + extra.count(), sink / scale, scale);
  const A total = head.p.sink == nullptr ? sum : sum + exp_of(sink - max * scale);
  if (head.p.lse != nullptr) {
    static_cast<A*>(head.p.lse)[head.output(token)] =
        max * scale + static_cast<A>(__builtin_log(static_cast<double>(total)));
  }
  if (head.drops(token, window, keeps)) {
    for (int64_t l = 0; l < slots; ++l) own[l] *= keeps[l];
  }
  return 1 / total;
}

// A query's output from the sum over its window.
template <class S, class A>
CMHA_INLINE void finish_output(const ExtraSlots<S>& extra, const A* scores, RowRange window,
                               int64_t head_dim, A scale, A* out) {
  extra.add_value(scores[window.end], head_dim, out);
  for (int64_t d = 0; d < head_dim; ++d) out[d] *= scale;
}

// Outputs of `count` tokens from `token` on. Key and value rows lie in the scratch from token
// `base` on. What the windows of four tokens share is read once for them; the few rows at both
// ends, once for each: a row outside of a window may hold NaN and must not even meet a weight of
// zero.
template <class S, class X, class A>
CMHA_INLINE void attend_block(const HeadOfClip<S>& head, const RingStepsScratch<S, X>& scratch,
                              const ExtraSlots<S>& extra, int64_t token, int64_t count,
                              int64_t base, A scale) {
  const int64_t head_dim = head.p.head_dim;
  const int64_t stride = scratch.score_stride;
  const int64_t rows = token + count - base;
  // a query's window, and what those of some queries share
  const auto window = [&](int64_t q)
                          __attribute__((always_inline)) { return head.window(token + q, base); };
  const auto seen_by_any = [&](int64_t q, int64_t some) __attribute__((always_inline)) {
    return RowRange{window(q).begin, window(q + some - 1).end};
  };
  const auto seen_by_all = [&](int64_t q, int64_t some) __attribute__((always_inline)) {
    return RowRange{window(q + some - 1).begin, window(q).end};
  };
  for (int64_t q = 0; q < count; ++q) {
    copy_row(head.query(token + q), head_dim, scratch.q + q * head_dim);
  }
  by_stretches<kStretch<X>>(
      rows, count, seen_by_any,
      [&](int64_t q, auto tag, int64_t begin, int64_t end) __attribute__((always_inline)) {
        score_keys<decltype(tag)::value>(scratch.q + q * head_dim, scratch.k, begin, end, head_dim,
                                         scratch.scores + q * stride, stride);
      });
  A scales[kQueryBlock<X>];
  for (int64_t q = 0; q < count; ++q) {
    A* scores = scratch.scores + q * stride;
    const auto [begin, end] = window(q);
    scales[q] = weigh_window(head, token + q, window(q), extra, scratch.q + q * head_dim, scale,
                             scores, scratch.keeps);
    to_factors(scores + begin, end - begin, scratch.factors + q * stride + begin);
  }
  for (int64_t i = 0; i < count * head_dim; ++i) scratch.out[i] = 0;
  const auto add = [&](int64_t q, auto tag, int64_t begin, int64_t end)
                       __attribute__((always_inline)) {
                         weighted_rows<decltype(tag)::value, true>(
                             scratch.factors + q * stride, stride, scratch.v, head_dim, begin, end,
                             head_dim, scratch.out + q * head_dim, head_dim);
                       };
  by_stretches<kStretch<X>>(rows, count, seen_by_all, add);
  by_fours(0, count, [&](int64_t first, auto tag) __attribute__((always_inline)) {
    constexpr int kQ = decltype(tag)::value;
    const auto shared = seen_by_all(first, kQ);
    for (int64_t q = first; q < first + kQ; ++q) {
      const auto [begin, end] = window(q);
      add(q, Int<1>{}, begin, min_of(shared.begin, end));
      add(q, Int<1>{}, max_of(shared.begin, shared.end), end);
      finish_output(extra, scratch.scores + q * stride, window(q), head_dim, scales[q],
                    scratch.out + q * head_dim);
    }
  });
}

// A block of a head's tokens, whose windows' rows begin with the token `base`.
template <class S, class R>
struct BlockOfTokens {
  HeadOfClip<S> head;
  Kept<R> keys;
  Kept<R> values;
  ExtraSlots<S> extra;
  int64_t index;
  int64_t base;
  int64_t token;
  int64_t last;

  // Outputs (count, D) of the tokens from `first` on.
  template <class A>
  CMHA_INLINE void put(const A* out, int64_t first, int64_t count) const {
    const RingStepsParams& p = head.p;
    const int64_t row = head.stream * (p.tokens - p.first) + first - p.first;
    S* to = static_cast<S*>(p.out) + (row * p.num_heads + head.head) * p.head_dim;
    for (int64_t q = 0; q < count; ++q) {
      copy_scaled(out + q * p.head_dim, p.head_dim, A{1}, to + q * p.num_heads * p.head_dim);
    }
  }
};

// f(block) for tasks, which are (stream, head, block of tokens).
template <class S, class R, class F>
CMHA_INLINE void for_blocks_of_tokens(const RingStepsParams& p, int64_t begin, int64_t end,
                                      const F& f) {
  const Kept<R> keys{p.keys, static_cast<const R*>(p.k_ring), p.k_scale};
  const Kept<R> values{p.values, static_cast<const R*>(p.v_ring), p.v_scale};
  const int64_t blocks = (p.tokens - p.first + p.block_tokens - 1) / p.block_tokens;
  for (int64_t task = begin; task < end; ++task) {
    const HeadOfClip<S> head{p, task / blocks / p.num_heads, task / blocks % p.num_heads};
    const int64_t column = head.head * p.head_dim;
    const auto extra = extra_slots<S>(p.bias_k, p.bias_v, p.add_zero_attn, column);
    const int64_t token = p.first + task % blocks * p.block_tokens;
    const int64_t last = min_of(token + p.block_tokens, p.tokens);
    f(BlockOfTokens<S, R>{head, keys, values, extra, task, head.window_begin(token), token, last});
  }
}

// The windows' rows are laid out once in the order of time and stay in a cache near by while the
// block's queries pass.
template <class S, class R>
void ring_steps(const RingStepsParams& p, void* memory, int64_t begin, int64_t end) {
  using A = typename AccOf<S>::type;
  using X = std::conditional_t<std::is_same_v<R, S>, typename FactorOf<S>::type, A>;
  Arena arena(memory);
  const RingStepsScratch<S, X> scratch(p, arena);
  const A scale = 1 / static_cast<A>(__builtin_sqrt(static_cast<double>(p.head_dim)));
  for_blocks_of_tokens<S, R>(
      p, begin, end, [&](const BlockOfTokens<S, R>& task) __attribute__((always_inline)) {
        const HeadOfClip<S>& head = task.head;
        lay_out_keys(head, task.keys, task.base, task.last - task.base, scratch.k);
        for (int64_t t = task.base; t < task.last; ++t) {
          head.read(task.values, t, scratch.v + (t - task.base) * p.head_dim);
        }
        for (int64_t token = task.token; token < task.last; token += kQueryBlock<X>) {
          const int64_t count = min_of(kQueryBlock<X>, task.last - token);
          attend_block(head, scratch, task.extra, token, count, task.base, scale);
          task.put(scratch.out, token, count);
        }
      });
}

}  // namespace
}  // namespace continual_mha::cpu
