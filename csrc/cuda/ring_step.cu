#include "kernels.h"
#include "ring_step.cuh"

namespace continual_mha::cuda {
namespace {

__device__ unsigned int step_counters[kStepCounters];

template <typename T>
const void* kernel_for(int streams, Merge merge) {
  if (streams == 1) {
    return merge == Merge::kCluster
               ? reinterpret_cast<const void*>(ring_step_kernel<T, 1, Merge::kCluster>)
               : reinterpret_cast<const void*>(ring_step_kernel<T, 1, Merge::kCounter>);
  }
  return merge == Merge::kCluster
             ? reinterpret_cast<const void*>(ring_step_kernel<T, 4, Merge::kCluster>)
             : reinterpret_cast<const void*>(ring_step_kernel<T, 4, Merge::kCounter>);
}

}  // namespace

const void* ring_step_kernel_for(Element element, int streams, Merge merge) {
  if (element == Element::kFloat32) return kernel_for<float>(streams, merge);
  if (element == Element::kFloat16) return kernel_for<torch::headeronly::Half>(streams, merge);
  return kernel_for<torch::headeronly::BFloat16>(streams, merge);
}

cudaError_t step_counters_address(void** address) {
  return cudaGetSymbolAddress(address, step_counters);
}

}  // namespace continual_mha::cuda
