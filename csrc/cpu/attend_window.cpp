// continual_mha::cpu_attend_window: several projected tokens of every stream, each against the
// window that ends with it, and its gradients. No state is written.
#include "attend_window.h"

#include <algorithm>
#include <tuple>

namespace continual_mha::cpu {
namespace {

struct StepsTag {};
struct GradientTag {};

}  // namespace

void put_windows(RingStepsParams& p, const Tensor& k_ring, const Tensor& v_ring,
                 const Tensor& position, int64_t tokens, int64_t first, const OptionalTensor& seed,
                 double dropout_p, const char* op) {
  p.k_ring = const_cast<void*>(k_ring.const_data_ptr());
  p.v_ring = const_cast<void*>(v_ring.const_data_ptr());
  p.position = static_cast<const int64_t*>(position.const_data_ptr());
  p.streams = k_ring.size(0);
  p.num_heads = k_ring.size(1);
  p.length = k_ring.size(2);
  p.head_dim = k_ring.size(3);
  p.tokens = tokens;
  p.first = first;
  if (!seed) return;
  p.seed = read_seed(*seed, op);
  p.dropout_p = static_cast<float>(dropout_p);
}

void attend_windows(RingStepsParams p, DType dtype, RingDType ring) {
  const int64_t wanted = p.tokens - p.first;
  if (p.streams == 0 || wanted == 0) return;
  // Each task lays out L - 1 rows besides its own: blocks of at least L / 2 keep that in
  // proportion.
  p.block_tokens = std::min(wanted, std::max<int64_t>(64, p.length / 2));
  const Kernels& table = kernels(dtype);
  const int64_t bytes = table.ring_steps_scratch(p);
  const int64_t blocks = (wanted + p.block_tokens - 1) / p.block_tokens;
  parallel(p.streams * p.num_heads * blocks, 2 * p.block_tokens * p.length * p.head_dim,
           [&](int64_t begin, int64_t end) {
             table.ring_steps[static_cast<int>(ring)](p, scratch<StepsTag>(bytes), begin, end);
           });
}

void attend_windows_backward(const WindowGradientParams& p, DType dtype) {
  const Kernels& table = kernels(dtype);
  const int64_t bytes = table.window_gradient_scratch(p);
  parallel(p.streams * p.num_heads, 5 * (p.tokens - p.first + 1) * p.length * p.head_dim,
           [&](int64_t begin, int64_t end) {
             table.window_gradient(p, scratch<GradientTag>(bytes), begin, end);
           });
}

namespace {

constexpr const char* kOp = "cpu_attend_window";

// Tokens (N, T, H, D), each in one piece and all of them evenly apart.
struct EvenTokens {
  Tensor x;
  int64_t stride;  // elements from one token to the next

  explicit EvenTokens(const Tensor& tokens) : x(tokens), stride(step(tokens)) {
    const bool whole =
        (x.size(3) == 1 || x.stride(3) == 1) && (x.size(2) == 1 || x.stride(2) == x.size(3));
    if (whole && (x.size(0) == 1 || x.stride(0) == x.size(1) * stride)) return;
    x = torch::stable::contiguous(x);
    stride = step(x);
  }

  KeptTokens kept() const { return {x.const_data_ptr(), nullptr, stride}; }

 private:
  static int64_t step(const Tensor& x) { return x.size(1) == 1 ? x.stride(0) : x.stride(1); }
};

// The arguments that both operators begin with, as kernels take them.
struct Windows {
  EvenTokens query;
  EvenTokens key;
  EvenTokens value;
  Tensor k_ring;
  Tensor v_ring;
  Tensor position;
  OptionalTensor sink;
  DType dtype;

  Windows(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& k_ring,
          const Tensor& v_ring, const Tensor& position, const OptionalTensor& sink, int64_t first)
      : query(checked(query, k_ring)),
        key(checked(key, k_ring)),
        value(checked(value, k_ring)),
        k_ring(as_contiguous(k_ring)),
        v_ring(as_contiguous(v_ring)),
        position(as_contiguous(position)),
        dtype(dtype_of(query, kOp)) {
    const int64_t n = query.size(0);
    const int64_t tokens = query.size(1);
    STD_TORCH_CHECK(key.size(1) == tokens && value.size(1) == tokens, kOp,
                    ": query, key and value differ in their number of tokens");
    STD_TORCH_CHECK(0 <= first && first <= tokens, kOp, ": first must be in [0, ", tokens, "]");
    check_stored(k_ring, kOp, "the ring of keys");
    check_like(v_ring, k_ring, kOp, "the ring of values");
    check_shape(v_ring, {n, k_ring.size(1), k_ring.size(2), k_ring.size(3)}, kOp,
                "the ring of values");
    STD_TORCH_CHECK(k_ring.size(2) > 0, kOp, ": a ring has no slot");
    check_position(this->position, n, k_ring, kOp);
    if (sink) check_shape(*sink, {n, tokens - first, query.size(2)}, kOp, "sink");
    this->sink = contiguous_acc(sink, acc_type(dtype));
  }

