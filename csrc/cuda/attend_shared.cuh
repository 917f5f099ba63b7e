// One query per head against one tile of keys and values that all heads of a stream share.
//
// A block computes kTileHeads heads of one stream: it reads the key rows and the value rows of the
// stream once each, 16 bytes at a time, and keeps the weights in device memory between the passes,
// where they are small beside the tile. The backward pass does the same for the query's gradient
// and leaves the weights for a second kernel, which forms the gradients of keys and values.
#ifndef CONTINUAL_MHA_CUDA_ATTEND_SHARED_CUH_
#define CONTINUAL_MHA_CUDA_ATTEND_SHARED_CUH_

#include "attend_shared_params.h"
#include "dot_rows.cuh"

namespace continual_mha::cuda {

template <typename T>
__device__ __forceinline__ float load_float(const FloatLike& tensor, int64_t i) {
  return tensor.is_float ? static_cast<const float*>(tensor.data)[i]
                         : static_cast<float>(static_cast<const T*>(tensor.data)[i]);
}

__device__ __forceinline__ float warp_max(float value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, shuffle_xor(value, offset));
  }
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += shuffle_xor(value, offset);
  return value;
}

// kPack elements of a row from `col` on, zeros past its end.
template <typename T>
__device__ __forceinline__ Pack<T> load_columns(const T* row, int col, int cols, bool aligned) {
  if (aligned && col + kPack <= cols) return load_pack(row + col);
  T element[kPack];
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    element[i] = col + i < cols ? row[col + i] : static_cast<T>(0.0f);
  }
  Pack<T> pack;
  memcpy(pack.piece, element, sizeof(element));
  return pack;
}

