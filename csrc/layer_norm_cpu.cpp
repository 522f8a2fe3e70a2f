// Rows are converted to Acc, float or double, into a thread's workspace, and stay in its L1 cache
// from then on. Each loop over columns does one thing, which a compiler turns into vector code:
// that counts for more than the passes over the cache that longer loops would save.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "convert.h"
#include "lanes.h"
#include "layer_norm.h"
#include "parallel.h"

namespace fastattn {
namespace {

// Columns added up in Acc, before their sum goes on in double: bounds the error of wide rows.
constexpr int64_t kChunk = 1024;

// Rows whose column sums are added up apart, for the same reason.
constexpr int64_t kRowBlock = 32;

// Rows or elements of one thread's workspace begin at multiples of a cache line.
constexpr int64_t kLine = 64;

int64_t padded(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// ------------------------------------------------------------------------------ rows in and out

template <typename Acc, typename T>
FASTATTN_INLINE const Acc* widen_row(const T* row, int64_t columns, Acc* scratch) {
  for (int64_t i = 0; i < columns; ++i) scratch[i] = widen(row[i]);
  return scratch;
}

template <typename Acc>
FASTATTN_INLINE const Acc* widen_row(const Acc* row, int64_t, Acc*) {
  return row;
}

// The elements at `data` as Acc: where they are if they have that type, else in `scratch`.
template <typename Acc>
FASTATTN_INLINE const Acc* read(const void* data, Type type, int64_t start, int64_t columns,
                                Acc* scratch) {
  switch (type) {
    case Type::float32: return widen_row(static_cast<const float*>(data) + start, columns, scratch);
    case Type::float16: return widen_row(static_cast<const Half*>(data) + start, columns, scratch);
    case Type::bfloat16:
      return widen_row(static_cast<const BFloat16*>(data) + start, columns, scratch);
    case Type::float64: {
      const double* row = static_cast<const double*>(data) + start;
      if constexpr (sizeof(Acc) == 8) {
        return row;
      } else {
        for (int64_t i = 0; i < columns; ++i) scratch[i] = static_cast<Acc>(row[i]);
        return scratch;
      }
    }
  }
  return scratch;
}

template <typename Acc>
FASTATTN_INLINE const Acc* read(const Rows& rows, int64_t row, int64_t columns, Acc* scratch) {
  return rows.data ? read(rows.data, rows.type, row * rows.stride, columns, scratch) : nullptr;
}

template <typename Acc>
FASTATTN_INLINE const Acc* read(const Vector& vector, int64_t columns, Acc* scratch) {
  return vector.data ? read(vector.data, vector.type, 0, columns, scratch) : nullptr;
}

// Loops over the columns of a row. `out` may be one of the inputs.

template <typename Acc>
FASTATTN_INLINE void add(const Acc* a, const Acc* b, int64_t columns, Acc* out) {
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) out[i] = a[i] + b[i];
}

template <typename Acc>
FASTATTN_INLINE void multiply(const Acc* a, const Acc* b, int64_t columns, Acc* out) {
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) out[i] = a[i] * b[i];
}

// Dropped elements are multiplied by zero: NaN stays NaN.
template <typename Acc>
FASTATTN_INLINE void drop(const Acc* values, const uint16_t* lanes, uint16_t threshold, Acc scale,
                          int64_t columns, Acc* out) {
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) {
    out[i] = values[i] * ((lanes[i] & kLaneMask) >= threshold ? scale : Acc{0});
  }
}

template <typename Acc>
constexpr Type type_of() {
  return sizeof(Acc) == 8 ? Type::float64 : Type::float32;
}

// Where to compute a row that `write` is then to store: in its place where it has type Acc.
template <typename Acc>
FASTATTN_INLINE Acc* place(const Rows& rows, int64_t row, Acc* scratch) {
  const bool direct = rows.data && rows.type == type_of<Acc>();
  return direct ? static_cast<Acc*>(rows.data) + row * rows.stride : scratch;
}

template <typename Acc, typename T>
FASTATTN_INLINE void narrow_row(const Acc* values, int64_t columns, T* out) {
  for (int64_t i = 0; i < columns; ++i) narrow(values[i], out[i]);
}

template <typename Acc>
FASTATTN_INLINE void write(const Acc* values, int64_t columns, void* data, Type type,
                           int64_t start) {
  switch (type) {
    case Type::float32: return narrow_row(values, columns, static_cast<float*>(data) + start);
    case Type::float16: return narrow_row(values, columns, static_cast<Half*>(data) + start);
    case Type::bfloat16: return narrow_row(values, columns, static_cast<BFloat16*>(data) + start);
    case Type::float64: return narrow_row(values, columns, static_cast<double*>(data) + start);
  }
}

