// Host side of continual_mha::cuda_ring_step_: checks, launch configuration, launch.
#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "host.h"

namespace continual_mha::cuda {
namespace {

constexpr const char* kOp = "cuda_ring_step_";

// With more streams than this, rereading the weights per team costs more than the two launches that
// matrix products by cuBLAS add. Estimated from bytes, not measured.
constexpr int64_t kMaxFusedStreams = 64;
// Up to this many streams, one team per stream fills the chip.
constexpr int64_t kMaxSingleStreams = 16;
// A cluster has at most 16 blocks. Where a team could use many more for a long window, their
// bandwidth is worth more than a fast merge. Estimated, not measured.
constexpr int kMaxClusterBlocks = 16;
constexpr int kMaxCounterBlocks = 128;
constexpr int kLongWindow = 1024;

struct StepArgs {
  Tensor query, key, value;
  Weights weights;
  Rings rings;
  RingSizes sizes;
  OptionalTensor active;
  bool add_zero_attn;
  bool update;

  bool packed() const { return !weights.k_proj_weight.has_value(); }

  std::string describe() const {
    return concat(kOp, " for query ", shape_of(query), " and k_ring ", shape_of(rings.k));
  }
};

// What only these kernels ask for, beyond what the operator does.
void check_covered(const StepArgs& a) {
  const RingSizes& s = a.sizes;
  STD_TORCH_CHECK(a.rings.k.is_cuda(), kOp, ": the rings are not on a CUDA device");
  STD_TORCH_CHECK(a.query.dim() == 2, kOp, ": tokens must be (N, E)");
  const Weights& w = a.weights;
  for (const OptionalTensor& matrix : {OptionalTensor(w.in_proj_weight), w.k_proj_weight,
                                       w.v_proj_weight, OptionalTensor(w.out_proj_weight)}) {
    STD_TORCH_CHECK(!matrix || matrix->is_contiguous(), kOp, ": a weight is not contiguous");
  }
  STD_TORCH_CHECK(s.query_slots != 1, kOp, ": the ring of queries has delay + 1 slots, or none");
  check_active(a.active, s.streams, a.rings.k, kOp);
  const int64_t row_bytes = s.head_dim * static_cast<int64_t>(a.rings.k.element_size());
  STD_TORCH_CHECK(s.head_dim <= kMaxHeadDim && aligned16(a.rings.k.data_ptr(), row_bytes) &&
                      aligned16(a.rings.v.data_ptr(), row_bytes),
                  a.describe(), ": covered are rows of whole 16 bytes and head_dim up to ",
                  kMaxHeadDim);
  constexpr int64_t kMaxSize = int64_t{1} << 30;
  STD_TORCH_CHECK(s.length < kMaxSize && s.streams < kMaxSize, a.describe(), ": too large");
}

Projection projection(const void* weight, int64_t cols, int64_t element_size) {
  return {weight, cols, static_cast<int>(cols), aligned16(weight, cols * element_size)};
}

RingStepParams make_params(const StepArgs& a) {
  RingStepParams p{};
  const int64_t E = a.sizes.embed_dim();
  const int64_t bytes = static_cast<int64_t>(a.query.element_size());
  const std::array<const Tensor*, 3> inputs{&a.query, &a.key, &a.value};
  for (int i = 0; i < 3; ++i) {
    const Tensor& x = *inputs[i];
    p.inputs[i] = {x.data_ptr(),
                   x.stride(0),
                   x.stride(1),
                   static_cast<int>(x.size(1)),
                   i == 0 || !same_tokens(x, a.query),
                   0,
                   0};
  }
  const char* packed = static_cast<const char*>(a.weights.in_proj_weight.data_ptr());
  const void* k_weight = a.packed() ? packed + E * E * bytes : a.weights.k_proj_weight->data_ptr();
  const void* v_weight =
      a.packed() ? packed + 2 * E * E * bytes : a.weights.v_proj_weight->data_ptr();
  p.in_proj[0] = projection(packed, E, bytes);
  p.in_proj[1] = projection(k_weight, a.key.size(1), bytes);
  p.in_proj[2] = projection(v_weight, a.value.size(1), bytes);
  p.out_proj = projection(a.weights.out_proj_weight.data_ptr(), E, bytes);
  p.in_proj_bias = data_or_null(a.weights.in_proj_bias);
  p.out_proj_bias = data_or_null(a.weights.out_proj_bias);
  p.bias_k = data_or_null(a.weights.bias_k);
  p.bias_v = data_or_null(a.weights.bias_v);
  p.k_ring = a.rings.k.data_ptr();
  p.v_ring = a.rings.v.data_ptr();
  p.q_ring = a.rings.q.data_ptr();
  p.position = static_cast<int64_t*>(a.rings.position.data_ptr());
  p.active = static_cast<const bool*>(data_or_null(a.active));
  p.num_streams = static_cast<int>(a.sizes.streams);
  p.embed_dim = static_cast<int>(E);
  p.num_heads = static_cast<int>(a.sizes.num_heads);
  p.sequence_len = static_cast<int>(a.sizes.length);
  p.head_dim = static_cast<int>(a.sizes.head_dim);
  p.query_slots = static_cast<int>(a.sizes.query_slots);
  p.head_groups = 1;
  p.splits = 1;
  p.scale_log2 =
      static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(p.head_dim)));
  p.add_zero_attn = a.add_zero_attn;
  p.update = a.update;
  return p;
}

