// Rings of 8-bit numbers with a scale for every token and head, as continual_mha/quantized.py makes
// them: the same bits.
#pragma once

#include "kernels.h"
#include "tiles.h"

namespace continual_mha::cpu {
namespace {

struct Int8 {
  int8_t bits;
};

struct E4M3 {
  uint8_t bits;
};

typedef int8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));

// kLargest: the largest number that a code stands for. kUnit: what `load` leaves out of each.
template <class R>
struct CodeTraits;

template <>
struct CodeTraits<Int8> {
  static constexpr float kLargest = 127.0f;
  static constexpr float kUnit = 1.0f;
};

template <>
struct CodeTraits<E4M3> {
  static constexpr float kLargest = 448.0f;
  static constexpr float kUnit = 256.0f;
};

template <class R>
constexpr bool kIsCode = false;
template <>
constexpr bool kIsCode<Int8> = true;
template <>
constexpr bool kIsCode<E4M3> = true;

CMHA_INLINE FVec load(const Int8* p) {
#if defined(__AVX512F__)
  __m128i bytes;
  memcpy(&bytes, p, sizeof(bytes));
  return bit_cast<FVec>(
      _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes)));
#elif defined(__AVX2__)
  int64_t low;
  memcpy(&low, p, sizeof(low));
  const __m128i bytes = _mm_cvtsi64_si128(low);
  return bit_cast<FVec>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#else
  Bytes bytes;
  memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(__builtin_convertvector(bytes, FInt), FVec);
#endif
}

// The bits of e4m3, moved to their places in a number of half precision, mean 1 / 256 of what they
// mean in e4m3, subnormals included. The two codes that are no number come out as +-480 / 256:
// their token's scale is not finite and makes NaN of the row.
CMHA_INLINE FVec load(const E4M3* p) {
#if defined(__AVX512F__)
  __m128i bytes;
  memcpy(&bytes, p, sizeof(bytes));
  const __m256i moved = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
  const __m256i half = _mm256_and_si256(moved, _mm256_set1_epi16(static_cast<short>(0xbfff)));
  return bit_cast<FVec>(_mm512_maskz_cvtph_ps(0xffff, half));
#elif defined(__AVX2__)
  int64_t low;
  memcpy(&low, p, sizeof(low));
  const __m128i moved = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_cvtsi64_si128(low)), 7);
  const __m128i half = _mm_and_si128(moved, _mm_set1_epi16(static_cast<short>(0xbfff)));
  return bit_cast<FVec>(_mm256_cvtph_ps(half));
#else
  Bytes bytes;
  memcpy(&bytes, p, sizeof(bytes));
  const FInt code = __builtin_convertvector(bytes, FInt);
  const FInt rest = code & 0x7f;
  const FVec normal = bit_cast<FVec>((rest << 20) + (112 << 23));
  const FVec subnormal = __builtin_convertvector(rest, FVec) * 0x1p-17f;
  const FVec magnitude = rest < 8 ? subnormal : normal;
  return bit_cast<FVec>(bit_cast<FInt>(magnitude) | (code & INT32_MIN));
#endif
}

template <class R>
CMHA_INLINE FVec load_code_part(const R* p, int64_t count) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), p);
  return load(reinterpret_cast<const R*>(&bytes));
#elif defined(__AVX2__)
  uint64_t bytes = 0;  // put together in a register: from memory it would have to wait
  int64_t i = 0;
  const auto take = [&](auto piece) __attribute__((always_inline)) {
    memcpy(&piece, p + i, sizeof(piece));
    bytes |= uint64_t{piece} << 8 * i;
    i += sizeof(piece);
  };
  if (count & 4) take(uint32_t{});
  if (count & 2) take(uint16_t{});
  if (count & 1) take(uint8_t{});
  return load(reinterpret_cast<const R*>(&bytes));
#else
  R padded[Simd<float>::kLanes] = {};  // in pieces of fixed sizes: a call of memcpy costs more
  if (count & 4) memcpy(padded, p, 4);
  if (count & 2) memcpy(padded + (count & 4), p + (count & 4), 2);
  if (count & 1) padded[count - 1] = p[count - 1];
  return load(padded);
#endif
}

CMHA_INLINE FVec load_partial(const Int8* p, int64_t count) { return load_code_part(p, count); }
CMHA_INLINE FVec load_partial(const E4M3* p, int64_t count) { return load_code_part(p, count); }

// What to multiply sums over a row's codes by. A row whose scale is not finite is NaN throughout.
template <class R, class T>
CMHA_INLINE T unit_scale(T scale) {
  return (scale + (scale - scale)) * CodeTraits<R>::kUnit;
}

// scores[l] = row l . q for kLanes rows from `rows` on.
template <class R>
CMHA_INLINE FVec score_tile(const R* rows, int64_t head_dim, const float* q) {
  constexpr int kLanes = Simd<float>::kLanes;
  FVec acc[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= head_dim; i += kLanes) {
    const FVec x = load(q + i);
    for (int r = 0; i % 64 == 0 && r < kLanes; ++r) ask_ahead(rows + r * head_dim + i);
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) acc[r] += load(rows + r * head_dim + i) * x;
  }
  if (i < head_dim) {
    const FVec x = load_partial(q + i, head_dim - i);
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r)
      acc[r] += load_partial(rows + r * head_dim + i, head_dim - i) * x;
  }
  return transposed_sum<float, kLanes, kLanes>(acc);
}

