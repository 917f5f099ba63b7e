#include "project_backward.h"

#include <array>

namespace continual_mha::cpu {
namespace {

// Of so many tokens PyTorch's products are faster than the kernels', if it has fast ones.
constexpr int64_t kManyTokens = 65;

bool torch_multiplies(int64_t tokens, DType dtype) {
  return tokens >= kManyTokens && torch_has_fast(dtype);
}

void multiply_by_torch(const Tensor& out, const Tensor& left, const Tensor& right) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(left),
                                    torch::stable::detail::from(right),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // releases what was returned, which is `out`
}

// out = left^T right, both of as many tokens.
void sum_tokens(const Tensor& out, const Tensor& left, const Tensor& right, DType dtype) {
  if (torch_multiplies(left.size(0), dtype)) {
    return multiply_by_torch(out, torch::stable::transpose(left, 0, 1), right);
  }
  multiply({Matrices::of(out), Matrices::of(left).transposed(), Matrices::of(right)}, dtype);
}

void sum_rows(const OptionalTensor& to, const Tensor& x, DType dtype) {
  if (!to) return;
  const Matrices row = Matrices::contiguous(to->const_data_ptr(), 1, x.size(1));
  multiply({row, ones(x.size(0), dtype), matrix(x)}, dtype);
}

Tensor columns_of(const Tensor& x, int64_t first, int64_t count) {
  return torch::stable::narrow(const_cast<Tensor&>(x), 1, first, count);
}

Tensor as_matrix(const Tensor& x) {
  return x.dim() == 2 ? x : torch::stable::view(x, {x.size(0) * x.size(1), x.size(2)});
}

}  // namespace

Gradients new_gradients(const OptionalTensor (&given)[kArguments], const std::vector<bool>& needed,
                        const char* op) {
  STD_TORCH_CHECK(needed.size() == kArguments, op, ": needed must be of ", kArguments,
                  " arguments");
  Gradients grads(kArguments);
  for (int i = 0; i < kArguments; ++i) {
    if (needed[i] && given[i]) grads[i] = new_like(*given[i]);
  }
  return grads;
}

TokenRows::TokenRows(const Tensor& query, const OptionalTensor& key, const OptionalTensor& value,
                     const char* op)
    : of{query, key ? *key : query, value ? *value : query}, shared{true, !key, !value} {
  for (int i = 0; i < 3; ++i) {
    Tensor& x = of[i];
    if (i > 0 && shared[i]) {
      x = of[0];
      continue;
    }
    STD_TORCH_CHECK(x.dim() == query.dim() && (x.dim() == 2 || x.dim() == 3), op,
                    ": tokens must be (N, E) or (N, T, E)");
    if (x.dim() == 3) x = flat(x);
    if (x.stride(1) != 1) x = torch::stable::contiguous(x);
  }
}

void multiply_tokens(const Tensor& out, const Tensor& tokens, const Tensor& weight, DType dtype) {
  const bool keeps_apart = dtype != DType::kBFloat16 || torch_keeps_rows_apart(tokens.size(1));
  if (keeps_apart && torch_multiplies(tokens.size(0), dtype)) {
    return multiply_by_torch(out, tokens, weight);
  }
  multiply({Matrices::of(out), Matrices::of(tokens), Matrices::of(weight)}, dtype);
}

Tensor project_tokens(const TokenRows& tokens, const Weights& w, DType dtype) {
  const Projection* by = projection_of(w, dtype, tokens.count(), false);
  const bool packed = !w.k_proj_weight;
  const int64_t e = w.out_proj_weight.size(0);
  if (by == nullptr && packed && tokens.all_shared()) {
    return linear(tokens.of[0], w.in_proj_weight, w.in_proj_bias);
  }
  const Tensor projected = new_like(tokens.of[0], {tokens.count(), 3 * e});
  const InWeights in(w);
  const Tensor weights[] = {in.q, packed ? in.q : *in.k, packed ? in.q : *in.v};
  const bool at_once = packed && tokens.all_shared();
  for (int i = 0; i < (at_once ? 1 : 3); ++i) {
    Matrices out = matrix(projected);
    out.data = third_at(out.data, i, e, dtype);
    out.columns = at_once ? 3 * e : e;
    const void* weight = third_at(weights[i].const_data_ptr(), packed ? i : 0, e * e, dtype);
    const Matrices rows = Matrices::contiguous(weight, out.columns, tokens.of[i].size(1));
    const void* bias = third_at(data_or_null(w.in_proj_bias), i, e, dtype);
    multiply({out, Matrices::of(tokens.of[i]), rows.transposed(), bias}, dtype);
  }
  return projected;
}

Tensor project_out(const Tensor& heads, const Weights& w, DType dtype) {
  if (projection_of(w, dtype, heads.size(0), false) == nullptr) {
    return linear(heads, w.out_proj_weight, w.out_proj_bias);
  }
  const Tensor out = new_like(heads);
  const Tensor weight = as_contiguous(w.out_proj_weight);
  multiply({matrix(out), matrix(heads), matrix(weight).transposed(), data_or_null(w.out_proj_bias)},
           dtype);
  return out;
}

void project_backward(const Tensor& d_tokens, const TokenRows& tokens, const InWeights& in,
                      DType dtype, const Gradients& grads) {
  const bool packed = !in.k;
  const int64_t e = in.q.size(1);
  sum_rows(grads[kInBias], d_tokens, dtype);
  if (packed && tokens.all_shared()) {
    if (const OptionalTensor& to = grads[kInWeight]) {
      sum_tokens(*to, d_tokens, tokens.of[0], dtype);
    }
    if (grads[kQuery]) multiply_tokens(as_matrix(*grads[kQuery]), d_tokens, in.q, dtype);
    return;
  }
  const Tensor weights[] = {in.q, packed ? in.q : *in.k, packed ? in.q : *in.v};
  for (int i = 0; i < 3; ++i) {
    const Tensor part = columns_of(d_tokens, i * e, e);
    const auto part_of = [&](const Tensor& weight) {  // (E, E*)
      return packed ? torch::stable::narrow(const_cast<Tensor&>(weight), 0, i * e, e) : weight;
    };
    if (const OptionalTensor& to = grads[packed ? kInWeight : kInWeight + i]) {
      sum_tokens(part_of(*to), part, tokens.of[i], dtype);
    }
    if (const OptionalTensor& to = grads[tokens.shared[i] ? kQuery : kQuery + i]) {
      if (i > 0 && tokens.shared[i]) {
        multiply({matrix(*to), Matrices::of(part), Matrices::of(part_of(weights[i])), nullptr, 1.0,
                  true},
                 dtype);
      } else {
        multiply_tokens(as_matrix(*to), part, part_of(weights[i]), dtype);
      }
    }
  }
}

void project_out_backward(const Tensor& d_out, const Tensor& heads, DType dtype,
                          const Gradients& grads) {
  sum_rows(grads[kOutBias], d_out, dtype);
  if (const OptionalTensor& to = grads[kOutWeight]) {
    sum_tokens(*to, d_out, heads, dtype);
  }
}

}  // namespace continual_mha::cpu
