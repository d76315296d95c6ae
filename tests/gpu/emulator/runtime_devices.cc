// The CUDA runtime of the emulator: errors, devices, and what kernels may ask for.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>

#include "tests/gpu/emulator/runtime.h"
#include "tests/gpu/emulator/simt.h"

using namespace lockstep::emulator;  // NOLINT: the runtime's functions have no namespace

using Lock = std::lock_guard<std::mutex>;

cudaError_t cudaGetLastError() {
  const cudaError_t error = cudaPeekAtLastError();
  ThreadState().last = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() {
  Emulator& e = E();
  const Lock lock(e.mutex);
  const Local& local = ThreadState();
  if (static_cast<size_t>(local.device) < e.devices.size() &&
      e.devices[local.device].lost != cudaSuccess) {
    return e.devices[local.device].lost;
  }
  return local.last;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = E().options.driver_version;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  *count = 0;
  if (e.options.driver_version < CUDART_VERSION / 1000 * 1000) {
    return Return(cudaErrorInsufficientDriver);
  }
  if (e.devices.empty()) return Return(cudaErrorNoDevice);
  *count = static_cast<int>(e.devices.size());
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  if (e.options.driver_version < CUDART_VERSION / 1000 * 1000) {
    return Return(cudaErrorInsufficientDriver);
  }
  if (e.devices.empty()) return Return(cudaErrorNoDevice);
  if (device < 0 || static_cast<size_t>(device) >= e.devices.size()) {
    return Return(cudaErrorInvalidDevice);
  }
  ThreadState().device = device;
  return Return(e.devices[device].lost);
}

cudaError_t cudaSetDeviceFlags(unsigned flags) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
  const bool one = (flags & (flags - 1)) == 0;  // of the ways to wait
  return Return(one && flags <= cudaDeviceScheduleBlockingSync ? cudaSuccess
                                                               : cudaErrorInvalidValue);
}

cudaError_t cudaInitDevice(int device, unsigned, unsigned) { return cudaSetDevice(device); }

cudaError_t cudaGetDevice(int* device) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  *device = ThreadState().device;
  const cudaError_t error = Usable(e);
  return Return(error);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  if (e.options.driver_version < CUDART_VERSION / 1000 * 1000) {
    return Return(cudaErrorInsufficientDriver);
  }
  if (device < 0 || static_cast<size_t>(device) >= e.devices.size()) {
    return Return(cudaErrorInvalidDevice);
  }
  *properties = {};
  std::string name = e.options.name;
  if (e.devices.size() > 1) name += " " + std::to_string(device);
  std::snprintf(properties->name, sizeof(properties->name), "%s", name.c_str());
  properties->uuid.bytes[0] = 'E';
  properties->uuid.bytes[15] = static_cast<char>(device);
  properties->totalGlobalMem = e.options.memory;
  properties->sharedMemPerBlock = kSharedBytes;
  properties->sharedMemPerBlockOptin = kMostSharedBytes;
  properties->sharedMemPerMultiprocessor = kMostSharedBytes + 1024;
  properties->reservedSharedMemPerBlock = 1024;
  properties->regsPerBlock = 65536;
  properties->warpSize = warpSize;
  properties->maxThreadsPerBlock = kMostThreads;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 0x7fffffff;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->major = e.options.major;
  properties->minor = e.options.minor;
  properties->multiProcessorCount = e.options.multiprocessors;
  properties->l2CacheSize = 50 << 20;
  properties->pciBusID = device + 1;
  properties->ECCEnabled = 1;
  properties->canMapHostMemory = 1;
  properties->unifiedAddressing = 1;
  properties->concurrentKernels = 1;
  properties->asyncEngineCount = 3;
  properties->memoryBusWidth = 5120;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  if (const cudaError_t error = cudaGetDeviceProperties(&p, device); error != cudaSuccess) {
    return error;
  }
  const auto give = [value](auto v) {
    *value = static_cast<int>(v);
    return cudaSuccess;
  };
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      return give(p.maxThreadsPerBlock);
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return give(p.sharedMemPerBlock);
    case cudaDevAttrWarpSize:
      return give(p.warpSize);
    case cudaDevAttrMultiProcessorCount:
      return give(p.multiProcessorCount);
    case cudaDevAttrIntegrated:
      return give(p.integrated);
    case cudaDevAttrEccEnabled:
      return give(p.ECCEnabled);
    case cudaDevAttrPciBusId:
      return give(p.pciBusID);
    case cudaDevAttrPciDeviceId:
      return give(p.pciDeviceID);
    case cudaDevAttrL2CacheSize:
      return give(p.l2CacheSize);
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return give(p.maxThreadsPerMultiProcessor);
    case cudaDevAttrPciDomainId:
      return give(p.pciDomainID);
    case cudaDevAttrComputeCapabilityMajor:
      return give(p.major);
    case cudaDevAttrComputeCapabilityMinor:
      return give(p.minor);
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return give(p.sharedMemPerMultiprocessor);
    case cudaDevAttrPageableMemoryAccess:
      return give(p.pageableMemoryAccess);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return give(p.sharedMemPerBlockOptin);
  }
  return Return(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  cudaDeviceProp p;
  if (const cudaError_t error = cudaGetDeviceProperties(&p, device); error != cudaSuccess) {
    return error;
  }
  std::snprintf(id, static_cast<size_t>(length), "%08X:%02X:%02X.0", p.pciDomainID, p.pciBusID,
                p.pciDeviceID);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  Emulator& e = E();
  int device;
  {
    const Lock lock(e.mutex);
    device = ThreadState().device;
    if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
    if (const cudaError_t error = UnsafeInCapture(e); error != cudaSuccess) return Return(error);
  }
  return Return(Quiet(e, device));
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  const int devices = static_cast<int>(e.devices.size());
  if (device < 0 || peer < 0 || device >= devices || peer >= devices) {
    return Return(cudaErrorInvalidDevice);
  }
  *can = device != peer;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
  const int device = ThreadState().device;
  if (peer < 0 || static_cast<size_t>(peer) >= e.devices.size() || peer == device) {
    return Return(cudaErrorInvalidDevice);
  }
  if (flags != 0) return Return(cudaErrorInvalidValue);
  return Return(e.devices[device].peers.insert(peer).second ? cudaSuccess
                                                            : cudaErrorPeerAccessAlreadyEnabled);
}

cudaError_t cudaDeviceDisablePeerAccess(int peer) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
  return Return(e.devices[ThreadState().device].peers.erase(peer) > 0
                    ? cudaSuccess
                    : cudaErrorPeerAccessNotEnabled);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > kMostSharedBytes) {
    return Return(cudaErrorInvalidValue);
  }
  e.shared_limits[function] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
  const int architecture = 10 * e.options.major + e.options.minor;
  attributes->ptxVersion = attributes->binaryVersion = std::min(architecture, __CUDA_ARCH__ / 10);
  return cudaSuccess;
}
