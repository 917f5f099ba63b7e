// Which instruction set runs, decided once.
#include <atomic>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

bool has_amx() { return has_avx512_bf16() && has_matrix_unit(); }

bool has_avx2() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;  // older compilers do not know f16c by its name
  const bool has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c;
}
#endif

bool always() { return true; }

// The fastest first.
constexpr Isa kIsas[] = {
#if defined(__x86_64__)
    {"amx", kernels_amx, has_amx},          {"avx512_bf16", kernels_avx512_bf16, has_avx512_bf16},
    {"avx512", kernels_avx512, has_avx512}, {"avx2", kernels_avx2, has_avx2},
#endif
    {"baseline", kernels_baseline, always},
};

// In this order: what hands out a table may itself need the instruction set.
bool usable(const Isa& isa) { return isa.supported() && isa.table() != nullptr; }

const Isa* fastest() {
  for (const Isa& isa : kIsas) {
    if (usable(isa)) return &isa;
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

bool has_matrix_unit() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool found = [] {  // once: a virtual machine may take microseconds to answer
    constexpr unsigned kAmxBf16 = 1u << 22;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & kAmxBf16) == 0) return false;
    // A process has to ask for the state of the tiles, which is large.
    constexpr long kRequest = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long kTileData = 18;     // XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return found;
#else
  return false;
#endif
}

}  // namespace continual_mha::cpu

extern "C" {

// Called through ctypes.
__attribute__((visibility("default"))) const char* continual_mha_cpu_isa() {
  return continual_mha::cpu::current().load()->name;
}

// Runs the kernels of another instruction set from now on; false if this machine lacks it. For
// tests and measurements.
__attribute__((visibility("default"))) bool continual_mha_cpu_use_isa(const char* name) {
  using namespace continual_mha::cpu;
  for (const Isa& isa : kIsas) {
    if (std::strcmp(isa.name, name) != 0 || !usable(isa)) continue;
    current().store(&isa);
    return true;
  }
  return false;
}
}
