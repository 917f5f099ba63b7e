// continual_mha::cpu_ring_steps_: several tokens of every stream.
#include <algorithm>
#include <cstring>

#include "host.h"

namespace continual_mha::cpu {
namespace {

constexpr const char* kOp = "cpu_ring_steps_";

struct StepsTag {};

RingStepsParams params_of(const Projected& tokens, const Weights& w, const Rings& rings,
                          const RingSizes& s, int64_t count, int64_t first, bool add_zero_attn) {
  RingStepsParams p{};
  p.q = tokens.q;
  p.k = tokens.k;
  p.v = tokens.v;
  p.token_stride = tokens.stride;
  p.stream_stride = tokens.stride * count;
  p.k_ring = rings.k.const_data_ptr();
  p.v_ring = rings.v.const_data_ptr();
  p.q_ring = rings.q.const_data_ptr();
  p.position = static_cast<const int64_t*>(rings.position.const_data_ptr());
  p.bias_k = data_or_null(w.bias_k);
  p.bias_v = data_or_null(w.bias_v);
  p.streams = s.streams;
  p.num_heads = s.num_heads;
  p.head_dim = s.head_dim;
  p.length = s.length;
  p.query_slots = s.query_slots;
  p.tokens = count;
  p.first = first;
  p.add_zero_attn = add_zero_attn;
  // Each task lays out L - 1 rows besides its own: blocks of at least L / 2 keep that in
  // proportion.
  p.block_tokens = std::min(count - first, std::max<int64_t>(32, s.length / 2));
  return p;
}

void attend(const RingStepsParams& p, DType dtype) {
  const Kernels& table = kernels(dtype);
  const int64_t bytes = table.ring_steps_scratch(p);
  const int64_t wanted = p.tokens - p.first;
  const int64_t blocks = (wanted + p.block_tokens - 1) / p.block_tokens;
  parallel(p.streams * p.num_heads * blocks, 2 * p.block_tokens * p.length * p.head_dim,
           [&](int64_t begin, int64_t end) {
             table.ring_steps(p, scratch<StepsTag>(bytes), begin, end);
           });
}

// The last tokens of the clip that a ring of `slots` slots keeps, at their slots. A ring is
// (N, groups, slots, width): groups are heads, or one for the ring of queries.
void write_ring(const RingStepsParams& p, const void* tokens, void* ring, int64_t groups,
                int64_t slots, int64_t bytes, int64_t token_bytes) {
  const int64_t kept = std::min(p.tokens, slots);
  const auto write_stream = [&](int64_t n) {
    const char* clip = static_cast<const char*>(tokens) + n * p.tokens * token_bytes;
    char* to = static_cast<char*>(ring) + n * groups * slots * bytes;
    for (int64_t t = p.tokens - kept; t < p.tokens; ++t) {
      const int64_t slot = (p.position[n] + t) % slots;
      for (int64_t g = 0; g < groups; ++g) {
        std::memcpy(to + (g * slots + slot) * bytes, clip + t * token_bytes + g * bytes,
                    static_cast<size_t>(bytes));
      }
    }
  };
  parallel(p.streams, kept * groups * bytes, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) write_stream(n);
  });
}

void write_rings(const RingStepsParams& p, const Rings& rings, DType dtype) {
  const int64_t size = element_size(dtype);
  const int64_t token = p.token_stride * size;
  write_ring(p, p.k, rings.k.mutable_data_ptr(), p.num_heads, p.length, p.head_dim * size, token);
  write_ring(p, p.v, rings.v.mutable_data_ptr(), p.num_heads, p.length, p.head_dim * size, token);
  if (p.query_slots > 0) {
    const int64_t embed_bytes = p.num_heads * p.head_dim * size;
    write_ring(p, p.q, rings.q.mutable_data_ptr(), 1, p.query_slots, embed_bytes, token);
  }
  int64_t* position = static_cast<int64_t*>(rings.position.mutable_data_ptr());
  for (int64_t n = 0; n < p.streams; ++n) position[n] += p.tokens;
}

Tensor flat(const Tensor& x) {
  return torch::stable::reshape(x, {x.size(0) * x.size(1), x.size(2)});
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
  const Rings rings{k_ring, v_ring, q_ring, position};
  STD_TORCH_CHECK(!k_scale && !v_scale, kOp, ": rings of 8 bits are not covered");
  STD_TORCH_CHECK(dropout_p == 0.0, kOp, ": dropout is not covered");
  STD_TORCH_CHECK(query.dim() == 3, kOp, ": tokens must be (N, T, E)");
  const RingSizes s = check_rings(rings, kOp);
  check_tokens(query, key, value, w, rings, s, kOp);
  const int64_t count = query.size(1);
  STD_TORCH_CHECK(0 <= first && first <= count, kOp, ": first must be in [0, ", count, "]");
  const DType dtype = dtype_of(k_ring, kOp);
  const int64_t e = s.embed_dim();
  Tensor out = new_like(query, {s.streams, count - first, e});
  if (s.streams == 0 || count == 0) return out;

  const bool self = same_tokens(query, key) && same_tokens(query, value);
  const Tensor q = flat(query);
  const Tensor k = self ? q : flat(key);
  const Tensor v = self ? q : flat(value);
  const bool gemm = !batch_invariant && prefers_gemm(dtype, s.streams * count, e);
  const Projected tokens = project_in(q, k, v, w, dtype, gemm);
  RingStepsParams p = params_of(tokens, w, rings, s, count, first, add_zero_attn);
  p.out = out.mutable_data_ptr();
  if (first < count) attend(p, dtype);
  if (update) write_rings(p, rings, dtype);
  if (!batch_invariant) return linear(out, out_proj_weight, out_proj_bias);
  const Tensor projected = new_like(query, {s.streams, count - first, e});
  project_out(flat(out), w, dtype, projected);
  return projected;
}

}  // namespace continual_mha::cpu

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CPU, m) {
  m.impl("cpu_ring_steps_", TORCH_BOX(&continual_mha::cpu::ring_steps));
}
