// The fused step over the ring: in-projection, ring write, attention, output projection.
//
// A team of head_groups x splits blocks computes the step of kStreams streams: a block takes the
// heads of one group over one part of the window. It reads its share of the weights once for all
// streams of the team and 2 * streams * heads * window part * head_dim ring elements, and writes
// one slot per stream and head. The ring goes through shared memory 16 bytes at a time, kStages
// deep, and every thread copies exactly the bytes that it reads itself, so that the loop needs no
// barrier.
#ifndef CONTINUAL_MHA_CUDA_RING_STEP_CUH_
#define CONTINUAL_MHA_CUDA_RING_STEP_CUH_

#include "dot_rows.cuh"
#include "ring_step_params.h"

namespace continual_mha::cuda {

// Weight rows that a warp multiplies at once: 128 bytes per lane in flight for one stream. Several
// streams have their sums in registers as well, and take fewer rows.
template <typename T, int kStreams>
constexpr int kWeightRows = kStreams == 1 ? 8 / kPieces<T> : 4;

// Ring rows that a lane handles per stage, so that a stage holds 32 bytes of keys per thread.
template <typename T>
constexpr int kRingRows = 2 / kPieces<T>;

// A maximum to subtract that keeps exp2(-inf - max) zero while nothing has been seen.
__device__ __forceinline__ float finite_max(float m) { return m == -INFINITY ? 0.0f : m; }

// Softmax-weighted sum of values in progress; this lane's kPack elements of it.
struct Accumulator {
  float m = -INFINITY;
  float l = 0.0f;
  float out[kPack] = {};

  // Accounts for one more maximum; returns the reference to subtract from scores.
  __device__ __forceinline__ float raise(float maximum) {
    const float raised = fmaxf(m, maximum);
    const float reference = finite_max(raised);
    const float keep = exp2f(m - reference);
    m = raised;
    l *= keep;
#pragma unroll
    for (int i = 0; i < kPack; ++i) out[i] *= keep;
    return reference;
  }

  __device__ __forceinline__ void add(float weight, const float (&value)[kPack]) {
    l += weight;
#pragma unroll
    for (int i = 0; i < kPack; ++i) out[i] += weight * value[i];
  }

  // Merges in the lanes of the warp that hold other rows of the same elements. Both sides of an
  // exchange have the same reference by then.
  __device__ __forceinline__ void merge_groups(int lanes_per_row) {
    for (int offset = lanes_per_row; offset < kWarpSize; offset *= 2) {
      raise(shuffle_xor(m, offset));
      l += shuffle_xor(l, offset);
#pragma unroll
      for (int i = 0; i < kPack; ++i) out[i] += shuffle_xor(out[i], offset);
    }
  }
};

struct MergedOutput {
  float m;
  float l;
  float out;
};

// Merges `count` partial results in the order of their index, whoever finished first.
template <typename LoadM, typename LoadL, typename LoadOut>
__device__ __forceinline__ MergedOutput merge_partials(int count, LoadM load_m, LoadL load_l,
                                                       LoadOut load_out) {
  MergedOutput merged{-INFINITY, 0.0f, 0.0f};
  for (int i = 0; i < count; ++i) merged.m = fmaxf(merged.m, load_m(i));
  const float reference = finite_max(merged.m);
  for (int i = 0; i < count; ++i) {
    const float weight = exp2f(load_m(i) - reference);
    merged.l += weight * load_l(i);
    merged.out += weight * load_out(i);
  }
  return merged;
}

// The rows of one head of one stream that a warp reads.
template <typename T>
struct RingTask {
  const T* k;
  const T* v;
  int begin;  // this lane's first row
  int step;   // rows from one iteration to the next
  int end;
  int skip;  // the slot that the new token overwrites
  int iterations;
};

template <typename T, int kStreams, Merge kMerge>
struct RingStepBlock {
  const RingStepParams& p;
  int thread, lane, warp;
  int team, rank, head_group, split;
  int first_stream, heads, first_channel, group_dim, pairs;
  T* x;
  float* qkv;
  float* task_out;
  float* task_ml;
  float* pair_ml;
  float* heads_out;
  StreamState* state;
  unsigned int* flag;

