// Copies between layouts: padding, cropping, subsampling, concatenation, transposition.
#include "worker/device/cpu/kernels/kernel_functions.h"
#include "worker/device/cpu/simd.h"

namespace lockstep::device::LOCKSTEP_ISA {

void CopyStrided(const StridedCopy& copy, int64_t rows, const float* x, float* y) {
  const int64_t n = copy.size[2], from = copy.from[2], to = copy.to[2];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < copy.size[0]; ++i) {
      for (int64_t j = 0; j < copy.size[1]; ++j) {
        const float* source =
            x + r * copy.from_row + copy.from_begin + i * copy.from[0] + j * copy.from[1];
        float* target = y + r * copy.to_row + copy.to_begin + i * copy.to[0] + j * copy.to[1];
        if (from == 1 && to == 1) {
          ForEachVector(n, [=](int64_t k, auto m) { Store(target + k, Load(source + k, m), m); });
          continue;
        }
        for (int64_t k = 0; k < n; ++k) target[k * to] = source[k * from];
      }
    }
  }
}

}  // namespace lockstep::device::LOCKSTEP_ISA
