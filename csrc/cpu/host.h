// What the CPU operators share on the way to a kernel: memory, threads, projections.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "../common.h"
#include "kernels.h"

namespace continual_mha::cpu {

// Memory that grows and is kept for the thread's next call. Each purpose has its own, by its tag.
template <class Tag>
void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t capacity = 0;
  if (bytes > capacity) {
    memory.reset();
    capacity = 0;
    memory.reset(::operator new(static_cast<size_t>(bytes), std::align_val_t{64}));
    capacity = bytes;
  }
  return memory.get();
}

// f(begin, end) over [0, tasks) on torch's threads, each with enough of `work_per_task`, counted in
// multiply-adds, to be worth waking.
template <class F>
void parallel(int64_t tasks, int64_t work_per_task, const F& f) {
  constexpr int64_t kMinWork = 65536;  // some microseconds: what waking a thread costs
  const int64_t grain = (kMinWork + work_per_task - 1) / (work_per_task > 0 ? work_per_task : 1);
  torch::stable::parallel_for(0, tasks, grain > 0 ? grain : 1, f);
}

// The DType of a tensor that a kernel exists for; an error for others.
DType dtype_of(const Tensor& x, const char* op);

// What a ring holds beside tokens of `dtype`; an error where no kernel reads it.
RingDType ring_dtype_of(const Tensor& ring, const OptionalTensor& scale, DType dtype,
                        const char* op);

// `tokens` more for the streams that are active. The last that a step does: until then it has not
// happened, whatever fails.
void advance_positions(const Tensor& position, const OptionalTensor& active, int64_t tokens = 1);

inline int64_t acc_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }
inline int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

inline ScalarType acc_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// Contiguous and of `acc`; nothing of nothing.
inline OptionalTensor contiguous_acc(const OptionalTensor& x, ScalarType acc) {
  if (!x) return std::nullopt;
  return as_contiguous(torch::stable::to(*x, acc));
}

// A result beside `like`; without elements where it is not `wanted`.
inline Tensor new_if(bool wanted, const Tensor& like, std::vector<int64_t> sizes,
                     ScalarType dtype) {
  if (!wanted) sizes = {0};
  return new_like(like, sizes, dtype);
}

// The seed (1,) of a call with dropout.
int64_t read_seed(const Tensor& seed, const char* op);

// Tokens after the in-projection, in the rings' dtype.
struct Projected {
  const void* q;
  const void* k;
  const void* v;
  int64_t stride;            // from one token to the next
  OptionalTensor owners[3];  // the memory, where a matrix multiplication made it
};

// What the kernels of one and of many tokens are told alike.
RingParams ring_params(const Projected& tokens, const Weights& w, const Rings& rings,
                       const RingSizes& s, bool add_zero_attn);

// A clip (N, T, groups * width).
struct ClipSizes {
  int64_t streams;  // N
  int64_t tokens;   // T
  int64_t groups;
  int64_t width;
};

// A clip as a ring of that kind keeps it: itself, or codes in `memory`, of kept_bytes(s, ring).
KeptTokens kept(const void* tokens, int64_t stride, const ClipSizes& s, DType dtype, RingDType ring,
                void* memory);
int64_t kept_bytes(const ClipSizes& s, RingDType ring);

// Writes the last tokens of a clip, those that stay, to the slots of a ring (N, groups, slots,
// width) and, where they are codes, their scales.
void write_ring(const KeptTokens& kept, const ClipSizes& s, DType dtype, const int64_t* position,
                void* ring, float* scale, int64_t slots);

// (N, T, E) as (N * T, E).
Tensor flat(const Tensor& x);

// How the kernels project so many tokens fastest.
const Projection& own_projection(DType dtype, int64_t tokens);

// How they project few tokens and many, so that no token's bits depend on how many there are.
const Projection& invariant_projection(DType dtype);

// Whether PyTorch's products of bfloat16 that add up so many numbers do: on a processor with AMX,
// in PyTorch 2.11 and 2.13, they read on into the next row where these are no multiple of 32, and
// what is not finite there spoils this one. (An even number below 32 it keeps apart, and the
// kernels take those as well.)
inline bool torch_keeps_rows_apart(int64_t inner) { return inner % 32 == 0; }

// Whether PyTorch multiplies by the processor's own products of that dtype: those of bfloat16 are
// newer than AVX-512, and without them PyTorch takes many times as long as the kernels.
bool torch_has_fast(DType dtype);

// How to project so many tokens, on which with `invariant` no token's bits may depend: null where
// torch's matrix multiplication beats the kernels, and keeps tokens apart.
const Projection* projection_of(const Weights& w, DType dtype, int64_t tokens, bool invariant);

// Tokens as a projection reads them.
struct Tokens {
  const Projection& by;
  const void* data;
  int64_t stride;
  int64_t count;
  int64_t features;
};

// Whether a projection takes tokens without a copy, that are acc or of the dtype.
bool takes_as_they_lie(const Projection& by, DType dtype, bool are_acc, int64_t feature_stride);

// (count, features) of any strides. Valid until the thread's next call, as is the other.
Tokens tokens_of(const Tensor& x, const Projection& by, DType dtype);

// (count, features), contiguous, acc or of the dtype.
Tokens tokens_of(const void* rows, bool are_acc, int64_t count, int64_t features,
                 const Projection& by, DType dtype);

// Where the rows of query, key and value in the packed weight or bias begin; null for null.
inline const void* third_at(const void* packed, int64_t i, int64_t elements, DType dtype) {
  if (packed == nullptr) return nullptr;
  return static_cast<const char*>(packed) + i * elements * element_size(dtype);
}

// The in-projection's weights as kernels read them, contiguous.
struct InWeights {
  Tensor q;  // of all three where they are packed
  OptionalTensor k;
  OptionalTensor v;

  explicit InWeights(const Weights& w) : q(as_contiguous(w.in_proj_weight)) {
    if (w.k_proj_weight) k = as_contiguous(*w.k_proj_weight);
    if (w.v_proj_weight) v = as_contiguous(*w.v_proj_weight);
  }
};

// The weights and sizes of `p`, and scratch for what kernels make of the queries: `extra` where a
// slot is added, or by `always_extra`.
void set_moved(MovedParams& p, const Weights& w, const InWeights& in, DType dtype,
               bool always_extra);

// out = x weight^T + bias as acc, (count, rows).
void project_to_acc(const Tokens& x, const void* weight, const void* bias, void* out, int64_t rows);

// In-projection of (tokens, E*) each. The result is valid until the thread's next call.
Projected project_in(const Tensor& query, const Tensor& key, const Tensor& value, const Weights& w,
                     DType dtype, const Projection* by);

// out = attended weight^T + bias for (tokens, E).
void project_out(const Tokens& attended, const Weights& w, const Tensor& out);

}  // namespace continual_mha::cpu