  __device__ __forceinline__ explicit RingStepBlock(const RingStepParams& params) : p(params) {
    thread = threadIdx.x;
    lane = thread % kWarpSize;
    warp = thread / kWarpSize;
    const int blocks = p.head_groups * p.splits;
    team = blockIdx.x / blocks;
    rank = blockIdx.x % blocks;
    head_group = rank / p.splits;
    split = rank % p.splits;
    first_stream = team * kStreams;
    heads = p.num_heads / p.head_groups;
    group_dim = heads * p.head_dim;
    first_channel = head_group * group_dim;
    pairs = kStreams * heads;
    unsigned char* base = shared_memory();
    x = reinterpret_cast<T*>(base + p.shared.x);
    qkv = reinterpret_cast<float*>(base + p.shared.qkv);
    task_out = reinterpret_cast<float*>(base + p.shared.task_out);
    task_ml = reinterpret_cast<float*>(base + p.shared.task_ml);
    pair_ml = reinterpret_cast<float*>(base + p.shared.pair_ml);
    heads_out = reinterpret_cast<float*>(base + p.shared.heads_out);
    state = reinterpret_cast<StreamState*>(base + p.shared.state);
    flag = reinterpret_cast<unsigned int*>(state + kStreams);
  }

  __device__ __forceinline__ bool exists(int stream) const {
    return first_stream + stream < p.num_streams;
  }

  // Whether q, k and v are given.
  __device__ __forceinline__ bool projected() const {
    return kMerge == Merge::kCounter && p.projected[0] != nullptr;
  }

  // Every block reads the positions here, before the barrier or the counter after which one of
  // them writes the new ones. They are asked for first and awaited last, with the tokens between.
  __device__ __forceinline__ int64_t load_position() const {
    return thread < kStreams && exists(thread) ? p.position[first_stream + thread] : 0;
  }

  __device__ __forceinline__ void store_state(int64_t position) {
    if (thread >= kStreams) return;
    StreamState s{};
    if (exists(thread)) {
      s.position = position;
      s.slot = static_cast<int>(s.position % p.sequence_len);
      s.rows = static_cast<int>(s.position < p.sequence_len ? s.position + 1 : p.sequence_len);
      if (p.query_slots > 0) {
        s.q_write = static_cast<int>(s.position % p.query_slots);
        s.q_read = s.q_write + 1 == p.query_slots ? 0 : s.q_write + 1;
      }
    }
    state[thread] = s;
  }

  __device__ __forceinline__ void advance_positions() {
    if (!p.update || thread >= kStreams || !exists(thread)) return;
    const int n = first_stream + thread;
    if (p.active == nullptr || p.active[n]) p.position[n] = state[thread].position + 1;
  }

  // What a thread copies it asks for at once, up to kTurns elements of a row: one after the other,
  // each would wait for memory.
  __device__ __forceinline__ void stage_inputs() {
    constexpr int kTurns = kStreams == 1 ? 4 : 2;
    for (const StepInput& input : p.inputs) {
      if (!input.staged) continue;
      const T* data = static_cast<const T*>(input.data) + first_stream * input.stride_n;
      for (int first = thread; first < input.size; first += kTurns * kThreads) {
        T element[kStreams][kTurns];
#pragma unroll
        for (int g = 0; g < kStreams; ++g) {
#pragma unroll
          for (int i = 0; i < kTurns; ++i) {
            const int e = first + i * kThreads;
            element[g][i] = static_cast<T>(0.0f);
            if (e < input.size && exists(g)) {
              element[g][i] = data[g * input.stride_n + e * input.stride_e];
            }
          }
        }
#pragma unroll
        for (int g = 0; g < kStreams; ++g) {
#pragma unroll
          for (int i = 0; i < kTurns; ++i) {
            const int e = first + i * kThreads;
            if (e < input.size) x[input.x_offset + g * input.x_stride + e] = element[g][i];
          }
        }
      }
    }
  }

