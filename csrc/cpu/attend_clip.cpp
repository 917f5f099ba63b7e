// continual_mha::cpu_attend_clip and its gradients: one query of every stream over a clip as a node
// of autograd, without extra slots. Projections are products, whose gradients are written in place.
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "attend_shared.h"
#include "product.h"

namespace continual_mha::cpu {
namespace {

constexpr const char* kOp = "cpu_attend_clip";

// What both ways are given. A query of null is a token of the keys, a value of null the keys.
struct Clip {
  Clip(const OptionalTensor& query, const Tensor& key, const OptionalTensor& value,
       const OptionalTensor& mask, const Weights& w, int64_t num_heads, int64_t query_index)
      : asking(query ? *query : token_of(key, query_index)), key(key) {
    STD_TORCH_CHECK(asking.dim() == 2 && key.dim() == 3 && (!value || value->dim() == 3), kOp,
                    ": query must be (N, E), key (N, S, Ek) and value (N, S, Ev)");
    const Tensor& values = value ? *value : key;
    n = key.size(0);
    slots = key.size(1);
    ek = key.size(2);
    ev = values.size(2);
    e = asking.size(1);
    heads = num_heads;
    STD_TORCH_CHECK(heads > 0 && e % heads == 0, kOp, ": ", e, " features do not make ", heads,
                    " heads");
    d = e / heads;
    check_stored(key, kOp, "key");
    check_like(asking, key, kOp, "query");
    check_like(values, key, kOp, "value");
    check_shape(asking, {n, e}, kOp, "query");
    check_shape(values, {n, slots, ev}, kOp, "value");
    STD_TORCH_CHECK(slots > 0, kOp, ": there is nothing to attend to");
    check_mask(mask, key, heads, slots, kOp);
    check_weights(w, e, ek, ev, key, kOp);
    dtype = dtype_of(key, kOp);
    in_weight = as_contiguous(w.in_proj_weight);
    k_weight = w.k_proj_weight ? as_contiguous(*w.k_proj_weight) : in_weight;
    v_weight = w.v_proj_weight ? as_contiguous(*w.v_proj_weight) : in_weight;
    out_weight = as_contiguous(w.out_proj_weight);
    packed = !w.k_proj_weight;
    in_bias = data_or_null(w.in_proj_bias);
    out_bias = data_or_null(w.out_proj_bias);
    if (asking.stride(1) != 1) asking = torch::stable::contiguous(asking);
  }

  // Of the packed weight, or a tensor as it is, the part of query (0), key (1) or value (2).
  const void* part(const Tensor& weight, int64_t i) const {
    return third_at(weight.const_data_ptr(), packed ? i : 0, e * e, dtype);
  }
  const void* bias(int64_t i) const { return third_at(in_bias, i, e, dtype); }

  // A weight, or its gradient, as a matrix (D, columns) for each head.
  Matrices weight_by_head(const void* data, int64_t columns) const {
    return {data, heads, d, columns, d * columns, columns, 1};
  }
  // (N, H, width), contiguous, as a matrix (N, width) for each head.
  Matrices by_head(const Tensor& x, int64_t width) const {
    return {x.const_data_ptr(), heads, n, width, width, heads * width, 1};
  }
  // All heads' (N, H, D) as (N, E).
  Matrices joined(const Tensor& x) const { return Matrices::contiguous(x.const_data_ptr(), n, e); }

  Matrices w_q() const { return Matrices::contiguous(in_weight.const_data_ptr(), e, e); }
  Matrices w_k() const { return weight_by_head(part(k_weight, 1), ek); }
  Matrices w_v() const { return weight_by_head(part(v_weight, 2), ev); }
  Matrices w_o() const { return Matrices::contiguous(out_weight.const_data_ptr(), e, e); }

  void product(const Matrices& out, const Matrices& left, const Matrices& right,
               const void* bias = nullptr, double scale = 1.0, bool add = false) const {
    multiply({out, left, right, bias, scale, add}, dtype);
  }

  double scale() const { return 1.0 / std::sqrt(static_cast<double>(d)); }
  ScalarType acc() const { return acc_type(dtype); }
  Tensor vectors(int64_t width) const { return new_like(key, {n, heads, width}); }

  static Tensor token_of(const Tensor& clip, int64_t index) {
    STD_TORCH_CHECK(clip.dim() == 3 && index >= -clip.size(1) && index < clip.size(1), kOp,
                    ": there is no token ", index, " in a key ", shape_of(clip));
    return torch::stable::select(clip, 1, index);
  }

