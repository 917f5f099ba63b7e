// Runs CUDA kernels on the host: every CUDA thread is a fiber, barriers and shuffles switch between
// fibers, and the order in which fibers and blocks run is drawn from a seed. Included before any
// kernel header, it takes the place of csrc/cuda/device.cuh.
//
// What it is stricter about than a GPU: shared memory and registers of asynchronous copies hold NaN
// until the wait that makes them visible, 16-byte accesses must be aligned and, once tensors
// are declared with `declare_memory`, inside one of them, and a barrier that not all threads reach
// is an error.
#ifndef CONTINUAL_MHA_CUDA_DEVICE_CUH_
#define CONTINUAL_MHA_CUDA_DEVICE_CUH_

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct Dim3 {
  unsigned int x, y, z;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};

using std::max;
using std::min;

namespace emulation {

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "emulated kernel: %s\n", message);
  std::abort();
}

struct Fiber;

// Reusable; arrival and waiting may be apart, as with a cluster's barrier.
struct Barrier {
  int expected = 0;
  int arrived = 0;
  uint64_t generation = 0;
  std::vector<Fiber*> waiting;
};

struct Warp {
  Barrier barrier;
  float exchange[32];
};

struct Cluster;

struct Block {
  std::vector<uint4> shared;
  Barrier barrier;
  std::vector<Warp> warps;
  Cluster* cluster = nullptr;
  Dim3 index{};
};

