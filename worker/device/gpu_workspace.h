// Known without a GPU, for who reckons with its memory.
#pragma once

#include <cstddef>

namespace lockstep::device {

// Of a GPU's stream: memory for what one call's kernels hand each other (Device::stream_bytes).
constexpr size_t kGpuWorkspaceBytes = size_t{16} << 20;

}  // namespace lockstep::device
