#include "kernels_impl.h"

namespace continual_mha::cpu {

const Kernels* kernels_baseline() { return kTable; }

}  // namespace continual_mha::cpu
