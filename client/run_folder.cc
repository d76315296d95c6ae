#include "client/run_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <filesystem>

#include "absl/strings/str_cat.h"
#include "client/commands.h"
#include "client/format.h"
#include "common/fs.h"

namespace lockstep::client {
namespace {

// The folder's lock: on the folder itself, so that no file is left. -1: somebody has it.
int Lock(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) != 0) {
    close(fd);
    return -1;
  }
  return fd;
}

bool Exists(const std::string& path) {
  std::error_code error;
  return std::filesystem::exists(std::filesystem::symlink_status(path, error));
}

bool Contains(const std::string& folder, const std::string& path) {
  std::error_code error;
  const auto outer = std::filesystem::weakly_canonical(folder, error);
  const auto inner = std::filesystem::weakly_canonical(path, error);
  if (error) return false;
  const auto relative = inner.lexically_relative(outer);
  return !relative.empty() && *relative.begin() != "..";
}

absl::Status InUse(const std::string& path) {
  return absl::InvalidArgumentError(absl::StrCat(
      "another `lockstep run` uses ", path, "; wait for its end or choose another with --out DIR"));
}

}  // namespace

absl::StatusOr<RunFolder> RunFolder::Open(const std::string& path, const std::string& job_name,
                                          const std::string& resume, absl::Time now) {
  std::string folder, moved;
  if (path.empty()) {
    const std::string base = AbsolutePath(absl::StrCat("runs/", job_name, "-", FormatStamp(now)));
    folder = base;
    for (int i = 2; Exists(folder); ++i) folder = absl::StrCat(base, "-", i);
  } else {
    folder = AbsolutePath(path);
    const bool goes_on = !resume.empty() && Contains(folder, resume);
    if (Exists(JoinPath(folder, "spec.yaml")) && !goes_on) {
      const int lock = Lock(folder);
      if (lock < 0) return InUse(folder);
      int number = 1;
      while (Exists(absl::StrCat(folder, ".", number))) ++number;
      moved = absl::StrCat(folder, ".", number);
      const absl::Status renamed = RealFileSystem().Rename(folder, moved);
      close(lock);
      if (!renamed.ok()) {
        return absl::InvalidArgumentError(
            absl::StrCat(folder, " holds an earlier run and could not be moved away (",
                         std::string(renamed.message()), "); choose another with --out DIR"));
      }
    }
  }
  const absl::Status made = MakeDirectories(folder);
  if (!made.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(
        std::string(made.message()), "; choose a folder that can be written with --out DIR"));
  }
  const int lock = Lock(folder);
  if (lock < 0) return InUse(folder);
  return RunFolder(std::move(folder), std::move(moved), lock);
}

RunFolder::RunFolder(RunFolder&& other) noexcept
    : path_(std::move(other.path_)), moved_(std::move(other.moved_)), lock_(other.lock_) {
  other.lock_ = -1;
}

RunFolder::~RunFolder() {
  if (lock_ >= 0) close(lock_);
}

}  // namespace lockstep::client
