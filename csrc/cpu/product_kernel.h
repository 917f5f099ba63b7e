// Products of two matrices of which one has few rows, such as a batch's tokens with weights.
#pragma once

#include "kernels.h"
#include "project_kernel.h"
#include "scratch.h"
#include "tiles.h"

namespace continual_mha::cpu {
namespace {

constexpr int64_t kMostProductRows = 64;

// Of few summands the output is the most that passes: longer rows of it are written faster. The
// same holds of sums that are rounded on their way there.
template <class S>
ProductBlock product_block(const ProductParams& p) {
  const bool few = p.inner <= 32 || !std::is_same_v<S, typename AccOf<S>::type>;
  return few ? ProductBlock{32, 256} : ProductBlock{kMostProductRows, 128};
}

// Rows of the right that stay in the first-level cache, of which processors without AVX-512 have 32
// KB.
template <class S>
CMHA_INLINE int64_t inner_of(const ProductBlock& block) {
  constexpr int64_t kBytes = kTileVectors == 16 ? 32 << 10 : 16 << 10;
  return kBytes / (block.columns * int64_t{sizeof(S)});
}

template <class S>
struct ProductScratch {
  using A = typename AccOf<S>::type;
  using X = typename FactorOf<S>::type;

  ProductScratch(const ProductParams& p, void* memory) {
    Arena arena(memory);
    const ProductBlock task = product_block<S>(p);
    factors = arena.take<X>(task.rows * p.inner);
    block = arena.take<S>(inner_of<S>(task) * task.columns);
    sums = std::is_same_v<S, A> ? nullptr : arena.take<A>(task.rows * task.columns);
    bytes = arena.used();
  }

  X* factors;
  S* block;  // of the right
  A* sums;   // of a task, where the output is no acc
  int64_t bytes;
};

template <class S>
int64_t product_scratch(const ProductParams& p) {
  return ProductScratch<S>(p, nullptr).bytes;
}

// `rows` rows of the left, as factors (rows, inner).
template <class S, class X>
CMHA_INLINE void copy_factors(const ProductParams& p, const S* left, int64_t rows, X* factors) {
  if (p.left_inner <= p.left_row) {
    for (int64_t r = 0; r < rows; ++r) {
      gather_row(left + r * p.left_row, p.left_inner, p.inner, p.scale, factors + r * p.inner);
    }
    return;
  }
  X scaled[kMostProductRows];
  for (int64_t k = 0; k < p.inner; ++k) {
    gather_row(left + k * p.left_inner, p.left_row, rows, p.scale, scaled);
    for (int64_t r = 0; r < rows; ++r) factors[r * p.inner + k] = scaled[r];
  }
}

// Whether rows so many elements apart take turns in few places of the first-level cache.
template <class S>
CMHA_INLINE bool takes_turns(int64_t row) {
  return row * int64_t{sizeof(S)} % 2048 == 0;
}

// Whether rows of the right that take turns should be copied next to each other, for so many of the
// left.
CMHA_INLINE bool repays_packing(const ProductBlock& task, int64_t rows) {
  return rows > (kTileVectors == 16 ? task.rows / 2 : 8);
}

template <class X>
struct Factors {
  const X* data;
  int64_t row;   // elements from one row of the output to the next
  int64_t step;  // alike, of what is summed up; 1 unless X are acc

