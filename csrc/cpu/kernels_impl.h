// The table of one instruction set: included by kernels_*.cpp alone.
#pragma once

#include "attend_shared_backward_kernel.h"
#include "attend_shared_kernel.h"
#include "attend_window_backward_kernel.h"
#include "input_step_kernel.h"
#include "kernels.h"
#include "product_kernel.h"
#include "project_kernel.h"
#include "ring_step_backward_kernel.h"
#include "ring_step_kernel.h"
#include "ring_steps_kernel.h"

namespace continual_mha::cpu {
namespace {

// What reads and writes a ring that holds R.
template <class S, class R>
constexpr void set_ring(Kernels& table, RingDType kind) {
  const int ring = static_cast<int>(kind);
  table.ring_step_scratch[ring] = ring_step_scratch<S, R>;
  table.ring_step[ring] = ring_step<S, R>;
  table.ring_steps[ring] = ring_steps<S, R>;
  table.put_input[ring] = put_input<S, R>;
  table.asked_input[ring] = asked_input<S, R>;
  table.mix_inputs[ring] = mix_inputs<S, R>;
}

template <class S, class Code>
constexpr void set_ring_of_codes(Kernels& table, RingDType kind) {
  set_ring<S, Code>(table, kind);
  table.quantize_tokens[static_cast<int>(kind)] = quantize_tokens<S, Code>;
}

template <class S>
constexpr Kernels table_of() {
  Kernels table{};
  table.projection = table.of_rows = projection<S, typename AccOf<S>::type>();
  set_ring<S, S>(table, RingDType::kAsTokens);
  if constexpr (sizeof(S) < 8) {
    set_ring_of_codes<S, Int8>(table, RingDType::kInt8);
    set_ring_of_codes<S, E4M3>(table, RingDType::kE4M3);
  }
  set_products<S>(table);
  table.ring_gradient_scratch = ring_gradient_scratch<S>;
  table.ring_gradient = ring_gradient<S>;
  table.move_queries = move_queries<S>;
  table.input_step_scratch = input_step_scratch<S>;
  table.project_mixed = project_mixed<S>;
  table.ring_steps_scratch = ring_steps_scratch<S>;
  table.window_gradient_scratch = window_gradient_scratch<S>;
  table.window_gradient = window_gradient<S>;
  table.average_weights = average_weights<S>;
  set_clips<S>(table);
  return table;
}

constexpr Kernels kTable[kNumDTypes] = {table_of<float>(), table_of<BFloat16>(),
                                        table_of<Float16>(), table_of<double>()};

}  // namespace
}  // namespace continual_mha::cpu
