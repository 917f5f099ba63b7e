// What the CPU and the CUDA library share: an operator's arguments, checked, and calls of PyTorch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <string>

namespace continual_mha {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The module's parameters, as the operators of ops.py pass them.
struct Weights {
  Tensor in_proj_weight;
  OptionalTensor k_proj_weight;
  OptionalTensor v_proj_weight;
  OptionalTensor in_proj_bias;
  Tensor out_proj_weight;
  OptionalTensor out_proj_bias;
  OptionalTensor bias_k;
  OptionalTensor bias_v;
};

struct Rings {
  Tensor k;         // (N, H, L, D)
  Tensor v;         // (N, H, L, D)
  Tensor q;         // (N, R, E)
  Tensor position;  // (N,)
  // (N, H, L, 1) fp32, where the rings of keys and values hold codes of 8 bits
  OptionalTensor k_scale = std::nullopt;
  OptionalTensor v_scale = std::nullopt;
};

struct RingSizes {
  int64_t streams;      // N
  int64_t num_heads;    // H
  int64_t length;       // L
  int64_t head_dim;     // D
  int64_t query_slots;  // R
  int64_t embed_dim() const { return num_heads * head_dim; }
};

// A contiguous tensor of the device of `like`, and of its dtype unless another is given.
// torch::stable::new_empty does the same, but asks the dispatcher for an operator by name: 0.8 of
// the 7 us of a call with nothing to do.
inline Tensor new_like(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       std::optional<ScalarType> other = std::nullopt) {
  constexpr int64_t kMaxDim = 4;
  const auto dim = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(dim <= kMaxDim, "new_like makes at most ", kMaxDim, " axes");
  int64_t strides[kMaxDim];
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  int32_t dtype, device_type, device_index;
  if (other) {
    dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*other));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes.data(), strides, dtype, device_type,
                                                  device_index, &made));
  return Tensor(made);
}

// Of its sizes as well.
inline Tensor new_like(const Tensor& like) { return new_like(like, like.sizes()); }

inline const void* data_or_null(const OptionalTensor& x) {
  return x.has_value() ? x->const_data_ptr() : nullptr;
}

// The operator of that name costs a microsecond even where there is nothing to do.
inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// Whether both name the same memory in the same way: one projection then serves both.
inline bool same_tokens(const Tensor& a, const Tensor& b) {
  if (a.get() == b.get()) return true;
  if (a.const_data_ptr() != b.const_data_ptr() || a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i) || a.stride(i) != b.stride(i)) return false;
  }
  return true;
}

inline bool same_tokens(const Tensor& a, const Tensor& b, const Tensor& c) {
  return same_tokens(a, b) && same_tokens(a, c);
}

// torch.nn.functional.linear.
inline Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The rows of query (0), key (1) or value (2) in the packed weight or bias; nothing of nothing.
inline OptionalTensor third(const OptionalTensor& packed, int64_t i) {
  if (!packed.has_value()) return std::nullopt;
  const int64_t rows = packed->size(0) / 3;
  return torch::stable::narrow(const_cast<Tensor&>(*packed), 0, i * rows, rows);
}

// Not what a wrapper that shards or offloads weights has freed.
inline void check_stored(const Tensor& x, const char* op, const char* name) {
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &bytes));
  STD_TORCH_CHECK(bytes > 0 || x.numel() == 0, op, ": the storage of ", name, " has been freed");
}

inline void check_like(const Tensor& x, const Tensor& like, const char* op, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), op, ": ", name,
                  " has another dtype than the others");
  STD_TORCH_CHECK(x.device() == like.device(), op, ": ", name,
                  " is on another device than the others");
  check_stored(x, op, name);
}

// As Python writes it.
template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream stream;
  const char* before = "(";
  for (const int64_t size : sizes) {
    stream << before << size;
    before = ", ";
  }
  stream << (sizes.size() == 0 ? "()" : sizes.size() == 1 ? ",)" : ")");
  return stream.str();
}

inline std::string shape_of(const Tensor& tensor) { return shape_text(tensor.sizes()); }

inline void check_shape(const Tensor& x, std::initializer_list<int64_t> sizes, const char* op,
                        const char* name) {
  bool same = x.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (const int64_t size : sizes) same = same && x.size(i++) == size;
  STD_TORCH_CHECK(same, op, ": ", name, " has shape ", shape_of(x), ", expected ",
                  shape_text(sizes));
}

