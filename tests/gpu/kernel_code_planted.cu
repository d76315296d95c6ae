// Kernels of which kernel_code.py must find one wrong with each of its rules.
#include "worker/device/cuda/launch.h"

using lockstep::device::cuda::WaitForPrevious;

// An array that is indexed by what is only known at run time has to lie in memory.
__global__ void Spilling(const float* x, const int* at, float* y) {
  WaitForPrevious();
  float values[16];
  for (int i = 0; i < 16; ++i) values[at[i]] = x[i];
  for (int i = 0; i < 16; ++i) y[i] = values[at[i + 16]];
}

__global__ void Narrow(const float* x, float* y) {
  WaitForPrevious();
  y[threadIdx.x] = x[threadIdx.x] + 1;
}

__global__ void Wide(const float4* x, float* y) {
  WaitForPrevious();
  const float4 four = x[threadIdx.x];
  y[threadIdx.x] = four.x + four.y + four.z + four.w;
}

__global__ void Hasty(const float* x, float* y) {
  const float one = x[threadIdx.x];
  WaitForPrevious();
  y[threadIdx.x] = one;
}

__global__ void Idle(const float* x, float* y) {
  if (threadIdx.x == 0) return;
  WaitForPrevious();
  y[threadIdx.x] = x[threadIdx.x];
}
