#include "common/fs.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <utility>

#include "absl/strings/str_cat.h"

namespace lockstep {
namespace {

absl::Status Error(int number, const std::string& action, const std::string& path) {
  return absl::ErrnoToStatus(number, absl::StrCat("cannot ", action, " ", path));
}

class PosixWritableFile : public WritableFile {
 public:
  PosixWritableFile(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}
  ~PosixWritableFile() override {
    if (fd_ >= 0) close(fd_);
  }

  absl::Status Append(absl::string_view bytes) override {
    while (!bytes.empty()) {
      const ssize_t written = write(fd_, bytes.data(), bytes.size());
      if (written < 0) {
        if (errno == EINTR) continue;
        return Error(errno, "write", path_);
      }
      bytes.remove_prefix(static_cast<size_t>(written));
    }
    return absl::OkStatus();
  }

  absl::Status Sync() override {
    return fsync(fd_) == 0 ? absl::OkStatus() : Error(errno, "sync", path_);
  }

  absl::Status Close() override {
    const int fd = std::exchange(fd_, -1);
    return close(fd) == 0 ? absl::OkStatus() : Error(errno, "close", path_);
  }

 private:
  int fd_;
  const std::string path_;
};

class PosixReadableFile : public ReadableFile {
 public:
  PosixReadableFile(int fd, int64_t size, std::string path)
      : fd_(fd), size_(size), path_(std::move(path)) {}
  ~PosixReadableFile() override { close(fd_); }

  int64_t size() const override { return size_; }

  absl::Status ReadAt(int64_t offset, void* to, size_t bytes) override {
    char* next = static_cast<char*>(to);
    while (bytes > 0) {
      const ssize_t got = pread(fd_, next, bytes, offset);
      if (got < 0) {
        if (errno == EINTR) continue;
        return Error(errno, "read", path_);
      }
      if (got == 0) {
        return absl::OutOfRangeError(
            absl::StrCat("cannot read ", path_, ": it ends at byte ", offset));
      }
      next += got;
      offset += got;
      bytes -= static_cast<size_t>(got);
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::shared_ptr<const char>> Map() override {
    const auto bytes = static_cast<size_t>(size_);
    if (bytes == 0) return std::make_shared<const char>('\0');  // nothing to map
    void* data = mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, fd_, 0);
    if (data == MAP_FAILED) return Error(errno, "map", path_);
    return std::shared_ptr<const char>(static_cast<const char*>(data),
                                       [data, bytes](const char*) { munmap(data, bytes); });
  }

 private:
  const int fd_;
  const int64_t size_;
  const std::string path_;
};

class PosixFileSystem : public FileSystem {
 public:
  absl::StatusOr<std::unique_ptr<WritableFile>> Create(const std::string& path) override {
    const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) return Error(errno, "create", path);
    return std::make_unique<PosixWritableFile>(fd, path);
  }

  absl::StatusOr<std::unique_ptr<ReadableFile>> Open(const std::string& path) override {
    // Nonblocking: opening a pipe that nobody writes to must not hang.
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return Error(errno, "open", path);
    struct stat info;
    if (fstat(fd, &info) != 0) {
      const int number = errno;
      close(fd);
      return Error(number, "inspect", path);
    }
    if (!S_ISREG(info.st_mode)) {
      close(fd);
      return absl::FailedPreconditionError(
          absl::StrCat("cannot open ", path, ": it is not a regular file"));
    }
    return std::make_unique<PosixReadableFile>(fd, info.st_size, path);
  }

  absl::Status Rename(const std::string& from, const std::string& to) override {
    if (rename(from.c_str(), to.c_str()) == 0) return absl::OkStatus();
    return Error(errno, absl::StrCat("rename ", from, " to"), to);
  }

  absl::Status SyncDirectory(const std::string& path) override {
    const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return Error(errno, "open folder", path);
    const int number = fsync(fd) == 0 ? 0 : errno;
    close(fd);
    return number == 0 ? absl::OkStatus() : Error(number, "sync folder", path);
  }

  absl::Status MakeDirectory(const std::string& path) override {
    return mkdir(path.c_str(), 0777) == 0 ? absl::OkStatus() : Error(errno, "make folder", path);
  }

  absl::Status RemoveFile(const std::string& path) override {
    return unlink(path.c_str()) == 0 ? absl::OkStatus() : Error(errno, "remove", path);
  }

  absl::Status RemoveDirectory(const std::string& path) override {
    return rmdir(path.c_str()) == 0 ? absl::OkStatus() : Error(errno, "remove folder", path);
  }

  absl::StatusOr<std::vector<DirectoryEntry>> List(const std::string& path) override {
    DIR* directory = opendir(path.c_str());
    if (directory == nullptr) return Error(errno, "list folder", path);
    std::vector<DirectoryEntry> entries;
    int number = 0;
    while (true) {
      errno = 0;
      const dirent* entry = readdir(directory);
      if (entry == nullptr) {
        number = errno;
        break;
      }
      const std::string name = entry->d_name;
      if (name == "." || name == "..") continue;
      bool is_directory = entry->d_type == DT_DIR;
      if (entry->d_type == DT_UNKNOWN) {
        struct stat info;
        is_directory = fstatat(dirfd(directory), name.c_str(), &info, AT_SYMLINK_NOFOLLOW) == 0 &&
                       S_ISDIR(info.st_mode);
      }
      entries.push_back({name, is_directory});
    }
    closedir(directory);
    if (number != 0) return Error(number, "list folder", path);
    std::sort(entries.begin(), entries.end(),
              [](const DirectoryEntry& a, const DirectoryEntry& b) { return a.name < b.name; });
    return entries;
  }

