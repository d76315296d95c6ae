// A table that kernels read, made once. Waits until it is there.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "common/status_macros.h"
#include "worker/device/device.h"

namespace lockstep::device {

template <class T>
absl::StatusOr<std::unique_ptr<Memory>> Upload(Device& device, const std::vector<T>& values) {
  const size_t bytes = sizeof(T) * values.size();
  ASSIGN_OR_RETURN(std::unique_ptr<Memory> memory, device.Allocate(std::max(bytes, sizeof(T))));
  ASSIGN_OR_RETURN(std::unique_ptr<Stream> stream, device.MakeStream());
  device.Copy(*stream, values.data(), memory->data(), bytes);
  RETURN_IF_ERROR(stream->Synchronize());
  return memory;
}

}  // namespace lockstep::device
