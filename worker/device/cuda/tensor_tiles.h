// What the kernels of convolutions on tensor cores have in common: factors, and how tiles of them
// lie in shared memory. Thread-safe: pure functions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "worker/device/cuda/leaf_chunks.h"
#include "worker/device/cuda/tensor_core.h"

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
  static __device__ __forceinline__ void Multiply(float (&sums)[4], const uint4& a, uint32_t b0,
                                                  uint32_t b1) {
    MultiplyBf16(sums, a, b0, b1);
  }
};

constexpr int64_t kMostShared = 48 << 10;  // bytes of a block, without asking for more
constexpr int kMostKernel = 15;            // along each dimension: taps are bits of a word

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
