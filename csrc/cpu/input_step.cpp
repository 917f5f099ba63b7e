// continual_mha::cpu_input_step_: one token of every stream, with rings of inputs.
#include <cstring>

#include "host.h"

namespace continual_mha::cpu {
namespace {

constexpr const char* kOp = "cpu_input_step_";

struct AskedTag {};
struct QueriesTag {};
struct MovedTag {};
struct ExtraTag {};
struct HeadsTag {};
struct StepTag {};
struct SlotsTag {};

struct Arguments {
  Tensor query;
  Weights weights;
  Tensor x_ring;
  OptionalTensor x_scale;
  Tensor position;
  int64_t num_heads;
  int64_t delay;
  OptionalTensor active;
  bool add_zero_attn;
};

void check(const Arguments& a) {
  STD_TORCH_CHECK(a.x_ring.dim() == 3 && a.x_ring.size(1) > 0 && a.x_ring.size(2) > 0, kOp,
                  ": the ring must be (N, L, E)");
  const int64_t n = a.x_ring.size(0);
  const int64_t e = a.x_ring.size(2);
  STD_TORCH_CHECK(a.num_heads > 0 && e % a.num_heads == 0, kOp, ": ", e, " features do not make ",
                  a.num_heads, " heads");
  STD_TORCH_CHECK(0 <= a.delay && a.delay < a.x_ring.size(1), kOp, ": delay must be in [0, L)");
  check_shape(a.query, {n, e}, kOp, "query");
  check_weights(a.weights, e, e, e, a.query, kOp);
  check_position(a.position, n, a.query, kOp);
  check_active(a.active, n, a.x_ring, kOp);
  STD_TORCH_CHECK(a.x_ring.is_cpu() && a.x_ring.is_contiguous(), kOp,
                  ": the ring must be contiguous on the CPU");
  if (!a.x_scale) {
    check_like(a.x_ring, a.query, kOp, "the ring");
    return;
  }
  check_codes(a.x_ring, kOp);
  check_scale(*a.x_scale, a.x_ring, kOp);
}

// What is in the slots of the next tokens: taken first, and put back by the destructor.
class Slots {
 public:
  Slots(const InputStepParams& p, int64_t row_bytes) : p_(p), row_bytes_(row_bytes) {
    saved_ = static_cast<char*>(scratch<SlotsTag>(p.streams * (row_bytes + 4)));
    for (int64_t n = 0; n < p.streams; ++n) move(n, false);
  }
  ~Slots() {
    for (int64_t n = 0; n < p_.streams; ++n) move(n, true);
  }
  Slots(const Slots&) = delete;
  Slots& operator=(const Slots&) = delete;

 private:
  void move(int64_t n, bool back) const {
    const int64_t slot = n * p_.length + p_.position[n] % p_.length;
    copy(static_cast<char*>(p_.x_ring) + slot * row_bytes_, saved_ + n * (row_bytes_ + 4),
         row_bytes_, back);
    if (p_.x_scale != nullptr) {
      copy(p_.x_scale + slot, saved_ + n * (row_bytes_ + 4) + row_bytes_, 4, back);
    }
  }
  static void copy(void* slot, void* saved, int64_t bytes, bool back) {
    std::memcpy(back ? slot : saved, back ? saved : slot, static_cast<size_t>(bytes));
  }

