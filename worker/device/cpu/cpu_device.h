// The CPU as a device: oneDNN for convolution, our own vector code for the rest.
// One thread per slot, single-threaded primitives, no OpenMP team; streams are the calling thread.
// The device is thread-safe; see worker/device/device.h.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "worker/device/device.h"

namespace lockstep::device {

enum class CpuIsa { kAvx2, kAvx512, kAvx512Bf16 };

// With the best instruction set that the processor has. Unimplemented where it lacks AVX2 and FMA.
absl::StatusOr<std::unique_ptr<Device>> MakeCpuDevice();

// With the given one (Unimplemented where the processor lacks it). oneDNN is held to the
// instruction set of the process's first device; where that is another one, the fingerprint says
// so. kAvx512Bf16 differs from kAvx512 in bf16's speed, and in the bits of its convolutions.
absl::StatusOr<std::unique_ptr<Device>> MakeCpuDevice(CpuIsa isa);

}  // namespace lockstep::device