// A mask that broadcasts to (N, H, S).
inline void check_mask(const OptionalTensor& mask, const Tensor& query, int64_t heads,
                       int64_t slots, const char* op) {
  STD_TORCH_CHECK(!mask || mask->device() == query.device(), op,
                  ": mask is on another device than the others");
  STD_TORCH_CHECK(!mask || (mask->dim() == 3 && mask->size(2) == slots &&
                            (mask->size(0) == 1 || mask->size(0) == query.size(0)) &&
                            (mask->size(1) == 1 || mask->size(1) == heads)),
                  op, ": mask must be broadcastable to (N, H, S)");
}

// The arguments of an attention over a shared tile: query (N, H, Ek), key (N, S, Ek), value
// (N, S, Ev), a mask that broadcasts to (N, H, S), a sink (N, H).
inline void check_shared(const Tensor& query, const Tensor& key, const Tensor& value,
                         const OptionalTensor& mask, const OptionalTensor& sink, const char* op) {
  STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && value.dim() == 3, op,
                  ": query must be (N, H, Ek), key (N, S, Ek) and value (N, S, Ev)");
  const int64_t n = query.size(0);
  const int64_t heads = query.size(1);
  const int64_t slots = key.size(1);
  check_stored(query, op, "query");
  check_like(key, query, op, "key");
  check_like(value, query, op, "value");
  check_shape(key, {n, slots, query.size(2)}, op, "key");
  check_shape(value, {n, slots, value.size(2)}, op, "value");
  STD_TORCH_CHECK(!sink || sink->device() == query.device(), op,
                  ": sink is on another device than the others");
  check_mask(mask, query, heads, slots, op);
  if (sink) check_shape(*sink, {n, heads}, op, "sink");
}

inline void check_matrix(const OptionalTensor& x, int64_t rows, int64_t columns, const Tensor& like,
                         const char* op, const char* name) {
  if (!x.has_value()) return;
  check_like(*x, like, op, name);
  check_shape(*x, {rows, columns}, op, name);
}

inline void check_vector(const OptionalTensor& x, int64_t size, const Tensor& like, const char* op,
                         const char* name) {
  if (!x.has_value()) return;
  check_like(*x, like, op, name);
  STD_TORCH_CHECK(x->numel() == size && x->is_contiguous(), op, ": ", name, " must be ", size,
                  " contiguous elements");
}

// Which streams advance: (N,) bool beside `like`, or nothing.
inline void check_active(const OptionalTensor& active, int64_t streams, const Tensor& like,
                         const char* op) {
  if (!active.has_value()) return;
  check_shape(*active, {streams}, op, "active");
  STD_TORCH_CHECK(active->scalar_type() == ScalarType::Bool && active->device() == like.device(),
                  op, ": active must be bool beside the rings");
}

inline void check_codes(const Tensor& ring, const char* op) {
  const ScalarType codes = ring.scalar_type();
  STD_TORCH_CHECK(codes == ScalarType::Char || codes == ScalarType::Byte, op,
                  ": a ring with scales must be int8 or uint8");
  check_stored(ring, op, "a ring");
}

// A scale is (..., L, 1) beside a ring (..., L, D).
inline void check_scale(const Tensor& scale, const Tensor& ring, const char* op) {
  bool fits = scale.scalar_type() == ScalarType::Float && scale.device() == ring.device() &&
              scale.is_contiguous() && scale.dim() == ring.dim() && scale.size(ring.dim() - 1) == 1;
  for (int64_t i = 0; fits && i < ring.dim() - 1; ++i) fits = scale.size(i) == ring.size(i);
  STD_TORCH_CHECK(fits, op, ": a scale must be as its ring, but fp32 and with one feature");
  check_stored(scale, op, "a scale");
}

inline void check_position(const Tensor& position, int64_t streams, const Tensor& like,
                           const char* op) {
  STD_TORCH_CHECK(position.scalar_type() == ScalarType::Long &&
                      position.device() == like.device() && position.dim() == 1 &&
                      position.size(0) == streams && position.is_contiguous(),
                  op, ": position must be (", streams, ",) int64 beside the rings, contiguous");
  check_stored(position, op, "position");
  if (!position.is_cpu()) return;  // elsewhere that would wait for the device
  constexpr int64_t kOldest = std::numeric_limits<int64_t>::max() - (int64_t{1} << 40);
  const auto* at = static_cast<const int64_t*>(position.const_data_ptr());
  for (int64_t n = 0; n < streams; ++n) {
    STD_TORCH_CHECK(at[n] >= 0 && at[n] <= kOldest, op, ": position ", at[n], " of stream ", n,
                    " is negative or too large; a state must come from get_state or a step");
  }
}

