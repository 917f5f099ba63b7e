// The two inner loops that everything here consists of: dot products of contiguous rows with a few
// vectors, and weighted sums of contiguous rows.
#pragma once

#include <type_traits>

#include "vec.h"

namespace continual_mha::cpu {
namespace {

template <class T>
CMHA_INLINE T min_of(T a, T b) {
  return a < b ? a : b;
}

template <class T>
CMHA_INLINE T max_of(T a, T b) {
  return a > b ? a : b;
}

template <class From, class To, class A>
CMHA_INLINE void copy_scaled(const From* from, int64_t count, A scale, To* to) {
  constexpr int kLanes = Simd<A>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) narrow(load(from + i) * scale, to + i);
  for (; i < count; ++i) narrow(widen(from[i]) * scale, to + i);
}

template <class From, class To>
CMHA_INLINE void copy_row(const From* from, int64_t count, To* to) {
  if constexpr (std::is_same_v<From, To>) {
    memcpy(to, from, static_cast<size_t>(count) * sizeof(To));
  } else {
    copy_scaled(from, count, typename AccOf<From>::type{1}, to);
  }
}

// What the rows of S are multiplied with in the products of clips: acc, or S where the instruction
// set has such products.
template <class S>
struct FactorOf {
  using type = typename AccOf<S>::type;
};

// A number as a type, to choose a template's argument inside a generic lambda.
template <int kValue>
struct Int {
  static constexpr int value = kValue;
};

// f(i, Int<c>) for groups of c <= 4 that make up [begin, end).
template <class F>
CMHA_INLINE void by_fours(int64_t begin, int64_t end, const F& f) {
  for (; begin + 4 <= end; begin += 4) f(begin, Int<4>{});
  if (end - begin == 3) f(begin, Int<3>{});
  if (end - begin == 2) f(begin, Int<2>{});
  if (end - begin == 1) f(begin, Int<1>{});
}

// sums[i] is the sum of the lanes of acc[i].
template <class A, int kCount>
CMHA_INLINE void store_sums(const typename Simd<A>::Vec* acc, A* sums) {
  constexpr int kLanes = Simd<A>::kLanes;
  constexpr int kGroup = kCount < kLanes ? kCount : kLanes;
  const typename Simd<A>::Vec sum = transposed_sum<A, kLanes, kGroup>(acc);
  memcpy(sums, &sum, kGroup * sizeof(A));
  if constexpr (kCount > kGroup) store_sums<A, kCount - kGroup>(acc + kGroup, sums + kGroup);
}

// sums[r * kC + c] = row r . x c over `count` elements. Each sum has one accumulator and one order
// of addition whatever kR and kC are, so its bits do not depend on them. With kAsk what follows
// each row is asked for.
template <int kR, int kC, bool kAsk = false, class S, class A>
CMHA_TILE void dot_tile(const S* rows, int64_t row_stride, const A* x, int64_t x_stride,
                        int64_t count, A* sums) {
  using Vec = typename Simd<A>::Vec;
  constexpr int kLanes = Simd<A>::kLanes;
  Vec acc[kR * kC] = {};
  Vec xs[kC];
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) xs[c] = load(x + c * x_stride + i);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const S* at = rows + r * row_stride + i;
      if (kAsk) __builtin_prefetch(at + count);
      const Vec w = held(load(at));
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) acc[r * kC + c] += w * xs[c];
    }
  }
  if (i < count) {
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) xs[c] = load_partial(x + c * x_stride + i, count - i);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const Vec w = load_partial(rows + r * row_stride + i, count - i);
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) acc[r * kC + c] += w * xs[c];
    }
  }
  store_sums<A, kR * kC>(acc, sums);
}

// dot_tile<kCount, kC>, in two parts where the registers ask for it.
template <int kCount, int kC, bool kAsk = false, class S, class X, class A>
CMHA_INLINE void dot_rows_tile(const S* rows, int64_t row_stride, const X* x, int64_t x_stride,
                               int64_t count, A* sums) {
  constexpr int kMostSums = kTileVectors == 16 ? 24 : 12;
  constexpr int kR = kCount * kC <= kMostSums ? kCount : kCount / 2;
  for (int r = 0; r < kCount; r += kR) {
    dot_tile<kR, kC, kAsk>(rows + r * row_stride, row_stride, x, x_stride, count, sums + r * kC);
  }
}

// Calls tile(row, stride, Int<rows>) for tiles of kRows and fewer that make up the rows [begin,
// end). A tile's rows lie a stretch apart, `stride` rows, so that each is the next of a stream
// through memory that the hardware's prefetcher follows: side by side they would be as many short
// streams, which it does not, and half as fast.
template <int kRows, class Tile>
CMHA_INLINE void tiles_of_rows(int64_t begin, int64_t end, const Tile& tile) {
  const int64_t stretch = (end - begin) / kRows;
  for (int64_t r = begin; r < begin + stretch; ++r) tile(r, stretch, Int<kRows>{});
  int64_t r = begin + kRows * stretch;
  for (; r + 2 <= end; r += 2) tile(r, 1, Int<2>{});
  if (r < end) tile(r, 0, Int<1>{});
}

