// What inference of an encoder layer does between its matrix products, in one pass over fp32 rows.
#pragma once

#include <cstdint>

namespace fastattn {

// x = max(x + bias, 0), in place; NaN stays NaN. x: contiguous (rows, columns); bias may be null.
void add_bias_relu(float* x, const float* bias, int64_t rows, int64_t columns, int num_threads);

struct AddLayerNorm {
  float* x;               // contiguous (rows, columns): the branch, then the result
  const float* residual;  // the same shape
  const float* x_bias;    // (columns,), or null
  const float* weight;    // (columns,), or null
  const float* bias;      // (columns,), or null
  float eps;
  int64_t rows, columns;
  int num_threads;
};

// x = LN(x + x_bias + residual) * weight + bias, with the variance in a second pass over the row.
void add_layer_norm(const AddLayerNorm& arguments);

}  // namespace fastattn
