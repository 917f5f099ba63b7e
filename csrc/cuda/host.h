// What the host side of every CUDA operator needs: error checks, the current stream, shapes.
#ifndef CONTINUAL_MHA_CUDA_HOST_H_
#define CONTINUAL_MHA_CUDA_HOST_H_

#include <cstdint>
#include <sstream>
#include <string>
#include <utility>

#include "../common.h"
#include "kernels.h"

namespace continual_mha::cuda {

template <typename... Args>
std::string concat(const Args&... args) {
  std::ostringstream stream;
  ((stream << args), ...);
  return stream.str();
}

// `where` names the operator and the shapes of the call; it is built for a failure only.
template <typename Where>
void check_cuda(cudaError_t error, const char* call, Where where) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a launch failure would otherwise be reported by the next call as well
  STD_TORCH_CHECK(false, where(), ": ", call, " failed: ", cudaGetErrorString(error));
}

inline bool aligned16(const void* pointer, int64_t row_bytes = 0) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && row_bytes % 16 == 0;
}

inline Element element_of(const Tensor& tensor, const char* op) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op,
      " covers float32, float16 and bfloat16 only");
  if (dtype == ScalarType::Float) return Element::kFloat32;
  return dtype == ScalarType::Half ? Element::kFloat16 : Element::kBFloat16;
}

// Launches `kernel`, whose one argument is `params`.
template <typename Params, typename Where>
void launch(const cudaLaunchConfig_t& config, const void* kernel, const Params& params,
            Where where) {
  Params copy = params;
  void* arguments[] = {&copy};
  check_cuda(cudaLaunchKernelExC(&config, kernel, arguments), "cudaLaunchKernelExC", where);
}

// The stream on which PyTorch runs the device's work. Looked up at run time, because PyTorch's
// libraries without CUDA do not have the function, and this library must load there.
cudaStream_t current_stream(int device);

// Makes a device current, for this library's own copy of the CUDA runtime, during a scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = 0;
  bool restore_ = false;
};

struct DeviceProperties {
  int multiprocessors;
  int compiled_for;  // which compute capability this library's code for it, may be below its own
  int shared_bytes;  // that one block may have
};

// Throws where this library holds no code for the device.
const DeviceProperties& device_properties(int device);

// Lets blocks of a kernel have all the shared memory of the current device `device`. It is always
// this much: less would take it from a launch that another thread is about to make.
template <typename Where>
void allow_shared_memory(const void* kernel, int device, Where where) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  device_properties(device).shared_bytes),
             "cudaFuncSetAttribute", where);
}

}  // namespace continual_mha::cuda

#endif  // CONTINUAL_MHA_CUDA_HOST_H_
