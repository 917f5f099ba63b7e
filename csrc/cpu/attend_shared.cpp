// continual_mha::cpu_attend_shared: all heads of a stream against one tile.
#include <tuple>

#include "host.h"

namespace continual_mha::cpu {
namespace {

constexpr const char* kOp = "cpu_attend_shared";

struct SharedTag {};

// A tile whose features are next to each other; slots and streams may lie anywhere.
Tensor as_rows(const Tensor& x) { return x.stride(2) == 1 ? x : torch::stable::contiguous(x); }

AttendSharedParams params_of(const Tensor& query, const Tensor& key, const Tensor& value) {
  AttendSharedParams p{};
  p.query = query.const_data_ptr();
  p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();
  p.key_stream_stride = key.stride(0);
  p.key_slot_stride = key.stride(1);
  p.value_stream_stride = value.stride(0);
  p.value_slot_stride = value.stride(1);
  p.streams = query.size(0);
  p.num_heads = query.size(1);
  p.slots = key.size(1);
  p.key_dim = key.size(2);
  p.value_dim = value.size(2);
  return p;
}

}  // namespace

std::tuple<Tensor, Tensor> attend_shared(Tensor query, Tensor key, Tensor value,
                                         OptionalTensor mask, OptionalTensor sink) {
  check_shared(query, key, value, mask, sink, kOp);
  const DType dtype = dtype_of(query, kOp);
  const ScalarType acc = dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  const Tensor queries = as_contiguous(query);
  const Tensor keys = as_rows(key);
  const Tensor values = as_rows(value);
  AttendSharedParams p = params_of(queries, keys, values);
  const Tensor out = torch::stable::new_empty(query, {p.streams, p.num_heads, p.value_dim});
  const Tensor lse = torch::stable::new_empty(query, {p.streams, p.num_heads}, acc);
  OptionalTensor wide_mask;
  OptionalTensor wide_sink;
  if (mask) {
    wide_mask = torch::stable::to(*mask, acc);
    p.mask = wide_mask->const_data_ptr();
    p.mask_stream_stride = mask->size(0) == 1 ? 0 : wide_mask->stride(0);
    p.mask_head_stride = mask->size(1) == 1 ? 0 : wide_mask->stride(1);
    p.mask_slot_stride = wide_mask->stride(2);
  }
  if (sink) {
    wide_sink = torch::stable::contiguous(torch::stable::to(*sink, acc));
    p.sink = wide_sink->const_data_ptr();
  }
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  const Kernels& table = kernels(dtype);
  const int64_t bytes = table.attend_shared_scratch(p);
  const int64_t blocks = (p.num_heads + kHeadBlock - 1) / kHeadBlock;
  parallel(p.streams * blocks, kHeadBlock * p.slots * (p.key_dim + p.value_dim),
           [&](int64_t begin, int64_t end) {
             table.attend_shared(p, scratch<SharedTag>(bytes), begin, end);
           });
  return {out, lse};
}

}  // namespace continual_mha::cpu

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CPU, m) {
  m.impl("cpu_attend_shared", TORCH_BOX(&continual_mha::cpu::attend_shared));
}
