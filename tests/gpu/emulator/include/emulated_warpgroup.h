// What worker/device/cuda/warpgroup.h declares, on the SIMT emulator. Products are exact and are
// added in their order, in fp32, when they are waited for.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lockstep::device::cuda {

// A matrix that is read transposed says how far 64 columns are from the next: in its low bits,
// which are 0 in an address that is aligned.
inline SharedMatrix MatrixIn(const void* shared, int next_columns = 0) {
  return reinterpret_cast<uintptr_t>(shared) | static_cast<SharedMatrix>(next_columns / 1024);
}
inline SharedMatrix Behind(SharedMatrix matrix, int bytes) {
  return matrix + static_cast<SharedMatrix>(bytes);
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
void MultiplyLater(float* sums, int columns, bool transposed, SharedMatrix a, SharedMatrix b);
template <int kColumns, bool kTransposed = false>
void MultiplyWarpgroup(float (&sums)[kColumns / 8][4], SharedMatrix a, SharedMatrix b) {
  MultiplyLater(sums[0], kColumns, kTransposed, a, b);
}

}  // namespace lockstep::device::cuda
