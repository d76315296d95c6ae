// Conv2d on oneDNN: convolution primitives, one set per number of rows. Activations are plain NHWC;
// weights are packed into the library's own layouts, one copy per layout that the primitives asked
// for, shared by all streams. In bf16 factors are rounded by our own kernel.
// Thread-safe as worker/device/device.h says: Pack excludes the other calls.
#pragma once

#include <dnnl.hpp>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "worker/device/cpu/kernels.h"
#include "worker/device/cpu/onednn_call.h"
#include "worker/device/device.h"

namespace lockstep::device {

struct OnednnContext {
  dnnl::engine engine;
  std::shared_ptr<CallNumbers> numbers;
  CpuKernels kernels;
  bool bf16 = false;  // has primitives of bf16
};

// InvalidArgument for shapes that are none; Internal names what oneDNN refused.
absl::StatusOr<std::unique_ptr<Conv2d>> MakeOnednnConv2d(const OnednnContext& context,
                                                         const Conv2dShape& shape,
                                                         absl::Span<const int64_t> rows);

}  // namespace lockstep::device
