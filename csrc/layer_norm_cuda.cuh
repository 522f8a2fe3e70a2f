// y = LN(s) * weight + bias with s = residual + dropout(x + x_bias): the kernels, launched by
// layer_norm_cuda.cu. With n columns, means over them, and all arithmetic in float32:
//
//   forward    m = mean(s)    rstd = 1 / sqrt(mean((s - m)^2) + eps)    xhat = (s - m) * rstd
//   backward   w = weight * g    d_sum = rstd * (w - mean(w) - xhat * mean(w * xhat)) + grad_sum
//              d_branch = dropout(d_sum)
//              d_weight = sum of g * xhat, d_bias = sum of g, d_x_bias = sum of d_branch over rows
//
// Who owns what. A block is (threads of a row, rows); thread t of a row owns the groups of eight
// adjacent columns that Slice lists, with accesses of 16 bytes and calls of the dropout contract
// that no other thread makes.
//   forward_rows    a row stays in registers: each of x and residual is read once.
//   backward_rows   blocks stay and take row after row. Weight and the thread's share of the three
//                   column sums stay in registers; a block leaves one row of `partials`.
//   branch_rows     the same without a norm, where d_sum is grad_sum.
//   forward_wide, backward_wide   any width, type and alignment: the block reads its row again for
//                   every pass, and backward keeps its row of `partials` in global memory.
//   column_sums     adds up the rows of `partials`, always in the same order.
#pragma once

#include <type_traits>

#include "cuda_rows.cuh"

namespace fastattn {

// Warps of a block and of a multiprocessor, by the groups that a thread owns: what the registers
// leave room for. A row may take all warps of a block.
struct Room {
  int row_warps;       // the most of a row
  int block_warps;     // of a block with several rows
  int resident_warps;  // of a multiprocessor
};
template <int kVectors>
constexpr Room kBackwardRoom = kVectors == 1   ? Room{8, 8, 24}   // 80 registers a thread
                               : kVectors == 2 ? Room{16, 8, 16}  // 128
                                               : Room{8, 8, 8};   // 255
// Elements of the rows of a block that has several.
template <int kVectors>
constexpr int kBackwardShared = kBackwardRoom<kVectors>.block_warps * kWarp * kVectors * kGroup;

constexpr int kForwardWarps = 8, kBranchWarps = 16, kBranchVectors = 2, kWideWarps = 16;

// What else can occur in a kernel that holds rows of type T in registers.
template <typename T>
struct RowTypes {
  using Vectors = Types<T, float>;
  using Results = Types<T, float>;  // of forward
  using Copy = Types<T>;            // gradient of the copy, where T is the type of grad_out
  using Branch = Types<T>;          // gradient of x, where T is the type of the sum
};

template <>
struct RowTypes<float> {
  using Vectors = Types<float>;
  using Results = AnyType;
  using Copy = Types<__nv_bfloat16, __half>;
  using Branch = AnyType;
};

template <typename X, typename S, int kVectors>
__global__ void __launch_bounds__(kForwardWarps* kWarp)
    forward_rows(const __grid_constant__ NormForward a) {
  using Vectors = typename RowTypes<X>::Vectors;
  using Results = typename RowTypes<X>::Results;
  __shared__ float scratch[2][kMaxRowWarps];
  const uint32_t row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= uint32_t(a.rows)) return;  // a whole warp, in a block without barriers
  const Slice<kVectors> slice(uint32_t(a.columns) / kGroup);

  Eight<X> x[kVectors];
  Eight<S> residual[kVectors];
  load(slice, row_start<const X>(a.x, row), x);
  if (a.residual.data) load(slice, row_start<const S>(a.residual, row), residual);

