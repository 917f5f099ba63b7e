// One token of every stream against its ring.
#pragma once

#include "codes.h"
#include "extra_slots.h"
#include "kernels.h"
#include "scratch.h"

namespace continual_mha::cpu {
namespace {

// The ring of one head. `scale` has a number per slot where the rows are codes.
template <class R>
struct HeadRing {
  R* rows;
  float* scale;
};

// out = softmax(q K^T) V over `slots` rows and the extra slots; q is scaled.
template <class R, class S, class A>
CMHA_INLINE void attend(const A* q, HeadRing<R> k, HeadRing<R> v, int64_t slots, int64_t head_dim,
                        const ExtraSlots<S>& extra, A* scores, A* out) {
  if constexpr (kIsCode<R>) {
    score_codes(k.rows, k.scale, slots, head_dim, q, scores);
  } else {
    dot_rows<1>(k.rows, head_dim, 0, slots, q, 0, head_dim,
                [&](int64_t l, int, A sum) __attribute__((always_inline)) { scores[l] = sum; });
  }
  extra.score(q, head_dim, scores + slots);
  const A scale = 1 / softmax_numerators(scores, slots + extra.count(), kMinusInfinity<A>).sum;
  if constexpr (kIsCode<R>) multiply_scales<R>(v.scale, slots, scores);
  weighted_rows<1>(scores, 0, v.rows, head_dim, 0, slots, head_dim, out, 0);
  extra.add_value(scores[slots], head_dim, out);
  for (int64_t d = 0; d < head_dim; ++d) out[d] *= scale;
}

template <class S, class R>
struct RingStepScratch {
  using A = typename AccOf<S>::type;
  A* q;
  A* out;
  A* scores;
  HeadRing<R> k;  // a copy of one head's ring, where the ring itself must stay as it is
  HeadRing<R> v;

  RingStepScratch(const RingStepParams& p, Arena& arena) {
    const int64_t slots = p.update ? 0 : p.length;
    q = arena.take<A>(p.head_dim);
    out = arena.take<A>(p.head_dim);
    scores = arena.take<A>(padded_scores<A>(p.length));
    k = {arena.take<R>(slots * p.head_dim), arena.take<float>(kIsCode<R> ? slots : 0)};
    v = {arena.take<R>(slots * p.head_dim), arena.take<float>(kIsCode<R> ? slots : 0)};
  }
};

template <class S, class R>
int64_t ring_step_scratch(const RingStepParams& p) {
  Arena arena(nullptr);
  RingStepScratch<S, R>(p, arena);
  return arena.used();
}

// The ring of one head with the new token in its slot: the ring itself, or a copy of the used
// slots.
template <class S, class R>
CMHA_INLINE HeadRing<R> with_token(HeadRing<R> ring, const S* token, int64_t slot, int64_t slots,
                                   int64_t head_dim, bool update, HeadRing<R> copy) {
  if (!update) {
    memcpy(copy.rows, ring.rows, static_cast<size_t>(slots * head_dim) * sizeof(R));
    if (kIsCode<R>) memcpy(copy.scale, ring.scale, static_cast<size_t>(slots) * sizeof(float));
    ring = copy;
  }
  R* row = ring.rows + slot * head_dim;
  if constexpr (kIsCode<R>) {
    ring.scale[slot] = quantize(token, head_dim, row);
  } else {
    memcpy(row, token, static_cast<size_t>(head_dim) * sizeof(S));
  }
  return ring;
}

template <class R>
CMHA_INLINE HeadRing<R> head_ring(void* rows, float* scale, int64_t head, int64_t slots,
                                  int64_t head_dim) {
  return {static_cast<R*>(rows) + head * slots * head_dim,
          scale == nullptr ? nullptr : scale + head * slots};
}

// The scaled query whose turn it is: the new one, or with a delay the oldest in the ring of
// queries.
template <class S, class A>
CMHA_INLINE void take_query(const RingStepParams& p, int64_t n, int64_t head, A scale, A* q) {
  const int64_t embed_dim = p.num_heads * p.head_dim;
  const S* token = static_cast<const S*>(p.q) + n * p.token_stride + head * p.head_dim;
  if (p.query_slots == 0) {
    copy_scaled(token, p.head_dim, scale, q);
    return;
  }
  S* ring = static_cast<S*>(p.q_ring) + n * p.query_slots * embed_dim + head * p.head_dim;
  const int64_t due = (p.position[n] + 1) % p.query_slots;
  copy_scaled(ring + due * embed_dim, p.head_dim, scale, q);
  if (p.update) {
    memcpy(ring + p.position[n] % p.query_slots * embed_dim, token,
           static_cast<size_t>(p.head_dim) * sizeof(S));
  }
}

// Tasks are (stream, head): writes the token into the head's ring, then reads that ring once.
template <class S, class R>
void ring_step(const RingStepParams& p, void* memory, int64_t begin, int64_t end) {
  using A = typename AccOf<S>::type;
  Arena arena(memory);
  const RingStepScratch<S, R> scratch(p, arena);
  const A scale = 1 / static_cast<A>(__builtin_sqrt(static_cast<double>(p.head_dim)));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / p.num_heads;
    const int64_t head = task % p.num_heads;
    const int64_t column = head * p.head_dim;
    const int64_t token = n * p.token_stride + column;
    const int64_t slot = p.position[n] % p.length;
    const int64_t slots = min_of(p.position[n] + 1, p.length);
    const auto k = with_token(head_ring<R>(p.k_ring, p.k_scale, task, p.length, p.head_dim),
                              static_cast<const S*>(p.k) + token, slot, slots, p.head_dim, p.update,
                              scratch.k);
    const auto v = with_token(head_ring<R>(p.v_ring, p.v_scale, task, p.length, p.head_dim),
                              static_cast<const S*>(p.v) + token, slot, slots, p.head_dim, p.update,
                              scratch.v);
    take_query<S>(p, n, head, scale, scratch.q);
    const int64_t out = n * p.num_heads * p.head_dim + column;
    const auto extra = extra_slots<S>(p.bias_k, p.bias_v, p.add_zero_attn, column);
    A* attended = p.out_is_storage ? scratch.out : static_cast<A*>(p.out) + out;
    attend(scratch.q, k, v, slots, p.head_dim, extra, scratch.scores, attended);
    if (!p.out_is_storage) continue;
    copy_scaled(attended, p.head_dim, A{1}, static_cast<S*>(p.out) + out);
  }
}

}  // namespace
}  // namespace continual_mha::cpu
