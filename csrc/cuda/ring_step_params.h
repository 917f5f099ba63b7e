// What a launch of the fused step is told, and how its work is divided among blocks.
#ifndef CONTINUAL_MHA_CUDA_RING_STEP_PARAMS_H_
#define CONTINUAL_MHA_CUDA_RING_STEP_PARAMS_H_

#include <cstdint>

#include "tiles.h"

namespace continual_mha::cuda {

// How the blocks of a team put their results together.
enum class Merge {
  kCounter,  // through device memory; the last block to finish a stage continues with the next
  kCluster,  // a thread-block cluster, through distributed shared memory (from sm_90 on)
};

constexpr int kClustersFrom = 90;  // the compute capability to compile for
constexpr int kStages = 4;
constexpr int kMaxHeadDim = kWarpSize * kPack;

struct StepInput {
  const void* data;  // (num_streams, size)
  int64_t stride_n;
  int64_t stride_e;
  int size;
  bool staged;   // false if it is the same tensor as an earlier input
  int x_offset;  // elements, in shared memory
  int x_stride;
};

struct Projection {
  const void* weight;
  int64_t ld;
  int cols;
  bool aligned;
};

// Byte offsets into shared memory.
struct StepShared {
  int x;
  int qkv;
  int task_out;
  int task_ml;
  int pair_ml;
  int heads_out;
  int state;
  int total;
};

struct RingStepParams {
  StepInput inputs[3];  // query, key, value
  Projection in_proj[3];
  Projection out_proj;
  const void* in_proj_bias;   // (3 * embed_dim) or null
  const void* out_proj_bias;  // (embed_dim) or null
  const void* bias_k;         // (embed_dim) or null
  const void* bias_v;
  // If projected[0] is set, q, k, v of shape (num_streams, embed_dim) are given, nothing is
  // projected, and the output is the attention's result before the output projection. Teams divide
  // only heads then, and merge nothing; Merge::kCounter tells who advances the positions.
  const void* projected[3];
  int64_t projected_stride;
  void* k_ring;  // (num_streams, num_heads, sequence_len, head_dim)
  void* v_ring;
  void* q_ring;           // (num_streams, query_slots, embed_dim)
  int64_t* position;      // (num_streams)
  const bool* active;     // (num_streams) or null
  void* output;           // (num_streams, embed_dim)
  float* partial;         // Merge::kCounter with splits > 1: see partial_stride()
  float* partial_output;  // Merge::kCounter: (teams, head_groups, kStreams, embed_dim)
  unsigned int* done;     // Merge::kCounter: (teams, head_groups + 1), all zero between launches
  int num_streams;
  int embed_dim;
  int num_heads;
  int head_dim;
  int sequence_len;
  int query_slots;
  int head_groups;
  int splits;
  int warps_per_head;  // warps that share the window part of one head of one stream
  int lanes_per_row;   // a power of two
  float scale_log2;    // log2(e) / sqrt(head_dim)
  bool add_zero_attn;
  bool update;
  StepShared shared;
};

// What a block knows of one of its streams.
struct StreamState {
  int64_t position;
  int slot;     // of the ring, for the new token
  int rows;     // slots that hold tokens, the new one included
  int q_write;  // slots of the query ring
  int q_read;
};

// Fills in what follows from the shape and from head_groups and splits.
inline void plan_block(RingStepParams& p, int streams, int element_size, Merge merge) {
  const int heads = p.num_heads / p.head_groups;
  const int group_dim = heads * p.head_dim;
  const int pairs = streams * heads;
  p.lanes_per_row = 1;
  while (p.lanes_per_row * kPack < p.head_dim) p.lanes_per_row *= 2;
  p.warps_per_head = 1;
  while (p.warps_per_head * 2 * pairs <= kWarps) p.warps_per_head *= 2;
  int x_elements = 0;
  for (StepInput& input : p.inputs) {
    if (!input.staged) {
      input.x_offset = p.inputs[0].x_offset;
      input.x_stride = p.inputs[0].x_stride;
      continue;
    }
    input.x_stride = round_up(input.size, kPack);
    input.x_offset = x_elements;
    x_elements += streams * input.x_stride;
  }
  StepShared& s = p.shared;
  int bytes = 0;
  const auto take = [&bytes](int size) {
    const int offset = bytes;
    bytes += round_up(size, 16);
    return offset;
  };
  constexpr int kFloat = sizeof(float);
  take(kStages * 2 * 32 * kThreads);  // the ring's stages, at offset 0
  s.x = take(x_elements * element_size);
  s.qkv = take(3 * streams * group_dim * kFloat);
  s.task_out = take(pairs * p.warps_per_head * p.head_dim * kFloat);
  s.task_ml = take(pairs * p.warps_per_head * 2 * kFloat);
  s.pair_ml = take(pairs * 2 * kFloat);
  // A block of a cluster takes a share of the output's rows, and the others those of its heads.
  const int projected_dim = merge == Merge::kCluster ? p.embed_dim : group_dim;
  s.heads_out = take(streams * round_up(projected_dim, kPack) * kFloat);
  s.state = take(streams * static_cast<int>(sizeof(StreamState)) + 16);
  s.total = bytes;
}

// Chooses head_groups and splits so that a team has at most `wanted` and `max_blocks` blocks. Heads
// are divided before the window. A cluster also divides the in-projection among its splits, and so
// gains from them for short windows too; its size is a power of two.
inline void split_work(RingStepParams& p, int wanted, int max_blocks, bool cluster) {
  const int blocks = wanted < max_blocks ? (wanted > 1 ? wanted : 1) : max_blocks;
  p.head_groups = 1;
  for (int groups = 2; groups <= blocks; ++groups) {
    const bool allowed = !cluster || (groups & (groups - 1)) == 0;
    if (allowed && p.num_heads % groups == 0) p.head_groups = groups;
  }
  p.splits = 1;
  const int work = cluster ? p.embed_dim / p.head_groups / kPack : p.sequence_len / 64;
  while (p.head_groups * p.splits * 2 <= blocks && p.splits * 2 <= work) p.splits *= 2;
}

// Divides the heads until a block's share of them fits into `shared_bytes`; false if it cannot.
inline bool split_heads_to_fit(RingStepParams& p, int element_size, int shared_bytes) {
  for (p.head_groups = 1; p.head_groups <= p.num_heads; ++p.head_groups) {
    if (p.num_heads % p.head_groups != 0) continue;
    plan_block(p, 1, element_size, Merge::kCounter);
    if (p.shared.total <= shared_bytes) return true;
  }
  return false;
}

// Floats that one block publishes for the merge of splits: per pair the maximum, the sum, and
// head_dim unnormalised outputs.
__host__ __device__ inline int64_t partial_stride(int pairs, int head_dim) {
  return static_cast<int64_t>(pairs) * (head_dim + 2);
}

struct ScratchSizes {
  int64_t partial;         // floats
  int64_t partial_output;  // floats
  int counters;
};

inline ScratchSizes scratch_sizes(const RingStepParams& p, int teams, int streams) {
  const int64_t groups = static_cast<int64_t>(teams) * p.head_groups;
  const int pairs = streams * (p.num_heads / p.head_groups);
  const bool sums = p.head_groups > 1 && p.projected[0] == nullptr;
  return {p.splits > 1 ? groups * p.splits * partial_stride(pairs, p.head_dim) : 0,
          sums ? groups * streams * p.embed_dim : 0, teams * (p.head_groups + 1)};
}

}  // namespace continual_mha::cuda

#endif  // CONTINUAL_MHA_CUDA_RING_STEP_PARAMS_H_
