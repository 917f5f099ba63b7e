// The table of one instruction set: included by kernels_*.cpp alone.
#pragma once

#include "attend_shared_kernel.h"
#include "kernels.h"
#include "project_kernel.h"
#include "ring_step_kernel.h"
#include "ring_steps_kernel.h"

namespace continual_mha::cpu {
namespace {

template <class S>
constexpr Kernels table_of() {
  return {gather<S>,
          project<S>,
          ring_step_scratch<S>,
          ring_step<S>,
          ring_steps_scratch<S>,
          ring_steps<S>,
          attend_shared_scratch<S>,
          attend_shared<S>};
}

constexpr Kernels kTable[kNumDTypes] = {table_of<float>(), table_of<BFloat16>(),
                                        table_of<Float16>(), table_of<double>()};

}  // namespace
}  // namespace continual_mha::cpu
