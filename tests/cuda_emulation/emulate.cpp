// The CUDA kernels as plain C functions on host memory, for tests/test_cuda_emulation.py, which
// compiles this with emulated_device.h in front. Launches may also be recorded, and not run.
#include <dlfcn.h>

#include "../../csrc/cuda/attend_shared.cuh"
#include "../../csrc/cuda/ring_step.cuh"

namespace cuda = continual_mha::cuda;

namespace {

// Element type, as the test passes it.
enum DType : int64_t { kFloat32, kFloat16, kBFloat16 };

// Told of launches in place of the emulation: the kernel's symbol, grid, blocks of a cluster,
// threads of a block, bytes of shared memory, and the parameters.
using Recorder = void (*)(const char*, int, int, int, int, const void*, int);
Recorder recorder = nullptr;

template <typename Params>
void launch(void (*kernel)(Params), const Params& params, int grid, int cluster, int shared_bytes,
            uint64_t seed) {
  if (recorder == nullptr) {
    emulation::launch(grid, cluster, cuda::kThreads, shared_bytes, seed, [&] { kernel(params); });
    return;
  }
  Dl_info symbol{};
  if (dladdr(reinterpret_cast<void*>(kernel), &symbol) == 0) emulation::fail("a nameless kernel");
  recorder(symbol.dli_sname, grid, cluster, cuda::kThreads, shared_bytes, &params, sizeof(params));
}

template <typename T, int kStreams, cuda::Merge kMerge>
void launch_ring_step(const cuda::RingStepParams& p, uint64_t seed) {
  const int blocks = p.head_groups * p.splits;
  const int teams = cuda::divide_up(p.num_streams, kStreams);
  launch(&cuda::ring_step_kernel<T, kStreams, kMerge>, p, teams * blocks,
         kMerge == cuda::Merge::kCluster ? blocks : 1, p.shared.total, seed);
}

template <typename T>
void choose_ring_step(cuda::RingStepParams p, int streams, bool cluster, uint64_t seed) {
  cuda::plan_block(p, streams, sizeof(T), cluster ? cuda::Merge::kCluster : cuda::Merge::kCounter);
  if (streams == 1) {
    cluster ? launch_ring_step<T, 1, cuda::Merge::kCluster>(p, seed)
            : launch_ring_step<T, 1, cuda::Merge::kCounter>(p, seed);
  } else {
    cluster ? launch_ring_step<T, 4, cuda::Merge::kCluster>(p, seed)
            : launch_ring_step<T, 4, cuda::Merge::kCounter>(p, seed);
  }
}

template <typename T>
void outer_product(const cuda::OuterProduct& first, const cuda::OuterProduct& second,
                   void* gradient, int64_t streams, int cols, const cuda::AttendSharedParams& p,
                   uint64_t seed) {
  cuda::OuterProductParams o{};
  o.terms[0] = first;
  o.terms[1] = second;
  o.gradient = gradient;
  o.num_heads = p.num_heads;
  o.rows = p.rows;
  o.cols = cols;
  o.threads =
      streams * cuda::divide_up(o.rows, cuda::kTileRows) * cuda::divide_up(cols, cuda::kPack);
  o.aligned = cols * sizeof(T) % 16 == 0;
  const int blocks = static_cast<int>((o.threads + cuda::kThreads - 1) / cuda::kThreads);
  launch(&cuda::outer_product_kernel<T>, o, blocks, 1, 0, seed);
}

template <typename T>
void run_attend_shared(cuda::AttendSharedParams p, int64_t streams, bool backward, void* dkey,
                       void* dvalue, uint64_t seed) {
  p.key_aligned = p.key_dim * sizeof(T) % 16 == 0;
  p.value_aligned = p.value_dim * sizeof(T) % 16 == 0;
  const int blocks = static_cast<int>(streams) * cuda::head_tiles(p.num_heads);
  launch(backward ? &cuda::attend_shared_backward_kernel<T> : &cuda::attend_shared_kernel<T>, p,
         blocks, 1, cuda::attend_shared_bytes(p, sizeof(T), backward), seed);
  if (!backward) return;
  const bool one_tensor = p.value == p.key;
  const cuda::OuterProduct of_key{p.dscores, p.query};
  const cuda::OuterProduct of_value{p.weights, p.grad_out};
  outer_product<T>(of_key, one_tensor ? of_value : cuda::OuterProduct{}, dkey, streams, p.key_dim,
                   p, seed);
  if (!one_tensor) outer_product<T>(of_value, {}, dvalue, streams, p.value_dim, p, seed);
}

}  // namespace

