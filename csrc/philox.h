// Philox4x32-7 (Salmon et al., SC 2011), the random numbers of the dropout contract in
// fastattn/dropout.py, laid out so that a compiler turns a run of calls into vector code.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTATTN_INLINE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define FASTATTN_INLINE __forceinline
#else
#define FASTATTN_INLINE inline __attribute__((always_inline))
#endif

namespace fastattn {

constexpr int kPhiloxRounds = 7;
constexpr int kLanesPerCall = 8;
constexpr uint32_t kLaneMask = (1u << 14) - 1;

// Calls made in one go: enough to fill the widest vectors, few enough to stay in the L1 cache.
constexpr int kCallsPerRun = 64;

// One instruction on a GPU, spelled out: a compiler makes two of the plain form.
FASTATTN_INLINE uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t{a} * b;
#endif
}

// The four words of the call with counter (c0, c1, c2, c3), left in their places.
FASTATTN_INLINE void philox(uint64_t seed, uint32_t& c0, uint32_t& c1, uint32_t& c2,
                            uint32_t& c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = wide_product(c0, 0xD2511F53u);
    const uint64_t product2 = wide_product(c2, 0xCD9E8D57u);
    c0 = static_cast<uint32_t>(product2 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product2);
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Words of a run of calls, one array for each of a call's four words.
struct PhiloxRun {
  alignas(64) uint32_t word[4][kCallsPerRun];
};

// The parts of a counter, and the key, that all calls of a run share.
struct PhiloxKey {
  uint32_t counter0, counter2, counter3;
  uint64_t seed;
};

// Calls 0 .. calls - 1, of which call i has counter word 1 = first + i. `calls` is at most
// kCallsPerRun; it is rounded up to a multiple of 16, so that no scalar remainder is left.
FASTATTN_INLINE void philox_run(const PhiloxKey& key, uint32_t first, int calls, PhiloxRun& run) {
  const int padded = (calls + 15) & ~15;
  for (int i = 0; i < padded; ++i) {
    uint32_t c0 = key.counter0, c1 = first + static_cast<uint32_t>(i);
    uint32_t c2 = key.counter2, c3 = key.counter3;
    philox(key.seed, c0, c1, c2, c3);
    run.word[0][i] = c0;
    run.word[1][i] = c1;
    run.word[2][i] = c2;
    run.word[3][i] = c3;
  }
}

}  // namespace fastattn
