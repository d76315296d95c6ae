// The GPU behind the waist: memory and streams of the CUDA runtime, the hand-written kernels
// (kernels.h), dense layers and LSTMs on cuBLASLt, convolutions on cuDNN.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/device/device.h"

namespace lockstep::device::cuda {

// How many GPUs the driver shows; fails with what to do where it shows none.
absl::StatusOr<int> CountGpus();

// Device `ordinal` of the process. Fails where there is no such GPU, its architecture is older than
// any that the kernels were built for (FailedPrecondition), or a library cannot be used.
absl::StatusOr<std::unique_ptr<Device>> MakeCudaDevice(int ordinal);

}  // namespace lockstep::device::cuda
