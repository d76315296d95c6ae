// Walking one vector with lanes as features: what the lanes of a tail, which hold nothing, count
// as. Thread-safe: pure functions.
#pragma once

#include "worker/device/cpu/simd.h"

namespace lockstep::device::LOCKSTEP_ISA {

constexpr float kNegativeInfinity = -__builtin_inff();

LOCKSTEP_SIMD F16 OnlyLanes(F16 x, All, float) { return x; }
LOCKSTEP_SIMD F16 OnlyLanes(F16 x, Mask m, float other) { return Select(m, x, F16(other)); }

LOCKSTEP_SIMD float LargestOf(int64_t n, const float* x) {
  F16 best(kNegativeInfinity);
  ForEachVector(n, [&](int64_t i, auto m) {
    best = Maximum(OnlyLanes(Load(x + i, m), m, kNegativeInfinity), best);
  });
  return MaximumLane(best);
}

// Whether x[label] is the first of the largest.
LOCKSTEP_SIMD bool IsFirstLargest(int64_t n, const float* x, int32_t label, float largest) {
  if (!(x[label] == largest)) return false;
  for (int64_t i = 0; i < label; ++i) {
    if (x[i] == largest) return false;
  }
  return label < n;
}

}  // namespace lockstep::device::LOCKSTEP_ISA
