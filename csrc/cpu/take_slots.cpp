// continual_mha::cpu_take_slots: a copy of what a stream's next tokens will overwrite, in one call.
#include <algorithm>
#include <cstring>

#include "host.h"

namespace continual_mha::cpu {
namespace {

constexpr const char* kOp = "cpu_take_slots";

}  // namespace

// Of a ring (N, L, E) or (N, H, L, D) of any dtype, the `count` slots from that of the token
// `first` after a stream's position on: (N, count, E) or (N, H, count, D).
Tensor take_slots(Tensor ring, Tensor position, int64_t first, int64_t count) {
  const int64_t dim = ring.dim();
  STD_TORCH_CHECK(dim == 3 || dim == 4, kOp, ": a ring must be (N, L, E) or (N, H, L, D)");
  const int64_t streams = ring.size(0);
  const int64_t groups = dim == 4 ? ring.size(1) : 1;
  const int64_t slots = ring.size(dim - 2);
  const int64_t width = ring.size(dim - 1);
  STD_TORCH_CHECK(first >= 0 && 0 <= count && count <= slots, kOp, ": slots ", first, " to ",
                  first + count, " of ", slots);
  check_position(position, streams, ring, kOp);
  check_stored(ring, kOp, "a ring");
  const Tensor kept = as_contiguous(ring);
  Tensor out = dim == 4 ? new_like(ring, {streams, groups, count, width})
                        : new_like(ring, {streams, count, width});
  if (count == 0) return out;
  const int64_t row = width * static_cast<int64_t>(ring.element_size());
  const char* from = static_cast<const char*>(kept.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t* at = static_cast<const int64_t*>(position.const_data_ptr());
  parallel(streams * groups, count * row, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slot = (at[i / groups] + first) % slots;
      const int64_t before_end = std::min(count, slots - slot);
      const char* group = from + i * slots * row;
      char* copy = to + i * count * row;
      std::memcpy(copy, group + slot * row, static_cast<size_t>(before_end * row));
      std::memcpy(copy + before_end * row, group, static_cast<size_t>((count - before_end) * row));
    }
  });
  return out;
}

}  // namespace continual_mha::cpu

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CPU, m) {
  m.impl("cpu_take_slots", TORCH_BOX(&continual_mha::cpu::take_slots));
}