  Tile<kVectors> sum, weight, bias;
  unpack(x, sum);
  if (a.x_bias.data) {
    load(Vectors{}, slice, a.x_bias, 0.0f, bias);
    for_each(sum, [&](float& element, int v, int i) { element += bias[v][i]; });
  }
  RowDropout(a.dropout, logical_row(a.dropout, row)).apply(slice, sum);
  if (a.residual.data) add(residual, sum);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) round_to<S>(sum[v]);
  if (a.sum.data) store(slice, row_start<S>(a.sum, row), sum);
  if (!a.out.data) return;

  const float per_column = 1.0f / float(a.columns);
  float total = 0.0f, squares = 0.0f;
  for_each(sum, [&](float element, int, int) { total += element; });
  const float mean = row_sum(total, scratch[0]) * per_column;
  for_each(sum, [&](float& element, int v, int) {
    element -= mean;
    if (slice.has(v)) squares += element * element;
  });
  const float variance = row_sum(squares, scratch[1]) * per_column;
  const float rstd = rsqrtf(variance + float(a.eps));
  if (threadIdx.x == 0) {
    if (a.mean) static_cast<float*>(a.mean)[row] = mean;
    if (a.rstd) static_cast<float*>(a.rstd)[row] = rstd;
  }

  load(Vectors{}, slice, a.weight, 1.0f, weight);
  load(Vectors{}, slice, a.bias, 0.0f, bias);
  for_each(sum, [&](float& element, int v, int i) {
    element = element * rstd * weight[v][i] + bias[v][i];
  });
  store(Results{}, slice, a.out, row, sum);
  store(Results{}, slice, a.copy, row, sum);
}

// Adds a gradient of 16 bits whose type is known at run time.
template <typename List, int kVectors>
FASTATTN_DEVICE void add(List types, Type type, const Eight<__half> (&packed)[kVectors],
                         Tile<kVectors>& tile) {
  with_type(types, type, nullptr, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float other[kGroup];
      unpack(bits_as<Eight<T>>(packed[v]), other);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) tile[v][i] += other[i];
    }
  });
}

// The block's row of one column sum, from what each thread adds up for its columns.
template <int kVectors, int kCombined>
FASTATTN_DEVICE void store_partial(const NormBackward& a, int which, const Vector& wanted,
                                   const Slice<kVectors>& slice, const Tile<kVectors>& share,
                                   float (&combined)[kCombined]) {
  if (!wanted.data) return;
  const int columns = int(a.columns);
  float* partial = static_cast<float*>(a.partials) + (int64_t(blockIdx.x) * 3 + which) * columns;
  if (blockDim.y == 1) return store(slice, partial, share);
  store(slice, combined + threadIdx.y * columns, share);
  __syncthreads();
  for (int column = threadIdx.y * blockDim.x + threadIdx.x; column < columns;
       column += blockDim.x * blockDim.y) {
    float sum = 0.0f;
#pragma unroll 1
    for (int row = 0; row < int(blockDim.y); ++row) sum += combined[row * columns + column];
    partial[column] = sum;
  }
  __syncthreads();
}

