// Vectors as wide as the instruction set of the including file, on the compiler's vector extension:
// one source serves AVX-512, AVX2, SSE2 and NEON. Everything here has internal linkage, since each
// kernels_*.cpp is compiled for another machine and the linker must not merge their functions.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define CMHA_INLINE inline __attribute__((always_inline))
// A loop long enough to be called: inlined into each of its users, it would multiply the code.
#define CMHA_TILE __attribute__((noinline))

namespace continual_mha::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileVectors = 16;  // accumulators of a tile; of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileVectors = 8;  // of 16 registers
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kTileVectors = 16;  // of 32 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kTileVectors = 8;
#endif

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class T>
struct AccOf {
  using type = float;
};

template <>
struct AccOf<double> {
  using type = double;
};

// Lanes, the vector of them, and the integers of the same shape.
template <class A>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int kLanes = kVectorBytes / 4;
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
};

template <>
struct Simd<double> {
  static constexpr int kLanes = kVectorBytes / 8;
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
};

using FVec = Simd<float>::Vec;
using FInt = Simd<float>::Int;
using FHalf = Simd<float>::Half;
using DVec = Simd<double>::Vec;
#if defined(__aarch64__)
typedef __fp16 FNative __attribute__((vector_size(kVectorBytes / 2)));
#endif

template <class To, class From>
CMHA_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Conversions of one element.

CMHA_INLINE float widen(float x) { return x; }
CMHA_INLINE double widen(double x) { return x; }
CMHA_INLINE float widen(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

CMHA_INLINE float widen(Float16 x) {
  const uint32_t sign = (uint32_t{x.bits} & 0x8000u) << 16;
  const uint32_t rest = uint32_t{x.bits} & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x400u) return bit_cast<float>(sign | ((rest << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(rest) * 0x1p-24f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(subnormal));
}

// Round to nearest, ties to even.
CMHA_INLINE void narrow(float x, float* out) { *out = x; }
CMHA_INLINE void narrow(double x, double* out) { *out = x; }

CMHA_INLINE void narrow(float x, BFloat16* out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}

CMHA_INLINE void narrow(float x, Float16* out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    half =
        0x7c00u;  // at and above the midpoint between the largest number and the next power of two
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  } else {
    // Adding 0.5 leaves the subnormal's digits, rounded, at the low end of the mantissa.
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// Loads: kLanes elements from any address.

CMHA_INLINE FVec load(const float* p) {
  FVec v;
  memcpy(&v, p, sizeof(v));
  return v;
}

CMHA_INLINE DVec load(const double* p) {
  DVec v;
  memcpy(&v, p, sizeof(v));
  return v;
}

CMHA_INLINE FVec load(const BFloat16* p) {
  FHalf half;
  memcpy(&half, p, sizeof(half));
#if defined(__AVX512F__)
  // Zero-masked with all lanes on: GCC warns of an uninitialized operand in the plain forms.
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(half));
  return bit_cast<FVec>(_mm512_maskz_slli_epi32(0xffff, wide, 16));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu16_epi32(bit_cast<__m128i>(half));
  return bit_cast<FVec>(_mm256_slli_epi32(wide, 16));
#else
  return bit_cast<FVec>(__builtin_convertvector(half, FInt) << 16);
#endif
}

CMHA_INLINE FVec load(const Float16* p) {
#if defined(__AVX512F__)
  __m256i half;
  memcpy(&half, p, sizeof(half));
  return bit_cast<FVec>(_mm512_maskz_cvtph_ps(0xffff, half));
#elif defined(__AVX2__)
  __m128i half;
  memcpy(&half, p, sizeof(half));
  return bit_cast<FVec>(_mm256_cvtph_ps(half));
#elif defined(__aarch64__)
  FNative half;
  memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, FVec);
#else
  FVec v;
  for (int i = 0; i < Simd<float>::kLanes; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

// The first `count` < kLanes elements, zeros behind them; reads no byte beyond.
template <class S>
CMHA_INLINE auto load_partial(const S* p, int64_t count) {
  S padded[Simd<typename AccOf<S>::type>::kLanes] = {};
  memcpy(padded, p, static_cast<size_t>(count) * sizeof(S));
  return load(padded);
}

#if defined(__AVX512F__)
CMHA_INLINE FVec load_partial(const float* p, int64_t count) {
  return bit_cast<FVec>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p));
}

CMHA_INLINE DVec load_partial(const double* p, int64_t count) {
  return bit_cast<DVec>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p));
}

