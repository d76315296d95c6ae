// What the module liblockstep_cuda.so exports.
#include "worker/device/module/cuda_module.h"

#include <cuda_runtime.h>

#include "absl/strings/str_cat.h"
#include "worker/device/cuda/blas.h"
#include "worker/device/cuda/cuda_device.h"
#include "worker/device/cuda/cuda_status.h"
#include "worker/device/cuda/dnn.h"

namespace lockstep::collective {
const NcclModule* GetNcclModule();
}

namespace lockstep::device::cuda {
namespace {

// As nvidia-smi writes it.
std::string UuidText(const cudaUUID_t& uuid) {
  std::string text = "GPU";
  for (int i = 0; i < 16; ++i) {
    const bool dash = i == 0 || i == 4 || i == 6 || i == 8 || i == 10;
    absl::StrAppend(&text, dash ? "-" : "",
                    absl::Hex(static_cast<unsigned char>(uuid.bytes[i]), absl::kZeroPad2));
  }
  return text;
}

std::string CudaVersion(int version) {
  return version == 0 ? "" : absl::StrCat(version / 1000, ".", version % 1000 / 10);
}

GpuInfo DescribeGpu(int ordinal, int count) {
  GpuInfo gpu;
  gpu.ordinal = ordinal;
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, ordinal);
  if (error != cudaSuccess) {
    gpu.cannot_use = std::string(ToStatus(error, "asking about it").message());
    return gpu;
  }
  gpu.name = properties.name;
  gpu.uuid = UuidText(properties.uuid);
  gpu.major = properties.major;
  gpu.minor = properties.minor;
  gpu.multiprocessors = properties.multiProcessorCount;
  gpu.memory_bytes = properties.totalGlobalMem;
  for (int other = 0; other < count; ++other) {
    int can = 0;
    if (other != ordinal && cudaDeviceCanAccessPeer(&can, ordinal, other) == cudaSuccess && can) {
      gpu.peers.push_back(other);
    }
  }
  const auto device = MakeCudaDevice(ordinal);
  if (!device.ok()) gpu.cannot_use = std::string(device.status().message());
  size_t free = 0, total = 0;
  if (cudaMemGetInfo(&free, &total) == cudaSuccess) gpu.free_bytes = free;
  cudaGetLastError();
  return gpu;
}

CudaReport Report() {
  CudaReport report;
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess) report.driver = CudaVersion(version);
  if (cudaRuntimeGetVersion(&version) == cudaSuccess) report.runtime = CudaVersion(version);
  const absl::StatusOr<int> gpus = CountGpus();
  if (!gpus.ok()) report.problem = std::string(gpus.status().message());
  const int count = gpus.value_or(0);
  for (int i = 0; i < count; ++i) report.gpus.push_back(DescribeGpu(i, count));
  if (count > 0) {
    if (const auto blas = MakeBlas(); blas.ok()) report.cublaslt = (*blas)->version();
    if (const auto dnn = MakeDnn(); dnn.ok()) report.cudnn = (*dnn)->version();
  }
  return report;
}

}  // namespace
}  // namespace lockstep::device::cuda

extern "C" __attribute__((visibility("default"))) const lockstep::device::CudaModule*
lockstep_cuda_module() {
  static const lockstep::device::CudaModule module = {
      LOCKSTEP_MODULE_BUILD, lockstep::device::cuda::MakeCudaDevice, lockstep::device::cuda::Report,
      lockstep::collective::GetNcclModule()};
  return &module;
}
