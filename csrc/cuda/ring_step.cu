// Host side of continual_mha::cuda_ring_step_: checks, launch configuration, launch.
#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <mutex>
#include <tuple>

#include "host.h"
#include "ring_step.cuh"

namespace continual_mha::cuda {
namespace {

constexpr const char* kOp = "cuda_ring_step_";

// With more streams than this, rereading the weights per team costs more than the two launches that
// matrix products by cuBLAS add. Estimated from bytes, not measured.
constexpr int64_t kMaxFusedStreams = 64;
// Up to this many streams, one team per stream fills the chip.
constexpr int64_t kMaxSingleStreams = 16;

struct StepArgs {
  Tensor query, key, value;
  Tensor in_proj_weight;
  OptionalTensor k_proj_weight, v_proj_weight, in_proj_bias;
  Tensor out_proj_weight;
  OptionalTensor out_proj_bias, bias_k, bias_v;
  Tensor k_ring, v_ring, q_ring, position;
  OptionalTensor active;
  bool add_zero_attn;
  bool update;

  int64_t num_streams() const { return query.size(0); }
  int64_t embed_dim() const { return query.size(1); }
  bool packed() const { return !k_proj_weight.has_value(); }

  std::string describe() const {
    return concat(kOp, " for query ", shape_of(query), " and k_ring ", shape_of(k_ring));
  }
};

bool same_tensor(const Tensor& a, const Tensor& b) {
  return a.data_ptr() == b.data_ptr() && a.size(1) == b.size(1) && a.stride(0) == b.stride(0) &&
         a.stride(1) == b.stride(1);
}

void check_input(const Tensor& tensor, const char* name, const StepArgs& a) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == a.num_streams(), name, " has shape ",
                  shape_of(tensor), ", expected (", a.num_streams(), ", features)");
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == a.query.get_device_index() &&
                      tensor.scalar_type() == a.query.scalar_type(),
                  name, " is on another device or of another dtype than the query");
}

void check_weights(const StepArgs& a) {
  const int64_t E = a.embed_dim();
  STD_TORCH_CHECK(a.k_proj_weight.has_value() == a.v_proj_weight.has_value(),
                  "k_proj_weight and v_proj_weight go together");
  STD_TORCH_CHECK(a.bias_k.has_value() == a.bias_v.has_value(), "bias_k and bias_v go together");
  check_operand(a.in_proj_weight, "in_proj_weight", a.query, {a.packed() ? 3 * E : E, E});
  if (a.packed()) {
    STD_TORCH_CHECK(a.key.size(1) == E && a.value.size(1) == E,
                    "key and value of other sizes than the query need their own weights");
  } else {
    check_operand(*a.k_proj_weight, "k_proj_weight", a.query, {E, a.key.size(1)});
    check_operand(*a.v_proj_weight, "v_proj_weight", a.query, {E, a.value.size(1)});
  }
  if (a.in_proj_bias) check_operand(*a.in_proj_bias, "in_proj_bias", a.query, {3 * E});
  check_operand(a.out_proj_weight, "out_proj_weight", a.query, {E, E});
  if (a.out_proj_bias) check_operand(*a.out_proj_bias, "out_proj_bias", a.query, {E});
  if (a.bias_k) {
    check_operand(*a.bias_k, "bias_k", a.query, {1, 1, E});
    check_operand(*a.bias_v, "bias_v", a.query, {1, 1, E});
  }
}