  __device__ __forceinline__ float* qkv_row(int part, int stream) const {
    return qkv + (part * kStreams + stream) * group_dim;
  }

  // What is stored in a ring is what is used in this step.
  __device__ __forceinline__ float rounded(int part, float value) const {
    const bool stored = part > 0 || p.query_slots > 0;
    return stored ? static_cast<float>(static_cast<T>(value)) : value;
  }

  // A cluster shares the rows of a head group among its splits, each of which sends its results to
  // the others. Without a cluster the splits cannot wait for each other: the first projects all,
  // the others the query that they need (none if it comes from the query ring).
  __device__ __forceinline__ void project_inputs() {
    const int part_blocks = divide_up(group_dim, kWeightRows<T, kStreams>);
    int blocks = 3 * part_blocks;
    int worker = warp;
    int workers = kWarps;
    if constexpr (kMerge == Merge::kCluster) {
      worker = warp * p.splits + split;
      workers = kWarps * p.splits;
    } else if (split > 0) {
      blocks = p.query_slots > 0 ? 0 : part_blocks;
    }
    for (int b = worker; b < blocks; b += workers) {
      const int part = b / part_blocks;
      project_block(part, (b - part * part_blocks) * kWeightRows<T, kStreams>);
    }
  }

  __device__ __forceinline__ void project_block(int part, int row) {
    constexpr int kSpread = kWarpSize / (kWeightRows<T, kStreams> * kStreams);
    const Projection& projection = p.in_proj[part];
    const StepInput& input = p.inputs[part];
    const RowBlock<T, T> block{
        static_cast<const T*>(projection.weight) + (first_channel + row) * projection.ld,
        projection.ld,
        group_dim - row,
        projection.cols,
        projection.aligned,
        x + input.x_offset,
        input.x_stride};
    float value = dot_rows<kWeightRows<T, kStreams>, kStreams>(block, lane);
    row += lane / kSpread / kStreams;
    const int stream = lane / kSpread % kStreams;
    if (lane % kSpread != 0 || row >= group_dim) return;
    if (p.in_proj_bias != nullptr) {
      const int64_t channel = static_cast<int64_t>(part) * p.embed_dim + first_channel + row;
      value += static_cast<float>(static_cast<const T*>(p.in_proj_bias)[channel]);
    }
    store_projected(qkv_row(part, stream) + row, rounded(part, value));
  }

  __device__ __forceinline__ void store_projected(float* destination, float value) {
    if constexpr (kMerge == Merge::kCluster) {
      for (int peer = 0; peer < p.splits; ++peer) {
        *cluster_map(destination, head_group * p.splits + peer) = value;
      }
    } else {
      *destination = value;
    }
  }

  // At once as well, of all three.
  __device__ __forceinline__ void load_projected() {
    constexpr int kTurns = 4;
    for (int g = 0; g < kStreams && exists(g); ++g) {
      const int64_t start = (first_stream + g) * p.projected_stride + first_channel;
      for (int first = thread; first < group_dim; first += kTurns * kThreads) {
        T element[3][kTurns];
#pragma unroll
        for (int part = 0; part < 3; ++part) {
          const T* data = static_cast<const T*>(p.projected[part]) + start;
#pragma unroll
          for (int i = 0; i < kTurns; ++i) {
            const int c = first + i * kThreads;
            element[part][i] = c < group_dim ? data[c] : static_cast<T>(0.0f);
          }
        }
#pragma unroll
        for (int part = 0; part < 3; ++part) {
#pragma unroll
          for (int i = 0; i < kTurns; ++i) {
            const int c = first + i * kThreads;
            if (c < group_dim) qkv_row(part, g)[c] = static_cast<float>(element[part][i]);
          }
        }
      }
    }
  }

