// continual_mha::cpu_ring_steps_: several tokens of every stream.
#include "attend_window.h"

namespace continual_mha::cpu {
namespace {

constexpr const char* kOp = "cpu_ring_steps_";

struct KeysTag {};
struct ValuesTag {};

void write_rings(const RingStepsParams& p, const ClipSizes& heads, DType dtype) {
  write_ring(p.keys, heads, dtype, p.position, p.k_ring, p.k_scale, p.length);
  write_ring(p.values, heads, dtype, p.position, p.v_ring, p.v_scale, p.length);
  if (p.query_slots == 0) return;
  const ClipSizes whole{p.streams, p.tokens, 1, p.num_heads * p.head_dim};
  const KeptTokens queries{p.q, nullptr, p.token_stride};
  write_ring(queries, whole, dtype, p.position, p.q_ring, nullptr, p.query_slots);
}

}  // namespace

Tensor ring_steps(Tensor query, Tensor key, Tensor value, Tensor in_proj_weight,
                  OptionalTensor k_proj_weight, OptionalTensor v_proj_weight,
                  OptionalTensor in_proj_bias, Tensor out_proj_weight, OptionalTensor out_proj_bias,
                  OptionalTensor bias_k, OptionalTensor bias_v, Tensor k_ring, Tensor v_ring,
                  Tensor q_ring, Tensor position, int64_t first, bool add_zero_attn,
                  double dropout_p, bool update, OptionalTensor k_scale, OptionalTensor v_scale,
                  bool batch_invariant) {
  const Weights w{in_proj_weight,  k_proj_weight, v_proj_weight, in_proj_bias,
                  out_proj_weight, out_proj_bias, bias_k,        bias_v};
  const Rings rings{k_ring, v_ring, q_ring, position, k_scale, v_scale};
  STD_TORCH_CHECK(dropout_p == 0.0, kOp, ": dropout is not covered");
  STD_TORCH_CHECK(query.dim() == 3, kOp, ": tokens must be (N, T, E)");
  const RingSizes s = check_rings(rings, kOp);
  check_tokens(query, key, value, w, rings, s, kOp);
  const int64_t count = query.size(1);
  STD_TORCH_CHECK(0 <= first && first <= count, kOp, ": first must be in [0, ", count, "]");
  const DType dtype = dtype_of(q_ring, kOp);
  const RingDType ring = ring_dtype_of(k_ring, k_scale, dtype, kOp);
  const int64_t e = s.embed_dim();
  Tensor out = new_like(query, {s.streams, count - first, e});
  if (s.streams == 0 || count == 0) return out;

  const bool self = same_tokens(query, key, value);
  const Tensor q = flat(query);
  const Tensor k = self ? q : flat(key);
  const Tensor v = self ? q : flat(value);
  const Projection* by = projection_of(w, dtype, s.streams * count, batch_invariant);
  const Projected tokens = project_in(q, k, v, w, dtype, by);
  RingStepsParams p{};
  static_cast<RingParams&>(p) = ring_params(tokens, w, rings, s, add_zero_attn);
  const ClipSizes heads{s.streams, count, s.num_heads, s.head_dim};
  const int64_t bytes = kept_bytes(heads, ring);
  p.keys = kept(p.k, p.token_stride, heads, dtype, ring, scratch<KeysTag>(bytes));
  p.values = kept(p.v, p.token_stride, heads, dtype, ring, scratch<ValuesTag>(bytes));
  p.out = out.mutable_data_ptr();
  p.tokens = count;
  p.first = first;
  attend_windows(p, dtype, ring);
  Tensor projected = out;
  if (by == nullptr) {
    projected = linear(out, out_proj_weight, out_proj_bias);
  } else {
    projected = new_like(query, {s.streams, count - first, e});
    project_out(tokens_of(flat(out), *by, dtype), w, projected);
  }
  if (update) {
    write_rings(p, heads, dtype);
    advance_positions(position, std::nullopt, count);
  }
  return projected;
}

}  // namespace continual_mha::cpu

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CPU, m) {
  m.impl("cpu_ring_steps_", TORCH_BOX(&continual_mha::cpu::ring_steps));
}
