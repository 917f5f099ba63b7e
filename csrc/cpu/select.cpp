// Which instruction set runs, decided once.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace continual_mha::cpu {
namespace {

struct Isa {
  const char* name;
  const Kernels* (*table)();
  bool (*supported)();
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
#endif

bool always() { return true; }

// The fastest first.
constexpr Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512", kernels_avx512, has_avx512},
    {"avx2", kernels_avx2, has_avx2},
#endif
    {"baseline", kernels_baseline, always},
};

const Isa* fastest() {
  for (const Isa& isa : kIsas) {
    if (isa.supported()) return &isa;
  }
  return nullptr;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{fastest()};
  return isa;
}

}  // namespace

const Kernels& kernels(DType dtype) {
  return current().load(std::memory_order_relaxed)->table()[static_cast<int>(dtype)];
}

}  // namespace continual_mha::cpu

// For tests and measurements, through ctypes.
extern "C" {

__attribute__((visibility("default"))) const char* continual_mha_cpu_isa() {
  return continual_mha::cpu::current().load()->name;
}

// Runs the kernels of another instruction set from now on; false if this machine lacks it.
__attribute__((visibility("default"))) bool continual_mha_cpu_use_isa(const char* name) {
  using namespace continual_mha::cpu;
  for (const Isa& isa : kIsas) {
    if (std::strcmp(isa.name, name) != 0 || !isa.supported()) continue;
    current().store(&isa);
    return true;
  }
  return false;
}
}
