#if defined(__x86_64__)
#include <algorithm>
#include <array>

#include "bfloat16_pairs.h"
#include "project_kernel.h"

namespace continual_mha::cpu {
namespace {

// Those of AVX-512 but for the projections of bfloat16.
std::array<Kernels, kNumDTypes> make_table() {
  std::array<Kernels, kNumDTypes> table;
  std::copy_n(kernels_avx512(), kNumDTypes, table.begin());
  set_projections<BFloat16, BFloat16>(table[static_cast<int>(DType::kBFloat16)]);
  return table;
}

}  // namespace

const Kernels* kernels_avx512_bf16() {
  static const std::array<Kernels, kNumDTypes> table = make_table();
  return table.data();
}

}  // namespace continual_mha::cpu
#endif
