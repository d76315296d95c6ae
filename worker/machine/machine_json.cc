// What was found as JSON, with what is wrong and what to do about it.
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "worker/machine/machine.h"

namespace lockstep::machine {
namespace {

using nlohmann::ordered_json;

// The first that serves CUDA 13 (NVIDIA, CUDA Toolkit Release Notes, "CUDA Driver").
constexpr char kDriver[] = "driver 580 or later";
constexpr char kContainer[] =
    "in a container, start it with the host's GPUs (docker run --gpus all)";

struct Problem {
  std::string problem, advice;
};

int Major(absl::string_view version) {
  int major = 0;
  return absl::SimpleAtoi(version.substr(0, version.find('.')), &major) ? major : 0;
}

Problem NoDriver(const DriverFacts& driver) {
  if (!driver.kernel_module.empty()) {
    return {absl::StrCat("the kernel has NVIDIA's driver ", driver.kernel_module,
                         ", but libcuda.so.1 is not found"),
            absl::StrCat(kContainer,
                         "; else install the driver's libraries of the same version (Debian: "
                         "libcuda1, Ubuntu: libnvidia-compute)")};
  }
  if (driver.pci_gpus > 0) {
    return {absl::StrCat("there is no NVIDIA driver, but the PCI bus has ", driver.pci_gpus,
                         driver.pci_gpus == 1 ? " GPU of NVIDIA" : " GPUs of NVIDIA"),
            absl::StrCat("install ", kDriver,
                         " (from https://www.nvidia.com/drivers or the distribution) and restart; ",
                         kContainer)};
  }
  return {"there is no NVIDIA driver, and the PCI bus shows no GPU of NVIDIA",
          absl::StrCat("use a machine that has one, with ", kDriver, "; ", kContainer)};
}

// Why the driver shows no GPU.
Problem NoGpu(const DriverFacts& driver, const device::CudaReport& report) {
  if (driver.cuda.empty()) return NoDriver(driver);
  if (Major(driver.cuda) < Major(report.runtime)) {
    return {absl::StrCat("the NVIDIA driver is too old: it serves CUDA ", driver.cuda,
                         ", needed is ", report.runtime),
            absl::StrCat("update it to ", kDriver,
                         " (from https://www.nvidia.com/drivers or the distribution) and restart")};
  }
  return {report.problem.empty() ? "the NVIDIA driver shows no GPU" : report.problem,
          driver.kernel_module.empty()
              ? absl::StrCat("load the driver's kernel module (modprobe nvidia, or restart); ",
                             kContainer)
              : "see with nvidia-smi whether the driver has it, and whether CUDA_VISIBLE_DEVICES "
                "hides it"};
}

Problem MissingLibrary(const std::string& name) {
  const std::string what = absl::StartsWith(name, "libcudnn")  ? "cuDNN 9 for CUDA 13"
                           : absl::StartsWith(name, "libnccl") ? "NCCL 2 for CUDA 13"
                                                               : "the CUDA toolkit 13";
  return {absl::StrCat(name, " is not found"),
          absl::StrCat("install ", what,
                       " (a PyTorch for CUDA 13 that python3 imports brings it too), or name its "
                       "folder in LOCKSTEP_CUDA_LIBS")};
}

// Without what its messages say of what to do; that is here.
Problem NoModule(const ModuleFacts& module) {
  const std::string message(module.status.message());
  switch (module.status.code()) {
    case absl::StatusCode::kNotFound:
      // Libraries are looked for once there is a module.
      if (module.search.libraries.empty()) {
        return {
            "liblockstep_cuda.so is neither beside lockstep-worker nor in ../lib of it",
            "build with cmake -DLOCKSTEP_CUDA=ON, which says what it needs and does not find, or "
            "name the file in LOCKSTEP_CUDA_MODULE"};
      }
      return {message.substr(0, message.find("; searched: ")),
              "name a module that is there in LOCKSTEP_CUDA_MODULE, or build it again against the "
              "libraries of this machine"};
    case absl::StatusCode::kInvalidArgument:
      return {message.substr(0, message.rfind("; ")), message.substr(message.rfind("; ") + 2)};
    default:
      return {message.substr(0, message.rfind("; ")),
              "install lockstep-worker and liblockstep_cuda.so of one build"};
  }
}

std::vector<Problem> CudaProblems(const MachineFacts& facts) {
  std::vector<Problem> problems;
  const ModuleFacts& module = facts.module;
  // Without the module only the driver can be judged.
  if (module.report.gpus.empty() && (facts.driver.cuda.empty() || module.status.ok())) {
    problems.push_back(NoGpu(facts.driver, module.report));
  }
  bool missing = false;
  for (const device::FoundLibrary& library : module.search.libraries) {
    if (!library.path.empty()) continue;
    missing = true;
    problems.push_back(MissingLibrary(library.name));
  }
  if (!module.status.ok() && !missing) problems.push_back(NoModule(module));
  for (const device::GpuInfo& gpu : module.report.gpus) {
    if (gpu.cannot_use.empty()) continue;
    const bool named = absl::StartsWith(gpu.cannot_use, "GPU ");
    const bool old = absl::StrContains(gpu.cannot_use, "compute capability");
    problems.push_back(
        {absl::StrCat(named ? "" : absl::StrCat("GPU ", gpu.ordinal, ": "), gpu.cannot_use),
         absl::StrCat("use another GPU, or the CPU",
                      old ? ""
                          : "; where it is only busy or broken, nvidia-smi shows who uses it and "
                            "what is wrong")});
  }
  return problems;
}

ordered_json CpuJson(const CpuFacts& cpu) {
  // "cpu avx512 onednn 3.5.3"
  const std::vector<std::string> words = absl::StrSplit(cpu.fingerprint, ' ');
  return {{"model", cpu.model},
          {"cores", cpu.cores},
          {"memory_bytes", cpu.memory_bytes},
          {"instruction_set", words.size() > 1 ? words[1] : ""},
          {"fingerprint", cpu.fingerprint},
          {"cannot_use", cpu.cannot_use}};
}

ordered_json GpuJson(const device::GpuInfo& gpu) {
  return {{"ordinal", gpu.ordinal},
          {"name", gpu.name},
          {"compute_capability", gpu.major == 0 ? "" : absl::StrCat(gpu.major, ".", gpu.minor)},
          {"multiprocessors", gpu.multiprocessors},
          {"memory_bytes", gpu.memory_bytes},
          {"free_bytes", gpu.free_bytes},
          {"peers", gpu.peers},
          {"cannot_use", gpu.cannot_use}};
}

ordered_json CudaJson(const MachineFacts& facts) {
  const ModuleFacts& module = facts.module;
  ordered_json json = {{"driver", facts.driver.cuda},
                       {"kernel_driver", facts.driver.kernel_module},
                       {"pci_gpus", facts.driver.pci_gpus},
                       {"module", module.path},
                       {"module_error", std::string(module.status.message())},
                       {"runtime", module.report.runtime},
                       {"cublaslt", module.report.cublaslt},
                       {"cudnn", module.report.cudnn},
                       {"nccl", module.report.nccl},
                       {"libraries", ordered_json::array()},
                       {"folders", module.search.folders},
                       {"gpus", ordered_json::array()},
                       {"problems", ordered_json::array()}};
  for (const device::FoundLibrary& library : module.search.libraries) {
    json["libraries"].push_back({{"name", library.name}, {"path", library.path}});
  }
  for (const device::GpuInfo& gpu : module.report.gpus) json["gpus"].push_back(GpuJson(gpu));
  for (const Problem& problem : CudaProblems(facts)) {
    json["problems"].push_back({{"problem", problem.problem}, {"advice", problem.advice}});
  }
  return json;
}

}  // namespace

ordered_json MachineJson(const MachineFacts& facts) {
  return {{"cpu", CpuJson(facts.cpu)},
          {"cuda", CudaJson(facts)},
          {"data",
           {{"root", facts.data.root},
            {"exists", facts.data.exists},
            {"folders", facts.data.folders}}}};
}

}  // namespace lockstep::machine
