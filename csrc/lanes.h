// The lanes that decide a row of tokens, on the CPU: the dropout contract in fastattn/dropout.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "philox.h"
#include "token_map.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "fastattn reads 32-bit words as pairs of 16-bit lanes, low half first: little-endian only"
#endif

namespace fastattn {

FASTATTN_INLINE PhiloxKey token_key(const TokenMap& map, int64_t row, uint32_t site,
                                    uint64_t seed) {
  const int64_t logical = map.row_index ? map.row_index[row] : row;
  const int64_t outer = logical / map.period, inner = logical % map.period;
  const int64_t position = map.batch_first ? inner : outer;
  const int64_t sequence = map.batch_first ? outer : inner;
  return {static_cast<uint32_t>(position), static_cast<uint32_t>(sequence), site << 16, seed};
}

// A call decides eight neighbouring columns. `lanes` takes 8 * calls of them, unmasked.
FASTATTN_INLINE void adjacent_lanes(const PhiloxRun& run, int calls, uint16_t* lanes) {
  for (int call = 0; call < calls; ++call) {
    for (int word = 0; word < 4; ++word) {
      std::memcpy(lanes + 8 * call + 2 * word, run.word[word] + call, 4);
    }
  }
}

}  // namespace fastattn
