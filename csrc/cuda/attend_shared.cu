#include "attend_shared.cuh"
#include "kernels.h"

namespace continual_mha::cuda {
namespace {

template <typename T>
const void* kernel_for(bool backward) {
  return backward ? reinterpret_cast<const void*>(attend_shared_backward_kernel<T>)
                  : reinterpret_cast<const void*>(attend_shared_kernel<T>);
}

}  // namespace

const void* attend_shared_kernel_for(Element element, bool backward) {
  if (element == Element::kFloat32) return kernel_for<float>(backward);
  if (element == Element::kFloat16) return kernel_for<torch::headeronly::Half>(backward);
  return kernel_for<torch::headeronly::BFloat16>(backward);
}

const void* outer_product_kernel_for(Element element) {
  if (element == Element::kFloat32) {
    return reinterpret_cast<const void*>(outer_product_kernel<float>);
  }
  if (element == Element::kFloat16) {
    return reinterpret_cast<const void*>(outer_product_kernel<torch::headeronly::Half>);
  }
  return reinterpret_cast<const void*>(outer_product_kernel<torch::headeronly::BFloat16>);
}

}  // namespace continual_mha::cuda