  Tensor asking;  // (N, E), features next to each other
  const Tensor& key;
  Tensor in_weight, k_weight, v_weight, out_weight;  // contiguous
  const void* in_bias;
  const void* out_bias;
  int64_t n, slots, heads, d, e, ek, ev;
  DType dtype;
  bool packed;
};

// Whether a mask leaves a head of a stream nothing, from the logarithm of its sum, of acc.
bool sees_nothing(const void* lse, int64_t row, DType dtype) {
  return dtype == DType::kFloat64
             ? static_cast<const double*>(lse)[row] == -std::numeric_limits<double>::infinity()
             : static_cast<const float*>(lse)[row] == -std::numeric_limits<float>::infinity();
}

// The sums of the heads' weights (N, H), in the dtype of the tokens; nothing where all are 1.
OptionalTensor shares(const Clip& clip, const OptionalTensor& seed, const Tensor& lse,
                      const Tensor& kept, bool blank) {
  const ScalarType dtype = clip.key.scalar_type();
  if (seed) return as_contiguous(torch::stable::to(kept, dtype));  // zeros where there is nothing
  if (!blank) return std::nullopt;
  Tensor all = new_like(clip.key, {clip.n, clip.heads}, clip.acc());
  torch::stable::fill_(all, 1.0);
  char* to = static_cast<char*>(all.mutable_data_ptr());
  const int64_t size = acc_size(clip.dtype);
  for (int64_t row = 0; row < clip.n * clip.heads; ++row) {
    if (sees_nothing(lse.const_data_ptr(), row, clip.dtype)) {
      std::memset(to + row * size, 0, static_cast<size_t>(size));
    }
  }
  return as_contiguous(torch::stable::to(all, dtype));
}

// (N, H) as a column (N, 1) for each head.
Matrices column_by_head(const Clip& clip, const Tensor& x) {
  return {x.const_data_ptr(), clip.heads, clip.n, 1, 1, clip.heads, 1};
}

// out, attn, q (N, H, D), moved (N, H, Ek), mixed (N, H, Ev), lse, kept and heads (N, E).
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results attend_clip(OptionalTensor query, Tensor key, OptionalTensor value, OptionalTensor mask,
                    Tensor in_proj_weight, OptionalTensor k_proj_weight,
                    OptionalTensor v_proj_weight, OptionalTensor in_proj_bias,
                    Tensor out_proj_weight, OptionalTensor out_proj_bias, OptionalTensor seed,
                    int64_t num_heads, int64_t query_index, double dropout_p, bool need_weights,
                    bool blank) {
  const Weights w{in_proj_weight,  k_proj_weight, v_proj_weight, in_proj_bias,
                  out_proj_weight, out_proj_bias, std::nullopt,  std::nullopt};
  const Clip clip(query, key, value, mask, w, num_heads, query_index);
  blank = blank && mask.has_value();
  const Tensor q = clip.vectors(clip.d);
  const Tensor moved = clip.vectors(clip.ek);
  const Tensor heads = new_like(key, {clip.n, clip.e});
  const Tensor out = new_like(key, {clip.n, clip.e});
  const auto asking = Matrices::of(clip.asking);
  clip.product(clip.joined(q), asking, clip.w_q().transposed(), clip.bias(0));
  clip.product(clip.by_head(moved, clip.ek), clip.by_head(q, clip.d), clip.w_k(), nullptr,
               clip.scale());
  const auto [mixed, lse, kept, attn] = run_attend_shared(moved, key, value, mask, std::nullopt,
                                                          seed, dropout_p, need_weights, blank);
  const OptionalTensor share = shares(clip, seed, lse, kept, blank);
  const void* bias = clip.bias(2);
  clip.product(clip.by_head(heads, clip.d), clip.by_head(mixed, clip.ev), clip.w_v().transposed(),
               share ? nullptr : bias);
  if (share && bias != nullptr) {
    const Matrices biases{bias, clip.heads, 1, clip.d, clip.d, clip.d, 1};
    clip.product(clip.by_head(heads, clip.d), column_by_head(clip, *share), biases, nullptr, 1.0,
                 true);
  }
  clip.product(clip.joined(out), clip.joined(heads), clip.w_o().transposed(), clip.out_bias);
  return {out, attn, q, moved, mixed, lse, kept, heads};
}

// The arguments that may need a gradient, as they follow each other; the mask has none.
enum Argument {
  kQuery,
  kKey,
  kValue,
  kMask,
  kInWeight,
  kKWeight,
  kVWeight,
  kInBias,
  kOutWeight,
  kOutBias,
  kArguments
};

std::vector<OptionalTensor> attend_clip_backward(
    Tensor grad_out, OptionalTensor grad_attn, OptionalTensor query, Tensor key,
    OptionalTensor value, OptionalTensor mask, Tensor in_proj_weight, OptionalTensor k_proj_weight,
    OptionalTensor v_proj_weight, OptionalTensor in_proj_bias, Tensor out_proj_weight,
    OptionalTensor out_proj_bias, OptionalTensor seed, Tensor q, Tensor moved, Tensor mixed,
    Tensor lse, Tensor kept, Tensor heads, int64_t num_heads, int64_t query_index, double dropout_p,
    bool blank, std::vector<bool> needed) {
  const Weights w{in_proj_weight,  k_proj_weight, v_proj_weight, in_proj_bias,
                  out_proj_weight, out_proj_bias, std::nullopt,  std::nullopt};
  const Clip clip(query, key, value, mask, w, num_heads, query_index);
  STD_TORCH_CHECK(needed.size() == kArguments, kOp, "_backward: needed must be of ", kArguments,
                  " arguments");
  check_like(grad_out, key, kOp, "grad_out");
  check_shape(grad_out, {clip.n, clip.e}, kOp, "grad_out");
  for (const auto& [x, width] : {std::pair{q, clip.d}, {moved, clip.ek}, {mixed, clip.ev}}) {
    check_like(x, key, kOp, "a result of the forward");
    check_shape(x, {clip.n, clip.heads, width}, kOp, "a result of the forward");
    STD_TORCH_CHECK(x.is_contiguous(), kOp, ": a result of the forward is not contiguous");
  }
  check_matrix(heads, clip.n, clip.e, key, kOp, "heads");
  for (const Tensor* x : {&lse, &kept}) {
    if (x == &kept && !seed) continue;  // without elements
    check_shape(*x, {clip.n, clip.heads}, kOp, "lse or kept");
    STD_TORCH_CHECK(x->scalar_type() == clip.acc() && x->is_contiguous(), kOp,
                    ": lse and kept must be contiguous, of the accumulators' dtype");
  }
  blank = blank && mask.has_value();
  const Tensor d_out = as_contiguous(grad_out);
  const Matrices d_outs = clip.joined(d_out);
  const Matrices all = ones(clip.n, clip.dtype);

  // what they take, from the queries' projection to the heads' outputs
  const bool asking_in_clip = needed[kKey] && !query;
  const bool of_queries = needed[kQuery] || asking_in_clip || needed[kInWeight] || needed[kInBias];
  const bool of_attention = of_queries || needed[kKey] || needed[kValue] || needed[kKWeight];
  const bool of_heads = of_attention || needed[kVWeight];

  std::vector<OptionalTensor> grads(kArguments);
  const OptionalTensor params[] = {in_proj_weight, k_proj_weight,   v_proj_weight,
                                   in_proj_bias,   out_proj_weight, out_proj_bias};
  for (int i = kInWeight; i < kArguments; ++i) {
    const OptionalTensor& x = params[i - kInWeight];
    if (needed[i] && x) grads[i] = new_like(*x);
  }
  // Where the gradient of a part of the weights or of the bias goes; null where there is none.
  const auto of_part = [&](Argument own, int64_t i) {
    const OptionalTensor& whole = grads[clip.packed ? kInWeight : own];
    return whole ? clip.part(*whole, i) : nullptr;
  };
  const auto of_bias = [&](int64_t i) {
    return grads[kInBias] ? third_at(grads[kInBias]->const_data_ptr(), i, clip.e, clip.dtype)
                          : nullptr;
  };

  if (needed[kOutWeight]) {
    clip.product(Matrices::of(*grads[kOutWeight]), d_outs.transposed(), clip.joined(heads));
  }
  if (grads[kOutBias]) {
    clip.product(Matrices::contiguous(grads[kOutBias]->const_data_ptr(), 1, clip.e), all, d_outs);
  }
  if (!of_heads) return grads;
  const Tensor d_heads = clip.vectors(clip.d);
  const OptionalTensor share = shares(clip, seed, lse, kept, blank);
  clip.product(clip.joined(d_heads), d_outs, clip.w_o());
  if (const void* to = of_part(kVWeight, 2)) {
    clip.product(clip.weight_by_head(to, clip.ev), clip.by_head(d_heads, clip.d).transposed(),
                 clip.by_head(mixed, clip.ev));
  }
  if (const void* to = of_bias(2)) {
    const Matrices biases{to, clip.heads, 1, clip.d, clip.d, clip.d, 1};
    Matrices weigh = all;
    if (share) weigh = column_by_head(clip, *share).transposed();
    weigh.batches = clip.heads;
    clip.product(biases, weigh, clip.by_head(d_heads, clip.d));
  }
  if (!of_attention) return grads;
  const Tensor d_mixed = clip.vectors(clip.ev);
  clip.product(clip.by_head(d_mixed, clip.ev), clip.by_head(d_heads, clip.d), clip.w_v());
  OptionalTensor d_kept;
  if (seed && clip.in_bias != nullptr) {
    d_kept = new_like(key, {clip.n, clip.heads});
    const Matrices biases{clip.bias(2), clip.heads, clip.d, 1, clip.d, 1, clip.d};
    clip.product(column_by_head(clip, *d_kept), clip.by_head(d_heads, clip.d), biases);
  }
  if (blank) {
    const int64_t size = element_size(clip.dtype);
    const auto clear = [&](const Tensor& x, int64_t row, int64_t width) {
      std::memset(static_cast<char*>(x.mutable_data_ptr()) + row * width * size, 0,
                  static_cast<size_t>(width * size));
    };
    for (int64_t row = 0; row < clip.n * clip.heads; ++row) {
      if (!sees_nothing(lse.const_data_ptr(), row, clip.dtype)) continue;
      clear(d_mixed, row, clip.ev);
      if (d_kept) clear(*d_kept, row, 1);
    }
  }
  const bool of_tiles = needed[kKey] || needed[kValue];
  const auto [d_moved, d_key, d_value, d_sink] =
      run_attend_shared_backward(d_mixed, std::nullopt, d_kept, grad_attn, moved, key, value, mask,
                                 std::nullopt, seed, mixed, lse, kept, dropout_p, of_tiles);
  if (needed[kKey]) grads[kKey] = d_key;
  if (needed[kValue] && value) grads[kValue] = d_value;
  if (const void* to = of_part(kKWeight, 1)) {
    clip.product(clip.weight_by_head(to, clip.ek), clip.by_head(q, clip.d).transposed(),
                 clip.by_head(d_moved, clip.ek), nullptr, clip.scale());
  }
  if (const void* to = of_bias(1)) {
    // in every score of a head alike, so that the softmax takes it away
    std::memset(const_cast<void*>(to), 0, static_cast<size_t>(clip.e * element_size(clip.dtype)));
  }
  if (!of_queries) return grads;
  const Tensor d_q = clip.vectors(clip.d);
  clip.product(clip.by_head(d_q, clip.d), clip.by_head(d_moved, clip.ek), clip.w_k().transposed(),
               nullptr, clip.scale());
  const Matrices d_qs = clip.joined(d_q);
  if (grads[kInWeight]) {
    const void* to = grads[kInWeight]->const_data_ptr();
    clip.product(Matrices::contiguous(to, clip.e, clip.e), d_qs.transposed(),
                 Matrices::of(clip.asking));
  }
  if (const void* to = of_bias(0)) clip.product(Matrices::contiguous(to, 1, clip.e), all, d_qs);
  if (needed[kQuery]) {
    grads[kQuery] = new_like(key, {clip.n, clip.e});
    clip.product(Matrices::of(*grads[kQuery]), d_qs, clip.w_q());
  }
  if (asking_in_clip) {
    const Tensor to = torch::stable::select(*grads[kKey], 1, query_index);
    clip.product(Matrices::of(to), d_qs, clip.w_q(), nullptr, 1.0, true);
  }
  return grads;
}

}  // namespace
}  // namespace continual_mha::cpu

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CPU, m) {
  m.impl("cpu_attend_clip", TORCH_BOX(&continual_mha::cpu::attend_clip));
  m.impl("cpu_attend_clip_backward", TORCH_BOX(&continual_mha::cpu::attend_clip_backward));
}
