#if defined(__x86_64__)
#include "bfloat16_pairs.h"
#include "project_kernel.h"

namespace continual_mha::cpu {
namespace {

// Those of AVX-512 but for the projections of bfloat16.
struct Table {
  Kernels kernels[kNumDTypes];

  Table() {
    for (int i = 0; i < kNumDTypes; ++i) kernels[i] = kernels_avx512()[i];
    set_projections<BFloat16, BFloat16>(kernels[static_cast<int>(DType::kBFloat16)]);
  }
};

}  // namespace

const Kernels* kernels_avx512_bf16() {
  static const Table table;
  return table.kernels;
}

}  // namespace continual_mha::cpu
#endif
