#include "worker/machine/gpu_usage.h"

#include <dlfcn.h>

namespace lockstep::machine {
namespace {

// Of nvml.h, which not every machine that builds this has; a function returns 0 where it succeeds.
struct Utilization {
  unsigned gpu, memory;
};
struct MemoryInfo {
  unsigned long long total, free, used;
};
struct Nvml {
  int (*handle_of)(const char* uuid, void** device) = nullptr;
  int (*utilization_of)(void* device, Utilization* utilization) = nullptr;
  int (*memory_of)(void* device, MemoryInfo* memory) = nullptr;
};

template <class Function>
bool Find(void* library, const char* name, Function** function) {
  *function = reinterpret_cast<Function*>(dlsym(library, name));
  return *function != nullptr;
}

// Null where there is none. Never closed: the driver is not made to be unloaded.
const Nvml* LoadNvml() {
  void* const library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return nullptr;
  int (*init)() = nullptr;
  static Nvml nvml;
  const bool found = Find(library, "nvmlInit_v2", &init) &&
                     Find(library, "nvmlDeviceGetHandleByUUID", &nvml.handle_of) &&
                     Find(library, "nvmlDeviceGetUtilizationRates", &nvml.utilization_of) &&
                     Find(library, "nvmlDeviceGetMemoryInfo", &nvml.memory_of);
  return found && init() == 0 ? &nvml : nullptr;
}

}  // namespace

std::optional<GpuUsage> ReadGpuUsage(const std::string& uuid) {
  static const Nvml* const nvml = LoadNvml();
  void* device = nullptr;
  Utilization utilization = {};
  MemoryInfo memory = {};
  if (nvml == nullptr || nvml->handle_of(uuid.c_str(), &device) != 0 ||
      nvml->utilization_of(device, &utilization) != 0 || nvml->memory_of(device, &memory) != 0) {
    return std::nullopt;
  }
  return GpuUsage{static_cast<int>(utilization.gpu), memory.used};
}

}  // namespace lockstep::machine
