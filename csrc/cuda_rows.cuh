// What CUDA kernels over rows share: eight adjacent elements a thread, and sums over a row.
//
// Eight elements are one access of 16 bytes (two in float32) and one call of the dropout contract.
// Arithmetic is in float32 whatever the type in memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "layer_norm.h"
#include "philox.h"

#define FASTATTN_DEVICE __device__ __forceinline__

namespace fastattn {

constexpr int kWarp = 32;
constexpr int kGroup = 8;
static_assert(kGroup == kLanesPerCall, "a thread must own what a call decides");

template <typename To, typename From>
FASTATTN_DEVICE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Eight adjacent elements as they lie in memory.
template <typename T>
struct Eight {
  uint4 words[sizeof(T) / 2];
};

FASTATTN_DEVICE void unpack_pair(uint32_t word, __half, float& low, float& high) {
  const float2 pair = __half22float2(bits_as<__half2>(word));
  low = pair.x;
  high = pair.y;
}

FASTATTN_DEVICE void unpack_pair(uint32_t word, __nv_bfloat16, float& low, float& high) {
  low = bits_as<float>(word << 16);
  high = bits_as<float>(word & 0xFFFF0000u);
}

FASTATTN_DEVICE uint32_t pack_pair(float low, float high, __half) {
  return bits_as<uint32_t>(__floats2half2_rn(low, high));
}

FASTATTN_DEVICE uint32_t pack_pair(float low, float high, __nv_bfloat16) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
}

template <typename T>
FASTATTN_DEVICE void unpack(const Eight<T>& packed, float (&values)[kGroup]) {
  const uint4 words = packed.words[0];
  unpack_pair(words.x, T{}, values[0], values[1]);
  unpack_pair(words.y, T{}, values[2], values[3]);
  unpack_pair(words.z, T{}, values[4], values[5]);
  unpack_pair(words.w, T{}, values[6], values[7]);
}

FASTATTN_DEVICE void unpack(const Eight<float>& packed, float (&values)[kGroup]) {
  memcpy(values, packed.words, sizeof(values));
}

template <typename T>
FASTATTN_DEVICE Eight<T> pack(const float (&values)[kGroup]) {
  return {{make_uint4(pack_pair(values[0], values[1], T{}), pack_pair(values[2], values[3], T{}),
                      pack_pair(values[4], values[5], T{}), pack_pair(values[6], values[7], T{}))}};
}

template <>
FASTATTN_DEVICE Eight<float> pack<float>(const float (&values)[kGroup]) {
  Eight<float> packed;
  memcpy(packed.words, values, sizeof(values));
  return packed;
}

// `start` is on a multiple of 16 bytes.
template <typename T>
FASTATTN_DEVICE Eight<T> load(const T* start) {
  Eight<T> packed;
  const uint4* words = reinterpret_cast<const uint4*>(start);
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 2); ++i) packed.words[i] = words[i];
  return packed;
}

template <typename T>
FASTATTN_DEVICE void store(T* start, const Eight<T>& packed) {
  uint4* words = reinterpret_cast<uint4*>(start);
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 2); ++i) words[i] = packed.words[i];
}

// Row and stride fit 32 bits, which makes their product one instruction.
template <typename T>
FASTATTN_DEVICE T* row_start(const Rows& rows, uint32_t row) {
  return static_cast<T*>(rows.data) + uint64_t{row} * uint32_t(rows.stride);
}

FASTATTN_DEVICE void fill(float (&values)[kGroup], float value) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) values[i] = value;
}

// ---- Types that are known at run time. They are the same for all threads, so that branches on
// them cost little time; a list of those that can occur keeps the code small.

template <typename... T>
struct Types {};
using AnyType = Types<__nv_bfloat16, __half, float>;

inline __host__ __device__ Type type_of(float) { return Type::float32; }
inline __host__ __device__ Type type_of(__half) { return Type::float16; }
inline __host__ __device__ Type type_of(__nv_bfloat16) { return Type::bfloat16; }

// Calls work(T*) with `data` as what it points to: the T of the list that `type` names.
template <typename Work, typename Last>
FASTATTN_DEVICE void with_type(Types<Last>, Type, void* data, const Work& work) {
  work(static_cast<Last*>(data));
}

template <typename Work, typename First, typename... Others>
FASTATTN_DEVICE void with_type(Types<First, Others...>, Type type, void* data, const Work& work) {
  if (type == type_of(First{})) {
    work(static_cast<First*>(data));
  } else {
    with_type(Types<Others...>{}, type, data, work);
  }
}

FASTATTN_DEVICE void store_one(float* at, float value) { *at = value; }
FASTATTN_DEVICE void store_one(__half* at, float value) { *at = __float2half_rn(value); }
FASTATTN_DEVICE void store_one(__nv_bfloat16* at, float value) { *at = __float2bfloat16_rn(value); }
FASTATTN_DEVICE float load_one(const float* at) { return *at; }
FASTATTN_DEVICE float load_one(const __half* at) { return __half2float(*at); }
FASTATTN_DEVICE float load_one(const __nv_bfloat16* at) { return __bfloat162float(*at); }

