// continual_mha::cpu_bound_step_: a step whose other arguments the library holds. Each of the
// twenty would cost a tenth of a microsecond on its way through the dispatcher.
#include "bound.h"

#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace continual_mha::cpu {
namespace {

struct Steps {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<const BoundStep>> by_number;
  int64_t next = 0;
};

// Never destroyed: threads may still run when the process ends.
Steps& steps() {
  static Steps* const all = new Steps;
  return *all;
}

std::shared_ptr<const BoundStep> find(int64_t number) {
  const std::lock_guard<std::mutex> lock(steps().mutex);
  const auto found = steps().by_number.find(number);
  STD_TORCH_CHECK(found != steps().by_number.end(), "cpu_bound_step_: nothing is bound to ",
                  number);
  return found->second;
}

std::shared_ptr<const BoundStep> take(int64_t number) {
  const std::lock_guard<std::mutex> lock(steps().mutex);
  const auto found = steps().by_number.find(number);
  if (found == steps().by_number.end()) return nullptr;
  const auto step = std::move(found->second);
  steps().by_number.erase(found);
  return step;
}

}  // namespace

int64_t bind(BoundStep step) {
  auto shared = std::make_shared<const BoundStep>(std::move(step));
  const std::lock_guard<std::mutex> lock(steps().mutex);
  steps().by_number.emplace(steps().next, std::move(shared));
  return steps().next++;
}

Tensor bound_step(int64_t number, Tensor query, OptionalTensor active) {
  return (*find(number))(query, active);
}

}  // namespace continual_mha::cpu

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CPU, m) {
  m.impl("cpu_bound_step_", TORCH_BOX(&continual_mha::cpu::bound_step));
}

// Lets go of what is bound to a number, outside the lock: freeing a tensor may run anything. A call
// that is running keeps it until it ends.
extern "C" __attribute__((visibility("default"))) void continual_mha_cpu_unbind(int64_t number) {
  continual_mha::cpu::take(number);
}
