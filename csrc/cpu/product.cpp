// continual_mha::cpu_product_: a matrix product, or a batch of them, of which one side has few
// rows.
#include "product.h"

#include <algorithm>

namespace continual_mha::cpu {
namespace {

constexpr const char* kOp = "cpu_product_";

struct FactorsTag {};
struct LeftTag {};

const void* at(const void* data, int64_t elements, DType dtype) {
  return static_cast<const char*>(data) + elements * element_size(dtype);
}

// The right by its rows: weighted sums of them.
void multiply_rows(const ProductParams& p, int64_t batches, DType dtype) {
  const Kernels& table = kernels(dtype);
  const ProductBlock block = table.product_block(p);
  const int64_t blocks =
      (p.rows + block.rows - 1) / block.rows * ((p.columns + block.columns - 1) / block.columns);
  const int64_t work = std::min(p.rows, block.rows) * std::min(p.columns, block.columns);
  const int64_t bytes = table.product_scratch(p);
  parallel(batches * blocks, work * p.inner, [&](int64_t begin, int64_t end) {
    table.multiply(p, scratch<FactorsTag>(bytes), begin, end);
  });
}

// The right by its columns: dot products with them, as projections are.
void multiply_columns(const ProductParams& p, int64_t batches, const void* bias, DType dtype) {
  // what AMX takes of the left is laid out anew for each batch, in float32 in three parts
  const int64_t repays_packing = dtype == DType::kFloat32 ? 128 : 16;
  const Projection& by = p.columns < repays_packing || p.inner == 0 ? kernels(dtype).of_rows
                                                                    : own_projection(dtype, p.rows);
  const bool as_it_lies = p.scale == 1.0 && takes_as_they_lie(by, dtype, false, p.left_inner);
  const int64_t blocks = (p.columns + kRowBlock - 1) / kRowBlock;
  parallel(batches * blocks, kRowBlock * p.rows * p.inner, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t batch = begin / blocks;
      const int64_t stop = std::min(end, (batch + 1) * blocks);
      ProjectParams one{};
      one.x = at(p.left, batch * p.left_batch, dtype);
      one.x_stride = p.left_row;
      if (!as_it_lies) {
        void* copy = scratch<LeftTag>(by.gathered_bytes(p.rows, p.inner));
        by.gather({one.x, copy, p.left_row, p.left_inner, p.rows, p.inner, p.scale}, 0,
                  (p.rows + kTokenBlock - 1) / kTokenBlock);
        one.x = copy;
        one.x_stride = p.inner;
      }
      one.weight = at(p.right, batch * p.right_batch, dtype);
      if (bias != nullptr) one.bias = at(bias, batch * p.columns, dtype);
      one.out = const_cast<void*>(at(p.out, batch * p.out_batch, dtype));
      one.out_stride = p.out_row;
      one.streams = p.rows;
      one.rows = p.columns;
      one.in_features = p.inner;
      by.project(one, begin - batch * blocks, stop - batch * blocks);
      begin = stop;
    }
  });
}

}  // namespace

void multiply(const Product& product, DType dtype) {
  const auto& [out, left, right, bias, scale, add] = product;
  if (out.batches * out.rows * out.columns == 0) return;
  ProductParams p{};
  p.left = left.data;
  p.left_batch = left.batch_stride;
  p.left_row = left.row_stride;
  p.left_inner = left.column_stride;
  p.right = right.data;
  p.right_batch = right.batch_stride;
  p.right_row = right.row_stride;
  p.out = const_cast<void*>(out.data);
  p.out_batch = out.batch_stride;
  p.out_row = out.row_stride;
  p.rows = out.rows;
  p.inner = right.rows;
  p.columns = out.columns;
  p.scale = scale;
  p.add = add;
  if (product.by_columns()) {
    multiply_columns(p, out.batches, bias, dtype);
  } else {
    multiply_rows(p, out.batches, dtype);
  }
}

Matrices ones(int64_t count, DType dtype) {
  static const double f64 = 1.0;
  static const float f32 = 1.0F;
  static const uint16_t bf16 = 0x3f80;
  static const uint16_t f16 = 0x3c00;
  const void* const one[kNumDTypes] = {&f32, &bf16, &f16, &f64};
  return {one[static_cast<int>(dtype)], 1, 1, count, 0, 0, 0};
}

namespace {

// The same for tensors, of which the right may lie as it likes.
void product(Tensor out, Tensor left, Tensor right, OptionalTensor bias, double scale, bool add) {
  const int64_t dim = out.dim();
  STD_TORCH_CHECK((dim == 2 || dim == 3) && left.dim() == dim && right.dim() == dim, kOp,
                  ": all must be matrices, or batches of them");
  check_like(left, out, kOp, "left");
  check_like(right, out, kOp, "right");
  const DType dtype = dtype_of(out, kOp);
  Matrices o = Matrices::of(out);
  const Matrices l = Matrices::of(left);
  Matrices r = Matrices::of(right);
  STD_TORCH_CHECK(l.batches == o.batches && r.batches == o.batches && l.rows == o.rows &&
                      r.columns == o.columns && l.columns == r.rows,
                  kOp, ": ", shape_of(left), " times ", shape_of(right), " is not ", shape_of(out));
  STD_TORCH_CHECK(o.has_contiguous_rows(), kOp, ": out must have contiguous rows");
  if (bias) check_vector(bias, o.batches * o.columns, out, kOp, "bias");
  STD_TORCH_CHECK(!bias || !add, kOp, ": a bias is not added to what is there");
  if (out.numel() == 0) return;
  o.data = out.mutable_data_ptr();
  const Product given{o, l, r, data_or_null(bias), scale, add};
  if (given.by_columns() && !r.has_contiguous_columns()) {
    const Tensor turned = torch::stable::transpose(right, dim - 2, dim - 1);
    right = torch::stable::contiguous(turned);
    r = Matrices::of(right).transposed();
  } else if (!given.by_columns() && r.column_stride != 1) {
    right = torch::stable::contiguous(right);
    r = Matrices::of(right);
  }
  multiply(given, dtype);
}

}  // namespace
}  // namespace continual_mha::cpu

STABLE_TORCH_LIBRARY_IMPL(continual_mha, CPU, m) {
  m.impl("cpu_product_", TORCH_BOX(&continual_mha::cpu::product));
}