  const InputStepParams& p_;
  int64_t row_bytes_;
  char* saved_;
};

InputStepParams params_of(const Arguments& a, DType dtype) {
  InputStepParams p{};
  p.token = a.query.const_data_ptr();
  p.token_stride = a.query.stride(0);
  p.feature_stride = a.query.stride(1);
  p.x_ring = a.x_ring.mutable_data_ptr();
  p.x_scale = a.x_scale ? static_cast<float*>(a.x_scale->mutable_data_ptr()) : nullptr;
  p.position = static_cast<const int64_t*>(a.position.const_data_ptr());
  p.streams = a.x_ring.size(0);
  p.num_heads = a.num_heads;
  p.embed_dim = p.key_dim = p.value_dim = a.x_ring.size(2);
  p.length = a.x_ring.size(1);
  p.delay = a.delay;
  p.add_zero_attn = a.add_zero_attn;
  // Enough tasks for some threads; otherwise all heads together, which read the ring once.
  p.group_heads = p.streams < 4 ? kHeadBlock : p.num_heads;
  p.bias_k = data_or_null(a.weights.bias_k);
  p.bias_v = data_or_null(a.weights.bias_v);
  const int64_t acc = p.streams * p.embed_dim * acc_size(dtype);
  p.q = scratch<QueriesTag>(acc);
  p.moved = p.mixed = scratch<MovedTag>(acc * p.num_heads);
  p.out = scratch<HeadsTag>(acc);
  if (p.bias_k != nullptr || p.add_zero_attn) {
    p.extra = scratch<ExtraTag>(p.streams * p.num_heads * 2 * acc_size(dtype));
  }
  return p;
}

// All but the output projection.
void attend(InputStepParams& p, const Arguments& a, DType dtype, int ring) {
  const Kernels& table = kernels(dtype);
  const int64_t e = p.embed_dim;
  const Tensor packed = as_contiguous(a.weights.in_proj_weight);
  const void* bias = data_or_null(a.weights.in_proj_bias);
  p.k_weight = third_at(packed.const_data_ptr(), 1, e * e, dtype);
  p.v_weight = third_at(packed.const_data_ptr(), 2, e * e, dtype);
  p.k_bias = third_at(bias, 1, e, dtype);
  p.v_bias = third_at(bias, 2, e, dtype);
  parallel(p.streams, e, [&](int64_t begin, int64_t end) {
    table.put_input[ring](p, scratch<StepTag>(e * element_size(dtype)), begin, end);
  });
  Tokens asked{};
  if (p.delay == 0) {
    asked = tokens_of(a.query, dtype);
  } else {
    void* rows = scratch<AskedTag>(p.streams * e * acc_size(dtype));
    table.asked_input[ring](p, rows, 0, p.streams);
    asked = {rows, e, p.streams, e};
  }
  project_to_acc(asked, packed.const_data_ptr(), bias, dtype, p.q, e);
  parallel(p.num_heads, p.streams * e * e / p.num_heads,
           [&](int64_t begin, int64_t end) { table.move_queries(p, begin, end); });
  const int64_t groups = (p.num_heads + p.group_heads - 1) / p.group_heads;
  const int64_t bytes = table.input_step_scratch(p);
  parallel(p.streams * groups, 2 * p.length * e * p.group_heads, [&](int64_t begin, int64_t end) {
    table.mix_inputs[ring](p, scratch<StepTag>(bytes), begin, end);
  });
  parallel(p.num_heads, p.streams * e * e / p.num_heads,
           [&](int64_t begin, int64_t end) { table.project_mixed(p, begin, end); });
}

}  // namespace

Tensor input_step(Tensor query, Tensor in_proj_weight, OptionalTensor in_proj_bias,
                  Tensor out_proj_weight, OptionalTensor out_proj_bias, OptionalTensor bias_k,
                  OptionalTensor bias_v, Tensor x_ring, Tensor position, int64_t num_heads,
                  int64_t delay, OptionalTensor active, bool add_zero_attn, double dropout_p,
                  bool update, OptionalTensor x_scale, bool /* batch_invariant: it always is */) {
  STD_TORCH_CHECK(dropout_p == 0.0, kOp, ": dropout is not covered");
  const Arguments a{query,
                    {in_proj_weight, std::nullopt, std::nullopt, in_proj_bias, out_proj_weight,
                     out_proj_bias, bias_k, bias_v},
                    x_ring,
                    x_scale,
                    position,
                    num_heads,
                    delay,
                    active,
                    add_zero_attn};
  check(a);
  const DType dtype = dtype_of(query, kOp);
  const int ring = static_cast<int>(ring_dtype_of(x_ring, x_scale, dtype, kOp));
  Tensor out = new_like(query, {query.size(0), query.size(1)});
  if (query.size(0) == 0) return out;
  InputStepParams p = params_of(a, dtype);
  if (update) {
    attend(p, a, dtype, ring);
    advance_positions(position, active);
  } else {
    const Slots slots(p, p.embed_dim * (x_scale ? 1 : element_size(dtype)));
    attend(p, a, dtype, ring);
  }
  project_out(p.out, a.weights, dtype, out);
  return out;
}

}  // namespace continual_mha::cpu

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CPU, m) {
  m.impl("cpu_input_step_", TORCH_BOX(&continual_mha::cpu::input_step));
}
