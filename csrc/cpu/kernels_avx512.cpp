#if defined(__x86_64__)
#include "kernels_impl.h"

namespace continual_mha::cpu {

const Kernels* kernels_avx512() { return kTable; }

}  // namespace continual_mha::cpu
#endif
