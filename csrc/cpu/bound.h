// Steps that are decided but for token and mask, held by the library until they are let go.
#pragma once

#include <cstdint>
#include <functional>

#include "../common.h"

namespace continual_mha::cpu {

// Takes a token (N, E), which is query, key and value, and the mask of active streams.
using BoundStep = std::function<Tensor(const Tensor& query, const OptionalTensor& active)>;

// A number for continual_mha::cpu_bound_step_ that was never given before.
int64_t bind(BoundStep step);

}  // namespace continual_mha::cpu
