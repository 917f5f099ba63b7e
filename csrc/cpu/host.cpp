#include "host.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace continual_mha::cpu {
namespace {

struct InputTag {};
struct ProjectedTag {};
struct QueriesTag {};
struct MovedTag {};
struct ExtraTag {};

// `weight` and `bias` are the rows' own; `out` has `out_stride` elements from token to token.
ProjectParams project_params(const Tokens& x, const void* weight, const void* bias, void* out,
                             int64_t out_stride, int64_t rows) {
  return {x.data, weight, bias, out, x.stride, out_stride, x.count, rows, x.features};
}

template <class Project>
void in_blocks(const ProjectParams& p, const Project& project) {
  const int64_t blocks = (p.rows + kRowBlock - 1) / kRowBlock;
  parallel(blocks, kRowBlock * p.in_features * p.streams,
           [&](int64_t begin, int64_t end) { project(p, begin, end); });
}

void project(const Tokens& x, const void* weight, const void* bias, void* out, int64_t out_stride,
             int64_t rows) {
  in_blocks(project_params(x, weight, bias, out, out_stride, rows), x.by.project);
}

Projected project_in_by_gemm(const std::array<const Tensor*, 3>& tokens, const Weights& w,
                             DType dtype) {
  const int64_t e = w.out_proj_weight.size(0);
  Projected result{};
  std::array<const void*, 3> data;
  if (!w.k_proj_weight && same_tokens(*tokens[0], *tokens[1], *tokens[2])) {
    result.owners[0] = linear(*tokens[0], w.in_proj_weight, w.in_proj_bias);
    result.stride = 3 * e;
    for (int64_t i = 0; i < 3; ++i)
      data[i] = third_at(result.owners[0]->const_data_ptr(), i, e, dtype);
  } else {
    const std::array<OptionalTensor, 3> separate{w.in_proj_weight, w.k_proj_weight,
                                                 w.v_proj_weight};
    result.stride = e;
    for (int64_t i = 0; i < 3; ++i) {
      const auto weight = w.k_proj_weight ? separate[i] : third(w.in_proj_weight, i);
      result.owners[i] = linear(*tokens[i], *weight, third(w.in_proj_bias, i));
      data[i] = result.owners[i]->const_data_ptr();
    }
  }
  result.q = data[0];
  result.k = data[1];
  result.v = data[2];
  return result;
}

bool torch_keeps_tokens_apart(const Weights& w) {
  const auto whole = [](const OptionalTensor& weight) {
    return !weight || torch_keeps_rows_apart(weight->size(1));
  };
  return whole(w.in_proj_weight) && whole(w.k_proj_weight) && whole(w.v_proj_weight) &&
         whole(w.out_proj_weight);
}

}  // namespace

DType dtype_of(const Tensor& x, const char* op) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, op, ": no kernel for this dtype");
  }
}

RingDType ring_dtype_of(const Tensor& ring, const OptionalTensor& scale, DType dtype,
                        const char* op) {
  if (!scale) return RingDType::kAsTokens;
  STD_TORCH_CHECK(dtype != DType::kFloat64, op, ": no kernel reads codes of 8 bits for float64");
  return ring.scalar_type() == ScalarType::Char ? RingDType::kInt8 : RingDType::kE4M3;
}

int64_t read_seed(const Tensor& seed, const char* op) {
  check_shape(seed, {1}, op, "seed");
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long, op, ": seed must be int64");
  return *static_cast<const int64_t*>(seed.const_data_ptr());
}

void advance_positions(const Tensor& position, const OptionalTensor& active, int64_t tokens) {
  int64_t* to = static_cast<int64_t*>(position.mutable_data_ptr());
  const bool* runs =
      active.has_value() ? static_cast<const bool*>(active->const_data_ptr()) : nullptr;
  const int64_t stride = active.has_value() ? active->stride(0) : 0;
  for (int64_t n = 0; n < position.size(0); ++n) {
    if (runs == nullptr || runs[n * stride]) to[n] += tokens;
  }
}

RingParams ring_params(const Projected& tokens, const Weights& w, const Rings& rings,
                       const RingSizes& s, bool add_zero_attn) {
  RingParams p{};
  p.q = tokens.q;
  p.k = tokens.k;
  p.v = tokens.v;
  p.token_stride = tokens.stride;
  p.k_ring = rings.k.mutable_data_ptr();
  p.v_ring = rings.v.mutable_data_ptr();
  if (rings.k_scale) {
    p.k_scale = static_cast<float*>(rings.k_scale->mutable_data_ptr());
    p.v_scale = static_cast<float*>(rings.v_scale->mutable_data_ptr());
  }
  p.q_ring = rings.q.mutable_data_ptr();
  p.position = static_cast<const int64_t*>(rings.position.const_data_ptr());
  p.bias_k = data_or_null(w.bias_k);
  p.bias_v = data_or_null(w.bias_v);
  p.streams = s.streams;
  p.num_heads = s.num_heads;
  p.head_dim = s.head_dim;
  p.length = s.length;
  p.query_slots = s.query_slots;
  p.add_zero_attn = add_zero_attn;
  return p;
}