  // Writes the new token, by the first split only, and takes the query from its ring if there is
  // one. No block reads the slots written: the ring loop skips the new token's slot, and a query
  // ring has at least two.
  __device__ __forceinline__ void exchange_with_rings() {
    const bool write = p.update && split == 0;
    if (!write && p.query_slots == 0) return;
    for (int i = thread; i < kStreams * group_dim; i += kThreads) {
      const int g = i / group_dim;
      const int c = i - g * group_dim;
      if (!exists(g)) continue;
      const int64_t n = first_stream + g;
      if (p.query_slots > 0) {
        T* slots = static_cast<T*>(p.q_ring) + n * p.query_slots * p.embed_dim + first_channel + c;
        float& query = qkv_row(0, g)[c];
        const float used =
            static_cast<float>(slots[static_cast<int64_t>(state[g].q_read) * p.embed_dim]);
        if (write)
          slots[static_cast<int64_t>(state[g].q_write) * p.embed_dim] = static_cast<T>(query);
        query = used;
      }
      if (write) {
        const int head = c / p.head_dim;
        const int64_t slot = ring_offset(g, head) +
                             static_cast<int64_t>(state[g].slot) * p.head_dim +
                             (c - head * p.head_dim);
        static_cast<T*>(p.k_ring)[slot] = static_cast<T>(qkv_row(1, g)[c]);
        static_cast<T*>(p.v_ring)[slot] = static_cast<T>(qkv_row(2, g)[c]);
      }
    }
  }

  // Of a head of this block's group, in elements of the key or value ring.
  __device__ __forceinline__ int64_t ring_offset(int stream, int head) const {
    const int64_t n = first_stream + stream;
    return (n * p.num_heads + head_group * heads + head) * p.sequence_len * p.head_dim;
  }

  __device__ __forceinline__ int tasks() const { return pairs * p.warps_per_head; }

  __device__ __forceinline__ RingTask<T> ring_task(int task) const {
    const int pair = task / p.warps_per_head;
    const int sub = task - pair * p.warps_per_head;
    const int stream = pair / heads;
    RingTask<T> t{};
    if (!exists(stream)) return t;
    const int64_t offset = ring_offset(stream, pair - stream * heads);
    const int groups = kWarpSize / p.lanes_per_row;
    const int rows = groups * kRingRows<T>;
    const int64_t window = p.sequence_len;
    const int begin = static_cast<int>(window * split / p.splits);
    t.k = static_cast<const T*>(p.k_ring) + offset;
    t.v = static_cast<const T*>(p.v_ring) + offset;
    t.end = min(static_cast<int>(window * (split + 1) / p.splits), state[stream].rows);
    t.skip = state[stream].slot;
    t.begin = begin + sub * rows + lane / p.lanes_per_row;
    t.step = rows * p.warps_per_head;
    // Counted from the warp's first row, so that all its lanes take part in every iteration.
    t.iterations = max(0, divide_up(t.end - begin - sub * rows, t.step));
    return t;
  }

  __device__ __forceinline__ int task_row(const RingTask<T>& t, int iteration, int u) const {
    return t.begin + iteration * t.step + u * (kWarpSize / p.lanes_per_row);
  }

  // This lane's first element of a row.
  __device__ __forceinline__ int lane_element() const { return lane % p.lanes_per_row * kPack; }

  // This thread's 16 bytes of a stage; neighbouring threads have neighbouring bytes.
  __device__ __forceinline__ uint4* stage_piece(int stage, int u, int tensor, int piece) const {
    const int index = ((stage * kRingRows<T> + u) * 2 + tensor) * kPieces<T> + piece;
    return reinterpret_cast<uint4*>(shared_memory()) + index * kThreads + thread;
  }