// Whose counters a step takes. Steps of one stream never overlap, and share theirs. A captured step
// may be replayed beside anything but a step that advances the same rings.
struct CounterOwner {
  int device;
  bool captured;
  const void* address;  // the rings', or the stream
  bool operator<(const CounterOwner& other) const {
    return std::tie(device, captured, address) <
           std::tie(other.device, other.captured, other.address);
  }
};

// Counters for Merge::kCounter: the index of the first of `owner`'s, kOwnCounters in all, or -1 if
// there are none left. A step leaves its counters at zero, so that no launch is spent on them.
constexpr int kOwnCounters = 256;
int claim_counters(const CounterOwner& owner) {
  static std::mutex mutex;
  static std::map<CounterOwner, int> claims;
  static std::map<int, int> used;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = claims.find(owner);
  if (found != claims.end()) return found->second;
  int& next = used[owner.device];
  if (next + kOwnCounters > kStepCounters) return -1;
  const int first = next;
  next += kOwnCounters;
  claims[owner] = first;
  return first;
}

// The stream's own or, where a step has none or wants more, new ones zeroed on the stream.
unsigned int* find_counters(const StepArgs& a, int count, Tensor& scratch, cudaStream_t stream) {
  const auto where = [&a] { return a.describe(); };
  cudaStreamCaptureStatus capture{};
  check_cuda(cudaStreamIsCapturing(stream, &capture), "cudaStreamIsCapturing", where);
  const bool captured = capture != cudaStreamCaptureStatusNone;
  const void* address = captured ? a.rings.k.data_ptr() : static_cast<const void*>(stream);
  int first = -1;
  const bool own = captured ? a.update : stream != cudaStreamPerThread;  // one in every thread
  if (count <= kOwnCounters && own) {
    first = claim_counters({a.query.get_device_index(), captured, address});
  }
  void* counters = nullptr;
  if (first >= 0) {
    check_cuda(step_counters_address(&counters), "cudaGetSymbolAddress", where);
    return static_cast<unsigned int*>(counters) + first;
  }
  scratch = new_like(a.query, {count}, ScalarType::Int);
  counters = scratch.data_ptr();
  check_cuda(cudaMemsetAsync(counters, 0, count * sizeof(int), stream), "cudaMemsetAsync", where);
  return static_cast<unsigned int*>(counters);
}

// Lets a kernel use all shared memory, and asks once how many blocks a cluster of it may have.
int prepare_kernel(const void* kernel, int device, bool cluster, const StepArgs& a) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int> prepared;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = prepared.find({device, kernel});
  if (found != prepared.end()) return found->second;
  const auto where = [&a] { return a.describe(); };
  allow_shared_memory(kernel, device, where);
  int blocks = kMaxCounterBlocks;
  if (cluster) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
               "cudaFuncSetAttribute", where);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(kMaxClusterBlocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(device_properties(device).shared_bytes);
    check_cuda(cudaOccupancyMaxPotentialClusterSize(&blocks, kernel, &config),
               "cudaOccupancyMaxPotentialClusterSize", where);
    blocks = std::min(blocks, kMaxClusterBlocks);
  }
  prepared[{device, kernel}] = blocks;
  return blocks;
}

void launch_kernel(const void* kernel, const RingStepParams& p, int teams, bool cluster,
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
  launch(config, kernel, p, [&a] { return a.describe(); });
}

// Whether the blocks of a team form a cluster; `wanted` of them would fill the chip.
bool use_cluster(const RingStepParams& p, const DeviceProperties& device, int streams, int wanted) {
  if (device.compiled_for < kClustersFrom || p.projected[0] != nullptr) return false;
  const bool long_window = p.sequence_len >= kLongWindow && wanted >= 2 * kMaxClusterBlocks;
  return streams > 1 || !long_window;
}

