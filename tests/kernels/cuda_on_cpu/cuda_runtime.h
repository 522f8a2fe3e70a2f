// The part of CUDA that the extension's kernels and launchers use, for a C++ compiler and one core.
//
// This folder stands in for the toolkit's headers, so the very same .cu files compile with g++. A
// block runs at a time; each of its threads is a fiber that runs until it waits: at __syncthreads
// for the block, at a shuffle for the lanes that its mask names. What a GPU would leave
// undefined raises std::runtime_error: a barrier that only some threads reach, or at two places, a
// shuffle with a lane that takes no part, threads that wait for ever.
//
// A warp runs until it needs the others, in order of the index or from the last to the first:
// results that differ betray a missing barrier. As on a GPU, nothing clears shared memory.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned long long count() const { return 1ull * x * y * z; }
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 << 10;
constexpr int kDevices = 2;

inline bool backwards = false;           // the order in which threads and blocks run
inline long launches = 0;                // so far
inline dim3 last_grid, last_block;       // of the last launch
inline int device = 0;                   // the current one
inline int launch_device = 0;            // of the last launch
inline void* launch_stream = nullptr;    // of the last launch

enum class State { ready, at_barrier, at_shuffle, done };

struct Fiber {
  State state = State::done;
  int line = 0;              // where it waits
  uint32_t mask = 0;         // of the shuffle: the lanes that take part,
  unsigned source = 0;       // the lane it reads, and the value it gives and gets
  uint64_t value = 0;
  bool started = false;
  dim3 index;
  ucontext_t context;
  jmp_buf place;
  std::unique_ptr<char[]> stack;
};

class Block {
 public:
  static Block& instance() {
    static Block block;
    return block;
  }

  void run(const dim3& shape, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    const unsigned count = unsigned(shape.count());
    while (fibers_.size() < count) fibers_.push_back(std::make_unique<Fiber>());
    threads_.clear();
    for (unsigned i = 0; i < count; ++i) {
      Fiber& fiber = *fibers_[i];
      if (fiber.state != State::done) fiber.started = false;  // a fault left it where it waited
      fiber.state = State::ready;
      fiber.index = dim3(i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y);
      threads_.push_back(&fiber);
    }
    while (!all(State::done)) {
      for (unsigned i = 0; i < count; i += kWarp) {
        run_warp(backwards ? (count - 1) / kWarp * kWarp - i : i);
      }
      if (!all(State::done)) release_barrier();
    }
  }

  // Called by the running thread: waits at a barrier.
  void barrier(int line) {
    running_->line = line;
    wait(State::at_barrier);
  }

  // Called by the running thread: the bits that lane `source` gives.
  uint64_t exchange(uint32_t mask, unsigned source, uint64_t value, int line) {
    running_->line = line;
    running_->mask = mask;
    running_->source = source;
    running_->value = value;
    wait(State::at_shuffle);
    return running_->value;
  }

  unsigned lane() const {
    const dim3& index = running_->index;
    return (index.x + blockDim.x * (index.y + blockDim.y * index.z)) % kWarp;
  }

 private:
  bool all(State state) const {
    return std::all_of(threads_.begin(), threads_.end(),
                       [&](const Fiber* fiber) { return fiber->state == state; });
  }

  static void entry() {
    Block& block = instance();
    for (;;) {  // one turn for each block that it is a thread of
      (*block.kernel_)();
      block.wait(State::done);
    }
  }

  // Runs the lanes of a warp until all of them wait for the block or have returned.
  void run_warp(unsigned first) {
    const unsigned lanes = lanes_from(first);
    do {
      for (unsigned lane = 0; lane < lanes; ++lane) {
        Fiber& fiber = *threads_[first + (backwards ? lanes - 1 - lane : lane)];
        if (fiber.state == State::ready) resume(fiber);
      }
    } while (shuffle(first));
  }

  unsigned lanes_from(unsigned first) const {
    return std::min<unsigned>(kWarp, unsigned(threads_.size()) - first);
  }

  // Runs a thread until it waits. Only a fiber's first switch needs the system's slow one.
  void resume(Fiber& fiber) {
    running_ = &fiber;
    threadIdx = fiber.index;
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
    setcontext(&fiber.context);
  }

