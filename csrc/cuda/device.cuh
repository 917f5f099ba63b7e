// The few device primitives that the kernels use beyond plain CUDA C++, one function each, so that
// a host build can supply its own definitions (tests/cuda_emulation) and run the kernels unchanged.
#ifndef CONTINUAL_MHA_CUDA_DEVICE_CUH_
#define CONTINUAL_MHA_CUDA_DEVICE_CUH_

#include <cuda_runtime.h>

#include <cstdint>

namespace continual_mha::cuda {

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char storage[];
  return storage;
}

__device__ __forceinline__ float shuffle_xor(float value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// Reads 16 bytes that nothing writes during the kernel.
__device__ __forceinline__ uint4 load16(const void* address) {
  return __ldg(static_cast<const uint4*>(address));
}

__device__ __forceinline__ void store16(void* address, const uint4& bytes) {
  *static_cast<uint4*>(address) = bytes;
}

// Starts copying 16 bytes to shared memory; the bytes become zeros, and the source is not touched,
// when `valid` is false.
__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool valid) {
  const unsigned destination = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(global),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's committed groups are still under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Counts up, from `limit` to zero, and returns the count before. All that the block did before its
// last barrier lies before what a block does behind its next one, whose thread counts later. Fences
// promise this only in the thread that counts.
__device__ __forceinline__ unsigned int count_arrival(unsigned int* counter, unsigned int limit) {
  unsigned int before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(limit)
               : "memory");
  return before;
}

// Reads what another block wrote in this launch: past the first-level cache, which is not coherent.
__device__ __forceinline__ float load_published(const float* address) { return __ldcg(address); }

// Cluster primitives. The host launches kernels that use them on compute capability 9.0 and later
// only; older targets compile them to nothing.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
#endif
}

// For a barrier behind which nothing is read that was written before it: it waits for no writes.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive_relaxed();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_wait();
#endif
}

// The address, valid in this block, of `pointer`'s counterpart in the shared memory of `rank`.
template <typename T>
__device__ __forceinline__ T* cluster_map(T* pointer, int rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(pointer, rank));
#else
  return pointer;
#endif
}

}  // namespace continual_mha::cuda

#endif  // CONTINUAL_MHA_CUDA_DEVICE_CUH_
