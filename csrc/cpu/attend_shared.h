// How operators hand an attention over a shared tile to its kernel.
#pragma once

#include <tuple>
#include <vector>

#include "host.h"

namespace continual_mha::cpu {

// Vectors (N, H, E*) whose features are next to each other; heads and streams may lie anywhere.
inline Tensor as_rows(const Tensor& x) { return x.stride(2) == 1 ? x : as_contiguous(x); }

// Tokens (N, S, E*) as `SharedTiles` are.
inline Tensor as_tiles(const Tensor& x) { return x.stride(1) == 1 ? x : as_rows(x); }

inline HeadVectors head_vectors(const Tensor& rows) {
  return {rows.const_data_ptr(), rows.stride(0), rows.stride(1)};
}

// Sizes, tiles (from `as_tiles`) and mask, (N or 1, H or 1, S) of acc.
AttendSharedParams shared_params(const Tensor& key, const Tensor& value, int64_t num_heads,
                                 const OptionalTensor& mask);

// Drop weights by `seed`, (1,), if there is one; `kept` (N, H) of acc is for what is left of them.
void set_dropout(AttendSharedParams& p, const OptionalTensor& seed, double dropout_p,
                 const Tensor& kept, const char* op);

// Run the kernel: queries and results are of `dtype`, or with `by_acc` of its accumulators.
void attend(const AttendSharedParams& p, DType dtype, bool by_acc);

// The weights that the kernel left in `p.weights`, averaged over the heads.
void average_weights(const AttendSharedParams& p, DType dtype, const Tensor& average);

// What cpu_attend_shared_full returns: out, lse, kept and average. With `blank` a query to which
// the mask leaves nothing gets zeros, else NaN.
using SharedResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;
SharedResults run_attend_shared(const Tensor& query, const Tensor& key, const OptionalTensor& value,
                                OptionalTensor mask, OptionalTensor sink,
                                const OptionalTensor& seed, double dropout_p, bool need_weights,
                                bool blank);

// What cpu_attend_shared_full_backward returns: gradients of query, key, value and sink. Without
// `of_tiles`, those of key and value have no elements.
using SharedGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;
SharedGradients run_attend_shared_backward(const Tensor& grad_out, OptionalTensor grad_lse,
                                           OptionalTensor grad_kept, OptionalTensor grad_average,
                                           const Tensor& query, const Tensor& key,
                                           const OptionalTensor& value, OptionalTensor mask,
                                           OptionalTensor sink, const OptionalTensor& seed,
                                           const Tensor& out, const Tensor& lse, const Tensor& kept,
                                           double dropout_p, bool of_tiles);

}  // namespace continual_mha::cpu
