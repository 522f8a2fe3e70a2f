// Where the rows of a token tensor lie in their batch: TokenRows in fastattn/dropout.py.
#pragma once

#include <cstdint>

namespace fastattn {

struct TokenMap {
  const int32_t* row_index;  // logical row of each row, or null: a row is its own logical row
  int64_t period;            // what splits a logical row into position and sequence; at least 1
  bool batch_first;          // position is the remainder, not the quotient
};

}  // namespace fastattn
