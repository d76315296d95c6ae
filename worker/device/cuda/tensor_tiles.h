// What the kernels of products and convolutions on tensor cores have in common: factors, and how
// tiles of them lie in shared memory. Thread-safe: pure functions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/leaf_chunks.h"
#include "worker/device/cuda/tensor_core.h"
#include "worker/device/cuda/windows.h"

namespace lockstep::device::cuda {

// What factors are on tensor cores. A row of a tile in shared memory has kRowBytes of terms, which
// is two instructions' depth whatever the type.
constexpr int kRowBytes = 64;
struct Bf16 {
  static constexpr int kDepth = 32;  // terms of a row
  static constexpr int kQuads = kDepth / 4;
  using Quad = uint2;
  static __device__ __forceinline__ Quad Round(float4 v) {
    return {TwoBf16(v.x, v.y), TwoBf16(v.z, v.w)};
  }
  static __device__ __forceinline__ Quad Round(uint2 v) { return v; }  // stored as it is
  static __device__ __forceinline__ void Multiply(float (&sums)[4], const uint4& a, uint32_t b0,
                                                  uint32_t b1) {
    MultiplyBf16(sums, a, b0, b1);
  }
};

// Four neighbours as they are stored.
template <class T>
using Four = std::conditional_t<sizeof(T) == sizeof(float), float4, uint2>;
// As LoadFour.
template <bool kWide>
__device__ __forceinline__ float4 LoadStored(const float* __restrict__ p, int count) {
  return LoadFour<kWide>(p, count);
}
template <bool kWide>
__device__ __forceinline__ uint2 LoadStored(const StoredBf16* __restrict__ p, int count) {
  uint2 v = make_uint2(0, 0);
  const auto* const bits = reinterpret_cast<const unsigned short*>(p);
  if constexpr (kWide) {
    if (count > 0) v = __ldg(reinterpret_cast<const uint2*>(p));
  } else {
    if (count > 0) v.x = __ldg(bits);
    if (count > 1) v.x |= static_cast<uint32_t>(__ldg(bits + 1)) << 16;
    if (count > 2) v.y = __ldg(bits + 2);
    if (count > 3) v.y |= static_cast<uint32_t>(__ldg(bits + 3)) << 16;
  }
  return v;
}
// Calls element(i) for four elements that lie anywhere: where they are, null for none.
template <class T, class Element>
__device__ __forceinline__ Four<T> GatherFour(const Element& element) {
  const auto at = [&](int i) {
    using Plain = std::conditional_t<sizeof(T) == sizeof(float), float, unsigned short>;
    const T* const p = element(i);
    return p == nullptr ? Plain{} : __ldg(reinterpret_cast<const Plain*>(p));
  };
  if constexpr (sizeof(T) == sizeof(float)) {
    return make_float4(at(0), at(1), at(2), at(3));
  } else {
    const auto bits = [&](int i) { return static_cast<uint32_t>(at(i)); };
    return make_uint2(bits(0) | bits(1) << 16, bits(2) | bits(3) << 16);
  }
}
// Rounds on the way where that is how they are stored.
__device__ __forceinline__ void StoreFour(StoredBf16* p, bool wide, int count, float4 v) {
  const uint2 two = {TwoBf16(v.x, v.y), TwoBf16(v.z, v.w)};
  if (wide && count >= 4) {
    *reinterpret_cast<uint2*>(p) = two;
    return;
  }
  if (count > 0) p[0].bits = static_cast<uint16_t>(two.x);
  if (count > 1) p[1].bits = static_cast<uint16_t>(two.x >> 16);
  if (count > 2) p[2].bits = static_cast<uint16_t>(two.y);
  if (count > 3) p[3].bits = static_cast<uint16_t>(two.y >> 16);
}

constexpr int64_t kMostShared = 48 << 10;        // bytes of a block, without asking for more
constexpr int64_t kMostStoredShared = 99 << 10;  // of those that ask for it: what each GPU has
constexpr int kMostKernel = 15;                  // along each dimension: taps are bits of a word

// The quads of a block of channels, as a power of two: a row of terms at most, all of one tap.
template <class Factor>
int BlockShiftOf(int64_t channels) {
  int shift = 0;
  while ((1 << shift) < Factor::kQuads && channels % (8 << shift) == 0) ++shift;
  return shift;
}

// How wide a tile is: the fewest features to spare, then the widest.
inline int FeaturesOfTile(int64_t features) {
  if (features <= 16) return 16;
  if (features <= 32) return 32;
  return RoundUp(features, 64) == RoundUp(features, 128) ? 128 : 64;
}

}  // namespace lockstep::device::cuda
