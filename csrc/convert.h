// 16-bit floating point as bits, in operations that compilers turn into vector code.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"

namespace fastattn {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

FASTATTN_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

FASTATTN_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// yes where `condition`, else no. As masks: a branch around arithmetic would keep loops scalar.
FASTATTN_INLINE uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

FASTATTN_INLINE float widen(float value) { return value; }
FASTATTN_INLINE double widen(double value) { return value; }
FASTATTN_INLINE float widen(BFloat16 value) { return as_float(uint32_t{value.bits} << 16); }

// The exponent of a half is rebased by a product, which also normalises subnormal numbers.
FASTATTN_INLINE float widen(Half value) {
  const uint32_t magnitude = value.bits & 0x7FFFu, sign = (value.bits & 0x8000u) << 16;
  const uint32_t finite = as_bits(as_float(magnitude << 13) * as_float(0x77800000u));
  const uint32_t special = 0x7F800000u | (magnitude << 13);  // infinity and NaN
  return as_float(select(magnitude < 0x7C00u, finite, special) | sign);
}

// To the nearest, ties to even.
FASTATTN_INLINE void narrow(double value, float& out) { out = static_cast<float>(value); }
FASTATTN_INLINE void narrow(double value, double& out) { out = value; }
FASTATTN_INLINE void narrow(float value, double& out) { out = value; }
FASTATTN_INLINE void narrow(float value, float& out) { out = value; }

FASTATTN_INLINE void narrow(float value, BFloat16& out) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

FASTATTN_INLINE void narrow(float value, Half& out) {
  const uint32_t bits = as_bits(value), magnitude = bits & 0x7FFFFFFFu;
  // Adding 0.5 leaves a subnormal half in the low bits, rounded by the adder.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t finite = select(magnitude < 0x38800000u, subnormal, normal);
  const uint32_t special = select(magnitude > 0x7F800000u, 0x7E00u, 0x7C00u);
  const uint32_t half = select(magnitude < 0x477FF000u, finite, special);  // 65520: infinity
  out.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

// Through fp32, as torch rounds doubles.
FASTATTN_INLINE void narrow(double value, BFloat16& out) { narrow(static_cast<float>(value), out); }
FASTATTN_INLINE void narrow(double value, Half& out) { narrow(static_cast<float>(value), out); }

}  // namespace fastattn
