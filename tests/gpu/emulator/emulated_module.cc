// In place of worker/device/module: the CUDA backend and the emulator are part of the program.
#include <malloc.h>

#include "worker/device/module/cuda_module.h"

extern "C" const lockstep::device::CudaModule* lockstep_cuda_module();

namespace lockstep::device {

absl::StatusOr<const CudaModule*> LoadCudaModule() {
  // Buffers and their copies come and go by the dozens of MiB: for most of the time of tests, if
  // each were new pages of the system.
  static const bool keep = mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, 1 << 30) == 1;
  static_cast<void>(keep);
  return lockstep_cuda_module();
}

const LibrarySearch& CudaLibraries() {
  static const auto* search = new LibrarySearch();
  return *search;
}

}  // namespace lockstep::device
