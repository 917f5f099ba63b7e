#include "host.h"

#include <dlfcn.h>

#include <array>
#include <exception>
#include <mutex>
#include <string>

namespace continual_mha::cuda {

namespace {

using GetStream = AOTITorchError (*)(int32_t, void**);

GetStream find_get_stream() {
  const char* name = "aoti_torch_get_current_cuda_stream";
  void* function = dlsym(RTLD_DEFAULT, name);
  if (function == nullptr) {
    // Python loads PyTorch's libraries outside the global scope. This finds the one that is loaded,
    // and loads none.
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (library != nullptr) function = dlsym(library, name);
  }
  return reinterpret_cast<GetStream>(function);
}

}  // namespace

cudaStream_t current_stream(int device) {
  static const GetStream get_stream = find_get_stream();
  STD_TORCH_CHECK(get_stream != nullptr, "this PyTorch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream(device, &stream) == 0, "no current CUDA stream on device ", device);
  return static_cast<cudaStream_t>(stream);
}

DeviceScope::DeviceScope(int device) {
  const auto where = [device] { return concat("device ", device); };
  check_cuda(cudaGetDevice(&previous_), "cudaGetDevice", where);
  if (previous_ == device) return;
  check_cuda(cudaSetDevice(device), "cudaSetDevice", where);
  restore_ = true;
}

DeviceScope::~DeviceScope() {
  if (restore_) cudaSetDevice(previous_);
}

const DeviceProperties& device_properties(int device) {
  constexpr int kMaxDevices = 64;
  static std::array<DeviceProperties, kMaxDevices> properties{};
  static std::array<std::once_flag, kMaxDevices> known;
  STD_TORCH_CHECK(device >= 0 && device < kMaxDevices, "device index ", device, " is too large");
  std::call_once(known[device], [device] {
    const auto where = [device] { return concat("device ", device); };
    const auto read = [&](cudaDeviceAttr attribute) {
      int value = 0;
      check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute",
                 where);
      return value;
    };
    const DeviceScope scope(device);
    cudaFuncAttributes code{};
    const void* any = ring_step_kernel_for(Element::kFloat32, 1, Merge::kCounter);
    check_cuda(cudaFuncGetAttributes(&code, any), "cudaFuncGetAttributes", where);
    properties[device] = {read(cudaDevAttrMultiProcessorCount), code.ptxVersion,
                          read(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  });
  return properties[device];
}

}  // namespace continual_mha::cuda

// For Python, through ctypes: why this library does not run on a device; empty if it does.
extern "C" __attribute__((visibility("default"))) const char* continual_mha_cuda_why_not(
    int device) {
  static thread_local std::string reason;
  reason.clear();
  try {
    continual_mha::cuda::device_properties(device);
  } catch (const std::exception& error) {
    reason = error.what();
  }
  return reason.c_str();
}