// Writes kPack elements of a row from `col` on, none past its end. One by one, each would cost the
// second-level cache a write of its own.
template <typename T>
__device__ __forceinline__ void store_columns(const float (&value)[kPack], T* row, int col,
                                              int cols, bool aligned) {
  T element[kPack];
#pragma unroll
  for (int i = 0; i < kPack; ++i) element[i] = static_cast<T>(value[i]);
  if (aligned && col + kPack <= cols) {
    Pack<T> pack;
    memcpy(pack.piece, element, sizeof(element));
#pragma unroll
    for (int i = 0; i < kPieces<T>; ++i) {
      store16(reinterpret_cast<uint4*>(row + col) + i, pack.piece[i]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    if (col + i < cols) row[col + i] = element[i];
  }
}

template <typename T>
struct AttendSharedBlock {
  const AttendSharedParams& p;
  int thread, lane, warp;
  int64_t stream;
  int first_head, heads;
  int64_t first_row;  // of this block's heads, in a tensor of (N, num_heads) rows
  float* weights;
  float* dscores;
  T* query;
  T* grad_out;
  float* lse;
  float* offset;
  float* reduce;

  __device__ __forceinline__ AttendSharedBlock(const AttendSharedParams& params, bool backward)
      : p(params) {
    thread = threadIdx.x;
    lane = thread % kWarpSize;
    warp = thread / kWarpSize;
    const int tiles = head_tiles(p.num_heads);
    stream = blockIdx.x / tiles;
    first_head = blockIdx.x % tiles * kTileHeads;
    heads = min(kTileHeads, p.num_heads - first_head);
    first_row = stream * p.num_heads + first_head;
    const int64_t tile_weights = static_cast<int64_t>(blockIdx.x) * p.rows * kTileHeads;
    weights = p.weights + tile_weights;
    dscores = p.dscores + tile_weights;
    query = reinterpret_cast<T*>(shared_memory());
    grad_out = query + kTileHeads * round_up(p.key_dim, kPack);
    lse = reinterpret_cast<float*>(grad_out +
                                   (backward ? kTileHeads * round_up(p.value_dim, kPack) : 0));
    offset = lse + kTileHeads;
    reduce = offset + kTileHeads;
  }

  __device__ __forceinline__ const T* key_rows() const {
    return static_cast<const T*>(p.key) + stream * p.rows * p.key_dim;
  }

  __device__ __forceinline__ const T* value_rows() const {
    return static_cast<const T*>(p.value) + stream * p.rows * p.value_dim;
  }

  // This block's rows of a (N, num_heads, size) tensor to shared memory; zeros for missing heads.
  __device__ __forceinline__ void stage(const void* tensor, int size, T* shared) {
    const T* source = static_cast<const T*>(tensor) + first_row * size;
    for (int h = 0; h < kTileHeads; ++h) {
      for (int e = thread; e < size; e += kThreads) {
        shared[h * round_up(size, kPack) + e] =
            h < heads ? source[static_cast<int64_t>(h) * size + e] : static_cast<T>(0.0f);
      }
    }
  }

  // Dot products of kTileRows rows with the staged vectors, one per lane: row lane / kTileHeads,
  // head lane % kTileHeads.
  __device__ __forceinline__ float dot_tile(const T* rows, int first, int cols, bool aligned,
                                            const T* staged) const {
    const RowBlock<T, T> block{rows + static_cast<int64_t>(first) * cols,
                               cols,
                               p.rows - first,
                               cols,
                               aligned,
                               staged,
                               round_up(cols, kPack)};
    return dot_rows<kTileRows, kTileHeads>(block, lane);
  }

  // A masked row counts as minus infinity whatever its key holds.
  __device__ __forceinline__ float masked(float score, int row, int head) const {
    if (p.mask.data == nullptr) return score;
    const float mask =
        load_float<T>(p.mask, stream * p.mask_stride_n + (first_head + head) * p.mask_stride_h +
                                  row * p.mask_stride_s);
    return mask == -INFINITY ? mask : score + mask;
  }

  __device__ __forceinline__ void form_scores() {
    for (int first = warp * kTileRows; first < p.rows; first += kWarps * kTileRows) {
      const float score = dot_tile(key_rows(), first, p.key_dim, p.key_aligned, query);
      const int row = first + lane / kTileHeads;
      const int head = lane % kTileHeads;
      if (row >= p.rows) continue;
      weights[static_cast<int64_t>(row) * kTileHeads + head] =
          head < heads ? masked(score, row, head) : 0.0f;
    }
  }

  // Scores to weights, a head per warp.
  __device__ __forceinline__ void form_softmax() {
    const int head = warp;
    if (head >= heads) return;
    float* column = weights + head;
    float m = -INFINITY;
    for (int s = lane; s < p.rows; s += kWarpSize) {
      m = fmaxf(m, column[static_cast<int64_t>(s) * kTileHeads]);
    }
    m = warp_max(m);
    const bool has_sink = p.sink.data != nullptr;
    const float sink = has_sink ? load_float<T>(p.sink, first_row + head) : -INFINITY;
    m = fmaxf(m, sink);
    const float reference = m == -INFINITY ? 0.0f : m;
    float sum = 0.0f;
    for (int s = lane; s < p.rows; s += kWarpSize) {
      sum += expf(column[static_cast<int64_t>(s) * kTileHeads] - reference);
    }
    sum = warp_sum(sum);
    if (has_sink) sum += expf(sink - reference);
    const float log_sum = reference + logf(sum);
    for (int s = lane; s < p.rows; s += kWarpSize) {
      float& weight = column[static_cast<int64_t>(s) * kTileHeads];
      weight = expf(weight - log_sum);
    }
    if (lane == 0) p.lse[first_row + head] = log_sum;
  }

  // Adds kPack columns of a row, weighted for each head. A row that the mask hides from all heads
  // is left out, since it may hold anything, NaN included.
  __device__ __forceinline__ void add_row(const float* row_weights, const Pack<T>& pack,
                                          float (&sum)[kTileHeads][kPack]) const {
    float weight[kTileHeads];
    bool used = false;
#pragma unroll
    for (int h = 0; h < kTileHeads; ++h) {
      weight[h] = row_weights[h];
      used = used || weight[h] != 0.0f;
    }
    if (!used) return;
    float element[kPack];
    unpack(pack, element);
#pragma unroll
    for (int h = 0; h < kTileHeads; ++h) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) sum[h][i] += weight[h] * element[i];
    }
  }

  // Adds every step-th row from `first` on, kTileRows loads at a time.
  __device__ __forceinline__ void add_rows(const float* tile_weights, const T* rows, int first,
                                           int step, int col, int cols, bool aligned,
                                           float (&sum)[kTileHeads][kPack]) const {
    for (int s = first; s < p.rows; s += kTileRows * step) {
      Pack<T> pack[kTileRows];
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        const int row = min(s + r * step, p.rows - 1);
        pack[r] = load_columns(rows + static_cast<int64_t>(row) * cols, col, cols, aligned);
      }
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        const int row = s + r * step;
        if (row < p.rows) add_row(tile_weights + row * int64_t{kTileHeads}, pack[r], sum);
      }
    }
  }

  // out[h] = sum over rows of weight[row][h] * rows[row]. A thread takes kPack columns and every
  // parts-th row; the parts are then added in order.
  __device__ __forceinline__ void weighted_sum(const float* tile_weights, const T* rows, int cols,
                                               bool aligned, void* out) {
    const int chunks = divide_up(cols, kPack);
    const int pass = min(chunks, kThreads);
    const int parts = kThreads / pass;
    const int part = thread / pass;
    for (int first = 0; first < chunks; first += pass) {
      const int col = (first + thread % pass) * kPack;
      const bool active = part < parts && col < cols;
      float sum[kTileHeads][kPack] = {};
      if (active) add_rows(tile_weights, rows, part, parts, col, cols, aligned, sum);
#pragma unroll
      for (int h = 0; h < kTileHeads; ++h) {
        if (h < heads) {
          T* row = static_cast<T*>(out) + (first_row + h) * cols;
          store_summed(sum[h], active, pass, parts, row, col, cols);
        }
      }
    }
  }

  __device__ __forceinline__ void store_summed(const float (&sum)[kPack], bool active, int pass,
                                               int parts, T* row, int col, int cols) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPack; ++i) reduce[i * kThreads + thread] = active ? sum[i] : 0.0f;
    __syncthreads();
    if (thread >= pass) return;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      float total = 0.0f;
