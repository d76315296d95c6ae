// The CPU as a device: oneDNN for dense and convolution, our own vector code for the rest.
// One thread per slot, single-threaded primitives, no OpenMP team; streams are the calling thread.
// The device is thread-safe; see worker/device/device.h.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "worker/device/device.h"

namespace lockstep::device {

// Unimplemented where the processor lacks AVX2 and FMA.
absl::StatusOr<std::unique_ptr<Device>> MakeCpuDevice();

}  // namespace lockstep::device