CMHA_INLINE FVec load_partial(const BFloat16* p, int64_t count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
  const BFloat16* padded = reinterpret_cast<const BFloat16*>(&bits);
  return load(padded);
}

CMHA_INLINE FVec load_partial(const Float16* p, int64_t count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
  const Float16* padded = reinterpret_cast<const Float16*>(&bits);
  return load(padded);
}
#elif defined(__AVX2__)
CMHA_INLINE FVec load_partial(const float* p, int64_t count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes);
  return bit_cast<FVec>(_mm256_maskload_ps(p, mask));
}

CMHA_INLINE DVec load_partial(const double* p, int64_t count) {
  const __m256i lanes = _mm256_setr_epi64x(0, 1, 2, 3);
  return bit_cast<DVec>(
      _mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), lanes)));
}

// By pairs, for which there is a mask, and the odd one by itself.
template <class S>
CMHA_INLINE FVec load_half_part(const S* p, int64_t count) {
  const __m128i mask =
      _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int>(count / 2)), _mm_setr_epi32(0, 1, 2, 3));
  __m128i bits = _mm_maskload_epi32(reinterpret_cast<const int*>(p), mask);
  if (count % 2 != 0) {
    const auto last = static_cast<short>(count - 1);
    const __m128i here =
        _mm_cmpeq_epi16(_mm_set1_epi16(last), _mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7));
    const __m128i odd = _mm_set1_epi16(bit_cast<short>(p[last]));
    bits = _mm_or_si128(bits, _mm_and_si128(here, odd));
  }
  return load(reinterpret_cast<const S*>(&bits));
}

CMHA_INLINE FVec load_partial(const BFloat16* p, int64_t count) { return load_half_part(p, count); }
CMHA_INLINE FVec load_partial(const Float16* p, int64_t count) { return load_half_part(p, count); }
#endif

template <class A>
CMHA_INLINE void store(A* p, typename Simd<A>::Vec v) {
  memcpy(p, &v, sizeof(v));
}

template <class A>
CMHA_INLINE void store_partial(A* p, typename Simd<A>::Vec v, int64_t count) {
  memcpy(p, &v, static_cast<size_t>(count) * sizeof(A));
}

// Conversions of kLanes elements: the bits of `narrow` for one, but for those that say which NaN.

CMHA_INLINE void narrow(FVec v, float* p) { store(p, v); }
CMHA_INLINE void narrow(DVec v, double* p) { store(p, v); }

CMHA_INLINE void narrow(FVec v, BFloat16* p) {
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  const Bits bits = bit_cast<Bits>(v);
  const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  // The processor's own conversion would make zeros of subnormal numbers.
  const FHalf half = __builtin_convertvector(v == v ? rounded : Bits{} + 0x7fc0u, FHalf);
  memcpy(p, &half, sizeof(half));
}

CMHA_INLINE void narrow(FVec v, Float16* p) {
#if defined(__AVX512F__)
  const __m256i half =
      _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
  memcpy(p, &half, sizeof(half));
#elif defined(__AVX2__)
  const __m128i half = _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
  memcpy(p, &half, sizeof(half));
#elif defined(__aarch64__)
  const FNative half = __builtin_convertvector(v, FNative);
  memcpy(p, &half, sizeof(half));
#else
  for (int i = 0; i < Simd<float>::kLanes; ++i) narrow(v[i], p + i);
#endif
}

