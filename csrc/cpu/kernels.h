// The CPU kernels as plain C++: no header of LibTorch, so that the same source is compiled once per
// instruction set and the fastest one is picked when the library runs.
#pragma once

#include <cstdint>

namespace continual_mha::cpu {

enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat64 };
constexpr int kNumDTypes = 4;

// What a ring holds: elements of the tokens' DType, or codes of 8 bits with fp32 scales.
enum class RingDType : int { kAsTokens, kInt8, kE4M3 };
constexpr int kNumRingDTypes = 3;

// Accumulation type: float for all but float64. Pointers marked "acc" point to it, others to DType.

// Tokens, of any strides and times a number, to an array as a projection takes them.
struct GatherParams {
  const void* src;  // (tokens, features), DType or acc
  void* dst;
  int64_t stream_stride;
  int64_t feature_stride;
  int64_t tokens;
  int64_t features;
  double scale;
};

// Rows [row_begin, row_end) of `out = x weight^T + bias`.
struct ProjectParams {
  const void* x;       // (streams, in_features), as the Projection takes them
  const void* weight;  // (rows, in_features), contiguous
  const void* bias;    // (rows,), or null
  void* out;           // (streams, rows), DType or acc
  int64_t x_stride;    // elements from one stream to the next, unless packed
  int64_t out_stride;
  int64_t streams;
  int64_t rows;
  int64_t in_features;
};

// A matrix product, or a batch of them: scale * left right, added to `out` with `add`.
struct ProductParams {
  const void* left;   // (rows, inner) of any strides
  const void* right;  // (inner, columns), its rows contiguous
  void* out;          // (rows, columns), its rows contiguous
  int64_t left_batch;
  int64_t left_row;
  int64_t left_inner;
  int64_t right_batch;
  int64_t right_row;
  int64_t out_batch;
  int64_t out_row;
  int64_t rows;
  int64_t inner;
  int64_t columns;
  double scale;
  bool add;
};

// So many rows and columns of a product are one task.
struct ProductBlock {
  int64_t rows;
  int64_t columns;
};

// Projected tokens and the rings that they belong to.
struct RingParams {
  const void* q;  // (N, E), or (N, T, E), projected, unscaled; k and v alike
  const void* k;
  const void* v;
  int64_t token_stride;  // elements from one token to the next in q, k and v
  void* k_ring;          // (N, H, L, D)
  void* v_ring;
  float* k_scale;  // (N, H, L), or null where the rings hold no codes
  float* v_scale;
  void* q_ring;  // (N, R, E)
  const int64_t* position;
  const void* bias_k;  // (E,), or null
  const void* bias_v;
  int64_t streams;
  int64_t num_heads;
  int64_t head_dim;
  int64_t length;       // L
  int64_t query_slots;  // R
  bool add_zero_attn;
};

// One token of every stream against its ring.
struct RingStepParams : RingParams {
  void* out;  // (N, E), acc or DType where out_is_storage
  bool update;
  bool out_is_storage;
};

// Gradients of one token of every stream against its ring, which holds it, without extra slots.
struct RingGradientParams {
  const void* q;       // (N, E), projected, unscaled
  const void* k_ring;  // (N, H, L, D)
  const void* v_ring;
  const void* grad_heads;   // (N, E)
  const void* grad_k_ring;  // (N, H, L, D), or null
  const void* grad_v_ring;
  const int64_t* position;  // of the token
  void* heads;              // (N, E), the heads' outputs anew
  void* grad_tokens;        // (N, 3E): of projected query, key and value
  void* grad_k_before;      // of the ring without the token, or null
  void* grad_v_before;
  int64_t streams;
  int64_t num_heads;
  int64_t head_dim;
  int64_t length;
};

// Tokens of a clip as their ring keeps them.
struct KeptTokens {
  const void* rows;
  const float* scale;  // null where the rows are no codes
  int64_t stride;      // elements from one token to the next in `rows`
};

// T tokens of every stream, each against the window that ends with it.
struct RingStepsParams : RingParams {
  KeptTokens keys;  // (N, T, E), scales (N, T, H)
  KeptTokens values;
  void* out;  // (N, T - first, E), DType
  int64_t tokens;
  int64_t first;         // the first token whose output is wanted
  int64_t block_tokens;  // tokens of one task
  // For training: a score that has no value, and the logarithm of the softmax's denominator, both
  // (N, T - first, H) acc, or null
  const void* sink;
  void* lse;
  float dropout_p;  // 0 for none
  int64_t seed;
};

