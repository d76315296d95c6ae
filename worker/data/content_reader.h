// The content of a data file, decompressed where it is gzip or xz (told by its first bytes, never
// by its name), from front to back; and what the readers of formats share. Internal to worker/data.
// Not thread-safe: one thread drives one reader.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/fs.h"
#include "worker/data/dataset.h"
#include "worker/data/gzip.h"
#include "worker/data/xz.h"

namespace lockstep::data {

// "path: what; fetch the file again"
absl::Status Damaged(const std::string& path, const std::string& what);

// "32 x 32 x 3"
std::string ShapeText(const SampleShape& shape);

// The path of the first of `names` that is in the folder. NotFound names the first and all
// accepted; one that is there but cannot be read is reported by whoever opens it.
absl::StatusOr<std::string> FindFile(FileSystem& fs, const std::string& folder,
                                     const std::vector<std::string>& names);

// NotFound where data.path is no folder; `files` says whose folder it should be: "the IDX files".
absl::Status CheckFolder(FileSystem& fs, const std::string& folder, const std::string& files);

// InvalidArgument where a limit asks for more samples than the file's.
absl::Status CheckLimit(const std::string& path, int64_t samples, Split split, int64_t limit);

class ContentReader {
 public:
  static absl::StatusOr<std::unique_ptr<ContentReader>> Open(FileSystem& fs,
                                                             const std::string& path);

  const std::string& path() const { return path_; }

  // Fewer than `bytes` only at the end.
  absl::StatusOr<size_t> Read(void* to, size_t bytes);

  // Whether that much content can be there, without reading it.
  bool CanHold(int64_t bytes) const;

 private:
  explicit ContentReader(std::string path);

  const std::string path_;
  std::unique_ptr<ReadableFile> file_;
  int64_t offset_ = 0;
  std::string compressed_;
  std::unique_ptr<GzipReader> gzip_;
  std::unique_ptr<XzReader> xz_;
};

}  // namespace lockstep::data