// ---- A row in registers.

// What a thread owns of a row that several warps share: kVectors groups of eight columns. A warp
// owns adjacent groups, so that each of its accesses is of adjacent memory.
template <int kVectors>
struct Slice {
  uint32_t first, groups;

  FASTATTN_DEVICE explicit Slice(uint32_t groups)
      : first(threadIdx.x / kWarp * kWarp * kVectors + threadIdx.x % kWarp), groups(groups) {}
  FASTATTN_DEVICE bool has(int v) const { return group(v) < groups; }
  FASTATTN_DEVICE uint32_t group(int v) const { return first + v * kWarp; }
};

template <int kVectors>
using Tile = float[kVectors][kGroup];

template <int kVectors, typename Work>
FASTATTN_DEVICE void for_each(Tile<kVectors>& tile, const Work& work) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) work(tile[v][i], v, i);
  }
}

template <int kVectors>
FASTATTN_DEVICE void fill(Tile<kVectors>& tile, float value) {
  for_each(tile, [&](float& element, int, int) { element = value; });
}

// Zeros where the slice has no columns.
template <typename T, int kVectors>
FASTATTN_DEVICE void load(const Slice<kVectors>& slice, const T* row,
                          Eight<T> (&packed)[kVectors]) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    packed[v] = {};
    if (slice.has(v)) packed[v] = load(row + kGroup * slice.first + kGroup * kWarp * v);
  }
}

template <typename T, int kVectors>
FASTATTN_DEVICE void unpack(const Eight<T> (&packed)[kVectors], Tile<kVectors>& tile) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) unpack(packed[v], tile[v]);
}

template <typename T, int kVectors>
FASTATTN_DEVICE void add(const Eight<T> (&packed)[kVectors], Tile<kVectors>& tile) {
  Tile<kVectors> other;
  unpack(packed, other);
  for_each(tile, [&](float& element, int v, int i) { element += other[v][i]; });
}

template <typename T, int kVectors>
FASTATTN_DEVICE void store(const Slice<kVectors>& slice, T* row, const Tile<kVectors>& tile) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (slice.has(v)) store(row + kGroup * slice.first + kGroup * kWarp * v, pack<T>(tile[v]));
  }
}

// Group v of a vector.
template <typename List, int kVectors>
FASTATTN_DEVICE void load(List types, const Slice<kVectors>& slice, int v, const Vector& vector,
                          float absent, float (&values)[kGroup]) {
  fill(values, absent);
  if (!vector.data || !slice.has(v)) return;
  with_type(types, vector.type, vector.data,
            [&](auto* start) { unpack(load(start + kGroup * slice.group(v)), values); });
}

template <typename List, int kVectors>
FASTATTN_DEVICE void load(List types, const Slice<kVectors>& slice, const Vector& vector,
                          float absent, Tile<kVectors>& tile) {
  fill(tile, absent);
  if (!vector.data) return;
  with_type(types, vector.type, vector.data, [&](auto* start) {
    Eight<std::remove_pointer_t<decltype(start)>> packed[kVectors];
    load(slice, start, packed);
    unpack(packed, tile);
  });
}

template <typename List, int kVectors>
FASTATTN_DEVICE void store(List types, const Slice<kVectors>& slice, const Rows& rows, uint32_t row,
                           const Tile<kVectors>& tile) {
  if (!rows.data) return;
  with_type(types, rows.type, rows.data, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    store(slice, row_start<T>(rows, row), tile);
  });
}

// ---- A row of any width and alignment, a group of columns at a time.

// How a group of columns is read and written where its kernel takes any row: in one go, or one
// element at a time where columns are left over or addresses are not multiples of 16 bytes.
struct Span {
  int64_t column;
  int count;  // 1 .. 8 columns
  bool wide;  // all eight in one go

  FASTATTN_DEVICE void load(Type type, void* data, int64_t start, float (&values)[kGroup]) const {
    with_type(AnyType{}, type, data, [&](auto* elements) {
      elements += start + column;
      if (wide) return unpack(fastattn::load(elements), values);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) values[i] = i < count ? load_one(elements + i) : 0.0f;
    });
  }

  FASTATTN_DEVICE void store(Type type, void* data, int64_t start,
                             const float (&values)[kGroup]) const {
    with_type(AnyType{}, type, data, [&](auto* elements) {
      elements += start + column;
      using T = std::remove_pointer_t<decltype(elements)>;
      if (wide) return fastattn::store(elements, pack<T>(values));
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (i < count) store_one(elements + i, values[i]);
      }
    });
  }

  FASTATTN_DEVICE void load(const Rows& rows, int64_t row, float (&values)[kGroup]) const {
    load(rows.type, rows.data, row * rows.stride, values);
  }
  FASTATTN_DEVICE void store(const Rows& rows, int64_t row, const float (&values)[kGroup]) const {
    store(rows.type, rows.data, row * rows.stride, values);
  }
};

