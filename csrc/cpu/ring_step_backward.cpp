// continual_mha::cpu_ring_step_backward: gradients of a step that made rings of its own, without
// extra slots and without queries that wait.
#include <utility>
#include <vector>

#include "product.h"

namespace continual_mha::cpu {
namespace {

constexpr const char* kOp = "cpu_ring_step_backward";

struct GradientTag {};

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

// Key and value of null are the query. The rings are those with the token, which came at
// `position`, and `grad_k_ring` and `grad_v_ring` their gradients, null for none.
std::vector<OptionalTensor> ring_step_backward(
    Tensor grad_out, OptionalTensor grad_k_ring, OptionalTensor grad_v_ring, Tensor query,
    OptionalTensor key, OptionalTensor value, Tensor k_ring, Tensor v_ring, Tensor in_proj_weight,
    OptionalTensor k_proj_weight, OptionalTensor v_proj_weight, OptionalTensor in_proj_bias,
    Tensor out_proj_weight, OptionalTensor out_proj_bias, Tensor position,
    std::vector<bool> needed) {
  const Weights w{in_proj_weight,  k_proj_weight, v_proj_weight, in_proj_bias,
                  out_proj_weight, out_proj_bias, std::nullopt,  std::nullopt};
  STD_TORCH_CHECK(needed.size() == kArguments, kOp, ": needed must be of ", kArguments,
                  " arguments");
  STD_TORCH_CHECK(query.dim() == 2 && k_ring.dim() == 4, kOp,
                  ": query must be (N, E), and the rings (N, H, L, D)");
  const int64_t n = k_ring.size(0);
  const int64_t heads = k_ring.size(1);
  const int64_t length = k_ring.size(2);
  const int64_t d = k_ring.size(3);
  const int64_t e = heads * d;
  STD_TORCH_CHECK(e > 0 && length > 0, kOp, ": a ring has no slot");
  const Tensor tokens[] = {query, key ? *key : query, value ? *value : query};
  for (const Tensor& x : tokens) {
    check_like(x, k_ring, kOp, "a token");
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == n, kOp, ": tokens must be (", n, ", E)");
  }
  check_weights(w, e, tokens[1].size(1), tokens[2].size(1), k_ring, kOp);
  check_shape(query, {n, e}, kOp, "query");
  check_like(grad_out, k_ring, kOp, "grad_out");
  check_shape(grad_out, {n, e}, kOp, "grad_out");
  check_position(position, n, k_ring, kOp);
  for (const OptionalTensor& x :
       {OptionalTensor{k_ring}, OptionalTensor{v_ring}, grad_k_ring, grad_v_ring}) {
    if (!x) continue;
    check_like(*x, k_ring, kOp, "a ring");
    check_shape(*x, {n, heads, length, d}, kOp, "a ring");
  }
  STD_TORCH_CHECK(k_ring.is_contiguous() && v_ring.is_contiguous(), kOp,
                  ": rings must be contiguous");
  if (grad_k_ring) grad_k_ring = as_contiguous(*grad_k_ring);
  if (grad_v_ring) grad_v_ring = as_contiguous(*grad_v_ring);
  const DType dtype = dtype_of(query, kOp);
  const InWeights in(w);
  const Tensor w_o = as_contiguous(out_proj_weight);
  const Tensor d_out = as_contiguous(grad_out);
  const bool packed = !k_proj_weight;
  const OptionalTensor* own_weights[] = {nullptr, &in.k, &in.v};
  const auto weight_of = [&](int i) {  // (E, E*)
    const void* data = packed || i == 0 ? third_at(in.q.const_data_ptr(), i, e * e, dtype)
                                        : (*own_weights[i])->const_data_ptr();
    return Matrices::contiguous(data, e, tokens[i].size(1));
  };
  const auto product = [&](const Matrices& out, const Matrices& left, const Matrices& right,
                           const void* bias = nullptr, bool add = false) {
    multiply({out, left, right, bias, 1.0, add}, dtype);
  };
  const auto rows = [&](const Tensor& x) {
    return Matrices::contiguous(x.const_data_ptr(), n, x.size(1));
  };