extern "C" {

void declare_memory(const void* data, int64_t bytes) {
  emulation::declare_memory(data, static_cast<size_t>(bytes));
}

int shared_bytes(int key_dim, int value_dim, int element_size, bool backward) {
  cuda::AttendSharedParams p{};
  p.key_dim = key_dim;
  p.value_dim = value_dim;
  return cuda::attend_shared_bytes(p, element_size, backward);
}

// From now on launches are recorded and not run; null ends it.
void record(Recorder told) { recorder = told; }

void forget_memory() { emulation::machine().memory.clear(); }

// `tensors` in the order of the operator's tensor arguments, then output, partial, partial_output,
// done, and projected q, k, v; `strides` of query, key and value, two each; `sizes` as below.
void ring_step(void* const* tensors, const int64_t* strides, const int64_t* sizes) {
  enum {
    N,
    E,
    H,
    L,
    R,
    Ek,
    Ev,
    kDType,
    kStreams,
    kGroups,
    kSplits,
    kCluster,
    kZero,
    kUpdate,
    kSeed
  };
  cuda::RingStepParams p{};
  const int width[3] = {static_cast<int>(sizes[E]), static_cast<int>(sizes[Ek]),
                        static_cast<int>(sizes[Ev])};
  const int element = sizes[kDType] == kFloat32 ? 4 : 2;
  for (int i = 0; i < 3; ++i) {
    p.inputs[i] = {tensors[i],
                   strides[2 * i],
                   strides[2 * i + 1],
                   width[i],
                   i == 0 || tensors[i] != tensors[0],
                   0,
                   0};
    p.in_proj[i] = {tensors[3 + i], width[i], width[i], width[i] * element % 16 == 0};
    p.projected[i] = tensors[22 + i];
  }
  p.projected_stride = sizes[E];
  p.in_proj_bias = tensors[6];
  p.out_proj = {tensors[7], sizes[E], width[0], true};
  p.out_proj_bias = tensors[8];
  p.bias_k = tensors[9];
  p.bias_v = tensors[10];
  p.k_ring = tensors[11];
  p.v_ring = tensors[12];
  p.q_ring = tensors[13];
  p.position = static_cast<int64_t*>(tensors[14]);
  p.active = static_cast<const bool*>(tensors[15]);
  p.output = tensors[18];
  p.partial = static_cast<float*>(tensors[19]);
  p.partial_output = static_cast<float*>(tensors[20]);
  p.done = static_cast<unsigned int*>(tensors[21]);
  p.num_streams = sizes[N];
  p.embed_dim = sizes[E];
  p.num_heads = sizes[H];
  p.head_dim = sizes[E] / sizes[H];
  p.sequence_len = sizes[L];
  p.query_slots = sizes[R];
  p.head_groups = sizes[kGroups];
  p.splits = sizes[kSplits];
  p.scale_log2 = 1.4426950408889634 / std::sqrt(static_cast<double>(p.head_dim));
  p.add_zero_attn = sizes[kZero];
  p.update = sizes[kUpdate];
  const bool cluster = sizes[kCluster];
  switch (sizes[kDType]) {
    case kFloat32:
      return choose_ring_step<float>(p, sizes[kStreams], cluster, sizes[kSeed]);
    case kFloat16:
      return choose_ring_step<torch::headeronly::Half>(p, sizes[kStreams], cluster, sizes[kSeed]);
    default:
      return choose_ring_step<torch::headeronly::BFloat16>(p, sizes[kStreams], cluster,
                                                           sizes[kSeed]);
  }
}

// Head groups, splits and bytes of shared memory that the launch of a step would choose.
void plan_step(const int64_t* sizes, int64_t* plan) {
  enum { E, H, L, kElementSize, kStreams, kWanted, kMaxBlocks, kCluster };
  cuda::RingStepParams p{};
  p.embed_dim = static_cast<int>(sizes[E]);
  p.num_heads = static_cast<int>(sizes[H]);
  p.head_dim = p.embed_dim / p.num_heads;
  p.sequence_len = static_cast<int>(sizes[L]);
  for (int i = 0; i < 3; ++i) {
    p.inputs[i].size = p.embed_dim;
    p.inputs[i].staged = i == 0;
  }
  cuda::split_work(p, static_cast<int>(sizes[kWanted]), static_cast<int>(sizes[kMaxBlocks]),
                   sizes[kCluster] != 0);
  cuda::plan_block(p, static_cast<int>(sizes[kStreams]), static_cast<int>(sizes[kElementSize]),
                   sizes[kCluster] != 0 ? cuda::Merge::kCluster : cuda::Merge::kCounter);
  plan[0] = p.head_groups;
  plan[1] = p.splits;
  plan[2] = p.shared.total;
}

// `tensors`: query, key, value, mask, sink, out, lse, weights, and for the backward pass grad_out,
// grad_lse, dquery, dkey, dvalue, dsink, dscores. mask is a full (N, H, S) tensor. Without a value
// there is no dvalue, and dkey is of both.
void attend_shared(void* const* tensors, const int64_t* sizes) {
  enum { N, H, S, Ek, Ev, kDType, kBackward, kSeed };
  cuda::AttendSharedParams p{};
  const bool is_float = sizes[kDType] == kFloat32;
  p.query = tensors[0];
  p.key = tensors[1];
  p.value = tensors[2] != nullptr ? tensors[2] : tensors[1];
  p.mask = {tensors[3], is_float};
  p.mask_stride_n = sizes[H] * sizes[S];
  p.mask_stride_h = sizes[S];
  p.mask_stride_s = 1;
  p.sink = {tensors[4], is_float};
  p.out = tensors[5];
  p.lse = static_cast<float*>(tensors[6]);
  p.weights = static_cast<float*>(tensors[7]);
  p.grad_out = tensors[8];
  p.grad_lse = static_cast<const float*>(tensors[9]);
  p.dquery = tensors[10];
  p.dsink = static_cast<float*>(tensors[13]);
  p.dscores = static_cast<float*>(tensors[14]);
  p.num_heads = static_cast<int>(sizes[H]);
  p.rows = static_cast<int>(sizes[S]);
  p.key_dim = static_cast<int>(sizes[Ek]);
  p.value_dim = static_cast<int>(sizes[Ev]);
  const auto run = [&](auto element) {
    run_attend_shared<decltype(element)>(p, sizes[N], sizes[kBackward], tensors[11], tensors[12],
                                         sizes[kSeed]);
  };
  switch (sizes[kDType]) {
    case kFloat32:
      return run(float{});
    case kFloat16:
      return run(torch::headeronly::Half{});
    default:
      return run(torch::headeronly::BFloat16{});
  }
}

}  // extern "C"
