#include "worker/machine/machine.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/fs.h"
#include "common/host.h"
#include "worker/collective/nccl_module.h"
#include "worker/device/cpu/cpu_device.h"

namespace lockstep::machine {
namespace {

namespace fs = std::filesystem;

// Of a file of /proc or /sys, "" where there is none.
std::string FirstLine(const std::string& path) {
  std::string line;
  std::ifstream file(path);
  std::getline(file, line);
  return line;
}

std::string CpuModel() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (!absl::StartsWith(line, "model name")) continue;
    const size_t colon = line.find(':');
    if (colon == std::string::npos) break;
    std::string model = line.substr(colon + 1);
    absl::RemoveExtraAsciiWhitespace(&model);
    return model;
  }
  return "";
}

CpuFacts LookAtCpu() {
  CpuFacts cpu;
  cpu.model = CpuModel();
  cpu.cores = AvailableCores();
  const int64_t pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  if (pages > 0 && page > 0) cpu.memory_bytes = static_cast<uint64_t>(pages) * page;
  const auto device = device::MakeCpuDevice();
  if (device.ok()) {
    cpu.fingerprint = (*device)->fingerprint(device::Precision::kFp32);
  } else {
    cpu.cannot_use = std::string(device.status().message());
  }
  return cpu;
}

// "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Wed ...": the first word that looks
// like a version.
std::string KernelDriver() {
  const std::string line = FirstLine("/proc/driver/nvidia/version");
  for (absl::string_view word : absl::StrSplit(line, ' ', absl::SkipEmpty())) {
    if (absl::ascii_isdigit(word[0]) && absl::StrContains(word, '.')) return std::string(word);
  }
  return "";
}

int PciGpus() {
  constexpr char kNvidia[] = "0x10de";
  constexpr char kDisplayController[] = "0x03";
  int count = 0;
  std::error_code error;
  for (fs::directory_iterator it("/sys/bus/pci/devices", error), end; !error && it != end;
       it.increment(error)) {
    count += FirstLine(it->path() / "vendor") == kNvidia &&
             absl::StartsWith(FirstLine(it->path() / "class"), kDisplayController);
  }
  return count;
}

DriverFacts LookAtDriver() {
  DriverFacts driver;
  driver.kernel_module = KernelDriver();
  driver.pci_gpus = PciGpus();
  // Never closed: the driver is not made to be unloaded.
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return driver;
  const auto get_version = reinterpret_cast<int (*)(int*)>(dlsym(library, "cuDriverGetVersion"));
  int version = 0;
  if (get_version != nullptr && get_version(&version) == 0 && version > 0) {
    driver.cuda = absl::StrCat(version / 1000, ".", version % 1000 / 10);
  }
  return driver;
}

ModuleFacts LookAtModule() {
  ModuleFacts facts;
  const absl::StatusOr<const device::CudaModule*> module = device::LoadCudaModule();
  facts.search = device::CudaLibraries();
  facts.status = module.status();
  if (!module.ok()) return facts;
  Dl_info info{};
  if (dladdr(*module, &info) != 0 && info.dli_fname != nullptr) facts.path = info.dli_fname;
  facts.report = (*module)->report();
  if (!facts.report.gpus.empty()) {
    if (const auto nccl = (*module)->nccl->version(); nccl.ok()) {
      facts.report.nccl = absl::StrCat("nccl ", *nccl);
    }
  }
  return facts;
}

DataFacts LookAtData() {
  DataFacts data;
  const char* root = std::getenv("LOCKSTEP_DATA");
  if (root == nullptr || *root == '\0') return data;
  data.root = root;
  data.exists = RealFileSystem().IsDirectory(data.root);
  const absl::StatusOr<std::vector<DirectoryEntry>> entries = ListDirectory(data.root);
  if (!entries.ok()) return data;
  for (const DirectoryEntry& entry : *entries) {
    if (RealFileSystem().IsDirectory(JoinPath(data.root, entry.name))) {
      data.folders.push_back(entry.name);
    }
  }
  return data;
}

}  // namespace

MachineFacts LookAtMachine() {
  MachineFacts facts;
  facts.cpu = LookAtCpu();
  facts.driver = LookAtDriver();
  facts.module = LookAtModule();
  // The module's way to it is the one that counts.
  if (facts.module.status.ok()) facts.driver.cuda = facts.module.report.driver;
  facts.data = LookAtData();
  return facts;
}

}  // namespace lockstep::machine