// What is multiplied with several vectors, in a register: the compiler would load it anew for each
// of two or three, which takes as long as two products.
template <class Vec>
CMHA_INLINE Vec held(Vec v) {
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}

template <class A>
CMHA_INLINE typename Simd<A>::Vec broadcast(A x) {
  return x - typename Simd<A>::Vec{};
}

// Sums of kLanes vectors at once. In every stage each pair of vectors becomes one whose groups of
// lanes are half as long, by adding one half of each group to the other; a sum is made in the same
// order wherever in the tile it stands, so it is the same bits.
template <int kLanes>
struct Halves {
  // Lane of the concatenation (a, b) that stands at place i of the lower (or upper) halves of
  // groups of `group` lanes.
  static constexpr int index(int i, int group, bool upper) {
    const int half = group / 2;
    return (i / half) * group + i % half + (upper ? half : 0);
  }
};

template <class A>
struct Pair {
  typename Simd<A>::Vec low;
  typename Simd<A>::Vec high;
};

template <class A, int kGroup, int... kI>
struct SplitImpl {
  using Vec = typename Simd<A>::Vec;
  using Int = typename Simd<A>::Int;
  static CMHA_INLINE Pair<A> apply(Vec a, Vec b) {
    using Index = Halves<Simd<A>::kLanes>;
#if defined(__clang__)
    return {__builtin_shufflevector(a, b, Index::index(kI, kGroup, false)...),
            __builtin_shufflevector(a, b, Index::index(kI, kGroup, true)...)};
#else
    return {__builtin_shuffle(a, b, Int{Index::index(kI, kGroup, false)...}),
            __builtin_shuffle(a, b, Int{Index::index(kI, kGroup, true)...})};
#endif
  }
};

template <class A, int kGroup, int kLanes>
struct Split;
template <class A, int kGroup>
struct Split<A, kGroup, 2> : SplitImpl<A, kGroup, 0, 1> {};
template <class A, int kGroup>
struct Split<A, kGroup, 4> : SplitImpl<A, kGroup, 0, 1, 2, 3> {};
template <class A, int kGroup>
struct Split<A, kGroup, 8> : SplitImpl<A, kGroup, 0, 1, 2, 3, 4, 5, 6, 7> {};
template <class A, int kGroup>
struct Split<A, kGroup, 16>
    : SplitImpl<A, kGroup, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15> {};

// The two halves of what is added up in a stage of transposed_sum.
template <class A, int kGroup>
CMHA_INLINE Pair<A> split_to_add(typename Simd<A>::Vec a, typename Simd<A>::Vec b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // Within halves of the register as long as that goes, for which one instruction serves: what
  // Split takes from both at once takes three.
  const __m256 x = bit_cast<__m256>(a);
  const __m256 y = bit_cast<__m256>(b);
  const auto pair = [](__m256 low, __m256 high) __attribute__((always_inline)) {
    return Pair<A>{bit_cast<typename Simd<A>::Vec>(low), bit_cast<typename Simd<A>::Vec>(high)};
  };
  if constexpr (kGroup == 2) {
    return pair(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
  } else if constexpr (sizeof(A) == 4 && kGroup == 4) {
    return pair(_mm256_shuffle_ps(x, y, 0x88), _mm256_shuffle_ps(x, y, 0xdd));
  } else if constexpr (sizeof(A) == 4) {
    return pair(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xee));
  } else {
    return {bit_cast<DVec>(_mm256_unpacklo_pd(bit_cast<__m256d>(a), bit_cast<__m256d>(b))),
            bit_cast<DVec>(_mm256_unpackhi_pd(bit_cast<__m256d>(a), bit_cast<__m256d>(b)))};
  }
#else
  return Split<A, kGroup, Simd<A>::kLanes>::apply(a, b);
#endif
}