int64_t kept_bytes(const ClipSizes& s, RingDType ring) {
  if (ring == RingDType::kAsTokens) return 0;
  return s.streams * s.tokens * s.groups * (s.width + int64_t{sizeof(float)});
}

KeptTokens kept(const void* tokens, int64_t stride, const ClipSizes& s, DType dtype, RingDType ring,
                void* memory) {
  if (ring == RingDType::kAsTokens) return {tokens, nullptr, stride};
  const int64_t count = s.streams * s.tokens;
  float* scale = static_cast<float*>(memory);
  void* codes = scale + count * s.groups;
  const QuantizeParams p{tokens, stride, s.groups, s.width, codes, scale};
  const auto quantize = kernels(dtype).quantize_tokens[static_cast<int>(ring)];
  parallel(count, 4 * s.groups * s.width,
           [&](int64_t begin, int64_t end) { quantize(p, begin, end); });
  return {codes, scale, s.groups * s.width};
}

namespace {

// `write_ring` for rows of so many bytes, whatever they are.
void write_rows(const void* rows, int64_t token_bytes, int64_t row_bytes, const ClipSizes& s,
                const int64_t* position, void* ring, int64_t slots) {
  const int64_t stay = std::min(s.tokens, slots);
  const auto write_stream = [&](int64_t n) {
    const char* from = static_cast<const char*>(rows) + n * s.tokens * token_bytes;
    char* to = static_cast<char*>(ring) + n * s.groups * slots * row_bytes;
    for (int64_t t = s.tokens - stay; t < s.tokens; ++t) {
      const int64_t slot = (position[n] + t) % slots;
      for (int64_t g = 0; g < s.groups; ++g) {
        std::memcpy(to + (g * slots + slot) * row_bytes, from + t * token_bytes + g * row_bytes,
                    static_cast<size_t>(row_bytes));
      }
    }
  };
  parallel(s.streams, stay * s.groups * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) write_stream(n);
  });
}

}  // namespace

void write_ring(const KeptTokens& kept, const ClipSizes& s, DType dtype, const int64_t* position,
                void* ring, float* scale, int64_t slots) {
  const int64_t size = kept.scale == nullptr ? element_size(dtype) : 1;
  write_rows(kept.rows, kept.stride * size, s.width * size, s, position, ring, slots);
  if (kept.scale == nullptr) return;
  constexpr int64_t kBytes = sizeof(float);
  write_rows(kept.scale, s.groups * kBytes, kBytes, s, position, scale, slots);
}

Tensor flat(const Tensor& x) {
  return torch::stable::reshape(x, {x.size(0) * x.size(1), x.size(2)});
}

namespace {

Tokens as_taken(GatherParams p, bool are_acc, const Projection& by, DType dtype) {
  if (takes_as_they_lie(by, dtype, are_acc, p.feature_stride)) {
    return {by, p.src, p.stream_stride, p.tokens, p.features};
  }
  p.dst = scratch<InputTag>(by.gathered_bytes(p.tokens, p.features));
  parallel((p.tokens + kTokenBlock - 1) / kTokenBlock, kTokenBlock * p.features,
           [&](int64_t begin, int64_t end) {
             are_acc ? by.gather_acc(p, begin, end) : by.gather(p, begin, end);
           });
  return {by, p.dst, p.features, p.tokens, p.features};
}

}  // namespace

bool takes_as_they_lie(const Projection& by, DType dtype, bool are_acc, int64_t feature_stride) {
  const bool same = element_size(dtype) == acc_size(dtype);
  return !by.packed && feature_stride == 1 && (same || are_acc == by.factors_are_acc);
}

Tokens tokens_of(const Tensor& x, const Projection& by, DType dtype) {
  return as_taken(
      {x.const_data_ptr(), nullptr, x.stride(0), x.stride(1), x.size(0), x.size(1), 1.0}, false, by,
      dtype);
}

Tokens tokens_of(const void* rows, bool are_acc, int64_t count, int64_t features,
                 const Projection& by, DType dtype) {
  return as_taken({rows, nullptr, features, 1, count, features, 1.0}, are_acc, by, dtype);
}

