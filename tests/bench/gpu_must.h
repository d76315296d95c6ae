// What the GPU's benchmarks do about a call of the runtime that fails.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

namespace lockstep::device::cuda {

// Ends the program where there is an error, and says what failed.
inline void Must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

}  // namespace lockstep::device::cuda
