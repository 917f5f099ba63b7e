#if defined(__AMX_BF16__)
#include "matrix_unit_clips.h"
#include "matrix_unit_parts.h"
#include "matrix_unit_steps.h"
#include "matrix_unit_windows.h"
#else
#include "kernels.h"
#endif

namespace continual_mha::cpu {

#if defined(__AMX_BF16__)
namespace {

// Those of AVX-512 with pairs of bfloat16, but for projections, and products, clips and
// forward_steps, with their gradients, in bfloat16.
struct Table {
  Kernels kernels[kNumDTypes];

  Table() {
    for (int i = 0; i < kNumDTypes; ++i) kernels[i] = kernels_avx512_bf16()[i];
    Kernels& of_bfloat16 = kernels[static_cast<int>(DType::kBFloat16)];
    of_bfloat16.projection = kByMatrixUnit;
    kernels[static_cast<int>(DType::kFloat32)].projection = kByParts;
    set_products_of_unit(of_bfloat16);
    set_clips_of_unit(of_bfloat16);
    set_steps_of_unit(of_bfloat16);
    set_windows_of_unit(of_bfloat16);
  }
};

}  // namespace

const Kernels* kernels_amx() {
  static const Table table;
  return table.kernels;
}
#else
const Kernels* kernels_amx() { return nullptr; }
#endif

}  // namespace continual_mha::cpu
