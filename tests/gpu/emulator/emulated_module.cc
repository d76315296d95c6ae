// In place of worker/device/module: the CUDA backend and the emulator are part of the program.
#include "worker/device/module/cuda_module.h"

extern "C" const lockstep::device::CudaModule* lockstep_cuda_module();

namespace lockstep::device {

absl::StatusOr<const CudaModule*> LoadCudaModule() { return lockstep_cuda_module(); }

const LibrarySearch& CudaLibraries() {
  static const auto* search = new LibrarySearch();
  return *search;
}

}  // namespace lockstep::device
