// Matrix products, or batches of them, of which one side has few rows.
#pragma once

#include "host.h"

namespace continual_mha::cpu {

// A matrix or a batch of them, of any strides.
struct Matrices {
  const void* data;
  int64_t batches;
  int64_t rows;
  int64_t columns;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t column_stride;

  // (rows, columns).
  static Matrices contiguous(const void* data, int64_t rows, int64_t columns) {
    return {data, 1, rows, columns, 0, columns, 1};
  }

  static Matrices of(const Tensor& x) {
    const int64_t first = x.dim() - 2;  // the axis of rows
    const bool batched = first == 1;
    return {x.const_data_ptr(), batched ? x.size(0) : 1,   x.size(first),
            x.size(first + 1),  batched ? x.stride(0) : 0, x.stride(first),
            x.stride(first + 1)};
  }

  Matrices transposed() const {
    return {data, batches, columns, rows, batch_stride, column_stride, row_stride};
  }

  bool has_contiguous_rows() const { return column_stride == 1 || columns == 1; }

  // As rows of a contiguous transpose.
  bool has_contiguous_columns() const { return row_stride == 1 && column_stride == rows; }
};

// out = scale * left right + bias, or with `add` out + scale * left right. The sizes agree, and so
// many rows of `out` are contiguous; those of the right are, or its columns unless there is
// something to be added to.
struct Product {
  const Matrices& out;
  const Matrices& left;
  const Matrices& right;
  const void* bias = nullptr;  // one row of each matrix, together
  double scale = 1.0;
  bool add = false;

  // Whether the right is to have contiguous columns.
  bool by_columns() const { return bias != nullptr || (right.has_contiguous_columns() && !add); }
};

void multiply(const Product& product, DType dtype);

// A row of ones, a product with which sums up rows.
Matrices ones(int64_t count, DType dtype);

}  // namespace continual_mha::cpu
