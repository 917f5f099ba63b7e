// continual_mha::cpu_ring_step_: one token of every stream.
#include "bound.h"
#include "host.h"

namespace continual_mha::cpu {
namespace {

constexpr const char* kOp = "cpu_ring_step_";

struct AttendedTag {};
struct StepTag {};

void attend(const RingStepParams& p, DType dtype, RingDType ring_dtype) {
  const Kernels& table = kernels(dtype);
  const int ring = static_cast<int>(ring_dtype);
  const int64_t bytes = table.ring_step_scratch[ring](p);
  parallel(p.streams * p.num_heads, 2 * p.length * p.head_dim, [&](int64_t begin, int64_t end) {
    table.ring_step[ring](p, scratch<StepTag>(bytes), begin, end);
  });
}

// What stays the same from step to step.
struct StepCall {
  Weights weights;
  Rings rings;
  bool add_zero_attn;
  double dropout_p;
  bool update;
  bool batch_invariant;
};

Tensor run(const StepCall& call, const Tensor& query, const Tensor& key, const Tensor& value,
           const OptionalTensor& active) {
  const Weights& w = call.weights;
  const Rings& rings = call.rings;
  STD_TORCH_CHECK(call.dropout_p == 0.0, kOp, ": dropout is not covered");
  STD_TORCH_CHECK(query.dim() == 2, kOp, ": tokens must be (N, E)");
  const RingSizes s = check_rings(rings, kOp);
  check_tokens(query, key, value, w, rings, s, kOp);
  check_active(active, s.streams, rings.k, kOp);
  const DType dtype = dtype_of(rings.q, kOp);
  const RingDType ring_dtype = ring_dtype_of(rings.k, rings.k_scale, dtype, kOp);
  const int64_t e = s.embed_dim();
  if (s.streams == 0) return new_like(query, {0, e});

  const Projection* by = projection_of(w, dtype, s.streams, call.batch_invariant);
  const Projected tokens = project_in(query, key, value, w, dtype, by);
  RingStepParams p{};
  static_cast<RingParams&>(p) = ring_params(tokens, w, rings, s, call.add_zero_attn);
  p.update = call.update;
  Tensor out = new_like(query, {s.streams, e});
  p.out_is_storage = by == nullptr || !by->factors_are_acc;
  p.out = by == nullptr ? out.mutable_data_ptr()
                        : scratch<AttendedTag>(s.streams * e * acc_size(dtype));
  attend(p, dtype, ring_dtype);
  if (by == nullptr) {
    out = linear(out, w.out_proj_weight, w.out_proj_bias);
  } else {
    project_out(tokens_of(p.out, !p.out_is_storage, s.streams, e, *by, dtype), w, out);
  }
  if (call.update) advance_positions(rings.position, active);
  return out;
}

}  // namespace

Tensor ring_step(Tensor query, Tensor key, Tensor value, Tensor in_proj_weight,
                 OptionalTensor k_proj_weight, OptionalTensor v_proj_weight,
                 OptionalTensor in_proj_bias, Tensor out_proj_weight, OptionalTensor out_proj_bias,
                 OptionalTensor bias_k, OptionalTensor bias_v, Tensor k_ring, Tensor v_ring,
                 Tensor q_ring, Tensor position, OptionalTensor active, bool add_zero_attn,
                 double dropout_p, bool update, OptionalTensor k_scale, OptionalTensor v_scale,
                 bool batch_invariant) {
  const StepCall call{{in_proj_weight, k_proj_weight, v_proj_weight, in_proj_bias, out_proj_weight,
                       out_proj_bias, bias_k, bias_v},
                      {k_ring, v_ring, q_ring, position, k_scale, v_scale},
                      add_zero_attn,
                      dropout_p,
                      update,
                      batch_invariant};
  return run(call, query, key, value, active);
}

// A self-attending step as the arguments describe it, for other tokens and masks.
int64_t bind_ring_step(Tensor /* query */, Tensor /* key */, Tensor /* value */,
                       Tensor in_proj_weight, OptionalTensor k_proj_weight,
                       OptionalTensor v_proj_weight, OptionalTensor in_proj_bias,
                       Tensor out_proj_weight, OptionalTensor out_proj_bias, OptionalTensor bias_k,
                       OptionalTensor bias_v, Tensor k_ring, Tensor v_ring, Tensor q_ring,
                       Tensor position, OptionalTensor /* active */, bool add_zero_attn,
                       double dropout_p, bool update, OptionalTensor k_scale,
                       OptionalTensor v_scale, bool batch_invariant) {
  const StepCall call{{in_proj_weight, k_proj_weight, v_proj_weight, in_proj_bias, out_proj_weight,
                       out_proj_bias, bias_k, bias_v},
                      {k_ring, v_ring, q_ring, position, k_scale, v_scale},
                      add_zero_attn,
                      dropout_p,
                      update,
                      batch_invariant};
  return bind([call](const Tensor& token, const OptionalTensor& mask) {
    return run(call, token, token, token, mask);
  });
}

}  // namespace continual_mha::cpu

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CPU, m) {
  m.impl("cpu_bind_ring_step_", TORCH_BOX(&continual_mha::cpu::bind_ring_step));
  m.impl("cpu_ring_step_", TORCH_BOX(&continual_mha::cpu::ring_step));
}