void set_moved(MovedParams& p, const Weights& w, const InWeights& in, DType dtype,
               bool always_extra) {
  const int64_t e = w.out_proj_weight.size(0);
  const void* packed = in.q.const_data_ptr();
  const void* bias = data_or_null(w.in_proj_bias);
  p.embed_dim = e;
  p.k_weight = in.k ? in.k->const_data_ptr() : third_at(packed, 1, e * e, dtype);
  p.v_weight = in.v ? in.v->const_data_ptr() : third_at(packed, 2, e * e, dtype);
  p.k_bias = third_at(bias, 1, e, dtype);
  p.v_bias = third_at(bias, 2, e, dtype);
  p.bias_k = data_or_null(w.bias_k);
  p.bias_v = data_or_null(w.bias_v);
  const int64_t row = p.queries * acc_size(dtype);
  p.q = scratch<QueriesTag>(row * e);
  p.moved = scratch<MovedTag>(row * p.num_heads * p.key_dim);
  if (always_extra || p.bias_k != nullptr || p.add_zero_attn) {
    p.extra = scratch<ExtraTag>(row * p.num_heads * 2);
  }
}

void project_to_acc(const Tokens& x, const void* weight, const void* bias, void* out,
                    int64_t rows) {
  in_blocks(project_params(x, weight, bias, out, rows, rows), x.by.project_to_acc);
}

const Projection& own_projection(DType dtype, int64_t tokens) {
  const Kernels& table = kernels(dtype);
  return tokens < table.projection.least_tokens ? table.of_rows : table.projection;
}

// By rows, where few tokens would pay for what many gain.
const Projection& invariant_projection(DType dtype) {
  const Kernels& table = kernels(dtype);
  return table.projection.least_tokens > 2 ? table.of_rows : table.projection;
}

// Measured beside MKL and oneDNN, see docs/cpu.md: oneDNN multiplies bfloat16 by instructions that
// the kernels lack, or use but for fewer tokens as fast.
bool torch_has_fast(DType dtype) {
  const Kernels& table = kernels(dtype);
  if (dtype == DType::kFloat16) return false;
  if (dtype != DType::kBFloat16 || !table.of_rows.factors_are_acc) return true;
  return &table == kernels_baseline() + static_cast<int>(dtype);  // a processor that is not known
}

const Projection* projection_of(const Weights& w, DType dtype, int64_t tokens, bool invariant) {
  if (invariant) return &invariant_projection(dtype);
  const Projection& own = own_projection(dtype, tokens);
  if (dtype != DType::kBFloat16 || !torch_keeps_tokens_apart(w)) return &own;
  if (!torch_has_fast(dtype)) return &own;
  const bool by_pairs = !own.factors_are_acc && !has_matrix_unit();
  const int64_t most = own.packed ? 512 : by_pairs ? 63 : 15;
  return tokens <= most ? &own : nullptr;
}

Projected project_in(const Tensor& query, const Tensor& key, const Tensor& value, const Weights& w,
                     DType dtype, const Projection* by) {
  const std::array<const Tensor*, 3> tokens{&query, &key, &value};
  if (by == nullptr) return project_in_by_gemm(tokens, w, dtype);
  const int64_t e = w.out_proj_weight.size(0);
  const int64_t bytes = query.size(0) * 3 * e * element_size(dtype);
  char* out = static_cast<char*>(scratch<ProjectedTag>(bytes));
  const int64_t part = e * element_size(dtype);
  const Tensor packed = as_contiguous(w.in_proj_weight);
  const void* bias = data_or_null(w.in_proj_bias);
  if (!w.k_proj_weight && same_tokens(query, key, value)) {
    project(tokens_of(query, *by, dtype), packed.const_data_ptr(), bias, out, 3 * e, 3 * e);
  } else {
    const std::array<OptionalTensor, 3> separate{packed, w.k_proj_weight, w.v_proj_weight};
    for (int64_t i = 0; i < 3; ++i) {
      OptionalTensor own;  // keeps a contiguous copy alive
      if (w.k_proj_weight) own = as_contiguous(*separate[i]);
      const void* weight =
          own ? own->const_data_ptr() : third_at(packed.const_data_ptr(), i, e * e, dtype);
      project(tokens_of(*tokens[i], *by, dtype), weight, third_at(bias, i, e, dtype),
              out + i * part, 3 * e, e);
    }
  }
  return {out, out + part, out + 2 * part, 3 * e, {}};
}

void project_out(const Tokens& attended, const Weights& w, const Tensor& out) {
  const Tensor weight = as_contiguous(w.out_proj_weight);
  project(attended, weight.const_data_ptr(), data_or_null(w.out_proj_bias), out.mutable_data_ptr(),
          attended.features, attended.features);
}

}  // namespace continual_mha::cpu
