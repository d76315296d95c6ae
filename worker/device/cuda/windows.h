// How a convolution's windows lie over its tensors, for kernels that multiply them without writing
// them out, in whatever precision. Thread-safe: pure functions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <numeric>
#include <utility>

#include "worker/device/cuda/divisor.h"
#include "worker/device/kernel_types.h"

namespace lockstep::device::cuda {

constexpr int64_t kPartElements = int64_t{1} << 30;  // of a launch's tensors: 32 bits index them

// Four neighbours, of which those from `count` on are none (0). kWide: they lie right for one
// access, and are all or none.
template <bool kWide>
__device__ __forceinline__ float4 LoadFour(const float* __restrict__ p, int count) {
  float4 v = make_float4(0, 0, 0, 0);
  if constexpr (kWide) {
    if (count > 0) v = __ldg(reinterpret_cast<const float4*>(p));
  } else {
    if (count > 0) v.x = __ldg(p);
    if (count > 1) v.y = __ldg(p + 1);
    if (count > 2) v.z = __ldg(p + 2);
    if (count > 3) v.w = __ldg(p + 3);
  }
  return v;
}
__device__ __forceinline__ void StoreFour(float* p, bool wide, int count, float4 v) {
  if (wide && count >= 4) {
    *reinterpret_cast<float4*>(p) = v;
    return;
  }
  if (count > 0) p[0] = v.x;
  if (count > 1) p[1] = v.y;
  if (count > 2) p[2] = v.z;
  if (count > 3) p[3] = v.w;
}

// y and dx are the product of windows of a source, {places, taps and channels}, with the weights.
// dx of a stride is made in stride^2 phases, each of the places that lie alike to it: they meet the
// same taps of the window. y has one phase.
struct Windows {
  int rows;
  int source_height, source_width, channels;  // of the source
  int height, width, features;                // of the result
  int kernel, stride, padding, dilation;
  int phases;              // along each dimension
  int tap_step;            // between the taps of a phase
  int tap_move;            // what that moves in the source
  bool wide, wide_result;  // source and weights; the result
  Divisor by_channels, by_kernel;
  ElementType result_type = ElementType::kFp32;
};

// One dimension of a phase: place i of it is place i * phases + phase of the result; its tap j is
// tap first + j * tap_step of the window and meets i * scale + begin + j * tap_move of the source.
struct Axis {
  int count, scale, begin, first, taps;
};
template <bool kBackward>
__device__ __forceinline__ Axis AxisOf(const Windows& s, int size, int phase) {
  if constexpr (!kBackward) return {size, s.stride, -s.padding, 0, s.kernel};
  if (s.stride == 1) return {size, 1, s.padding, 0, s.kernel};  // spares divisions
  Axis axis = {(size - phase + s.phases - 1) / s.phases, 1, 0, 0, 0};
  const int at = phase + s.padding;
  while (axis.first < s.kernel && (at - axis.first * s.dilation) % s.stride != 0) ++axis.first;
  if (axis.first == s.kernel) return axis;
  axis.begin = (at - axis.first * s.dilation) / s.stride;
  axis.taps = (s.kernel - axis.first + s.tap_step - 1) / s.tap_step;
  return axis;
}

inline Windows WindowsOf(const Conv2dShape& s) {
  return {0,
          static_cast<int>(s.height),
          static_cast<int>(s.width),
          static_cast<int>(s.in),
          static_cast<int>(s.out_height()),
          static_cast<int>(s.out_width()),
          static_cast<int>(s.out),
          static_cast<int>(s.kernel),
          static_cast<int>(s.stride),
          static_cast<int>(s.padding),
          static_cast<int>(s.dilation),
          1,
          1,
          static_cast<int>(s.dilation),
          false,
          false,
          Divisor(s.in),
          Divisor(s.kernel)};
}
inline Windows BackwardWindowsOf(const Conv2dShape& s) {
  Windows windows = WindowsOf(s);
  std::swap(windows.source_height, windows.height);
  std::swap(windows.source_width, windows.width);
  std::swap(windows.channels, windows.features);
  const int common = std::gcd(windows.stride, windows.dilation);
  windows.phases = windows.stride;
  windows.tap_step = windows.stride / common;
  windows.tap_move = -windows.dilation / common;
  return windows;
}

}  // namespace lockstep::device::cuda