// Gradients of several tokens of every stream, each against the window that ends with it. `lse` is
// a result of the forward, and `out` and `block_tokens` are not used.
struct WindowGradientParams : RingStepsParams {
  const void* grad_out;      // (N, T - first, E)
  const void* grad_lse;      // (N, T - first, H) acc, or null
  const void* grad_k_after;  // of the ring that holds the tokens, (N, H, L, D), or null
  const void* grad_v_after;
  void* grad_q;  // (N, T, E), as those of keys and values
  void* grad_k;
  void* grad_v;
  int64_t grad_stride;  // elements from one token to the next in these three
  void* grad_k_ring;    // (N, H, L, D), or null
  void* grad_v_ring;
  void* grad_sink;  // (N, T - first, H) acc, or null
};

// Tokens to codes, in groups of `width` features with a scale each.
struct QuantizeParams {
  const void* x;   // DType
  int64_t stride;  // elements from one token to the next in `x`
  int64_t groups;
  int64_t width;
  void* codes;   // (count, groups, width)
  float* scale;  // (count, groups)
};

// Queries over inputs: what happens before and after the inputs are mixed.
struct MovedParams {
  const void* k_weight;  // (E, Ek), contiguous
  const void* v_weight;  // (E, Ev), contiguous
  const void* k_bias;    // (E,), or null
  const void* v_bias;
  const void* bias_k;  // the same, of add_bias_kv
  const void* bias_v;
  void* q;      // (queries, E) acc, projected
  void* moved;  // (queries, H, Ek) acc: the queries times W_k
  void* mixed;  // (queries, H, Ev) acc: the weighted sums of inputs; may be `moved`
  // (queries, H, 2) acc, or null where the inputs' weights sum to 1: the scores of the bias's slot
  // and of that of zeros, then the weights of the bias's slot and of the inputs
  void* extra;
  void* out;  // (queries, E) acc
  int64_t queries;
  int64_t num_heads;
  int64_t embed_dim;
  int64_t key_dim;    // Ek
  int64_t value_dim;  // Ev
  bool add_zero_attn;
};

// One token of every stream, or several, against its ring of inputs.
struct InputStepParams : MovedParams {
  const void* token;  // (N, E), any strides; or (N, T, E), contiguous
  KeptTokens clip;    // (N, T, E), scales (N, T); null where the one token is in the ring already
  void* x_ring;       // (N, L, E)
  float* x_scale;     // (N, L), or null where the ring holds no codes
  const int64_t* position;
  int64_t token_stride;
  int64_t feature_stride;
  int64_t streams;
  int64_t tokens;       // T, 1 for a single step
  int64_t first;        // the first token whose output is wanted
  int64_t first_query;  // of the (N, T - first) queries, those that are computed now
  int64_t length;
  int64_t delay;
  int64_t group_heads;  // heads of one task
  bool in_its_slot;     // whether the clip's one token is seen where the ring would hold it
};

// A vector of each head of each stream, (N, H, E*), whose features are next to each other.
struct HeadVectors {
  const void* data;
  int64_t stream_stride;
  int64_t head_stride;
};

// Tokens (N, S, E*): either features or slots are next to each other.
struct SharedTiles {
  const void* data;
  int64_t stream_stride;
  int64_t slot_stride;
  int64_t feature_stride;
};

// A query per head against one key and value tile per stream.
struct AttendSharedParams {
  HeadVectors query;
  SharedTiles key;
  SharedTiles value;
  const void* mask;  // acc, or null
  const void* sink;  // (N, H) acc, or null
  void* extra;       // as in MovedParams, or null; then there is no sink
  void* out;         // (N, H, Ev)
  void* lse;         // (N, H) acc, or null
  void* weights;     // (N, H, S + extra_weights) acc, or null
  void* kept;        // what dropout leaves of the weights' sum, (N, H) acc, or null without it
  int64_t seed;
  float dropout_p;
  int64_t mask_stream_stride;
  int64_t mask_head_stride;
  int64_t mask_slot_stride;
  int64_t streams;
  int64_t num_heads;
  int64_t slots;
  int64_t key_dim;
  int64_t value_dim;
  int64_t extra_weights;  // of the slots in `extra` that there are
  bool blank;             // a query to which the mask leaves nothing gets zeros, else NaN
};

// Its gradients. `lse` is a result of the forward, `kept` tells that there was dropout, and `out`
// and `weights` are not used.
struct SharedGradientParams : AttendSharedParams {
  HeadVectors grad_out;
  const void* grad_lse;      // (N, H) acc, or null
  const void* grad_kept;     // (N, H) acc, or null
  const void* grad_average;  // of the weights' average over heads, (N, S) acc, or null
  // (N, S, 2H), room for acc: per slot the scores' gradients, then the weights; or null
  void* pairs;
  void* grad_query;  // (N, H, Ek)
  void* grad_key;    // (N, S, Ek); of key and value together where grad_value is null
  void* grad_value;  // (N, S, Ev)
  void* grad_sink;   // (N, H) acc, or null
};