// Asks for what comes 6 KB after `p`, where rows are read one after another.
template <class S>
CMHA_INLINE void ask_ahead(const S* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 6144);
}

// The compiler moves no load across this: read in turns, rows are as many streams to the hardware.
CMHA_INLINE void keep_order() { __asm__ volatile("" ::: "memory"); }

// Rows that fit into one vector, as many as there are lanes: the lanes of all are added up
// together.
template <class S, class A>
CMHA_TILE void dot_short_tile(const S* rows, int64_t row_stride, const A* x, int64_t count,
                              A* sums) {
  using Vec = typename Simd<A>::Vec;
  constexpr int kLanes = Simd<A>::kLanes;
  const bool full = count == kLanes;
  const Vec xs = full ? load(x) : load_partial(x, count);
  for (int r = 0; r < kLanes; ++r) ask_ahead(rows + r * row_stride);
  Vec acc[kLanes] = {};
  if (full) {
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) acc[r] += load(rows + r * row_stride) * xs;
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) acc[r] += load_partial(rows + r * row_stride, count) * xs;
  }
  store_sums<A, kLanes>(acc, sums);
}

// dot_tile<kR, 1> of rows side by side, in the order of memory, with the same bits.
template <int kR, class S, class A>
CMHA_TILE void dot_next_tile(const S* rows, int64_t row_stride, const A* x, int64_t count,
                             A* sums) {
  using Vec = typename Simd<A>::Vec;
  constexpr int kLanes = Simd<A>::kLanes;
  Vec acc[kR] = {};
  int64_t i = 0;
  const auto add = [&](auto tag) __attribute__((always_inline)) {
    constexpr int kVecs = decltype(tag)::value;
    for (; i + kVecs * kLanes <= count; i += kVecs * kLanes) {
      Vec xs[kVecs];
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) xs[j] = load(x + i + j * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) {
        keep_order();
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) {
          const S* at = rows + r * row_stride + i + j * kLanes;
          if (j * kLanes * sizeof(S) % 64 == 0) ask_ahead(at);
          acc[r] += load(at) * xs[j];
        }
      }
    }
  };
  add(Int<8>{});
  add(Int<4>{});
  add(Int<1>{});
  if (i < count) {
    const Vec xs = load_partial(x + i, count - i);
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
      const S* at = rows + r * row_stride + i;
      ask_ahead(at);
      acc[r] += load_partial(at, count - i) * xs;
    }
  }
  store_sums<A, kR>(acc, sums);
}

// emit(row, row . x) for rows [begin, end), front to back: a head of a ring is too short for four
// streams, which the hardware would have to find anew for each.
template <class S, class A, class Emit>
CMHA_INLINE void dot_rows_in_order(const S* rows, int64_t row_stride, int64_t begin, int64_t end,
                                   const A* x, int64_t count, const Emit& emit) {
  constexpr int kLanes = Simd<A>::kLanes;
  for (; count <= kLanes && begin + kLanes <= end; begin += kLanes) {
    A sums[kLanes];
    dot_short_tile(rows + begin * row_stride, row_stride, x, count, sums);
    for (int r = 0; r < kLanes; ++r) emit(begin + r, sums[r]);
  }
  by_fours(begin, end, [&](int64_t row, auto tag) __attribute__((always_inline)) {
    constexpr int kCount = decltype(tag)::value;
    A sums[kCount];
    dot_next_tile<kCount>(rows + row * row_stride, row_stride, x, count, sums);
    for (int r = 0; r < kCount; ++r) emit(row + r, sums[r]);
  });
}

// emit(row, c, row . x c) for rows [begin, end) and kC vectors x.
template <int kC, class S, class X, class Emit>
CMHA_INLINE void dot_rows(const S* rows, int64_t row_stride, int64_t begin, int64_t end, const X* x,
                          int64_t x_stride, int64_t count, const Emit& emit) {
  using A = typename AccOf<X>::type;
  if constexpr (kC == 1 && std::is_same_v<X, A>) {
    dot_rows_in_order(rows, row_stride, begin, end, x, count,
                      [&](int64_t row, A sum)
                          __attribute__((always_inline)) { emit(row, 0, sum); });
    return;
  }
  tiles_of_rows<6>(
      begin, end, [&](int64_t row, int64_t stretch, auto tag) __attribute__((always_inline)) {
        constexpr int kCount = decltype(tag)::value;
        const S* first = rows + row * row_stride;
        A sums[kCount * kC];
        dot_rows_tile<kCount, kC>(first, stretch * row_stride, x, x_stride, count, sums);
        for (int r = 0; r < kCount; ++r) {
          for (int c = 0; c < kC; ++c) emit(row + r * stretch, c, sums[r * kC + c]);
        }
      });
}

