// continual_mha::cpu_input_step_ and cpu_input_steps_: tokens of every stream, with rings of
// inputs.
#include <algorithm>

#include "bound.h"
#include "host.h"

namespace continual_mha::cpu {
namespace {

// Queries that pass the weights together: their scratch is of the size of the weights themselves.
constexpr int64_t kQueries = 64;

struct AskedTag {};
struct ClipTag {};
struct HeadsTag {};
struct StepTag {};

// What stays the same from call to call.
struct InputCall {
  const char* op;
  Weights weights;
  Tensor x_ring;
  OptionalTensor x_scale;
  Tensor position;
  int64_t num_heads;
  int64_t delay;
  bool add_zero_attn;
  double dropout_p;
  bool update;
};

// Checks everything but the shape of the tokens.
void check(const InputCall& a, const Tensor& query) {
  STD_TORCH_CHECK(a.dropout_p == 0.0, a.op, ": dropout is not covered");
  STD_TORCH_CHECK(a.x_ring.dim() == 3 && a.x_ring.size(1) > 0 && a.x_ring.size(2) > 0, a.op,
                  ": the ring must be (N, L, E)");
  const int64_t e = a.x_ring.size(2);
  STD_TORCH_CHECK(a.num_heads > 0 && e % a.num_heads == 0, a.op, ": ", e, " features do not make ",
                  a.num_heads, " heads");
  STD_TORCH_CHECK(0 <= a.delay && a.delay < a.x_ring.size(1), a.op, ": delay must be in [0, L)");
  check_stored(query, a.op, "query");
  check_weights(a.weights, e, e, e, query, a.op);
  check_position(a.position, a.x_ring.size(0), query, a.op);
  STD_TORCH_CHECK(a.x_ring.is_cpu() && a.x_ring.is_contiguous(), a.op,
                  ": the ring must be contiguous on the CPU");
  if (!a.x_scale) {
    check_like(a.x_ring, query, a.op, "the ring");
    return;
  }
  check_codes(a.x_ring, a.op);
  check_scale(*a.x_scale, a.x_ring, a.op);
}

// Everything but the tokens; `queries` is as many as will be computed at once.
InputStepParams params_of(const InputCall& a, const InWeights& in, DType dtype, int64_t queries) {
  InputStepParams p{};
  p.x_ring = a.x_ring.mutable_data_ptr();
  p.x_scale = a.x_scale ? static_cast<float*>(a.x_scale->mutable_data_ptr()) : nullptr;
  p.position = static_cast<const int64_t*>(a.position.const_data_ptr());
  p.streams = a.x_ring.size(0);
  p.tokens = 1;
  p.queries = queries;
  p.num_heads = a.num_heads;
  p.key_dim = p.value_dim = a.x_ring.size(2);
  p.length = a.x_ring.size(1);
  p.delay = a.delay;
  p.add_zero_attn = a.add_zero_attn;
  set_moved(p, a.weights, in, dtype, false);
  p.mixed = p.moved;
  return p;
}

// The heads' outputs of the queries of the tokens that ask.
void attend(InputStepParams& p, const Tokens& asked, const InputCall& a, const InWeights& in,
            DType dtype, RingDType ring) {
  const Kernels& table = kernels(dtype);
  const int64_t e = p.embed_dim;
  // Enough tasks for some threads; otherwise all heads together, which read the ring once.
  p.group_heads = p.queries < 4 ? kHeadBlock : p.num_heads;
  project_to_acc(asked, in.q.const_data_ptr(), data_or_null(a.weights.in_proj_bias), p.q, e);
  parallel(p.num_heads, p.queries * e * e / p.num_heads,
           [&](int64_t begin, int64_t end) { table.move_queries(p, begin, end); });
  const int64_t groups = (p.num_heads + p.group_heads - 1) / p.group_heads;
  const int64_t bytes = table.input_step_scratch(p);
  parallel(p.queries * groups, 2 * p.length * e * p.group_heads, [&](int64_t begin, int64_t end) {
    table.mix_inputs[static_cast<int>(ring)](p, scratch<StepTag>(bytes), begin, end);
  });
  parallel(p.num_heads, p.queries * e * e / p.num_heads,
           [&](int64_t begin, int64_t end) { table.project_mixed(p, begin, end); });
}

// The tokens that ask, by the kernel that knows where they are.
Tokens asked_tokens(const InputStepParams& p, DType dtype, RingDType ring) {
  const int64_t e = p.embed_dim;
  void* rows = scratch<AskedTag>(p.queries * e * acc_size(dtype));
  kernels(dtype).asked_input[static_cast<int>(ring)](p, rows, 0, p.queries);
  return tokens_of(rows, true, p.queries, e, invariant_projection(dtype), dtype);
}

// One token: into its slot first, from where it is attended to.
void attend_to_token(InputStepParams& p, const Tensor& query, const InputCall& a,
                     const InWeights& in, DType dtype, RingDType ring) {
  p.token = query.const_data_ptr();
  p.token_stride = query.stride(0);
  p.feature_stride = query.stride(1);
  p.out = scratch<HeadsTag>(p.streams * p.embed_dim * acc_size(dtype));
  const auto put = kernels(dtype).put_input[static_cast<int>(ring)];
  parallel(p.streams, p.embed_dim, [&](int64_t begin, int64_t end) {
    put(p, scratch<StepTag>(p.embed_dim * element_size(dtype)), begin, end);
  });
  const Tokens asked = p.delay == 0 ? tokens_of(query, invariant_projection(dtype), dtype)
                                    : asked_tokens(p, dtype, ring);
  attend(p, asked, a, in, dtype, ring);
}

// Several: the ring stays as it is, for their windows reach back to what they will overwrite.
void attend_to_clip(InputStepParams& p, const InputCall& a, const InWeights& in, DType dtype,
                    RingDType ring) {
  const int64_t row_bytes = p.embed_dim * acc_size(dtype);
  const int64_t queries = p.streams * (p.tokens - p.first);
  char* heads = static_cast<char*>(scratch<HeadsTag>(queries * row_bytes));
  for (p.first_query = 0; p.first_query < queries; p.first_query += p.queries) {
    p.queries = std::min(p.queries, queries - p.first_query);
    p.out = heads + p.first_query * row_bytes;
    attend(p, asked_tokens(p, dtype, ring), a, in, dtype, ring);
  }
  p.out = heads;
}

Tensor run_many(const InputCall& a, const Tensor& query, int64_t first, bool in_its_slot);

Tensor run(const InputCall& a, const Tensor& query, const OptionalTensor& active) {
  check(a, query);
  const int64_t n = a.x_ring.size(0);
  const int64_t e = a.x_ring.size(2);
  check_shape(query, {n, e}, a.op, "query");
  check_active(active, n, a.x_ring, a.op);
  if (!a.update) {  // the ring must stay as it is, for others may read it
    const Tensor out = run_many(a, torch::stable::view(as_contiguous(query), {n, 1, e}), 0, true);
    return torch::stable::view(out, {n, e});
  }
  const DType dtype = dtype_of(query, a.op);
  const RingDType ring = ring_dtype_of(a.x_ring, a.x_scale, dtype, a.op);
  Tensor out = new_like(query, {n, e});
  if (n == 0) return out;
  const InWeights in(a.weights);
  InputStepParams p = params_of(a, in, dtype, n);
  attend_to_token(p, query, a, in, dtype, ring);
  project_out(tokens_of(p.out, true, n, e, invariant_projection(dtype), dtype), a.weights, out);
  advance_positions(a.position, active);
  return out;
}

Tensor run_many(const InputCall& a, const Tensor& query, int64_t first, bool in_its_slot) {
  STD_TORCH_CHECK(query.dim() == 3, a.op, ": tokens must be (N, T, E)");
  check(a, query);
  const int64_t n = a.x_ring.size(0);
  const int64_t e = a.x_ring.size(2);
  const ClipSizes clip{n, query.size(1), 1, e};
  check_shape(query, {n, clip.tokens, e}, a.op, "query");
  STD_TORCH_CHECK(0 <= first && first <= clip.tokens, a.op, ": first must be in [0, ", clip.tokens,
                  "]");
  const DType dtype = dtype_of(query, a.op);
  const RingDType ring = ring_dtype_of(a.x_ring, a.x_scale, dtype, a.op);
  Tensor out = new_like(query, {n, clip.tokens - first, e});
  if (n == 0 || clip.tokens == 0) return out;
  const Tensor tokens = as_contiguous(query);
  const InWeights in(a.weights);
  InputStepParams p = params_of(a, in, dtype, std::min(kQueries, n * (clip.tokens - first)));
  p.token = tokens.const_data_ptr();
  p.clip = kept(p.token, e, clip, dtype, ring, scratch<ClipTag>(kept_bytes(clip, ring)));
  p.tokens = clip.tokens;
  p.first = first;
  p.in_its_slot = in_its_slot;
  attend_to_clip(p, a, in, dtype, ring);
  if (const int64_t count = n * (clip.tokens - first)) {
    const Tokens heads = tokens_of(p.out, true, count, e, invariant_projection(dtype), dtype);
    project_out(heads, a.weights, out);
  }
  if (a.update) {
    write_ring(p.clip, clip, dtype, p.position, p.x_ring, p.x_scale, p.length);
    advance_positions(a.position, std::nullopt, clip.tokens);
  }
  return out;
}

constexpr const char* kOne = "cpu_input_step_";
constexpr const char* kMany = "cpu_input_steps_";

}  // namespace

Tensor input_step(Tensor query, Tensor in_proj_weight, OptionalTensor in_proj_bias,
                  Tensor out_proj_weight, OptionalTensor out_proj_bias, OptionalTensor bias_k,
                  OptionalTensor bias_v, Tensor x_ring, Tensor position, int64_t num_heads,
                  int64_t delay, OptionalTensor active, bool add_zero_attn, double dropout_p,
                  bool update, OptionalTensor x_scale, bool /* batch_invariant: it always is */) {
  const InputCall call{kOne,
                       {in_proj_weight, std::nullopt, std::nullopt, in_proj_bias, out_proj_weight,
                        out_proj_bias, bias_k, bias_v},
                       x_ring,
                       x_scale,
                       position,
                       num_heads,
                       delay,
                       add_zero_attn,
                       dropout_p,
                       update};
  return run(call, query, active);
}

Tensor input_steps(Tensor query, Tensor in_proj_weight, OptionalTensor in_proj_bias,
                   Tensor out_proj_weight, OptionalTensor out_proj_bias, OptionalTensor bias_k,
                   OptionalTensor bias_v, Tensor x_ring, Tensor position, int64_t num_heads,
                   int64_t delay, int64_t first, bool add_zero_attn, double dropout_p, bool update,
                   OptionalTensor x_scale, bool /* batch_invariant: it always is */) {
  const InputCall call{kMany,
                       {in_proj_weight, std::nullopt, std::nullopt, in_proj_bias, out_proj_weight,
                        out_proj_bias, bias_k, bias_v},
                       x_ring,
                       x_scale,
                       position,
                       num_heads,
                       delay,
                       add_zero_attn,
                       dropout_p,
                       update};
  return run_many(call, query, first, false);
}

// A step as the arguments describe it, for other tokens and masks.
int64_t bind_input_step(Tensor /* query */, Tensor in_proj_weight, OptionalTensor in_proj_bias,
                        Tensor out_proj_weight, OptionalTensor out_proj_bias, OptionalTensor bias_k,
                        OptionalTensor bias_v, Tensor x_ring, Tensor position, int64_t num_heads,
                        int64_t delay, OptionalTensor /* active */, bool add_zero_attn,
                        double dropout_p, bool update, OptionalTensor x_scale,
                        bool /* batch_invariant: it always is */) {
  const InputCall call{kOne,
                       {in_proj_weight, std::nullopt, std::nullopt, in_proj_bias, out_proj_weight,
                        out_proj_bias, bias_k, bias_v},
                       x_ring,
                       x_scale,
                       position,
                       num_heads,
                       delay,
                       add_zero_attn,
                       dropout_p,
                       update};
  return bind(
      [call](const Tensor& token, const OptionalTensor& mask) { return run(call, token, mask); });
}

}  // namespace continual_mha::cpu

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CPU, m) {
  m.impl("cpu_bind_input_step_", TORCH_BOX(&continual_mha::cpu::bind_input_step));
  m.impl("cpu_input_step_", TORCH_BOX(&continual_mha::cpu::input_step));
  m.impl("cpu_input_steps_", TORCH_BOX(&continual_mha::cpu::input_steps));
}
