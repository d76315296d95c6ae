// The one door to files. Durable writes are made of the primitives of FileSystem, which comes in
// through the constructor of whoever needs it, so that tests can fill the disk or drop what was
// never synced at any operation.
//
// Errors: the path, what was tried and the system's words, under the matching code: NotFound,
// AlreadyExists, PermissionDenied, ResourceExhausted (disk or quota full), ...
// Thread safety: a FileSystem is thread-safe; a file is used by one thread, except ReadAt.
// Ownership: files are owned by the caller and closed when destroyed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace lockstep {

class WritableFile {
 public:
  virtual ~WritableFile() = default;
  virtual absl::Status Append(absl::string_view bytes) = 0;
  // fsync: what was appended survives a crash, provided that the folder is synced too.
  virtual absl::Status Sync() = 0;
  // Reports an error of writing that only closing reveals.
  virtual absl::Status Close() = 0;
};

class ReadableFile {
 public:
  virtual ~ReadableFile() = default;
  virtual int64_t size() const = 0;  // when it was opened
  // Exactly `bytes` bytes; OutOfRange where the file ends before. Thread-safe.
  virtual absl::Status ReadAt(int64_t offset, void* to, size_t bytes) = 0;
  // The whole file as memory that is read when it is touched: it may be larger than memory. Valid
  // as long as the pointer lives, also after this object. A file that is cut short meanwhile ends
  // the process (SIGBUS).
  virtual absl::StatusOr<std::shared_ptr<const char>> Map() = 0;
};

struct DirectoryEntry {
  std::string name;
  bool is_directory = false;  // false for a symbolic link, whatever it points to
};

class FileSystem {
 public:
  virtual ~FileSystem() = default;
  // A new file, or an existing one emptied.
  virtual absl::StatusOr<std::unique_ptr<WritableFile>> Create(const std::string& path) = 0;
  // FailedPrecondition: not a regular file.
  virtual absl::StatusOr<std::unique_ptr<ReadableFile>> Open(const std::string& path) = 0;
  // Atomically; replaces a file or an empty folder.
  virtual absl::Status Rename(const std::string& from, const std::string& to) = 0;
  // fsync of a folder: creations, renames and removals in it survive a crash.
  virtual absl::Status SyncDirectory(const std::string& path) = 0;
  // AlreadyExists where anything has the name; NotFound where the parent is missing.
  virtual absl::Status MakeDirectory(const std::string& path) = 0;
  virtual absl::Status RemoveFile(const std::string& path) = 0;
  virtual absl::Status RemoveDirectory(const std::string& path) = 0;  // an empty one
  // Sorted by name, without "." and "..".
  virtual absl::StatusOr<std::vector<DirectoryEntry>> List(const std::string& path) = 0;
  virtual bool IsDirectory(const std::string& path) = 0;  // follows links
};

// The machine's; lives as long as the process.
FileSystem& RealFileSystem();

// A temporary file in the same folder, fsync, rename, fsync of the folder: after a crash the path
// holds the old content or the new, complete. The temporary file is removed on failure.
absl::Status WriteFileAtomically(FileSystem& fs, const std::string& path,
                                 absl::string_view content);
absl::Status WriteFileAtomically(const std::string& path, absl::string_view content);

// The whole file. InvalidArgument: it is larger than max_bytes (nothing was read).
absl::StatusOr<std::string> ReadFile(FileSystem& fs, const std::string& path, int64_t max_bytes);
absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t max_bytes);

// The folder and its missing parents, each synced into its own parent. OK where it exists.
absl::Status MakeDirectories(FileSystem& fs, const std::string& path);
absl::Status MakeDirectories(const std::string& path);

// A file or folder with everything in it; links are removed, not followed. OK where it does not
// exist.
absl::Status RemoveTree(FileSystem& fs, const std::string& path);
absl::Status RemoveTree(const std::string& path);

absl::StatusOr<std::vector<DirectoryEntry>> ListDirectory(const std::string& path);

// "a/b" of ("a", "b"); "b" of ("", "b").
std::string JoinPath(const std::string& folder, const std::string& name);
// "/a" of "/a/b", "." of "b", "/" of "/b". Trailing slashes are ignored.
std::string ParentPath(const std::string& path);

}  // namespace lockstep
