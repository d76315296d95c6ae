// What worker/device/cuda/warpgroup.h declares, on the SIMT emulator. Products are exact and are
// added in their order, in fp32, when they are waited for.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lockstep::device::cuda {

struct SharedMatrix {
  const char* at;
  bool swizzled;
  int next_rows, next_terms;  // bytes
};
inline SharedMatrix MatrixIn(const void* shared, int next_columns = 0) {
  return {static_cast<const char*>(shared), true, next_columns, 0};
}
inline SharedMatrix MatrixOfPieces(const void* shared, int next_rows, int next_terms) {
  return {static_cast<const char*>(shared), false, next_rows, next_terms};
}
inline SharedMatrix Behind(SharedMatrix matrix, int bytes) {
  matrix.at += bytes;
  return matrix;
}
inline char* AlignMatrix(char* p) {
  return p + (-reinterpret_cast<uintptr_t>(p) & (kSwizzledAlignment - 1));
}
void ShowToProducts();
inline void BeginProducts() {}
void CommitProducts();
void WaitForProducts(int but);
template <int kBut>
void WaitForProducts() {
  WaitForProducts(kBut);
}
template <int kCount>
void KeepSums(float (&)[kCount][4]) {}
// The running thread's part.
void MultiplyLater(float* sums, int columns, bool transposed, const SharedMatrix& a,
                   const SharedMatrix& b);
template <int kColumns, bool kTransposed = false>
void MultiplyWarpgroup(float (&sums)[kColumns / 8][4], SharedMatrix a, SharedMatrix b) {
  MultiplyLater(sums[0], kColumns, kTransposed, a, b);
}

}  // namespace lockstep::device::cuda
