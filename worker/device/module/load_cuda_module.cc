#include <dlfcn.h>
#include <glob.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "worker/device/module/cuda_module.h"

namespace lockstep::device {
namespace {

namespace fs = std::filesystem;

// In an order in which each finds what it needs. The first and third are needed by others alone.
constexpr const char* kLibraries[] = {"libnvrtc.so.13", "libcublasLt.so.13", "libcublas.so.13",
                                      "libcudnn.so.9", "libnccl.so.2"};

std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// Once, by whatever name.
void AddFolder(const fs::path& folder, std::vector<std::string>* folders) {
  std::error_code error;
  if (!fs::is_directory(folder, error)) return;
  const bool known = std::any_of(folders->begin(), folders->end(), [&](const std::string& other) {
    return fs::equivalent(folder, other, error);
  });
  if (!known) folders->push_back(folder.string());
}

// The folder that holds a torch that python3 imports, or "".
std::string TorchSite() {
  std::FILE* pipe = popen(
      "python3 -c \"import importlib.util as u; s = u.find_spec('torch'); "
      "print(s.submodule_search_locations[0] if s else '')\" 2>/dev/null",
      "r");
  if (pipe == nullptr) return "";
  std::array<char, 4096> line{};
  const bool read = std::fgets(line.data(), line.size(), pipe) != nullptr;
  pclose(pipe);
  const std::string torch(absl::StripAsciiWhitespace(read ? line.data() : ""));
  return torch.empty() ? "" : fs::path(torch).parent_path().string();
}

std::vector<std::string> Folders() {
  std::vector<std::string> folders;
  for (absl::string_view folder :
       absl::StrSplit(Environment("LOCKSTEP_CUDA_LIBS"), ':', absl::SkipEmpty())) {
    AddFolder(std::string(folder), &folders);
  }
  for (const std::string& root :
       {Environment("CUDA_HOME"), Environment("CUDA_PATH"), std::string("/usr/local/cuda")}) {
    if (root.empty()) continue;
    AddFolder(fs::path(root) / "lib64", &folders);
    AddFolder(fs::path(root) / "lib", &folders);
  }
  const std::string site = TorchSite();
  glob_t found{};
  if (!site.empty() && glob((site + "/nvidia/*/lib").c_str(), 0, nullptr, &found) == 0) {
    for (size_t i = 0; i < found.gl_pathc; ++i) AddFolder(found.gl_pathv[i], &folders);
  }
  globfree(&found);
  return folders;
}

// Loaded for all that come after: the module, and libraries that load others by name.
std::string LoadLibrary(const char* name, const std::vector<std::string>& folders) {
  for (const std::string& folder : folders) {
    const std::string path = absl::StrCat(folder, "/", name);
    if (access(path.c_str(), R_OK) == 0 && dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL)) {
      return path;
    }
  }
  return dlopen(name, RTLD_NOW | RTLD_GLOBAL) != nullptr ? "by the system's loader" : "";
}

LibrarySearch& Search() {
  static auto* search = new LibrarySearch();
  return *search;
}

std::string ModulePath() {
  const std::string named = Environment("LOCKSTEP_CUDA_MODULE");
  if (!named.empty()) return named;
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error).parent_path();
  for (const fs::path& folder : {program, program.parent_path() / "lib"}) {
    const fs::path path = folder / "liblockstep_cuda.so";
    if (fs::exists(path, error)) return path.string();
  }
  return "";
}

absl::StatusOr<const CudaModule*> Load() {
  LibrarySearch& search = Search();
  const std::string path = ModulePath();
  if (path.empty()) {
    return absl::NotFoundError(
        "liblockstep_cuda.so is neither beside this program nor in ../lib; build with "
        "LOCKSTEP_CUDA=ON, or name it in LOCKSTEP_CUDA_MODULE");
  }
  for (absl::string_view folder :
       absl::StrSplit(Environment("LOCKSTEP_CUDA_LIBS"), ':', absl::SkipEmpty())) {
    std::error_code error;
    if (fs::is_directory(std::string(folder), error)) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "LOCKSTEP_CUDA_LIBS names ", folder, ", which is no folder; name folders that are there"));
  }
  search.folders = Folders();
  std::vector<std::string> missing;
  for (const char* name : kLibraries) {
    search.libraries.push_back({name, LoadLibrary(name, search.folders)});
    if (search.libraries.back().path.empty()) missing.push_back(name);
  }
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* why = dlerror();
    return absl::NotFoundError(absl::StrCat(
        path, " cannot be loaded: ", why == nullptr ? "" : why,
        missing.empty() ? "" : absl::StrCat("; not found: ", absl::StrJoin(missing, ", ")),
        "; searched: ", absl::StrJoin(search.folders, ", "), search.folders.empty() ? "" : ", and ",
        "where the system looks. Name their folders in LOCKSTEP_CUDA_LIBS"));
  }
  auto* symbol = dlsym(handle, kCudaModuleSymbol);
  if (symbol == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat(path, " is not a CUDA module of Lockstep"));
  }
  const CudaModule* module = reinterpret_cast<const CudaModule* (*)()>(symbol)();
  if (absl::string_view(module->build) != LOCKSTEP_MODULE_BUILD) {
    return absl::FailedPreconditionError(
        absl::StrCat(path, " is of another build (", module->build, ", this program is of ",
                     LOCKSTEP_MODULE_BUILD, "); install both from one"));
  }
  return module;
}

}  // namespace

absl::StatusOr<const CudaModule*> LoadCudaModule() {
  static const auto* module = new absl::StatusOr<const CudaModule*>(Load());
  return *module;
}

const LibrarySearch& CudaLibraries() { return Search(); }

}  // namespace lockstep::device
