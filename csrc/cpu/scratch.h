// Pieces of a thread's scratch memory.
#pragma once

#include <cstdint>

#include "tiles.h"

namespace continual_mha::cpu {
namespace {

constexpr int64_t kScratchAlign = 64;

// Hands out pieces of a thread's scratch; with no memory behind it, it measures what is needed.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    char* piece = base_ + used_;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    used_ += (bytes + kScratchAlign - 1) / kScratchAlign * kScratchAlign;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(piece);
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Where `count` scores go to be factors of rows: they stay where they are, or get an array of their
// own.
template <class X, class A>
CMHA_INLINE X* factors_of(A* scores, int64_t count, Arena& arena) {
  if constexpr (std::is_same_v<X, A>) {
    return scores;
  } else {
    return arena.take<X>(count);
  }
}

template <class X, class A>
CMHA_INLINE void to_factors(const A* scores, int64_t count, X* factors) {
  if constexpr (!std::is_same_v<X, A>) copy_scaled(scores, count, A{1}, factors);
}

}  // namespace
}  // namespace continual_mha::cpu