void check_state(const StepArgs& a) {
  const int64_t N = a.num_streams();
  const int64_t E = a.embed_dim();
  STD_TORCH_CHECK(a.k_ring.dim() == 4, "k_ring has shape ", shape_of(a.k_ring),
                  ", expected (streams, heads, sequence_len, head_dim)");
  const int64_t H = a.k_ring.size(1);
  const int64_t L = a.k_ring.size(2);
  const int64_t D = a.k_ring.size(3);
  STD_TORCH_CHECK(H > 0 && L > 0 && H * D == E, "k_ring ", shape_of(a.k_ring),
                  " does not fit query ", shape_of(a.query));
  check_operand(a.k_ring, "k_ring", a.query, {N, H, L, D});
  check_operand(a.v_ring, "v_ring", a.query, {N, H, L, D});
  STD_TORCH_CHECK(a.q_ring.dim() == 3, "q_ring has shape ", shape_of(a.q_ring));
  check_operand(a.q_ring, "q_ring", a.query, {N, a.q_ring.size(1), E});
  STD_TORCH_CHECK(a.q_ring.size(1) != 1, "q_ring must have delay + 1 slots, or none");
  check_shape(a.position, "position", {N});
  STD_TORCH_CHECK(a.position.scalar_type() == ScalarType::Long && a.position.is_contiguous() &&
                      a.position.is_cuda(),
                  "position must be a contiguous int64 tensor on the query's device");
  if (a.active) {
    check_shape(*a.active, "active", {N});
    STD_TORCH_CHECK(a.active->scalar_type() == ScalarType::Bool && a.active->is_contiguous() &&
                        a.active->is_cuda(),
                    "active must be a contiguous bool tensor on the query's device");
  }
  const int64_t row_bytes = D * static_cast<int64_t>(a.k_ring.element_size());
  STD_TORCH_CHECK(D <= 256 && aligned16(a.k_ring.data_ptr(), row_bytes) &&
                      aligned16(a.v_ring.data_ptr(), row_bytes),
                  kOp,
                  " covers head_dim up to 256 whose rows are whole multiples of 16 bytes, not ", D);
  STD_TORCH_CHECK(L < (int64_t{1} << 30) && N < (int64_t{1} << 30), kOp,
                  " does not cover sizes of ", shape_of(a.k_ring));
}

Projection projection(const void* weight, int64_t cols, int64_t element_size) {
  return {weight, cols, static_cast<int>(cols), aligned16(weight, cols * element_size)};
}

RingStepParams make_params(const StepArgs& a) {
  RingStepParams p{};
  const int64_t E = a.embed_dim();
  const int64_t bytes = static_cast<int64_t>(a.query.element_size());
  const std::array<const Tensor*, 3> inputs{&a.query, &a.key, &a.value};
  for (int i = 0; i < 3; ++i) {
    const Tensor& x = *inputs[i];
    p.inputs[i] = {x.data_ptr(),
                   x.stride(0),
                   x.stride(1),
                   static_cast<int>(x.size(1)),
                   i == 0 || !same_tensor(x, a.query),
                   0,
                   0};
  }
  const char* packed = static_cast<const char*>(a.in_proj_weight.data_ptr());
  const void* k_weight = a.packed() ? packed + E * E * bytes : a.k_proj_weight->data_ptr();
  const void* v_weight = a.packed() ? packed + 2 * E * E * bytes : a.v_proj_weight->data_ptr();
  p.in_proj[0] = projection(packed, E, bytes);
  p.in_proj[1] = projection(k_weight, a.key.size(1), bytes);
  p.in_proj[2] = projection(v_weight, a.value.size(1), bytes);
  p.out_proj = projection(a.out_proj_weight.data_ptr(), E, bytes);
  p.in_proj_bias = data_or_null(a.in_proj_bias);
  p.out_proj_bias = data_or_null(a.out_proj_bias);
  p.bias_k = data_or_null(a.bias_k);
  p.bias_v = data_or_null(a.bias_v);
  p.k_ring = a.k_ring.data_ptr();
  p.v_ring = a.v_ring.data_ptr();
  p.q_ring = a.q_ring.data_ptr();
  p.position = static_cast<int64_t*>(a.position.data_ptr());
  p.active = static_cast<const bool*>(data_or_null(a.active));
  p.num_streams = static_cast<int>(a.num_streams());
  p.embed_dim = static_cast<int>(E);
  p.num_heads = static_cast<int>(a.k_ring.size(1));
  p.sequence_len = static_cast<int>(a.k_ring.size(2));
  p.head_dim = static_cast<int>(a.k_ring.size(3));
  p.query_slots = static_cast<int>(a.q_ring.size(1));
  p.head_groups = 1;
  p.splits = 1;
  p.scale_log2 =
      static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(p.head_dim)));
  p.add_zero_attn = a.add_zero_attn;
  p.update = a.update;
  return p;
}

