// The runtime's errors as Status. Thread-safe.
#pragma once

#include <cuda_runtime.h>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace lockstep::device::cuda {

// ResourceExhausted for memory; FailedPrecondition where the driver or the GPU is too old; else
// Internal, also where the GPU is lost (Device::Check tells). `what` is what was being done.
absl::Status ToStatus(cudaError_t error, absl::string_view what);

}  // namespace lockstep::device::cuda