struct Cluster {
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Copy {
  void* destination;
  const void* source;
  bool valid;
};

struct Fiber {
  ucontext_t entry;
  jmp_buf resume;
  bool started = false;
  bool done = false;
  std::vector<char> stack;
  Block* block = nullptr;
  Dim3 thread{};
  uint64_t cluster_token = 0;
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> committed_copies;
  std::function<void()> body;
};

struct Machine {
  std::mt19937_64 random;
  std::vector<Fiber*> ready;
  Fiber* current = nullptr;
  ucontext_t scheduler_entry;
  jmp_buf scheduler;
  std::vector<std::pair<const char*, size_t>> memory;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

inline void declare_memory(const void* data, size_t bytes) {
  machine().memory.emplace_back(static_cast<const char*>(data), bytes);
}

inline void check_global(const void* address) {
  const char* a = static_cast<const char*>(address);
  if (reinterpret_cast<uintptr_t>(a) % 16 != 0) fail("unaligned 16-byte access");
  if (machine().memory.empty()) return;
  for (const auto& [data, bytes] : machine().memory) {
    if (a >= data && a + 16 <= data + bytes) return;
  }
  fail("16-byte access outside every tensor");
}

inline void suspend() {
  Machine& m = machine();
  if (_setjmp(m.current->resume) == 0) _longjmp(m.scheduler, 1);
}

inline void arrive(Barrier& barrier) {
  if (++barrier.arrived < barrier.expected) return;
  barrier.arrived = 0;
  ++barrier.generation;
  Machine& m = machine();
  m.ready.insert(m.ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
}

inline void wait(Barrier& barrier, uint64_t generation) {
  while (barrier.generation == generation) {
    barrier.waiting.push_back(machine().current);
    suspend();
  }
}

inline void synchronize(Barrier& barrier) {
  const uint64_t generation = barrier.generation;
  arrive(barrier);
  wait(barrier, generation);
}

inline void run_fiber() {
  Machine& m = machine();
  m.current->body();
  if (!m.current->open_copies.empty()) fail("asynchronous copies were not committed");
  m.current->done = true;
  _longjmp(m.scheduler, 1);
}

inline void switch_to(Fiber* fiber) {
  Machine& m = machine();
  m.current = fiber;
  if (_setjmp(m.scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->resume, 1);
  fiber->started = true;
  getcontext(&fiber->entry);
  fiber->entry.uc_stack.ss_sp = fiber->stack.data();
  fiber->entry.uc_stack.ss_size = fiber->stack.size();
  fiber->entry.uc_link = nullptr;
  makecontext(&fiber->entry, run_fiber, 0);
  setcontext(&fiber->entry);
}

inline void run_cluster(int first_block, int blocks, int threads, size_t shared_bytes,
                        const std::function<void()>& kernel, std::vector<Fiber>& fibers) {
  Machine& m = machine();
  Cluster cluster;
  cluster.barrier.expected = blocks * threads;
  m.ready.clear();
  for (int b = 0; b < blocks; ++b) {
    auto block = std::make_unique<Block>();
    // All bits set is NaN in every floating-point type.
    block->shared.assign((shared_bytes + 15) / 16, uint4{~0u, ~0u, ~0u, ~0u});
    block->barrier.expected = threads;
    block->warps.resize(threads / 32);
    for (Warp& warp : block->warps) warp.barrier.expected = 32;
    block->cluster = &cluster;
    block->index = {static_cast<unsigned int>(first_block + b), 0, 0};
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[b * threads + t];
      fiber.started = fiber.done = false;
      fiber.block = block.get();
      fiber.thread = {static_cast<unsigned int>(t), 0, 0};
      fiber.open_copies.clear();
      fiber.committed_copies.clear();
      fiber.body = kernel;
      m.ready.push_back(&fiber);
    }
    cluster.blocks.push_back(std::move(block));
  }
  while (!m.ready.empty()) {
    std::swap(m.ready[m.random() % m.ready.size()], m.ready.back());
    Fiber* fiber = m.ready.back();
    m.ready.pop_back();
    switch_to(fiber);
  }
  for (int i = 0; i < blocks * threads; ++i) {
    if (!fibers[i].done) fail("a barrier was not reached by all threads");
  }
}

// Runs clusters one after the other, in an order drawn from the seed, and the threads of a cluster
// in turns.
inline void launch(int grid, int cluster, int threads, size_t shared_bytes, uint64_t seed,
                   const std::function<void()>& kernel) {
  Machine& m = machine();
  m.random.seed(seed);
  std::vector<Fiber> fibers(static_cast<size_t>(cluster) * threads);
  for (Fiber& fiber : fibers) fiber.stack.resize(32 * 1024);
  std::vector<int> order(grid / cluster);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i) * cluster;
  std::shuffle(order.begin(), order.end(), m.random);
  for (int first : order) run_cluster(first, cluster, threads, shared_bytes, kernel, fibers);
}

inline Fiber& self() { return *machine().current; }

}  // namespace emulation

#define threadIdx (::emulation::self().thread)
#define blockIdx (::emulation::self().block->index)

inline void __syncthreads() { ::emulation::synchronize(::emulation::self().block->barrier); }
namespace continual_mha::cuda {

inline unsigned char* shared_memory() {
  return reinterpret_cast<unsigned char*>(emulation::self().block->shared.data());
}

inline float shuffle_xor(float value, int lane_mask) {
  emulation::Fiber& fiber = emulation::self();
  emulation::Warp& warp = fiber.block->warps[fiber.thread.x / 32];
  const int lane = fiber.thread.x % 32;
  warp.exchange[lane] = value;
  emulation::synchronize(warp.barrier);
  const float received = warp.exchange[lane ^ lane_mask];
  emulation::synchronize(warp.barrier);
  return received;
}

inline uint4 load16(const void* address) {
  emulation::check_global(address);
  return *static_cast<const uint4*>(address);
}

inline void store16(void* address, const uint4& bytes) {
  emulation::check_global(address);
  *static_cast<uint4*>(address) = bytes;
}

inline void copy_async16(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) emulation::fail("unaligned shared copy");
  if (valid) emulation::check_global(global);
  // Nobody may rely on the destination before the wait.
  std::memset(shared, 0xff, 16);
  emulation::self().open_copies.push_back({shared, global, valid});
}

inline void copy_async_commit() {
  emulation::Fiber& fiber = emulation::self();
  fiber.committed_copies.push_back(std::move(fiber.open_copies));
  fiber.open_copies.clear();
}

template <int kPending>
inline void copy_async_wait() {
  auto& groups = emulation::self().committed_copies;
  while (static_cast<int>(groups.size()) > kPending) {
    for (const emulation::Copy& copy : groups.front()) {
      if (copy.valid) {
        std::memcpy(copy.destination, copy.source, 16);
      } else {
        std::memset(copy.destination, 0, 16);
      }
    }
    groups.pop_front();
  }
}

inline unsigned int count_arrival(unsigned int* counter, unsigned int limit) {
  const unsigned int before = *counter;
  *counter = before >= limit ? 0 : before + 1;
  return before;
}

inline float load_published(const float* address) { return *address; }

inline void cluster_arrive() {
  emulation::Barrier& barrier = emulation::self().block->cluster->barrier;
  emulation::self().cluster_token = barrier.generation;
  emulation::arrive(barrier);
}

inline void cluster_arrive_relaxed() { cluster_arrive(); }

inline void cluster_wait() {
  emulation::wait(emulation::self().block->cluster->barrier, emulation::self().cluster_token);
}

template <typename T>
inline T* cluster_map(T* pointer, int rank) {
  emulation::Block* block = emulation::self().block;
  char* own = reinterpret_cast<char*>(block->shared.data());
  char* peer = reinterpret_cast<char*>(block->cluster->blocks.at(rank)->shared.data());
  return reinterpret_cast<T*>(peer + (reinterpret_cast<char*>(pointer) - own));
}

}  // namespace continual_mha::cuda

#endif  // CONTINUAL_MHA_CUDA_DEVICE_CUH_
