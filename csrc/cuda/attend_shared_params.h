// What launches of single-query attention over a shared tile are told.
#ifndef CONTINUAL_MHA_CUDA_ATTEND_SHARED_PARAMS_H_
#define CONTINUAL_MHA_CUDA_ATTEND_SHARED_PARAMS_H_

#include <cstdint>

#include "tiles.h"

namespace continual_mha::cuda {

// A warp per head forms the softmax.
constexpr int kTileHeads = kWarps;
constexpr int kTileRows = 4;

// A tensor of float32 or of the kernel's element type.
struct FloatLike {
  const void* data;
  bool is_float;
};

struct AttendSharedParams {
  const void* query;  // (N, num_heads, key_dim)
  const void* key;    // (N, rows, key_dim)
  const void* value;  // (N, rows, value_dim), maybe the key itself
  FloatLike mask;     // (N or 1, num_heads or 1, rows) or null
  int64_t mask_stride_n;
  int64_t mask_stride_h;
  int64_t mask_stride_s;
  FloatLike sink;         // (N, num_heads) or null
  void* out;              // (N, num_heads, value_dim)
  float* lse;             // (N, num_heads)
  const void* grad_out;   // (N, num_heads, value_dim)
  const float* grad_lse;  // (N, num_heads) or null
  void* dquery;           // (N, num_heads, key_dim)
  float* dsink;           // (N, num_heads)
  float* weights;         // (N, head tiles, rows, kTileHeads)
  float* dscores;         // (N, head tiles, rows, kTileHeads)
  int num_heads;
  int rows;
  int key_dim;
  int value_dim;
  bool key_aligned;  // rows begin at multiples of 16 bytes
  bool value_aligned;
};

__host__ __device__ inline int head_tiles(int num_heads) {
  return divide_up(num_heads, kTileHeads);
}

// Bytes of shared memory: the staged queries, the staged gradients if there are any, the statistics
// of each head, and room to sum over threads.
inline int attend_shared_bytes(const AttendSharedParams& p, int element_size, bool backward) {
  const int staged = round_up(p.key_dim, kPack) + (backward ? round_up(p.value_dim, kPack) : 0);
  return kTileHeads * staged * element_size +
         (2 * kTileHeads + kThreads * kPack) * static_cast<int>(sizeof(float));
}

struct OuterProduct {
  const float* weights;  // (N, head tiles, rows, kTileHeads)
  const void* vectors;   // (N, num_heads, cols)
};

// gradient[n, s] = sum over terms and heads of weights[n, s, h] * vectors[n, h]: of the keys from
// dscores and queries, of the values from weights and output gradients, of one tensor that is both
// from both.
struct OuterProductParams {
  OuterProduct terms[2];  // the second null if there is one
  void* gradient;         // (N, rows, cols)
  int64_t threads;        // N * row groups * column packs
  int num_heads;
  int rows;
  int cols;
  bool aligned;
};

}  // namespace continual_mha::cuda

#endif  // CONTINUAL_MHA_CUDA_ATTEND_SHARED_PARAMS_H_
