// continual_mha::cpu_new_ring_steps: several tokens of every stream, to rings of their own, and the
// gradients of that, as a node of autograd without extra slots and queries that wait.
#include <cstring>
#include <tuple>
#include <vector>

#include "attend_window.h"
#include "project_backward.h"

namespace continual_mha::cpu {
namespace {

constexpr const char* kOp = "cpu_new_ring_steps";

// What both ways are given.
struct Clip {
  TokenRows tokens;
  Weights w;
  Tensor k_ring;
  Tensor v_ring;
  Tensor position;
  RingSizes s;
  int64_t count;  // T
  int64_t first;
  DType dtype;

  Clip(const Tensor& query, const OptionalTensor& key, const OptionalTensor& value,
       const Tensor& k_ring, const Tensor& v_ring, const Tensor& position, const Weights& w,
       int64_t first)
      : tokens(query, key, value, kOp),
        w(w),
        k_ring(as_contiguous(k_ring)),
        v_ring(as_contiguous(v_ring)),
        position(as_contiguous(position)),
        count(query.dim() == 3 ? query.size(1) : 0),
        first(first),
        dtype(dtype_of(query, kOp)) {
    STD_TORCH_CHECK(query.dim() == 3 && k_ring.dim() == 4, kOp,
                    ": tokens must be (N, T, E) and rings (N, H, L, D)");
    s = {k_ring.size(0), k_ring.size(1), k_ring.size(2), k_ring.size(3), 0};
    const int64_t e = s.embed_dim();
    STD_TORCH_CHECK(e > 0 && s.length > 0, kOp, ": a ring has no slot");
    STD_TORCH_CHECK(0 <= first && first <= count, kOp, ": first must be in [0, ", count, "]");
    check_ring(k_ring);
    check_ring(v_ring);
    for (const OptionalTensor& x : {OptionalTensor{query}, key, value}) {
      if (!x) continue;
      check_like(*x, k_ring, kOp, "a token");
      check_shape(*x, {s.streams, count, x->size(2)}, kOp, "a token");
    }
    check_shape(query, {s.streams, count, e}, kOp, "query");
    check_weights(w, e, tokens.of[1].size(1), tokens.of[2].size(1), k_ring, kOp);
    check_position(this->position, s.streams, k_ring, kOp);
  }

  void check_ring(const OptionalTensor& x) const {
    if (!x) return;
    check_like(*x, k_ring, kOp, "a ring");
    check_shape(*x, {s.streams, s.num_heads, s.length, s.head_dim}, kOp, "a ring");
  }

  int64_t embed_dim() const { return s.embed_dim(); }
  int64_t wanted() const { return count - first; }

  // Of projected tokens (N T, 3E).
  void put(RingStepsParams& p, const Tensor& projected, const OptionalTensor& seed,
           double dropout_p) const {
    const void* data = projected.const_data_ptr();
    p.q = data;
    p.token_stride = 3 * embed_dim();
    p.keys = {third_at(data, 1, embed_dim(), dtype), nullptr, p.token_stride};
    p.values = {third_at(data, 2, embed_dim(), dtype), nullptr, p.token_stride};
    put_windows(p, k_ring, v_ring, position, count, first, seed, dropout_p, kOp);
  }

