// continual_mha::cpu_ring_step_backward: gradients of a step that made rings of its own, without
// extra slots and without queries that wait.
#include <cstring>
#include <vector>

#include "project_backward.h"

namespace continual_mha::cpu {
namespace {

constexpr const char* kOp = "cpu_ring_step_backward";

struct GradientTag {};

RingSizes check(const TokenRows& tokens, const OptionalTensor& grad_out, const Tensor& k_ring,
                const Tensor& v_ring, const OptionalTensor& grad_k_ring,
                const OptionalTensor& grad_v_ring, const Weights& w, const Tensor& position) {
  STD_TORCH_CHECK(k_ring.dim() == 4, kOp, ": rings must be (N, H, L, D)");
  const RingSizes s{k_ring.size(0), k_ring.size(1), k_ring.size(2), k_ring.size(3), 0};
  const int64_t e = s.embed_dim();
  STD_TORCH_CHECK(e > 0 && s.length > 0, kOp, ": a ring has no slot");
  for (const Tensor& x : tokens.of) {
    check_like(x, k_ring, kOp, "a token");
    check_shape(x, {s.streams, x.size(1)}, kOp, "a token");
  }
  check_shape(tokens.of[0], {s.streams, e}, kOp, "query");
  check_weights(w, e, tokens.of[1].size(1), tokens.of[2].size(1), k_ring, kOp);
  if (grad_out) {
    check_like(*grad_out, k_ring, kOp, "grad_out");
    check_shape(*grad_out, {s.streams, e}, kOp, "grad_out");
  }
  check_position(position, s.streams, k_ring, kOp);
  for (const OptionalTensor& x :
       {OptionalTensor{k_ring}, OptionalTensor{v_ring}, grad_k_ring, grad_v_ring}) {
    if (!x) continue;
    check_like(*x, k_ring, kOp, "a ring");
    check_shape(*x, {s.streams, s.num_heads, s.length, s.head_dim}, kOp, "a ring");
  }
  STD_TORCH_CHECK(k_ring.is_contiguous() && v_ring.is_contiguous(), kOp,
                  ": rings must be contiguous");
  return s;
}

void attend_backward(const RingGradientParams& p, DType dtype) {
  const Kernels& table = kernels(dtype);
  const int64_t bytes = table.ring_gradient_scratch(p);
  parallel(p.streams * p.num_heads, 6 * p.length * p.head_dim, [&](int64_t begin, int64_t end) {
    table.ring_gradient(p, scratch<GradientTag>(bytes), begin, end);
  });
}

// Where nobody used the output: what the ring with the token has goes to the token, whose rows
// `to` are `stride` bytes apart, and the rest to the ring `before` it, if that is not null.
void pass_on(const OptionalTensor& grad_ring, const RingSizes& s, DType dtype,
             const int64_t* position, char* to, int64_t stride, void* before) {
  const auto row = static_cast<size_t>(s.head_dim * element_size(dtype));
  const size_t ring = row * static_cast<size_t>(s.length);
  const auto* from = static_cast<const char*>(data_or_null(grad_ring));
  parallel(s.streams * s.num_heads, s.length * s.head_dim, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / s.num_heads;
      const size_t at = row * static_cast<size_t>(position[n] % s.length);
      const size_t head = ring * static_cast<size_t>(i);
      char* token = to + n * stride + row * static_cast<size_t>(i % s.num_heads);
      char* rest = before == nullptr ? nullptr : static_cast<char*>(before) + head;
      if (from == nullptr) {
        std::memset(token, 0, row);
        if (rest != nullptr) std::memset(rest, 0, ring);
        continue;
      }
      std::memcpy(token, from + head + at, row);
      if (rest == nullptr) continue;
      std::memcpy(rest, from + head, ring);
      std::memset(rest + at, 0, row);
    }
  });
}

