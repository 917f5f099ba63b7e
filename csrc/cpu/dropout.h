// Dropout drawn from a seed: what keep_scale of continual_mha/dropout.py gives, bit for bit.
#pragma once

#include "vec.h"

namespace continual_mha::cpu {
namespace {

typedef uint64_t Counters __attribute__((vector_size(kVectorBytes)));  // numbers of 32 bits
constexpr int kCounters = kVectorBytes / 8;

CMHA_INLINE Counters product(Counters a, uint32_t b) {
  const Counters factor = Counters{} + b;
#if defined(__AVX512F__)
  // Zero-masked with all lanes on, as in vec.h.
  return bit_cast<Counters>(
      _mm512_maskz_mul_epu32(0xff, bit_cast<__m512i>(a), bit_cast<__m512i>(factor)));
#elif defined(__AVX2__)
  return bit_cast<Counters>(_mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(factor)));
#else
  return a * factor;
#endif
}

// The weights of which query are dropped.
struct DroppedOf {
  int64_t stream;
  int64_t head;
  int64_t row = 0;  // the query, where a head has several
};

// The first of the four numbers of Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy
// as 1, 2, 3", 2011) for the counters (slot, stream, head, row).
CMHA_INLINE Counters philox(uint64_t seed, Counters slots, const DroppedOf& query) {
  constexpr uint64_t kLow = 0xffffffff;
  Counters c0 = slots & kLow, c1 = Counters{} + static_cast<uint32_t>(query.stream);
  Counters c2 = Counters{} + static_cast<uint32_t>(query.head);
  Counters c3 = Counters{} + static_cast<uint32_t>(query.row);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Counters a = product(c0, 0xD2511F53u), b = product(c2, 0xCD9E8D57u);
    c0 = (b >> 32) ^ c1 ^ k0;
    c1 = b & kLow;
    c2 = (a >> 32) ^ c3 ^ k1;
    c3 = a & kLow;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// 0 where a weight is dropped, else 1 / (1 - p), for `slots` slots from `first` on. Writes up to
// the next multiple of kCounters.
template <class A>
CMHA_INLINE void keep_scales(int64_t seed, float dropout_p, const DroppedOf& query, int64_t slots,
                             A* scales, int64_t first = 0) {
  const A kept = 1.0f / (1.0f - dropout_p);
  Counters at = {};
  for (int i = 0; i < kCounters; ++i) at[i] = static_cast<uint64_t>(first + i);
  for (int64_t s = 0; s < slots; s += kCounters) {
    const Counters drawn =
        philox(static_cast<uint64_t>(seed), at + static_cast<uint64_t>(s), query);
    for (int i = 0; i < kCounters; ++i) {
      const auto bits = static_cast<uint32_t>(drawn[i]);
      const uint32_t folded = bits > 0x7fffffffu ? ~bits : bits;  // from 32 bits to 31
      // The largest float that takes 2^31 - 1 below 1.
      const float uniform = static_cast<float>(static_cast<int32_t>(folded)) * 4.6566127342e-10f;
      scales[s + i] = uniform >= dropout_p ? kept : A{0};
    }
  }
}

}  // namespace
}  // namespace continual_mha::cpu
