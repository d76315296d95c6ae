// How busy a GPU is, where NVIDIA's driver tells (NVML, found at run time).
//
// Thread-safe.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace lockstep::machine {

struct GpuUsage {
  int busy_percent = 0;     // of the driver's last sample: the time in which some kernel ran
  uint64_t used_bytes = 0;  // of its memory, by all processes
};

// Of the GPU with this identity ("GPU-1c6a..."); nothing where the driver does not tell.
std::optional<GpuUsage> ReadGpuUsage(const std::string& uuid);

}  // namespace lockstep::machine
