// Threads and vector widths for the CPU kernels.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

// Compile the marked functions once for every vector width; the loader picks one for the machine.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__gnu_linux__)
#define FASTATTN_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTATTN_CLONES
#endif

namespace fastattn {

// Below this many elements waking other threads costs more than they save.
constexpr int64_t kSingleThreadElements = 1 << 15;

// Calls work(begin, end, share) on one even share of 0 .. count - 1 per thread, and returns how
// many shares there were: at most num_threads. A team is either whole or one thread: resizing it
// would cost the caller's next parallel region its threads.
template <typename Work>
int in_parallel(int64_t count, [[maybe_unused]] int64_t elements,
                [[maybe_unused]] int num_threads, const Work& work) {
#if defined(_OPENMP)
  if (num_threads > 1 && elements > kSingleThreadElements && !omp_in_parallel()) {
    int shares = 1;
#pragma omp parallel num_threads(num_threads)
    {
      const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
      if (thread == 0) shares = static_cast<int>(threads);
      work(count * thread / threads, count * (thread + 1) / threads, static_cast<int>(thread));
    }
    return shares;
  }
#endif
  work(int64_t{0}, count, 0);
  return 1;
}

}  // namespace fastattn
