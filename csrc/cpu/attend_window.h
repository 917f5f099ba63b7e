// How operators hand many tokens of every stream over to their kernel.
#pragma once

#include "host.h"

namespace continual_mha::cpu {

// Runs the kernel, of which `ring` tells what the rings hold; sets `block_tokens`.
void attend_windows(RingStepsParams p, DType dtype, RingDType ring);

// The same for the gradients.
void attend_windows_backward(const WindowGradientParams& p, DType dtype);

}  // namespace continual_mha::cpu