  void put(RingStepsParams& p, const OptionalTensor& seed, int64_t first, double dropout_p) const {
    p.q = query.x.const_data_ptr();
    p.token_stride = query.stride;
    p.keys = key.kept();
    p.values = value.kept();
    p.sink = data_or_null(sink);
    put_windows(p, k_ring, v_ring, position, query.x.size(1), first, seed, dropout_p, kOp);
  }

 private:
  static const Tensor& checked(const Tensor& x, const Tensor& ring) {
    STD_TORCH_CHECK(ring.dim() == 4 && x.dim() == 4, kOp,
                    ": tokens must be (N, T, H, D) and rings (N, H, L, D)");
    check_like(x, ring, kOp, "a token");
    check_shape(x, {ring.size(0), x.size(1), ring.size(1), ring.size(3)}, kOp, "a token");
    return x;
  }
};

std::tuple<Tensor, Tensor> attend_window(Tensor query, Tensor key, Tensor value, Tensor k_ring,
                                         Tensor v_ring, Tensor position, OptionalTensor sink,
                                         OptionalTensor seed, int64_t first, double dropout_p) {
  const Windows given(query, key, value, k_ring, v_ring, position, sink, first);
  RingStepsParams p{};
  given.put(p, seed, first, dropout_p);
  const int64_t wanted = p.tokens - first;
  const Tensor out = new_like(query, {p.streams, wanted, p.num_heads, p.head_dim});
  const Tensor lse = new_like(query, {p.streams, wanted, p.num_heads}, acc_type(given.dtype));
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  attend_windows(p, given.dtype, RingDType::kAsTokens);
  return {out, lse};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients attend_window_backward(Tensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key,
                                 Tensor value, Tensor k_ring, Tensor v_ring, Tensor position,
                                 OptionalTensor sink, OptionalTensor seed, Tensor /* out */,
                                 Tensor lse, int64_t first, double dropout_p, bool rings) {
  const Windows given(query, key, value, k_ring, v_ring, position, sink, first);
  WindowGradientParams p{};
  given.put(p, seed, first, dropout_p);
  const int64_t wanted = p.tokens - first;
  const ScalarType acc = acc_type(given.dtype);
  check_like(grad_out, query, kOp, "grad_out");
  check_shape(grad_out, {p.streams, wanted, p.num_heads, p.head_dim}, kOp, "grad_out");
  check_shape(lse, {p.streams, wanted, p.num_heads}, kOp, "lse");
  if (grad_lse) check_shape(*grad_lse, {p.streams, wanted, p.num_heads}, kOp, "grad_lse");
  const Tensor grads = as_contiguous(grad_out);
  const OptionalTensor known = contiguous_acc(lse, acc);
  grad_lse = contiguous_acc(grad_lse, acc);

  const ScalarType own = query.scalar_type();
  const auto of_ring = [&] {
    return new_if(rings, query, {p.streams, p.num_heads, p.length, p.head_dim}, own);
  };
  const Tensor d_query = new_like(query), d_key = new_like(query), d_value = new_like(query);
  const Tensor d_k_ring = of_ring(), d_v_ring = of_ring();
  const Tensor d_sink = new_if(sink.has_value(), query, {p.streams, wanted, p.num_heads}, acc);
  p.lse = known->mutable_data_ptr();
  p.grad_out = grads.const_data_ptr();
  p.grad_lse = data_or_null(grad_lse);
  p.grad_q = d_query.mutable_data_ptr();
  p.grad_k = d_key.mutable_data_ptr();
  p.grad_v = d_value.mutable_data_ptr();
  p.grad_stride = p.num_heads * p.head_dim;
  p.grad_k_ring = rings ? d_k_ring.mutable_data_ptr() : nullptr;
  p.grad_v_ring = rings ? d_v_ring.mutable_data_ptr() : nullptr;
  p.grad_sink = sink ? d_sink.mutable_data_ptr() : nullptr;
  attend_windows_backward(p, given.dtype);
  return {d_query, d_key, d_value, d_k_ring, d_v_ring, d_sink};
}

}  // namespace
}  // namespace continual_mha::cpu

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CPU, m) {
  m.impl("cpu_attend_window", TORCH_BOX(&continual_mha::cpu::attend_window));
  m.impl("cpu_attend_window_backward", TORCH_BOX(&continual_mha::cpu::attend_window_backward));
}
