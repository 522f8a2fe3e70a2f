// Dropout factors of the contract in fastattn/dropout.py, written on the CPU.
//
// A factor is a tensor that holds the bit pattern `kept_bits` where an element is kept and zero
// bits where it drops, so one kernel per element size serves masks and multipliers of every dtype.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace fastattn {

// As dropout.CONTRACT_VERSION: an extension left over from another version is not used.
constexpr int kContractVersion = 0;

struct Factor {
  void* out;           // contiguous
  int itemsize;        // bytes of an element: 1, 2, 4 or 8
  uint64_t kept_bits;  // the low `itemsize` bytes are written where kept
  uint64_t seed;
  uint32_t site;
  uint32_t threshold;  // lanes below it drop; 0 .. 16384
  int num_threads;
};

struct AttentionShape {
  int64_t batch, heads, seqlen_q, seqlen_k;
  int64_t head_offset;  // global number of the first head
};

// Which eight elements of a token tensor share a Philox call.
enum class Grouping { column_strided = 0, adjacent = 1 };

struct TokenShape {
  Grouping grouping;
  int64_t rows, columns;
  int64_t column_offset;     // global number of the first column
  TokenMap map;
};

// out: (batch, heads, seqlen_q, seqlen_k)
void attention_factor(const Factor& factor, const AttentionShape& shape);

// out: (rows, columns)
void token_factor(const Factor& factor, const TokenShape& shape);

}  // namespace fastattn