  void wait(State state) {
    running_->state = state;
    if (_setjmp(running_->place) == 0) _longjmp(scheduler_, 1);
  }

  // Completes the shuffles of a warp of which every lane waits or has returned.
  bool shuffle(unsigned first) {
    const unsigned lanes = lanes_from(first);
    bool any = false;
    uint64_t got[kWarp] = {};
    for (unsigned lane = 0; lane < lanes; ++lane) {
      const Fiber& fiber = *threads_[first + lane];
      if (fiber.state != State::at_shuffle) continue;
      any = true;
      if (!(fiber.mask >> lane & 1)) fail("a lane shuffles that its mask does not name", fiber);
      for (unsigned other = 0; other < kWarp; ++other) {
        if (!(fiber.mask >> other & 1)) continue;
        const Fiber* partner = other < lanes ? threads_[first + other] : nullptr;
        if (!partner || partner->state != State::at_shuffle || partner->line != fiber.line ||
            partner->mask != fiber.mask) {
          fail("a shuffle waits for lane " + std::to_string(other) + ", which takes no part",
               fiber);
        }
      }
      if (fiber.source >= kWarp || !(fiber.mask >> fiber.source & 1)) {
        fail("a shuffle reads lane " + std::to_string(fiber.source) + ", which takes no part",
             fiber);
      }
      got[lane] = threads_[first + fiber.source]->value;
    }
    for (unsigned lane = 0; lane < lanes; ++lane) {
      Fiber& fiber = *threads_[first + lane];
      if (fiber.state != State::at_shuffle) continue;
      fiber.value = got[lane];
      fiber.state = State::ready;
    }
    return any;
  }

  void release_barrier() {
    const Fiber& waiting = **std::find_if(threads_.begin(), threads_.end(), [](const Fiber* fiber) {
      return fiber->state == State::at_barrier;
    });
    for (Fiber* fiber : threads_) {
      if (fiber->state != State::at_barrier) {
        fail("a barrier is reached by some threads of the block only", waiting);
      }
      if (fiber->line != waiting.line) {
        fail("threads wait at another barrier, on line " + std::to_string(fiber->line), waiting);
      }
    }
    for (Fiber* fiber : threads_) fiber->state = State::ready;
  }

  [[noreturn]] static void fail(const std::string& what, const Fiber& fiber) {
    throw std::runtime_error(what + " (line " + std::to_string(fiber.line) + ", block " +
                             std::to_string(blockIdx.x) + ", thread " +
                             std::to_string(fiber.index.x) + ", " +
                             std::to_string(fiber.index.y) + ")");
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> threads_;  // of the block that runs
  const std::function<void()>* kernel_ = nullptr;
  Fiber* running_ = nullptr;
  jmp_buf scheduler_;
};

}  // namespace cuda_on_cpu

// ---- What kernels call.

inline void __syncthreads(int line = __builtin_LINE()) {
  cuda_on_cpu::Block::instance().barrier(line);
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, unsigned lane_mask, int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most eight bytes");
  cuda_on_cpu::Block& block = cuda_on_cpu::Block::instance();
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = block.exchange(mask, block.lane() ^ lane_mask, bits, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float numerator, float denominator) {
  return numerator * (1.0f / denominator);
}

// ---- What launchers call.

#define CUDART_VERSION 13000

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorInvalidDevice };

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid configuration";
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_cpu::device;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= cuda_on_cpu::kDevices) return cudaErrorInvalidDevice;
  cuda_on_cpu::device = device;
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_on_cpu;
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.count() == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 ||
      block.count() == 0 || block.count() > kMaxThreads) {
    return cudaErrorInvalidConfiguration;
  }
  ++launches;
  last_grid = gridDim = grid;
  last_block = blockDim = block;
  launch_device = device;
  launch_stream = config->stream;
  const std::function<void()> body = [&] { kernel(Parameters(arguments)...); };
  for (unsigned long long i = 0; i < grid.count(); ++i) {
    const unsigned long long at = backwards ? grid.count() - 1 - i : i;
    blockIdx = dim3(unsigned(at % grid.x), unsigned(at / grid.x % grid.y),
                    unsigned(at / grid.x / grid.y));
    Block::instance().run(block, body);
  }
  return cudaSuccess;
}
