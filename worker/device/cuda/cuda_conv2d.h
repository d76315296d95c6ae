// Conv2d on convolutions of ours in fp32, and on the vendor's in bf16: there one plan per number of
// rows, bias and activation in one pass of ours behind it. Thread-safe as worker/device/device.h
// says: Pack excludes the other calls.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "worker/device/cuda/dnn.h"
#include "worker/device/device.h"

namespace lockstep::device::cuda {

// InvalidArgument for shapes that are none; otherwise errors of the device and the library, which
// are used here only.
absl::StatusOr<std::unique_ptr<Conv2d>> MakeCudaConv2d(Device& device, Dnn& dnn,
                                                       const Conv2dShape& shape,
                                                       absl::Span<const int64_t> rows);

}  // namespace lockstep::device::cuda