// False, and nothing launched, if the device has too little shared memory for it.
bool launch_step(RingStepParams p, const StepArgs& a) {
  const int device = a.query.get_device_index();
  const DeviceScope scope(device);
  const DeviceProperties& properties = device_properties(device);
  const cudaStream_t stream = current_stream(device);
  const Element element = element_of(a.query, kOp);
  const int streams = p.projected[0] != nullptr || p.num_streams <= kMaxSingleStreams ? 1 : 4;
  const int teams = divide_up(p.num_streams, streams);
  const int wanted = properties.multiprocessors / teams;
  const bool cluster = use_cluster(p, properties, streams, wanted);
  const Merge merge = cluster ? Merge::kCluster : Merge::kCounter;
  const void* kernel = ring_step_kernel_for(element, streams, merge);
  const int max_blocks = prepare_kernel(kernel, device, cluster, a);
  if (p.projected[0] != nullptr) {
    if (!split_heads_to_fit(p, element_size(element), properties.shared_bytes)) return false;
  } else {
    split_work(p, wanted, max_blocks, cluster);
    plan_block(p, streams, element_size(element), merge);
    if (p.shared.total > properties.shared_bytes) return false;
  }
  Tensor scratch = a.query;
  Tensor counters = a.query;
  if (!cluster && p.head_groups * p.splits > 1) {
    const ScratchSizes sizes = scratch_sizes(p, teams, streams);
    scratch = new_like(a.query, {sizes.partial + sizes.partial_output}, ScalarType::Float);
    p.partial = static_cast<float*>(scratch.data_ptr());
    p.partial_output = p.partial + sizes.partial;
    p.done = find_counters(a, sizes.counters, counters, stream);
  }
  launch_kernel(kernel, p, teams, cluster, stream, a);
  return true;
}

// q, k and v by matrix products, and pointers to them in `p`. The result owns their memory.
std::array<Tensor, 3> project_by_gemm(RingStepParams& p, const StepArgs& a) {
  const int64_t E = a.sizes.embed_dim();
  const int64_t bytes = static_cast<int64_t>(a.query.element_size());
  for (StepInput& input : p.inputs) input.size = 0;  // the kernel stages none
  if (a.packed() && same_tokens(a.query, a.key, a.value)) {
    const Tensor qkv = linear(a.query, a.weights.in_proj_weight, a.weights.in_proj_bias);
    const char* data = static_cast<const char*>(qkv.data_ptr());
    for (int i = 0; i < 3; ++i) p.projected[i] = data + i * E * bytes;
    p.projected_stride = 3 * E;
    return {qkv, qkv, qkv};
  }
  const auto project = [&](int i, const Tensor& x, const OptionalTensor& own) {
    const OptionalTensor weight = a.packed() ? third(a.weights.in_proj_weight, i) : own;
    const Tensor out = linear(x, *weight, third(a.weights.in_proj_bias, i));
    p.projected[i] = out.data_ptr();
    return out;
  };
  p.projected_stride = E;
  return {project(0, a.query, a.weights.in_proj_weight), project(1, a.key, a.weights.k_proj_weight),
          project(2, a.value, a.weights.v_proj_weight)};
}

}  // namespace

// The operator ring_step_ of continual_mha/ops.py for CUDA tensors.
Tensor ring_step_cuda(Tensor query, Tensor key, Tensor value, Tensor in_proj_weight,
                      OptionalTensor k_proj_weight, OptionalTensor v_proj_weight,
                      OptionalTensor in_proj_bias, Tensor out_proj_weight,
                      OptionalTensor out_proj_bias, OptionalTensor bias_k, OptionalTensor bias_v,
                      Tensor k_ring, Tensor v_ring, Tensor q_ring, Tensor position,
                      OptionalTensor active, bool add_zero_attn, double dropout_p, bool update,
                      OptionalTensor k_scale, OptionalTensor v_scale, bool batch_invariant) {
  STD_TORCH_CHECK(!batch_invariant, kOp, " divides its work by the number of streams");
  STD_TORCH_CHECK(!k_scale && !v_scale, kOp, " does not cover rings of 8 bits");
  STD_TORCH_CHECK(dropout_p == 0.0, kOp, " does not cover dropout");
  const Rings rings{k_ring, v_ring, q_ring, position};
  const StepArgs a{query,
                   key,
                   value,
                   {in_proj_weight, k_proj_weight, v_proj_weight, in_proj_bias, out_proj_weight,
                    out_proj_bias, bias_k, bias_v},
                   rings,
                   check_rings(rings, kOp),
                   active ? OptionalTensor(as_contiguous(*active)) : active,
                   add_zero_attn,
                   update};
  check_tokens(query, key, value, a.weights, rings, a.sizes, kOp);
  check_covered(a);
  const int64_t N = a.sizes.streams;
  Tensor output = new_like(query, {N, a.sizes.embed_dim()});
  if (N == 0) return output;
  RingStepParams p = make_params(a);
  p.output = output.data_ptr();
  if (N <= kMaxFusedStreams && launch_step(p, a)) return output;
  const std::array<Tensor, 3> qkv = project_by_gemm(p, a);
  STD_TORCH_CHECK(launch_step(p, a), a.describe(), ": too little shared memory for one stream");
  return linear(output, out_proj_weight, out_proj_bias);
}

}  // namespace continual_mha::cuda

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CUDA, m) {
  m.impl("cuda_ring_step_", TORCH_BOX(&continual_mha::cuda::ring_step_cuda));
}