// G is the type of grad_out; S that of grad_sum and d_sum; V that of saved. grad_copy has 16 bits.
//
// With c = s - m and h = rstd * g, weight * h = rstd * w and c * rstd = xhat, so that
//   d_sum = weight h - mean(weight h) - c * rstd^2 * mean(weight h c) + grad_sum
template <typename G, typename S, typename V, int kVectors>
__global__ void __launch_bounds__(
    kBackwardRoom<kVectors>.row_warps* kWarp,
    kBackwardRoom<kVectors>.resident_warps / kBackwardRoom<kVectors>.row_warps)
    backward_rows(const __grid_constant__ NormBackward a) {
  using Vectors = typename RowTypes<S>::Vectors;
  constexpr bool kEarly = sizeof(G) + sizeof(S) == 4;  // else grad_sum has no registers to wait in
  __shared__ float scratch[2][2][kMaxRowWarps];
  alignas(16) __shared__ float combined[kBackwardShared<kVectors>];
  const bool branch = a.d_branch.data || a.d_x_bias.data;
  const float per_column = 1.0f / float(a.columns);
  const Slice<kVectors> slice(uint32_t(a.columns) / kGroup);
  Tile<kVectors> weight, d_weight, d_bias, d_x_bias;
  load(Vectors{}, slice, a.weight, 1.0f, weight);
  fill(d_weight, 0.0f);
  fill(d_bias, 0.0f);
  fill(d_x_bias, 0.0f);

  const uint32_t rows = uint32_t(a.rows);
  int parity = 0;
  for (uint32_t first = blockIdx.x * blockDim.y; first < rows;
       first += gridDim.x * blockDim.y, parity ^= 1) {
    const uint32_t row = first + threadIdx.y;
    const bool active = row < rows;  // else the thread takes part in barriers only
    const Slice<kVectors> part(active ? slice.groups : 0u);
    // Zeros where nothing is read: what is left unset would stay in registers from row to row.
    Eight<G> grad_out[kVectors] = {};
    Eight<__half> grad_copy[kVectors] = {};
    Eight<V> saved[kVectors] = {};
    Eight<S> grad_sum[kVectors] = {};
    if (a.grad_out.data) load(part, row_start<const G>(a.grad_out, row), grad_out);
    if (a.grad_copy.data) load(part, row_start<const __half>(a.grad_copy, row), grad_copy);
    load(part, row_start<const V>(a.saved, row), saved);
    if (kEarly && a.grad_sum.data) load(part, row_start<const S>(a.grad_sum, row), grad_sum);
    const float rstd = active ? static_cast<const float*>(a.rstd)[row] : 1.0f;
    const bool has_mean = active && !a.from_output;
    const float mean = has_mean ? static_cast<const float*>(a.mean)[row] : 0.0f;

    const uint32_t logical = logical_row(a.dropout, active ? row : 0u);  // read in good time
    Tile<kVectors> gradient, centred;  // g, then weight h, then d_sum; c
    unpack(grad_out, gradient);
    if (a.grad_copy.data) {
      add(typename RowTypes<G>::Copy{}, a.grad_copy.type, grad_copy, gradient);
    }
    unpack(saved, centred);
    if (a.from_output) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (!part.has(v)) continue;
        float bias[kGroup];
        load(Vectors{}, part, v, a.bias, 0.0f, bias);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          centred[v][i] = __fdividef(centred[v][i] - bias[i], weight[v][i] * rstd);
        }
      }
    } else {
      for_each(centred, [&](float& element, int, int) { element -= mean; });
    }
    float sum = 0.0f, projected = 0.0f;
    for_each(gradient, [&](float& element, int v, int i) {
      d_bias[v][i] += element;
      element *= rstd;
      d_weight[v][i] += element * centred[v][i];
      element *= weight[v][i];
      sum += element;
      projected += element * centred[v][i];
    });
    const float2 sums = row_sums(sum, projected, scratch[parity]);
    const float shift = sums.x * per_column, slope = rstd * rstd * (sums.y * per_column);
    if (!active) continue;

    for_each(gradient, [&](float& element, int v, int i) {
      element -= shift + centred[v][i] * slope;
    });
    if (a.grad_sum.data) {
      if (!kEarly) load(part, row_start<const S>(a.grad_sum, row), grad_sum);
      add(grad_sum, gradient);
    }
    if (a.d_sum.data) store(slice, row_start<S>(a.d_sum, row), gradient);
    if (!branch) continue;
    RowDropout(a.dropout, logical).apply(slice, gradient);
    for_each(d_x_bias, [&](float& element, int v, int i) { element += gradient[v][i]; });
    store(typename RowTypes<S>::Branch{}, slice, a.d_branch, row, gradient);
  }

  store_partial(a, 0, a.d_weight, slice, d_weight, combined);
  store_partial(a, 1, a.d_bias, slice, d_bias, combined);
  store_partial(a, 2, a.d_x_bias, slice, d_x_bias, combined);
}

// Backward without a norm: d_sum = grad_sum, of type S.
template <typename S>
__global__ void __launch_bounds__(kBranchWarps* kWarp, 2)
    branch_rows(const __grid_constant__ NormBackward a) {
  alignas(16) __shared__ float combined[kBranchWarps * kWarp * kBranchVectors * kGroup];
  const Slice<kBranchVectors> slice(uint32_t(a.columns) / kGroup);
  const uint32_t rows = uint32_t(a.rows), stride = gridDim.x * blockDim.y;
  Tile<kBranchVectors> gradient, d_x_bias;
  fill(d_x_bias, 0.0f);
  for (uint32_t row = blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += stride) {
    Eight<S> grad_sum[kBranchVectors];
    load(slice, row_start<const S>(a.grad_sum, row), grad_sum);
    unpack(grad_sum, gradient);
    if (a.d_sum.data) store(slice, row_start<S>(a.d_sum, row), gradient);
    RowDropout(a.dropout, logical_row(a.dropout, row)).apply(slice, gradient);
    for_each(d_x_bias, [&](float& element, int v, int i) { element += gradient[v][i]; });
    store(typename RowTypes<S>::Branch{}, slice, a.d_branch, row, gradient);
  }
  store_partial(a, 2, a.d_x_bias, slice, d_x_bias, combined);
}

