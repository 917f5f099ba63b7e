// What the nodes of autograd that step have in common: their tokens, and the gradients of their
// projections.
#pragma once

#include <vector>

#include "product.h"

namespace continual_mha::cpu {

// The arguments that may need a gradient, as they follow each other.
enum Argument {
  kQuery,
  kKey,
  kValue,
  kKRing,
  kVRing,
  kInWeight,
  kKWeight,
  kVWeight,
  kInBias,
  kOutWeight,
  kOutBias,
  kArguments
};

using Gradients = std::vector<OptionalTensor>;

// Memory for the gradients of those arguments that are there and need one.
Gradients new_gradients(const OptionalTensor (&given)[kArguments], const std::vector<bool>& needed,
                        const char* op);

// Query, key and value, (tokens, E*), features next to each other. Those of null are the query.
struct TokenRows {
  Tensor of[3];
  bool shared[3];  // with the query

  // From (N, E*), or (N, T, E*) as a matrix of N T rows.
  TokenRows(const Tensor& query, const OptionalTensor& key, const OptionalTensor& value,
            const char* op);

  bool all_shared() const { return shared[1] && shared[2]; }
  int64_t count() const { return of[0].size(0); }
};

// A contiguous tensor as a matrix of its last axis.
inline Matrices matrix(const Tensor& x) {
  const int64_t columns = x.size(x.dim() - 1);
  return Matrices::contiguous(x.const_data_ptr(), columns == 0 ? 0 : x.numel() / columns, columns);
}

// out = tokens weight for (tokens, inner) and (inner, columns), by these kernels or by torch,
// whichever is faster.
void multiply_tokens(const Tensor& out, const Tensor& tokens, const Tensor& weight, DType dtype);

// Query, key and value projected, (tokens, 3E).
Tensor project_tokens(const TokenRows& tokens, const Weights& w, DType dtype);

// The heads' outputs (tokens, E) projected.
Tensor project_out(const Tensor& heads, const Weights& w, DType dtype);

// Gradients of tokens and of the in-projection's weights and biases from those of projected tokens,
// (tokens, 3E): into `grads`, as far as there is a place for them.
void project_backward(const Tensor& d_tokens, const TokenRows& tokens, const InWeights& in,
                      DType dtype, const Gradients& grads);

// The same for the out-projection's, from those of its results and from what it projected,
// (tokens, E).
void project_out_backward(const Tensor& d_out, const Tensor& heads, DType dtype,
                          const Gradients& grads);

}  // namespace continual_mha::cpu
