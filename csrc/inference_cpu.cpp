#include "inference.h"

#include "parallel.h"

namespace fastattn {
namespace {

FASTATTN_CLONES
void relu_rows(float* x, const float* bias, int64_t begin, int64_t end, int64_t columns) {
  for (int64_t row = begin; row < end; ++row) {
    float* values = x + row * columns;
    for (int64_t i = 0; i < columns; ++i) {
      const float value = bias ? values[i] + bias[i] : values[i];
      values[i] = value < 0.0f ? 0.0f : value;
    }
  }
}

}  // namespace

void add_bias_relu(float* x, const float* bias, int64_t rows, int64_t columns, int num_threads) {
  in_parallel(rows, rows * columns, num_threads, [&](int64_t begin, int64_t end, int) {
    relu_rows(x, bias, begin, end, columns);
  });
}

}  // namespace fastattn
