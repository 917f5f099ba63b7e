// continual_mha::cpu_attend_shared_full and its short form: all heads of a stream against one tile.
#include "attend_shared.h"

namespace continual_mha::cpu {
namespace {

constexpr const char* kOp = "cpu_attend_shared";

struct SharedTag {};

}  // namespace

AttendSharedParams shared_params(const Tensor& key, const Tensor& value, int64_t num_heads,
                                 const OptionalTensor& mask) {
  AttendSharedParams p{};
  p.key = {key.const_data_ptr(), key.stride(0), key.stride(1), key.stride(2)};
  p.value = {value.const_data_ptr(), value.stride(0), value.stride(1), value.stride(2)};
  p.streams = key.size(0);
  p.num_heads = num_heads;
  p.slots = key.size(1);
  p.key_dim = key.size(2);
  p.value_dim = value.size(2);
  if (mask) {
    p.mask = mask->const_data_ptr();
    p.mask_stream_stride = mask->size(0) == 1 ? 0 : mask->stride(0);
    p.mask_head_stride = mask->size(1) == 1 ? 0 : mask->stride(1);
    p.mask_slot_stride = mask->stride(2);
  }
  return p;
}

void attend(const AttendSharedParams& p, DType dtype, bool by_acc) {
  const Kernels& table = kernels(dtype);
  const auto kernel = by_acc ? table.attend_shared_acc : table.attend_shared;
  const int64_t bytes = table.attend_shared_scratch(p);
  const int64_t blocks = (p.num_heads + kHeadBlock - 1) / kHeadBlock;
  parallel(p.streams * blocks, kHeadBlock * p.slots * (p.key_dim + p.value_dim),
           [&](int64_t begin, int64_t end) { kernel(p, scratch<SharedTag>(bytes), begin, end); });
}

void set_dropout(AttendSharedParams& p, const OptionalTensor& seed, double dropout_p,
                 const Tensor& kept, const char* op) {
  if (!seed) return;
  p.kept = kept.mutable_data_ptr();
  p.seed = read_seed(*seed, op);
  p.dropout_p = static_cast<float>(dropout_p);
}

void average_weights(const AttendSharedParams& p, DType dtype, const Tensor& average) {
  const Kernels& table = kernels(dtype);
  parallel(p.streams, p.num_heads * (p.slots + p.extra_weights), [&](int64_t begin, int64_t end) {
    table.average_weights(p, average.mutable_data_ptr(), begin, end);
  });
}

SharedResults run_attend_shared(const Tensor& query, const Tensor& key, const OptionalTensor& value,
                                OptionalTensor mask, OptionalTensor sink,
                                const OptionalTensor& seed, double dropout_p, bool need_weights,
                                bool blank) {
  check_shared(query, key, value.value_or(key), mask, sink, kOp);
  STD_TORCH_CHECK(key.size(1) > 0, kOp, ": there is nothing to attend to");
  const DType dtype = dtype_of(query, kOp);
  const ScalarType acc = acc_type(dtype);
  const Tensor queries = as_rows(query);
  const Tensor keys = as_tiles(key);
  const Tensor values = value ? as_tiles(*value) : keys;
  if (mask) mask = torch::stable::to(*mask, acc);
  sink = contiguous_acc(sink, acc);
  AttendSharedParams p = shared_params(keys, values, query.size(1), mask);
  const Tensor out = new_like(query, {p.streams, p.num_heads, p.value_dim});
  const Tensor lse = new_like(query, {p.streams, p.num_heads}, acc);
  p.query = head_vectors(queries);
  p.sink = data_or_null(sink);
  p.blank = blank;
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  const Tensor kept = new_if(seed.has_value(), query, {p.streams, p.num_heads}, acc);
  const Tensor average = new_if(need_weights, query, {p.streams, p.slots}, acc);
  set_dropout(p, seed, dropout_p, kept, kOp);
  const Tensor weights = new_if(need_weights, query, {p.streams, p.num_heads, p.slots}, acc);
  if (need_weights) p.weights = weights.mutable_data_ptr();
  attend(p, dtype, false);
  if (need_weights) average_weights(p, dtype, average);
  return {out, lse, kept, average};
}

namespace {

SharedResults attend_shared_full(Tensor query, Tensor key, OptionalTensor value,
                                 OptionalTensor mask, OptionalTensor sink, OptionalTensor seed,
                                 double dropout_p, bool need_weights) {
  return run_attend_shared(query, key, value, mask, sink, seed, dropout_p, need_weights, false);
}

std::tuple<Tensor, Tensor> attend_shared(Tensor query, Tensor key, OptionalTensor value,
                                         OptionalTensor mask, OptionalTensor sink) {
  const auto full = attend_shared_full(query, key, value, mask, sink, std::nullopt, 0.0, false);
  return {std::get<0>(full), std::get<1>(full)};
}

}  // namespace

}  // namespace continual_mha::cpu

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CPU, m) {
  m.impl("cpu_attend_shared_full", TORCH_BOX(&continual_mha::cpu::attend_shared_full));
  m.impl("cpu_attend_shared", TORCH_BOX(&continual_mha::cpu::attend_shared));
}
