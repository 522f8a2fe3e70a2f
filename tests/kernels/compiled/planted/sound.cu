// Keep decisions of the dropout contract, eight neighbouring columns a thread.
#include "philox.h"

namespace fastattn {

__global__ void adjacent_decisions(uint64_t seed, uint32_t site, uint32_t threshold,
                                   uint32_t sequence, uint32_t calls_per_row, uint2* kept) {
  const uint32_t call = blockIdx.x * blockDim.x + threadIdx.x;
  if (call >= calls_per_row) return;
  uint32_t word[4] = {blockIdx.y, call, sequence, site << 16};
  philox(seed, word[0], word[1], word[2], word[3]);
  uint32_t bytes[2] = {0, 0};
  for (int lane = 0; lane < kLanesPerCall; ++lane) {
    const uint32_t bits = word[lane / 2] >> (16 * (lane % 2)) & kLaneMask;
    bytes[lane / 4] |= static_cast<uint32_t>(bits >= threshold) << (8 * (lane % 4));
  }
  kept[static_cast<uint64_t>(blockIdx.y) * calls_per_row + call] = make_uint2(bytes[0], bytes[1]);
}

}  // namespace fastattn