template <typename Acc>
FASTATTN_INLINE void write(const Acc* values, const Rows& rows, int64_t row, int64_t columns) {
  const void* stored = rows.data;
  if (!stored || place<Acc>(rows, row, nullptr) == values) return;
  write(values, columns, rows.data, rows.type, row * rows.stride);
}

template <typename T, typename Acc>
FASTATTN_INLINE void round_as(Acc* values, int64_t columns) {
  for (int64_t i = 0; i < columns; ++i) {
    T rounded;
    narrow(values[i], rounded);
    values[i] = widen(rounded);
  }
}

// Rounds to `type` and back.
template <typename Acc>
FASTATTN_INLINE void round_row(Acc* values, int64_t columns, Type type) {
  if (type == Type::bfloat16) round_as<BFloat16>(values, columns);
  if (type == Type::float16) round_as<Half>(values, columns);
}

// ------------------------------------------------------------------------------------ decisions

// The lanes of a row's columns, masked; null where nothing drops. `lanes` has room for a multiple
// of kLanesPerCall * kCallsPerRun.
FASTATTN_INLINE const uint16_t* decide(const ResidualDropout& dropout, int64_t row,
                                       int64_t columns, uint16_t* lanes) {
  if (!dropout.seed) return nullptr;
  constexpr int64_t kRunColumns = kLanesPerCall * kCallsPerRun;
  const PhiloxKey key =
      token_key(dropout.map, row, dropout.site, static_cast<uint64_t>(*dropout.seed));
  PhiloxRun run;
  for (int64_t column = 0; column < columns; column += kRunColumns) {
    const int64_t count = std::min(kRunColumns, columns - column);
    const int calls = static_cast<int>((count + kLanesPerCall - 1) / kLanesPerCall);
    philox_run(key, static_cast<uint32_t>(column / kLanesPerCall), calls, run);
    adjacent_lanes(run, calls, lanes + column);
  }
  return lanes;
}

// Every thread's memory: rows of Acc, and lanes. What is never touched costs nothing.
template <typename Acc>
class Workspace {
 public:
  Workspace(int rows, int64_t columns, int threads)
      : row_bytes_(padded(columns * sizeof(Acc))), rows_bytes_(rows * row_bytes_) {
    constexpr int64_t kRunColumns = kLanesPerCall * kCallsPerRun;
    const int64_t runs = (columns + kRunColumns - 1) / kRunColumns;
    thread_bytes_ = rows_bytes_ + padded(runs * kRunColumns * sizeof(uint16_t));
    memory_.reset(new char[threads * thread_bytes_ + kLine]);
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    start_ = memory_.get() + (kLine - address % kLine) % kLine;
  }

  Acc* row(int thread, int index) const {
    return reinterpret_cast<Acc*>(start_ + thread * thread_bytes_ + index * row_bytes_);
  }
  uint16_t* lanes(int thread) const {
    return reinterpret_cast<uint16_t*>(start_ + thread * thread_bytes_ + rows_bytes_);
  }

 private:
  int64_t row_bytes_, rows_bytes_, thread_bytes_;
  std::unique_ptr<char[]> memory_;
  char* start_;
};

// -------------------------------------------------------------------------------------- forward

template <typename Acc>
struct Moments {
  Acc mean, rstd;
};

// Mean, then the mean of squared differences from it. Their own mean, zero but for rounding, puts
// the first one right where rows are far from zero.
template <typename Acc>
FASTATTN_INLINE Moments<Acc> moments(const Acc* values, int64_t columns, double eps) {
  double total = 0.0, rest = 0.0, squares = 0.0;
  for (int64_t chunk = 0; chunk < columns; chunk += kChunk) {
    const int64_t end = std::min(columns, chunk + kChunk);
    Acc part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = chunk; i < end; ++i) part += values[i];
    total += part;
  }
  const Acc mean = static_cast<Acc>(total / columns);
  for (int64_t chunk = 0; chunk < columns; chunk += kChunk) {
    const int64_t end = std::min(columns, chunk + kChunk);
    Acc part = 0, part_squares = 0;
#pragma omp simd reduction(+ : part, part_squares)
    for (int64_t i = chunk; i < end; ++i) {
      const Acc difference = values[i] - mean;
      part += difference;
      part_squares += difference * difference;
    }
    rest += part;
    squares += part_squares;
  }
  rest /= columns;
  const double variance = squares / columns - rest * rest;
  return {static_cast<Acc>(mean + rest), static_cast<Acc>(1.0 / std::sqrt(variance + eps))};
}

