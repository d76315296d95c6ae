// The products of floats.
#include "worker/device/cpu/kernels/gemm_products.h"
#include "worker/device/cpu/kernels/kernel_functions.h"

namespace lockstep::device::LOCKSTEP_ISA {

void Gemm(const GemmShape& s, const float* a, const float* b, const float* bias, float* c) {
  Product<Floats>(s, a, b, bias, c);
}

void DenseForward(int64_t rows, int64_t in, int64_t out, const float* x, const float* w,
                  const float* bias, bool relu, float* y, float* scratch) {
  ForwardProduct<Floats>(rows, in, out, x, w, bias, relu, y, scratch);
}

void DenseWeightGradient(const LeafFold& fold, int64_t in, int64_t out, const int64_t* rows,
                         const float* const* x, const float* const* dy, float* const* dw) {
  WeightGradient<Floats>(fold, in, out, rows, x, dy, dw);
}

void PackTransposed(int64_t rows, int64_t columns, const float* w, float* packed) {
  for (int64_t first = 0; first < rows; first += kGemmPanel) {
    const int64_t width = rows - first < kGemmPanel ? rows - first : kGemmPanel;
    for (int64_t k = 0; k < columns; ++k, packed += kGemmPanel) {
      for (int64_t j = 0; j < width; ++j) packed[j] = w[(first + j) * columns + k];
    }
  }
}

}  // namespace lockstep::device::LOCKSTEP_ISA
