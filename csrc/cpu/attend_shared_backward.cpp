// continual_mha::cpu_attend_shared_full_backward, its short form, and its part for frozen tiles.
#include <utility>

#include "attend_shared.h"

namespace continual_mha::cpu {
namespace {

constexpr const char* kOp = "cpu_attend_shared_full_backward";

struct GradientTag {};

}  // namespace

SharedGradients run_attend_shared_backward(const Tensor& grad_out, OptionalTensor grad_lse,
                                           OptionalTensor grad_kept, OptionalTensor grad_average,
                                           const Tensor& query, const Tensor& key,
                                           const OptionalTensor& value, OptionalTensor mask,
                                           OptionalTensor sink, const OptionalTensor& seed,
                                           const Tensor& out, const Tensor& lse, const Tensor& kept,
                                           double dropout_p, bool of_tiles) {
  const Tensor& given = value ? *value : key;
  check_shared(query, key, given, mask, sink, kOp);
  const DType dtype = dtype_of(query, kOp);
  const ScalarType acc = acc_type(dtype);
  const int64_t n = query.size(0);
  const int64_t heads = query.size(1);
  for (const auto& [x, name] : {std::pair{grad_out, "grad_out"}, std::pair{out, "out"}}) {
    check_like(x, query, kOp, name);
    check_shape(x, {n, heads, given.size(2)}, kOp, name);
  }
  check_shape(lse, {n, heads}, kOp, "lse");
  if (grad_lse) check_shape(*grad_lse, {n, heads}, kOp, "grad_lse");
  if (grad_kept) check_shape(*grad_kept, {n, heads}, kOp, "grad_kept");
  if (seed) check_shape(kept, {n, heads}, kOp, "kept");
  if (grad_average) check_shape(*grad_average, {n, key.size(1)}, kOp, "grad_average");
  const Tensor queries = as_rows(query);
  const Tensor keys = as_tiles(key);
  const Tensor values = value ? as_tiles(*value) : keys;
  const Tensor grads = as_rows(grad_out);
  if (mask) mask = torch::stable::to(*mask, acc);
  sink = contiguous_acc(sink, acc);
  const OptionalTensor known = contiguous_acc(lse, acc);
  grad_lse = contiguous_acc(grad_lse, acc);
  grad_kept = contiguous_acc(grad_kept, acc);
  grad_average = contiguous_acc(grad_average, acc);
  const OptionalTensor left = seed ? contiguous_acc(kept, acc) : std::nullopt;

  SharedGradientParams p{};
  static_cast<AttendSharedParams&>(p) = shared_params(keys, values, heads, mask);
  const Tensor d_query = new_like(query, {n, heads, p.key_dim});
  const ScalarType own = query.scalar_type();
  const bool of_values = of_tiles && value.has_value();
  const Tensor d_key = new_if(of_tiles, query, {n, p.slots, p.key_dim}, own);
  const Tensor d_value = new_if(of_values, query, {n, p.slots, p.value_dim}, own);
  const Tensor d_sink = new_if(sink.has_value(), query, {n, heads}, acc);
  const Tensor pairs = new_if(of_tiles, query, {n, p.slots, 2 * heads}, acc);
  p.query = head_vectors(queries);
  p.sink = data_or_null(sink);
  p.lse = known->mutable_data_ptr();
  p.grad_out = head_vectors(grads);
  p.grad_lse = data_or_null(grad_lse);
  p.grad_kept = data_or_null(grad_kept);
  p.grad_average = data_or_null(grad_average);
  p.grad_query = d_query.mutable_data_ptr();
  p.grad_key = d_key.mutable_data_ptr();
  p.grad_value = value ? d_value.mutable_data_ptr() : nullptr;
  p.grad_sink = sink ? d_sink.mutable_data_ptr() : nullptr;
  p.pairs = of_tiles ? pairs.mutable_data_ptr() : nullptr;
  if (left) set_dropout(p, seed, dropout_p, *left, kOp);

  const Kernels& table = kernels(dtype);
  const int64_t bytes = table.shared_gradient_scratch(p);
  const int64_t features = p.key_dim + p.value_dim;
  parallel(n * ((heads + kHeadBlock - 1) / kHeadBlock),
           kHeadBlock * p.slots * (features + p.key_dim), [&](int64_t begin, int64_t end) {
             table.shared_query_gradient(p, scratch<GradientTag>(bytes), begin, end);
           });
  if (!of_tiles) return {d_query, d_key, d_value, d_sink};
  parallel(n * ((p.slots + kSlotBlock - 1) / kSlotBlock), kSlotBlock * heads * features,
           [&](int64_t begin, int64_t end) {
             table.shared_tile_gradient(p, scratch<GradientTag>(bytes), begin, end);
           });
  return {d_query, d_key, d_value, d_sink};
}

namespace {

SharedGradients attend_shared_full_backward(Tensor grad_out, OptionalTensor grad_lse,
                                            OptionalTensor grad_kept, OptionalTensor grad_average,
                                            Tensor query, Tensor key, OptionalTensor value,
                                            OptionalTensor mask, OptionalTensor sink,
                                            OptionalTensor seed, Tensor out, Tensor lse,
                                            Tensor kept, double dropout_p) {
  return run_attend_shared_backward(grad_out, grad_lse, grad_kept, grad_average, query, key, value,
                                    mask, sink, seed, out, lse, kept, dropout_p, true);
}

std::tuple<Tensor, Tensor> attend_shared_query_backward(
    Tensor grad_out, OptionalTensor grad_lse, OptionalTensor grad_kept, OptionalTensor grad_average,
    Tensor query, Tensor key, OptionalTensor value, OptionalTensor mask, OptionalTensor sink,
    OptionalTensor seed, Tensor out, Tensor lse, Tensor kept, double dropout_p) {
  const SharedGradients all =
      run_attend_shared_backward(grad_out, grad_lse, grad_kept, grad_average, query, key, value,
                                 mask, sink, seed, out, lse, kept, dropout_p, false);
  return {std::get<0>(all), std::get<3>(all)};
}

SharedGradients attend_shared_backward(Tensor grad_out, OptionalTensor grad_lse, Tensor query,
                                       Tensor key, OptionalTensor value, OptionalTensor mask,
                                       OptionalTensor sink, Tensor out, Tensor lse) {
  return attend_shared_full_backward(grad_out, grad_lse, std::nullopt, std::nullopt, query, key,
                                     value, mask, sink, std::nullopt, out, lse, lse, 0.0);
}

}  // namespace
}  // namespace continual_mha::cpu

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CPU, m) {
  m.impl("cpu_attend_shared_backward", TORCH_BOX(&continual_mha::cpu::attend_shared_backward));
  m.impl("cpu_attend_shared_full_backward",
         TORCH_BOX(&continual_mha::cpu::attend_shared_full_backward));
  m.impl("cpu_attend_shared_query_backward",
         TORCH_BOX(&continual_mha::cpu::attend_shared_query_backward));
}