template <typename Acc>
FASTATTN_INLINE void forward_rows(const NormForward& a, const Workspace<Acc>& workspace,
                                  int64_t begin, int64_t end, int thread) {
  const int64_t n = a.columns;
  auto scratch = [&](int index) { return workspace.row(thread, index); };
  const Acc* x_bias = read(a.x_bias, n, scratch(0));
  const Acc* weight = read(a.weight, n, scratch(1));
  const Acc* bias = read(a.bias, n, scratch(2));
  const uint16_t threshold = static_cast<uint16_t>(a.dropout.threshold);
  const Acc scale = static_cast<Acc>(a.dropout.scale);
  const bool is_norm_only = !a.residual.data && !a.dropout.seed && !x_bias && !a.sum.data &&
                            a.x.type == a.sum.type;
  for (int64_t row = begin; row < end; ++row) {
    const Acc* x = read(a.x, row, n, scratch(3));
    const Acc* sum = x;
    if (!is_norm_only) {
      const Acc* residual = read(a.residual, row, n, scratch(4));
      const uint16_t* lanes = decide(a.dropout, row, n, workspace.lanes(thread));
      Acc* total = place(a.sum, row, scratch(5));
      if (x_bias) {
        add(x, x_bias, n, total);
      } else {
        std::copy_n(x, n, total);
      }
      if (lanes) drop(total, lanes, threshold, scale, n, total);
      if (residual) add(total, residual, n, total);
      round_row(total, n, a.sum.type);
      write(total, a.sum, row, n);
      sum = total;
    }
    if (!a.out.data) continue;
    const Moments<Acc> of_row = moments(sum, n, a.eps);
    const Acc mean = of_row.mean, rstd = of_row.rstd;
    if (a.mean) static_cast<Acc*>(a.mean)[row] = mean;
    if (a.rstd) static_cast<Acc*>(a.rstd)[row] = rstd;
    Acc* out = place(a.out, row, scratch(6));
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = (sum[i] - mean) * rstd;
    if (weight) multiply(out, weight, n, out);
    if (bias) add(out, bias, n, out);
    write(out, a.out, row, n);
    write(out, a.copy, row, n);
  }
}

// ------------------------------------------------------------------------------------- backward

template <typename Acc>
FASTATTN_INLINE void backward_rows(const NormBackward& a, const Workspace<Acc>& workspace,
                                   int64_t begin, int64_t end, int thread) {
  const int64_t n = a.columns;
  auto scratch = [&](int index) { return workspace.row(thread, index); };
  const bool has_norm = a.grad_out.data || a.grad_copy.data;
  const Acc* weight = read(a.weight, n, scratch(0));
  const Acc* bias = read(a.bias, n, scratch(1));
  Acc* partials = static_cast<Acc*>(a.partials) + 3 * thread * n;
  Acc *d_weight = a.d_weight.data ? scratch(9) : nullptr,
      *d_bias = a.d_bias.data ? scratch(10) : nullptr,
      *d_x_bias = a.d_x_bias.data ? scratch(11) : nullptr;
  std::fill_n(partials, 3 * n, Acc{0});
  const uint16_t threshold = static_cast<uint16_t>(a.dropout.threshold);
  const Acc scale = static_cast<Acc>(a.dropout.scale);
  const bool wants_branch = a.d_branch.data || d_x_bias;
  for (int64_t row = begin; row < end; ++row) {
    if ((row - begin) % kRowBlock == 0) {
      for (Acc* block : {d_weight, d_bias, d_x_bias}) {
        if (block) std::fill_n(block, n, Acc{0});
      }
    }
    const Acc* grad_sum = read(a.grad_sum, row, n, scratch(2));
    const Acc* d_sum = grad_sum;
    if (has_norm) {
      const Acc* grad = read(a.grad_out, row, n, scratch(3));
      const Acc* more = read(a.grad_copy, row, n, scratch(4));
      if (grad && more) {
        add(grad, more, n, scratch(4));
        grad = scratch(4);
      } else if (more) {
        grad = more;
      }
      const Acc* saved = read(a.saved, row, n, scratch(5));
      const Acc rstd = static_cast<const Acc*>(a.rstd)[row];
      Acc* normed = scratch(6);  // xhat
      if (a.from_output) {
        std::copy_n(saved, n, normed);
        if (bias) {
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) normed[i] -= bias[i];
        }
        if (weight) {
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) normed[i] /= weight[i];
        }
      } else {
        const Acc mean = static_cast<const Acc*>(a.mean)[row];
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) normed[i] = (saved[i] - mean) * rstd;
      }
      // Rounded products: in a row of one column they cancel to zero.
      const Acc* weighted = grad;
      if (weight) {
        multiply(weight, grad, n, scratch(8));
        weighted = scratch(8);
      }
      double along = 0.0, across = 0.0;  // sums of weight g xhat, of weight g
      for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
        const int64_t stop = std::min(n, chunk + kChunk);
        Acc part_along = 0, part_across = 0;
