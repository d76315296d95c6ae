// What this machine can compute on, and where something cannot be used, why: `lockstep-worker
// --probe`, which `lockstep doctor` shows.
//
// Thread-safe.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "nlohmann/json.hpp"
#include "worker/device/module/cuda_module.h"

namespace lockstep::machine {

struct CpuFacts {
  std::string model;  // "" where the kernel does not say
  int cores = 1;      // that this process may run on
  uint64_t memory_bytes = 0;
  std::string fingerprint;  // the CPU device's; "" where it cannot be used
  std::string cannot_use;   // why not, and what to do
};

// Of NVIDIA's driver, found without the CUDA module, so that a build without it can tell too.
struct DriverFacts {
  std::string cuda;           // the newest CUDA that libcuda.so.1 serves, "13.0"; "" without it
  std::string kernel_module;  // version, "580.65.06"; "" where it is not loaded
  int pci_gpus = 0;           // NVIDIA's display controllers on the PCI bus
};

struct ModuleFacts {
  std::string path;     // of the loaded module, else ""
  absl::Status status;  // of LoadCudaModule
  device::CudaReport report;
  device::LibrarySearch search;
};

struct DataFacts {
  std::string root;                  // $LOCKSTEP_DATA; "" where it is not set
  bool exists = false;               // as a folder
  std::vector<std::string> folders;  // in it, sorted
};

struct MachineFacts {
  CpuFacts cpu;
  DriverFacts driver;
  ModuleFacts module;
  DataFacts data;
};

// Loads the CUDA module and makes a device of each GPU: takes seconds.
MachineFacts LookAtMachine();

// One object; what was not found is "", 0 or empty:
//   {cpu: {model, cores, memory_bytes, instruction_set, fingerprint, cannot_use},
//    cuda: {driver, kernel_driver, pci_gpus, module (path), module_error, runtime, cublaslt, cudnn,
//           nccl, libraries: [{name, path}], folders,
//           gpus: [{ordinal, name, compute_capability, multiprocessors, memory_bytes, free_bytes,
//                   peers, cannot_use}], problems: [{problem, advice}]},
//    data: {root, exists, folders}}
// `problems` has all that stands between the machine and the use of each GPU, the first cause
// first.
nlohmann::ordered_json MachineJson(const MachineFacts& facts);

}  // namespace lockstep::machine