// Counters of Merge::kCounter. A step leaves its counters at zero, so that they need no launch of
// their own; two steps over the same rings cannot run at once, so that the rings' address may name
// the counters. When they run out, a step gets its own, zeroed on its stream.
constexpr int kCounters = 1 << 14;
__device__ unsigned int step_counters[kCounters];

// Index of the first of `count` counters that belong to `key` on `device`, or -1.
int claim_counters(int device, const void* key, int count) {
  struct Claim {
    int first;
    int count;
  };
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, Claim> claims;
  static std::map<int, int> used;
  const std::lock_guard<std::mutex> lock(mutex);
  Claim& claim = claims[{device, key}];
  if (claim.count >= count) return claim.first;
  int& next = used[device];
  if (next + count > kCounters) return -1;
  claim = {next, count};
  next += count;
  return claim.first;
}

unsigned int* find_counters(const StepArgs& a, int count, Tensor& scratch, cudaStream_t stream) {
  const auto where = [&a] { return a.describe(); };
  const int first = claim_counters(a.query.get_device_index(), a.k_ring.data_ptr(), count);
  void* counters = nullptr;
  if (first >= 0) {
    check_cuda(cudaGetSymbolAddress(&counters, step_counters), "cudaGetSymbolAddress", where);
    return static_cast<unsigned int*>(counters) + first;
  }
  scratch = torch::stable::new_empty(a.query, {count}, ScalarType::Int);
  counters = scratch.data_ptr();
  check_cuda(cudaMemsetAsync(counters, 0, count * sizeof(int), stream), "cudaMemsetAsync", where);
  return static_cast<unsigned int*>(counters);
}

using Kernel = void (*)(RingStepParams);

// Lets a kernel use all shared memory, and asks once how many blocks a cluster of it may have.
int prepare_kernel(Kernel kernel, int device, bool cluster, const StepArgs& a) {
  static std::mutex mutex;
  static std::map<std::pair<int, Kernel>, int> prepared;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = prepared.find({device, kernel});
  if (found != prepared.end()) return found->second;
  const auto where = [&a] { return a.describe(); };
  const int shared = device_properties(device).shared_bytes;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
             "cudaFuncSetAttribute", where);
  int blocks = 16;
  if (cluster) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
               "cudaFuncSetAttribute", where);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(16);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    check_cuda(cudaOccupancyMaxPotentialClusterSize(&blocks, kernel, &config),
               "cudaOccupancyMaxPotentialClusterSize", where);
    blocks = std::min(blocks, 16);
  }
  prepared[{device, kernel}] = blocks;
  return blocks;
}

void launch_kernel(Kernel kernel, const RingStepParams& p, int teams, bool cluster,
                   cudaStream_t stream, const StepArgs& a) {
  const int blocks = p.head_groups * p.splits;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned int>(teams) * blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(p.shared.total);
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned int>(blocks);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, p), "cudaLaunchKernelEx",
             [&a] { return a.describe(); });
}

template <typename T, int kStreams>
void launch_step(RingStepParams p, const StepArgs& a) {
  const int device = a.query.get_device_index();
  const DeviceScope scope(device);
  const DeviceProperties& properties = device_properties(device);
  const cudaStream_t stream = current_stream(device);
  const bool cluster = properties.major >= 9;
  const Kernel kernel = cluster ? ring_step_kernel<T, kStreams, Merge::kCluster>
                                : ring_step_kernel<T, kStreams, Merge::kCounter>;
  const int max_blocks = prepare_kernel(kernel, device, cluster, a);
  const int teams = divide_up(p.num_streams, kStreams);
  if (p.projected[0] == nullptr) {
    split_work(p, properties.multiprocessors / teams, max_blocks, cluster);
  }
  plan_block(p, kStreams, sizeof(T));
  STD_TORCH_CHECK(p.shared.total <= properties.shared_bytes, a.describe(), " needs ",
                  p.shared.total, " bytes of shared memory per block; the device has ",
                  properties.shared_bytes);
  Tensor scratch = a.query;
  Tensor counters = a.query;
  if (!cluster && p.head_groups * p.splits > 1) {
    const ScratchSizes sizes = scratch_sizes(p, teams, kStreams);
    scratch = torch::stable::new_empty(a.query, {sizes.partial + sizes.partial_output},
                                       ScalarType::Float);
    p.partial = static_cast<float*>(scratch.data_ptr());
    p.partial_output = p.partial + sizes.partial;
    p.done = find_counters(a, sizes.counters, counters, stream);
  }
  launch_kernel(kernel, p, teams, cluster, stream, a);
}