#pragma unroll 1
      for (int part = 0; part < parts; ++part) total += reduce[i * kThreads + part * pass + thread];
      if (col + i < cols) row[col + i] = static_cast<T>(total);
    }
  }

  __device__ __forceinline__ void forward() {
    stage(p.query, p.key_dim, query);
    __syncthreads();
    form_scores();
    __syncthreads();
    form_softmax();
    __syncthreads();
    weighted_sum(weights, value_rows(), p.value_dim, p.value_aligned, p.out);
  }

  // Per head: the logsumexp, what is subtracted from the weights' gradients, the sink's gradient.
  __device__ __forceinline__ void load_statistics() {
    const int head = warp;
    if (head >= heads) return;
    const int64_t row = first_row + head;
    float dot = 0.0f;
    for (int e = lane; e < p.value_dim; e += kWarpSize) {
      dot += static_cast<float>(static_cast<const T*>(p.out)[row * p.value_dim + e]) *
             static_cast<float>(static_cast<const T*>(p.grad_out)[row * p.value_dim + e]);
    }
    dot = warp_sum(dot);
    if (p.grad_lse != nullptr) dot -= p.grad_lse[row];
    if (lane != 0) return;
    // Infinity lets a query to which the mask leaves nothing have weights, and gradients, of zero.
    lse[head] = p.lse[row] == -INFINITY ? INFINITY : p.lse[row];
    offset[head] = dot;
    if (p.sink.data != nullptr) {
      p.dsink[row] = -expf(load_float<T>(p.sink, row) - lse[head]) * dot;
    }
  }

  __device__ __forceinline__ void form_gradients() {
    for (int first = warp * kTileRows; first < p.rows; first += kWarps * kTileRows) {
      const float score = dot_tile(key_rows(), first, p.key_dim, p.key_aligned, query);
      const float dweight = dot_tile(value_rows(), first, p.value_dim, p.value_aligned, grad_out);
      const int row = first + lane / kTileHeads;
      const int head = lane % kTileHeads;
      if (row >= p.rows) continue;
      const float weight = head < heads ? expf(masked(score, row, head) - lse[head]) : 0.0f;
      const int64_t i = static_cast<int64_t>(row) * kTileHeads + head;
      weights[i] = weight;
      dscores[i] = weight == 0.0f ? 0.0f : weight * (dweight - offset[head]);
    }
  }

  __device__ __forceinline__ void backward() {
    stage(p.query, p.key_dim, query);
    stage(p.grad_out, p.value_dim, grad_out);
    load_statistics();
    __syncthreads();
    form_gradients();
    __syncthreads();
    weighted_sum(dscores, key_rows(), p.key_dim, p.key_aligned, p.dquery);
  }
};

// Of a multiprocessor: loads of one block are half of what its memory could have under way. For
// sm_100 the assembler would spill to fit two.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define CONTINUAL_MHA_ATTEND_BLOCKS 1
#else
#define CONTINUAL_MHA_ATTEND_BLOCKS 2
#endif

template <typename T>
__global__ void __launch_bounds__(kThreads, CONTINUAL_MHA_ATTEND_BLOCKS)
    attend_shared_kernel(const __grid_constant__ AttendSharedParams params) {
  AttendSharedBlock<T>(params, false).forward();
}

template <typename T>
__global__ void __launch_bounds__(kThreads, CONTINUAL_MHA_ATTEND_BLOCKS)
    attend_shared_backward_kernel(const __grid_constant__ AttendSharedParams params) {
  AttendSharedBlock<T>(params, true).backward();
}

// A thread computes kPack columns of kTileRows rows, and reads each head's columns once for them.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    outer_product_kernel(const __grid_constant__ OuterProductParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= p.threads) return;
  const int chunks = divide_up(p.cols, kPack);
  const int groups = divide_up(p.rows, kTileRows);
  const int col = static_cast<int>(index % chunks) * kPack;
  const int first = static_cast<int>(index / chunks % groups) * kTileRows;
  const int64_t stream = index / chunks / groups;
  float sum[kTileRows][kPack] = {};
#pragma unroll 1
  for (const OuterProduct& term : p.terms) {
    if (term.weights == nullptr) break;
    const T* vectors = static_cast<const T*>(term.vectors) + stream * p.num_heads * p.cols;
    for (int h = 0; h < p.num_heads; ++h) {
      float vector[kPack];
      unpack(load_columns(vectors + static_cast<int64_t>(h) * p.cols, col, p.cols, p.aligned),
             vector);
      const int64_t tile = stream * head_tiles(p.num_heads) + h / kTileHeads;
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        const int row = min(first + r, p.rows - 1);
        const float weight = term.weights[(tile * p.rows + row) * kTileHeads + h % kTileHeads];
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum[r][i] += weight * vector[i];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    if (first + r >= p.rows) continue;
    T* out = static_cast<T*>(p.gradient) + (stream * p.rows + first + r) * p.cols;
    store_columns(sum[r], out, col, p.cols, p.aligned);
  }
}

}  // namespace continual_mha::cuda

#endif  // CONTINUAL_MHA_CUDA_ATTEND_SHARED_CUH_
