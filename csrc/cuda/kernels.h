// The compiled kernels, as launches need them. Device code is compiled apart from the operators, so
// that PyTorch's headers are not read once more for every target.
#ifndef CONTINUAL_MHA_CUDA_KERNELS_H_
#define CONTINUAL_MHA_CUDA_KERNELS_H_

#include <cuda_runtime_api.h>

#include "attend_shared_params.h"
#include "ring_step_params.h"

namespace continual_mha::cuda {

// Takes RingStepParams; `streams` per team is 1 or 4.
const void* ring_step_kernel_for(Element element, int streams, Merge merge);

// Take AttendSharedParams and OuterProductParams.
const void* attend_shared_kernel_for(Element element, bool backward);
const void* outer_product_kernel_for(Element element);

// Counters for Merge::kCounter on the current device, zero at first.
constexpr int kStepCounters = 1 << 16;
cudaError_t step_counters_address(void** address);

}  // namespace continual_mha::cuda

#endif  // CONTINUAL_MHA_CUDA_KERNELS_H_
