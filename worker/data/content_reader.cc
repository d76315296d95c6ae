#include "worker/data/content_reader.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace lockstep::data {
namespace {

constexpr int64_t kLargestFile = int64_t{64} << 30;
constexpr size_t kMagicBytes = 6;

}  // namespace

absl::Status Damaged(const std::string& path, const std::string& what) {
  return absl::DataLossError(absl::StrCat(path, ": ", what, "; fetch the file again"));
}

std::string ShapeText(const SampleShape& shape) {
  return absl::StrFormat("%d x %d x %d", shape.height, shape.width, shape.channels);
}

absl::StatusOr<std::string> FindFile(FileSystem& fs, const std::string& folder,
                                     const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    const std::string path = JoinPath(folder, name);
    if (!absl::IsNotFound(fs.Open(path).status())) return path;
  }
  return absl::NotFoundError(absl::StrCat(
      folder, ": no ", names[0], " in this folder; accepted: ", absl::StrJoin(names, ", ")));
}

absl::Status CheckFolder(FileSystem& fs, const std::string& folder, const std::string& files) {
  if (fs.IsDirectory(folder)) return absl::OkStatus();
  return absl::NotFoundError(absl::StrCat(folder,
                                          ": no such folder; data.path names the folder of ", files,
                                          ", relative paths start at LOCKSTEP_DATA"));
}

absl::Status CheckLimit(const std::string& path, int64_t samples, Split split, int64_t limit) {
  if (limit <= samples) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(path, " has ", samples, " samples, but ",
                   split == Split::kTrain ? "data.train_samples" : "data.validation_samples",
                   " asks for ", limit));
}

ContentReader::ContentReader(std::string path) : path_(std::move(path)) {}

absl::StatusOr<std::unique_ptr<ContentReader>> ContentReader::Open(FileSystem& fs,
                                                                   const std::string& path) {
  auto reader = std::unique_ptr<ContentReader>(new ContentReader(path));
  absl::StatusOr<std::unique_ptr<ReadableFile>> file = fs.Open(path);
  if (!file.ok()) return file.status();
  reader->file_ = *std::move(file);
  char magic[kMagicBytes];
  const auto bytes = static_cast<size_t>(std::min<int64_t>(reader->file_->size(), sizeof(magic)));
  if (!reader->file_->ReadAt(0, magic, bytes).ok()) return reader;  // Read reports it
  const bool gzip = IsGzip({magic, bytes}), xz = IsXz({magic, bytes});
  if (!gzip && !xz) return reader;
  absl::StatusOr<std::string> compressed = ReadFile(fs, path, kLargestFile);
  if (!compressed.ok()) return compressed.status();
  reader->compressed_ = *std::move(compressed);
  if (gzip) reader->gzip_ = std::make_unique<GzipReader>(reader->compressed_, path);
  if (xz) reader->xz_ = std::make_unique<XzReader>(reader->compressed_, path);
  return reader;
}

absl::StatusOr<size_t> ContentReader::Read(void* to, size_t bytes) {
  if (gzip_ != nullptr) return gzip_->Read(to, bytes);
  if (xz_ != nullptr) return xz_->Read(to, bytes);
  const auto left = static_cast<size_t>(file_->size() - offset_);
  const size_t count = std::min(bytes, left);
  const absl::Status status = file_->ReadAt(offset_, to, count);
  if (!status.ok()) return status;
  offset_ += static_cast<int64_t>(count);
  return count;
}

bool ContentReader::CanHold(int64_t bytes) const {
  if (xz_ != nullptr) return true;  // LZMA's ratio has no useful bound
  return bytes <= (gzip_ == nullptr
                       ? file_->size()
                       : GzipReader::LargestContent(static_cast<int64_t>(compressed_.size())));
}

}  // namespace lockstep::data
