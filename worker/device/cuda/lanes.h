// Neighbouring elements that one thread takes together: as one access of 16 bytes where they lie
// right, else one by one, with the same bits. Thread-safe: pure functions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "worker/device/cuda/launch.h"

namespace lockstep::device::cuda {

template <int kLanes>
struct Lanes {
  static_assert(kLanes == 1 || kLanes == 4);
  float at[kLanes];
};

// p is aligned to all lanes.
template <int kLanes>
__device__ __forceinline__ Lanes<kLanes> LoadLanes(const float* p) {
  if constexpr (kLanes == 4) {
    const float4 v = *reinterpret_cast<const float4*>(p);
    return {{v.x, v.y, v.z, v.w}};
  } else {
    return {{*p}};
  }
}
template <int kLanes>
__device__ __forceinline__ void StoreLanes(float* p, const Lanes<kLanes>& v) {
  if constexpr (kLanes == 4) {
    *reinterpret_cast<float4*>(p) = make_float4(v.at[0], v.at[1], v.at[2], v.at[3]);
  } else {
    *p = v.at[0];
  }
}

// Elements from the last address that is aligned to four up to p.
__host__ __device__ __forceinline__ int LeadOf(const float* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(float));
}

// Whether tensors of so many channels can be taken by four.
template <class... Pointers>
bool TakenByFour(int64_t channels, const Pointers*... pointers) {
  return channels % 4 == 0 && (IsAligned16(pointers) && ...);
}

// ---- bf16, to nearest even; NaN stays NaN.
__device__ __forceinline__ uint32_t Bf16Of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  if (x != x) return (bits >> 16) | 0x40u;
  return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}
__device__ __forceinline__ float RoundedToBf16(float x) {
  const uint32_t bits = Bf16Of(x) << 16;
  float rounded;
  __builtin_memcpy(&rounded, &bits, sizeof(rounded));
  return rounded;
}

}  // namespace lockstep::device::cuda
