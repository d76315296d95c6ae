#include "common/host.h"

#include <sched.h>
#include <unistd.h>

#include <climits>
#include <cstddef>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "common/sha256.h"

namespace lockstep {
namespace {

// "net:[4026531840]": the namespace's inode identifies it within one boot.
std::string NamespaceName(const char* name) {
  const std::string path = absl::StrCat("/proc/self/ns/", name);
  char target[PATH_MAX];
  const ssize_t size = readlink(path.c_str(), target, sizeof(target));
  return size > 0 ? std::string(target, static_cast<size_t>(size)) : absl::StrCat(name, ":?");
}

}  // namespace

std::string DefaultHostId() {
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  std::string identity = absl::StrCat(boot, "\n", HostName(), "\n", geteuid());
  for (const char* name : {"pid", "net", "user", "ipc"}) {
    absl::StrAppend(&identity, "\n", NamespaceName(name));
  }
  return Sha256Hex(identity).substr(0, 32);
}

std::string HostName() {
  char name[HOST_NAME_MAX + 1] = {};
  if (gethostname(name, HOST_NAME_MAX) != 0 || name[0] == '\0') return "localhost";
  return name;
}

int AvailableCores() {
  // The kernel refuses a set smaller than its own, so grow until it fits.
  for (int capacity = CPU_SETSIZE; capacity <= CPU_SETSIZE * 1024; capacity *= 2) {
    cpu_set_t* set = CPU_ALLOC(capacity);
    if (set == nullptr) break;
    const size_t bytes = CPU_ALLOC_SIZE(capacity);
    const bool fits = sched_getaffinity(0, bytes, set) == 0;
    const int cores = fits ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (fits) return cores > 0 ? cores : 1;
  }
  return 1;
}

}  // namespace lockstep
