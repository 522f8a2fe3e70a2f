// The Python module fastattn._C: raw pointers in, nothing out. It knows no torch, so it survives an
// upgrade of torch and builds where torch is not installed; fastattn/extension/ checks arguments.
#include <pybind11/pybind11.h>

#include <tuple>

#include "dropout.h"
#include "inference.h"
#include "layer_norm.h"

namespace py = pybind11;

namespace {

void attention_factor(uintptr_t out, int itemsize, uint64_t kept_bits, uint64_t seed, uint32_t site,
                      uint32_t threshold, int64_t batch, int64_t heads, int64_t seqlen_q,
                      int64_t seqlen_k, int64_t head_offset, int num_threads) {
  fastattn::attention_factor({reinterpret_cast<void*>(out), itemsize, kept_bits, seed, site,
                              threshold, num_threads},
                             {batch, heads, seqlen_q, seqlen_k, head_offset});
}

void token_factor(uintptr_t out, int itemsize, uint64_t kept_bits, uint64_t seed, uint32_t site,
                  uint32_t threshold, int grouping, int64_t rows, int64_t columns,
                  int64_t column_offset, uintptr_t row_index, int64_t period, bool batch_first,
                  int num_threads) {
  fastattn::token_factor({reinterpret_cast<void*>(out), itemsize, kept_bits, seed, site, threshold,
                          num_threads},
                         {static_cast<fastattn::Grouping>(grouping), rows, columns, column_offset,
                          {reinterpret_cast<const int32_t*>(row_index), period, batch_first}});
}

void add_bias_relu(uintptr_t x, uintptr_t bias, int64_t rows, int64_t columns, int num_threads) {
  fastattn::add_bias_relu(reinterpret_cast<float*>(x), reinterpret_cast<const float*>(bias), rows,
                          columns, num_threads);
}

// The arguments of a norm, as Python passes them: (address, type, row stride), (address, type) and
// (seed, site, threshold, scale, row_index, period, batch_first). An absent tensor has address 0.
using RowsTuple = std::tuple<uintptr_t, int, int64_t>;
using VectorTuple = std::tuple<uintptr_t, int>;
using DropoutTuple = std::tuple<uintptr_t, uint32_t, uint32_t, double, uintptr_t, int64_t, bool>;
using QueueTuple = std::tuple<int, uintptr_t, int>;

template <typename Struct, typename Tuple>
Struct made_from(const Tuple& tuple) {
  return std::apply(
      [](uintptr_t address, int type, auto... stride) {
        return Struct{reinterpret_cast<void*>(address), static_cast<fastattn::Type>(type),
                      stride...};
      },
      tuple);
}

fastattn::Rows rows_of(const RowsTuple& tuple) { return made_from<fastattn::Rows>(tuple); }
fastattn::Vector vector_of(const VectorTuple& tuple) { return made_from<fastattn::Vector>(tuple); }

fastattn::ResidualDropout dropout_of(const DropoutTuple& tuple) {
  const auto& [seed, site, threshold, scale, row_index, period, batch_first] = tuple;
  return {reinterpret_cast<const int64_t*>(seed), site, threshold, scale,
          {reinterpret_cast<const int32_t*>(row_index), period, batch_first}};
}

fastattn::NormForward norm_forward_of(
    const RowsTuple& x, const RowsTuple& residual, const RowsTuple& sum, const RowsTuple& out,
    const RowsTuple& copy, const VectorTuple& x_bias, const VectorTuple& weight,
    const VectorTuple& bias, uintptr_t mean, uintptr_t rstd, double eps,
    const DropoutTuple& dropout, int64_t rows, int64_t columns) {
  return {rows_of(x),         rows_of(residual),   rows_of(sum),
          rows_of(out),       rows_of(copy),       vector_of(x_bias),
          vector_of(weight),  vector_of(bias),     reinterpret_cast<void*>(mean),
          reinterpret_cast<void*>(rstd),           eps,
          dropout_of(dropout), rows,               columns};
}

fastattn::NormBackward norm_backward_of(
    const RowsTuple& grad_out, const RowsTuple& grad_copy, const RowsTuple& grad_sum,
    const RowsTuple& saved, bool from_output, const VectorTuple& weight, const VectorTuple& bias,
    uintptr_t mean, uintptr_t rstd, const RowsTuple& d_sum, const RowsTuple& d_branch,
    const VectorTuple& d_weight, const VectorTuple& d_bias, const VectorTuple& d_x_bias,
    uintptr_t partials, int64_t partial_rows, const DropoutTuple& dropout, int64_t rows,
    int64_t columns) {
  return {rows_of(grad_out),
          rows_of(grad_copy),
          rows_of(grad_sum),
          rows_of(saved),
          from_output,
          vector_of(weight),
          vector_of(bias),
          reinterpret_cast<const void*>(mean),
          reinterpret_cast<const void*>(rstd),
          rows_of(d_sum),
          rows_of(d_branch),
          vector_of(d_weight),
          vector_of(d_bias),
          vector_of(d_x_bias),
          reinterpret_cast<void*>(partials),
          partial_rows,
          dropout_of(dropout),
          rows,
          columns};
}

// Binds run(describe(arguments...), last): the interpreter's lock is released while it runs.
template <typename Description, typename... Parts, typename Last, typename Bound>
auto described(Description (*describe)(Parts...), void (*run)(const Description&, Last),
               Bound last_of) {
  return [=](Parts... parts, typename Bound::Argument last) {
    const Description arguments = describe(parts...);
    const py::gil_scoped_release unlocked;
    run(arguments, last_of(last));
  };
}

struct Threads {
  using Argument = int;
  int operator()(int num_threads) const { return num_threads; }
};

struct Queue {
  using Argument = const QueueTuple&;
  fastattn::CudaQueue operator()(const QueueTuple& tuple) const {
    const auto& [device, stream, multiprocessors] = tuple;
    return {device, reinterpret_cast<void*>(stream), multiprocessors};
  }
};

}  // namespace

#if !defined(FASTATTN_MODULE)
#define FASTATTN_MODULE _C
#endif

PYBIND11_MODULE(FASTATTN_MODULE, m) {
  m.attr("CONTRACT_VERSION") = fastattn::kContractVersion;
  m.def("attention_factor", &attention_factor, py::call_guard<py::gil_scoped_release>());
  m.def("token_factor", &token_factor, py::call_guard<py::gil_scoped_release>());
  m.def("add_bias_relu", &add_bias_relu, py::call_guard<py::gil_scoped_release>());
  m.def("norm_forward", described(norm_forward_of, fastattn::norm_forward, Threads{}));
  m.def("norm_backward", described(norm_backward_of, fastattn::norm_backward, Threads{}));
#if defined(FASTATTN_WITH_CUDA)
  m.attr("CUDA_ARCHITECTURES") = FASTATTN_CUDA_ARCHITECTURES;
  m.def("norm_forward_cuda", described(norm_forward_of, fastattn::norm_forward_cuda, Queue{}));
  m.def("norm_backward_cuda", described(norm_backward_of, fastattn::norm_backward_cuda, Queue{}));
  m.def("cuda_versions", [] {
    const fastattn::CudaVersions versions = fastattn::cuda_versions();
    return py::make_tuple(versions.driver, versions.runtime);
  });
  m.def("norm_partial_rows_cuda", [](int64_t rows, int64_t columns, const QueueTuple& queue) {
    return fastattn::norm_partial_rows_cuda(rows, columns, Queue{}(queue));
  });
#else
  m.attr("CUDA_ARCHITECTURES") = "";
#endif
}
