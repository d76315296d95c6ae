// Kernels of which kernel_code.py must find one wrong with each of its rules.
#include "worker/device/cuda/launch.h"
#include "worker/device/cuda/warpgroup.h"

using namespace lockstep::device::cuda;

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

// Sums are changed while products are under way.
__global__ void Serial(float* y, int steps) {
  WaitForPrevious();
  if constexpr (kHasWarpgroups) {
    const SharedMatrix a = MatrixIn(AlignMatrix(SharedMemory<char>()));
    float sums[8][4] = {};
    for (int step = 0; step < steps; ++step) {
      BeginProducts();
      for (int i = 0; i < 4; ++i) MultiplyWarpgroup<64>(sums, Behind(a, i * 32), Behind(a, i * 32));
      CommitProducts();
      sums[0][0] += 1;
      WaitForProducts<0>();
    }
    for (int i = 0; i < 8; ++i) y[threadIdx.x * 8 + i] = sums[i][0];
  }
}

__global__ void Idle(const float* x, float* y) {
  if (threadIdx.x == 0) return;
  WaitForPrevious();
  y[threadIdx.x] = x[threadIdx.x];
}
