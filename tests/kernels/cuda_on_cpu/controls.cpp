// What tests ask the machine of cuda_runtime.h for, and tell it, through ctypes.
#include "cuda_fp16.h"
#include "cuda_bf16.h"
#include "cuda_runtime.h"

extern "C" {

void run_backwards(bool backwards) { cuda_on_cpu::backwards = backwards; }
long launches() { return cuda_on_cpu::launches; }
unsigned last_grid() { return cuda_on_cpu::last_grid.x; }
unsigned last_block(int dimension) {
  return dimension == 0 ? cuda_on_cpu::last_block.x : cuda_on_cpu::last_block.y;
}
int current_device() { return cuda_on_cpu::device; }
int launch_device() { return cuda_on_cpu::launch_device; }
uintptr_t launch_stream() { return reinterpret_cast<uintptr_t>(cuda_on_cpu::launch_stream); }
uint16_t to_half(float value) { return __float2half_rn(value).bits; }
uint16_t to_bfloat16(float value) { return __float2bfloat16_rn(value).bits; }
float from_half(uint16_t bits) { return __half2float({bits}); }
}
