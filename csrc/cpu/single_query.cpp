// continual_mha::cpu_single_query: one query of every stream over a clip, projections included.
#include <tuple>

#include "attend_shared.h"

namespace continual_mha::cpu {
namespace {

constexpr const char* kOp = "cpu_single_query";

struct MixedTag {};
struct HeadsTag {};
struct WeightsTag {};

void check(const Tensor& query, const Tensor& key, const Tensor& value, const Weights& w,
           const OptionalTensor& mask, int64_t num_heads) {
  STD_TORCH_CHECK(query.dim() == 2 && key.dim() == 3 && value.dim() == 3, kOp,
                  ": query must be (N, E), key (N, S, Ek) and value (N, S, Ev)");
  const int64_t n = query.size(0);
  const int64_t e = query.size(1);
  STD_TORCH_CHECK(num_heads > 0 && e % num_heads == 0, kOp, ": ", e, " features do not make ",
                  num_heads, " heads");
  check_stored(query, kOp, "query");
  check_like(key, query, kOp, "key");
  check_like(value, query, kOp, "value");
  check_shape(key, {n, key.size(1), key.size(2)}, kOp, "key");
  check_shape(value, {n, key.size(1), value.size(2)}, kOp, "value");
  STD_TORCH_CHECK(key.size(1) > 0, kOp, ": there is nothing to attend to");
  check_mask(mask, query, num_heads, key.size(1), kOp);
  check_weights(w, e, key.size(2), value.size(2), query, kOp);
}

MovedParams moved_params(const Weights& w, const InWeights& in, const AttendSharedParams& shared,
                         DType dtype, bool add_zero_attn) {
  MovedParams p{};
  p.queries = shared.streams;
  p.num_heads = shared.num_heads;
  p.key_dim = shared.key_dim;
  p.value_dim = shared.value_dim;
  p.add_zero_attn = add_zero_attn;
  set_moved(p, w, in, dtype, shared.blank);
  const int64_t row = p.queries * acc_size(dtype);
  p.mixed = scratch<MixedTag>(row * p.num_heads * p.value_dim);
  p.out = scratch<HeadsTag>(row * p.embed_dim);
  return p;
}

}  // namespace

std::tuple<Tensor, Tensor> single_query(Tensor query, Tensor key, Tensor value,
                                        Tensor in_proj_weight, OptionalTensor k_proj_weight,
                                        OptionalTensor v_proj_weight, OptionalTensor in_proj_bias,
                                        Tensor out_proj_weight, OptionalTensor out_proj_bias,
                                        OptionalTensor bias_k, OptionalTensor bias_v,
                                        OptionalTensor mask, int64_t num_heads, bool add_zero_attn,
                                        bool need_weights) {
  const Weights w{in_proj_weight,  k_proj_weight, v_proj_weight, in_proj_bias,
                  out_proj_weight, out_proj_bias, bias_k,        bias_v};
  check(query, key, value, w, mask, num_heads);
  const DType dtype = dtype_of(query, kOp);
  const Kernels& table = kernels(dtype);
  const Tensor keys = as_tiles(key);
  const Tensor values = same_tokens(key, value) ? keys : as_tiles(value);
  if (mask) mask = torch::stable::to(*mask, acc_type(dtype));
  AttendSharedParams shared = shared_params(keys, values, num_heads, mask);
  shared.blank = mask.has_value() && !need_weights;
  shared.extra_weights = static_cast<int64_t>(bias_k.has_value()) + add_zero_attn;
  const int64_t slots = shared.slots + shared.extra_weights;
  const int64_t n = shared.streams;
  const int64_t e = query.size(1);
  const Tensor out = new_like(query, {n, e});
  const Tensor attn = new_if(need_weights, query, {n, slots}, acc_type(dtype));
  if (n == 0) return {out, attn};

  const InWeights in(w);
  const MovedParams moved = moved_params(w, in, shared, dtype, add_zero_attn);
  const Projection& by = own_projection(dtype, n);
  project_to_acc(tokens_of(query, by, dtype), in.q.const_data_ptr(), data_or_null(in_proj_bias),
                 moved.q, e);
  parallel(num_heads, n * e * shared.key_dim / num_heads,
           [&](int64_t begin, int64_t end) { table.move_queries(moved, begin, end); });
  shared.query = {moved.moved, num_heads * shared.key_dim, shared.key_dim};
  shared.out = moved.mixed;
  shared.extra = moved.extra;
  if (need_weights) {
    shared.weights = scratch<WeightsTag>(n * num_heads * slots * acc_size(dtype));
  }
  attend(shared, dtype, true);
  if (need_weights) {
    average_weights(shared, dtype, attn);
  }
  parallel(num_heads, n * e * shared.value_dim / num_heads,
           [&](int64_t begin, int64_t end) { table.project_mixed(moved, begin, end); });
  project_out(tokens_of(moved.out, true, n, e, by, dtype), w, out);
  return {out, attn};
}

}  // namespace continual_mha::cpu

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CPU, m) {
  m.impl("cpu_single_query", TORCH_BOX(&continual_mha::cpu::single_query));
}
