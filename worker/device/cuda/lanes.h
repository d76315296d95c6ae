// Neighbouring elements that one thread takes together: as one access of 16 bytes where they lie
// right, else one by one, with the same bits. In registers they are floats, however they are
// stored. Thread-safe: pure functions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "worker/device/cuda/launch.h"
#include "worker/device/cuda/tensor_core.h"
#include "worker/device/kernel_types.h"

namespace lockstep::device::cuda {

template <int kLanes>
struct Lanes {
  static_assert(kLanes == 1 || kLanes == 4 || kLanes == 8);
  float at[kLanes];
};

// An element that is stored as bf16.
struct StoredBf16 {
  uint16_t bits;
};
// Elements of an access of 16 bytes.
template <class T>
constexpr int kWideLanes = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ float FloatOf(float x) { return x; }
__device__ __forceinline__ float FloatOfBits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}
__device__ __forceinline__ float FloatOf(StoredBf16 x) {
  return FloatOfBits(static_cast<uint32_t>(x.bits) << 16);
}

// Calls run with the type of a tensor's elements.
template <class Run>
void WithElement(ElementType type, const Run& run) {
  if (type == ElementType::kBf16) {
    run.template operator()<StoredBf16>();
  } else {
    run.template operator()<float>();
  }
}

// p is aligned to all lanes.
template <int kLanes>
__device__ __forceinline__ Lanes<kLanes> LoadLanes(const float* p) {
  if constexpr (kLanes == 4) {
    const float4 v = *reinterpret_cast<const float4*>(p);
    return {{v.x, v.y, v.z, v.w}};
  } else if constexpr (kLanes == 8) {
    const Lanes<4> low = LoadLanes<4>(p), high = LoadLanes<4>(p + 4);
    return {{low.at[0], low.at[1], low.at[2], low.at[3], high.at[0], high.at[1], high.at[2],
             high.at[3]}};
  } else {
    return {{*p}};
  }
}
template <int kLanes>
__device__ __forceinline__ void StoreLanes(float* p, const Lanes<kLanes>& v) {
  if constexpr (kLanes == 4) {
    *reinterpret_cast<float4*>(p) = make_float4(v.at[0], v.at[1], v.at[2], v.at[3]);
  } else if constexpr (kLanes == 8) {
    StoreLanes<4>(p, {{v.at[0], v.at[1], v.at[2], v.at[3]}});
    StoreLanes<4>(p + 4, {{v.at[4], v.at[5], v.at[6], v.at[7]}});
  } else {
    *p = v.at[0];
  }
}

// Lanes as they are stored: what waits for its turn in registers takes half as many as floats.
template <class T, int kLanes>
struct Held;
template <int kLanes>
struct Held<float, kLanes> {
  Lanes<kLanes> lanes;
  __device__ __forceinline__ void Load(const float* p) { lanes = LoadLanes<kLanes>(p); }
  __device__ __forceinline__ float At(int i) const { return lanes.at[i]; }
};
template <int kLanes>
struct Held<StoredBf16, kLanes> {
  uint32_t words[(kLanes + 1) / 2];
  __device__ __forceinline__ void Load(const StoredBf16* p) {
    if constexpr (kLanes == 8) {
      const uint4 v = *reinterpret_cast<const uint4*>(p);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else if constexpr (kLanes == 4) {
      const uint2 v = *reinterpret_cast<const uint2*>(p);
      words[0] = v.x, words[1] = v.y;
    } else {
      words[0] = p->bits;
    }
  }
  __device__ __forceinline__ float At(int i) const {
    return FloatOfBits(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xFFFF0000u);
  }
};

template <int kLanes>
__device__ __forceinline__ Lanes<kLanes> LoadLanes(const StoredBf16* p) {
  Held<StoredBf16, kLanes> held;
  held.Load(p);
  Lanes<kLanes> result;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) result.at[i] = held.At(i);
  return result;
}
template <int kLanes>
__device__ __forceinline__ void StoreLanes(StoredBf16* p, const Lanes<kLanes>& v) {
  if constexpr (kLanes == 8) {
    *reinterpret_cast<uint4*>(p) = make_uint4(TwoBf16(v.at[0], v.at[1]), TwoBf16(v.at[2], v.at[3]),
                                              TwoBf16(v.at[4], v.at[5]), TwoBf16(v.at[6], v.at[7]));
  } else if constexpr (kLanes == 4) {
    *reinterpret_cast<uint2*>(p) = make_uint2(TwoBf16(v.at[0], v.at[1]), TwoBf16(v.at[2], v.at[3]));
  } else {
    p->bits = static_cast<uint16_t>(TwoBf16(v.at[0], 0));
  }
}

// As it is when it has been stored.
template <class T>
__device__ __forceinline__ float AsStored(float x) {
  if constexpr (sizeof(T) == sizeof(float)) return x;
  return FloatOfBits(TwoBf16(x, 0) << 16);
}

// Elements from the last address that is aligned to 16 bytes up to p.
template <class T>
__host__ __device__ __forceinline__ int LeadOf(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

// Whether tensors of so many channels can be taken by four.
template <class... Pointers>
bool TakenByFour(int64_t channels, const Pointers*... pointers) {
  return channels % 4 == 0 && (IsAligned16(pointers) && ...);
}
// By as many as 16 bytes hold.
template <class T, class... Pointers>
bool TakenWide(int64_t channels, const T* first, const Pointers*... others) {
  return channels % kWideLanes<T> == 0 && IsAligned16(first) && (IsAligned16(others) && ...);
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
