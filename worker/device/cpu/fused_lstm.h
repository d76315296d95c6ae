// Lstm on hand-written kernels: one product for all gates of all steps' inputs, then each step's
// recurrent product with the cell's arithmetic on its tiles (worker/device/cpu/kernels/lstm.cc);
// the gradients of each weight are one product over all steps. Thread-safe as
// worker/device/device.h says: Pack excludes the other calls.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "worker/device/cpu/kernels.h"
#include "worker/device/device.h"

namespace lockstep::device {

// InvalidArgument for sizes that are not positive, ResourceExhausted for packed weights that find
// no memory. Serves every number of rows up to the largest listed.
absl::StatusOr<std::unique_ptr<Lstm>> MakeFusedLstm(const CpuKernels& kernels,
                                                    const LstmShape& shape,
                                                    absl::Span<const int64_t> rows);

}  // namespace lockstep::device
