// The table of one instruction set: included by kernels_*.cpp alone.
#pragma once

#include "attend_shared_backward_kernel.h"
#include "attend_shared_kernel.h"
#include "input_step_kernel.h"
#include "kernels.h"
#include "project_kernel.h"
#include "ring_step_kernel.h"
#include "ring_steps_kernel.h"

namespace continual_mha::cpu {
namespace {

template <class S>
constexpr Kernels table_of() {
  Kernels table{};
  set_projections<S, typename AccOf<S>::type>(table);
  table.ring_step_scratch[0] = ring_step_scratch<S, S>;
  table.ring_step[0] = ring_step<S, S>;
  if constexpr (sizeof(S) < 8) {
    table.ring_step_scratch[1] = ring_step_scratch<S, Int8>;
    table.ring_step[1] = ring_step<S, Int8>;
    table.ring_step_scratch[2] = ring_step_scratch<S, E4M3>;
    table.ring_step[2] = ring_step<S, E4M3>;
    table.quantize_tokens[1] = quantize_tokens<S, Int8>;
    table.quantize_tokens[2] = quantize_tokens<S, E4M3>;
    table.ring_steps[1] = ring_steps<S, Int8>;
    table.ring_steps[2] = ring_steps<S, E4M3>;
    table.put_input[1] = put_input<S, Int8>;
    table.put_input[2] = put_input<S, E4M3>;
    table.asked_input[1] = asked_input<S, Int8>;
    table.asked_input[2] = asked_input<S, E4M3>;
    table.mix_inputs[1] = mix_inputs<S, Int8>;
    table.mix_inputs[2] = mix_inputs<S, E4M3>;
  }
  table.put_input[0] = put_input<S, S>;
  table.asked_input[0] = asked_input<S, S>;
  table.move_queries = move_queries<S>;
  table.input_step_scratch = input_step_scratch<S>;
  table.mix_inputs[0] = mix_inputs<S, S>;
  table.project_mixed = project_mixed<S>;
  set_ring_steps<S>(table);
  table.average_weights = average_weights<S>;
  set_clips<S>(table);
  return table;
}

constexpr Kernels kTable[kNumDTypes] = {table_of<float>(), table_of<BFloat16>(),
                                        table_of<Float16>(), table_of<double>()};

}  // namespace
}  // namespace continual_mha::cpu
