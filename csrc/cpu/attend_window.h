// How operators hand many tokens of every stream over to their kernel.
#pragma once

#include "host.h"

namespace continual_mha::cpu {

// Rings and sizes of a call that writes to no ring, tokens and results aside; and what it drops, if
// there is a seed.
void put_windows(RingStepsParams& p, const Tensor& k_ring, const Tensor& v_ring,
                 const Tensor& position, int64_t tokens, int64_t first, const OptionalTensor& seed,
                 double dropout_p, const char* op);

// Runs the kernel, of which `ring` tells what the rings hold; sets `block_tokens`.
void attend_windows(RingStepsParams p, DType dtype, RingDType ring);

// The same for the gradients.
void attend_windows_backward(const WindowGradientParams& p, DType dtype);

}  // namespace continual_mha::cpu
