// Sizes that kernels and their launches agree on.
#ifndef CONTINUAL_MHA_CUDA_TILES_H_
#define CONTINUAL_MHA_CUDA_TILES_H_

#ifndef CONTINUAL_MHA_CUDA_DEVICE_CUH_
#include <cuda_runtime_api.h>
#endif

namespace continual_mha::cuda {

constexpr int kWarpSize = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// Elements that a lane handles at once: 16 bytes of a 16-bit type, 32 bytes of float.
constexpr int kPack = 8;

__host__ __device__ constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

__host__ __device__ constexpr int divide_up(int value, int divisor) {
  return (value + divisor - 1) / divisor;
}

// Element type of a call's tensors.
enum class Element { kFloat32, kFloat16, kBFloat16 };

constexpr int element_size(Element element) { return element == Element::kFloat32 ? 4 : 2; }

}  // namespace continual_mha::cuda

#endif  // CONTINUAL_MHA_CUDA_TILES_H_
