// Dense on the hand-written gemm (worker/device/cpu/kernels/gemm.cc). oneDNN's inner product gives
// a row other bits when other rows share its call (its AVX2 path), and brings the weight gradient
// in a layout of its own; this does neither. Thread-safe as
// worker/device/device.h says: Pack excludes the other calls.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "worker/device/cpu/kernels.h"
#include "worker/device/device.h"

namespace lockstep::device {

// InvalidArgument for sizes that are not positive, ResourceExhausted for packed weights that find
// no memory. Serves every number of rows, not only those listed.
absl::StatusOr<std::unique_ptr<Dense>> MakeGemmDense(const CpuKernels& kernels,
                                                     const DenseShape& shape,
                                                     absl::Span<const int64_t> rows);

}  // namespace lockstep::device
