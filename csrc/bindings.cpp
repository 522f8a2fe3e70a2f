// The Python module fastattn._C: raw pointers in, nothing out. It knows no torch, so it survives an
// upgrade of torch and builds where torch is not installed; fastattn/extension.py checks arguments.
#include <pybind11/pybind11.h>

#include "dropout.h"
#include "inference.h"

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
                          reinterpret_cast<const int32_t*>(row_index), period, batch_first});
}

void add_bias_relu(uintptr_t x, uintptr_t bias, int64_t rows, int64_t columns, int num_threads) {
  fastattn::add_bias_relu(reinterpret_cast<float*>(x), reinterpret_cast<const float*>(bias), rows,
                          columns, num_threads);
}

void add_layer_norm(uintptr_t x, uintptr_t residual, uintptr_t x_bias, uintptr_t weight,
                    uintptr_t bias, float eps, int64_t rows, int64_t columns, int num_threads) {
  fastattn::add_layer_norm({reinterpret_cast<float*>(x), reinterpret_cast<const float*>(residual),
                            reinterpret_cast<const float*>(x_bias),
                            reinterpret_cast<const float*>(weight),
                            reinterpret_cast<const float*>(bias), eps, rows, columns, num_threads});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("CONTRACT_VERSION") = fastattn::kContractVersion;
  m.def("attention_factor", &attention_factor, py::call_guard<py::gil_scoped_release>());
  m.def("token_factor", &token_factor, py::call_guard<py::gil_scoped_release>());
  m.def("add_bias_relu", &add_bias_relu, py::call_guard<py::gil_scoped_release>());
  m.def("add_layer_norm", &add_layer_norm, py::call_guard<py::gil_scoped_release>());
}
