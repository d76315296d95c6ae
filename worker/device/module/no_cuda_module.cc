#include "worker/device/module/cuda_module.h"

namespace lockstep::device {

absl::StatusOr<const CudaModule*> LoadCudaModule() {
  return absl::UnimplementedError(
      "this build has no CUDA backend; build where the CUDA toolkit, cuDNN and NCCL are installed "
      "(cmake -DLOCKSTEP_CUDA=ON says what is missing)");
}

const LibrarySearch& CudaLibraries() {
  static const auto* search = new LibrarySearch();
  return *search;
}

}  // namespace lockstep::device
