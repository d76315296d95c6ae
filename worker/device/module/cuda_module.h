// The CUDA backend is a module beside the programs (liblockstep_cuda.so), loaded when a job or
// person first asks for a GPU: the same programs run on machines that have neither driver nor
// libraries. Here is what the programs know of it.
//
// The libraries that the module needs (cuBLASLt, cuDNN, NCCL) are looked for, each in this order,
// in the folders of $LOCKSTEP_CUDA_LIBS, the toolkit ($CUDA_HOME, /usr/local/cuda), nvidia/*/lib
// beside a torch that python3 can import, and where the system's loader looks. The module is
// $LOCKSTEP_CUDA_MODULE, or liblockstep_cuda.so in the program's folder or ../lib of it.
//
// Thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/device/device.h"

namespace lockstep::collective {
struct NcclModule;  // worker/collective/nccl_module.h
}

namespace lockstep::device {

struct GpuInfo {
  int ordinal = 0;
  std::string name;          // "NVIDIA H200"
  std::string uuid;          // no other has it: "GPU-1c6a..."
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  uint64_t memory_bytes = 0, free_bytes = 0;
  std::vector<int> peers;  // GPUs whose memory it reaches directly
  std::string cannot_use;  // why not; empty: it can be used
};

struct CudaReport {
  std::string driver, runtime;        // CUDA versions, "13.0"; driver "" without one
  std::string cublaslt, cudnn, nccl;  // versions; "" where it could not be loaded
  std::vector<GpuInfo> gpus;
  std::string problem;  // why there are none, and what to do; empty: there are some
};

// What the module exports, as `lockstep_cuda_module`. Both sides are of one build.
struct CudaModule {
  const char* build = nullptr;
  absl::StatusOr<std::unique_ptr<Device>> (*make_device)(int ordinal) = nullptr;
  CudaReport (*report)() = nullptr;
  const collective::NcclModule* nccl = nullptr;
};
inline constexpr char kCudaModuleSymbol[] = "lockstep_cuda_module";

// Loads it, once for the process. NotFound: the module or a library is missing, named with the
// folders that were searched; FailedPrecondition: it is of another build.
absl::StatusOr<const CudaModule*> LoadCudaModule();

// Where each library was found (a path, or "by the system's loader"), or "" and where not.
struct FoundLibrary {
  std::string name, path;
};
struct LibrarySearch {
  std::vector<std::string> folders;
  std::vector<FoundLibrary> libraries;
};
// Of the first LoadCudaModule.
const LibrarySearch& CudaLibraries();

}  // namespace lockstep::device
