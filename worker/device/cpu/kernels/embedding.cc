// Rows of a table at positions that are floats.
#include "worker/device/cpu/kernels/kernel_functions.h"
#include "worker/device/cpu/simd.h"

namespace lockstep::device::LOCKSTEP_ISA {
namespace {

// The row of a position, or -1.
LOCKSTEP_SIMD int64_t RowOf(float x, int64_t vocabulary) {
  const float last = static_cast<float>(vocabulary - 1);  // exact: at most 2^24
  if (!(x >= -0.5f && x <= last + 0.5f)) return -1;
  const auto row = static_cast<int64_t>(x + 0.5f);
  return row < vocabulary ? row : vocabulary - 1;
}

}  // namespace

void EmbeddingForward(int64_t n, int64_t vocabulary, int64_t features, const float* x,
                      const float* weight, float* y) {
  for (int64_t p = 0; p < n; ++p, y += features) {
    const int64_t row = RowOf(x[p], vocabulary);
    if (row < 0) {
      ForEachVector(features, [=](int64_t i, auto m) { Store(y + i, F16(__builtin_nanf("")), m); });
      continue;
    }
    const float* from = weight + row * features;
    ForEachVector(features, [=](int64_t i, auto m) { Store(y + i, Load(from + i, m), m); });
  }
}

void EmbeddingBackward(int64_t n, int64_t vocabulary, int64_t features, const float* x,
                       const float* dy, float* dweight) {
  ForEachVector(vocabulary * features,
                [=](int64_t i, auto m) { Store(dweight + i, F16(0.0f), m); });
  for (int64_t p = 0; p < n; ++p, dy += features) {
    const int64_t row = RowOf(x[p], vocabulary);
    if (row < 0) continue;
    float* to = dweight + row * features;
    ForEachVector(features,
                  [=](int64_t i, auto m) { Store(to + i, Load(to + i, m) + Load(dy + i, m), m); });
  }
}

}  // namespace lockstep::device::LOCKSTEP_ISA