constexpr int64_t kHeadBlock = 4;    // heads of one task of attend_shared
constexpr int64_t kSlotBlock = 32;   // slots of one task of shared_tile_gradient
constexpr int64_t kRowBlock = 16;    // rows of one task of project
constexpr int64_t kTokenBlock = 16;  // tokens of one task of gather

// A way to project any number of tokens, on which the bits of one do not depend.
struct Projection {
  int64_t least_tokens;  // fewer are projected faster by rows
  bool packed;  // it takes tokens as `gather` lays them out, else as rows, any stride apart
  bool factors_are_acc;  // of acc, else of DType
  int64_t (*gathered_bytes)(int64_t tokens, int64_t features);
  void (*gather)(const GatherParams&, int64_t begin, int64_t end);
  void (*gather_acc)(const GatherParams&, int64_t begin, int64_t end);
  void (*project)(const ProjectParams&, int64_t begin, int64_t end);
  void (*project_to_acc)(const ProjectParams&, int64_t begin, int64_t end);
};

// What one instruction set offers for one DType. Every function works on a range of independent
// tasks and may be called for disjoint ranges from several threads; `scratch` is the thread's own.
struct Kernels {
  Projection projection;
  Projection of_rows;  // never packed: faster for one token, or few rows of the weight; or the same
  ProductBlock (*product_block)(const ProductParams&);
  int64_t (*product_scratch)(const ProductParams&);
  void (*multiply)(const ProductParams&, void* scratch, int64_t begin, int64_t end);
  // By RingDType, here and below: null for codes where DType is kFloat64.
  void (*quantize_tokens[kNumRingDTypes])(const QuantizeParams&, int64_t begin, int64_t end);
  int64_t (*ring_step_scratch[kNumRingDTypes])(const RingStepParams&);  // bytes
  void (*ring_step[kNumRingDTypes])(const RingStepParams&, void* scratch, int64_t begin,
                                    int64_t end);
  int64_t (*ring_gradient_scratch)(const RingGradientParams&);
  void (*ring_gradient)(const RingGradientParams&, void* scratch, int64_t begin, int64_t end);
  void (*put_input[kNumRingDTypes])(const InputStepParams&, void* scratch, int64_t begin,
                                    int64_t end);
  void (*asked_input[kNumRingDTypes])(const InputStepParams&, void* asked, int64_t begin,
                                      int64_t end);
  void (*move_queries)(const MovedParams&, int64_t begin, int64_t end);
  int64_t (*input_step_scratch)(const InputStepParams&);
  void (*mix_inputs[kNumRingDTypes])(const InputStepParams&, void* scratch, int64_t begin,
                                     int64_t end);
  void (*project_mixed)(const MovedParams&, int64_t begin, int64_t end);
  int64_t (*ring_steps_scratch)(const RingStepsParams&);
  void (*ring_steps[kNumRingDTypes])(const RingStepsParams&, void* scratch, int64_t begin,
                                     int64_t end);
  int64_t (*window_gradient_scratch)(const WindowGradientParams&);
  void (*window_gradient)(const WindowGradientParams&, void* scratch, int64_t begin, int64_t end);
  int64_t (*attend_shared_scratch)(const AttendSharedParams&);
  void (*attend_shared)(const AttendSharedParams&, void* scratch, int64_t begin, int64_t end);
  // The same with query and out as acc.
  void (*attend_shared_acc)(const AttendSharedParams&, void* scratch, int64_t begin, int64_t end);
  void (*average_weights)(const AttendSharedParams&, void* average, int64_t begin, int64_t end);
  int64_t (*shared_gradient_scratch)(const SharedGradientParams&);
  // Tasks as of attend_shared: the gradients of query and sink, and `pairs`. After all of them, the
  // other, which takes `pairs`: tasks are (stream, block of kSlotBlock slots).
  void (*shared_query_gradient)(const SharedGradientParams&, void* scratch, int64_t begin,
                                int64_t end);
  void (*shared_tile_gradient)(const SharedGradientParams&, void* scratch, int64_t begin,
                               int64_t end);
};

// One table per instruction set, indexed by DType; null where the compiler cannot target it.
const Kernels* kernels_amx();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_baseline();

// The kernels of the instruction set in use.
const Kernels& kernels(DType dtype);

// Whether the processor multiplies matrices of bfloat16 by itself, and the system lets it.
bool has_matrix_unit();

}  // namespace continual_mha::cpu
