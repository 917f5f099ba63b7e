#if defined(__x86_64__)
#include "matrix_unit.h"

namespace continual_mha::cpu {
namespace {

// Those of AVX-512 with pairs of bfloat16, but for projections in bfloat16.
struct Table {
  Kernels kernels[kNumDTypes];

  Table() {
    for (int i = 0; i < kNumDTypes; ++i) kernels[i] = kernels_avx512_bf16()[i];
    kernels[static_cast<int>(DType::kBFloat16)].projection = kByMatrixUnit;
  }
};

}  // namespace

const Kernels* kernels_amx() {
  static const Table table;
  return table.kernels;
}

}  // namespace continual_mha::cpu
#endif
