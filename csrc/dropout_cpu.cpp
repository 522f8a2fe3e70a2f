#include "dropout.h"

#include <algorithm>
#include <cstring>

#include "lanes.h"
#include "parallel.h"

namespace fastattn {
namespace {

// Lanes of a run of calls, unmasked, in the order in which their elements lie in a row.
struct LaneRow {
  alignas(64) uint16_t lane[kLanesPerCall * kCallsPerRun];
};

template <typename Bits>
FASTATTN_INLINE void decide(const uint16_t* lanes, int64_t count, const Factor& factor,
                            int64_t start) {
  Bits* out = static_cast<Bits*>(factor.out) + start;
  const Bits kept = static_cast<Bits>(factor.kept_bits);
  const uint16_t threshold = static_cast<uint16_t>(factor.threshold);
  for (int64_t i = 0; i < count; ++i) {
    out[i] = (lanes[i] & kLaneMask) >= threshold ? kept : Bits{0};
  }
}

// Writes elements start .. start + count - 1 of the factor from as many lanes.
FASTATTN_INLINE void decide(const uint16_t* lanes, int64_t count, const Factor& factor,
                            int64_t start) {
  switch (factor.itemsize) {
    case 1: return decide<uint8_t>(lanes, count, factor, start);
    case 2: return decide<uint16_t>(lanes, count, factor, start);
    case 4: return decide<uint32_t>(lanes, count, factor, start);
    case 8: return decide<uint64_t>(lanes, count, factor, start);
  }
}

// Four neighbouring calls decide the sixteen columns of a block: of row m the first eight from one
// word, the next eight from the next word. Row m + 8 has the other two words.
FASTATTN_INLINE void attention_lanes(const PhiloxRun& run, int first_word, int calls,
                                     LaneRow& row) {
  for (int call = 0; call < calls; call += 4) {
    std::memcpy(row.lane + 4 * call, run.word[first_word] + call, 16);
    std::memcpy(row.lane + 4 * call + 8, run.word[first_word + 1] + call, 16);
  }
}

// Eight neighbouring calls decide a block of 64 columns: call g those with column % 8 == g.
FASTATTN_INLINE void column_strided_lanes(const PhiloxRun& run, int calls, LaneRow& row) {
  for (int call = 0; call < calls; call += 8) {
    for (int word = 0; word < 4; ++word) {
      uint16_t* lanes = row.lane + 8 * call + 16 * word;
      for (int i = 0; i < 8; ++i) {
        lanes[i] = static_cast<uint16_t>(run.word[word][call + i]);
        lanes[8 + i] = static_cast<uint16_t>(run.word[word][call + i] >> 16);
      }
    }
  }
}

// Row groups begin .. end - 1 of batch * heads * groups_per_head. A group is a pair of rows that
// share their calls: m and m + 8.
FASTATTN_CLONES
void attention_groups(const Factor& factor, const AttentionShape& shape, int64_t begin,
                      int64_t end) {
  const int64_t groups_per_head = (shape.seqlen_q + 15) / 16 * 8;
  PhiloxRun run;
  LaneRow lanes;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t sequence_head = index / groups_per_head, group = index % groups_per_head;
    const int64_t sequence = sequence_head / shape.heads;
    const int64_t head = sequence_head % shape.heads + shape.head_offset;
    const int64_t row = group / 8 * 16 + group % 8;
    const PhiloxKey key{static_cast<uint32_t>(group), static_cast<uint32_t>(sequence),
                        (factor.site << 16) + static_cast<uint32_t>(head), factor.seed};
    for (int64_t column = 0; column < shape.seqlen_k; column += 4 * kCallsPerRun) {
      const int64_t count = std::min<int64_t>(shape.seqlen_k - column, 4 * kCallsPerRun);
      const int calls = static_cast<int>((count + 15) / 16 * 4);
      philox_run(key, static_cast<uint32_t>(column / 4), calls, run);
      for (int half = 0; half < 2; ++half) {
        const int64_t m = row + 8 * half;
        if (m >= shape.seqlen_q) break;
        attention_lanes(run, 2 * half, calls, lanes);
        decide(lanes.lane, count, factor,
               (sequence_head * shape.seqlen_q + m) * shape.seqlen_k + column);
      }
    }
  }
}

// Rows begin .. end - 1.
FASTATTN_CLONES
void token_rows(const Factor& factor, const TokenShape& shape, int64_t begin, int64_t end) {
  constexpr int64_t kRunColumns = kLanesPerCall * kCallsPerRun;
  const bool strided = shape.grouping == Grouping::column_strided;
  const int64_t block = strided ? 64 : 8;  // columns that share calls with no others
  const int64_t first_column = shape.column_offset / block * block;
  const int64_t last_column = shape.column_offset + shape.columns;
  PhiloxRun run;
  LaneRow lanes;
  for (int64_t row = begin; row < end; ++row) {
    const PhiloxKey key = token_key(shape.map, row, factor.site, factor.seed);
    for (int64_t column = first_column; column < last_column; column += kRunColumns) {
      const int64_t stop = std::min(last_column, column + kRunColumns);
      const int calls = static_cast<int>((stop - column + block - 1) / block * (block / 8));
      philox_run(key, static_cast<uint32_t>(column / 8), calls, run);
      if (strided) {
        column_strided_lanes(run, calls, lanes);
      } else {
        adjacent_lanes(run, calls, lanes.lane);
      }
      const int64_t start = std::max(column, shape.column_offset);
      decide(lanes.lane + (start - column), stop - start, factor,
             row * shape.columns + start - shape.column_offset);
    }
  }
}

}  // namespace

void attention_factor(const Factor& factor, const AttentionShape& shape) {
  const int64_t heads = shape.batch * shape.heads;
  const int64_t elements = heads * shape.seqlen_q * shape.seqlen_k;
  if (elements == 0) return;
  const int64_t groups = heads * ((shape.seqlen_q + 15) / 16 * 8);
  in_parallel(groups, elements, factor.num_threads, [&](int64_t begin, int64_t end, int) {
    attention_groups(factor, shape, begin, end);
  });
}

void token_factor(const Factor& factor, const TokenShape& shape) {
  const int64_t elements = shape.rows * shape.columns;
  if (elements == 0) return;
  in_parallel(shape.rows, elements, factor.num_threads, [&](int64_t begin, int64_t end, int) {
    token_rows(factor, shape, begin, end);
  });
}

}  // namespace fastattn
