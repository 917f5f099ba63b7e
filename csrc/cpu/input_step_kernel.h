// One token of every stream against its ring of inputs, or several; docs/formulations.md has the
// mathematics.
#pragma once

#include <type_traits>

#include "codes.h"
#include "kernels.h"
#include "project_kernel.h"
#include "scratch.h"

namespace continual_mha::cpu {
namespace {

// out[q][0..kVecs) += sum over rows l of p[q][l] * row l; with kTail, `tail` columns of one vector.
// Every sum is made in the order of the rows, whatever kQ and kVecs are. `ahead`, if not 0, is the
// distance to what is read after these rows.
template <int kQ, int kVecs, bool kTail, class S, class A>
CMHA_TILE void mix_tile(const A* p, int64_t p_stride, const S* rows, int64_t row_stride,
                        int64_t count, int64_t tail, int64_t ahead, A* out, int64_t out_stride) {
  using Vec = typename Simd<A>::Vec;
  constexpr int kLanes = Simd<A>::kLanes;
  Vec acc[kQ][kVecs] = {};
  for (int64_t l = 0; l < count; ++l) {
    const S* row = rows + l * row_stride;
#pragma GCC unroll 16
    for (int j = 0; j < kVecs; ++j) {
      if (!kTail && ahead != 0 && j * kLanes * sizeof(S) % 64 == 0) {
        __builtin_prefetch(row + j * kLanes + ahead, 0, 2);
      }
      const Vec v = held(kTail ? load_partial(row, tail) : load(row + j * kLanes));
#pragma GCC unroll 4
      for (int q = 0; q < kQ; ++q) acc[q][j] += p[q * p_stride + l] * v;
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < kQ; ++q) {
#pragma GCC unroll 16
    for (int j = 0; j < kVecs; ++j) {
      A* to = out + q * out_stride + j * kLanes;
      if constexpr (kTail) {
        store_partial<A>(to, load_partial(to, tail) + acc[q][j], tail);
      } else {
        store<A>(to, load(to) + acc[q][j]);
      }
    }
  }
}

// The same for any number of columns.
template <int kQ, class S, class A>
CMHA_INLINE void mix_rows(const A* p, int64_t p_stride, const S* rows, int64_t row_stride,
                          int64_t count, int64_t columns, int64_t ahead, A* out,
                          int64_t out_stride) {
  constexpr int kLanes = Simd<A>::kLanes;
  constexpr int kVecs = kTileVectors / (kQ == 3 ? 4 : kQ);
  int64_t d = 0;
  for (; d + kVecs * kLanes <= columns; d += kVecs * kLanes) {
    mix_tile<kQ, kVecs, false>(p, p_stride, rows + d, row_stride, count, 0, ahead, out + d,
                               out_stride);
  }
  for (; d + kLanes <= columns; d += kLanes) {
    mix_tile<kQ, 1, false>(p, p_stride, rows + d, row_stride, count, 0, ahead, out + d, out_stride);
  }
  if (d < columns) {
    mix_tile<kQ, 1, true>(p, p_stride, rows + d, row_stride, count, columns - d, 0, out + d,
                          out_stride);
  }
}

// A token of a stream as it is kept: scaled, where tokens are codes.
template <class R>
struct InputRow {
  const R* row;
  const float* scale;

  InputRow after(int64_t rows, int64_t features) const {
    return {row + rows * features, scale == nullptr ? nullptr : scale + rows};
  }
};

template <class R>
CMHA_INLINE InputRow<R> row_in_ring(const InputStepParams& p, int64_t n, int64_t slot) {
  const InputRow<R> ring{static_cast<const R*>(p.x_ring), p.x_scale};
  return ring.after(n * p.length + slot, p.embed_dim);
}

template <class R>
CMHA_INLINE InputRow<R> row_in_clip(const InputStepParams& p, int64_t n, int64_t token) {
  const InputRow<R> clip{static_cast<const R*>(p.clip.rows), p.clip.scale};
  return clip.after(n * p.tokens + token, p.embed_dim);
}

// Tasks are streams: writes the token into its slot.
template <class S, class R>
void put_input(const InputStepParams& p, void* memory, int64_t begin, int64_t end) {
  S* packed = static_cast<S*>(memory);  // (E,)
  for (int64_t n = begin; n < end; ++n) {
    const S* token = static_cast<const S*>(p.token) + n * p.token_stride;
    if (p.feature_stride != 1) {
      for (int64_t i = 0; i < p.embed_dim; ++i) packed[i] = token[i * p.feature_stride];
      token = packed;
    }
    const int64_t slot = n * p.length + p.position[n] % p.length;
    R* row = static_cast<R*>(p.x_ring) + slot * p.embed_dim;
    if constexpr (kIsCode<R>) {
      p.x_scale[slot] = quantize(token, p.embed_dim, row);
    } else {
      memcpy(row, token, static_cast<size_t>(p.embed_dim) * sizeof(S));
    }
  }
}

// A query's stream, and which token of the clip brings its output.
struct Query {
  int64_t stream;
  int64_t token;
};

CMHA_INLINE Query query_at(const InputStepParams& p, int64_t query) {
  const int64_t wanted = p.tokens - p.first;
  const int64_t at = p.first_query + query;
  return {at / wanted, p.first + at % wanted};
}

// Tasks are queries: the token that asks, `delay` before the newest, as acc; zeros where there is
// none. One that did not wait asks as it came, one that did as it was kept.
template <class S, class R>
void asked_input(const InputStepParams& p, void* asked, int64_t begin, int64_t end) {
  using A = typename AccOf<S>::type;
  const int64_t e = p.embed_dim;
  for (int64_t query = begin; query < end; ++query) {
    A* to = static_cast<A*>(asked) + query * e;
    const auto [n, newest] = query_at(p, query);
    const int64_t token = newest - p.delay;
    const int64_t at = p.position[n] + token;
    if (p.delay == 0) {
      read_row(static_cast<const S*>(p.token) + (n * p.tokens + token) * e, nullptr, e, to);
    } else if (token >= 0) {
      const auto [row, scale] = row_in_clip<R>(p, n, token);
      read_row(row, scale, e, to);
    } else if (at >= 0) {
      const auto [row, scale] = row_in_ring<R>(p, n, at % p.length);
      read_row(row, scale, e, to);
    } else {
      for (int64_t i = 0; i < e; ++i) to[i] = 0;
    }
  }
}

// Tasks are heads: scales the queries, scores the extra slots with them, and moves W_k to them.
template <class S>
void move_queries(const MovedParams& p, int64_t begin, int64_t end) {
  using A = typename AccOf<S>::type;
  const int64_t e = p.embed_dim;
  const int64_t width = p.key_dim;
  const int64_t head_dim = e / p.num_heads;
  const A scale = 1 / static_cast<A>(__builtin_sqrt(static_cast<double>(head_dim)));
  for (int64_t head = begin; head < end; ++head) {
    const int64_t column = head * head_dim;
    const S* weight = static_cast<const S*>(p.k_weight) + column * width;
    A* q = static_cast<A*>(p.q) + column;
    A* moved = static_cast<A*>(p.moved) + head * width;
    for (int64_t n = 0; n < p.queries; ++n) {
      for (int64_t d = 0; d < head_dim; ++d) q[n * e + d] *= scale;
      for (int64_t i = 0; i < width; ++i) moved[n * p.num_heads * width + i] = 0;
      if (p.extra == nullptr) continue;
      // A slot of the ring lacks q . b_k, which these have not.
      A on_key_bias = 0;
      A on_bias_slot = 0;
      for (int64_t d = 0; d < head_dim; ++d) {
        const A x = q[n * e + d];
        if (p.k_bias != nullptr)
          on_key_bias += x * widen(static_cast<const S*>(p.k_bias)[column + d]);
        if (p.bias_k != nullptr)
          on_bias_slot += x * widen(static_cast<const S*>(p.bias_k)[column + d]);
      }
      A* extra = static_cast<A*>(p.extra) + (n * p.num_heads + head) * 2;
      extra[0] = p.bias_k == nullptr ? kMinusInfinity<A> : on_bias_slot - on_key_bias;
      extra[1] = p.add_zero_attn ? -on_key_bias : kMinusInfinity<A>;
    }
    by_fours(0, p.queries, [&](int64_t n, auto tag) __attribute__((always_inline)) {
      mix_rows<decltype(tag)::value>(q + n * e, e, weight, width, head_dim, width, 0,
                                     moved + n * p.num_heads * width, p.num_heads * width);
    });
  }
}

constexpr int64_t kTileSlots = 64;  // rows of a ring that stay in the second-level cache together

template <class A>
struct Tile {
  const A* rows;
  int64_t count;
  int64_t ahead;  // as in mix_tile
};

// What a query sees, as stretches of rows: of a ring with its token in place the slots in use, or
// those and the token among them; else the slots of its window up to the ring's end and from its
// beginning, and the tokens of the clip.
template <class R>
class Window {
 public:
  Window(const InputStepParams& p, Query query) {
    const auto [n, token] = query;
    const int64_t position = p.position[n];
    const int64_t used = min_of(position + 1, p.length);
    begin_[0] = row_in_ring<R>(p, n, 0);
    if (p.clip.rows == nullptr) {
      count_[0] = used;
      return;
    }
    if (p.in_its_slot) {
      as_they_lie_ = false;
      const int64_t slot = position % p.length;
      count_[0] = slot;
      begin_[1] = row_in_clip<R>(p, n, 0);
      count_[1] = 1;
      begin_[2] = row_in_ring<R>(p, n, 0).after(slot + 1, p.embed_dim);
      count_[2] = used - slot - 1;
      return;
    }
    const int64_t oldest = max_of(token - p.length + 1, -position);
    const int64_t kept = max_of(-oldest, int64_t{0});
    const int64_t slot = (position - kept) % p.length;
    const int64_t in_clip = max_of(oldest, int64_t{0});
    begin_[0] = row_in_ring<R>(p, n, slot);
    count_[0] = min_of(kept, p.length - slot);
    begin_[1] = row_in_ring<R>(p, n, 0);
    count_[1] = kept - count_[0];
    begin_[2] = row_in_clip<R>(p, n, in_clip);
    count_[2] = token + 1 - in_clip;
  }

  // The next rows as acc: as they lie where they are that, else gathered in `memory`, as are those
  // among which a token is: tiles of the same rows give the same bits. None at the end.
  template <class A>
  CMHA_INLINE Tile<A> next(int64_t features, A* memory) {
    Tile<A> tile{memory, 0, 0};
    for (; tile.count < kTileSlots && stretch_ < 3; ++stretch_, done_ = 0) {
      const int64_t left = count_[stretch_] - done_;
      if (left == 0) continue;
      const InputRow<R> from = begin_[stretch_].after(done_, features);
      const int64_t rows = min_of(kTileSlots - tile.count, left);
      done_ += rows;
      if constexpr (std::is_same_v<R, A>) {
        if (as_they_lie_) return {from.row, rows, rows * features};
      }
      for (int64_t l = 0; l < rows; ++l) {
        const InputRow<R> row = from.after(l, features);
        read_row(row.row, row.scale, features, memory + (tile.count + l) * features);
      }
      tile.count += rows;
      if (rows < left) break;
    }
    return tile;
  }

 private:
  InputRow<R> begin_[3] = {};
  int64_t count_[3] = {};
  bool as_they_lie_ = true;
  int stretch_ = 0;
  int64_t done_ = 0;  // rows of the stretch
};

template <class S>
struct InputStepScratch {
  using A = typename AccOf<S>::type;
  A* tile;    // (kTileSlots, E) of a ring that does not hold acc
  A* mixed;   // (H, E)
  A* scores;  // (kHeadBlock, kTileSlots)
  A* most;    // (H,) the largest score so far
  A* sum;     // (H,) the softmax's denominator so far

  InputStepScratch(const InputStepParams& p, Arena& arena) {
    tile = arena.take<A>(kTileSlots * p.embed_dim);
    mixed = arena.take<A>(p.num_heads * p.embed_dim);
    scores = arena.take<A>(kHeadBlock * kTileSlots);
    most = arena.take<A>(p.num_heads);
    sum = arena.take<A>(p.num_heads);
  }
};

template <class S>
int64_t input_step_scratch(const InputStepParams& p) {
  Arena arena(nullptr);
  InputStepScratch<S>(p, arena);
  return arena.used();
}

// kC heads from `head` on take in a tile; the first to do so fetches what comes after it.
template <int kC, class S, class A>
CMHA_INLINE void mix_heads(const InputStepParams& p, const InputStepScratch<S>& scratch,
                           const A* moved, const Tile<A>& x, bool fetches, int64_t head) {
  const int64_t e = p.embed_dim;
  dot_rows<kC>(x.rows, e, 0, x.count, moved + head * e, e, e,
               [&](int64_t l, int c, A sum)
                   __attribute__((always_inline)) { scratch.scores[c * kTileSlots + l] = sum; });
  for (int c = 0; c < kC; ++c) {
    A& most = scratch.most[head + c];
    const auto now = softmax_numerators(scratch.scores + c * kTileSlots, x.count, most);
    const A shrunk = exp_of(most - now.max);
    scratch.sum[head + c] = scratch.sum[head + c] * shrunk + now.sum;
    if (!(now.max == most)) {
      A* mixed = scratch.mixed + (head + c) * e;
      for (int64_t i = 0; i < e; ++i) mixed[i] *= shrunk;
    }
    most = now.max;
  }
  mix_rows<kC>(scratch.scores, kTileSlots, x.rows, e, x.count, e, fetches ? x.ahead : 0,
               scratch.mixed + head * e, e);
}

// Tasks are (query, group of heads). A tile of the window is read once for all of them: scored,
// and while it is still in a cache near by mixed, with a softmax that goes on from tile to tile.
// The result takes the place of the moved queries.
template <class S, class R>
void mix_inputs(const InputStepParams& p, void* memory, int64_t begin, int64_t end) {
  using A = typename AccOf<S>::type;
  Arena arena(memory);
  const InputStepScratch<S> scratch(p, arena);
  const int64_t e = p.embed_dim;
  const int64_t groups = (p.num_heads + p.group_heads - 1) / p.group_heads;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t query = task / groups;
    const int64_t first = task % groups * p.group_heads;
    const int64_t last = min_of(first + p.group_heads, p.num_heads);
    A* moved = static_cast<A*>(p.moved) + query * p.num_heads * e;
    A* extra = p.extra == nullptr ? nullptr : static_cast<A*>(p.extra) + query * p.num_heads * 2;
    for (int64_t i = first * e; i < last * e; ++i) scratch.mixed[i] = 0;
    for (int64_t head = first; head < last; ++head) {
      scratch.most[head] =
          extra == nullptr ? kMinusInfinity<A> : max_of(extra[2 * head], extra[2 * head + 1]);
      scratch.sum[head] = 0;
    }
    Window<R> window(p, query_at(p, query));
    for (Tile<A> x = window.next(e, scratch.tile); x.count > 0; x = window.next(e, scratch.tile)) {
      by_fours(first, last, [&](int64_t head, auto tag) __attribute__((always_inline)) {
        mix_heads<decltype(tag)::value>(p, scratch, moved, x, head == first, head);
      });
    }
    for (int64_t head = first; head < last; ++head) {
      A sum = scratch.sum[head];
      if (extra != nullptr) {
        A* slot =
            extra + 2 * head;  // from scores to the weights of the bias's slot and of the ring
        const A bias = exp_of(slot[0] - scratch.most[head]);
        const A all = sum + bias + exp_of(slot[1] - scratch.most[head]);
        slot[0] = bias / all;
        slot[1] = sum / all;
        sum = all;
      }
      const A factor = 1 / sum;
      for (int64_t i = head * e; i < (head + 1) * e; ++i) moved[i] = scratch.mixed[i] * factor;
    }
  }
}

// Tasks are heads: W_v on what was mixed, and the biases.
template <class S>
void project_mixed(const MovedParams& p, int64_t begin, int64_t end) {
  using A = typename AccOf<S>::type;
  const int64_t e = p.embed_dim;
  const int64_t width = p.value_dim;
  const int64_t head_dim = e / p.num_heads;
  for (int64_t head = begin; head < end; ++head) {
    const int64_t column = head * head_dim;
    const S* bias = p.v_bias == nullptr ? nullptr : static_cast<const S*>(p.v_bias) + column;
    const ProjectParams params{static_cast<A*>(p.mixed) + head * width,
                               static_cast<const S*>(p.v_weight) + column * width,
                               p.extra == nullptr ? bias : nullptr,
                               static_cast<A*>(p.out) + column,
                               p.num_heads * width,
                               e,
                               p.queries,
                               head_dim,
                               width};
    project<S, A, A>(params, 0, (head_dim + kRowBlock - 1) / kRowBlock);
    if (p.extra == nullptr) continue;
    for (int64_t n = 0; n < p.queries; ++n) {
      const A* share = static_cast<const A*>(p.extra) + (n * p.num_heads + head) * 2;
      A* out = static_cast<A*>(p.out) + n * e + column;
      for (int64_t d = 0; d < head_dim; ++d) {
        if (bias != nullptr) out[d] += share[1] * widen(bias[d]);
        if (p.bias_v != nullptr)
          out[d] += share[0] * widen(static_cast<const S*>(p.bias_v)[column + d]);
      }
    }
  }
}

}  // namespace
}  // namespace continual_mha::cpu