// What `values` become when they are stored in type T.
template <typename T>
FASTATTN_DEVICE void round_to(float (&values)[kGroup]) {
  unpack(pack<T>(values), values);
}

FASTATTN_DEVICE void round_to(Type type, float (&values)[kGroup]) {
  if (type == Type::bfloat16) round_to<__nv_bfloat16>(values);
  if (type == Type::float16) round_to<__half>(values);
}

// ---- Sums over the threads of a row: blockDim.x of them, one warp or several.

constexpr int kMaxRowWarps = 16;
static_assert(2 * kMaxRowWarps == kWarp, "each half of a warp adds up one value of every warp");

// The sum over groups of `lanes` adjacent lanes, of which every lane of a group learns it.
FASTATTN_DEVICE float lanes_sum(float value, int lanes) {
#pragma unroll
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, mask);
  }
  return value;
}

// The sum of `value` over the one row of a block, or over the warp that is a row. No two calls of
// a kernel may share `scratch`.
FASTATTN_DEVICE float row_sum(float value, float (&scratch)[kMaxRowWarps]) {
  value = lanes_sum(value, kWarp);
  if (blockDim.x == kWarp) return value;
  const unsigned lane = threadIdx.x % kMaxRowWarps;
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  return lanes_sum(lane < blockDim.x / kWarp ? scratch[lane] : 0.0f, kMaxRowWarps);
}

// Sums of two values over each row of a block. The next call takes another `scratch`; the call
// after that may take the same one again.
FASTATTN_DEVICE float2 row_sums(float first, float second, float (&scratch)[2][kMaxRowWarps]) {
  // The upper half of a warp sums `second`, the lower half `first`.
  const unsigned half = threadIdx.x / kMaxRowWarps % 2, lane = threadIdx.x % kMaxRowWarps;
  float mine = half ? second : first;
  mine += __shfl_xor_sync(0xFFFFFFFFu, half ? first : second, kMaxRowWarps);
  mine = lanes_sum(mine, kMaxRowWarps);
  if (blockDim.x != kWarp) {
    const unsigned warps = blockDim.x / kWarp, first_warp = threadIdx.y * warps;
    if (lane == 0) scratch[half][first_warp + threadIdx.x / kWarp] = mine;
    __syncthreads();
    mine = lanes_sum(lane < warps ? scratch[half][first_warp + lane] : 0.0f, kMaxRowWarps);
  }
  const float other = __shfl_xor_sync(0xFFFFFFFFu, mine, kMaxRowWarps);
  return half ? make_float2(other, mine) : make_float2(mine, other);
}

// ---- Dropout of one row.

// The logical row, from which position and sequence follow.
FASTATTN_DEVICE uint32_t logical_row(const ResidualDropout& dropout, uint32_t row) {
  return dropout.map.row_index ? uint32_t(dropout.map.row_index[row]) : row;
}

class RowDropout {
 public:
  FASTATTN_DEVICE RowDropout(const ResidualDropout& dropout, uint32_t logical)
      : drops(dropout.seed != nullptr) {
    if (!drops) return;
    const uint32_t period = uint32_t(dropout.map.period);
    const uint32_t outer = logical / period, inner = logical - outer * period;
    position = dropout.map.batch_first ? inner : outer;
    sequence = dropout.map.batch_first ? outer : inner;
    site = dropout.site << 16;
    threshold = dropout.threshold;
    scale = float(dropout.scale);
    seed = uint64_t(*dropout.seed);
  }

  template <int kVectors>
  FASTATTN_DEVICE void apply(const Slice<kVectors>& slice, Tile<kVectors>& tile) const {
    if (!drops) return;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) apply_group(slice.group(v), tile[v]);
  }

  FASTATTN_DEVICE void apply(const Span& span, float (&values)[kGroup]) const {
    if (drops) apply_group(uint32_t(span.column / kGroup), values);
  }

 private:
  // Multiplies columns 8 * group .. 8 * group + 7 by `scale` where they are kept, by 0 elsewhere.
  FASTATTN_DEVICE void apply_group(uint32_t group, float (&values)[kGroup]) const {
    uint32_t word[4] = {position, group, sequence, site};
    philox(seed, word[0], word[1], word[2], word[3]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Both lanes of a word are compared where they lie.
      values[2 * i] *= (word[i] & kLaneMask) >= threshold ? scale : 0.0f;
      values[2 * i + 1] *= (word[i] & kLaneMask << 16) >= threshold << 16 ? scale : 0.0f;
    }
  }

  bool drops;
  uint32_t position, sequence, site, threshold;
  float scale;
  uint64_t seed;
};

}  // namespace fastattn