  bool IsDirectory(const std::string& path) override {
    struct stat info;
    return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
  }
};

std::string WithoutTrailingSlashes(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

absl::Status RemoveEntries(FileSystem& fs, const std::string& path) {
  absl::StatusOr<std::vector<DirectoryEntry>> entries = fs.List(path);
  if (!entries.ok()) return entries.status();
  for (const DirectoryEntry& entry : *entries) {
    const std::string child = JoinPath(path, entry.name);
    absl::Status status = absl::OkStatus();
    if (entry.is_directory) {
      status = RemoveEntries(fs, child);
      if (status.ok()) status = fs.RemoveDirectory(child);
    } else {
      status = fs.RemoveFile(child);
    }
    if (!status.ok() && !absl::IsNotFound(status)) return status;
  }
  return absl::OkStatus();
}

}  // namespace

FileSystem& RealFileSystem() {
  static auto& fs = *new PosixFileSystem;  // never destroyed: used by destructors at exit too
  return fs;
}

absl::Status WriteFileAtomically(FileSystem& fs, const std::string& path,
                                 absl::string_view content) {
  // The process number keeps two programs that write the same file from sharing a temporary one.
  const std::string temporary = absl::StrCat(path, ".tmp.", getpid());
  absl::Status status = [&] {
    absl::StatusOr<std::unique_ptr<WritableFile>> file = fs.Create(temporary);
    if (!file.ok()) return file.status();
    absl::Status result = (*file)->Append(content);
    if (result.ok()) result = (*file)->Sync();
    const absl::Status closed = (*file)->Close();
    if (result.ok()) result = closed;
    if (result.ok()) result = fs.Rename(temporary, path);
    return result;
  }();
  if (!status.ok()) {
    fs.RemoveFile(temporary).IgnoreError();  // the first error is the one to report
    return status;
  }
  return fs.SyncDirectory(ParentPath(path));
}

absl::Status WriteFileAtomically(const std::string& path, absl::string_view content) {
  return WriteFileAtomically(RealFileSystem(), path, content);
}

absl::StatusOr<std::string> ReadFile(FileSystem& fs, const std::string& path, int64_t max_bytes) {
  absl::StatusOr<std::unique_ptr<ReadableFile>> file = fs.Open(path);
  if (!file.ok()) return file.status();
  const int64_t size = (*file)->size();
  if (size > max_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("cannot read ", path, ": it has ", size,
                                                   " bytes; accepted: up to ", max_bytes));
  }
  std::string content(static_cast<size_t>(size), '\0');
  const absl::Status status = (*file)->ReadAt(0, content.data(), content.size());
  if (!status.ok()) return status;
  return content;
}

absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t max_bytes) {
  return ReadFile(RealFileSystem(), path, max_bytes);
}

absl::Status MakeDirectories(FileSystem& fs, const std::string& path) {
  if (fs.IsDirectory(path)) return absl::OkStatus();
  const std::string parent = ParentPath(path);
  if (parent != WithoutTrailingSlashes(path)) {
    const absl::Status status = MakeDirectories(fs, parent);
    if (!status.ok()) return status;
  }
  const absl::Status made = fs.MakeDirectory(path);
  if (absl::IsAlreadyExists(made) && fs.IsDirectory(path)) return absl::OkStatus();  // a race
  if (!made.ok()) return made;
  return fs.SyncDirectory(parent);
}

absl::Status MakeDirectories(const std::string& path) {
  return MakeDirectories(RealFileSystem(), path);
}

absl::Status RemoveTree(FileSystem& fs, const std::string& path) {
  // A link to a folder is removed as the file that it is.
  const absl::Status file = fs.RemoveFile(path);
  if (file.ok() || absl::IsNotFound(file)) return absl::OkStatus();
  if (!fs.IsDirectory(path)) return file;
  absl::Status status = RemoveEntries(fs, path);
  if (status.ok()) status = fs.RemoveDirectory(path);
  return absl::IsNotFound(status) ? absl::OkStatus() : status;
}

absl::Status RemoveTree(const std::string& path) { return RemoveTree(RealFileSystem(), path); }

absl::StatusOr<std::vector<DirectoryEntry>> ListDirectory(const std::string& path) {
  return RealFileSystem().List(path);
}

std::string JoinPath(const std::string& folder, const std::string& name) {
  if (folder.empty()) return name;
  return folder.back() == '/' ? folder + name : folder + "/" + name;
}

std::string ParentPath(const std::string& path) {
  const std::string trimmed = WithoutTrailingSlashes(path);
  const size_t slash = trimmed.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : WithoutTrailingSlashes(trimmed.substr(0, slash));
}

}  // namespace lockstep
