// y = LN(sum) * weight + bias with sum = residual + dropout(x + x_bias), forward and backward.
//
// One description of a call serves the CPU kernels (layer_norm_cpu.cpp) and the CUDA kernels
// (layer_norm_cuda.cuh). What a call leaves out is null: plain layer norm has no residual and no
// dropout, and a sum without a norm (dropout_add) has no result `out`. Formulas: docs/math.md.
#pragma once

#include <cstdint>

#include "token_map.h"

namespace fastattn {

enum class Type : int { float32 = 0, float16 = 1, bfloat16 = 2, float64 = 3 };

// A (rows, columns) tensor whose columns are adjacent.
struct Rows {
  void* data;      // null: there is none
  Type type;       // counts for `sum` and `d_sum` also where there is none
  int64_t stride;  // elements from one row to the next
};

// A contiguous (columns,) tensor.
struct Vector {
  void* data;  // null: there is none
  Type type;
};

// Dropout by the contract in fastattn/dropout.py: eight adjacent columns share a Philox call.
struct ResidualDropout {
  const int64_t* seed;  // in the memory of the device; null: nothing drops
  uint32_t site;
  uint32_t threshold;  // lanes below it drop; 0 .. 16384
  double scale;         // of what is kept
  TokenMap map;
};

// The sum is rounded to its type before it is normalised, whether it is stored or not.
struct NormForward {
  Rows x, residual;
  Rows sum;   // null: not stored; its type is that of the residual stream all the same
  Rows out;   // null: no norm, only the sum
  Rows copy;  // the result once more, in another type; null: not wanted
  Vector x_bias, weight, bias;
  void* mean;  // (rows,) float, double where the sum is; null: not wanted
  void* rstd;
  double eps;
  ResidualDropout dropout;
  int64_t rows, columns;
};

// With g = grad_out + grad_copy and xhat the normalised sum:
//   d_sum = rstd * (weight g - mean(weight g) - xhat * mean(weight g xhat)) + grad_sum
//   d_branch = dropout(d_sum), d_weight = sum(g xhat), d_bias = sum(g), d_x_bias = sum(d_branch)
// Without grad_out and grad_copy there is no norm: d_sum = grad_sum, and d_weight and d_bias are
// zero. One of the three gradients is there.
struct NormBackward {
  Rows grad_out, grad_copy, grad_sum;
  Rows saved;        // the sum, or the result or its copy: then xhat = (saved - bias) / weight
  bool from_output;  // `saved` is not the sum; `mean` is not read
  Vector weight, bias;
  const void* mean;
  const void* rstd;
  Rows d_sum;     // null: not wanted
  Rows d_branch;  // null: not wanted
  Vector d_weight, d_bias, d_x_bias;
  void* partials;  // (partial_rows, 3, columns) float, double where the sum is; of d_weight, ...
  int64_t partial_rows;
  ResidualDropout dropout;
  int64_t rows, columns;
};

// On the CPU. partial_rows is at least num_threads.
void norm_forward(const NormForward& arguments, int num_threads);
void norm_backward(const NormBackward& arguments, int num_threads);

// On a CUDA device; they return when the work is queued, and throw std::runtime_error where it
// could not be.
struct CudaQueue {
  int device;
  void* stream;         // cudaStream_t
  int multiprocessors;  // of the device
};

// Of CUDA: what the driver supports (0: no driver) and what these kernels were built with, such as
// 13000.
struct CudaVersions {
  int driver, runtime;
};
CudaVersions cuda_versions();

// The partial_rows that backward wants.
int64_t norm_partial_rows_cuda(int64_t rows, int64_t columns, const CudaQueue& queue);
void norm_forward_cuda(const NormForward& arguments, const CudaQueue& queue);
void norm_backward_cuda(const NormBackward& arguments, const CudaQueue& queue);

}  // namespace fastattn
