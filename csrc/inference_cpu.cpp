#include "inference.h"

#include <cmath>

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

FASTATTN_CLONES
void layer_norm_rows(const AddLayerNorm& a, int64_t begin, int64_t end) {
  const int64_t n = a.columns;
  for (int64_t row = begin; row < end; ++row) {
    float* x = a.x + row * n;
    const float* residual = a.residual + row * n;
    float sum = 0.0f;
    if (a.x_bias) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) x[i] += a.x_bias[i];
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
      x[i] += residual[i];
      sum += x[i];
    }
    const float mean = sum / static_cast<float>(n);
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const float rstd = 1.0f / std::sqrt(squares / static_cast<float>(n) + a.eps);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - mean) * rstd;
    if (a.weight) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) x[i] *= a.weight[i];
    }
    if (a.bias) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) x[i] += a.bias[i];
    }
  }
}

}  // namespace

void add_bias_relu(float* x, const float* bias, int64_t rows, int64_t columns, int num_threads) {
  in_parallel(rows, rows * columns, num_threads, [&](int64_t begin, int64_t end) {
    relu_rows(x, bias, begin, end, columns);
  });
}

void add_layer_norm(const AddLayerNorm& a) {
  in_parallel(a.rows, a.rows * a.columns, a.num_threads,
              [&](int64_t begin, int64_t end) { layer_norm_rows(a, begin, end); });
}

}  // namespace fastattn