void launch_step(const RingStepParams& p, const StepArgs& a) {
  dispatch_dtype(a.query.scalar_type(), kOp, [&](auto element) {
    using T = decltype(element);
    if (p.projected[0] != nullptr || p.num_streams <= kMaxSingleStreams) {
      launch_step<T, 1>(p, a);
    } else {
      launch_step<T, 4>(p, a);
    }
  });
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// q, k and v by matrix products, and pointers to them in `p`. The result owns their memory.
std::array<Tensor, 3> project_by_gemm(RingStepParams& p, const StepArgs& a) {
  const int64_t E = a.embed_dim();
  const int64_t bytes = static_cast<int64_t>(a.query.element_size());
  if (a.packed() && same_tensor(a.key, a.query) && same_tensor(a.value, a.query)) {
    const Tensor qkv = linear(a.query, a.in_proj_weight, a.in_proj_bias);
    const char* data = static_cast<const char*>(qkv.data_ptr());
    for (int i = 0; i < 3; ++i) p.projected[i] = data + i * E * bytes;
    p.projected_stride = 3 * E;
    return {qkv, qkv, qkv};
  }
  const auto rows = [E](const Tensor& packed, int i) {
    Tensor whole = packed;
    return torch::stable::narrow(whole, 0, i * E, E);
  };
  const auto project = [&](int i, const Tensor& x, const OptionalTensor& own) {
    OptionalTensor bias;
    if (a.in_proj_bias) bias = rows(*a.in_proj_bias, i);
    const Tensor out = linear(x, own ? *own : rows(a.in_proj_weight, i), bias);
    p.projected[i] = out.data_ptr();
    return out;
  };
  p.projected_stride = E;
  return {project(0, a.query, std::nullopt), project(1, a.key, a.k_proj_weight),
          project(2, a.value, a.v_proj_weight)};
}

}  // namespace

// The operator ring_step_ of continual_mha/ops.py for CUDA tensors.
Tensor ring_step_cuda(Tensor query, Tensor key, Tensor value, Tensor in_proj_weight,
                      OptionalTensor k_proj_weight, OptionalTensor v_proj_weight,
                      OptionalTensor in_proj_bias, Tensor out_proj_weight,
                      OptionalTensor out_proj_bias, OptionalTensor bias_k, OptionalTensor bias_v,
                      Tensor k_ring, Tensor v_ring, Tensor q_ring, Tensor position,
                      OptionalTensor active, bool add_zero_attn, double dropout_p, bool update) {
  const StepArgs a{query,         key,           value,           in_proj_weight, k_proj_weight,
                   v_proj_weight, in_proj_bias,  out_proj_weight, out_proj_bias,  bias_k,
                   bias_v,        k_ring,        v_ring,          q_ring,         position,
                   active,        add_zero_attn, update};
  STD_TORCH_CHECK(dropout_p == 0.0, kOp, " does not cover dropout");
  check_input(query, "query", a);
  check_input(key, "key", a);
  check_input(value, "value", a);
  check_weights(a);
  check_state(a);
  const int64_t N = a.num_streams();
  Tensor output = torch::stable::new_empty(query, {N, a.embed_dim()});
  if (N == 0) return output;
  RingStepParams p = make_params(a);
  p.output = output.data_ptr();
  if (N <= kMaxFusedStreams) {
    launch_step(p, a);
    return output;
  }
  const std::array<Tensor, 3> qkv = project_by_gemm(p, a);
  launch_step(p, a);
  return linear(output, out_proj_weight, out_proj_bias);
}

}  // namespace continual_mha::cuda

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CUDA, m) {
  m.impl("cuda_ring_step_", TORCH_BOX(&continual_mha::cuda::ring_step_cuda));
}