// The groups of columns that a thread of a block with one row at a time owns.
template <typename Work>
FASTATTN_DEVICE void for_each_span(int64_t columns, bool wide, const Work& work) {
  for (int64_t column = int64_t(threadIdx.x) * kGroup; column < columns;
       column += int64_t(blockDim.x) * kGroup) {
    const int64_t left = columns - column;
    work(Span{column, left < kGroup ? int(left) : kGroup, wide});
  }
}

FASTATTN_DEVICE void load_vector(const Span& span, const Vector& vector, float absent,
                                 float (&values)[kGroup]) {
  fill(values, absent);
  if (vector.data) span.load(vector.type, vector.data, 0, values);
}

// `wide`: whole groups of columns, each on a multiple of 16 bytes.
__global__ void __launch_bounds__(kWideWarps* kWarp)
    forward_wide(const __grid_constant__ NormForward a, bool wide) {
  __shared__ float scratch[2][kMaxRowWarps];
  const int64_t row = blockIdx.x;
  const RowDropout dropout(a.dropout, logical_row(a.dropout, uint32_t(row)));
  const float columns = float(a.columns);
  float mean = 0.0f, rstd = 0.0f, total = 0.0f;
  // Passes: the sum and its total; its squared distances from the mean; the result.
  for (int pass = 0; pass < (a.out.data ? 3 : 1); ++pass) {
    if (pass == 1) mean = row_sum(total, scratch[0]) / columns;
    if (pass == 2) rstd = rsqrtf(row_sum(total, scratch[1]) / columns + float(a.eps));
    total = 0.0f;
    for_each_span(a.columns, wide, [&](const Span& span) {
      float sum[kGroup], other[kGroup], weight[kGroup];
      span.load(a.x, row, sum);
      load_vector(span, a.x_bias, 0.0f, other);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) sum[i] += other[i];
      dropout.apply(span, sum);
      if (a.residual.data) {
        span.load(a.residual, row, other);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) sum[i] += other[i];
      }
      round_to(a.sum.type, sum);
      if (pass == 0) {
        if (a.sum.data) span.store(a.sum, row, sum);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) total += i < span.count ? sum[i] : 0.0f;
        return;
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) sum[i] -= mean;
      if (pass == 1) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) total += i < span.count ? sum[i] * sum[i] : 0.0f;
        return;
      }
      load_vector(span, a.weight, 1.0f, weight);
      load_vector(span, a.bias, 0.0f, other);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) sum[i] = sum[i] * rstd * weight[i] + other[i];
      span.store(a.out, row, sum);
      if (a.copy.data) span.store(a.copy, row, sum);
    });
  }
  if (a.out.data && threadIdx.x == 0) {
    if (a.mean) static_cast<float*>(a.mean)[row] = mean;
    if (a.rstd) static_cast<float*>(a.rstd)[row] = rstd;
  }
}

