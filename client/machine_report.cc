#include "client/machine_report.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/format.h"
#include "client/table.h"

namespace lockstep::client {
namespace {

using nlohmann::ordered_json;

constexpr Table::Align kRight = Table::Align::kRight;

bool HasTexts(const ordered_json& object, const std::vector<const char*>& keys) {
  return object.is_object() && std::all_of(keys.begin(), keys.end(), [&](const char* key) {
           return object.contains(key) && object[key].is_string();
         });
}

bool HasCounts(const ordered_json& object, const std::vector<const char*>& keys) {
  return object.is_object() && std::all_of(keys.begin(), keys.end(), [&](const char* key) {
           return object.contains(key) && object[key].is_number_integer();
         });
}

template <class Check>
bool IsListOf(const ordered_json& object, const char* key, Check check) {
  return object.contains(key) && object[key].is_array() &&
         std::all_of(object[key].begin(), object[key].end(), check);
}

bool IsText(const ordered_json& value) { return value.is_string(); }

bool IsCuda(const ordered_json& cuda) {
  return HasTexts(cuda,
                  {"driver", "kernel_driver", "module", "runtime", "cublaslt", "cudnn", "nccl"}) &&
         IsListOf(cuda, "libraries",
                  [](const ordered_json& library) {
                    return HasTexts(library, {"name", "path"});
                  }) &&
         IsListOf(cuda, "folders", IsText) &&
         IsListOf(cuda, "gpus",
                  [](const ordered_json& gpu) {
                    return HasTexts(gpu, {"name", "compute_capability", "cannot_use"}) &&
                           HasCounts(
                               gpu, {"ordinal", "multiprocessors", "memory_bytes", "free_bytes"}) &&
                           IsListOf(gpu, "peers", [](const ordered_json& peer) {
                             return peer.is_number_integer();
                           });
                  }) &&
         IsListOf(cuda, "problems", [](const ordered_json& problem) {
           return HasTexts(problem, {"problem", "advice"});
         });
}

std::string Text(const ordered_json& object, const char* key) {
  return OneLine(object[key].get<std::string>());
}

int64_t Count(const ordered_json& object, const char* key) { return object[key].get<int64_t>(); }

bool CanUseGpu(const ordered_json& cuda) {
  return std::any_of(cuda["gpus"].begin(), cuda["gpus"].end(),
                     [](const ordered_json& gpu) { return Text(gpu, "cannot_use").empty(); });
}

// "a, b, c, ...": lists that a machine may make long.
std::string Some(const ordered_json& list) {
  constexpr size_t kShown = 8;
  std::vector<std::string> texts;
  for (const ordered_json& item : list) {
    if (texts.size() == kShown) {
      texts.push_back("...");
      break;
    }
    texts.push_back(OneLine(item.get<std::string>()));
  }
  return absl::StrJoin(texts, ", ");
}

std::string CpuText(const ordered_json& cpu, const Terminal& terminal) {
  Table table({});
  const int64_t cores = Count(cpu, "cores");
  const std::string model = Text(cpu, "model");
  table.AddRow({"processor", absl::StrCat(model.empty() ? "unknown" : model, ", ", cores,
                                          cores == 1 ? " core, " : " cores, ",
                                          FormatBytes(Count(cpu, "memory_bytes")), " memory")});
  const std::string cannot_use = Text(cpu, "cannot_use");
  table.AddRow(
      {"computes with",
       cannot_use.empty()
           ? absl::StrCat(Text(cpu, "instruction_set"), " (", Text(cpu, "fingerprint"), ")")
           : terminal.Paint(Color::kRed, absl::StrCat("nothing: ", cannot_use))});
  return terminal.Paint(Color::kBold, "CPU") + "\n" + table.Render(terminal, "  ");
}

std::string CudaText(const ordered_json& cuda, const Terminal& terminal) {
  Table table({});
  std::string driver = Text(cuda, "driver");
  driver = driver.empty() ? "none" : absl::StrCat("serves CUDA ", driver);
  if (const std::string kernel = Text(cuda, "kernel_driver"); !kernel.empty()) {
    absl::StrAppend(&driver, " (version ", kernel, ")");
  }
  table.AddRow({"driver", driver});
  const std::string module = Text(cuda, "module");
  table.AddRow({"module", module.empty()
                              ? "none"
                              : absl::StrCat(module, " (CUDA ", Text(cuda, "runtime"), ")")});
  std::vector<std::string> versions;
  for (const char* library : {"cublaslt", "cudnn", "nccl"}) {
    if (!Text(cuda, library).empty()) versions.push_back(Text(cuda, library));
  }
  if (!versions.empty()) table.AddRow({"computes with", absl::StrJoin(versions, ", ")});
  bool missing = false;
  for (const ordered_json& library : cuda["libraries"]) {
    const std::string path = Text(library, "path");
    missing |= path.empty();
    table.AddRow(
        {Text(library, "name"), path.empty() ? terminal.Paint(Color::kRed, "not found") : path});
  }
  if (missing) {
    const std::string folders = Some(cuda["folders"]);
    table.AddRow({"searched", absl::StrCat(folders, folders.empty() ? "" : ", and ",
                                           "where the system looks")});
  }
  return terminal.Paint(Color::kBold, "CUDA") + "\n" + table.Render(terminal, "  ");
}

std::string GpusText(const ordered_json& gpus, const Terminal& terminal) {
  Table table({{"GPU", kRight},
               {"NAME"},
               {"COMPUTE CAPABILITY"},
               {"MULTIPROCESSORS", kRight},
               {"MEMORY", kRight},
               {"FREE", kRight},
               {"PEERS"},
               {"USABLE"}});
  for (const ordered_json& gpu : gpus) {
    const std::vector<int64_t> peers = gpu["peers"].get<std::vector<int64_t>>();
    table.AddRow({absl::StrCat(Count(gpu, "ordinal")), Text(gpu, "name"),
                  Text(gpu, "compute_capability"), absl::StrCat(Count(gpu, "multiprocessors")),
                  FormatBytes(Count(gpu, "memory_bytes")), FormatBytes(Count(gpu, "free_bytes")),
                  peers.empty() ? "none" : absl::StrJoin(peers, ", "),
                  Text(gpu, "cannot_use").empty() ? terminal.Paint(Color::kGreen, "yes")
                                                  : terminal.Paint(Color::kRed, "no")});
  }
  return terminal.Paint(Color::kBold, "GPUs") + (gpus.empty() ? ": none\n" : "\n") +
         (gpus.empty() ? "" : table.Render(terminal, "  "));
}

std::string DataText(const ordered_json& data, const Terminal& terminal) {
  const std::string root = Text(data, "root");
  std::string found;
  if (root.empty()) {
    found = "not set; a spec's relative data.path needs it";
  } else if (!data["exists"].get<bool>()) {
    found = absl::StrCat(root, ": no such folder; name the one that holds the data");
  } else {
    found =
        absl::StrCat(root, ": ", data["folders"].empty() ? "no folders" : Some(data["folders"]));
  }
  return absl::StrCat(terminal.Paint(Color::kBold, "Data"), "\n  LOCKSTEP_DATA  ", found, "\n");
}

}  // namespace

absl::Status CheckMachine(const ordered_json& machine) {
  if (machine.is_object() && machine.contains("cpu") && machine.contains("cuda") &&
      machine.contains("data") &&
      HasTexts(machine["cpu"], {"model", "instruction_set", "fingerprint", "cannot_use"}) &&
      HasCounts(machine["cpu"], {"cores", "memory_bytes"}) && IsCuda(machine["cuda"]) &&
      HasTexts(machine["data"], {"root"}) && IsListOf(machine["data"], "folders", IsText) &&
      machine["data"].contains("exists") && machine["data"]["exists"].is_boolean()) {
    return absl::OkStatus();
  }
  return absl::InternalError(
      "lockstep-worker --probe gave no report that this version reads; use programs of one "
      "version");
}

std::string WhyUnusable(const ordered_json& machine, const std::string& device) {
  if (device == "cpu") {
    const std::string why = Text(machine["cpu"], "cannot_use");
    return why.empty() ? "" : absl::StrCat("the CPU cannot be used: ", why);
  }
  const ordered_json& cuda = machine["cuda"];
  if (CanUseGpu(cuda)) return "";
  if (cuda["problems"].empty()) return "no GPU can be used";
  const ordered_json& first = cuda["problems"].front();
  return absl::StrCat("no GPU can be used: ", Text(first, "problem"), "; ", Text(first, "advice"));
}

std::string MachineText(const ordered_json& machine, const std::string& device,
                        const Terminal& terminal) {
  const ordered_json& cuda = machine["cuda"];
  std::string text = CpuText(machine["cpu"], terminal) + "\n" + CudaText(cuda, terminal) + "\n" +
                     GpusText(cuda["gpus"], terminal) + "\n" + DataText(machine["data"], terminal);
  const bool gpu = CanUseGpu(cuda);
  if (!cuda["problems"].empty()) {
    absl::StrAppend(&text, "\n",
                    terminal.Paint(Color::kBold, gpu ? "What is wrong" : "To use a GPU"), "\n");
    for (const ordered_json& problem : cuda["problems"]) {
      absl::StrAppend(&text, "  - ", terminal.Paint(Color::kYellow, Text(problem, "problem")),
                      "\n    ", Text(problem, "advice"), "\n");
    }
  }
  // The command of the device that they ask for, or else of the best that there is.
  const bool with_gpu = device == "cuda" || (device.empty() && gpu);
  if (WhyUnusable(machine, with_gpu ? "cuda" : "cpu").empty()) {
    absl::StrAppend(&text, "\n", terminal.Paint(Color::kBold, "Next"),
                    "\n  lockstep run deploy/jobs/mlp.yaml", with_gpu ? " --device cuda" : "",
                    "\n");
  }
  return text;
}

}  // namespace lockstep::client
