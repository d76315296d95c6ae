// Walking {n, channels} with lanes as channels, shared by the kernels of batch norm. Rows are
// summed in float over fixed blocks, and blocks are merged in double. Thread-safe: pure functions.
#pragma once

#include <cstdint>

#include "worker/device/cpu/simd.h"

namespace lockstep::device::LOCKSTEP_ISA {

constexpr int64_t kBlock = 32;  // rows

template <int kVectors>
struct Width {
  static constexpr int value = kVectors;
};

// Calls body(first channel, Width<vectors>, mask) for tiles that cover the channels.
template <class Body>
LOCKSTEP_SIMD void ForEachTile(int64_t channels, Body body) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes) body(c, Width<4>(), All());
  for (; c + 2 * kLanes <= channels; c += 2 * kLanes) body(c, Width<2>(), All());
  for (; c + kLanes <= channels; c += kLanes) body(c, Width<1>(), All());
  if (c < channels) body(c, Width<1>(), FirstLanes(channels - c));
}

LOCKSTEP_SIMD int64_t BlockRows(int64_t row, int64_t n) {
  return n - row < kBlock ? n - row : kBlock;
}

LOCKSTEP_SIMD F16 InverseDeviationOf(const float* m2, int64_t n, float epsilon, auto m) {
  return InverseDeviation(Load(m2, m) / F16(static_cast<float>(n)), F16(epsilon));
}

}  // namespace lockstep::device::LOCKSTEP_ISA
