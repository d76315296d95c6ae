// The runtime's errors as Status. Thread-safe.
#pragma once

#include <cuda_runtime.h>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace lockstep::device::cuda {

// ResourceExhausted for memory; Unavailable where the GPU is lost or the process's context is
// broken, after which nothing works on it; else Internal. `what` is what was being done.
absl::Status ToStatus(cudaError_t error, absl::string_view what);

}  // namespace lockstep::device::cuda
