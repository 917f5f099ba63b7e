// Host side of continual_mha::cuda_attend_shared and continual_mha::cuda_attend_shared_backward.

#include <tuple>
#include <utility>

#include "host.h"

namespace continual_mha::cuda {
namespace {

// What both directions take. Without a value, `value` is the key.
struct AttendArgs {
  const char* op;
  bool one_tensor;
  Tensor query, key, value;
  OptionalTensor mask, sink;

  std::string describe() const {
    return concat(op, " for query ", shape_of(query), ", key ", shape_of(key), " and value ",
                  one_tensor ? "None" : shape_of(value));
  }
};

AttendArgs contiguous_args(const char* op, const Tensor& query, const Tensor& key,
                           const OptionalTensor& value, const OptionalTensor& mask,
                           const OptionalTensor& sink) {
  const Tensor keys = as_contiguous(key);
  const Tensor values = value ? as_contiguous(*value) : keys;
  AttendArgs a{op, !value, as_contiguous(query), keys, values, mask, sink};
  if (sink) a.sink = as_contiguous(*sink);
  return a;
}

void check_args(const AttendArgs& a) {
  check_shared(a.query, a.key, a.value, a.mask, a.sink, a.op);
  for (const OptionalTensor* x : {&a.mask, &a.sink}) {
    STD_TORCH_CHECK(!*x || (*x)->scalar_type() == ScalarType::Float ||
                        (*x)->scalar_type() == a.query.scalar_type(),
                    a.op, ": mask and sink must be float32 or of the query's dtype");
  }
  STD_TORCH_CHECK(
      a.query.size(1) > 0 && a.key.size(1) > 0 && a.query.size(2) > 0 && a.value.size(2) > 0,
      a.describe(), ": no empty dimension but N");
}

FloatLike float_like(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return {nullptr, false};
  return {tensor->data_ptr(), tensor->scalar_type() == ScalarType::Float};
}

AttendSharedParams make_params(const AttendArgs& a) {
  AttendSharedParams p{};
  const int64_t bytes = static_cast<int64_t>(a.query.element_size());
  p.query = a.query.data_ptr();
  p.key = a.key.data_ptr();
  p.value = a.value.data_ptr();
  p.mask = float_like(a.mask);
  if (a.mask) {
    p.mask_stride_n = a.mask->size(0) > 1 ? a.mask->stride(0) : 0;
    p.mask_stride_h = a.mask->size(1) > 1 ? a.mask->stride(1) : 0;
    p.mask_stride_s = a.mask->stride(2);
  }
  p.sink = float_like(a.sink);
  p.num_heads = static_cast<int>(a.query.size(1));
  p.rows = static_cast<int>(a.key.size(1));
  p.key_dim = static_cast<int>(a.query.size(2));
  p.value_dim = static_cast<int>(a.value.size(2));
  p.key_aligned = aligned16(p.key, p.key_dim * bytes);
  p.value_aligned = aligned16(p.value, p.value_dim * bytes);
  return p;
}

Tensor new_weights(const AttendArgs& a, const AttendSharedParams& p) {
  return new_like(a.query, {a.query.size(0), head_tiles(p.num_heads), p.rows, kTileHeads},
                  ScalarType::Float);
}

template <typename Params>
void launch_blocks(const void* kernel, int64_t blocks, int shared_bytes, const Params& p,
                   const AttendArgs& a) {
  const int device = a.query.get_device_index();
  const auto where = [&a] { return a.describe(); };
  STD_TORCH_CHECK(shared_bytes <= device_properties(device).shared_bytes, a.describe(), " needs ",
                  shared_bytes, " bytes of shared memory per block; the device has ",
                  device_properties(device).shared_bytes);
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), a.describe(), " needs too many blocks");
  constexpr int kDefaultShared = 48 * 1024;
  if (shared_bytes > kDefaultShared) allow_shared_memory(kernel, device, where);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned int>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = current_stream(device);
  launch(config, kernel, p, where);
}

// `second` may be empty.
void launch_outer_product(const OuterProduct& first, const OuterProduct& second,
                          const Tensor& gradient, const AttendArgs& a) {
  OuterProductParams p{};
  p.terms[0] = first;
  p.terms[1] = second;
  p.gradient = gradient.data_ptr();
  p.num_heads = static_cast<int>(a.query.size(1));
  p.rows = static_cast<int>(gradient.size(1));
  p.cols = static_cast<int>(gradient.size(2));
  p.threads = gradient.size(0) * divide_up(p.rows, kTileRows) * divide_up(p.cols, kPack);
  p.aligned = aligned16(first.vectors, p.cols * static_cast<int64_t>(gradient.element_size())) &&
              aligned16(second.vectors) && aligned16(p.gradient);
  launch_blocks(outer_product_kernel_for(element_of(gradient, a.op)),
                (p.threads + kThreads - 1) / kThreads, 0, p, a);
}

}  // namespace

