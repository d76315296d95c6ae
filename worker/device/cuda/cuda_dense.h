// Dense on matrix products. Thread-safe as worker/device/device.h says: Pack excludes
// the other calls.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "worker/device/cuda/blas.h"
#include "worker/device/device.h"

namespace lockstep::device::cuda {

// InvalidArgument for sizes that are not positive; otherwise errors of the library, which is used
// here only. BackwardWeight serves leaves of the numbers of rows that are listed;
// the other calls every number.
absl::StatusOr<std::unique_ptr<Dense>> MakeCudaDense(Blas& blas, const DenseShape& shape,
                                                     absl::Span<const int64_t> rows);

}  // namespace lockstep::device::cuda
