#include "tests/layering/include_rules.h"

#include <algorithm>
#include <map>
#include <regex>
#include <set>
#include <sstream>

namespace lockstep::layering {
namespace {

constexpr char kProto[] = "lockstep/v1";  // messages
constexpr char kGrpc[] = "grpcpp";        // and generated services

// A layer, and what it may include besides itself. A name that ends in ".h" allows that one header.
const std::map<std::string, std::vector<std::string>>& Layers() {
  static const auto* const layers = new std::map<std::string, std::vector<std::string>>{
      {"common", {}},
      {"common/spec", {"common", kProto}},
      {"common/rpc", {"common", kProto, kGrpc}},

      {"server/core", {"common", "common/spec", kProto}},
      {"server/store", {"server/core", "common", "common/spec", kProto}},
      {"server/rpc",
       {"server/core", "server/store", "common", "common/spec", "common/rpc", kProto, kGrpc}},
      {"server/http", {"server/core", "server/store", "common", "common/spec", kProto}},
      {"server/main.cc",
       {"server/core", "server/store", "server/rpc", "server/http", "common", "common/spec",
        "common/rpc", kProto, kGrpc}},

      {"worker/device", {"common"}},
      {"worker/device/cpu", {"worker/device", "common"}},
      {"worker/device/cuda", {"worker/device", "common"}},
      {"worker/collective",
       {"worker/device", "worker/device/cuda/cuda_status.h", "worker/device/cuda/cuda_stream.h",
        "common"}},
      // The graph is plain data that the validator and the compiler share; the flat state is the
      // layout that layers and optimizers share.
      {"worker/optim", {"worker/device", "common", "common/spec/graph.h"}},
      {"worker/nn",
       {"worker/device", "worker/optim/flat_state.h", "common", "common/spec/graph.h"}},
      {"worker/data", {"worker/device", "common"}},
      {"worker/train",
       {"worker/nn", "worker/optim", "worker/data", "worker/collective", "worker/device",
        "worker/device/cpu/cpu_device.h", "common", "common/spec", kProto}},
      {"worker/machine",
       {"worker/device", "worker/device/cpu/cpu_device.h", "worker/collective/nccl_module.h",
        "common"}},
      {"worker/agent", {"common", "common/spec", "common/rpc", kProto, kGrpc}},
      {"worker/main.cc",
       {"worker/agent", "worker/train", "worker/machine", "worker/device/module/cuda_module.h",
        "common", "common/spec", "common/rpc", kProto, kGrpc}},

      {"client", {"common", "common/spec", "common/rpc", kProto, kGrpc}},
  };
  return *layers;
}

// Headers from outside that belong to one place: a pattern of the header, and of the files that
// may.
struct Fence {
  std::regex header;
  std::regex files;
  const char* why;
};

const std::vector<Fence>& Fences() {
  static const auto* const fences = new std::vector<Fence>{
      {std::regex("(cuda|cublas|cudnn|curand|nvrtc|nvml|cooperative_groups|cub/|thrust/).*"),
       std::regex("worker/device/cuda/.*|worker/collective/nccl_.*"),
       "CUDA stays in worker/device/cuda"},
      {std::regex("worker/device/cuda/.*"),
       std::regex("worker/device/cuda/.*|worker/collective/nccl_.*"),
       "what is of CUDA is in its module, which is loaded at run time"},
      {std::regex("nccl.*"), std::regex("worker/collective/nccl.*"),
       "NCCL stays in worker/collective/nccl*"},
      {std::regex("gloo/.*"), std::regex("worker/collective/.*"),
       "Gloo stays in worker/collective"},
      {std::regex("(dnnl|oneapi/).*"), std::regex("worker/device/cpu/.*"),
       "oneDNN stays in worker/device/cpu"},
      {std::regex("(omp\\.h|.*mmintrin\\.h)"), std::regex("worker/device/cpu/.*"),
       "vector code stays in worker/device/cpu; there are no OpenMP teams of ours"},
      {std::regex("sqlite3.*"), std::regex("server/store/.*"), "SQLite stays in server/store"},
      {std::regex("yaml-cpp/.*"), std::regex("common/spec/.*"), "YAML stays in common/spec"},
      {std::regex("(httplib\\.h|prometheus/.*)"), std::regex("server/http/.*"),
       "HTTP stays in server/http"},
      {std::regex("CLI/.*"), std::regex("client/.*|(server|worker|client)/main\\.cc"),
       "command lines are read by programs only"},
      {std::regex("google/protobuf/.*"),
       std::regex("(?!worker/(nn|optim|device|collective|data)/|"
                  "common/[^/]*$).*"),
       "messages stay out of the engine and of common"},
      {std::regex("(thread|mutex|shared_mutex|condition_variable|future|fstream|filesystem|"
                  "absl/synchronization/.*|absl/time/clock\\.h|common/fs\\.h|sys/.*|unistd\\.h)"),
       std::regex("(?!server/core/).*"),
       "the coordinator's core has no thread, clock or disk (DESIGN section 5)"},
      {std::regex("(gtest|gmock)/.*"), std::regex("tests/.*"), "tests stay in tests"},
  };
  return *fences;
}

bool IsOurs(const std::string& header) {
  static const std::regex ours("(common|server|worker|client|tests|lockstep)/.*");
  return std::regex_match(header, ours);
}

// Why `path` of layer `from` may not include `header`; "" where it may.
std::string WhyForbidden(const std::string& path, const std::string& from,
                         const std::string& header, bool quoted) {
  for (const Fence& fence : Fences()) {
    if (std::regex_match(header, fence.header) && !std::regex_match(path, fence.files)) {
      return fence.why;
    }
  }
  std::string to;
  if (header.rfind("grpc/", 0) == 0 || header.rfind("grpc++/", 0) == 0 ||
      header.rfind("grpcpp/", 0) == 0 || header.ends_with(".grpc.pb.h")) {
    to = kGrpc;
  } else if (header.rfind(std::string(kProto) + "/", 0) == 0) {
    to = kProto;
  } else if (IsOurs(header)) {
    if (!quoted) return "our own headers are included in quotes";
    to = LayerOf(header);
    if (to.empty()) return "no layer has it";
  } else if (header.find("..") != std::string::npos ||
             (quoted && header.find('/') == std::string::npos)) {
    return "write the path from the root of the repository";
  } else {
    return "";  // the standard library, the system, or a library that everyone may use
  }
  if (to == from) return "";
  const std::vector<std::string>& allowed = Layers().at(from);
  const auto allows = [&](const std::string& name) { return name == to || name == header; };
  if (std::any_of(allowed.begin(), allowed.end(), allows)) return "";
  std::string why = from + " may include only itself";
  for (const std::string& name : allowed) why += ", " + name;
  return why;
}

}  // namespace

std::string LayerOf(const std::string& path) {
  if (Layers().count(path) > 0) return path;  // a program's main file
  for (size_t slash = path.rfind('/'); slash != std::string::npos && slash > 0;
       slash = path.rfind('/', slash - 1)) {
    const std::string folder = path.substr(0, slash);
    // Files in server/ or worker/ itself, and in new folders of theirs, have no layer yet.
    if (Layers().count(folder) > 0) return folder;
  }
  return "";
}

std::vector<std::string> FindForbidden(const std::string& path, const std::string& content) {
  const std::string layer = LayerOf(path);
  if (layer.empty()) return {path + ": no rule for its folder; add one to tests/layering"};
  std::vector<std::string> forbidden;
  std::istringstream lines(content);
  std::string line;
  static const std::regex include(R"(^\s*#\s*include(_next)?\b\s*(.*)$)");
  static const std::regex target(R"(^([<"])([^>"]*)[>"].*$)");
  for (int number = 1; std::getline(lines, line); ++number) {
    std::smatch match, name;
    if (!std::regex_match(line, match, include)) continue;
    const std::string rest = match[2];
    const std::string place = path + ":" + std::to_string(number) + ": ";
    if (!std::regex_match(rest, name, target)) {
      forbidden.push_back(place + rest + ": a computed #include hides what it includes");
      continue;
    }
    const std::string why = WhyForbidden(path, layer, name[2], name[1] == "\"");
    if (!why.empty()) forbidden.push_back(place + name[2].str() + ": " + why);
  }
  return forbidden;
}

std::string FindCircle() {
  // Repeatedly takes away layers that include nothing that is left.
  std::map<std::string, std::set<std::string>> edges;
  for (const auto& [from, allowed] : Layers()) {
    edges[from];
    for (const std::string& name : allowed) {
      const std::string to = Layers().count(name) > 0 ? name : LayerOf(name);
      // One header of another layer makes it depend on that layer.
      if (!to.empty() && to != from) edges[from].insert(to);
    }
  }
  bool changed = true;
  while (changed) {
    changed = false;
    for (auto it = edges.begin(); it != edges.end();) {
      const bool leaf = std::none_of(it->second.begin(), it->second.end(),
                                     [&](const std::string& to) { return edges.count(to) > 0; });
      it = leaf ? edges.erase(it) : std::next(it);
      changed |= leaf;
    }
  }
  std::string names;
  for (const auto& [name, unused] : edges) names += (names.empty() ? "" : ", ") + name;
  return names;
}

}  // namespace lockstep::layering