  __device__ __forceinline__ void issue(const RingTask<T>& t, int iteration) {
    constexpr int kPieceElements = kPack / kPieces<T>;
    if (iteration < t.iterations) {
      const int stage = iteration % kStages;
#pragma unroll
      for (int u = 0; u < kRingRows<T>; ++u) {
        const int row = task_row(t, iteration, u);
#pragma unroll
        for (int piece = 0; piece < kPieces<T>; ++piece) {
          const int element = lane_element() + piece * kPieceElements;
          const bool valid = row < t.end && row != t.skip && element < p.head_dim;
          const int64_t offset = valid ? static_cast<int64_t>(row) * p.head_dim + element : 0;
          copy_async16(stage_piece(stage, u, 0, piece), t.k + offset, valid);
          copy_async16(stage_piece(stage, u, 1, piece), t.v + offset, valid);
        }
      }
    }
    copy_async_commit();
  }

  // The copies that are under way before the first use.
  __device__ __forceinline__ void prime(const RingTask<T>& t) {
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) issue(t, i);
  }

  __device__ __forceinline__ void load_stage(int stage, int u, int tensor,
                                             float (&out)[kPack]) const {
    Pack<T> pack;
#pragma unroll
    for (int piece = 0; piece < kPieces<T>; ++piece) {
      pack.piece[piece] = *stage_piece(stage, u, tensor, piece);
    }
    unpack(pack, out);
  }