// Key and value of null are the query. The rings are those with the token, which came at
// `position`, and `grad_k_ring` and `grad_v_ring` their gradients; gradients of null are none.
Gradients ring_step_backward(OptionalTensor grad_out, OptionalTensor grad_k_ring,
                             OptionalTensor grad_v_ring, Tensor query, OptionalTensor key,
                             OptionalTensor value, Tensor k_ring, Tensor v_ring,
                             Tensor in_proj_weight, OptionalTensor k_proj_weight,
                             OptionalTensor v_proj_weight, OptionalTensor in_proj_bias,
                             Tensor out_proj_weight, OptionalTensor out_proj_bias, Tensor position,
                             std::vector<bool> needed) {
  const Weights w{in_proj_weight,  k_proj_weight, v_proj_weight, in_proj_bias,
                  out_proj_weight, out_proj_bias, std::nullopt,  std::nullopt};
  STD_TORCH_CHECK(query.dim() == 2, kOp, ": tokens must be (N, E)");
  const TokenRows tokens(query, key, value, kOp);
  const RingSizes s =
      check(tokens, grad_out, k_ring, v_ring, grad_k_ring, grad_v_ring, w, position);
  const DType dtype = dtype_of(query, kOp);
  const int64_t n = s.streams;
  const int64_t e = s.embed_dim();
  const InWeights in(w);
  if (grad_k_ring) grad_k_ring = as_contiguous(*grad_k_ring);
  if (grad_v_ring) grad_v_ring = as_contiguous(*grad_v_ring);

  const OptionalTensor given[] = {
      query,         key,           value,        k_ring,          v_ring,       in_proj_weight,
      k_proj_weight, v_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias};
  const auto* at = static_cast<const int64_t*>(position.const_data_ptr());
  if (!grad_out) {  // of the output projection there is none
    for (size_t i = kOutWeight; i < needed.size(); ++i) needed[i] = false;
  }
  const Gradients grads = new_gradients(given, needed, kOp);
  const Tensor d_tokens = new_like(query, {n, 3 * e});
  void* k_before = grads[kKRing] ? grads[kKRing]->mutable_data_ptr() : nullptr;
  void* v_before = grads[kVRing] ? grads[kVRing]->mutable_data_ptr() : nullptr;
  if (!grad_out) {
    const int64_t third = e * element_size(dtype);
    char* to = static_cast<char*>(d_tokens.mutable_data_ptr());
    for (int64_t i = 0; i < n; ++i) std::memset(to + 3 * third * i, 0, static_cast<size_t>(third));
    pass_on(grad_k_ring, s, dtype, at, to + third, 3 * third, k_before);
    pass_on(grad_v_ring, s, dtype, at, to + 2 * third, 3 * third, v_before);
    project_backward(d_tokens, tokens, in, dtype, grads);
    return grads;
  }
  const Tensor d_out = as_contiguous(*grad_out);
  const Tensor w_o = as_contiguous(out_proj_weight);
  const Tensor q = new_like(query, {n, e});
  const Tensor d_heads = new_like(query, {n, e});
  const Tensor heads = new_like(query, {n, e});
  const Matrices w_q = Matrices::contiguous(in.q.const_data_ptr(), e, e);
  multiply({matrix(q), Matrices::of(tokens.of[0]), w_q.transposed(), data_or_null(in_proj_bias)},
           dtype);
  multiply_tokens(d_heads, d_out, w_o, dtype);
  RingGradientParams p{};
  p.q = q.const_data_ptr();
  p.k_ring = k_ring.const_data_ptr();
  p.v_ring = v_ring.const_data_ptr();
  p.grad_heads = d_heads.const_data_ptr();
  p.grad_k_ring = data_or_null(grad_k_ring);
  p.grad_v_ring = data_or_null(grad_v_ring);
  p.position = at;
  p.heads = heads.mutable_data_ptr();
  p.grad_tokens = d_tokens.mutable_data_ptr();
  p.grad_k_before = k_before;
  p.grad_v_before = v_before;
  p.streams = n;
  p.num_heads = s.num_heads;
  p.head_dim = s.head_dim;
  p.length = s.length;
  attend_backward(p, dtype);

  project_backward(d_tokens, tokens, in, dtype, grads);
  project_out_backward(d_out, heads, dtype, grads);
  return grads;
}

}  // namespace
}  // namespace continual_mha::cpu

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CPU, m) {
  m.impl("cpu_ring_step_backward", TORCH_BOX(&continual_mha::cpu::ring_step_backward));
}
