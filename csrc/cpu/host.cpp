#include "host.h"

#include <array>

namespace continual_mha::cpu {
namespace {

struct InputTag {};
struct ProjectedTag {};

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

void project(const Tokens& x, const void* weight, const void* bias, DType dtype, void* out,
             int64_t out_stride, int64_t rows) {
  in_blocks(project_params(x, weight, bias, out, out_stride, rows), kernels(dtype).project);
}

void project_out(const Tokens& attended, const Weights& w, DType dtype, const Tensor& out) {
  const Tensor weight = contiguous_rows(w.out_proj_weight);
  project(attended, weight.const_data_ptr(), data_or_null(w.out_proj_bias), dtype,
          out.mutable_data_ptr(), attended.features, attended.features);
}

std::optional<Tensor> third(const std::optional<Tensor>& packed, int64_t i, int64_t rows) {
  if (!packed.has_value()) return std::nullopt;
  return torch::stable::narrow(const_cast<Tensor&>(*packed), 0, i * rows, rows);
}

Projected project_in_by_gemm(const std::array<const Tensor*, 3>& tokens, const Weights& w,
                             DType dtype) {
  const int64_t e = w.out_proj_weight.size(0);
  Projected result{};
  std::array<const void*, 3> data;
  if (!w.k_proj_weight && same_tokens(*tokens[0], *tokens[1]) &&
      same_tokens(*tokens[0], *tokens[2])) {
    result.owners[0] = linear(*tokens[0], w.in_proj_weight, w.in_proj_bias);
    result.stride = 3 * e;
    for (int64_t i = 0; i < 3; ++i)
      data[i] = third(result.owners[0]->const_data_ptr(), i, e, dtype);
  } else {
    const std::array<std::optional<Tensor>, 3> separate{w.in_proj_weight, w.k_proj_weight,
                                                        w.v_proj_weight};
    result.stride = e;
    for (int64_t i = 0; i < 3; ++i) {
      const auto weight = w.k_proj_weight ? separate[i] : third(w.in_proj_weight, i, e);
      result.owners[i] = linear(*tokens[i], *weight, third(w.in_proj_bias, i, e));
      data[i] = result.owners[i]->const_data_ptr();
    }
  }
  result.q = data[0];
  result.k = data[1];
  result.v = data[2];
  return result;
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

RingDType ring_dtype_of(const Tensor& ring, const std::optional<Tensor>& scale, DType dtype,
                        const char* op) {
  if (!scale) return RingDType::kAsTokens;
  STD_TORCH_CHECK(dtype != DType::kFloat64, op, ": no kernel reads codes of 8 bits for float64");
  return ring.scalar_type() == ScalarType::Char ? RingDType::kInt8 : RingDType::kE4M3;
}

void check_active(const std::optional<Tensor>& active, int64_t streams, const char* op) {
  if (!active.has_value()) return;
  STD_TORCH_CHECK(active->scalar_type() == ScalarType::Bool && active->dim() == 1 &&
                      active->size(0) == streams && active->is_cpu(),
                  op, ": active must be (", streams, ",) bool beside the rings");
}

void advance_positions(const Tensor& position, const std::optional<Tensor>& active) {
  int64_t* to = static_cast<int64_t*>(position.mutable_data_ptr());
  const bool* runs =
      active.has_value() ? static_cast<const bool*>(active->const_data_ptr()) : nullptr;
  const int64_t stride = active.has_value() ? active->stride(0) : 0;
  for (int64_t n = 0; n < position.size(0); ++n) to[n] += runs == nullptr || runs[n * stride];
}

Tokens tokens_of(const Tensor& x, DType dtype) {
  const int64_t count = x.size(0);
  const int64_t features = x.size(1);
  const bool as_acc = dtype == DType::kFloat32 || dtype == DType::kFloat64;
  if (as_acc && x.stride(1) == 1) return {x.const_data_ptr(), x.stride(0), count, features};
  void* buffer = scratch<InputTag>(count * features * acc_size(dtype));
  const void* src = x.const_data_ptr();
  const int64_t stream_stride = x.stride(0);
  const int64_t feature_stride = x.stride(1);
  parallel(count, features, [&](int64_t begin, int64_t end) {
    kernels(dtype).gather(src, stream_stride, feature_stride, features, buffer, begin, end);
  });
  return {buffer, features, count, features};
}

void project_to_acc(const Tokens& x, const void* weight, const void* bias, DType dtype, void* out,
                    int64_t rows) {
  in_blocks(project_params(x, weight, bias, out, rows, rows), kernels(dtype).project_to_acc);
}

bool same_tokens(const Tensor& a, const Tensor& b) {
  if (a.get() == b.get()) return true;
  if (a.const_data_ptr() != b.const_data_ptr() || a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i) || a.stride(i) != b.stride(i)) return false;
  }
  return true;
}

// Measured with MKL and oneDNN on AVX-512, see docs/cpu.md: bfloat16 has dot products of its own
// there; short rows leave the kernels too much time in adding up lanes. Elsewhere the kernels are
// at least as fast, and give a stream the same bits in a batch of any size.
bool prefers_gemm(DType dtype, int64_t tokens, int64_t embed_dim) {
  if (dtype == DType::kBFloat16) return tokens >= 16;
  return dtype == DType::kFloat32 && embed_dim < 256 && tokens >= 32;
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Projected project_in(const Tensor& query, const Tensor& key, const Tensor& value, const Weights& w,
                     DType dtype, bool gemm) {
  const std::array<const Tensor*, 3> tokens{&query, &key, &value};
  if (gemm) return project_in_by_gemm(tokens, w, dtype);
  const int64_t e = w.out_proj_weight.size(0);
  const int64_t bytes = query.size(0) * 3 * e * element_size(dtype);
  char* out = static_cast<char*>(scratch<ProjectedTag>(bytes));
  const int64_t part = e * element_size(dtype);
  const Tensor packed = contiguous_rows(w.in_proj_weight);
  const void* bias = data_or_null(w.in_proj_bias);
  if (!w.k_proj_weight && same_tokens(query, key) && same_tokens(query, value)) {
    project(tokens_of(query, dtype), packed.const_data_ptr(), bias, dtype, out, 3 * e, 3 * e);
  } else {
    const std::array<std::optional<Tensor>, 3> separate{packed, w.k_proj_weight, w.v_proj_weight};
    for (int64_t i = 0; i < 3; ++i) {
      std::optional<Tensor> own;  // keeps a contiguous copy alive
      if (w.k_proj_weight) own = contiguous_rows(*separate[i]);
      const void* weight =
          own ? own->const_data_ptr() : third(packed.const_data_ptr(), i, e * e, dtype);
      project(tokens_of(*tokens[i], dtype), weight, third(bias, i, e, dtype), dtype, out + i * part,
              3 * e, e);
    }
  }
  return {out, out + part, out + 2 * part, 3 * e, {}};
}

void project_out(const void* attended, const Weights& w, DType dtype, const Tensor& out) {
  const int64_t e = w.out_proj_weight.size(0);
  project_out({attended, e, out.numel() / e, e}, w, dtype, out);
}

void project_out(const Tensor& attended, const Weights& w, DType dtype, const Tensor& out) {
  project_out(tokens_of(attended, dtype), w, dtype, out);
}

}  // namespace continual_mha::cpu