// scores[l] = (row l . q) scale[l].
template <class R>
CMHA_TILE void score_codes(const R* rows, const float* scale, int64_t slots, int64_t head_dim,
                           const float* q, float* scores) {
  constexpr int kLanes = Simd<float>::kLanes;
  for (int64_t l = 0; l < slots; l += kLanes) {
    if (l + kLanes > slots) {
      if (slots < kLanes) break;
      l = slots - kLanes;  // once more over some rows, with the same bits
    }
    const FVec sum = score_tile(rows + l * head_dim, head_dim, q);
    store<float>(scores + l, sum * unit_scale<R>(load(scale + l)));
  }
  if (slots >= kLanes) return;
  for (int64_t l = 0; l < slots; ++l) {
    float sum;
    dot_tile<1, 1>(rows + l * head_dim, 0, q, 0, head_dim, &sum);
    scores[l] = sum * unit_scale<R>(scale[l]);
  }
}

// values[l] *= scale[l].
template <class R>
CMHA_INLINE void multiply_scales(const float* scale, int64_t rows, float* values) {
  constexpr int kLanes = Simd<float>::kLanes;
  int64_t l = 0;
  for (; l + kLanes <= rows; l += kLanes) {
    store<float>(values + l, load(values + l) * unit_scale<R>(load(scale + l)));
  }
  for (; l < rows; ++l) values[l] *= unit_scale<R>(scale[l]);
}

// Numbers, none beyond kLargest, to codes, rounded to nearest, ties to even.
CMHA_INLINE FInt encode(FVec x, const Int8*) {
  const float kRound = 0x1.8p23f;  // adding it moves the integer to the low bits
  const FInt code = bit_cast<FInt>(x + kRound) - bit_cast<int32_t>(kRound);
  return x == x ? code : FInt{};
}

CMHA_INLINE FInt encode(FVec x, const E4M3*) {
  const FInt bits = bit_cast<FInt>(x);
  const FInt magnitude = bits & INT32_MAX;
  const FInt normal = (magnitude - (120 << 23) + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
  // Adding 2^14 leaves the subnormal's digits, rounded, at the low end of the mantissa.
  const FInt small = bit_cast<FInt>(bit_cast<FVec>(magnitude) + 0x1p14f) - (141 << 23);
  const FInt code = magnitude < (121 << 23) ? small : normal;
  return (x == x ? code : FInt{} + 0x7f) | (bits >> 24 & 0x80);
}

// Stores `count` features of a token as codes; returns their scale.
template <class R, class S>
CMHA_TILE float quantize(const S* token, int64_t count, R* codes) {
  constexpr int kLanes = Simd<float>::kLanes;
  constexpr float kLargest = CodeTraits<R>::kLargest;
  const auto part = [&](int64_t i) __attribute__((always_inline)) {
    return count - i < kLanes ? load_partial(token + i, count - i) : load(token + i);
  };
  FVec most = {};
  FInt none = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const FVec x = part(i);
    const FVec magnitude = bit_cast<FVec>(bit_cast<FInt>(x) & INT32_MAX);
    most = magnitude > most ? magnitude : most;
    none |= x != x;
  }
  float scale = max_lanes<float>(most) / kLargest;
  for (int lane = 0; lane < kLanes; ++lane) scale = none[lane] != 0 ? __builtin_nanf("") : scale;
  // A subnormal scale would overflow its own inverse, and one of zero has none.
  const float divisor = scale < 0x1p-126f ? 0x1p-126f : scale;
  for (int64_t i = 0; i < count; i += kLanes) {
    FVec x = part(i) / divisor;
    x = x > kLargest ? broadcast(kLargest) : x;
    x = x < -kLargest ? broadcast(-kLargest) : x;
    const Bytes bytes = __builtin_convertvector(encode(x, codes), Bytes);
    memcpy(codes + i, &bytes, static_cast<size_t>(count - i < kLanes ? count - i : kLanes));
  }
  return scale;
}

// Tasks are tokens.
template <class S, class R>
void quantize_tokens(const QuantizeParams& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t group = 0; group < p.groups; ++group) {
      const S* x = static_cast<const S*>(p.x) + token * p.stride + group * p.width;
      const int64_t at = token * p.groups + group;
      p.scale[at] = quantize(x, p.width, static_cast<R*>(p.codes) + at * p.width);
    }
  }
}

// A row of a ring as acc.
template <class R, class A>
CMHA_INLINE void read_row(const R* row, const float* scale, int64_t count, A* to) {
  constexpr int kLanes = Simd<A>::kLanes;
  const A factor = [&] {
    if constexpr (kIsCode<R>) return unit_scale<R>(*scale);
    return A(1);
  }();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store<A>(to + i, kIsCode<R> ? load(row + i) * factor : load(row + i));
  }
  if (i < count) store_partial<A>(to + i, load_partial(row + i, count - i) * factor, count - i);
}

}  // namespace
}  // namespace continual_mha::cpu
