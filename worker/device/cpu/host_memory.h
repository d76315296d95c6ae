// Memory of the host for the CPU device. Owned by whoever holds the pointer; not shared.
#pragma once

#include <cstddef>
#include <memory>

#include "worker/device/device.h"

namespace lockstep::device {

// Zeroed, 64-byte aligned; pages are touched by the thread that first uses them. Null where the
// system has no such memory. Zero bytes give a valid pointer.
std::unique_ptr<Memory> AllocateHostMemory(size_t bytes);

}  // namespace lockstep::device