  std::vector<OptionalTensor> grads(kArguments);
  const auto like = [&](int i, const OptionalTensor& x) {
    if (!needed[i] || !x) return;
    grads[i] = x->dim() == 4   ? new_like(*x, {n, heads, length, d})
               : x->dim() == 2 ? new_like(*x, {x->size(0), x->size(1)})
                               : new_like(*x, {x->size(0)});
  };
  const OptionalTensor given[] = {
      query,         key,           value,        k_ring,          v_ring,       in_proj_weight,
      k_proj_weight, v_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias};
  for (int i = 0; i < kArguments; ++i) like(i, given[i]);

  const Tensor q = new_like(query, {n, e});
  const Tensor d_heads = new_like(query, {n, e});
  const Tensor attended = new_like(query, {n, e});
  const Tensor d_tokens = new_like(query, {n, 3 * e});
  const Tensor asking = query.stride(1) == 1 ? query : torch::stable::contiguous(query);
  product(rows(q), Matrices::of(asking), weight_of(0).transposed(), data_or_null(in_proj_bias));
  product(rows(d_heads), rows(d_out), Matrices::contiguous(w_o.const_data_ptr(), e, e));
  RingGradientParams p{};
  p.q = q.const_data_ptr();
  p.k_ring = k_ring.const_data_ptr();
  p.v_ring = v_ring.const_data_ptr();
  p.grad_heads = d_heads.const_data_ptr();
  p.grad_k_ring = data_or_null(grad_k_ring);
  p.grad_v_ring = data_or_null(grad_v_ring);
  p.position = static_cast<const int64_t*>(position.const_data_ptr());
  p.heads = attended.mutable_data_ptr();
  p.grad_tokens = d_tokens.mutable_data_ptr();
  p.grad_k_before = grads[kKRing] ? grads[kKRing]->mutable_data_ptr() : nullptr;
  p.grad_v_before = grads[kVRing] ? grads[kVRing]->mutable_data_ptr() : nullptr;
  p.streams = n;
  p.num_heads = heads;
  p.head_dim = d;
  p.length = length;
  const Kernels& table = kernels(dtype);
  const int64_t bytes = table.ring_gradient_scratch(p);
  parallel(n * heads, 6 * length * d, [&](int64_t begin, int64_t end) {
    table.ring_gradient(p, scratch<GradientTag>(bytes), begin, end);
  });

  if (grads[kOutWeight]) {
    product(Matrices::of(*grads[kOutWeight]), rows(d_out).transposed(), rows(attended));
  }
  if (grads[kOutBias]) {
    product(Matrices::contiguous(grads[kOutBias]->const_data_ptr(), 1, e), ones(n, dtype),
            rows(d_out));
  }
  if (grads[kInBias]) {
    product(Matrices::contiguous(grads[kInBias]->const_data_ptr(), 1, 3 * e), ones(n, dtype),
            rows(d_tokens));
  }
  if (packed && !key && !value) {
    if (grads[kInWeight]) {
      product(Matrices::of(*grads[kInWeight]), rows(d_tokens).transposed(), Matrices::of(asking));
    }
    if (grads[kQuery]) {
      product(Matrices::of(*grads[kQuery]), rows(d_tokens),
              Matrices::contiguous(in.q.const_data_ptr(), 3 * e, e));
    }
    return grads;
  }
  const OptionalTensor* own_tokens[] = {&grads[kQuery], key ? &grads[kKey] : &grads[kQuery],
                                        value ? &grads[kValue] : &grads[kQuery]};
  for (int i = 0; i < 3; ++i) {
    Matrices part = rows(d_tokens);
    part.data = third_at(part.data, i, e, dtype);
    part.columns = e;
    const OptionalTensor& of_weight = grads[packed ? kInWeight : kInWeight + i];
    if (of_weight) {
      const Tensor token =
          tokens[i].stride(1) == 1 ? tokens[i] : torch::stable::contiguous(tokens[i]);
      const void* to = third_at(of_weight->const_data_ptr(), packed ? i : 0, e * e, dtype);
      product(Matrices::contiguous(to, e, token.size(1)), part.transposed(), Matrices::of(token));
    }
    if (*own_tokens[i]) {
      const bool add = i > 0 && own_tokens[i] == own_tokens[0];
      product(Matrices::of(**own_tokens[i]), part, weight_of(i), nullptr, add);
    }
  }
  return grads;
}

}  // namespace
}  // namespace continual_mha::cpu

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CPU, m) {
  m.impl("cpu_ring_step_backward", TORCH_BOX(&continual_mha::cpu::ring_step_backward));
}
