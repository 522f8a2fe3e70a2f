// Kernels with faults that a GPU would not report. They test cuda_runtime.h and do not ship.
#include <cuda_runtime.h>

#include <cstring>

namespace {

__global__ void sound(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, values[63 - threadIdx.x], 1);
}

__global__ void barrier_for_some(int*) {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void two_barriers(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void shuffle_with_lanes_that_returned(int* out) {
  if (threadIdx.x % 32 >= 16) return;
  out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1, 8);
}

__global__ void shuffle_out_of_the_mask(int* out) {
  if (threadIdx.x % 32 >= 16) return;
  out[threadIdx.x] = __shfl_xor_sync(0x0000FFFFu, 1, 16);
}

__global__ void shuffle_out_of_the_warp(int* out) {
  out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1, 32);
}

// Half of a warp waits for the block, the other half for the first one's lanes.
__global__ void deadlock(int* out) {
  if (threadIdx.x % 32 < 16) {
    __syncthreads();
  } else {
    out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1, 16);
  }
}

__global__ void missing_barrier(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = int(threadIdx.x) + 1;
  out[threadIdx.x] = values[63 - threadIdx.x];
  __syncthreads();
  values[threadIdx.x] = 0;
}

struct Named {
  const char* name;
  void (*kernel)(int*);
};

#define NAMED(kernel) {#kernel, kernel}
constexpr Named kKernels[] = {NAMED(sound),
                              NAMED(barrier_for_some),
                              NAMED(two_barriers),
                              NAMED(shuffle_with_lanes_that_returned),
                              NAMED(shuffle_out_of_the_mask),
                              NAMED(shuffle_out_of_the_warp),
                              NAMED(deadlock),
                              NAMED(missing_barrier)};

}  // namespace

// Runs a kernel of two warps that writes 64 numbers; what was thrown, or null.
extern "C" const char* run_planted(const char* name, int* out) {
  static std::string message;
  for (const Named& named : kKernels) {
    if (std::strcmp(name, named.name) != 0) continue;
    cudaLaunchConfig_t config;
    config.blockDim = dim3(64);
    try {
      cudaLaunchKernelEx(&config, named.kernel, out);
      return nullptr;
    } catch (const std::runtime_error& error) {
      message = error.what();
      return message.c_str();
    }
  }
  return "no such kernel";
}