// out[q][0..columns) = sum over rows l of p[q][l] * row l, or += with kAdd, for kQ rows of weights
// and kVecs vectors of columns, or with kTail for `tail` columns of one vector. The rows are
// dealt out to kPhases accumulators, so that a narrow chunk is not bound by the latency of one
// addition. Weights of neighbouring rows are `p_step` apart.
template <int kQ, int kVecs, int kPhases, bool kTail, bool kAdd, class S, class A>
CMHA_TILE void weighted_tile(const A* p, int64_t p_stride, int64_t p_step, const S* rows,
                             int64_t row_stride, int64_t begin, int64_t end, int64_t tail, A* out,
                             int64_t out_stride) {
  using Vec = typename Simd<A>::Vec;
  constexpr int kLanes = Simd<A>::kLanes;
  Vec acc[kPhases][kQ][kVecs] = {};
  const auto add_row = [&](Vec(*sums)[kVecs], int64_t l) __attribute__((always_inline)) {
    const S* row = rows + l * row_stride;
    if constexpr (kQ == 1) keep_order();
#pragma GCC unroll 16
    for (int j = 0; j < kVecs; ++j) {
      if (kQ == 1 && j * kLanes * sizeof(S) % 64 == 0) {
        ask_ahead(row + j * kLanes);
      }
      const Vec v = held(kTail ? load_partial(row + j * kLanes, tail) : load(row + j * kLanes));
#pragma GCC unroll 4
      for (int q = 0; q < kQ; ++q) sums[q][j] += p[q * p_stride + l * p_step] * v;
    }
  };
  int64_t l = begin;
  for (; l + kPhases <= end; l += kPhases) {
#pragma GCC unroll 4
    for (int phase = 0; phase < kPhases; ++phase) add_row(acc[phase], l + phase);
  }
  for (; l < end; ++l) add_row(acc[0], l);
#pragma GCC unroll 4
  for (int q = 0; q < kQ; ++q) {
#pragma GCC unroll 16
    for (int j = 0; j < kVecs; ++j) {
      Vec sum = acc[0][q][j];
#pragma GCC unroll 4
      for (int phase = 1; phase < kPhases; ++phase) sum += acc[phase][q][j];
      A* to = out + q * out_stride + j * kLanes;
      if constexpr (kAdd) sum += kTail ? load_partial(to, tail) : load(to);
      if constexpr (kTail) {
        store_partial<A>(to, sum, tail);
      } else {
        store<A>(to, sum);
      }
    }
  }
}

// The same for any number of columns.
template <int kQ, bool kAdd = false, class S, class A>
CMHA_INLINE void weighted_rows(const A* p, int64_t p_stride, const S* rows, int64_t row_stride,
                               int64_t begin, int64_t end, int64_t columns, A* out,
                               int64_t out_stride, int64_t p_step = 1) {
  constexpr int kLanes = Simd<A>::kLanes;
  int64_t d = 0;
  const auto chunks_of = [&](auto tag) __attribute__((always_inline)) {
    constexpr int kVecs = decltype(tag)::value;
    constexpr int kSpare = kTileVectors / (kVecs * kQ);
    constexpr int kPhases = kSpare < 1 ? 1 : kSpare > 4 ? 4 : kSpare;
    for (; d + kVecs * kLanes <= columns; d += kVecs * kLanes) {
      weighted_tile<kQ, kVecs, kPhases, false, kAdd>(p, p_stride, p_step, rows + d, row_stride,
                                                     begin, end, 0, out + d, out_stride);
    }
  };
  if constexpr (kTileVectors / kQ >= 16) chunks_of(Int<16>{});
  if constexpr (kTileVectors / kQ >= 8) chunks_of(Int<8>{});
  if constexpr (kTileVectors / kQ >= 4) chunks_of(Int<4>{});
  chunks_of(Int<2>{});
  chunks_of(Int<1>{});
  if (d < columns) {
    weighted_tile<kQ, 1, 4, true, kAdd>(p, p_stride, p_step, rows + d, row_stride, begin, end,
                                        columns - d, out + d, out_stride);
  }
}

template <class A>
constexpr A kMinusInfinity = -static_cast<A>(__builtin_inff());

template <class A>
CMHA_INLINE A exp_of(A x) {
  return static_cast<A>(__builtin_exp(static_cast<double>(x)));
}

// exp(scale (x - max)) in place over `count` scores, whose array reaches to the next multiple of
// kLanes. Returns the maximum, which also counts the score `sink`, and the sum, which does not.
template <class A>
struct SoftmaxSum {
  A max;
  A sum;
};

template <class A>
CMHA_INLINE SoftmaxSum<A> softmax_numerators(A* scores, int64_t count, A sink, A scale = 1) {
  using Vec = typename Simd<A>::Vec;
  constexpr int kLanes = Simd<A>::kLanes;
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = count; i < padded; ++i) scores[i] = kMinusInfinity<A>;
  Vec highest = load(scores);
  for (int64_t i = kLanes; i < padded; i += kLanes) {
    const Vec x = load(scores + i);
    highest = x > highest ? x : highest;
  }
  const A max = max_of(max_lanes<A>(highest), sink);
  Vec sum = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vec e = exp_nonpositive((load(scores + i) - max) * scale);
    store<A>(scores + i, e);
    sum += e;
  }
  return {max, sum_lanes<A>(sum)};
}

}  // namespace
}  // namespace continual_mha::cpu

#if defined(__AVX512BF16__)
#include "bfloat16_pairs.h"
#endif
