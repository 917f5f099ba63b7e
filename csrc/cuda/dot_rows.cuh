// Warp-wide dot products of matrix rows in global memory with vectors in shared memory.
#ifndef CONTINUAL_MHA_CUDA_DOT_ROWS_CUH_
#define CONTINUAL_MHA_CUDA_DOT_ROWS_CUH_

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "device.cuh"
#include "tiles.h"

namespace continual_mha::cuda {

// 16-byte pieces of one pack.
template <typename T>
constexpr int kPieces = kPack * static_cast<int>(sizeof(T)) / 16;

template <typename T>
struct Pack {
  uint4 piece[kPieces<T>];
};

template <typename T>
__device__ __forceinline__ void unpack(const Pack<T>& pack, float (&out)[kPack]) {
  T element[kPack];
  memcpy(element, pack.piece, sizeof(element));
#pragma unroll
  for (int i = 0; i < kPack; ++i) out[i] = static_cast<float>(element[i]);
}

template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* global) {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < kPieces<T>; ++i) {
    pack.piece[i] = load16(reinterpret_cast<const uint4*>(global) + i);
  }
  return pack;
}

template <typename T>
__device__ __forceinline__ void unpack_shared(const T* shared, float (&out)[kPack]) {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < kPieces<T>; ++i) {
    pack.piece[i] = reinterpret_cast<const uint4*>(shared)[i];
  }
  unpack(pack, out);
}

// Sums each of kValues per-lane values over the warp, with kValues - 1 + log2(32 / kValues)
// shuffles. The lanes with lane / (32 / kValues) == i return the sum of value i. The order of the
// additions is the same tree for every kValues, so that a sum does not depend on its neighbours.
template <int kValues, int kOffset = kWarpSize / 2>
__device__ __forceinline__ float warp_sums(const float (&value)[kValues], int lane) {
  static_assert(kValues <= 2 * kOffset && (kValues & (kValues - 1)) == 0);
  constexpr int kKept = kValues > 1 ? kValues / 2 : 1;
  float kept[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if constexpr (kValues > 1) {
      const bool upper = lane & kOffset;
      const float send = upper ? value[i] : value[i + kKept];
      kept[i] = (upper ? value[i + kKept] : value[i]) + shuffle_xor(send, kOffset);
    } else {
      kept[i] = value[i] + shuffle_xor(value[i], kOffset);
    }
  }
  if constexpr (kOffset == 1) {
    return kept[0];
  } else {
    return warp_sums<kKept, kOffset / 2>(kept, lane);
  }
}

// Some consecutive rows of a matrix in global memory, and the vectors to multiply them with:
// x[vector * x_stride + column] in shared memory, every vector beginning at a multiple of 16 bytes.
template <typename T, typename X>
struct RowBlock {
  const T* weight;
  int64_t ld;
  int rows;  // of kRows; the products of rows past it are computed from the last row
  int cols;
  bool aligned;  // every row begins at a multiple of 16 bytes
  const X* x;
  int x_stride;
};

// A block of kRows rows times kVectors vectors. The product of row r and vector v is returned by
// the lanes with lane / (32 / (kRows * kVectors)) == r * kVectors + v. All loads of a column step
// are issued before the first multiplication.
template <int kRows, int kVectors, typename T, typename X>
__device__ __forceinline__ float dot_rows(const RowBlock<T, X>& block, int lane) {
  float sum[kRows * kVectors] = {};
  const T* row[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    row[r] = block.weight + (r < block.rows ? r : block.rows - 1) * block.ld;
  }
  const int vector_cols = block.aligned ? block.cols / kPack * kPack : 0;
  for (int col = lane * kPack; col < vector_cols; col += kWarpSize * kPack) {
    Pack<T> weights[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) weights[r] = load_pack(row[r] + col);
    float x[kVectors][kPack];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) unpack_shared(block.x + v * block.x_stride + col, x[v]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float w[kPack];
      unpack(weights[r], w);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum[r * kVectors + v] += w[i] * x[v][i];
      }
    }
  }
#pragma unroll 1
  for (int col = vector_cols + lane; col < block.cols; col += kWarpSize) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float w = static_cast<float>(row[r][col]);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        sum[r * kVectors + v] += w * static_cast<float>(block.x[v * block.x_stride + col]);
      }
    }
  }
  return warp_sums(sum, lane);
}

}  // namespace continual_mha::cuda

#endif  // CONTINUAL_MHA_CUDA_DOT_ROWS_CUH_
