// The CUDA operators as they are, host code included, on CPU tensors and an emulated device:
// registers cuda_ring_step_, cuda_attend_shared and cuda_attend_shared_backward for the CPU key.
#include <set>

#include "../../csrc/common.h"

// The operators ask whether their tensors are where the kernels can reach them.
#define is_cuda is_cpu
#include "../../csrc/cuda/attend_shared.cpp"
#include "../../csrc/cuda/attend_shared.cu"
#include "../../csrc/cuda/ring_step.cpp"
#include "../../csrc/cuda/ring_step.cu"
#undef is_cuda

namespace cuda = continual_mha::cuda;

namespace {

cuda::DeviceProperties device{132, 90, 227 * 1024};
int max_cluster = 16;
int launches = 0;
bool failing = false;
void* stream = nullptr;
bool capturing = false;
std::set<const void*> with_all_shared;  // kernels whose blocks may have all shared memory
int counters = 0;                       // of the last step: see last_counters

template <typename Params>
void run(const cudaLaunchConfig_t& config, int cluster, const void* kernel, void** arguments) {
  const auto function = reinterpret_cast<void (*)(Params)>(const_cast<void*>(kernel));
  const auto& params = *static_cast<const Params*>(arguments[0]);
  emulation::launch(static_cast<int>(config.gridDim.x), cluster,
                    static_cast<int>(config.blockDim.x), config.dynamicSmemBytes,
                    static_cast<uint64_t>(++launches), [&] { function(params); });
}

int counters_of(const cuda::RingStepParams& p) {
  void* all = nullptr;
  cuda::step_counters_address(&all);
  const auto index = p.done - static_cast<unsigned int*>(all);
  if (p.done == nullptr) return -2;
  return index >= 0 && index < cuda::kStepCounters ? static_cast<int>(index) : -1;
}

bool takes_outer_product(const void* kernel) {
  for (int e = 0; e < 3; ++e) {
    if (kernel == cuda::outer_product_kernel_for(static_cast<cuda::Element>(e))) return true;
  }
  return false;
}

// Whether the compiler has made machine code of a step's kernel: see ring_step_kernel.
bool is_compiled(const void* kernel) {
  for (int e = 0; e < 3; ++e) {
    const auto kernel_for = [e](int streams, cuda::Merge merge) {
      return cuda::ring_step_kernel_for(static_cast<cuda::Element>(e), streams, merge);
    };
    const bool clusters = device.compiled_for >= cuda::kClustersFrom;
    if (kernel == kernel_for(1, cuda::Merge::kCluster)) return clusters;
    if (kernel == kernel_for(4, cuda::Merge::kCluster)) return clusters;
    if (kernel == kernel_for(4, cuda::Merge::kCounter)) return !clusters;
  }
  return true;
}

bool takes_attend_shared(const void* kernel) {
  for (int e = 0; e < 3; ++e) {
    for (const bool backward : {false, true}) {
      const auto element = static_cast<cuda::Element>(e);
      if (kernel == cuda::attend_shared_kernel_for(element, backward)) return true;
    }
  }
  return false;
}

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "emulated failure";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    // Less would take it from a launch that another thread is about to make.
    if (value != device.shared_bytes) return cudaErrorInvalidValue;
    with_all_shared.insert(kernel);
  }
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* blocks, const void*,
                                                 const cudaLaunchConfig_t*) {
  *blocks = max_cluster;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** arguments) {
  const int cluster = config->numAttrs == 1 ? static_cast<int>(config->attrs->val.clusterDim.x) : 1;
  const bool ring_step = !takes_outer_product(kernel) && !takes_attend_shared(kernel);
  if (ring_step) counters = counters_of(*static_cast<const cuda::RingStepParams*>(arguments[0]));
  const int shared_bytes = with_all_shared.count(kernel) ? device.shared_bytes : 48 * 1024;
  if (failing || config->dynamicSmemBytes > static_cast<size_t>(shared_bytes) ||
      cluster > max_cluster || config->gridDim.x % cluster != 0 || !is_compiled(kernel)) {
    return cudaErrorInvalidValue;
  }
  if (takes_outer_product(kernel)) {
    run<cuda::OuterProductParams>(*config, cluster, kernel, arguments);
  } else if (takes_attend_shared(kernel)) {
    run<cuda::AttendSharedParams>(*config, cluster, kernel, arguments);
  } else {
    run<cuda::RingStepParams>(*config, cluster, kernel, arguments);
  }
  return cudaSuccess;
}

namespace continual_mha::cuda {

cudaStream_t current_stream(int) { return stream; }
DeviceScope::DeviceScope(int) {}
DeviceScope::~DeviceScope() {}
const DeviceProperties& device_properties(int) { return device; }

}  // namespace continual_mha::cuda

#pragma GCC visibility push(default)
extern "C" {

// From now on operators see such a device; a failing one refuses every launch.
void set_device(int multiprocessors, int compiled_for, int shared_bytes, bool fail) {
  device = {multiprocessors, compiled_for, shared_bytes};
  failing = fail;
  emulation::machine().memory.clear();
}

int count_launches() { return launches; }

// From now on that is the current stream, and it may be capturing.
void set_stream(int64_t handle, bool captures) {
  stream = reinterpret_cast<void*>(handle);
  capturing = captures;
}

// Which of the counters kept between launches the last step was to use; -1 if others, -2 if none.
int last_counters() { return counters; }
}
#pragma GCC visibility pop

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CPU, m) {
  m.impl("cuda_ring_step_", TORCH_BOX(&continual_mha::cuda::ring_step_cuda));
  m.impl("cuda_attend_shared", TORCH_BOX(&continual_mha::cuda::attend_shared_cuda));
  m.impl("cuda_attend_shared_backward",
         TORCH_BOX(&continual_mha::cuda::attend_shared_backward_cuda));
}