  Factors from(int64_t r, int64_t k) const { return {data + r * row + k * step, row, step}; }
};

// `rows` rows of the left: as they lie, or in `copy` where something is to be done to them, or what
// is summed up takes turns in the cache.
template <class S, class X>
CMHA_INLINE Factors<X> factors_of(const ProductParams& p, const S* left, int64_t rows, X* copy) {
  if constexpr (std::is_same_v<S, X>) {
    if (p.scale == 1) {
      if (p.left_row != 1 || !takes_turns<S>(p.left_inner)) return {left, p.left_row, p.left_inner};
      for (int64_t k = 0; k < p.inner; ++k) {
        copy_row(left + k * p.left_inner, rows, copy + k * rows);
      }
      return {copy, 1, rows};
    }
  }
  copy_factors(p, left, rows, copy);
  return {copy, p.inner, 1};
}

template <int kCount, bool kAdd, class S, class X, class A>
CMHA_INLINE void add_rows(const Factors<X>& factors, const S* block, int64_t block_row,
                          int64_t inner, int64_t columns, A* to, int64_t stride) {
  if constexpr (std::is_same_v<S, A>) {
    weighted_rows<kCount, kAdd>(factors.data, factors.row, block, block_row, 0, inner, columns, to,
                                stride, factors.step);
  } else {
    weighted_rows<kCount, kAdd>(factors.data, factors.row, block, block_row, 0, inner, columns, to,
                                stride);
  }
}

// Tasks are the blocks of a batch's output.
template <class S>
void multiply(const ProductParams& p, void* memory, int64_t begin, int64_t end) {
  using A = typename AccOf<S>::type;
  using X = typename FactorOf<S>::type;
  const ProductScratch<S> scratch(p, memory);
  const ProductBlock block_of_task = product_block<S>(p);
  const int64_t across = (p.columns + block_of_task.columns - 1) / block_of_task.columns;
  const int64_t down = (p.rows + block_of_task.rows - 1) / block_of_task.rows;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t batch = task / (across * down);
    const int64_t row = task / across % down * block_of_task.rows;
    const int64_t column = task % across * block_of_task.columns;
    const int64_t rows = min_of(block_of_task.rows, p.rows - row);
    const int64_t columns = min_of(block_of_task.columns, p.columns - column);
    const S* left = static_cast<const S*>(p.left) + batch * p.left_batch + row * p.left_row;
    const S* right = static_cast<const S*>(p.right) + batch * p.right_batch + column;
    S* out = static_cast<S*>(p.out) + batch * p.out_batch + row * p.out_row + column;
    A* sums;
    int64_t stride;
    if constexpr (std::is_same_v<S, A>) {
      sums = out;
      stride = p.out_row;
    } else {
      sums = scratch.sums;
      stride = columns;
      for (int64_t r = 0; p.add && r < rows; ++r) {
        copy_row(out + r * p.out_row, columns, sums + r * stride);
      }
    }
    const Factors<X> factors = factors_of(p, left, rows, scratch.factors);
    int64_t k = 0;
    do {  // sums of nothing are zeros
      const int64_t inner = min_of(inner_of<S>(block_of_task), p.inner - k);
      const S* block = right + k * p.right_row;
      int64_t block_row = p.right_row;
      if (takes_turns<S>(p.right_row) && repays_packing(block_of_task, rows)) {
        for (int64_t i = 0; i < inner; ++i) {
          copy_row(block + i * p.right_row, columns, scratch.block + i * columns);
        }
        block = scratch.block;
        block_row = columns;
      }
      by_fours(0, rows, [&](int64_t r, auto tag) __attribute__((always_inline)) {
        constexpr int kCount = decltype(tag)::value;
        const Factors<X> those = factors.from(r, k);
        A* to = sums + r * stride;
        if (p.add || k > 0) {
          add_rows<kCount, true>(those, block, block_row, inner, columns, to, stride);
        } else {
          add_rows<kCount, false>(those, block, block_row, inner, columns, to, stride);
        }
      });
      k += inner_of<S>(block_of_task);
    } while (k < p.inner);
    if constexpr (!std::is_same_v<S, A>) {
      for (int64_t r = 0; r < rows; ++r) {
        copy_row(sums + r * stride, columns, out + r * p.out_row);
      }
    }
  }
}

template <class S>
constexpr void set_products(Kernels& table) {
  table.product_block = product_block<S>;
  table.product_scratch = product_scratch<S>;
  table.multiply = multiply<S>;
}

}  // namespace
}  // namespace continual_mha::cpu
