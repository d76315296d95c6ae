// Lstm on the vendor's matrix products and hand-written steps: one product for all gates of all
// steps' inputs, then the steps of the rows of all leaves together, in one kernel where the GPU has
// room for the units (lstm_steps.cu), else each a recurrent product and the cells behind it
// (lstm.cu). A leaf's gradient of each weight is one product over all steps.
// Thread-safe as worker/device/device.h says: Pack excludes the other calls.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "worker/device/cuda/blas.h"
#include "worker/device/device.h"

namespace lockstep::device::cuda {

// InvalidArgument for sizes that are not positive; otherwise errors of the device and the library,
// which are used here only. Leaves have the numbers of rows that are listed; Forward, and Backward
// of leaves together, take up to shape.most_rows.
absl::StatusOr<std::unique_ptr<Lstm>> MakeCudaLstm(Device& device, Blas& blas,
                                                   const LstmShape& shape,
                                                   absl::Span<const int64_t> rows);

}  // namespace lockstep::device::cuda
