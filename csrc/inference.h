// What inference of an encoder layer does between its first two matrix products, in one pass.
#pragma once

#include <cstdint>

namespace fastattn {

// x = max(x + bias, 0), in place; NaN stays NaN. x: contiguous (rows, columns); bias may be null.
void add_bias_relu(float* x, const float* bias, int64_t rows, int64_t columns, int num_threads);

}  // namespace fastattn