// A block takes rows blockIdx.x, blockIdx.x + gridDim.x, ...; of its row of `partials` a thread
// owns the columns that it owns of every row.
__global__ void __launch_bounds__(kWideWarps* kWarp)
    backward_wide(const __grid_constant__ NormBackward a, bool wide) {
  __shared__ float scratch[2][2][kMaxRowWarps];
  const bool norm = a.grad_out.data || a.grad_copy.data;
  const bool branch = a.d_branch.data || a.d_x_bias.data;
  const float per_column = 1.0f / float(a.columns);
  const auto add_partial = [&](int which, const Vector& wanted, const Span& span, bool begin,
                               const float(&values)[kGroup]) {
    if (!wanted.data) return;
    float* partial = static_cast<float*>(a.partials) +
                     (int64_t(blockIdx.x) * 3 + which) * a.columns + span.column;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i < span.count) partial[i] = begin ? values[i] : partial[i] + values[i];
    }
  };

  int parity = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x, parity ^= 1) {
    const bool begin = row == blockIdx.x;
    const RowDropout dropout(a.dropout, logical_row(a.dropout, uint32_t(row)));
    const float mean = norm && !a.from_output ? static_cast<const float*>(a.mean)[row] : 0.0f;
    const float rstd = norm ? static_cast<const float*>(a.rstd)[row] : 0.0f;
    float2 means = make_float2(0.0f, 0.0f);
    // Passes: the two means of the row; its gradients.
    for (int pass = norm ? 0 : 1; pass < 2; ++pass) {
      if (pass == 1 && norm) {
        means = row_sums(means.x, means.y, scratch[parity]);
        means.x *= per_column;
        means.y *= per_column;
      }
      for_each_span(a.columns, wide, [&](const Span& span) {
        float grad[kGroup], normal[kGroup], weight[kGroup], other[kGroup];
        fill(grad, 0.0f);
        fill(normal, 0.0f);
        load_vector(span, a.weight, 1.0f, weight);
        if (a.grad_out.data) span.load(a.grad_out, row, grad);
        if (a.grad_copy.data) {
          span.load(a.grad_copy, row, other);
#pragma unroll
          for (int i = 0; i < kGroup; ++i) grad[i] += other[i];
        }
        if (norm) {
          span.load(a.saved, row, normal);
          load_vector(span, a.from_output ? a.bias : Vector{}, 0.0f, other);
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            normal[i] = a.from_output ? __fdividef(normal[i] - other[i], weight[i])
                                      : (normal[i] - mean) * rstd;
          }
        }
        if (pass == 0) {
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            if (i >= span.count) continue;
            const float weighted = __fmul_rn(weight[i], grad[i]);
            means.x += weighted;
            means.y += weighted * normal[i];
          }
          return;
        }
        add_partial(1, a.d_bias, span, begin, grad);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          // A rounded product, as in the mean: in a row of one column they cancel to zero.
          const float weighted = __fmul_rn(weight[i], grad[i]);
          other[i] = rstd * (weighted - means.x - normal[i] * means.y);
          normal[i] *= grad[i];
        }
        add_partial(0, a.d_weight, span, begin, normal);
        if (a.grad_sum.data) {
          span.load(a.grad_sum, row, grad);
#pragma unroll
          for (int i = 0; i < kGroup; ++i) other[i] += grad[i];
        }
        if (a.d_sum.data) span.store(a.d_sum, row, other);
        if (!branch) return;
        dropout.apply(span, other);
        add_partial(2, a.d_x_bias, span, begin, other);
        if (a.d_branch.data) span.store(a.d_branch, row, other);
      });
    }
  }
}

// The three column sums, of which blockIdx.y is one; those before `first` are zero. A thread adds
// rows threadIdx.y, threadIdx.y + blockDim.y, ... of its column, the first warp what they found.
__global__ void __launch_bounds__(kWarp* kWarp)
    column_sums(const __grid_constant__ NormBackward a, int64_t partial_rows, int first) {
  __shared__ float sums[kWarp][kWarp];
  const Vector result = blockIdx.y == 0 ? a.d_weight : blockIdx.y == 1 ? a.d_bias : a.d_x_bias;
  if (!result.data) return;
  if (int(blockIdx.y) < first) partial_rows = 0;
  const int64_t column = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  float sum = 0.0f;
  if (column < a.columns) {
    const float* partials = static_cast<const float*>(a.partials) + blockIdx.y * a.columns + column;
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < partial_rows; row += kWarp) {
      sum += partials[row * 3 * a.columns];
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= a.columns) return;
  sum = 0.0f;
#pragma unroll
  for (int part = 0; part < kWarp; ++part) sum += sums[part][threadIdx.x];
  with_type(AnyType{}, result.type, result.data,
            [&](auto* columns) { store_one(columns + column, sum); });
}

}  // namespace fastattn
