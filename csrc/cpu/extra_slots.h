// What a window holds besides its tokens.
#pragma once

#include "tiles.h"

namespace continual_mha::cpu {
namespace {

// Keys and values outside the ring: the learned slot of add_bias_kv and the zeros of add_zero_attn.
template <class S>
struct ExtraSlots {
  const S* bias_k;  // (D,), or null
  const S* bias_v;
  bool zero;

  int64_t count() const { return (bias_k != nullptr) + zero; }

  template <class X, class A>
  CMHA_INLINE void score(const X* q, int64_t head_dim, A* scores) const {
    if (bias_k != nullptr) {
      dot_rows<1>(bias_k, 0, 0, 1, q, 0, head_dim, [&](int64_t, int, A sum) { *scores = sum; });
    }
    if (zero) scores[bias_k != nullptr] = 0;
  }

  template <class A>
  CMHA_INLINE void add_value(A weight, int64_t head_dim, A* out) const {
    if (bias_v == nullptr) return;
    for (int64_t d = 0; d < head_dim; ++d) out[d] += weight * widen(bias_v[d]);
  }
};

template <class S>
ExtraSlots<S> extra_slots(const void* bias_k, const void* bias_v, bool zero, int64_t offset) {
  if (bias_k == nullptr) return {nullptr, nullptr, zero};
  return {static_cast<const S*>(bias_k) + offset, static_cast<const S*>(bias_v) + offset, zero};
}

template <class A>
int64_t padded_scores(int64_t slots) {
  return slots + 2 + Simd<A>::kLanes;
}

}  // namespace
}  // namespace continual_mha::cpu