  // A copy of a ring that holds the tokens as well.
  Tensor with_tokens(const Tensor& ring, const KeptTokens& kept) const {
    const Tensor copy = new_like(ring);
    if (ring.numel() == 0) return copy;
    if (count < s.length) {
      std::memcpy(copy.mutable_data_ptr(), ring.const_data_ptr(),
                  static_cast<size_t>(ring.numel() * element_size(dtype)));
    }
    const auto* at = static_cast<const int64_t*>(position.const_data_ptr());
    write_ring(kept, {s.streams, count, s.num_heads, s.head_dim}, dtype, at,
               copy.mutable_data_ptr(), nullptr, s.length);
    return copy;
  }
};

// The same numbers in another shape, and to autograd no view of them: what a node returns could not
// be written to in place if it were one.
Tensor reshaped(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(sizes)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::_unsafe_view", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Output, rings with the tokens, and what the gradients take: projected tokens (N T, 3E), the
// heads' outputs (N (T - first), E), and the logarithm of the softmax's denominator.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> new_ring_steps(
    Tensor query, OptionalTensor key, OptionalTensor value, Tensor k_ring, Tensor v_ring,
    Tensor in_proj_weight, OptionalTensor k_proj_weight, OptionalTensor v_proj_weight,
    OptionalTensor in_proj_bias, Tensor out_proj_weight, OptionalTensor out_proj_bias,
    Tensor position, OptionalTensor seed, int64_t first, double dropout_p) {
  const Weights w{in_proj_weight,  k_proj_weight, v_proj_weight, in_proj_bias,
                  out_proj_weight, out_proj_bias, std::nullopt,  std::nullopt};
  const Clip clip(query, key, value, k_ring, v_ring, position, w, first);
  const auto& s = clip.s;
  const int64_t rows = s.streams * clip.wanted();
  const Tensor projected = project_tokens(clip.tokens, w, clip.dtype);
  const Tensor heads = new_like(query, {rows, clip.embed_dim()});
  const Tensor lse = new_like(query, {s.streams, clip.wanted(), s.num_heads}, acc_type(clip.dtype));
  RingStepsParams p{};
  clip.put(p, projected, seed, dropout_p);
  p.out = heads.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  attend_windows(p, clip.dtype, RingDType::kAsTokens);
  const Tensor k_after = clip.with_tokens(clip.k_ring, p.keys);
  const Tensor v_after = clip.with_tokens(clip.v_ring, p.values);
  const Tensor out =
      reshaped(project_out(heads, w, clip.dtype), {s.streams, clip.wanted(), clip.embed_dim()});
  return {out, k_after, v_after, projected, heads, lse};
}

// `grad_k_ring` and `grad_v_ring` are of the rings with the tokens. Those given are the rings
// without. Gradients of null are none.
Gradients new_ring_steps_backward(OptionalTensor grad_out, OptionalTensor grad_k_ring,
                                  OptionalTensor grad_v_ring, Tensor query, OptionalTensor key,
                                  OptionalTensor value, Tensor k_ring, Tensor v_ring,
                                  Tensor in_proj_weight, OptionalTensor k_proj_weight,
                                  OptionalTensor v_proj_weight, OptionalTensor in_proj_bias,
                                  Tensor out_proj_weight, OptionalTensor out_proj_bias,
                                  Tensor position, OptionalTensor seed, Tensor projected,
                                  Tensor heads, Tensor lse, int64_t first, double dropout_p,
                                  std::vector<bool> needed) {
  const Weights w{in_proj_weight,  k_proj_weight, v_proj_weight, in_proj_bias,
                  out_proj_weight, out_proj_bias, std::nullopt,  std::nullopt};
  Clip clip(query, key, value, k_ring, v_ring, position, w, first);
  const auto& s = clip.s;
  const int64_t rows = s.streams * clip.wanted();
  const int64_t e = clip.embed_dim();
  if (grad_out) {
    check_like(*grad_out, query, kOp, "grad_out");
    check_shape(*grad_out, {s.streams, clip.wanted(), e}, kOp, "grad_out");
  }
  check_matrix(projected, s.streams * clip.count, 3 * e, query, kOp, "projected");
  check_matrix(heads, rows, e, query, kOp, "heads");
  check_shape(lse, {s.streams, clip.wanted(), s.num_heads}, kOp, "lse");
  STD_TORCH_CHECK(lse.is_cpu(), kOp, ": lse is on another device than the others");
  check_stored(lse, kOp, "lse");
  // as they were made, but hooks of autograd may have had them in between
  projected = as_contiguous(projected);
  heads = as_contiguous(heads);
  lse = *contiguous_acc(lse, acc_type(clip.dtype));
  for (const OptionalTensor& x : {grad_k_ring, grad_v_ring}) clip.check_ring(x);
  const OptionalTensor given[] = {
      query,         key,           value,        k_ring,          v_ring,       in_proj_weight,
      k_proj_weight, v_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias};
  if (!grad_out) {  // as if no output were wanted: the projection of none has no gradient
    clip.first = clip.count;
    for (size_t i = kOutWeight; i < needed.size(); ++i) needed[i] = false;
  }
  const Gradients grads = new_gradients(given, needed, kOp);
  OptionalTensor d_out;
  if (grad_out) {
    d_out = as_contiguous(flat(*grad_out));
    project_out_backward(*d_out, heads, clip.dtype, grads);
  }
  bool of_attention = false;
  for (int i = kQuery; i < kOutWeight; ++i) of_attention = of_attention || grads[i];
  if (!of_attention) return grads;

  const Tensor d_heads = new_like(query, {s.streams * clip.wanted(), e});
  if (d_out) multiply_tokens(d_heads, *d_out, as_contiguous(out_proj_weight), clip.dtype);
  const Tensor d_projected = new_like(query, {s.streams * clip.count, 3 * e});
  if (grad_k_ring) grad_k_ring = as_contiguous(*grad_k_ring);
  if (grad_v_ring) grad_v_ring = as_contiguous(*grad_v_ring);
  char* to = static_cast<char*>(d_projected.mutable_data_ptr());
  const int64_t third = e * element_size(clip.dtype);
  WindowGradientParams p{};
  clip.put(p, projected, seed, dropout_p);
  p.lse = lse.mutable_data_ptr();
  p.grad_out = d_heads.const_data_ptr();
  p.grad_k_after = data_or_null(grad_k_ring);
  p.grad_v_after = data_or_null(grad_v_ring);
  p.grad_q = to;
  p.grad_k = to + third;
  p.grad_v = to + 2 * third;
  p.grad_stride = 3 * e;
  p.grad_k_ring = grads[kKRing] ? grads[kKRing]->mutable_data_ptr() : nullptr;
  p.grad_v_ring = grads[kVRing] ? grads[kVRing]->mutable_data_ptr() : nullptr;
  attend_windows_backward(p, clip.dtype);
  project_backward(d_projected, clip.tokens, InWeights(w), clip.dtype, grads);
  return grads;
}

}  // namespace
}  // namespace continual_mha::cpu

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CPU, m) {
  m.impl("cpu_new_ring_steps", TORCH_BOX(&continual_mha::cpu::new_ring_steps));
  m.impl("cpu_new_ring_steps_backward", TORCH_BOX(&continual_mha::cpu::new_ring_steps_backward));
}
