// IEEE binary16 as in the toolkit's header, rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                    : exponent     ? std::ldexp(float(1024 + fraction), exponent - 25)
                                   : std::ldexp(float(fraction), -24);
  return value.bits >> 15 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (value != value) return {0x7FFF};
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7C00)};
  // In units of the last place, which halves below 2^-14 share; nearbyint rounds to even.
  const int exponent = std::max(magnitude > 0.0f ? std::ilogb(magnitude) : -14, -14);
  const int units = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {uint16_t(sign | (units + ((exponent + 14) << 10)))};
}

inline float2 __half22float2(__half2 value) {
  return {__half2float(value.x), __half2float(value.y)};
}

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