// Rings of codes have scales, and other rings the dtype of the ring of queries.
inline void check_scales(const Rings& rings, const char* op) {
  STD_TORCH_CHECK(rings.k_scale.has_value() == rings.v_scale.has_value(), op,
                  ": k_scale and v_scale come together");
  if (!rings.k_scale) {
    check_like(rings.k, rings.q, op, "the ring of keys");
    check_like(rings.v, rings.q, op, "the ring of values");
    return;
  }
  check_codes(rings.k, op);
  check_codes(rings.v, op);
  STD_TORCH_CHECK(rings.v.scalar_type() == rings.k.scalar_type() &&
                      rings.k.device() == rings.q.device() && rings.v.device() == rings.q.device(),
                  op, ": the rings differ in dtype or device");
  check_scale(*rings.k_scale, rings.k, op);
  check_scale(*rings.v_scale, rings.v, op);
}

// Sizes of the rings, which are contiguous and agree with each other.
inline RingSizes check_rings(const Rings& rings, const char* op) {
  STD_TORCH_CHECK(rings.k.dim() == 4 && rings.v.dim() == 4 && rings.q.dim() == 3, op,
                  ": rings must be (N, H, L, D), (N, H, L, D) and (N, R, E)");
  const RingSizes s{rings.k.size(0), rings.k.size(1), rings.k.size(2), rings.k.size(3),
                    rings.q.size(1)};
  check_stored(rings.q, op, "the ring of queries");
  check_scales(rings, op);
  STD_TORCH_CHECK(s.num_heads > 0 && s.length > 0 && s.head_dim > 0, op, ": a ring has no slot");
  for (int64_t i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(rings.v.size(i) == rings.k.size(i), op, ": rings of keys and values differ");
  }
  STD_TORCH_CHECK(rings.q.size(0) == s.streams && rings.q.size(2) == s.embed_dim(), op,
                  ": the ring of queries must be (", s.streams, ", R, ", s.embed_dim(), ")");
  check_position(rings.position, s.streams, rings.q, op);
  STD_TORCH_CHECK(rings.k.is_contiguous() && rings.v.is_contiguous() && rings.q.is_contiguous(), op,
                  ": rings must be contiguous");
  return s;
}

// Weights agree with the sizes E, Ek and Ev and with each other.
inline void check_weights(const Weights& w, int64_t e, int64_t ek, int64_t ev, const Tensor& like,
                          const char* op) {
  const bool packed = !w.k_proj_weight.has_value();
  STD_TORCH_CHECK(packed == !w.v_proj_weight.has_value(), op,
                  ": k_proj_weight and v_proj_weight come together");
  STD_TORCH_CHECK(w.bias_k.has_value() == w.bias_v.has_value(), op,
                  ": bias_k and bias_v come together");
  STD_TORCH_CHECK(!packed || (ek == e && ev == e), op, ": key and value must have ", e,
                  " features");
  check_matrix(w.in_proj_weight, packed ? 3 * e : e, e, like, op, "in_proj_weight");
  check_matrix(w.k_proj_weight, e, ek, like, op, "k_proj_weight");
  check_matrix(w.v_proj_weight, e, ev, like, op, "v_proj_weight");
  check_matrix(w.out_proj_weight, e, e, like, op, "out_proj_weight");
  check_vector(w.in_proj_bias, 3 * e, like, op, "in_proj_bias");
  check_vector(w.out_proj_bias, e, like, op, "out_proj_bias");
  check_vector(w.bias_k, e, like, op, "bias_k");
  check_vector(w.bias_v, e, like, op, "bias_v");
}

// Tokens (N, E*) or (N, T, E*) and weights agree with the rings and with each other.
inline void check_tokens(const Tensor& query, const Tensor& key, const Tensor& value,
                         const Weights& w, const Rings& rings, const RingSizes& s, const char* op) {
  const int64_t last = query.dim() - 1;
  for (const Tensor* x : {&query, &key, &value}) {
    check_like(*x, rings.q, op, "a token");
    STD_TORCH_CHECK(x->dim() == last + 1 && x->size(0) == s.streams, op, ": tokens must be (",
                    s.streams, last == 2 ? ", T, E)" : ", E)");
    STD_TORCH_CHECK(last == 1 || x->size(1) == query.size(1), op,
                    ": query, key and value differ in their number of tokens");
  }
  const int64_t e = s.embed_dim();
  STD_TORCH_CHECK(query.size(last) == e, op, ": query must have ", e, " features");
  check_weights(w, e, key.size(last), value.size(last), rings.q, op);
}

}  // namespace continual_mha