// The operator attend_shared of continual_mha/ops.py for CUDA tensors.
std::tuple<Tensor, Tensor> attend_shared_cuda(Tensor query, Tensor key, OptionalTensor value,
                                              OptionalTensor mask, OptionalTensor sink) {
  const AttendArgs a = contiguous_args("cuda_attend_shared", query, key, value, mask, sink);
  check_args(a);
  const int64_t N = query.size(0);
  const int64_t H = query.size(1);
  Tensor out = new_like(query, {N, H, a.value.size(2)});
  Tensor lse = new_like(query, {N, H}, ScalarType::Float);
  if (N == 0) return {out, lse};
  AttendSharedParams p = make_params(a);
  const Tensor weights = new_weights(a, p);
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  p.weights = static_cast<float*>(weights.data_ptr());
  const DeviceScope scope(query.get_device_index());
  const Element element = element_of(query, a.op);
  launch_blocks(attend_shared_kernel_for(element, false), N * head_tiles(p.num_heads),
                attend_shared_bytes(p, element_size(element), false), p, a);
  return {out, lse};
}

// The operator attend_shared_backward of continual_mha/ops.py for CUDA tensors.
std::tuple<Tensor, Tensor, Tensor, Tensor> attend_shared_backward_cuda(
    Tensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, OptionalTensor value,
    OptionalTensor mask, OptionalTensor sink, Tensor out, Tensor lse) {
  const AttendArgs a =
      contiguous_args("cuda_attend_shared_backward", query, key, value, mask, sink);
  check_args(a);
  grad_out = as_contiguous(grad_out);
  if (grad_lse) grad_lse = as_contiguous(*grad_lse);
  const int64_t N = query.size(0);
  const int64_t H = query.size(1);
  for (const auto& [tensor, name] : {std::pair{grad_out, "grad_out"}, std::pair{out, "out"}}) {
    check_like(tensor, query, a.op, name);
    check_shape(tensor, {N, H, a.value.size(2)}, a.op, name);
  }
  for (const auto& [tensor, name] :
       {std::pair{grad_lse.value_or(lse), "grad_lse"}, std::pair{lse, "lse"}}) {
    check_shape(tensor, {N, H}, a.op, name);
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.device() == query.device(),
                    a.op, ": ", name, " must be float32 on the query's device");
  }
  STD_TORCH_CHECK(out.is_contiguous() && lse.is_contiguous(), a.op,
                  ": out and lse must be contiguous");
  const auto gradient_of = [&query](const Tensor& tensor) {
    return new_like(query, tensor.sizes());
  };
  Tensor dquery = gradient_of(query);
  Tensor dkey = gradient_of(key);
  Tensor dvalue = value ? gradient_of(*value) : new_like(query, {0});
  Tensor dsink =
      sink ? new_like(query, {N, H}, ScalarType::Float) : new_like(query, {0}, ScalarType::Float);
  if (N == 0) return {dquery, dkey, dvalue, dsink};
  AttendSharedParams p = make_params(a);
  const Tensor weights = new_weights(a, p);
  const Tensor dscores = new_weights(a, p);
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  p.grad_out = grad_out.data_ptr();
  p.grad_lse = static_cast<const float*>(data_or_null(grad_lse));
  p.dquery = dquery.data_ptr();
  p.dsink = static_cast<float*>(dsink.data_ptr());
  p.weights = static_cast<float*>(weights.data_ptr());
  p.dscores = static_cast<float*>(dscores.data_ptr());
  const DeviceScope scope(query.get_device_index());
  const Element element = element_of(query, a.op);
  launch_blocks(attend_shared_kernel_for(element, true), N * head_tiles(p.num_heads),
                attend_shared_bytes(p, element_size(element), true), p, a);
  const OuterProduct of_key{p.dscores, p.query};
  const OuterProduct of_value{p.weights, p.grad_out};
  launch_outer_product(of_key, a.one_tensor ? of_value : OuterProduct{}, dkey, a);
  if (!a.one_tensor) launch_outer_product(of_value, {}, dvalue, a);
  return {dquery, dkey, dvalue, dsink};
}

}  // namespace continual_mha::cuda

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CUDA, m) {
  m.impl("cuda_attend_shared", TORCH_BOX(&continual_mha::cuda::attend_shared_cuda));
  m.impl("cuda_attend_shared_backward",
         TORCH_BOX(&continual_mha::cuda::attend_shared_backward_cuda));
}