// v[0] of the result is the sum of the lanes of v[0], and so on; kCount vectors, kCount <= kLanes.
template <class A, int kGroup, int kCount>
CMHA_INLINE typename Simd<A>::Vec transposed_sum(const typename Simd<A>::Vec* v) {
  using Vec = typename Simd<A>::Vec;
  constexpr int kNext = (kCount + 1) / 2;
  Vec folded[kNext];
#pragma GCC unroll 16
  for (int i = 0; i < kNext; ++i) {
    const Vec& second = 2 * i + 1 < kCount ? v[2 * i + 1] : v[2 * i];
    const Pair<A> halves = split_to_add<A, kGroup>(v[2 * i], second);
    folded[i] = halves.low + halves.high;
  }
  if constexpr (kGroup == 2) {
    return folded[0];
  } else {
    return transposed_sum<A, kGroup / 2, kNext>(folded);
  }
}

// The bits of i < count in reverse order.
constexpr int reversed(int i, int count) {
  return count <= 1 ? 0 : (i & 1) * (count / 2) + reversed(i >> 1, count / 2);
}

// Vector i of the result has lane i of each of kLanes vectors, that of v[reversed(p)] at place p.
template <class A, int kGroup = Simd<A>::kLanes>
CMHA_INLINE void transpose(typename Simd<A>::Vec* v) {
  constexpr int kLanes = Simd<A>::kLanes;
#pragma GCC unroll 16
  for (int block = 0; block < kLanes; block += kGroup) {
#pragma GCC unroll 8
    for (int i = block; i < block + kGroup / 2; ++i) {
      const Pair<A> halves = Split<A, kGroup, kLanes>::apply(v[i], v[i + kGroup / 2]);
      v[i] = halves.low;
      v[i + kGroup / 2] = halves.high;
    }
  }
  if constexpr (kGroup > 2) transpose<A, kGroup / 2>(v);
}

template <class A>
CMHA_INLINE A sum_lanes(typename Simd<A>::Vec v) {
  return transposed_sum<A, Simd<A>::kLanes, 1>(&v)[0];
}

template <class A>
CMHA_INLINE A max_lanes(typename Simd<A>::Vec v) {
  A lanes[Simd<A>::kLanes];
  memcpy(lanes, &v, sizeof(v));
#pragma GCC unroll 4
  for (int half = Simd<A>::kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    }
  }
  return lanes[0];
}

// exp(x) for x <= 0, as a softmax needs it: 2^n e^r with n the nearest integer to x / ln 2 and a
// polynomial of degree 6 for e^r, |r| <= ln 2 / 2. At most 1.1 ulp from exact where the result is
// normal; below that it is 0. NaN stays NaN.
CMHA_INLINE FVec exp_nonpositive(FVec x) {
  const float kRound = 0x1.8p23f;  // adding it moves the integer part to the low bits
  const FVec shifted = x * 0x1.715476p0f + kRound;
  const FVec n = shifted - kRound;
  FVec r = x - n * 0x1.62e4p-1f;
  r = r - n * 0x1.7f7d1cp-20f;
  FVec p = broadcast<float>(0x1.6a2352p-10f);
  p = p * r + 0x1.123a6cp-7f;
  p = p * r + 0x1.5558f4p-5f;
  p = p * r + 0x1.55549p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r * r + r + 1.0f;
  // Unsigned, as it overflows far below -87, where the sum is not used.
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  const FVec scaled = bit_cast<FVec>(bit_cast<Bits>(p) + (bit_cast<Bits>(shifted) << 23));
  const FVec result = x < -87.0f ? FVec{} : scaled;
  return x != x ? x : result;
}

CMHA_INLINE DVec exp_nonpositive(DVec x) {
  DVec result;
  for (int i = 0; i < Simd<double>::kLanes; ++i) result[i] = __builtin_exp(x[i]);
  return result;
}

}  // namespace
}  // namespace continual_mha::cpu