  template <int kRows>
  __device__ __forceinline__ void sum_over_row(float (&score)[kRows]) const {
    for (int offset = p.lanes_per_row / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int u = 0; u < kRows; ++u) score[u] += shuffle_xor(score[u], offset);
    }
  }

  __device__ __forceinline__ static float dot(const float (&a)[kPack], const float (&b)[kPack]) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum += a[i] * b[i];
    return sum;
  }

  __device__ __forceinline__ void consume(const RingTask<T>& t, int iteration,
                                          const float (&query)[kPack], Accumulator& acc) const {
    constexpr int kRows = kRingRows<T>;
    const int stage = iteration % kStages;
    float score[kRows];
    float pack[kPack];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      load_stage(stage, u, 0, pack);
      score[u] = dot(query, pack);
    }
    sum_over_row(score);
    float maximum = -INFINITY;
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const int row = task_row(t, iteration, u);
      if (row >= t.end || row == t.skip) score[u] = -INFINITY;
      maximum = fmaxf(maximum, score[u]);
    }
    const float reference = acc.raise(maximum);
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      load_stage(stage, u, 1, pack);
      acc.add(exp2f(score[u] - reference), pack);
    }
  }

  // kPack elements, from the lane's first on, of head_dim values; zeros past them.
  template <typename V>
  __device__ __forceinline__ void load_head(const V* values, float (&out)[kPack]) const {
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const int element = lane_element() + i;
      out[i] = element < p.head_dim ? static_cast<float>(values[element]) : 0.0f;
    }
  }

  // One row that is not in the ring; the lanes of the first row group keep it.
  template <typename V>
  __device__ __forceinline__ void absorb(const V* k, const V* v, const float (&query)[kPack],
                                         Accumulator& acc) const {
    float pack[kPack];
    load_head(k, pack);
    float score[1] = {dot(query, pack)};
    sum_over_row(score);
    load_head(v, pack);
    if (lane < p.lanes_per_row) acc.add(exp2f(score[0] - acc.raise(score[0])), pack);
  }

  __device__ __forceinline__ void absorb_extra_rows(int stream, int head,
                                                    const float (&query)[kPack],
                                                    Accumulator& acc) const {
    const int channel = head * p.head_dim;
    absorb(qkv_row(1, stream) + channel, qkv_row(2, stream) + channel, query, acc);
    if (p.bias_k != nullptr) {
      absorb(static_cast<const T*>(p.bias_k) + first_channel + channel,
             static_cast<const T*>(p.bias_v) + first_channel + channel, query, acc);
    }
    if (p.add_zero_attn && lane < p.lanes_per_row) {
      const float zero[kPack] = {};
      acc.add(exp2f(-acc.raise(0.0f)), zero);
    }
  }

  // `t` is this warp's first task, already primed.
  __device__ __forceinline__ void attend(RingTask<T> t) {
    for (int task = warp; task < tasks(); task += kWarps) {
      if (task != warp) {
        t = ring_task(task);
        prime(t);
      }
      const int pair = task / p.warps_per_head;
      const int stream = pair / heads;
      const int head = pair - stream * heads;
      float query[kPack] = {};  // of streams that do not exist no block has put one there
      if (exists(stream)) load_head(qkv_row(0, stream) + head * p.head_dim, query);
#pragma unroll
      for (int i = 0; i < kPack; ++i) query[i] *= p.scale_log2;
      Accumulator acc;
      for (int i = 0; i < t.iterations; ++i) {
        copy_async_wait<kStages - 2>();
        issue(t, i + kStages - 1);
        consume(t, i, query, acc);
      }
      if (split == 0 && task % p.warps_per_head == 0) absorb_extra_rows(stream, head, query, acc);
      acc.merge_groups(p.lanes_per_row);
      store_task(task, acc);
    }
  }

  __device__ __forceinline__ void store_task(int task, const Accumulator& acc) {
    if (lane >= p.lanes_per_row) return;
    float* out = task_out + task * p.head_dim;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      if (lane_element() + i < p.head_dim) out[lane_element() + i] = acc.out[i];
    }
    if (lane == 0) {
      task_ml[2 * task] = acc.m;
      task_ml[2 * task + 1] = acc.l;
    }
  }

  // Leaves a pair's result where the first of its warps had put its own.
  __device__ __forceinline__ void merge_warps() {
    const int count = p.warps_per_head;
    for (int i = thread; i < pairs * p.head_dim; i += kThreads) {
      const int pair = i / p.head_dim;
      const int d = i - pair * p.head_dim;
      const float* ml = task_ml + 2 * pair * count;
      float* out = task_out + pair * count * p.head_dim + d;
      const MergedOutput merged = merge_partials(
          count, [&](int w) { return ml[2 * w]; }, [&](int w) { return ml[2 * w + 1]; },
          [&](int w) { return out[w * p.head_dim]; });
      *out = merged.out;
      if (d == 0) {
        pair_ml[2 * pair] = merged.m;
        pair_ml[2 * pair + 1] = merged.l;
      }
    }
  }

  __device__ __forceinline__ float& pair_out(int pair, int d) const {
    return task_out[pair * p.warps_per_head * p.head_dim + d];
  }

  // All heads of all streams, merged over the splits, from the shared memory of the whole cluster.
  __device__ __forceinline__ void gather_cluster() {
    const int stride = round_up(p.embed_dim, kPack);
    for (int i = thread; i < kStreams * p.embed_dim; i += kThreads) {
      const int g = i / p.embed_dim;
      const int channel = i - g * p.embed_dim;
      const int group = channel / group_dim;
      const int head = (channel - group * group_dim) / p.head_dim;
      const int d = channel % p.head_dim;
      const int pair = g * heads + head;
      const int first = group * p.splits;
      const MergedOutput merged = merge_partials(
          p.splits, [&](int s) { return *cluster_map(&pair_ml[2 * pair], first + s); },
          [&](int s) { return *cluster_map(&pair_ml[2 * pair + 1], first + s); },
          [&](int s) { return *cluster_map(&pair_out(pair, d), first + s); });
      heads_out[g * stride + channel] = merged.out / merged.l;
    }
  }

  __device__ __forceinline__ float* published(int of_split) const {
    const int64_t block =
        (static_cast<int64_t>(team) * p.head_groups + head_group) * p.splits + of_split;
    return p.partial + block * partial_stride(pairs, p.head_dim);
  }

  __device__ __forceinline__ void publish_partial() {
    float* partial = published(split);
    for (int i = thread; i < 2 * pairs; i += kThreads) partial[i] = pair_ml[i];
    for (int i = thread; i < pairs * p.head_dim; i += kThreads) {
      const int pair = i / p.head_dim;
      partial[2 * pairs + i] = pair_out(pair, i - pair * p.head_dim);
    }
  }

  // The heads of this block's group, merged over the splits, from device memory.
  __device__ __forceinline__ void gather_published() {
    const int stride = round_up(group_dim, kPack);
    for (int i = thread; i < pairs * p.head_dim; i += kThreads) {
      const int pair = i / p.head_dim;
      const int g = i / group_dim;
      const MergedOutput merged = merge_partials(
          p.splits, [&](int s) { return load_published(published(s) + 2 * pair); },
          [&](int s) { return load_published(published(s) + 2 * pair + 1); },
          [&](int s) { return load_published(published(s) + 2 * pairs + i); });
      heads_out[g * stride + (i - g * group_dim)] = merged.out / merged.l;
    }
  }

  __device__ __forceinline__ void gather_own() {
    const int stride = round_up(group_dim, kPack);
    for (int i = thread; i < pairs * p.head_dim; i += kThreads) {
      const int pair = i / p.head_dim;
      const int g = i / group_dim;
      heads_out[g * stride + (i - g * group_dim)] =
          pair_out(pair, i - pair * p.head_dim) / pair_ml[2 * pair + 1];
    }
  }

  // True in the last of `count` blocks to arrive, which then sees what the others published. The
  // counter is zero again when all have arrived.
  __device__ __forceinline__ bool last_to_arrive(unsigned int* counter, int count) {
    const auto others = static_cast<unsigned int>(count - 1);
    __syncthreads();
    if (thread == 0) *flag = count_arrival(counter, others) == others;
    __syncthreads();
    return *flag != 0;
  }

  __device__ __forceinline__ void store_output(int stream, int channel, float value) {
    if (!exists(stream)) return;
    if (!projected() && p.out_proj_bias != nullptr) {
      value += static_cast<float>(static_cast<const T*>(p.out_proj_bias)[channel]);
    }
    const int64_t n = first_stream + stream;
    static_cast<T*>(p.output)[n * p.embed_dim + channel] = static_cast<T>(value);
  }

  // Products of the output projection's rows with heads_out, for `cols` columns from `first_col`;
  // the rows are shared among `workers` blocks.
  template <typename Store>
  __device__ __forceinline__ void project_output(int first_col, int cols, int worker, int workers,
                                                 Store store) {
    constexpr int kSpread = kWarpSize / (kWeightRows<T, kStreams> * kStreams);
    const T* weight = static_cast<const T*>(p.out_proj.weight) + first_col;
    const int blocks = divide_up(p.embed_dim, kWeightRows<T, kStreams>);
    for (int b = warp * workers + worker; b < blocks; b += kWarps * workers) {
      const int first_row = b * kWeightRows<T, kStreams>;
      const RowBlock<T, float> block{weight + first_row * p.out_proj.ld,
                                     p.out_proj.ld,
                                     p.embed_dim - first_row,
                                     cols,
                                     p.out_proj.aligned,
                                     heads_out,
                                     round_up(cols, kPack)};
      const float value = dot_rows<kWeightRows<T, kStreams>, kStreams>(block, lane);
      const int row = first_row + lane / kSpread / kStreams;
      if (lane % kSpread == 0 && row < p.embed_dim) store(lane / kSpread % kStreams, row, value);
    }
  }

  __device__ __forceinline__ unsigned int* done_counters() const {
    return p.done + static_cast<int64_t>(team) * (p.head_groups + 1);
  }

  // A block hands over its heads as they are.
  __device__ __forceinline__ void finish_projected() {
    gather_own();
    __syncthreads();
    store_heads();
    if (p.head_groups == 1 || last_to_arrive(done_counters() + p.head_groups, p.head_groups)) {
      advance_positions();
    }
  }

  __device__ __forceinline__ void finish_cluster() {
    cluster_arrive();
    cluster_wait();
    if (rank == 0) advance_positions();
    gather_cluster();
    __syncthreads();
    cluster_arrive_relaxed();
    project_output(0, p.embed_dim, rank, p.head_groups * p.splits,
                   [&](int g, int row, float value) { store_output(g, row, value); });
    // A block's shared memory must outlive the reads of its peers.
    cluster_wait();
  }

  __device__ __forceinline__ void finish_counter() {
    unsigned int* done = done_counters();
    if (p.splits > 1) {
      publish_partial();
      if (!last_to_arrive(done + head_group, p.splits)) return;
      gather_published();
    } else {
      gather_own();
    }
    __syncthreads();
    if (p.head_groups == 1) {
      project_output(0, p.embed_dim, 0, 1,
                     [&](int g, int row, float value) { store_output(g, row, value); });
    } else {
      project_output(first_channel, group_dim, 0, 1, [&](int g, int row, float value) {
        *partial_output(head_group, g, row) = value;
      });
      if (!last_to_arrive(done + p.head_groups, p.head_groups)) return;
      sum_partial_outputs();
    }
    advance_positions();
  }

  __device__ __forceinline__ float* partial_output(int group, int stream, int row) const {
    const int64_t block = static_cast<int64_t>(team) * p.head_groups + group;
    return p.partial_output + (block * kStreams + stream) * p.embed_dim + row;
  }

  __device__ __forceinline__ void sum_partial_outputs() {
    for (int i = thread; i < kStreams * p.embed_dim; i += kThreads) {
      const int g = i / p.embed_dim;
      const int row = i - g * p.embed_dim;
      float value = 0.0f;
      for (int group = 0; group < p.head_groups; ++group) {
        value += load_published(partial_output(group, g, row));
      }
      store_output(g, row, value);
    }
  }

  __device__ __forceinline__ void store_heads() {
    const int stride = round_up(group_dim, kPack);
    for (int i = thread; i < kStreams * group_dim; i += kThreads) {
      const int g = i / group_dim;
      const int c = i - g * group_dim;
      store_output(g, first_channel + c, heads_out[g * stride + c]);
    }
  }

  __device__ __forceinline__ void run() {
    const bool share = kMerge == Merge::kCluster && p.splits > 1;
    if (share) cluster_arrive_relaxed();
    const int64_t position = load_position();
    if (projected()) {
      load_projected();
    } else {
      stage_inputs();
    }
    store_state(position);
    __syncthreads();
    // The ring does not wait for the query: its first copies travel during the projection.
    const RingTask<T> first = warp < tasks() ? ring_task(warp) : RingTask<T>{};
    prime(first);
    if (!projected()) {
      // A peer's shared memory may be written only once the peer has started.
      if (share) cluster_wait();
      project_inputs();
      if (share) {
        cluster_arrive();
        cluster_wait();
      } else {
        __syncthreads();
      }
    }
    exchange_with_rings();
    __syncthreads();
    attend(first);
    __syncthreads();
    merge_warps();
    __syncthreads();
    if constexpr (kMerge == Merge::kCluster) {
      finish_cluster();
    } else if (projected()) {
      finish_projected();
    } else {
      finish_counter();
    }
  }
};

// Machine code is made for what a target uses: counters below kClustersFrom and, from there on, for
// few streams only; clusters from there on.
template <typename T, int kStreams, Merge kMerge>
__global__ void __launch_bounds__(kThreads, 2)
    ring_step_kernel(const __grid_constant__ RingStepParams params) {
#ifdef __CUDA_ARCH__
  constexpr bool kHasClusters = __CUDA_ARCH__ >= 10 * kClustersFrom;
  constexpr bool kUsed = kMerge == Merge::kCluster ? kHasClusters : !kHasClusters || kStreams == 1;
  if constexpr (!kUsed) __trap();  // rather than leave everything as it was without a word
#else
  constexpr bool kUsed = true;
#endif
  if constexpr (kUsed) RingStepBlock<T, kStreams, kMerge>(params).run();
}

}  // namespace continual_mha::cuda

#endif  // CONTINUAL_MHA_CUDA_RING_STEP_CUH_