#pragma omp simd reduction(+ : part_along, part_across)
        for (int64_t i = chunk; i < stop; ++i) {
          part_along += weighted[i] * normed[i];
          part_across += weighted[i];
        }
        along += part_along;
        across += part_across;
      }
      const Acc mean_along = static_cast<Acc>(along / n), mean_g = static_cast<Acc>(across / n);
      if (d_weight) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) d_weight[i] += grad[i] * normed[i];
      }
      if (d_bias) add(d_bias, grad, n, d_bias);
      Acc* target = place(a.d_sum, row, scratch(7));
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        target[i] = rstd * (weighted[i] - mean_g - normed[i] * mean_along);
      }
      if (grad_sum) add(target, grad_sum, n, target);
      d_sum = target;
    }
    write(d_sum, a.d_sum, row, n);
    if (wants_branch) {
      const uint16_t* lanes = decide(a.dropout, row, n, workspace.lanes(thread));
      const Acc* d_branch = d_sum;
      if (lanes) {
        Acc* target = place(a.d_branch, row, scratch(6));
        drop(d_sum, lanes, threshold, scale, n, target);
        d_branch = target;
      }
      write(d_branch, a.d_branch, row, n);
      if (d_x_bias) add(d_x_bias, d_branch, n, d_x_bias);
    }
    if ((row - begin) % kRowBlock == kRowBlock - 1 || row == end - 1) {
      const Acc* blocks[] = {d_weight, d_bias, d_x_bias};
      for (int which = 0; which < 3; ++which) {
        if (!blocks[which]) continue;
        Acc* part = partials + which * n;
        add(part, blocks[which], n, part);
      }
    }
  }
}

// One compilation for every vector width of each function below.

FASTATTN_CLONES
void forward_rows_in_float(const NormForward& a, const Workspace<float>& workspace, int64_t begin,
                           int64_t end, int thread) {
  forward_rows(a, workspace, begin, end, thread);
}

FASTATTN_CLONES
void forward_rows_in_double(const NormForward& a, const Workspace<double>& workspace, int64_t begin,
                            int64_t end, int thread) {
  forward_rows(a, workspace, begin, end, thread);
}

FASTATTN_CLONES
void backward_rows_in_float(const NormBackward& a, const Workspace<float>& workspace, int64_t begin,
                            int64_t end, int thread) {
  backward_rows(a, workspace, begin, end, thread);
}

FASTATTN_CLONES
void backward_rows_in_double(const NormBackward& a, const Workspace<double>& workspace,
                             int64_t begin, int64_t end, int thread) {
  backward_rows(a, workspace, begin, end, thread);
}

template <typename Acc, typename Arguments, typename Run>
int run_rows(const Arguments& a, int workspace_rows, int num_threads, const Run& run) {
  const Workspace<Acc> workspace(workspace_rows, a.columns, num_threads);
  return in_parallel(a.rows, a.rows * a.columns, num_threads,
                     [&](int64_t begin, int64_t end, int thread) {
                       run(a, workspace, begin, end, thread);
                     });
}

// The sums of the shares' partial rows, in their order.
template <typename Acc>
void add_partials(const NormBackward& a, int shares) {
  const Acc* partials = static_cast<const Acc*>(a.partials);
  const Vector targets[] = {a.d_weight, a.d_bias, a.d_x_bias};
  std::vector<Acc> total(a.columns);
  for (int which = 0; which < 3; ++which) {
    if (!targets[which].data) continue;
    std::fill(total.begin(), total.end(), Acc{0});
    for (int share = 0; share < shares; ++share) {
      const Acc* part = partials + (3 * share + which) * a.columns;
      for (int64_t i = 0; i < a.columns; ++i) total[i] += part[i];
    }
    write(total.data(), a.columns, targets[which].data, targets[which].type, 0);
  }
}

}  // namespace

void norm_forward(const NormForward& a, int num_threads) {
  if (a.sum.type == Type::float64) {
    run_rows<double>(a, 7, num_threads, forward_rows_in_double);
  } else {
    run_rows<float>(a, 7, num_threads, forward_rows_in_float);
  }
}

void norm_backward(const NormBackward& a, int num_threads) {
  if (a.d_sum.type == Type::float64) {
    add_partials<double>(a, run_rows<double>(a, 12, num_threads, backward_rows_in_double));
  } else {
    add_partials<float>(a, run_rows<float>(a, 12, num_threads, backward_rows_in_float));
  }
}

}  // namespace fastattn
