#if defined(__x86_64__)
#include "attend_shared_backward_kernel.h"
#include "product_kernel.h"
#include "project_kernel.h"
#include "ring_steps_kernel.h"

namespace continual_mha::cpu {
namespace {

// Those of AVX-512 but for projections, products, clips and forward_steps in bfloat16.
struct Table {
  Kernels kernels[kNumDTypes];

  Table() {
    for (int i = 0; i < kNumDTypes; ++i) kernels[i] = kernels_avx512()[i];
    Kernels& of_bfloat16 = kernels[static_cast<int>(DType::kBFloat16)];
    of_bfloat16.projection = of_bfloat16.of_rows = projection<BFloat16, BFloat16>();
    set_products<BFloat16>(of_bfloat16);
    set_clips<BFloat16>(of_bfloat16);
    of_bfloat16.ring_steps_scratch = ring_steps_scratch<BFloat16>;
    of_bfloat16.ring_steps[static_cast<int>(RingDType::kAsTokens)] = ring_steps<BFloat16, BFloat16>;
  }
};

}  // namespace

const Kernels* kernels_avx512_bf16() {
  static const Table table;
  return table.kernels;
}

}  // namespace continual_mha::cpu
#endif
